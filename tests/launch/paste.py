"""Runs commands one after the other in this process, which then compiles each program once.

    python -m tests.launch.paste COMMANDS.json

The file has a list of commands, each a list of words: "python", "-m", a module, its arguments.
"""

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    for words in json.loads(Path(sys.argv[1]).read_text()):
        print("$", *words, flush=True)
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
