"""Shows what a run came to, on one page: numbers, curves, and what the model wrote.

    python -m launch.report --workdir=runs/quickstart
    python -m launch.report --workdir=runs/a --workdir=runs/b
    python -m launch.report --workdir=runs/sweep

Writes WORKDIR/report.html, one file that needs no network, and shows what it finds in WORKDIR and
in the directories of its phases. What did not run is not on it; a damaged line is left out, and
said. Of several workdirs, or of a directory that holds some, such as that of a sweep, the page
compares the runs: a table, and their curves in the same charts. That of several workdirs is
comparison.html, beside the first of them.
"""

from pathlib import Path

from errors import UserError
from experiment.command_line import command
from experiment.flags import Flag
from experiment.reporting import write_report
from report.escape import plain
from report.lenient import read_object
from report.table import print_table

FLAGS = {
    "workdir": Flag((), "of a run; several are compared"),
    "out": Flag("", "the file to write, in place of WORKDIR/report.html"),
}


def run(workdir: tuple[str, ...], out: str) -> None:
    """Prints the numbers of a run as a table and writes its page."""
    workdirs = [Path(name) for name in workdir if name]
    if not workdirs:
        raise UserError("--workdir is missing: name the directory of a run, such as runs/first")
    path = write_report(workdirs[0], *workdirs[1:], out=Path(out) if out else None)
    if len(workdirs) == 1:
        print_table(read_object(workdirs[0] / "summary.json", []))
    print(f"wrote {plain(path)}")


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags=FLAGS)
