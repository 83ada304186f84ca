"""Experiments: the one place that knows the whole config.

A config file, its overrides and a working directory come in; validated dataclasses, and the runs of
the other packages with the sections they need, go out. The config of a run is recorded in its
working directory, so that the run can go on and be read later.

It may import every package but launch and configs. Start reading in schema.py (what a config is)
and runs.py (what is done with it); command_line.py is what the commands in launch/ share.
"""
