"""Names the device that a program is compiled for, and the options that it is compiled with."""

import os
from typing import Protocol

import jax
from jax.sharding import Mesh

# On a CPU LLVM takes most of the time before the first step. A train step compiled so runs as fast
# and compiles in 0.6 of the time (0.9 on jax 0.12, where the second option is gone, and what it
# turned off costs less): bench/results/cpu.json, `first_step_2026_11_29`.
CPU_OPTIONS = {"xla_backend_optimization_level": 2}
if jax.__version_info__ < (0, 11):
    CPU_OPTIONS["xla_cpu_use_fusion_emitters"] = False


class Device(Protocol):
    """A device, present or only described, as far as a program must know it."""

    @property
    def platform(self) -> str:
        """The platform: "cpu", "gpu" or "tpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """The kind, such as "TPU v5"."""
        ...


def ambient_device() -> Device:
    """Returns the device that this program is compiled for.

    For a program compiled ahead of time that is the abstract device of the ambient mesh, which this
    process need not have.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """Returns the platform that this program is compiled for: "cpu", "gpu" or "tpu"."""
    return ambient_device().platform


def compiler_options(mesh: Mesh, *, runs_once: bool = False) -> dict[str, int]:
    """Returns XLA's options for a whole program, as `jax.jit` takes them.

    Args:
      mesh: the devices that it is compiled for. Compilers but the CPU's need no options.
      runs_once: LLVM would spend seconds on what takes a moment, so it optimises nothing (a new
        state of the quickstart's model: 4.3 s in place of 11.5).

    What XLA_FLAGS sets stays.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    options = CPU_OPTIONS | ({"xla_backend_optimization_level": 0} if runs_once else {})
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}
