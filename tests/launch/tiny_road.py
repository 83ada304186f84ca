"""configs/quickstart.py at its smallest: every stage, a few steps each."""

from configs import quickstart


def get_config():
    stages = quickstart.get_config()
    for c in stages.values():
        c.tokenizer.vocab = 300
        c.model.width, c.model.layers, c.model.dense_width = 16, 2, 32
        c.model.attention.update({"heads": 2, "query_rank": 8, "latent_rank": 8, "nope_width": 8, "rope_width": 4, "value_width": 8})
        c.model.indexer.update({"heads": 2, "width": 8, "rope_width": 4, "topk": 8})
        c.model.moe.update({"experts": 4, "width": 16})
        c.data.sequence, c.data.batch = 128, 4
        c.train.update({"steps": 2, "warmup_steps": 1, "log_every": 1, "eval_batches": 1})
        c.sampling.update({"max_prompt": 96, "max_new": 8})
        c.reinforce.update({"prompts": 4, "group": 2})
        c.evaluate.update({"problems": 4, "samples": 8, "infill_documents": 4, "bootstrap": 100})
    return stages
