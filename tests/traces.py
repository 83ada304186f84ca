"""Which programs JAX traces meanwhile: whatever is compiled is traced before."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

EVENT = "/jax/core/compile/jaxpr_trace_duration"
# What the programs of the engine (rl/programs.py) are made of.
ENGINE = ("decode_weights", "empty_slots", "read_prompts", "place", "extend", "halt", "advance")


@contextlib.contextmanager
def traces_of(*names: str) -> Iterator[list[str]]:
    """Yields a list, to which the name of a function is added each time that it is traced."""
    traced: list[str] = []

    def heard(event: str, duration_secs: float, **about: Any) -> None:
        if event == EVENT and about["fun_name"] in names:
            traced.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield traced
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
