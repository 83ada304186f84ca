"""The routed experts' FFN: each token through its chosen experts, mixed by their gates. Dropless: no token is ever left out.

| implementation | how | good for |
|---|---|---|
| reference | every expert on every token, unchosen ones weighted 0 | decoding a few tokens (each expert's weights are read once anyway), and the oracle |
| by_size | tokens sorted by expert, one expert after another, each by the smallest of some sizes that its share fits into | CPU |
| blocks | tokens sorted by expert, each expert's share padded to whole blocks, batched matmul over blocks | GPU without tokamax |
| megablox, tokamax | tokens sorted by expert, a grouped matmul (`grouped_matmul.py`) | TPU; GPU |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from errors import UserError
from model.kernels import grouped_matmul
from model.kernels.grouped_matmul import GroupedMatmul

BLOCK = 128  # tokens; the largest block. Padding wastes half a block per expert on average.


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate_TF: Array, up_TF: Array) -> Array:
    """silu(gate) * up (arXiv 2002.05202, eq. 6). The backward pass keeps its two inputs and none of the steps between."""
    return jax.nn.silu(gate_TF) * up_TF


def experts_reference(x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """Every expert on every token: two matmuls with all experts' hidden widths side by side, and one back that sums over experts too."""
    E = gate_EDF.shape[0]
    mix_TE = jnp.sum(jnp.where(chosen_TK[..., None] == jnp.arange(E), gates_TK[..., None], 0.0), axis=1)
    gate_TEF, up_TEF = (jnp.einsum("TD,EDF->TEF", x_TD, w_EDF) for w_EDF in (gate_EDF, up_EDF))
    hidden_TEF = swiglu(gate_TEF, up_TEF) * mix_TE[..., None].astype(x_TD.dtype)
    return jnp.einsum("TEF,EFD->TD", hidden_TEF, down_EFD)


# Moving tokens to slots and back is gathers both ways, never a scatter-add: that is slow on CPU and adds in no fixed order on GPU. Each of these is the
# other's transpose; an index out of range (T, or S) says "none" and reads as zero.


@jax.custom_vjp
def dispatch(x_TD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Row s is token `token_of_slot[s]`, of an empty slot any."""
    return jnp.take(x_TD, token_of_slot_S, axis=0, mode="clip")


@jax.custom_vjp
def collect(y_SD: Array, token_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """The sum over each token's choices of their slots' rows, in order of choice."""
    rows_TD = [jnp.take(y_SD, slot_of_T, axis=0, mode="fill", fill_value=0) for slot_of_T in slot_of_TK.T]  # a gather of [T, K, D] is written and read again
    return functools.reduce(jnp.add, rows_TD)


dispatch.defvjp(lambda x_TD, *slots: (dispatch(x_TD, *slots), slots), lambda slots, dy_SD: (collect(dy_SD, *slots), None, None))
collect.defvjp(lambda y_SD, *slots: (collect(y_SD, *slots), slots), lambda slots, dx_TD: (dispatch(dx_TD, *slots), None, None))


@jax.custom_vjp
def gates_of_slots(gates_TK: Array, choice_of_slot_S: Array, slot_of_TK: Array) -> Array:
    """Each slot's gate, 0 where it is empty."""
    return jnp.take(gates_TK.reshape(-1), choice_of_slot_S, mode="fill", fill_value=0)


gates_of_slots.defvjp(
    lambda gates_TK, choice_of_slot_S, slot_of_TK: (gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK), slot_of_TK),
    lambda slot_of_TK, d_S: (jnp.take(d_S, slot_of_TK, mode="fill", fill_value=0), None, None),
)


@jax.custom_vjp
def weights_of_blocks(w_EXY: Array, expert_of_block_n: Array) -> Array:
    """Each block's weights. The transpose is one matmul with the blocks' one-hot experts, in place of a scatter-add of whole matrices."""
    return jnp.take(w_EXY, expert_of_block_n, axis=0, mode="clip")  # the default mode reads and writes every weight once more, to check


def weights_of_blocks_backward(saved, d_nXY: Array):
    expert_of_block_n, like_EXY = saved
    one_hot_En = (expert_of_block_n == jnp.arange(like_EXY.shape[0])[:, None]).astype(d_nXY.dtype)
    return (one_hot_En @ d_nXY.reshape(d_nXY.shape[0], -1)).reshape(like_EXY.shape), None


weights_of_blocks.defvjp(
    lambda w_EXY, expert_of_block_n: (weights_of_blocks(w_EXY, expert_of_block_n), (expert_of_block_n, w_EXY)),
    weights_of_blocks_backward,
)


def sorted_slots(chosen_TK: Array, experts: int, block: int) -> tuple[Array, Array, Array, Array]:
    """Gives every (token, choice) a slot, experts in order, each expert's share beginning on a block boundary.

    Choices outside 0 .. experts - 1 belong to other devices and get no slot.

    Returns:
      slot_of_TK: the slot of each choice, S where it has none.
      choice_of_slot_S: t * K + k, or T * K in an empty slot. S is the most that can be needed, in whole blocks.
      expert_of_block_n: whose weights a block needs.
      counts_E: choices per expert.
    """
    T, K = chosen_TK.shape
    M = T * K
    expert_M = jnp.where((chosen_TK >= 0) & (chosen_TK < experts), chosen_TK, experts).reshape(M)
    counts_E = jnp.sum(expert_M[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    blocks_E = -(-counts_E // block)
    first_E = jnp.cumsum(counts_E) - counts_E  # in sorted order
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    n = (M + experts * (block - 1)) // block  # every expert may leave its last block all but empty
    S = n * block

    order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
    rank_M = jnp.argsort(order_M).astype(jnp.int32)
    local_M = jnp.minimum(expert_M, experts - 1)
    slot_M = jnp.where(expert_M < experts, first_block_E[local_M] * block + rank_M - first_E[local_M], S)

    expert_of_block_n = jnp.sum(jnp.arange(n)[:, None] >= (first_block_E + blocks_E)[None], axis=1)
    expert_of_block_n = jnp.minimum(expert_of_block_n, experts - 1)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    expert_S = jnp.repeat(expert_of_block_n, block)
    within_S = slot_S - first_block_E[expert_S] * block
    used_S = within_S < counts_E[expert_S]
    choice_of_slot_S = jnp.where(used_S, order_M[jnp.minimum(first_E[expert_S] + within_S, M - 1)], M)
    return slot_M.reshape(T, K), choice_of_slot_S, expert_of_block_n, counts_E


def block_size(choices: int, experts: int) -> int:
    """As large as an expert's average share, a power of two, at most BLOCK: large blocks pay for reading the weights, small ones waste less padding."""
    share = max(choices // experts, 1)
    return max(8, min(BLOCK, 1 << (share.bit_length() - 1)))


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("gate_and_up"))
def experts_blocks(x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """Batched matmul over blocks of tokens that share an expert. For the backward pass only the two projections' outputs are kept: every block's weights and
    tokens are gathered anew, which is cheaper than to write and read them."""
    T, K = chosen_TK.shape
    E, D, _ = gate_EDF.shape
    block = block_size(T * K, E)
    slot_of_TK, choice_of_slot_S, expert_of_block_n, _ = sorted_slots(chosen_TK, E, block)
    slots = choice_of_slot_S // K, slot_of_TK
    x_nbD = dispatch(x_TD, *slots).reshape(-1, block, D)
    gate_nDF, up_nDF, down_nFD = (weights_of_blocks(w, expert_of_block_n) for w in (gate_EDF, up_EDF, down_EFD))
    # The gate goes before the down projection, so that its gradient needs no output of that projection.
    gates_nb1 = gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK).reshape(-1, block, 1).astype(x_TD.dtype)
    gate_nbF, up_nbF = checkpoint_name(x_nbD @ gate_nDF, "gate_and_up"), checkpoint_name(x_nbD @ up_nDF, "gate_and_up")
    hidden_nbF = swiglu(gate_nbF, up_nbF) * gates_nb1
    return collect((hidden_nbF @ down_nFD).reshape(-1, D), *slots)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("gate_and_up"), static_argnums=(0, 1))
def experts_grouped(
    matmul: GroupedMatmul, rows: int, x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """`matmul(x_SD, w_EDF, counts_E)` over tokens sorted by expert, each expert's share beginning on a multiple of `rows`. For the backward pass only the two
    projections' outputs are kept, as in `experts_blocks`."""
    slot_of_TK, choice_of_slot_S, _, counts_E = sorted_slots(chosen_TK, gate_EDF.shape[0], rows)
    slots = choice_of_slot_S // chosen_TK.shape[1], slot_of_TK
    slots_E = -(-counts_E // rows) * rows
    x_SD = dispatch(x_TD, *slots)
    gates_S1 = gates_of_slots(gates_TK, choice_of_slot_S, slot_of_TK)[:, None].astype(x_TD.dtype)
    gate_SF, up_SF = (checkpoint_name(matmul(x_SD, w_EDF, slots_E), "gate_and_up") for w_EDF in (gate_EDF, up_EDF))
    return collect(matmul(swiglu(gate_SF, up_SF) * gates_S1, down_EFD, slots_E), *slots)


EIGHTHS = (4, 6, 7, 8, 9, 10, 12, 16)  # of the mean share; every size costs time to compile


def window_sizes(choices: int, experts: int) -> list[int]:
    """Rows that `experts_by_size` has a branch for: close to each other about the mean share, up to twice that share; and none at all."""
    mean = max(choices // experts, 1)
    return sorted({0, *(min(-(-mean * eighths // 8), choices) for eighths in EIGHTHS)})


class Visits(NamedTuple):
    """Who is visited in which order: each expert once, again while it has more tokens than the largest window, and at the end nobody."""

    expert_V: Array
    size_V: Array  # which one of the window's sizes
    first_V: Array  # the window's first row
    rows_V: Array  # how many of its rows are the expert's own


class Sorted(NamedTuple):
    """Every (token, choice) sorted by expert, behind them as many empty rows as a window may reach over."""

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
    expert_V = jnp.minimum(jnp.sum(visit_V[:, None] >= (before_E + visits_E)[None], axis=1), experts - 1)
    within_V = (visit_V - before_E[expert_V]) * largest
    rows_V = jnp.clip(counts_E[expert_V] - within_V, 0, largest)
    first_V = (jnp.cumsum(counts_E) - counts_E)[expert_V] + within_V
    visits = Visits(expert_V, jnp.searchsorted(jnp.asarray(sizes), rows_V), first_V, rows_V)
    return Sorted(choice_S // K, gate_S, jnp.where(slot_of_TK < M, slot_of_TK, choice_S.shape[0]), visits, sizes)


def each_visit(body: Callable, buffers: Any, sizes: list[int], visits: Visits) -> Any:
    """`buffers` after `body(size, buffers, expert, first, rows) -> buffers` of every visit; `size` is an int."""

    def step(buffers, visit: Visits):
        branches = [lambda buffers, *_: buffers, *(functools.partial(body, size) for size in sizes[1:])]
        return jax.lax.switch(visit.size_V, branches, buffers, visit.expert_V, visit.first_V, visit.rows_V), None

    return jax.lax.scan(step, buffers, visits)[0]


def window(x_S: Array, first: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x_S, first, size)


def put(x_S: Array, rows: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x_S, rows.astype(x_S.dtype), first, axis=0)


@jax.custom_vjp
def experts_by_size(x_TD: Array, chosen_TK: Array, gates_TK: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> Array:
    """One expert after another, each over its own tokens: matmuls of two matrices, which a CPU runs fastest, and few rows of padding.

    XLA's shapes may not depend on data, and an expert's share does: so there is a branch for each of `window_sizes`, and an expert takes the smallest that
    its tokens fit into. What the window holds beyond those are the next experts' rows. In the forward pass they write over what it puts there; in the
    backward pass the gate of those rows is 0. For the backward pass the two projections' outputs are kept.
    """
    return _by_size_forward(x_TD, chosen_TK, gates_TK, gate_EDF, up_EDF, down_EFD)[0]


def _by_size_forward(x_TD, chosen_TK, gates_TK, gate_EDF, up_EDF, down_EFD):
    E, F, D = down_EFD.shape
    token_S, gate_S, slot_of_TK, visits, sizes = sorted_by_expert(chosen_TK, gates_TK, E)

    def body(size, buffers, expert, first, rows):
        gate_SF, up_SF, y_SD = buffers
        x_CD = jnp.take(x_TD, window(token_S, first, size), axis=0, mode="clip")
        gate_CF, up_CF = x_CD @ gate_EDF[expert], x_CD @ up_EDF[expert]
        hidden_CF = swiglu(gate_CF, up_CF) * window(gate_S, first, size)[:, None].astype(x_TD.dtype)
        return put(gate_SF, gate_CF, first), put(up_SF, up_CF, first), put(y_SD, hidden_CF @ down_EFD[expert], first)

    buffers = tuple(jnp.zeros((token_S.shape[0], width), x_TD.dtype) for width in (F, F, D))
    gate_SF, up_SF, y_SD = each_visit(body, buffers, sizes, visits)
    kept = checkpoint_name(gate_SF, "gate_and_up"), checkpoint_name(up_SF, "gate_and_up")
    return collect(y_SD, token_S, slot_of_TK), (*kept, x_TD, chosen_TK, gates_TK, gate_EDF, up_EDF, down_EFD)


def _by_size_backward(saved, dout_TD):
    gate_SF, up_SF, x_TD, chosen_TK, gates_TK, *weights = saved
    gate_EDF, up_EDF, down_EFD = weights
    token_S, gate_S, slot_of_TK, visits, sizes = sorted_by_expert(chosen_TK, gates_TK, down_EFD.shape[0])

    def body(size, buffers, expert, first, rows):
        dx_SD, dgate_S, dweights = buffers
        token_C = window(token_S, first, size)
        x_CD, dout_CD = (jnp.take(x, token_C, axis=0, mode="clip") for x in (x_TD, dout_TD))
        weight_C1 = jnp.where(jnp.arange(size) < rows, window(gate_S, first, size), 0)[:, None].astype(x_TD.dtype)
        hidden_CF, back = jax.vjp(swiglu, window(gate_SF, first, size), window(up_SF, first, size))
        dmixed_CF = dout_CD @ down_EFD[expert].T
        dgate_CF, dup_CF = back(dmixed_CF * weight_C1)
        dx_CD = dgate_CF @ gate_EDF[expert].T + dup_CF @ up_EDF[expert].T
        dgate_C = jnp.sum((dmixed_CF * hidden_CF).astype(dgate_S.dtype), axis=1)
        more = x_CD.T @ dgate_CF, x_CD.T @ dup_CF, (hidden_CF * weight_C1).T @ dout_CD
        dweights = tuple(jax.lax.dynamic_update_index_in_dim(dw, dw[expert] + own, expert, 0) for dw, own in zip(dweights, more, strict=True))
        return put(dx_SD, dx_CD, first), put(dgate_S, dgate_C, first), dweights

    buffers = jnp.zeros((token_S.shape[0], x_TD.shape[1]), x_TD.dtype), jnp.zeros(token_S.shape, gates_TK.dtype), tuple(map(jnp.zeros_like, weights))
    dx_SD, dgate_S, dweights = each_visit(body, buffers, sizes, visits)
    dgates_TK = jnp.take(dgate_S, slot_of_TK, mode="fill", fill_value=0)
    return collect(dx_SD, token_S, slot_of_TK), None, dgates_TK, *dweights


experts_by_size.defvjp(_by_size_forward, _by_size_backward)


IMPLEMENTATIONS = ("blocks", "by_size", "megablox", "reference", "tokamax")


def few(choices: int, experts: int) -> bool:
    """Whether reading the weights, not the arithmetic, sets the time: then every expert may as well see every token."""
    return choices <= 16 * experts


def pick(name: str, platform: str, choices: int, experts: int, devices: int = 1) -> Callable:
    """The table: (platform, size) -> implementation. `name` other than "auto" overrides it.

    `choices` are those of all tokens that are here, made among the experts of `devices` devices, each with `experts` of them. Raises UserError for a name that
    is unknown, or not for this platform, or not installed.
    """
    if name == "auto":
        name = "reference" if few(choices, experts) else grouped_matmul.preferred(platform) or ("by_size" if platform == "cpu" else "blocks")
    if name not in IMPLEMENTATIONS:
        raise UserError(f"model.expert_matmul = {name!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}")
    if name in grouped_matmul.PLATFORMS:
        return functools.partial(experts_grouped, *grouped_matmul.pick(name, platform, choices // (devices * experts)))
    return {"reference": experts_reference, "blocks": experts_blocks, "by_size": experts_by_size}[name]
