"""Reinforcement learning on verifiable tasks.

Prompts go in; completions are sampled, rewarded and learnt from. `engine.py` samples with the
trainer's own model, `trajectory.py` is the record of it, `rewards/` scores the texts,
`algorithms.py` is the table of algorithms (GRPO, Dr.GRPO, DAPO, RLOO), each a row of an advantage,
a ratio, a surrogate, an aggregation and a divergence, and `objective.py` makes any row an objective
of the ordinary train step.

It may import train, checkpoints, data, model and what lies below. Start reading at
`rl/algorithms.py`, then `rl/loop.py`. Here C is the length of a completion, as in `tokens_BC`.
"""
