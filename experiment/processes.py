"""Sets how many devices this process pretends to have, and which other processes it joins.

Both must be settled before JAX sees its first device.
"""

import atexit
import json
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

from errors import UserError
from experiment.lock import is_alive, this_process
from experiment.stop import end_now

# A process that says nothing for so long is taken for dead, and the run ends. JAX waits for 100.
HEARTBEAT_SECONDS = 30
# Held by the thread that ends this process of several, and never given back.
_last_word = threading.RLock()


def pretend_devices(count: int) -> None:
    """Makes this CPU look like `count` devices, for a dry run; 0 leaves everything as it is.

    The environment is set too, for the processes that this one starts. Raises UserError for a
    negative count.
    """
    if count < 0:
        raise UserError(f"--pretend_devices={count}: must be positive")
    if not count:
        return
    # XLA reads the last of several flags of one name.
    flag = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read JAX_PLATFORMS by then
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def join_processes() -> None:
    """Joins the other processes of a run on several hosts, if ATHANOR_DISTRIBUTED says so.

    "1" lets JAX find them (TPU, GKE, Slurm); "ADDRESS:PORT,PROCESS,PROCESSES" says where they are.
    Raises UserError if they do not find each other.
    """
    where = os.environ.get("ATHANOR_DISTRIBUTED", "")
    if not where:
        return
    import jax

    from train.interrupt import keep_handler_of_jax

    try:
        if where == "1":
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            address, process, processes = where.split(",")
            jax.distributed.initialize(
                coordinator_address=address,
                process_id=int(process),
                num_processes=int(processes),
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"ATHANOR_DISTRIBUTED={where}: the processes did not find each other ({error}); "
            "unset it for a run on one host"
        ) from error
    if jax.process_count() > 1:
        keep_handler_of_jax()
        # Where nothing waits for a common step SIGTERM is ours again.
        handler = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
        _watch_over_the_others()


def _watch_over_the_others() -> None:
    """Ends this process with one line as soon as another one on this machine has ended before it.

    Without it this one would wait in the next collective operation, or in JAX's barrier at the end,
    until JAX misses the other's heartbeats and aborts with a C++ stack. A process that ends as it
    should waits for the others, so that one that is gone was killed, or has failed and said why.
    """
    import jax

    from checkpoints.agreement import told

    mine = this_process()
    peers = [json.loads(line) for line in told(json.dumps(mine))]
    ended = select.poll()
    names = {}
    for number, peer in enumerate(peers):
        if number == jax.process_index() or is_alive(peer) is None:
            continue
        name = f"process {number} (host {peer['host']}, process id {peer['pid']})"
        try:
            descriptor = os.pidfd_open(peer["pid"])
        except ProcessLookupError:
            end_with_the_others(f"{name} of this run has ended")
        except (AttributeError, OSError):  # not Linux, or a system that forbids it
            continue
        ended.register(descriptor, select.POLLIN)
        names[descriptor] = name
    leaving = threading.Event()
    atexit.register(leaving.set)  # after JAX's own, so before it: the last registered comes first

    def watch() -> None:
        while not leaving.is_set():
            for descriptor, _ in ended.poll(200):
                if not leaving.is_set():
                    end_with_the_others(f"{names[descriptor]} of this run has ended")

    if names:
        threading.Thread(target=watch, name="others", daemon=True).start()


def end_with_the_others(what: str) -> NoReturn:
    """Prints one line and ends this process of several, without waiting for any other.

    Of two threads that come here one speaks.
    """
    _last_word.acquire()
    line = f"error: {what}; the same command goes on from the newest checkpoint"
    print(line, file=sys.stderr, flush=True)
    leave(2)


def leave(code: int) -> NoReturn:
    """Exits; with several processes at once, where Python's exit would wait for the others."""
    if is_alone():
        sys.exit(code)
    _last_word.acquire()
    if is_first_process():
        # Where process 0 is gone, JAX aborts the others: they get the time to say their line.
        time.sleep(1)
    end_now(code)


def is_alone() -> bool:
    """Returns whether the run has this process alone; it imports nothing."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first_process() -> bool:
    """Returns whether this is the process of the run that speaks for all."""
    return is_alone() or sys.modules["jax"].process_index() == 0
