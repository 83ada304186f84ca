"""Sets how many devices this process pretends to have, and which other processes it joins.

Both must be settled before JAX sees its first device.
"""

import os
import sys

from errors import UserError


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

    try:
        if where == "1":
            jax.distributed.initialize()
        else:
            address, process, processes = where.split(",")
            jax.distributed.initialize(
                coordinator_address=address, process_id=int(process), num_processes=int(processes)
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"ATHANOR_DISTRIBUTED={where}: the processes did not find each other ({error}); "
            "unset it for a run on one host"
        ) from error
