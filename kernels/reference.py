"""The plain references of the hot operations: the lightning indexer's scores, selection and loss,
and nucleus selection of keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite, so that a row without any key gives no NaN


class IndexerQuery(NamedTuple):
    """What a query brings: heads' queries [B, T, I, C] and their weights [B, T, I], already scaled
    by (I * C) ** -0.5.
    """

    q_BTIC: Array
    w_BTI: Array


def indexer_scores(q_BTIC: Array, k_BSC: Array, w_BTI: Array) -> Array:
    """How much each query wants each key (arXiv 2512.02556, eq. 1).

        I[t, s] = sum_i  w[t, i] * relu(q[t, i] . k[s])

    Returns scores_BTS, float32. Not causal: the caller masks.
    """
    with jax.named_scope("indexer_scores"):
        dot_BITS = jnp.einsum("BTIC,BSC->BITS", q_BTIC, k_BSC, preferred_element_type=jnp.float32)
        return jnp.einsum("BTI,BITS->BTS", w_BTI.astype(jnp.float32), jax.nn.relu(dot_BITS))


def masked_scores(scores_BTS: Array, allowed_BTS: Array) -> Array:
    """Scores as `top_k` shall see them: -inf where not allowed, and one zero only, since it puts -0
    (a negative weight times relu's 0) below 0. No gradient.
    """
    scores_BTS = jax.lax.stop_gradient(scores_BTS)
    return jnp.where(allowed_BTS, jnp.where(scores_BTS == 0, 0.0, scores_BTS), -jnp.inf)


def select_topk(scores_BTS: Array, allowed_BTS: Array, topk: int) -> Array:
    """The min(topk, allowed) best-scored allowed keys of each query, as a mask. Of equal scores the
    earlier key goes first. No gradient.

    The threshold is found by counting, one bit a pass: no sort, which `jax.lax.top_k` is on GPU and
    TPU.
    """
    with jax.named_scope("select_topk"):
        if topk >= scores_BTS.shape[-1]:
            return allowed_BTS
        rank_BTS = ordered_bits(masked_scores(scores_BTS, allowed_BTS))
        threshold_BT1 = bisect_bits(
            lambda bound: jnp.sum(rank_BTS >= bound, axis=-1, keepdims=True) >= topk,
            rank_BTS.shape[:-1] + (1,),
            bits=32,
        )
        above_BTS, tied_BTS = rank_BTS > threshold_BT1, rank_BTS == threshold_BT1
        wanted_BT1 = topk - jnp.sum(above_BTS, axis=-1, keepdims=True)
        place_S = jnp.arange(scores_BTS.shape[-1], dtype=jnp.uint32)
        bits = int(scores_BTS.shape[-1] - 1).bit_length()
        # The last tied key that is wanted stands at the largest place with fewer than the wanted
        # ones before it.
        last_BT1 = bisect_bits(
            lambda bound: (
                jnp.sum(tied_BTS & (place_S < bound), axis=-1, keepdims=True) < wanted_BT1
            ),
            threshold_BT1.shape,
            bits,
        )
        return (above_BTS | (tied_BTS & (place_S <= last_BT1))) & allowed_BTS


def ordered_bits(x: Array) -> Array:
    """float32 as uint32 in the same order (NaN apart)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def bisect_bits(holds: Callable[[Array], Array], shape: tuple[int, ...], bits: int) -> Array:
    """The largest uint32 of `bits` bits for which `holds`, element by element, settled bit by bit.
    `holds` is true of 0, and never again once false.
    """

    def settle(step, found):
        bound = found | (jnp.uint32(1) << (bits - 1 - step).astype(jnp.uint32))
        return jnp.where(holds(bound), bound, found)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros(shape, jnp.uint32))


def indexer_kl(target_BTS: Array, scores_BTS: Array, among_BTS: Array) -> Array:
    """KL(target || softmax of the scores over `among`), a value per query (arXiv 2512.02556, eq. 3
    dense and eq. 4 sparse).

    Args:
      target_BTS: the main attention's probabilities, mean over heads: L1-normalised over `among`.
      scores_BTS: the indexer's scores.
      among_BTS: the keys compared: all allowed ones in the dense warm-up, the selected ones in the
        sparse stage.

    Returns:
      kl_BT float32, 0 where `among` is empty. The gradient reaches the scores alone.
    """
    with jax.named_scope("indexer_kl"):
        target_BTS = jax.lax.stop_gradient(target_BTS)
        log_predicted_BTS = jax.nn.log_softmax(jnp.where(among_BTS, scores_BTS, MASKED), axis=-1)
        log_target_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1.0))
        return jnp.sum(
            jnp.where(among_BTS, target_BTS * (log_target_BTS - log_predicted_BTS), 0.0), axis=-1
        )


WEIGHT_BITS = 30  # of a float32 up to 1, without its sign: from the largest down to 0


def top_p_keys(scores_BS: Array, among_BS: Array, top_p: float) -> Array:
    """Of the keys in `among` the fewest whose softmax weights add up to `mass` of theirs all. Of
    equal weights the earlier key goes first. No gradient.

    Args:
      scores_BS: float32 logits, of any leading axes.
      mass: in (0, 1]; at 1 all are kept.

    Returns: bool, no key outside `among`. A row that has any keeps at least one.
    """
    if top_p == 1:
        return among_BS
    with jax.named_scope("keep_mass"):
        scores_BS = jnp.where(among_BS, jax.lax.stop_gradient(scores_BS), MASKED)
        weight_BS = jnp.where(
            among_BS, jnp.exp(scores_BS - jnp.max(scores_BS, axis=-1, keepdims=True)), 0.0
        )
        rank_BS = jax.lax.bitcast_convert_type(
            weight_BS, jnp.uint32
        )  # of floats that are not negative the bits are in order

        def weigh(chosen_BS: Array) -> Array:
            return jnp.sum(jnp.where(chosen_BS, weight_BS, 0.0), axis=-1, keepdims=True)

        wanted_B1 = top_p * weigh(among_BS)
        level_B1 = bisect_bits(
            lambda bound_B1: weigh(rank_BS >= bound_B1) >= wanted_B1,
            wanted_B1.shape,
            bits=WEIGHT_BITS,
        )
        tied_BS = (rank_BS == level_B1) & among_BS
        each_B1 = jax.lax.bitcast_convert_type(level_B1, jnp.float32)
        ties_B1 = jnp.maximum(jnp.ceil((wanted_B1 - weigh(rank_BS > level_B1)) / each_B1), 1.0)
        return among_BS & (
            (rank_BS > level_B1) | (tied_BS & (jnp.cumsum(tied_BS, axis=-1) <= ties_B1))
        )
