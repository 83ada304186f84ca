"""The routed experts compiled for TPUs, at DeepSeek-V3.2's widths and over 8 to 32 devices.

Forward and backward do the arithmetic that the mathematics needs, of which a dense gradient to the
weights would be a multiple, and keep few arrays of a slot's width. Compiled, not run.
"""

import jax
import jax.numpy as jnp
import pytest

from model.experts import table
from plan.topology import GIB
from tests.compile.ahead_of_time import BF16, CHIPS, F32, compiled, temporary_bytes

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("little_effort")]

D, F, EXPERTS, K = 7_168, 2_048, 256, 8
TOKENS = 8_192  # of all the devices that share the experts

SLOW = pytest.mark.slow
SELDOM = ("v5p:2x2x1", "tpu7x:2x2x1")  # as v5e and v6e, and take longer: `make test-compile-all`


@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        *(pytest.param(chip, 8, marks=[SLOW] if chip in SELDOM else []) for chip in CHIPS),
        pytest.param(CHIPS[1], 32, marks=SLOW),
    ],
)
def test_forward_and_backward(topology, devices):
    E, choices = EXPERTS // devices, TOKENS * K
    mixture = table.pick("megablox", "tpu", choices, E, devices)

    def step(x_TD, expert_TK, gates_TK, dy_TD, gate_EDF, up_EDF, down_EFD):
        def mix(x_TD, gates_TK, gate_EDF, up_EDF, down_EFD):
            return mixture(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD)

        out_TD, pull = jax.vjp(mix, x_TD, gates_TK, gate_EDF, up_EDF, down_EFD)
        return out_TD, pull(dy_TD)

    tokens, weights = ((TOKENS, D), BF16), (((E, D, F), BF16), ((E, D, F), BF16), ((E, F, D), BF16))
    program = compiled(
        topology, step, tokens, ((TOKENS, K), jnp.int32), ((TOKENS, K), F32), tokens, *weights
    )
    # Three projections, each forward and to both its operands, for slots of all choices. Slots are
    # padded to whole tiles. One dense gradient to weights is E ninths more.
    needed = 9 * 2 * choices * D * F
    cost = program.cost_analysis()
    assert cost is not None and needed <= cost["flops"] < 1.1 * needed
    rows = choices + E * 128
    assert temporary_bytes(program) < rows * (5 * D + 5 * F) * 2 + GIB // 4
