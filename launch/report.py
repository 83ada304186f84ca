"""Shows what a run came to, on one page: numbers, curves, and what the model wrote.

    python -m launch.report --workdir=runs/quickstart
    python -m launch.report --workdir=runs/pretrain

Writes WORKDIR/report.html, one file that needs no network. Reads what it finds:
WORKDIR/summary.json, metrics.jsonl in WORKDIR and in the directories of its phases (copying,
pretrain, warmup, sparse, finetune, reinforce), and {before,after}/samples.jsonl. What is missing is
left out, and a line names it.
"""

from pathlib import Path

from experiment.command_line import command
from report.page import write_report
from report.results import read_summary
from report.table import print_table


def run(workdir: Path) -> None:
    """Prints the numbers of a run as a table and writes its page."""
    print_table(read_summary(workdir))
    print(f"wrote {write_report(workdir)}")


if __name__ == "__main__":
    command(run, config="none")
