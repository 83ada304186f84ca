"""Training: from a batch to the next state of the run.

`objective.py` says what is minimised, each term a `Mean` of a total over a weight, and of pairs
`preference_objective.py` by a row of the table in `preferences.py`; `step.py` differentiates it and
applies the optimizer (`optimizer.py`, `state.py`) and the router's bias update (`balance.py`);
`loop.py` runs the steps, and `metrics.py` and `progress.py` report them.

It may import checkpoints, data, model and what lies below; reinforcement learning (rl/) stands on
it. Start reading at `train/step.py`.
"""
