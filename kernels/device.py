"""Names the device that a program is compiled for."""

from typing import Protocol

import jax


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
