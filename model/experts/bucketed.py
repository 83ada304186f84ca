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

Letters: S sorted rows; v windows; C rows of one window.
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


def fold_windows(body: Callable[..., Any], carry: Any, sizes: list[int], windows: Windows) -> Any:
    """Folds `body` over the windows, in order.

    Args:
      body: (size, carry, expert, first, rows) -> carry; `size` is a static number of rows.
      carry: what the first window receives.
      sizes: of windows; nothing is done in a window of size 0.
      windows: which to go over.
    """
    branches = [
        lambda carry, *_: carry,
        *(functools.partial(body, size) for size in sizes[1:]),
    ]

    def step(carry, window: Windows):
        carry = jax.lax.switch(
            window.size_v, branches, carry, window.expert_v, window.first_v, window.rows_v
        )
        return carry, None

    return jax.lax.scan(step, carry, windows)[0]


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

    def apply_expert(size, buffers, expert, first, rows):
        """Writes one expert's activations and weighted outputs for a window of its slots."""
        gate_SF, up_SF, y_SD = buffers
        x_CD = jnp.take(x_TD, read_rows(token_S, first, size), axis=0, mode="clip")
        gate_CF, up_CF = x_CD @ gate_EDF[expert], x_CD @ up_EDF[expert]
        hidden_CF = swiglu(gate_CF, up_CF)
        weighted_CF = hidden_CF * read_rows(gate_S, first, size)[:, None].astype(x_TD.dtype)
        return (
            write_rows(gate_SF, gate_CF, first),
            write_rows(up_SF, up_CF, first),
            write_rows(y_SD, weighted_CF @ down_EFD[expert], first),
        )

    buffers = tuple(jnp.zeros((token_S.shape[0], width), x_TD.dtype) for width in (F, F, D))
    gate_SF, up_SF, y_SD = fold_windows(apply_expert, buffers, sizes, windows)
    kept = checkpoint_name(gate_SF, "gate_and_up"), checkpoint_name(up_SF, "gate_and_up")
    inputs = x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD
    return collect(y_SD, token_S, slot_of_TK), (*kept, *inputs)


def _backward(saved: tuple[Array, ...], dout_TD: Array):
    """Computes the gradients to all arguments of `experts_bucketed`; none to the ids."""
    gate_SF, up_SF, x_TD, expert_TK, gates_TK, gate_EDF, up_EDF, down_EFD = saved
    token_S, gate_S, slot_of_TK, windows, sizes = sorted_by_expert(
        expert_TK, gates_TK, down_EFD.shape[0]
    )

    def add_gradients(size, buffers, expert, first, rows):
        """Adds the gradients of one expert, for a window of its slots."""
        dx_SD, dgate_S, dweights = buffers
        token_C = read_rows(token_S, first, size)
        x_CD, dout_CD = (jnp.take(x, token_C, axis=0, mode="clip") for x in (x_TD, dout_TD))
        own_gate_C = jnp.where(jnp.arange(size) < rows, read_rows(gate_S, first, size), 0)
        weight_C1 = own_gate_C[:, None].astype(x_TD.dtype)
        hidden_CF, pull_swiglu = jax.vjp(
            swiglu, read_rows(gate_SF, first, size), read_rows(up_SF, first, size)
        )
        dmixed_CF = dout_CD @ down_EFD[expert].T
        dgate_CF, dup_CF = pull_swiglu(dmixed_CF * weight_C1)
        dx_CD = dgate_CF @ gate_EDF[expert].T + dup_CF @ up_EDF[expert].T
        dgate_C = jnp.sum((dmixed_CF * hidden_CF).astype(dgate_S.dtype), axis=1)
        own = x_CD.T @ dgate_CF, x_CD.T @ dup_CF, (hidden_CF * weight_C1).T @ dout_CD
        dweights = tuple(
            jax.lax.dynamic_update_index_in_dim(dw, dw[expert] + dw_own, expert, 0)
            for dw, dw_own in zip(dweights, own, strict=True)
        )
        return write_rows(dx_SD, dx_CD, first), write_rows(dgate_S, dgate_C, first), dweights

    buffers = (
        jnp.zeros((token_S.shape[0], x_TD.shape[1]), x_TD.dtype),
        jnp.zeros(token_S.shape, gates_TK.dtype),
        tuple(map(jnp.zeros_like, (gate_EDF, up_EDF, down_EFD))),
    )
    dx_SD, dgate_S, dweights = fold_windows(add_gradients, buffers, sizes, windows)
    dgates_TK = jnp.take(dgate_S, slot_of_TK, mode="fill", fill_value=0)
    return collect(dx_SD, token_S, slot_of_TK), None, dgates_TK, *dweights


experts_bucketed.defvjp(_forward, _backward)
