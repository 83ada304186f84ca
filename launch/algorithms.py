"""Prints the algorithms of reinforcement: papers, formulas, options, and what each one costs.

    python -m launch.algorithms
    python -m launch.algorithms --row=dapo
    python -m launch.algorithms --row=my_rows.py:mine
    python -m launch.algorithms --json

An option is given behind the name: --config.reinforce.algorithm="dapo?high=0.3&kl=0.01". With
--json the table, or the row, is printed as JSON.
"""

import json as json_format

from experiment.command_line import command
from experiment.flags import Flag
from rl.algorithms.described import description, listing, record
from rl.algorithms.table import ROWS

FLAGS = {
    "row": Flag("", "a row of the table, or FILE.py:NAME"),
    "json": Flag(False, "print JSON"),
}


def run(row: str, json: bool) -> None:
    """Prints the table, or one row of it."""
    if json:
        found = record(row) if row else [record(name) for name in ROWS]
        print(json_format.dumps(found, indent=1))
        return
    print(description(row) if row else listing())


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags=FLAGS)
