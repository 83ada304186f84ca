"""Runs a command by its name: `athanor pretrain ...` is `python -m launch.pretrain ...`.

athanor --help
athanor pretrain --config=configs/quickstart.py:pretrain --workdir=runs/mine
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

HELP = ("--help", "-h", "-help")


def main() -> None:
    """Runs the command that the first word names, with the words after it.

    Exits with 2 and one line on stderr for a name that is no command.
    """
    name, *words = sys.argv[1:] or ["--help"]
    known = commands()
    if name in HELP:
        print(listing(known))
        return
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean "{nearest[0]}"?' if nearest else f"there is {', '.join(known)}"
        print(f"error: {name}: no such command ({hint})", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"athanor {name}", *words]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


def commands() -> dict[str, Path]:
    """Returns the commands by name: the files beside this one."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def listing(known: dict[str, Path]) -> str:
    """Returns the commands with the first line of each docstring, which it reads unexecuted."""
    lines = ["athanor COMMAND ...; athanor COMMAND --help says more.", ""]
    for name, file in known.items():
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<12}{docstring.partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
