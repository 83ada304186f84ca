"""Finds the devices of a TPU topology that is only named, and knows what each chip can do at most.

The TPU's compiler needs no TPU.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple, Protocol

import jax

from errors import UserError

GIB = 2**30


class Device(Protocol):
    """Declares what a plan asks of a jax.Device, which has no type that a checker can see."""

    @property
    def device_kind(self) -> str:
        """The name of the kind of chip, such as "TPU v5"."""
        ...

    @property
    def platform(self) -> str:
        """One of "cpu", "gpu" and "tpu"."""
        ...

    def memory_stats(self) -> dict[str, Any] | None:
        """Returns bytes by name, such as "bytes_limit"."""
        ...


class Chip(NamedTuple):
    """Holds the limits of one JAX device, by its maker's data sheet.

    A TPU v4 or v5p chip is one device, a TPU7x chip two.
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


def topology_devices(topology: str) -> list[Device]:
    """Returns the devices of a TPU topology such as "v5p:4x4x4".

    They can be compiled for, and nothing else. It must be called before this process uses its own
    devices: from here on they are the CPU's.

    Raises:
      UserError: there is no such topology, or no compiler for it.
    """
    kind, _, shape = topology.partition(":")
    if kind not in KINDS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={topology}: must be KIND:AxB or KIND:AxBxC with a KIND of "
            f"{', '.join(KINDS)}, such as v5e:4x4 or v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs the TPU compiler, libtpu, and no TPU: "
            "make .venv-compile/installed, then use .venv-compile/bin/python"
        )
    # libtpu must not look for a TPU here, nor ask the cloud about one; and two plans may be made at
    # a time. JAX may have put warnings in place of the values.
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


def capacity(device: Device) -> int | None:
    """Returns the bytes of memory that a program may use on the device.

    None where they are not known: a CPU's memory is the machine's.
    """
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind].hbm
    statistics = None if device.platform == "cpu" else device.memory_stats()
    return statistics.get("bytes_limit") if statistics else None
