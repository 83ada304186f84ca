r"""Runs two benchmarks by turns and prints the ratio of their tokens_per_s, by the median.

    python -m bench.side_by_side --rounds=3 "python -m bench.train" \
        "/path/to/torch/python bench/transformers_tiny.py train"

By turns on one machine, so that its other load slows both. Each command prints one JSON
line with tokens_per_s as its last line; so does this one.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys


def measure(command: str) -> dict:
    """Runs a command and returns the JSON of its last line; exits if there is none."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        error = done.stderr.strip()[-300:]
        sys.exit(f"{command}: no JSON line at its end (exit code {done.returncode}); {error}")


def main() -> None:
    """Measures both by turns and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("first")
    parser.add_argument("second")
    given = parser.parse_args()
    rounds = [(measure(given.first), measure(given.second)) for _ in range(given.rounds)]
    ratios = [first["tokens_per_s"] / second["tokens_per_s"] for first, second in rounds]
    speeds = {
        "first": [first["tokens_per_s"] for first, _ in rounds],
        "second": [second["tokens_per_s"] for _, second in rounds],
    }
    spread = {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }
    result = {"bench": "side_by_side"} | spread | {"tokens_per_s": speeds, "about": rounds[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
