"""Tests run on eight pretended CPU devices, in float32, with a compilation cache that is kept."""

import gc
import os
import pathlib
import re
import sys

from tests.xla import COMPILE_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), COMPILE_FLAGS, "--xla_force_host_platform_device_count=8"]
)

import jax
import pytest

jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


MOST_MAPPINGS = 30_000


@pytest.fixture
def no_races(capfd, caplog):
    """Fails a test of a kernel whose interpreter reports a race, or a copy that nobody waited for.

    The interpreter (tests/interpreter.py) prints the one and logs the other.
    """
    yield
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert not re.search("RACE|non-zero count", "\n".join([capfd.readouterr().out, *messages]))


@pytest.fixture(autouse=True, scope="module")
def programs_let_go():
    """Lets go of compiled programs before there are too many.

    Each takes several mappings of memory, of which Linux gives a process 65,530 by default; XLA
    crashes where it gets no more.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        if shared := sys.modules.get("tests.programs"):
            shared.let_go()
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish():
    """Collects garbage more rarely: a tenth of the tests' time is spent on looking for it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
