"""The routed experts through the TPU's own compiler, at DeepSeek-V3.2's widths and over 8 to 32
devices: forward and backward do the arithmetic that the mathematics needs, of which a dense
gradient to the weights would be a multiple, and keep few arrays of a slot's width. Compiled, not
run.
"""

import jax
import jax.numpy as jnp
import pytest

from model.experts import table
from plan.topology import GIB
from tests.compile.test_tpu_kernels import BF16, CHIPS, F32, compiled

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("little_effort")]

D, F, EXPERTS, K = 7_168, 2_048, 256, 8
TOKENS = 8_192  # of all the devices that share the experts


@pytest.mark.parametrize(
    ("topology", "devices"),
    [*((chip, 8) for chip in CHIPS), pytest.param(CHIPS[1], 32, marks=pytest.mark.slow)],
)
def test_forward_and_backward(topology, devices):
    E, choices = EXPERTS // devices, TOKENS * K
    mixture = table.pick("megablox", "tpu", choices, E, devices)

    def step(x_TD, chosen_TK, gates_TK, dy_TD, *weights):
        out_TD, backward = jax.vjp(
            lambda x_TD, gates_TK, *weights: mixture(x_TD, chosen_TK, gates_TK, *weights),
            x_TD,
            gates_TK,
            *weights,
        )
        return out_TD, backward(dy_TD)

    tokens, weights = ((TOKENS, D), BF16), (((E, D, F), BF16), ((E, D, F), BF16), ((E, F, D), BF16))
    program = compiled(
        topology, step, tokens, ((TOKENS, K), jnp.int32), ((TOKENS, K), F32), tokens, *weights
    )
    needed = (
        9 * 2 * choices * D * F
    )  # three projections, each forward and to both its operands, of slots for all choices
    # Slots are padded to whole tiles. One dense gradient to weights is E ninths more.
    assert needed <= program.cost_analysis()["flops"] < 1.1 * needed
    rows = choices + E * 128
    assert program.memory_analysis().temp_size_in_bytes < rows * (5 * D + 5 * F) * 2 + GIB // 4
