"""What a program is compiled for."""

import jax


def ambient_device() -> jax.Device | jax.sharding.AbstractDevice:
    """What this program is compiled for. Of one compiled ahead of time the devices are the ambient
    mesh's, and this process does not have them.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of what this program is compiled for."""
    return ambient_device().platform
