"""Pallas' TPU interpreter at its most watchful, and faults to try it with.

It fills memory that nobody wrote with NaN, and reports reads and writes that nothing keeps apart as
races.
"""

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

import kernels

# Each copy draws one of so many clocks by chance, and of two copies with the same one none is seen
# to race. With 16 a wait that is left out was missed in every second run; JAX takes 2 by itself.
WATCHFUL: dict[str, Any] = {
    "uninitialized_memory": "nan",
    "detect_races": True,
    "vector_clock_size": 256,
}
STRICT = pltpu.InterpretParams(**WATCHFUL)
# Each core has its share of the axes called parallel.
TWO_CORES = pltpu.InterpretParams(**WATCHFUL, num_cores_or_threads=2)
# Copies are done when begun, not when waited for.
EAGER = pltpu.InterpretParams(**WATCHFUL, dma_execution_mode="eager")
# With 256 clocks a wait that is left out was missed in one run of ten, where only one pair of
# accesses tells. Every access compares clocks, so more of them take longer.
SURE: dict[str, Any] = WATCHFUL | {"vector_clock_size": 4096}
EAGER_AND_SURE = pltpu.InterpretParams(**SURE, dma_execution_mode="eager")

KERNELS = Path(kernels.__file__).parent
Place = tuple[tuple[str, int | None], ...]  # lines of kernels/, from the caller to the called


def complaints(action: Callable[[], object], capfd, caplog) -> str:
    """Returns what the interpreter reports while an action runs.

    JAX prints, logs or raises a race, by its version; the fixture `no_races` fails a test for any.
    """
    raised = ""
    try:
        jax.block_until_ready(action())
    except Exception as error:
        raised = str(error)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    return raised + caplog.text + capfd.readouterr().out


def untraced(monkeypatch, module: ModuleType, kernel: Callable) -> None:
    """Replaces a kernel by one that JAX does not know: what it knows it does not trace again."""
    monkeypatch.setattr(module, kernel.__name__, functools.partial(kernel))


def watch_waits(monkeypatch, skipped: Place | None = None) -> list[Place]:
    """Watches the kernels that are traced from now on.

    Args:
      monkeypatch: the fixture; it undoes this.
      skipped: the place of a wait for a copy that kernels shall leave out.

    Returns: a list that the places of their waits get appended to.
    """
    real, waits = pltpu.make_async_copy, []

    class Copy:
        def __init__(self, *refs):
            self.copy = real(*refs)

        def start(self):
            self.copy.start()

        def wait(self):
            frames = traceback.extract_stack()
            place = tuple((at.filename, at.lineno) for at in frames if _in_kernels(at.filename))
            waits.append(place)
            if place != skipped:
                self.copy.wait()

    monkeypatch.setattr(pltpu, "make_async_copy", Copy)
    return waits


def _in_kernels(filename: str) -> bool:
    return Path(filename).parent == KERNELS


def watch_refs(
    monkeypatch, module: ModuleType, kernel: Callable, skipped: int | None = None
) -> list[str]:
    """Watches the references of a kernel.

    Args:
      monkeypatch: the fixture; it undoes this.
      module, kernel: the kernel, and the module that calls it by its name.
      skipped: the number of a reference whose first write the kernel shall leave out.

    Returns: what each reference to floats was first used for, "read", "write", or "" for none; a
      list, filled while the kernel is traced.
    """
    uses: list[str] = []

    class Ref:
        """A reference that notes how it is used first."""

        def __init__(self, number: int, ref):
            self.number, self.ref = number, ref

        def __getattr__(self, name: str):
            if name == "at":
                self.note("copy")
            return getattr(self.ref, name)

        def __getitem__(self, index):
            self.note("read")
            return self.ref[index]

        def __setitem__(self, index, value):
            if self.note("write") and self.number == skipped:
                return
            self.ref[index] = value

        def note(self, use: str) -> bool:
            """Says whether this is the first use."""
            first = not uses[self.number] and jnp.issubdtype(self.ref.dtype, jnp.floating)
            if first:
                uses[self.number] = use
            return first

    def watched(*refs, **options):
        uses[:] = [""] * len(refs)
        return kernel(
            *(Ref(at, ref) if hasattr(ref, "dtype") else ref for at, ref in enumerate(refs)),
            **options,
        )

    real = pltpu.make_async_copy

    def copy(*refs):
        return real(*(ref.ref if isinstance(ref, Ref) else ref for ref in refs))

    monkeypatch.setattr(pltpu, "make_async_copy", copy)
    monkeypatch.setattr(module, kernel.__name__, watched)
    return uses
