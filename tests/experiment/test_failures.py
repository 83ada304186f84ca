"""What goes wrong around a command is one line that says what, how much and what to do."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiment.failures import line_of

REMEDY = "raise train.microbatches, set model.remat = 'full', or lower data.seq_len"


def error_of(action) -> Exception:
    with pytest.raises(Exception) as raised:
        action()
    return raised.value


@pytest.mark.parametrize(
    "words, much",
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
            "for 16 GiB at once",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            "of a device: 20.50G needed, 15.75G there",
        ),
        ("RESOURCE_EXHAUSTED: no words that are known", "of a device"),
    ],
)
def test_memory_of_a_device(words, much):
    line = line_of(jax.errors.JaxRuntimeError(words))
    assert line is not None and line.startswith(f"not enough memory {much}; {REMEDY}")


def test_an_array_that_no_machine_holds():
    """As XLA and NumPy really say it."""
    on_device = line_of(error_of(lambda: jnp.zeros(2**50, jnp.float32).block_until_ready()))
    on_host = line_of(error_of(lambda: np.zeros(2**50, np.float32)))
    for line, much in ((on_device, "for 4 PiB at once"), (on_host, "for 4.00 PiB at once")):
        assert line is not None and much in line and REMEDY in line


def test_a_cause_further_down_is_found():
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise ValueError("reading failed") from cause
    except ValueError as error:
        assert "not enough memory" in str(line_of(error))


def test_a_name_that_no_file_can_have():
    name = "x" * 5_000
    line = line_of(error_of(lambda: os.stat(name)))
    assert line is not None and line.endswith("x: File name too long") and len(line) < 200
    assert line_of(OSError(errno.ENAMETOOLONG, "File name too long")) is None, "no name to say"


def test_a_bug_is_none_of_these():
    assert line_of(ZeroDivisionError("division by zero")) is None
