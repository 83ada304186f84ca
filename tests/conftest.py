"""CPU, eight pretended devices, float32 as it is, and a compilation cache kept between runs. LLVM
does not optimise: tests compile more than they compute.
"""

import os
import pathlib
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import pytest

jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def no_races(capfd, caplog):
    """For the tests of kernels: what tests/interpreter.py looks out for, said in print or in the
    log, and copies that nobody waited for.
    """
    yield
    said = [capfd.readouterr().out, *(record.getMessage() for record in caplog.get_records("call"))]
    assert not re.search("RACE|non-zero count", "\n".join(said))
