"""Processes that tests of checkpoints start, to kill them, to limit their files or to measure them.

python -m tests.checkpoints.processes NAME DIRECTORY
"""

import os
import re
import resource
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import streamed
from checkpoints.streamed import StreamedReader, StreamedWriter
from checkpoints.training import Checkpoints
from errors import UserError

LARGE = jax.ShapeDtypeStruct((16, 1024, 2048), np.float32)  # 16 blocks of 8 MB


def killed_at_the_third_block(directory: Path) -> None:
    """Dies when the third block should go into the journal, with writes pending."""
    from tests.checkpoints.test_streamed import make_state, write

    class Killed(StreamedWriter):
        """Dies instead of recording its third block."""

        def _record(self, block, elements):
            if len(self.done) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            super()._record(block, elements)

    write(directory, make_state(), writer_class=Killed)


def killed_before_the_last_rename(directory: Path) -> None:
    """Saves two checkpoints, and dies when the second should get its name."""
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(1, {"w": jnp.ones(3)})
    checkpoints.wait()
    checkpoints._manager._checkpointer._handler.finalize = lambda directory: os._exit(9)
    checkpoints.save(2, {"w": jnp.ones(3)})
    checkpoints.wait()


def full_disk(directory: Path) -> None:
    """Writes a leaf larger than a file may be, and one behind it.

    It prints what `finish` raises, three times.
    """
    leaves = {
        "large": jax.ShapeDtypeStruct((1024, 1024), np.float32),
        "small": jax.ShapeDtypeStruct((8,), np.float32),
    }
    writer = StreamedWriter(directory, 0, leaves, "here")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    for name, leaf in leaves.items():
        value = np.random.default_rng(0).standard_normal(leaf.shape, dtype=np.float32)
        writer.write(name, (), value)
        writer.mark(name)
    for _ in range(3):
        try:
            writer.finish()
        except UserError as error:
            print(error)


def memory_of_writing(directory: Path) -> None:
    """Writes 128 MB in blocks of 8 MB, and prints by how many MB the peak of memory rose."""
    streamed.MAX_PENDING_BYTES = 8 * 2**20
    values, start = large_values(), peak_megabytes()
    writer = StreamedWriter(directory, 0, {"w": LARGE}, "here")
    for layer in range(LARGE.shape[0]):
        writer.write("w", (layer,), values.copy())
        writer.mark(str(layer))
    writer.finish()
    print(peak_megabytes() - start)


def memory_of_reading(directory: Path) -> None:
    """Reads what `memory_of_writing` wrote, and prints by how many MB the peak of memory rose."""
    values, start = large_values(), peak_megabytes()
    reader = StreamedReader(directory)
    for layer in range(LARGE.shape[0]):
        assert (reader.read("w", (layer,)) == values).all()
    print(peak_megabytes() - start)


def large_values() -> np.ndarray:
    """One block of LARGE."""
    return np.random.default_rng(0).standard_normal(LARGE.shape[1:], dtype=np.float32)


def peak_megabytes() -> float:
    """The process's own peak: ru_maxrss begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    peak = re.search("VmHWM:(.*)kB", status)
    assert peak is not None
    return int(peak[1]) / 2**10


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
