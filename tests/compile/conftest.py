import jax
import pytest


@pytest.fixture
def little_effort():
    """Of XLA's search for the fastest form of its own matmuls: most of the time, and nothing to
    what memory holds or whether a kernel compiles.
    """
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)
