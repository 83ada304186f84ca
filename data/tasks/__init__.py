"""Tasks: generated problems with one right answer each, named by "task:NAME?PARAMETERS".

In comes such a string, which `spec.py` parses; its table `TASKS` has the tasks by name. Out come
either problems for reinforcement learning and evaluation (`draw.py`), or documents to train on
(`documents.py`, a source like any other). The hash of its question decides the split of a problem,
so that no problem that one phase trains on is evaluated by another.

To add a task, write a frozen dataclass like `Arithmetic` and a row of `TASKS`. The package imports
`data.documents` and `errors` only. Start reading with `problem.py`.
"""
