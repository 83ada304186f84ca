"""The two TPU kernels of the indexer's KL loss; `indexer_kl` has the equations.

A tile of the loss is [K, Q], with a key in each row. So what is one number a query (lse, w) lies
along lanes, as it is stored, and no head's product needs a transposed operand.
"""

from itertools import islice
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.bitmask import LANES, tile_bias
from kernels.selection import score_tile
from kernels.tiles import F32, INITIAL_MAX, dot, fold_sublanes


class TileTables(NamedTuple):
    """The tiles of a chunk of keys, in scalar memory; arrays outside a kernel, references in it.

    Attributes:
      nonempty [B, n, m]: int32, whether any query of the tile has a key in it.
      fetch [B, n, m]: which tile to fetch, see `next_nonempty`.
      first [1]: the number of the chunk's first tile in the sequence.
    """

    nonempty: Any
    fetch: Any
    first: Any


class Inputs(NamedTuple):
    """References to what the loss' kernel reads.

    Attributes:
      q [1, N, Q, H], k [1, heads, K, H], lse [1, N, 1, Q]: the attention's; k of a group of heads.
      index_q [1, I, Q, C], index_w [1, I, 1, Q], index_k [1, K, C], index_lse [1, 1, Q]: the
        indexer's.
      allowed, selected [1, Q, 128]: the bitmasks of the keys compared, and of those selected.
      dq [B, I, C, T], dk [B, S, C]: the same memory as the outputs', in HBM.
    """

    q: Any
    k: Any
    lse: Any
    index_q: Any
    index_w: Any
    index_k: Any
    index_lse: Any
    allowed: Any
    selected: Any
    dq: Any
    dk: Any


class Outputs(NamedTuple):
    """References to what the loss' kernel writes.

    Attributes:
      kl, recall [1, 1, Q]: the loss, and the attention's probability of the selected keys.
      dw [1, I, 1, Q]: the gradient of the indexer's weights.
      dq [B, I, C, T], dk [B, S, C]: the gradients of its queries and keys, in HBM.
    """

    kl: Any
    recall: Any
    dw: Any
    dq: Any
    dk: Any


class Scratch(NamedTuple):
    """References to the loss' kernel's own memory.

    Attributes:
      kl, recall [8, Q], dw [I, 8, Q]: sums over a row of tiles, for each sublane.
      p [K, Q]: the attention's probabilities, summed over the heads so far.
      relu [I, K, Q]: relu(q . k) of each indexer head, kept for the gradients.
      dq [I, C, Q]: dq of a row of tiles, transposed.
      dk [K, C]: dk of a tile.
      dq_copied, dk_copied: semaphores, one for each array: with one for both, a wait for one copy
        could return at the end of the other.
    """

    kl: Any
    recall: Any
    dw: Any
    p: Any
    relu: Any
    dq: Any
    dk: Any
    dq_copied: Any
    dk_copied: Any


def normaliser_kernel(
    nonempty_ref,
    fetch_ref,
    first_ref,
    q_ref,
    w_ref,
    k_ref,
    bits_ref,
    lse_ref,
    largest_ref,
    total_ref,
):
    """Adds a tile to the log-sum-exp of the indexer's scores.

    Args:
      nonempty_ref, fetch_ref, first_ref: see `TileTables`.
      q_ref [1, I, Q, C], w_ref [1, Q, I], k_ref [1, K, C]: the indexer's.
      bits_ref [1, Q, 128]: the bitmask.
      lse_ref [1, 1, Q]: the result.
      largest_ref, total_ref [Q, 128]: the largest score, equal in all lanes, and the sum of the
        exponentials below it.
    """
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(j == 0)
    def _begin():
        _reset_normaliser(largest_ref, total_ref)

    @pl.when(nonempty_ref[b, i, j] != 0)
    def _add_tile():
        scores_QK = score_tile(q_ref[0], k_ref[0], w_ref[0]) + tile_bias(
            bits_ref[0], first_ref[0] + j, k_ref.shape[1]
        )
        before_QL = largest_ref[...]
        largest_QL = jnp.maximum(before_QL, jnp.max(scores_QK, axis=1, keepdims=True))
        total_ref[...] = jnp.exp(before_QL - largest_QL) * total_ref[...] + jnp.sum(
            jnp.exp(scores_QK - largest_QL[:, :1]), axis=1, keepdims=True
        )
        largest_ref[...] = largest_QL

    @pl.when(j == pl.num_programs(2) - 1)
    def _end():
        # A query without keys keeps what it began with: another chunk may have some.
        lse_ref[0] = (largest_ref[...] + jnp.log(jnp.maximum(total_ref[...], 1e-30))).T[:1]


def _reset_normaliser(largest_ref, total_ref) -> None:
    """Begins a row of tiles."""
    largest_ref[...] = jnp.full(largest_ref.shape, INITIAL_MAX, F32)
    total_ref[...] = jnp.zeros(total_ref.shape, F32)


def kl_kernel(*refs, groups: int):
    """Adds a tile's keys to the loss and its gradients, after the last of `groups` groups of heads.

    Args:
      refs: those of `TileTables`, `Inputs`, `Outputs` and `Scratch`.
      groups: how many groups of heads come one after the other.
    """
    rest = iter(refs)
    tables = TileTables(*islice(rest, len(TileTables._fields)))
    inputs = Inputs(*islice(rest, len(Inputs._fields)))
    outputs = Outputs(*islice(rest, len(Outputs._fields)))
    scratch = Scratch(*rest)
    b, i, j, group = (pl.program_id(axis) for axis in range(4))
    keys, queries = scratch.p.shape
    last_group = groups == 1 or group == groups - 1
    dq_here = outputs.dq.at[b, :, :, pl.ds(pl.multiple_of(i * queries, LANES), queries)]

    @pl.when((j == 0) & (group == 0))
    def _begin():
        arrival = pltpu.make_async_copy(dq_here, scratch.dq, scratch.dq_copied)
        arrival.start()
        _reset_sums(scratch)
        arrival.wait()

    @pl.when(tables.nonempty[b, i, j] != 0)
    def _add_tile():
        first_key = pl.multiple_of((tables.first[0] + j) * keys, LANES)
        dk_here = outputs.dk.at[b, pl.ds(first_key, keys)]
        arrival = pltpu.make_async_copy(dk_here, scratch.dk, scratch.dk_copied)
        pl.when(last_group)(arrival.start)
        p_KQ = _sum_probabilities(inputs, scratch, group, groups)

        @pl.when(last_group)
        def _add_loss_and_gradients():
            allowed_KQ, selected_KQ = (
                tile_bias(ref[0], tables.first[0] + j, keys).T == 0
                for ref in (inputs.allowed, inputs.selected)
            )
            mean_KQ = jnp.where(allowed_KQ, p_KQ * (1.0 / inputs.q.shape[1]), 0.0)
            scratch.recall[...] += fold_sublanes(jnp.add, jnp.where(selected_KQ, mean_KQ, 0.0))
            dscores_KQ = _add_loss(inputs, scratch, mean_KQ, allowed_KQ)
            index_k_CK = inputs.index_k[0].T
            arrival.wait()
            _add_gradients(inputs, scratch, dscores_KQ, index_k_CK)
            departure = pltpu.make_async_copy(scratch.dk, dk_here, scratch.dk_copied)
            departure.start()
            departure.wait()

    @pl.when((j == pl.num_programs(2) - 1) & last_group)
    def _end():
        departure = pltpu.make_async_copy(scratch.dq, dq_here, scratch.dq_copied)
        departure.start()
        _write_sums(outputs, scratch)
        departure.wait()


def _reset_sums(scratch: Scratch) -> None:
    """Begins a row of tiles."""
    for sum_ref in (scratch.kl, scratch.recall, scratch.dw):
        sum_ref[...] = jnp.zeros(sum_ref.shape, F32)


def _sum_probabilities(inputs: Inputs, scratch: Scratch, group, groups: int) -> Array:
    """Sums the attention's probabilities over the heads so far, [K, Q].

    The values of keys outside the bitmask mean nothing, and the caller sets them to 0.
    """
    heads, p_KQ = inputs.k.shape[1], jnp.zeros(scratch.p.shape, F32)
    for own in range(heads):
        head = group * heads + own
        p_KQ += jnp.exp(dot(inputs.k[0, own], inputs.q[0, head], (1, 1)) - inputs.lse[0, head])
    if groups > 1:
        p_KQ += _earlier_heads(scratch.p, group)
        scratch.p[...] = p_KQ
    return p_KQ


def _earlier_heads(p_ref, group) -> Array:
    """Returns the sum over the groups of heads before: none for the first group."""
    return jnp.where(group == 0, 0.0, p_ref[...])


def _add_loss(inputs: Inputs, scratch: Scratch, mean_KQ: Array, allowed_KQ: Array) -> Array:
    """Adds p (log p - log softmax(I)) of a tile's keys to the loss (arXiv 2512.02556, eq. 3, 4).

    Args:
      inputs, scratch: `relu` is written.
      mean_KQ: p, the attention's probabilities, mean over heads.
      allowed_KQ: bool, the keys compared.

    Returns: dscores_KQ, the loss' gradient for the scores, softmax(I) - p.
    """
    scores_KQ = jnp.zeros(scratch.p.shape, F32)
    for head in range(inputs.index_q.shape[1]):
        relu_KQ = jnp.maximum(dot(inputs.index_k[0], inputs.index_q[0, head], (1, 1)), 0.0)
        scratch.relu[head] = relu_KQ.astype(scratch.relu.dtype)
        scores_KQ += relu_KQ * inputs.index_w[0, head]
    log_predicted_KQ = scores_KQ - inputs.index_lse[0]
    kl_KQ = mean_KQ * (jnp.log(jnp.where(mean_KQ > 0, mean_KQ, 1.0)) - log_predicted_KQ)
    scratch.kl[...] += fold_sublanes(jnp.add, jnp.where(allowed_KQ, kl_KQ, 0.0))
    return jnp.where(allowed_KQ, jnp.exp(log_predicted_KQ) - mean_KQ, 0.0)


def _add_gradients(inputs: Inputs, scratch: Scratch, dscores_KQ: Array, index_k_CK: Array) -> None:
    """Adds a tile's gradients to dw, dq and dk, from the loss' gradient for the scores.

    For each indexer head, with ddot = dscores w [q . k > 0] the gradient for q . k,

        dw = sum of dscores relu(q . k)        dq = sum of ddot k        dk = sum of ddot q
    """
    dk_KC = scratch.dk[...]
    for head in range(inputs.index_q.shape[1]):
        relu_KQ = scratch.relu[head].astype(F32)
        scratch.dw[head] += fold_sublanes(jnp.add, dscores_KQ * relu_KQ)
        ddot_KQ = (jnp.where(relu_KQ > 0, dscores_KQ, 0.0) * inputs.index_w[0, head]).astype(
            inputs.index_k.dtype
        )
        scratch.dq[head] += dot(index_k_CK, ddot_KQ, (1, 0))
        dk_KC += dot(ddot_KQ, inputs.index_q[0, head], (1, 0))
    scratch.dk[...] = dk_KC


def _write_sums(outputs: Outputs, scratch: Scratch) -> None:
    """Ends a row of tiles: folds the sums' sublanes."""
    for row_ref, sum_ref in ((outputs.kl, scratch.kl), (outputs.recall, scratch.recall)):
        row_ref[0] = jnp.sum(sum_ref[...], axis=0, keepdims=True)
    for head in range(scratch.dw.shape[0]):
        outputs.dw[0, head] = jnp.sum(scratch.dw[head], axis=0, keepdims=True)
