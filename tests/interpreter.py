"""Pallas' TPU interpreter at its most watchful: memory that nobody wrote is full of NaN, and reads
and writes that nothing keeps apart are races.
"""

from collections.abc import Callable

import jax
from jax.experimental.pallas import tpu as pltpu

# Clocks enough for copies that are under way together: of the two that JAX takes by itself all
# copies share one, and of two copies none is seen to race.
WATCHED = {"uninitialized_memory": "nan", "detect_races": True, "vector_clock_size": 16}
STRICT = pltpu.InterpretParams(**WATCHED)
TWO_CORES = pltpu.InterpretParams(
    **WATCHED, num_cores_or_threads=2
)  # each with its part of the axes called parallel
EAGER = pltpu.InterpretParams(
    **WATCHED, dma_execution_mode="eager"
)  # copies done when begun, not when waited for


def complaints(action: Callable[[], object], capfd, caplog) -> str:
    """What it says while something runs. JAX prints, logs or raises a race, by its version; the
    fixture `no_races` fails a test for any.
    """
    raised = ""
    try:
        jax.block_until_ready(action())
    except Exception as error:
        raised = str(error)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    return raised + caplog.text + capfd.readouterr().out
