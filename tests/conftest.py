"""Tests run on eight pretended CPU devices, in float32, with a compilation cache that is kept.

Tests compile more than they compute, so LLVM does not optimise, and XLA emits its fusions the way
that compiles in less than half the time (newer versions have that way no more).
"""

import importlib.metadata
import os
import pathlib
import re

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402  (after the environment it reads)
import pytest  # noqa: E402

jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def no_races(capfd, caplog):
    """Fails a test of a kernel whose interpreter reports a race, or a copy that nobody waited for.

    The interpreter (tests/interpreter.py) prints the one and logs the other.
    """
    yield
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert not re.search("RACE|non-zero count", "\n".join([capfd.readouterr().out, *messages]))
