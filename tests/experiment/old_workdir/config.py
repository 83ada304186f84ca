from configs import base


def get_config():
    c = base.get_config()
    c.tokenizer.kind = "bytes"
    c.model.width, c.model.layers, c.model.dense_width = 8, 3, 16
    c.model.attention_kinds = ("mla", "delta", "gqa")
    c.model.canon, c.model.init_std, c.model.tie_embeddings = 2, 0.2, True
    c.model.expert_matmul = "by_size"
    c.model.attention.update({"heads": 2, "query_rank": 4, "latent_rank": 4, "nope_width": 4})
    c.model.attention.update({"rope_width": 4, "value_width": 4})
    c.model.gqa.update({"heads": 2, "kv_heads": 1, "head_width": 4, "rope_width": 4})
    c.model.delta.update({"key_heads": 1, "value_heads": 2, "key_width": 4, "value_width": 4})
    c.model.delta.update({"taps": 2, "chunk": 16})
    c.model.indexer.update({"heads": 2, "width": 4, "rope_width": 4, "topk": 8})
    c.model.moe.update({"experts": 4, "width": 8})
    c.data.sources, c.data.fim_sources = ("task:arithmetic?count=200",), ("task",)
    c.data.sequence, c.data.batch = 128, 8
    c.train.update({"stage": "sparse", "steps": 2, "warmup_steps": 1, "log_every": 1})
    c.train.update({"eval_batches": 1, "keep": 1})
    c.sampling.update({"max_prompt": 160, "max_new": 8})
    c.reinforce.update({"prompts": 8, "group": 2})
    c.evaluate.update({"problems": 8, "samples": 2, "infill_documents": 4, "bootstrap": 50})
    return c
