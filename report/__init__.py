"""Shows what runs came to: a page of sentences, numbers, curves and samples, and a table.

In come the workdirs of runs with what their phases left (`results.py` reads summary.json,
metrics.jsonl and samples of text, whatever is in them; `lenient.py` leaves out what is damaged) and
where it comes from (an `Origin` for each phase, which `experiment/run_record.py` reads); out goes
the text of a page that needs no network. `page.py` puts it together: the sentences of `story.py`,
the tables of `stages.py`, `table.py` and `comparison.py`, the charts of `panels.py`, `curves.py`,
`held_out.py` and `scaling.py`, drawn by `svg.py` and `axes.py`, and what the model wrote
(`texts.py`). `standalone.py` makes a file of a chart. The package imports errors alone. Start at
`page.py`; `experiment/reporting.py` writes the file.
"""
