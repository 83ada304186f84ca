"""Plans a run without running it: what its programs need of the devices, and how long they take.

In come the sections of a config as dataclasses and a mesh, over the devices of this process or over
a TPU topology that is only named. Out go programs to compile (`programs.py`) and a `Plan` of each
(`account.py`): bytes by kind, FLOPs, collectives, HBM traffic, lower bounds on the time. Start at
`programs.py`. The package imports rl, train, model, data.config and errors; it never sees the whole
config, and nothing below launch/ and bench/ imports it.
"""
