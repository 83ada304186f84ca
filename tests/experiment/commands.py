"""Commands that tests start to stop or kill: python -m tests.experiment.commands NAME WORKDIR.

Each prints "begun" when it has come to where it waits.
"""

import hashlib
import mmap
import sys
import time
from pathlib import Path

from experiment import stop
from experiment.command_line import command


def sleeps(config, workdir: Path) -> None:
    """Neither trains nor polls."""
    del config, workdir
    print("begun", flush=True)
    time.sleep(100)


def computes(config, workdir: Path) -> None:
    """The main thread is in C, as while XLA compiles: handlers of Python do not run meanwhile."""
    del config, workdir
    stop.GRACE_SECONDS = 1
    # Private pages that nobody writes to take no memory.
    zeros = mmap.mmap(-1, 2**34, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    print("begun", flush=True)
    hashlib.sha512(zeros)


def collects(config, workdir: Path) -> None:
    """Several processes that compute together, again and again."""
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    del config, workdir
    for step in range(10_000):
        multihost_utils.process_allgather(jnp.ones(3))
        if step == 3:
            print("begun", flush=True)
        time.sleep(0.02)


def fails_in_one(config, workdir: Path) -> None:
    """Process 1 has an error of its person's, and the others go on."""
    import jax

    from errors import UserError

    if jax.process_index() == 1:
        raise UserError("its disk is full")
    collects(config, workdir)


def trains(config, workdir: Path) -> bool:
    """A training loop without a model: it saves when it is asked to stop."""
    import numpy as np

    from checkpoints.training import Checkpoints
    from train.interrupt import Interrupt

    del config
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints, Interrupt() as interrupt:
        for step in range(1, 10_000):
            if step == 3:
                print("begun", flush=True)
            time.sleep(0.05)
            if interrupt.stop_requested(step):
                checkpoints.save(step, {"w": np.ones(3)})
                return False
    return True


if __name__ == "__main__":
    run = {
        "sleeps": sleeps,
        "computes": computes,
        "collects": collects,
        "fails_in_one": fails_in_one,
        "trains": trains,
    }[sys.argv[1]]
    command(run, argv=["--config=configs/base.py", f"--workdir={sys.argv[2]}"])
