"""The routed experts' FFN on a CPU: one expert after another, each over its own tokens.

A CPU runs a matmul of two matrices fastest, and every row of padding costs it time. XLA's shapes
may not depend on data, and an expert's share of the tokens does: so there is a branch for each of
`window_sizes`, and an expert takes the smallest window that its tokens fit into.

    sorted rows    e0 e0 e0 e1 e2 e2 e2 e2 -- --        (rows of experts 0, 1, 2, and empty rows)
    windows        [e0       ]
                            [e1 ..]
                               [e2           ]

A window's last rows may be the next expert's. In the forward pass that expert writes over what the
window puts there; in the backward pass the gate of those rows is 0.

Letters: S sorted rows; v windows; C rows of one window; H the gate's and the up projection's width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from model.experts.slots import collect, sorted_slots
from model.experts.swiglu import swiglu

# Sizes of windows in eighths of the mean share; every size costs time to compile.
EIGHTHS = (4, 6, 7, 8, 9, 10, 12, 16)


def window_sizes(choices: int, experts: int) -> list[int]:
    """Returns the rows of the windows that there is a branch for, in order.

    They are close to each other about the mean share, up to twice that share; and 0, for nothing to
    do.
    """
    mean = max(choices // experts, 1)
    return sorted({0, *(min(-(-mean * eighths // 8), choices) for eighths in EIGHTHS)})


class Windows(NamedTuple):
    """The windows in the order in which they are computed.

    An expert has one window, or as many as it takes where its rows are more than the largest one
    covers. The list has a static length: windows without rows fill its end.
    """

    expert_v: Array
    size_v: Array  # index into the list of sizes
    first_v: Array  # the window's first row
    rows_v: Array  # how many of its rows are the expert's own


class Sorted(NamedTuple):
    """Every choice (a token with one of its experts) sorted by expert.

    Empty rows follow, as many as a window may reach beyond the last choice.
    """

    token_S: Array  # T in an empty row
    gate_S: Array  # 0 in an empty row
    slot_of_TK: Array  # the row of each choice, S where it has none
    windows: Windows
    sizes: list[int]  # the static sizes of windows


def sorted_by_expert(expert_TK: Array, gates_TK: Array, experts: int) -> Sorted:
    """Sorts the choices by expert and lays windows over them.

    Args:
      expert_TK: ids of each token's experts. Ids outside 0 .. experts - 1 get no row.
      gates_TK: how much each of them weighs.
      experts: E.
    """
    T, K = expert_TK.shape
    choices, sizes = T * K, window_sizes(T * K, experts)
    slots = sorted_slots(expert_TK, experts, 1)
    # A window is the smallest that its expert's rows fit into: it reaches past them by less than
    # the widest gap between two sizes.
    reach = int(max(np.diff(sizes)))
    choice_S = jnp.pad(slots.choice_of_slot_S, (0, reach), constant_values=choices)
    gate_S = jnp.take(gates_TK.reshape(-1), choice_S, mode="fill", fill_value=0)
    windows = _windows(slots.counts_E, choices, sizes)
    token_S = choice_S // K
    slot_of_TK = jnp.where(slots.slot_of_TK < choices, slots.slot_of_TK, token_S.shape[0])
    return Sorted(token_S, gate_S, slot_of_TK, windows, sizes)


def _windows(counts_E: Array, choices: int, sizes: list[int]) -> Windows:
    """Lays windows over the sorted rows, `counts_E` rows of each expert."""
    experts, largest = counts_E.shape[0], sizes[-1]
    windows_E = -(-counts_E // largest)
    before_E = jnp.cumsum(windows_E) - windows_E
    window_v = jnp.arange(experts + choices // largest)
    done_vE = window_v[:, None] >= (before_E + windows_E)[None]
    expert_v = jnp.minimum(jnp.sum(done_vE, axis=1), experts - 1)
    offset_v = (window_v - before_E[expert_v]) * largest  # within the expert's rows
    rows_v = jnp.clip(counts_E[expert_v] - offset_v, 0, largest)
    first_v = (jnp.cumsum(counts_E) - counts_E)[expert_v] + offset_v
    return Windows(expert_v, jnp.searchsorted(jnp.asarray(sizes), rows_v), first_v, rows_v)


def by_size(body: Callable[..., Any], sizes: list[int], size: Array, *operands: Any) -> Any:
    """Calls `body(rows, *operands)`, where `rows` is the static entry `size` of `sizes`.

    Each size is compiled by itself: what does not depend on it is better done outside of the body.
    """
    return jax.lax.switch(size, [functools.partial(body, rows) for rows in sizes], *operands)


def read_rows(x_S: Array, first: Array, size: int) -> Array:
    """Returns a window's rows of an array [S, ...]."""
    return jax.lax.dynamic_slice_in_dim(x_S, first, size)


def write_rows(x_S: Array, rows: Array, first: Array) -> Array:
    """Returns an array [S, ...] with a window's rows in it, in the array's dtype."""
    return jax.lax.dynamic_update_slice_in_dim(x_S, rows.astype(x_S.dtype), first, axis=0)


@jax.custom_vjp
def experts_bucketed(
    x_TD: Array, expert_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """Computes what `experts_reference` does, one expert after another over its own tokens.

    For the backward pass the two projections' outputs are kept.
    """
    return _forward(x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD)[0]


def _forward(
    x_TD: Array, expert_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
):
    """Computes the mixture, and what the backward pass needs.

    Args:
      x_TD: tokens.
      expert_TK: ids of each token's experts.
      gates_TK: how much each of them weighs.
      gate_EDF: each expert's gate projection.
      up_EDF: each expert's up projection.
      down_EFD: each expert's down projection.
    """
    E, F, D = down_EFD.shape
    token_S, gate_S, slot_of_TK, windows, sizes = sorted_by_expert(expert_TK, gates_TK, E)

    def apply_expert(size, gate_up_SH, y_SD, gate_up_DH, down_FD, first):
        """Writes one expert's activations and weighted outputs for a window of its slots."""
        x_CD = jnp.take(x_TD, read_rows(token_S, first, size), axis=0, mode="clip")
        gate_up_CH = x_CD @ gate_up_DH
        weight_C1 = read_rows(gate_S, first, size)[:, None].astype(x_TD.dtype)
        weighted_CF = swiglu(*jnp.split(gate_up_CH, 2, axis=1)) * weight_C1
        return (
            write_rows(gate_up_SH, gate_up_CH, first),
            write_rows(y_SD, weighted_CF @ down_FD, first),
        )

    def step(buffers, window: Windows):
        gate_up_DH = gate_and_up(gate_EDF, up_EDF, window.expert_v)
        down_FD = down_EFD[window.expert_v]
        operands = (*buffers, gate_up_DH, down_FD, window.first_v)
        return by_size(apply_expert, sizes, window.size_v, *operands), None

    buffers = tuple(jnp.zeros((token_S.shape[0], width), x_TD.dtype) for width in (2 * F, D))
    gate_up_SH, y_SD = jax.lax.scan(step, buffers, windows)[0]
    inputs = x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD
    return (
        collect(y_SD, token_S, slot_of_TK),
        (checkpoint_name(gate_up_SH, "gate_and_up"), *inputs),
    )


def gate_and_up(gate_EDF: Array, up_EDF: Array, expert: Array) -> Array:
    """Returns an expert's two projections side by side, so that they are one matmul."""
    return jnp.concatenate([gate_EDF[expert], up_EDF[expert]], axis=1)


def _backward(saved: tuple[Array, ...], dout_TD: Array):
    """Computes the gradients to all arguments of `experts_bucketed`; none to the ids."""
    gate_up_SH, x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD = saved
    E, F, D = down_EFD.shape
    token_S, gate_S, slot_of_TK, windows, sizes = sorted_by_expert(expert_TK, gates_TK, E)

    def gradients(size, dx_SD, dgate_S, gate_up_DH, down_FD, first, rows):
        """Writes the gradients of a window's slots, and returns those of its expert's weights."""
        token_C = read_rows(token_S, first, size)
        x_CD, dout_CD = (jnp.take(x, token_C, axis=0, mode="clip") for x in (x_TD, dout_TD))
        own_gate_C = jnp.where(jnp.arange(size) < rows, read_rows(gate_S, first, size), 0)
        weight_C1 = own_gate_C[:, None].astype(x_TD.dtype)
        hidden_CF, pull_swiglu = jax.vjp(
            lambda gate_up_CH: swiglu(*jnp.split(gate_up_CH, 2, axis=1)),
            read_rows(gate_up_SH, first, size),
        )
        dmixed_CF = dout_CD @ down_FD.T
        (dgate_up_CH,) = pull_swiglu(dmixed_CF * weight_C1)
        dgate_C = jnp.sum((dmixed_CF * hidden_CF).astype(dgate_S.dtype), axis=1)
        return (
            write_rows(dx_SD, dgate_up_CH @ gate_up_DH.T, first),
            write_rows(dgate_S, dgate_C, first),
            (x_CD.T @ dgate_up_CH, (hidden_CF * weight_C1).T @ dout_CD),
        )

    def step(buffers, window: Windows):
        dx_SD, dgate_S, dweights = buffers
        gate_up_DH = gate_and_up(gate_EDF, up_EDF, window.expert_v)
        down_FD = down_EFD[window.expert_v]
        operands = dx_SD, dgate_S, gate_up_DH, down_FD, window.first_v, window.rows_v
        dx_SD, dgate_S, of_window = by_size(gradients, sizes, window.size_v, *operands)
        dweights = tuple(
            jax.lax.dynamic_update_index_in_dim(
                dw, dw[window.expert_v] + dw_own, window.expert_v, 0
            )
            for dw, dw_own in zip(dweights, of_window, strict=True)
        )
        return (dx_SD, dgate_S, dweights), None

    buffers = (
        jnp.zeros((token_S.shape[0], D), x_TD.dtype),
        jnp.zeros(token_S.shape, gates_TK.dtype),
        (jnp.zeros((E, D, 2 * F), gate_EDF.dtype), jnp.zeros_like(down_EFD)),
    )
    (dx_SD, dgate_S, (dgate_up_EDH, ddown_EFD)), _ = jax.lax.scan(step, buffers, windows)
    dgates_TK = jnp.take(dgate_S, slot_of_TK, mode="fill", fill_value=0)
    dx_TD = collect(dx_SD, token_S, slot_of_TK)
    return dx_TD, None, dgates_TK, *jnp.split(dgate_up_EDH, 2, axis=2), ddown_EFD


experts_bucketed.defvjp(_forward, _backward)
