"""configs/quickstart.py at its smallest: every phase, two steps each."""

from typing import Any

from configs import quickstart


def get_config():
    phases = quickstart.get_config()
    for name, phase in phases.items():
        shrink(name, phase)
    return phases


def shrink(name: str, c: Any) -> None:
    c.tokenizer.vocab_size = 300
    c.model.hidden_size, c.model.num_hidden_layers, c.model.intermediate_size = 16, 2, 32
    c.model.mla.update(
        {
            "num_attention_heads": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }
    )
    c.model.indexer.update({"n_heads": 2, "head_dim": 8, "rope_head_dim": 4, "topk": 8})
    c.model.moe.update({"num_experts": 4, "intermediate_size": 16})
    c.model.num_nextn_predict_layers = 1
    c.data.seq_len, c.data.batch_size = 128, 4
    c.train.update({"steps": 2, "warmup_steps": 1, "log_every": 1})
    # Each program compiles for seconds: pretraining alone trains the MTP module, and held-out
    # text is evaluated in the phases of which something is read afterwards.
    c.train.mtp_weight = 0.3 if name == "pretrain" else 0.0
    c.train.eval_batches = 1 if name in ("pretrain", "sparse") else 0
    c.sampling.update({"max_prompt_tokens": 96, "max_new_tokens": 8})
    c.reinforce.update({"prompts_per_step": 4, "group_size": 2})
    c.evaluate.update({"problems": 4, "samples": 8, "infill_documents": 4, "bootstrap": 100})
