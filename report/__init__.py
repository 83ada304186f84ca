"""Shows what a run came to: one page of numbers, curves and samples, and a table on the terminal.

In comes a workdir with what its phases left (`results.py` reads summary.json, metrics.jsonl and
samples.jsonl); out goes WORKDIR/report.html, one file that needs no network. The package imports
train.metrics, files and errors. Start at `page.py`, which puts the page together from the tables of
`table.py` and the charts of `panels.py`, `curves.py` and `figures.py`.
"""
