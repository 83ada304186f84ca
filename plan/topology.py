"""The chips a run is planned for: those of this process, or of a TPU topology that is only named.
The TPU's compiler needs no TPU.
"""

import importlib.util
import os
import re
from typing import NamedTuple

import jax

from errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """What one JAX device can do at most, by its maker's data sheet (a TPU v4 or v5p chip is one
    device, a TPU7x chip two).
    """

    flops: float  # a second, bfloat16, dense
    hbm: int  # bytes
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that it can receive from other chips, over all its links


# cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x}; links are half of the bidirectional figure.
# By JAX's `device_kind`.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.228e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.819e12, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.765e12, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.638e12, 400e9),
    "TPU7x": Chip(1153.5e12, 96 * GIB, 3.69e12, 300e9),
    "NVIDIA H200": Chip(989e12, 141 * 10**9, 4.8e12, 450e9),
}
KINDS = ("v4", "v5e", "v5p", "v6e", "tpu7x")  # what a topology's name may begin with


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology such as "v5p:4x4x4": they can be compiled for, and nothing
    else.

    Raises UserError when there is no such topology, or no compiler for it. Must come before this
    process uses its own devices: from here on they are the CPU's.
    """
    kind, _, shape = topology.partition(":")
    if kind not in KINDS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={topology}: must be KIND:AxB or KIND:AxBxC with a KIND of {', '.join(KINDS)}, such as v5e:4x4 or v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs the TPU compiler, libtpu, and no TPU: make .venv-compile/installed, then use .venv-compile/bin/python"
        )
    # Nobody shall look for a TPU here, nor ask the cloud about one; and two plans may be made at a
    # time. JAX may have put warnings in place of the values.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology}: the TPU compiler knows no such topology ({error})"
        ) from error


def capacity(device: jax.Device) -> int | None:
    """Bytes of memory a program may use on the device; None where nobody says (a CPU's is the
    machine's).
    """
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind].hbm
    statistics = None if device.platform == "cpu" else device.memory_stats()
    return statistics and statistics.get("bytes_limit")
