"""Which programs are compiled meanwhile, or read from the cache of compiled ones on disk."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"
# What the programs of the engine (rl/programs.py) are made of.
ENGINE = ("decode_weights", "empty_slots", "read_prompts", "place", "extend", "halt", "advance")


@contextlib.contextmanager
def compilations_of(*names: str) -> Iterator[list[str]]:
    """Yields a list, to which the name of a function is added each time that it is compiled.

    Arguments of another shape or sharding are another program; the latter is not traced again.
    """
    compiled: list[str] = []

    def heard(event: str, duration_secs: float, **about: Any) -> None:
        name = about.get("fun_name", "").removeprefix("jit(").removesuffix(")")
        if event == EVENT and name in names:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
