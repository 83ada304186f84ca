"""A small model for problems of one's own, from nothing: it imitates solutions, then rewards.

    python -m launch.finetune --config=configs/small_reasoner.py:finetune --workdir=runs/x/chat \
        --config.data.sources="('task:...&direct=0.6',)"
    python -m launch.reinforce --config=configs/small_reasoner.py:reinforce --workdir=runs/x/rl \
        --config.init_from=runs/x/chat --config.reinforce.task="task:..."

docs/reinforce.md has three such recipes.
"""

from typing import Any

from configs import reinforce as rl


def common() -> Any:
    """Returns what both phases share: the model, of 0.75 million parameters, and its sampling."""
    c = rl.get_config()
    c.tokenizer.kind = "bytes"
    c.model.hidden_size = 128
    c.model.num_hidden_layers = 3
    c.model.first_k_dense_replace = 3  # no experts: they take longer to learn
    c.model.intermediate_size = 384
    c.model.canon_kernel_size = 4
    c.model.num_nextn_predict_layers = 0
    c.model.tie_word_embeddings = True
    c.model.initializer_range = 0.06
    c.model.mla.num_attention_heads = 4
    c.model.mla.q_lora_rank = 96
    c.model.mla.kv_lora_rank = 64
    c.model.rope.rope_theta = 100.0
    c.model.indexer.n_heads = 0
    c.train.stage = "dense"
    c.sampling.attention = "dense"
    c.sampling.max_prompt_tokens = 96
    c.sampling.max_new_tokens = 96
    c.evaluate.infill_documents = 0
    return c


def finetune() -> Any:
    """Returns the first phase: solutions, some of which jump to the answer."""
    c = common()
    c.data.seq_len = 256
    c.data.batch_size = 16
    c.train.steps = 200
    c.train.optimizer = "muon"
    c.train.learning_rate = 5e-3
    c.train.warmup_steps = 10
    c.train.final_ratio = 0.1
    c.train.log_every = 10
    c.train.eval_batches = 2
    return c


def reinforce() -> Any:
    """Returns the second phase: rewards."""
    c = common()
    c.train.steps = 30
    c.train.learning_rate = 2e-4
    c.train.final_ratio = 0.5
    c.reinforce.prompts_per_step = 16
    c.reinforce.group_size = 8
    return c


PHASES = {phase.__name__: phase for phase in (finetune, reinforce)}


def get_config(phase: str = "reinforce") -> Any:
    """Returns the config of a phase."""
    return PHASES[phase]()
