"""What the compile tests share."""

import jax
import pytest

EFFORT = "jax_exec_time_optimization_effort"


@pytest.fixture
def little_effort():
    """Spares XLA's search for the fastest form of its own matmuls.

    It takes most of the time, and changes nothing in what memory holds or whether a kernel
    compiles.
    """
    before = getattr(jax.config, EFFORT)
    jax.config.update(EFFORT, -1.0)
    yield
    jax.config.update(EFFORT, before)
