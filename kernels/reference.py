"""The equations of the lightning indexer in plain JAX: scores, selection of keys, KL loss.

The indexer is DeepSeek-V3.2's (arXiv 2512.02556); top-p selection of keys is Twilight's (arXiv
2502.02770).
The model calls these where no kernel pays off; every kernel is tested against them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # a masked logit: finite, so that a row without any key gives no NaN
# The low bits of a float32, all that one in [0, 1] has set: not the sign, nor the exponent's first.
WEIGHT_BITS = 30


class IndexerQuery(NamedTuple):
    """An indexer's queries and the weights of its heads, for each token.

    Attributes:
      q_BTIC: the queries of the I indexer heads, each C wide.
      w_BTI: the heads' weights, already scaled by (I * C) ** -0.5.
    """

    q_BTIC: Array
    w_BTI: Array


def indexer_scores(q_BTIC: Array, k_BSC: Array, w_BTI: Array) -> Array:
    """Scores how much each query wants each key (arXiv 2512.02556, eq. 1).

        I[t, s] = sum_i  w[t, i] * relu(q[t, i] . k[s])

    Args:
      q_BTIC: queries of the I indexer heads, each C wide.
      k_BSC: one key per token, shared by all heads.
      w_BTI: the heads' weights, already scaled by (I * C) ** -0.5.

    Returns: scores_BTS, float32. Not causal: the caller masks.
    """
    with jax.named_scope("indexer_scores"):
        dot_BITS = jnp.einsum("BTIC,BSC->BITS", q_BTIC, k_BSC, preferred_element_type=jnp.float32)
        return jnp.einsum("BTI,BITS->BTS", w_BTI.astype(jnp.float32), jax.nn.relu(dot_BITS))


def masked_scores(scores_BTS: Array, allowed_BTS: Array) -> Array:
    """Prepares scores for `top_k`: -inf where a key is not allowed, and one zero only.

    A negative weight times relu's 0 is -0, which `top_k` puts below 0. No gradient.
    """
    scores_BTS = jax.lax.stop_gradient(scores_BTS)
    return jnp.where(allowed_BTS, jnp.where(scores_BTS == 0, 0.0, scores_BTS), -jnp.inf)


def select_topk(scores_BTS: Array, allowed_BTS: Array, topk: int) -> Array:
    """Selects the best-scored allowed keys of each query (arXiv 2512.02556, eq. 2).

    The threshold is found by counting, one bit a pass, without the sort that `jax.lax.top_k` is on
    GPU and TPU. Of equal scores the earlier key goes first. No gradient.

    Args:
      scores_BTS: the indexer's scores.
      allowed_BTS: bool, the keys that a query may attend to.
      topk: how many keys to select.

    Returns: bool [B, T, S], min(topk, allowed) keys a query.
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
        position_S = jnp.arange(scores_BTS.shape[-1], dtype=jnp.uint32)
        # The last tied key to be selected stands at the largest position that has fewer tied keys
        # before it than are wanted.
        last_BT1 = bisect_bits(
            lambda bound: (
                jnp.sum(tied_BTS & (position_S < bound), axis=-1, keepdims=True) < wanted_BT1
            ),
            threshold_BT1.shape,
            bits=int(scores_BTS.shape[-1] - 1).bit_length(),
        )
        return (above_BTS | (tied_BTS & (position_S <= last_BT1))) & allowed_BTS


def ordered_bits(x: Array) -> Array:
    """Maps float32 to uint32 in the same order (NaN apart)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def bisect_bits(condition: Callable[[Array], Array], shape: tuple[int, ...], bits: int) -> Array:
    """Finds, element by element, the largest uint32 that meets a condition, bit by bit.

    Args:
      condition: bounds of `shape` -> bool. True for 0, and once false never true again.
      shape: the shape of the result.
      bits: how many bits the result may have.
    """

    def settle(step, found):
        bound = found | (jnp.uint32(1) << (bits - 1 - step).astype(jnp.uint32))
        return jnp.where(condition(bound), bound, found)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros(shape, jnp.uint32))


def indexer_kl(target_BTS: Array, scores_BTS: Array, allowed_BTS: Array) -> Array:
    """Computes the indexer's KL loss of each query (arXiv 2512.02556, eq. 3 dense, eq. 4 sparse).

        KL(p[t] || softmax(I[t]))  =  sum_s  p[t, s] (log p[t, s] - log softmax(I[t])[s])

    Args:
      target_BTS: p, the main attention's probabilities, mean over heads. Each head's sum to 1 over
        `allowed_BTS`, so this is the paper's sum over heads divided by its L1 norm.
      scores_BTS: I, the indexer's scores.
      allowed_BTS: bool, the keys that p and the softmax range over, those that the main attention
        may attend to: all earlier ones in the dense warm-up stage (eq. 3), the selected ones in the
        sparse stage (eq. 4).

    Returns: kl_BT float32 in nats, 0 for a query without keys. The gradient reaches the scores
      alone.
    """
    with jax.named_scope("indexer_kl"):
        target_BTS = jax.lax.stop_gradient(target_BTS)
        log_predicted_BTS = jax.nn.log_softmax(jnp.where(allowed_BTS, scores_BTS, MASKED), axis=-1)
        log_target_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1.0))
        return jnp.sum(
            jnp.where(allowed_BTS, target_BTS * (log_target_BTS - log_predicted_BTS), 0.0), axis=-1
        )


def top_p_keys(scores_BS: Array, allowed_BS: Array, top_p: float) -> Array:
    """Keeps the fewest keys whose softmax weights reach a share (Twilight, arXiv 2502.02770).

    The weight of the last key kept is found bit by bit, without a sort. Of equal weights the
    earlier key goes first. No gradient.

    Args:
      scores_BS: float32 logits, of any leading axes.
      allowed_BS: bool, the keys that the softmax ranges over.
      top_p: the share of the softmax to keep, in (0, 1]; at 1 all keys are kept.

    Returns: bool [B, S], no key outside `allowed_BS`. A row that has any key keeps at least one.
    """
    if top_p == 1:
        return allowed_BS
    with jax.named_scope("top_p_keys"):
        scores_BS = jnp.where(allowed_BS, jax.lax.stop_gradient(scores_BS), MASKED)
        weight_BS = jnp.where(
            allowed_BS, jnp.exp(scores_BS - jnp.max(scores_BS, axis=-1, keepdims=True)), 0.0
        )
        # The bits of floats that are not negative are in the floats' order.
        rank_BS = jax.lax.bitcast_convert_type(weight_BS, jnp.uint32)

        def total_weight(keys_BS: Array) -> Array:
            return jnp.sum(jnp.where(keys_BS, weight_BS, 0.0), axis=-1, keepdims=True)

        wanted_B1 = top_p * total_weight(allowed_BS)
        level_B1 = bisect_bits(
            lambda bound_B1: total_weight(rank_BS >= bound_B1) >= wanted_B1,
            wanted_B1.shape,
            bits=WEIGHT_BITS,
        )
        # All keys above the level are kept, and of those tied at it as many as are still needed.
        tied_BS = (rank_BS == level_B1) & allowed_BS
        tied_weight_B1 = jax.lax.bitcast_convert_type(level_B1, jnp.float32)
        missing_B1 = wanted_B1 - total_weight(rank_BS > level_B1)
        kept_ties_B1 = jnp.maximum(jnp.ceil(missing_B1 / tied_weight_B1), 1.0)
        return allowed_BS & (
            (rank_BS > level_B1) | (tied_BS & (jnp.cumsum(tied_BS, axis=-1) <= kept_ties_B1))
        )
