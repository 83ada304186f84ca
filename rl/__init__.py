"""Reinforcement learning on verifiable tasks.

Prompts go in; completions are sampled, rewarded and learnt from. `engine.py` samples with the
trainer's own model, `trajectory.py` is the record of it, and `rewards/` scores the texts.
`algorithms/` is the table of algorithms; `signals.py` makes advantages of a step by a row of it,
and `objective.py` an objective of the ordinary train step. `learner.py` says how a step learns.

It may import train, checkpoints, data, model and what lies below. Start reading at
`rl/algorithms/table.py`, then `rl/loop.py`. Here C is the length of a completion, as in
`tokens_BC`, and N counts trajectories, as in `rewards_MN`.
"""
