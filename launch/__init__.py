"""The commands a person types: parse, validate, build, run. Every file with a `__main__` line is
one command; `--help` shows its examples.
"""
