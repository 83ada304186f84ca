"""One file, one experiment: its docstring is the record (command, result, time), `get_config()` the
settings. base.py is the schema.
"""
