"""The schema: every field of every config once, with its unit and meaning. Experiments start from
`get_config()` and change what they study.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    # Workdir (or checkpoint directory) whose newest parameters to start from, or hf:DIR, a Hugging
    # Face checkpoint; "" starts fresh. Of the latter, and of runs that come from one, the model
    # section, the tokenizer and the chat template are the checkpoint's, whatever a config file says
    # of them.
    c.init_from = ""

    c.tokenizer = ConfigDict()
    # "bpe": byte-level BPE trained on data.sources | "bytes" | "file": a Hugging Face
    # tokenizer.json
    c.tokenizer.kind = "bpe"
    c.tokenizer.path = ""  # kind "file": where tokenizer.json is
    c.tokenizer.vocab_size = 512  # kind "bpe": entries, special tokens included

    c.model = ConfigDict()
    c.model.vocab_size = 0  # rows of the embedding; 0 takes the tokenizer's
    c.model.hidden_size = 256  # D
    c.model.num_hidden_layers = 6  # L, the dense ones included
    # Attention of each layer, from the first on and again from the beginning when they are used up:
    # "mla" (model.mla) | "gqa" (model.gqa) | "delta" (model.delta). ("delta", "delta", "delta",
    # "gqa") is Qwen3-Next's.
    c.model.layer_types = ("mla",)
    c.model.first_k_dense_replace = 1  # the first layers have one dense FFN in place of experts
    c.model.mlp_only_layers = ()  # numbers (from 0) of further layers that do
    c.model.intermediate_size = 704  # hidden width of that FFN
    # taps of a causal convolution over the hidden states before attention (Canon-A, arXiv
    # 2512.17351); 0 for none
    c.model.canon_kernel_size = 0
    c.model.num_nextn_predict_layers = 1  # multi-token prediction modules; 0 for none
    # what the first module reads of the trunk: its last layer's output | "normed": that after the
    # final norm, as released
    c.model.mtp_input = "residual"
    c.model.tie_word_embeddings = False  # output head = embedding transposed
    c.model.norm = (
        "scale"  # RMS norms multiply by their parameter | "zero_centred": by 1 + their parameter
    )
    c.model.rms_norm_eps = 1e-6
    c.model.initializer_range = 0.02  # standard deviation of every weight matrix
    c.model.dtype = "float32"  # compute: "float32" | "bfloat16"; parameters are always float32
    # what a layer keeps for its backward pass: "dots" keeps its matmuls' results | "full" keeps its
    # input alone | "none" keeps all
    c.model.remat = "dots"
    c.model.scan_unroll = 1  # layers per iteration of the scan over layers
    # "chunks" of queries, XLA | "tiles", Pallas kernels (TPU and Hopper; on a CPU interpreted, very
    # slow) | "auto": tiles on TPU where a row has 512 tokens or more, else chunks
    c.model.attention_form = "auto"
    c.model.query_chunk = 512  # in chunks attention handles this many queries at a time
    # in chunks a sequence is cut into so many, each attending over the keys up to its own end only
    c.model.causal_parts = 4
    c.model.logit_chunk = 1024  # the output head handles this many tokens of a row at a time
    # "auto" | "blocks" | "bucketed" | "megablox" | "reference" | "tokamax", see
    # model/experts/table.py
    c.model.expert_matmul = "auto"

    c.model.rope = ConfigDict()
    c.model.rope.rope_theta = 10_000.0  # the slowest channels turn once in about 2 pi theta tokens
    c.model.rope.factor = (
        1.0  # YaRN (arXiv 2309.00071): the context is this many times `context`; 1 for none
    )
    c.model.rope.original_max_position_embeddings = 4_096  # tokens, before stretching
    c.model.rope.beta_fast = (
        32.0  # channels that turn more often than this over `context` keep their speed
    )
    c.model.rope.beta_slow = (
        1.0  # those that turn less often are slowed by `stretch`; between the two a ramp
    )
    c.model.rope.truncate = True  # the ramp begins and ends on whole channels
    # multiplies cos and sin: YaRN's 0.1 ln(stretch) + 1, where it is not in attention.logit_scale
    c.model.rope.attention_factor = 1.0
    c.model.rope.rope_interleave = (
        True  # MLA turns the channels (0, 1), (2, 3), ...; else (0, P), (1, P + 1), ... as gqa does
    )
    c.model.rope.indexer_rope_interleave = (
        False  # the same of the indexer, whose released weights are for (0, P), ...
    )

    c.model.mla = ConfigDict()  # multi-head latent attention, "mla"
    c.model.mla.num_attention_heads = 8  # N
    c.model.mla.q_lora_rank = (
        128  # width of the query latent; 0 projects queries straight from the hidden state
    )
    c.model.mla.kv_lora_rank = 64  # R, width of the key-value latent
    c.model.mla.qk_nope_head_dim = 32  # per head, without position
    c.model.mla.qk_rope_head_dim = 16  # per head, rotated; its key is shared by all heads
    c.model.mla.v_head_dim = 32  # per head
    # multiplies the logits beside query width ** -0.5: DeepSeek's YaRN has (0.1 mscale_all_dim
    # ln(stretch) + 1) ** 2
    c.model.mla.logit_scale = 1.0
    c.model.mla.norm_eps = 1e-6  # of the norms of the two latents
    c.model.mla.gate = (
        "element"  # sigmoid gate on the attention output: "none" | "head" | "element"
    )

    c.model.gqa = ConfigDict()  # grouped-query attention, "gqa"
    c.model.gqa.num_attention_heads = 8  # N
    c.model.gqa.num_key_value_heads = 2  # K
    c.model.gqa.head_dim = 32  # H
    c.model.gqa.rotary_dim = 32  # of the head width, rotated
    c.model.gqa.qk_norm = True  # RMS norm over each head's query and key
    c.model.gqa.gate = "element"  # as in model.mla

    c.model.delta = ConfigDict()  # Gated DeltaNet, "delta"
    c.model.delta.num_key_heads = 4  # queries have as many
    c.model.delta.num_value_heads = (
        8  # value head n reads with key head n * key_heads // value_heads
    )
    c.model.delta.key_head_dim = 32
    c.model.delta.value_head_dim = 32
    c.model.delta.conv_kernel_dim = 4  # of the causal convolutions over queries, keys and values
    c.model.delta.chunk_size = (
        64  # tokens between which the state is carried; within, it is matmuls
    )

    c.model.indexer = ConfigDict()
    c.model.indexer.n_heads = 4  # I; 0 builds no indexer
    c.model.indexer.head_dim = 32  # C
    c.model.indexer.rope_head_dim = 16  # of the width, rotated
    c.model.indexer.topk = 64  # keys each query attends to in sparse mode; min(topk, context)
    c.model.indexer.norm_eps = 1e-6  # of the layer norm of its keys

    c.model.moe = ConfigDict()
    c.model.moe.num_experts = 8  # E, routed
    c.model.moe.num_experts_per_tok = 2  # K, routed experts per token
    c.model.moe.n_shared_experts = 1  # experts every token goes through
    c.model.moe.intermediate_size = 176  # hidden width of one expert
    c.model.moe.shared_expert_intermediate_size = (
        0  # hidden width of one shared expert; 0 takes `width`
    )
    c.model.moe.shared_expert_gate = False  # the shared experts' output times sigmoid(x w)
    c.model.moe.scoring_func = (
        "sigmoid"  # an expert's score: "sigmoid" of its logit | "softmax" over all experts
    )
    # experts are chosen by score plus a bias that evens out their load; the gates do not see it
    c.model.moe.router_bias = True
    c.model.moe.norm_topk_prob = True  # the gates of the chosen experts are divided by their sum
    c.model.moe.n_group = 1  # experts are chosen from `chosen_groups` of `groups` groups
    c.model.moe.topk_group = 1
    # a group counts for the sum of its so many best biased scores; 0 for chosen / chosen_groups
    # (the paper's; released code has 2)
    c.model.moe.group_topk = 0
    c.model.moe.routed_scaling_factor = 1.0  # multiplies the gates of the routed experts

    c.mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.expert = 1
    c.mesh.tensor = 1

    c.data = ConfigDict()
    # One string a source: "stdlib" | "text:GLOB" | "jsonl:GLOB#FIELD" (.gz too) |
    # "parquet:GLOB#FIELD" | "arrayrecord:GLOB#FIELD" (records are JSON, or text without #FIELD) |
    # "task:NAME?min_ops=2&max_ops=4" (verifiable problems of data/tasks: the task's own parameters,
    # and count=20000, style=text|chat, direct=0.0). For chat the FIELD holds the list of messages;
    # a field "tools" beside it goes to a checkpoint's template.
    c.data.sources = ("stdlib",)
    c.data.mixture = (1.0,)  # share of documents drawn from each source
    # share of files (or records) held out, by hash; a task always holds out a tenth of its problems
    c.data.validation = 0.05
    c.data.seq_len = 256  # T, tokens a row
    c.data.batch_size = 8  # B, rows a step, over all processes
    # share of documents made into fill-in-the-middle, before packing; a long one is cut to pieces
    # of at most a row first
    c.data.fim_rate = 0.5
    # of those, the share written suffix-prefix-middle; the rest prefix-suffix-middle. Above a half,
    # evaluation and sampling infill in it
    c.data.fim_spm = 0.5
    c.data.fim_sources = (
        "stdlib",
        "text",
        "jsonl",
        "parquet",
        "arrayrecord",
    )  # kinds of source FIM applies to (no task: its answer must stay last)
    # share of documents written as copying exercises (data/copies.py) in place of anything else;
    # not in launch.finetune
    c.data.copy_rate = 0.0
    c.data.packing = (
        "split"  # "split": concatenate then cut | "fit": first fit, documents stay whole
    )
    # attention crosses documents packed in one row (DeepSeek-V3 pretrains so; chat never does)
    c.data.cross_document_attention = True
    # how chat is written: "think" | "r1" (data/chat.py) | "checkpoint", by the tokenizer's own
    # template in jinja
    c.data.chat_template = "think"

    c.train = ConfigDict()
    # "dense": full attention | "warmup": full attention, the indexer alone learns, by KL |
    # "sparse": top-k attention, the indexer learns on the selected set
    c.train.stage = "dense"
    c.train.steps = 1_000
    c.train.microbatches = 1  # the batch is cut into this many, gradients summed
    # "adamw" | "muon": orthogonalised momentum for matrices, AdamW for embedding, head and norms
    # (arXiv 2502.16982)
    c.train.optimizer = "adamw"
    c.train.learning_rate = 1e-3  # peak
    c.train.warmup_steps = 50  # linear from 0
    c.train.constant_steps = 0  # at the peak
    c.train.cosine_steps = -1  # from the peak to final_ratio of it; -1 takes what is left
    c.train.final_ratio = 0.1  # of the peak, constant to the end
    c.train.beta1 = 0.9
    c.train.beta2 = 0.95
    c.train.weight_decay = 0.1  # on matrices only
    c.train.clip_norm = 1.0  # of the global gradient; 0 for none
    # regular expression over parameter paths; the rest is frozen (stage "warmup" also freezes all
    # but the indexer)
    c.train.trainable = ".*"
    c.train.mtp_weight = (
        0.3  # lambda of arXiv 2412.19437, eq. 25; with 0 the MTP modules do not run
    )
    c.train.balance_weight = 1e-4  # alpha of the sequence-wise balance loss, eq. 17
    c.train.router_bias_rate = 1e-3  # gamma: how far a step moves the router bias
    c.train.indexer_weight = 1.0  # of the indexer's KL
    c.train.log_every = 10  # steps
    c.train.eval_every = 0  # steps; 0 evaluates at the end only
    c.train.eval_batches = 8
    c.train.save_every = 500  # steps; the last step is always saved
    c.train.max_to_keep = 2  # checkpoints kept
    c.train.max_skipped = 10  # steps in a row without finite gradients before the run stops

    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0  # 0 is greedy
    c.sampling.top_k = 0  # 0 for all
    c.sampling.top_p = 1.0
    c.sampling.max_prompt_tokens = 96  # tokens
    c.sampling.max_new_tokens = 64  # tokens
    c.sampling.attention = "sparse"  # "sparse" | "dense"
    # Below 1, each new token attends to the fewest of its keys that by estimate hold this share of
    # its attention (Twilight, arXiv 2502.02770): the indexer's softmax over what it selected, or
    # without an indexer 4-bit keys. Samples are then not quite the model's own: for reinforcement
    # see docs/decode.md.
    c.sampling.attention_top_p = 1.0

    c.reinforce = ConfigDict()
    c.reinforce.algorithm = "dr_grpo"  # a row of rl/algorithms.py
    c.reinforce.task = "task:arithmetic"
    c.reinforce.prompts_per_step = 16  # prompts a step
    c.reinforce.group_size = 8  # G, completions a prompt
    c.reinforce.minibatches = 1  # optimizer updates a pass over the rollout
    c.reinforce.epochs = 1  # passes over each rollout
    # of the divergence to the reference (the model RL started from); -1 takes the algorithm's own,
    # 0 turns it off
    c.reinforce.kl_weight = -1.0
    c.reinforce.answer_reward = 1.0
    c.reinforce.format_reward = 0.1
    # pi_old in the ratio: "sampler" as recorded | "trainer" recomputed before the first update
    c.reinforce.old_logprobs = "sampler"

    c.evaluate = ConfigDict()
    c.evaluate.problems = 128  # held-out; 0 for none
    c.evaluate.samples = 8  # completions a problem; pass@k for k up to this
    c.evaluate.infill_documents = 64  # held-out, for infilling and the indexer's recall; 0 for none
    c.evaluate.bootstrap = 1_000  # resamples of the problems
    return c
