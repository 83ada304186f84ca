"""The table of algorithms: how rewards become a loss.

A step's completions and rewards are an `Experience`, of which the row's advantage makes advantages
of tokens; and what an update learns from are `Tokens`, of which surrogate and aggregation make a
loss. In comes a string, `ROW?option=value`, which spec.py parses; out comes an `Algorithm`
(row.py), whose functions ../advantages.py and ../objective.py call.

| column | files |
|---|---|
| advantage | outcomes.py (of completions), returns.py (of what follows a token), credit.py |
| ratio | ratios.py |
| surrogate | surrogates.py |
| aggregate | aggregations.py |
| selection | selections.py |
| added to any row | options.py, divergences.py, corrections.py |

Each function is built by another, whose keyword arguments are its options. To add a row, write a
`Row`: in table.py, or in a file of your own (docs/reinforce.md). Start reading at table.py.
"""
