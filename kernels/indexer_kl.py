"""The indexer's KL loss over a bitmask of keys, without an array of T x S (arXiv 2512.02556).

The loss of a query is KL(p || softmax of the scores over the bitmask), eq. 3 over all keys and
eq. 4 over the selected ones; `reference.indexer_kl` is the equation. p is the attention's
probabilities, mean over heads. Each head's probabilities sum to 1 over the bitmask, so
p = mean over heads of exp(logits - lse) needs no normalising of its own. With I the scores and L
their log-sum-exp,

    KL = sum over keys of p (log p - I + L)        dKL/dI = softmax(I) - p

so a first pass over the tiles finds L, and a second one the loss and, since a sum's cotangent is
one number, its gradients too: w gets the sum of dI relu(q k), q gets dI w [q k > 0] k, k the same
with q. Both passes skip tiles without a key, as the attention's forward does. The second one also
sums p over a part of the keys: in the dense warm-up, over what would be selected, that is the
indexer's recall.

p needs all heads of the attention. Where those lie over several devices, their keys are gathered
KEYS_AT_ONCE at a time, each chunk when its turn comes: all keys of all heads would be 8 GiB at
128K. So every gradient is a sum over chunks, in float32, for QUERIES_AT_ONCE queries at a time.

| file | what |
|---|---|
| indexer_kl.py | the reference, the entry, the loops over chunks of queries and keys |
| indexer_kl_calls.py | the two kernels' grids, blocks and tables of tiles |
| indexer_kl_kernel.py | the two kernels |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from kernels.bitmask import next_nonempty, nonempty_tiles, num_words, unpack
from kernels.chunks import scan_chunks
from kernels.device import ambient_device
from kernels.indexer_kl_calls import MainAttention, Tiles, loss_and_gradients, normaliser
from kernels.indexer_kl_kernel import TileTables
from kernels.reference import indexer_kl, indexer_scores
from kernels.tiles import F32, map_row_groups, padded, vmem_bytes

# An eighth of a row of 128K: the float32 sums of more would be 0.5 GiB each.
QUERIES_AT_ONCE = 16_384
KEYS_AT_ONCE = 16_384  # 1 GiB of 128 heads


def total_kl_reference(
    attention: MainAttention,
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    allowed_BTW: Array,
    selected_BTW: Array,
    *,
    axis: str = "",
    queries: int = 256,
) -> tuple[Array, Array]:
    """Computes what `total_kl_tpu` does, in plain JAX, `queries` queries at a time."""
    (q_BNTH, k_BNSH, lse_BNT), S = jax.lax.stop_gradient(attention), k_BSC.shape[1]
    k_BNSH, k_BSC = gather_heads(k_BNSH, axis), k_BSC.astype(q_BTIC.dtype)

    def add_chunk(total, q_BNTH, lse_BNT, q_BTIC, w_BTI, allowed_BTW, selected_BTW):
        """Adds the loss of a chunk of queries to `total`.

        Args:
          total: the loss of the chunks before, a float32 scalar.
          q_BNTH, lse_BNT: the chunk's queries of the attention, and their log-sum-exp.
          q_BTIC, w_BTI: its queries of the indexer, and the weights of the indexer's heads.
          allowed_BTW, selected_BTW: the bitmasks of the keys compared, and of those selected.

        Returns: the new total, and recall_BT, the attention's probability of the selected keys.
        """
        allowed_BTS = unpack(allowed_BTW, S)
        logits_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=F32)
        p_BTS = jnp.mean(
            jnp.where(allowed_BTS[:, None], jnp.exp(logits_BNTS - lse_BNT[..., None]), 0.0), axis=1
        )
        recall_BT = jnp.sum(jnp.where(unpack(selected_BTW, S), p_BTS, 0.0), axis=-1)
        kl_BT = indexer_kl(p_BTS, indexer_scores(q_BTIC, k_BSC, w_BTI), allowed_BTS)
        return total + jnp.sum(kl_BT), recall_BT

    return scan_chunks(
        add_chunk,
        jnp.zeros((), F32),
        (q_BNTH, lse_BNT, q_BTIC, w_BTI, allowed_BTW, selected_BTW),
        queries,
        axes=(2, 2, 1, 1, 1, 1),
        checkpoint=True,
    )


def gather_heads(k_BNSH: Array, axis: str) -> Array:
    """Gathers the heads of all devices of a mesh axis; without an axis, returns its argument."""
    return lax.all_gather(k_BNSH, axis, axis=1, tiled=True) if axis else k_BNSH


def total_kl_tpu(
    attention: MainAttention,
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    allowed_BTW: Array,
    selected_BTW: Array,
    tiles: Tiles = Tiles(),
    *,
    axis: str = "",
) -> tuple[Array, Array]:
    """Adds up the indexer's KL loss of all queries, in TPU kernels.

    Queries need not be a sequence's first ones, nor neighbours: the bitmasks say what each sees.

    Args:
      attention: the queries and keys that `attend_tpu` took, and the log-sum-exp that it returned.
      q_BTIC, k_BSC, w_BTI: the indexer's, see `indexer_scores`. Keys are multiplied in the queries'
        dtype; if they are float32, their gradient is not rounded.
      allowed_BTW: a bitmask of the keys that p and the softmax range over, as lse does.
      selected_BTW: a bitmask of the keys that the indexer selects, a subset of them.
      tiles: the size of a tile.
      axis: the mesh axis that the heads of attention.k_BNSH lie over, if any, inside a shard_map.
        attention.q_BNTH has all heads.

    Returns:
      The loss summed over all queries, float32, in nats; 0 for queries without keys. Its gradient
        reaches the indexer's q, k and w alone.
      recall_BT: the attention's probability of the selected keys, float32. No gradient.
    """
    if not tiles.queries:
        queries = most_queries(ambient_device().device_kind, q_BTIC.shape[1])
        tiles = tiles._replace(queries=queries)

    def total_kl_of_rows(attention, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW):
        """Computes the loss [1] and recall_BT of rows whose tables of tiles fit.

        Args:
          attention: the attention's queries, keys and log-sum-exp.
          q_BTIC, k_BSC, w_BTI: the indexer's queries, keys and head weights.
          allowed_BTW, selected_BTW: the bitmasks of the keys compared, and of those selected.
        """
        kl, recall_BT = _total_kl(
            attention, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW, tiles, axis
        )
        return kl[None], recall_BT

    table = (
        -(-min(QUERIES_AT_ONCE, q_BTIC.shape[1]) // tiles.queries),
        -(-min(KEYS_AT_ONCE, k_BSC.shape[1]) // tiles.keys),
    )
    kl_n, recall_BT = map_row_groups(
        total_kl_of_rows, table, attention, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW
    )
    return jnp.sum(kl_n), recall_BT


def most_queries(device_kind: str, T: int) -> int:
    """Returns the queries of a tile, for T queries: each key that is fetched serves so many.

    Where blocks of 128 queries are sharded over devices block-cyclically, the two blocks of a tile
    of 256 stand apart, and the earlier one sees keys of the later one in vain, a share of 128 / T:
    not worth it for short rows.
    """
    return 256 if vmem_bytes(device_kind) >= 128 * 2**20 and T >= 4_096 else 128


class _Queries(NamedTuple):
    """A chunk of queries: the attention's, the indexer's, and their bitmasks."""

    q_BNTH: Array
    lse_BNT: Array
    q_BTIC: Array
    w_BTI: Array
    allowed_BTW: Array
    selected_BTW: Array


def _value(
    attention: MainAttention,
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    allowed_BTW: Array,
    selected_BTW: Array,
    tiles: Tiles,
    axis: str,
) -> tuple[Array, Array]:
    """Computes what `total_kl_tpu` returns, of rows whose tables of tiles fit."""
    return _value_and_gradients(
        attention, q_BTIC, k_BSC, w_BTI, allowed_BTW, selected_BTW, tiles, axis
    )[0]


def _value_and_gradients(
    attention: MainAttention,
    q_BTIC: Array,
    k_BSC: Array,
    w_BTI: Array,
    allowed_BTW: Array,
    selected_BTW: Array,
    tiles: Tiles,
    axis: str,
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """Computes (kl, recall_BT) and the gradients of kl for q, k and w, in chunks of queries."""
    (q_BNTH, k_BNSH, lse_BNT), T, S = attention, q_BTIC.shape[1], k_BSC.shape[1]
    queries_at_once = min(QUERIES_AT_ONCE, -(-T // tiles.queries) * tiles.queries)
    keys_at_once = min(KEYS_AT_ONCE, -(-S // tiles.keys) * tiles.keys)
    whole_S = -(-S // keys_at_once) * keys_at_once
    k_BNSH, whole_k_BSC = (
        padded(k_BNSH, 2, whole_S),
        padded(k_BSC.astype(q_BTIC.dtype), 1, whole_S),
    )
    allowed_BTW, selected_BTW = (
        padded(x, 2, num_words(whole_S)) for x in (allowed_BTW, selected_BTW)
    )

    def add_chunk(dk_BSC, *queries):
        *by_query, dk_BSC = _add_query_chunk(
            _Queries(*queries), k_BNSH, whole_k_BSC, dk_BSC, keys_at_once, tiles, axis
        )
        return dk_BSC, tuple(by_query)

    dk_BSC, (kl_BT, recall_BT, dq_BTIC, dw_BTI) = scan_chunks(
        add_chunk,
        jnp.zeros(whole_k_BSC.shape, F32),
        (q_BNTH, lse_BNT, q_BTIC, w_BTI.astype(F32), allowed_BTW, selected_BTW),
        queries_at_once,
        axes=(2, 2, 1, 1, 1, 1),
    )
    gradients = dq_BTIC, dk_BSC[:, :S].astype(k_BSC.dtype), dw_BTI.astype(w_BTI.dtype)
    # The name is that of attention's results: what keeps those for the backward pass keeps these,
    # or else the loss would be computed twice.
    return (jnp.sum(kl_BT), recall_BT), checkpoint_name(gradients, "attention")


def _add_query_chunk(
    chunk: _Queries,
    k_BNSH: Array,
    k_BSC: Array,
    dk_BSC: Array,
    keys_at_once: int,
    tiles: Tiles,
    axis: str,
) -> tuple[Array, Array, Array, Array, Array]:
    """Works through the keys for one chunk of queries, `keys_at_once` at a time.

    Args:
      chunk: the queries.
      k_BNSH, k_BSC: the keys of the attention and of the indexer.
      dk_BSC: the gradient of k_BSC so far, float32.
      keys_at_once: the length of a chunk of keys.
      tiles, axis: see `total_kl_tpu`.

    Returns: kl_BT, recall_BT, dq_BTIC, dw_BTI, and dk_BSC with these queries' added.
    """
    q_BNTH, lse_BNT, q_BTIC, w_BTI, allowed_BTW, selected_BTW = chunk
    (B, T, I, C), (queries, keys, _) = q_BTIC.shape, tiles
    indexer = jnp.swapaxes(q_BTIC, 1, 2), k_BSC, w_BTI
    nonempty_Bnm = nonempty_tiles(allowed_BTW, queries, keys)
    first_n = jnp.arange(0, k_BSC.shape[1], keys_at_once, dtype=jnp.int32)  # of each chunk of keys

    def tables(first) -> TileTables:
        """Makes the tables of tiles of the chunk of keys that begins at `first`."""
        own_Bnm = lax.dynamic_slice_in_dim(nonempty_Bnm, first // keys, keys_at_once // keys, 2)
        return TileTables(own_Bnm.astype(jnp.int32), next_nonempty(own_Bnm), first[None] // keys)

    # The first pass: the log-sum-exp of the scores over all chunks.
    index_lse_B1T = jax.nn.logsumexp(
        lax.map(lambda first: normaliser(tables(first), *indexer, allowed_BTW, tiles), first_n),
        axis=0,
    )

    # The second pass: the loss and its gradients, chunk by chunk.
    def add_chunk(sums, first):
        """Adds the loss and gradients of a chunk of keys, which begins at `first`."""
        # The chunk is tied to the sums before: JAX sees that keys depend on nothing that learns,
        # and would otherwise gather all chunks first, in a loop of its own.
        (before, dq_BICT, dk_BSC), first = lax.optimization_barrier((sums, first))
        chunk_BNSH = lax.dynamic_slice_in_dim(k_BNSH, first, keys_at_once, 2)
        attention = MainAttention(q_BNTH, gather_heads(chunk_BNSH, axis), lse_BNT)
        *by_query, dq_BICT, dk_BSC = loss_and_gradients(
            tables(first),
            attention,
            *indexer,
            index_lse_B1T,
            allowed_BTW,
            selected_BTW,
            dq_BICT,
            dk_BSC,
            tiles,
        )
        added = [one + other for one, other in zip(before, by_query, strict=True)]
        return (added, dq_BICT, dk_BSC), None

    zeros = (
        [jnp.zeros((B, *rows, 1, T), F32) for rows in ((), (), (I,))],
        jnp.zeros((B, I, C, T), F32),
        dk_BSC,
    )
    ((kl_B1T, recall_B1T, dw_BI1T), dq_BICT, dk_BSC), _ = lax.scan(add_chunk, zeros, first_n)
    return (
        kl_B1T[:, 0],
        recall_B1T[:, 0],
        jnp.transpose(dq_BICT, (0, 3, 1, 2)).astype(q_BTIC.dtype),
        jnp.swapaxes(dw_BI1T[:, :, 0], 1, 2),
        dk_BSC,
    )


def _scale_gradients(tiles: Tiles, axis: str, gradients, cotangents):
    """Multiplies the gradients, computed forward, with the loss' cotangent."""
    scale, _ = cotangents
    return (
        None,
        *((scale * gradient.astype(F32)).astype(gradient.dtype) for gradient in gradients),
        None,
        None,
    )


_total_kl = jax.custom_vjp(_value, nondiff_argnums=(6, 7))
_total_kl.defvjp(_value_and_gradients, _scale_gradients)
