"""Tasks: problems with answers that can be checked, named by "task:NAME?PARAMETERS".

In comes such a string, which `spec.py` parses: a task of its table `TASKS`, problems from a file
("task:jsonl:FILE#QUESTION,ANSWER", `files.py`), or a class of a person's own (`own.py`). Out come
either problems for reinforcement learning and evaluation (`draw.py`), or documents to train on
(`documents.py`, a source like any other). The hash of its question decides the split of a problem,
so that no problem that one phase trains on is evaluated by another; a file may hold out another.

To add a task, write a frozen dataclass like `Arithmetic` and a row of `TASKS`. The package imports
`data` and `errors` only. Start reading with `problem.py`.
"""
