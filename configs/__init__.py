"""Experiments: one file is the record of one experiment.

Each file's docstring says the command, what it shows, what it reached and how long it took on what;
`get_config()` returns its ConfigDict, made from `configs.base.get_config()`, and an optional
`sweep(add)` yields the overrides of a sweep. Files here are read by the commands of launch/
(`--config=configs/x.py`) and import nothing but configs.base. Start at configs/base.py, then
configs/quickstart.py.
"""
