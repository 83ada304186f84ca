"""The table of implementations of the routed experts' FFN: (platform, size) -> implementation.

| implementation | how | good for |
|---|---|---|
| reference | every expert on every token, unselected ones weighted 0 | a few tokens |
| bucketed | tokens sorted by expert, experts one after another in fitting windows | CPU |
| blocks | tokens sorted by expert, padded to blocks, batched matmul | GPU without tokamax |
| megablox, tokamax | tokens sorted by expert, a grouped matmul | TPU; GPU |
"""

import functools
from collections.abc import Callable

from jax import Array

from errors import UserError
from kernels import grouped_matmul
from model.experts.blocks import experts_blocks
from model.experts.bucketed import experts_bucketed
from model.experts.grouped import experts_grouped
from model.experts.reference import experts_reference

# (x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD) -> out_TD, see `experts_reference`.
Experts = Callable[[Array, Array, Array, Array, Array, Array], Array]
PLAIN: dict[str, Experts] = {
    "blocks": experts_blocks,
    "bucketed": experts_bucketed,
    "reference": experts_reference,
}
IMPLEMENTATIONS = tuple(sorted([*PLAIN, *grouped_matmul.PLATFORMS]))


def pick(name: str, platform: str, choices: int, experts: int, devices: int = 1) -> Experts:
    """Chooses the implementation.

    Args:
      name: "auto", or one of IMPLEMENTATIONS.
      platform: what the program is compiled for: "cpu", "gpu" or "tpu".
      choices: how many pairs of a token and one of its top-k experts the implementation is given;
        their experts lie on all `devices`.
      experts: how many experts a device has.
      devices: how many devices the experts are divided over.

    Raises UserError for a name that is unknown, or not for this platform, or not installed.
    """
    if name == "auto":
        name = preferred(platform, choices, experts)
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"model.expert_matmul = {name!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if name in PLAIN:
        return PLAIN[name]
    matmul, block = grouped_matmul.pick(name, platform, choices // (devices * experts))
    return functools.partial(experts_grouped, matmul, block)


def preferred(platform: str, choices: int, experts: int) -> str:
    """Returns what "auto" takes."""
    if few_choices(choices, experts):
        return "reference"
    return grouped_matmul.preferred(platform) or ("bucketed" if platform == "cpu" else "blocks")


def few_choices(choices: int, experts: int) -> bool:
    """Returns whether reading the weights, not the arithmetic, sets the time.

    Then every expert may as well see every token.
    """
    return choices <= 16 * experts


def by_token(name: str, platform: str, choices: int, experts: int) -> str:
    """Returns the implementation to take where a token's result may depend on no other token.

    "bucketed" cuts matmuls to sizes that depend on how many tokens an expert has, and a sum of
    float32 in another order differs in its last bit. All others compute a row by itself.
    """
    if name == "auto" and platform == "cpu" and not few_choices(choices, experts):
        return "blocks"
    return name
