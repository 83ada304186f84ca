"""Runs a command by its name: `athanor pretrain ...` is `python -m launch.pretrain ...`.

    athanor --help
    athanor pretrain --config=configs/quickstart.py:pretrain --workdir=runs/mine

The commands are those of launch/__init__.py.
"""

import difflib
import runpy
import sys

from experiment.stop import output_may_close
from launch import COMMANDS

HELP = ("--help", "-h", "-help")


def main() -> None:
    """Runs the command that the first word names, with the words after it.

    Exits with 2 and one line on stderr for a name that is no command.
    """
    name, *words = sys.argv[1:] or ["--help"]
    if name in HELP:
        with output_may_close():
            print(listing())
        return
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f'did you mean "{nearest[0]}"?' if nearest else f"there is {', '.join(COMMANDS)}"
        print(f"error: {name}: no such command ({hint})", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"athanor {name}", *words]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


def listing() -> str:
    """Returns the commands with a line on each."""
    lines = ["athanor COMMAND ...; athanor COMMAND --help says more.", ""]
    return "\n".join([*lines, *(f"  {name:<12}{line}" for name, line in COMMANDS.items())])


if __name__ == "__main__":
    main()
