"""The routed experts' FFN on a CPU: one expert after another, each over its own tokens.

A CPU runs a matmul of two matrices fastest, and every row of padding costs it time. XLA's shapes
may not depend on data, and an expert's share does: so there is a branch for each of `window_sizes`,
and an expert takes the smallest that its tokens fit into.
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

EIGHTHS = (4, 6, 7, 8, 9, 10, 12, 16)  # of the mean share; every size costs time to compile


def window_sizes(choices: int, experts: int) -> list[int]:
    """Rows that `experts_bucketed` has a branch for: close to each other about the mean share, up to
    twice that share; and none at all.
    """
    mean = max(choices // experts, 1)
    return sorted({0, *(min(-(-mean * eighths // 8), choices) for eighths in EIGHTHS)})


class Visits(NamedTuple):
    """Who is visited in which order: each expert once, again while it has more tokens than the
    largest window, and at the end nobody.
    """

    expert_V: Array
    size_V: Array  # which one of the window's sizes
    first_V: Array  # the window's first row
    rows_V: Array  # how many of its rows are the expert's own


class Sorted(NamedTuple):
    """Every (token, choice) sorted by expert, behind them as many empty rows as a window may reach
    over.
    """

    token_S: Array
    gate_S: Array
    slot_of_TK: Array
    visits: Visits
    sizes: list[int]


def sorted_by_expert(chosen_TK: Array, gates_TK: Array, experts: int) -> Sorted:
    T, K = chosen_TK.shape
    M, sizes = T * K, window_sizes(T * K, experts)
    slot_of_TK, choice_of_slot_M, _, counts_E = sorted_slots(chosen_TK, experts, 1)
    choice_S = jnp.pad(choice_of_slot_M, (0, max(np.diff(sizes))), constant_values=M)
    gate_S = jnp.take(gates_TK.reshape(-1), choice_S, mode="fill", fill_value=0)

    largest = sizes[-1]
    visits_E = -(-counts_E // largest)
    before_E = jnp.cumsum(visits_E) - visits_E
    visit_V = jnp.arange(experts + M // largest)
    expert_V = jnp.minimum(
        jnp.sum(visit_V[:, None] >= (before_E + visits_E)[None], axis=1), experts - 1
    )
    within_V = (visit_V - before_E[expert_V]) * largest
    rows_V = jnp.clip(counts_E[expert_V] - within_V, 0, largest)
    first_V = (jnp.cumsum(counts_E) - counts_E)[expert_V] + within_V
    visits = Visits(expert_V, jnp.searchsorted(jnp.asarray(sizes), rows_V), first_V, rows_V)
    return Sorted(
        choice_S // K,
        gate_S,
        jnp.where(slot_of_TK < M, slot_of_TK, choice_S.shape[0]),
        visits,
        sizes,
    )


def each_visit(body: Callable, buffers: Any, sizes: list[int], visits: Visits) -> Any:
    """`buffers` after `body(size, buffers, expert, first, rows) -> buffers` of every visit; `size`
    is an int.
    """

    def step(buffers, visit: Visits):
        branches = [
            lambda buffers, *_: buffers,
            *(functools.partial(body, size) for size in sizes[1:]),
        ]
        return jax.lax.switch(
            visit.size_V, branches, buffers, visit.expert_V, visit.first_V, visit.rows_V
        ), None

    return jax.lax.scan(step, buffers, visits)[0]


def window(x_S: Array, first: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x_S, first, size)


def put(x_S: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x_S, rows.astype(x_S.dtype), first, axis=0)


@jax.custom_vjp
def experts_bucketed(
    x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """One expert after another, each over its own tokens: matmuls of two matrices, which a CPU runs
    fastest, and few rows of padding.

    XLA's shapes may not depend on data, and an expert's share does: so there is a branch for each
    of `window_sizes`, and an expert takes the smallest that its tokens fit into. What the window
    holds beyond those are the next experts' rows. In the forward pass they write over what it puts
    there; in the backward pass the gate of those rows is 0. For the backward pass the two
    projections' outputs are kept.
    """
    return _bucketed_forward(x_TD, chosen_TK, gates_TK, gate_EDF, up_EDF, down_EFD)[0]


def _bucketed_forward(x_TD, chosen_TK, gates_TK, gate_EDF, up_EDF, down_EFD):
    E, F, D = down_EFD.shape
    token_S, gate_S, slot_of_TK, visits, sizes = sorted_by_expert(chosen_TK, gates_TK, E)

    def body(size, buffers, expert, first, rows):
        gate_SF, up_SF, y_SD = buffers
        x_CD = jnp.take(x_TD, window(token_S, first, size), axis=0, mode="clip")
        gate_CF, up_CF = x_CD @ gate_EDF[expert], x_CD @ up_EDF[expert]
        hidden_CF = swiglu(gate_CF, up_CF) * window(gate_S, first, size)[:, None].astype(x_TD.dtype)
        return (
            put(gate_SF, gate_CF, first),
            put(up_SF, up_CF, first),
            put(y_SD, hidden_CF @ down_EFD[expert], first),
        )

    buffers = tuple(jnp.zeros((token_S.shape[0], width), x_TD.dtype) for width in (F, F, D))
    gate_SF, up_SF, y_SD = each_visit(body, buffers, sizes, visits)
    kept = checkpoint_name(gate_SF, "gate_and_up"), checkpoint_name(up_SF, "gate_and_up")
    return collect(y_SD, token_S, slot_of_TK), (
        *kept,
        x_TD,
        chosen_TK,
        gates_TK,
        gate_EDF,
        up_EDF,
        down_EFD,
    )


def _bucketed_backward(saved, dout_TD):
    gate_SF, up_SF, x_TD, chosen_TK, gates_TK, *weights = saved
    gate_EDF, up_EDF, down_EFD = weights
    token_S, gate_S, slot_of_TK, visits, sizes = sorted_by_expert(
        chosen_TK, gates_TK, down_EFD.shape[0]
    )

    def body(size, buffers, expert, first, rows):
        dx_SD, dgate_S, dweights = buffers
        token_C = window(token_S, first, size)
        x_CD, dout_CD = (jnp.take(x, token_C, axis=0, mode="clip") for x in (x_TD, dout_TD))
        weight_C1 = jnp.where(jnp.arange(size) < rows, window(gate_S, first, size), 0)[
            :, None
        ].astype(x_TD.dtype)
        hidden_CF, back = jax.vjp(swiglu, window(gate_SF, first, size), window(up_SF, first, size))
        dmixed_CF = dout_CD @ down_EFD[expert].T
        dgate_CF, dup_CF = back(dmixed_CF * weight_C1)
        dx_CD = dgate_CF @ gate_EDF[expert].T + dup_CF @ up_EDF[expert].T
        dgate_C = jnp.sum((dmixed_CF * hidden_CF).astype(dgate_S.dtype), axis=1)
        more = x_CD.T @ dgate_CF, x_CD.T @ dup_CF, (hidden_CF * weight_C1).T @ dout_CD
        dweights = tuple(
            jax.lax.dynamic_update_index_in_dim(dw, dw[expert] + own, expert, 0)
            for dw, own in zip(dweights, more, strict=True)
        )
        return put(dx_SD, dx_CD, first), put(dgate_S, dgate_C, first), dweights

    buffers = (
        jnp.zeros((token_S.shape[0], x_TD.shape[1]), x_TD.dtype),
        jnp.zeros(token_S.shape, gates_TK.dtype),
        tuple(map(jnp.zeros_like, weights)),
    )
    dx_SD, dgate_S, dweights = each_visit(body, buffers, sizes, visits)
    dgates_TK = jnp.take(dgate_S, slot_of_TK, mode="fill", fill_value=0)
    return collect(dx_SD, token_S, slot_of_TK), None, dgates_TK, *dweights


experts_bucketed.defvjp(_bucketed_forward, _bucketed_backward)
