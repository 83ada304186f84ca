"""The thread that makes batches ahead of time."""

import pathlib
import subprocess
import sys

PROGRAM = """
import grain
from data.prefetch import Prefetch
iterator = iter(Prefetch(grain.MapDataset.range(1_000_000).to_iter_dataset(), 4))
assert [next(iterator), next(iterator)] == [0, 1]
assert iterator.get_state() == {"next_index": 2}
raise SystemExit(3)
"""


def test_python_ends_quietly_with_the_thread_still_at_work():
    """It needs a separate process: only at its end can a traceback appear."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", "")
