"""Two benchmarks by turns on one machine, so that what else it does hits both: the ratio of their
tokens_per_s, by the median over rounds.

    python -m bench.side_by_side --rounds=3 "python -m bench.train" "/path/to/torch/python
    bench/transformers_tiny.py train"

Each command prints one JSON line with tokens_per_s, as last line. Prints one JSON line.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys


def measure(command: str) -> dict:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        sys.exit(
            f"{command}: no JSON line at its end (exit code {done.returncode}); {done.stderr.strip()[-300:]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("first")
    parser.add_argument("second")
    given = parser.parse_args()
    rounds = [(measure(given.first), measure(given.second)) for _ in range(given.rounds)]
    ratios = [first["tokens_per_s"] / second["tokens_per_s"] for first, second in rounds]
    runs = {
        name: [one[at]["tokens_per_s"] for one in rounds]
        for at, name in enumerate(("first", "second"))
    }
    spread = {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }
    print(
        json.dumps({"bench": "side_by_side"} | spread | {"tokens_per_s": runs, "about": rounds[0]})
    )


if __name__ == "__main__":
    main()
