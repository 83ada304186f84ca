"""Sweeps: one training run for each set of changes that a config's sweep() adds.

In come a config file and the module that each run is; out go a directory for each run, with its
log, and the results: a table on the terminal, results.csv and a page, report.html. Start at
`runs.py`, which plans the runs and knows what each left behind; `processes.py` runs them some at a
time, `table.py` shows the results. The package imports experiment, files and errors.
"""
