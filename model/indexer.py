"""The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1): which keys a query shall attend to, and the loss that teaches it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.linear import linear
from model.norm import LayerNorm
from model.rope import rope_angles, rotate
from model.sharding import named

MASKED = -1e30  # finite, so that a row without any key gives no NaN


class IndexerQuery(NamedTuple):
    """What a query brings: heads' queries [B, T, I, C] and their weights [B, T, I], already scaled by (I * C) ** -0.5."""

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


def ranked(scores_BTS: Array, allowed_BTS: Array) -> Array:
    """Scores as `top_k` shall see them: -inf where not allowed, and one zero only, since it puts -0 (a negative weight times relu's 0) below 0. No gradient."""
    scores_BTS = jax.lax.stop_gradient(scores_BTS)
    return jnp.where(allowed_BTS, jnp.where(scores_BTS == 0, 0.0, scores_BTS), -jnp.inf)


def select_topk(scores_BTS: Array, allowed_BTS: Array, topk: int) -> Array:
    """The min(topk, allowed) best-scored allowed keys of each query, as a mask. Of equal scores the earlier key goes first. No gradient.

    The threshold is found by counting, one bit a pass: no sort, which `jax.lax.top_k` is on GPU and TPU.
    """
    with jax.named_scope("select_topk"):
        if topk >= scores_BTS.shape[-1]:
            return allowed_BTS
        rank_BTS = ordered_bits(ranked(scores_BTS, allowed_BTS))
        threshold_BT1 = largest_with(lambda bound: jnp.sum(rank_BTS >= bound, axis=-1, keepdims=True) >= topk, rank_BTS.shape[:-1] + (1,), bits=32)
        above_BTS, tied_BTS = rank_BTS > threshold_BT1, rank_BTS == threshold_BT1
        wanted_BT1 = topk - jnp.sum(above_BTS, axis=-1, keepdims=True)
        place_S = jnp.arange(scores_BTS.shape[-1], dtype=jnp.uint32)
        bits = int(scores_BTS.shape[-1] - 1).bit_length()
        # The last tied key that is wanted stands at the largest place with fewer than the wanted ones before it.
        last_BT1 = largest_with(lambda bound: jnp.sum(tied_BTS & (place_S < bound), axis=-1, keepdims=True) < wanted_BT1, threshold_BT1.shape, bits)
        return (above_BTS | (tied_BTS & (place_S <= last_BT1))) & allowed_BTS


def ordered_bits(x: Array) -> Array:
    """float32 as uint32 in the same order (NaN apart)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def largest_with(holds: Callable[[Array], Array], shape: tuple[int, ...], bits: int) -> Array:
    """The largest uint32 of `bits` bits for which `holds`, element by element, settled bit by bit. `holds` is true of 0, and never again once false."""

    def settle(step, found):
        bound = found | (jnp.uint32(1) << (bits - 1 - step).astype(jnp.uint32))
        return jnp.where(holds(bound), bound, found)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros(shape, jnp.uint32))


def indexer_kl(target_BTS: Array, scores_BTS: Array, among_BTS: Array) -> Array:
    """KL(target || softmax of the scores over `among`), a value per query (arXiv 2512.02556, eq. 3 dense and eq. 4 sparse).

    Args:
      target_BTS: the main attention's probabilities, mean over heads: L1-normalised over `among`.
      scores_BTS: the indexer's scores.
      among_BTS: the keys compared: all allowed ones in the dense warm-up, the selected ones in the sparse stage.

    Returns:
      kl_BT float32, 0 where `among` is empty. The gradient reaches the scores alone.
    """
    with jax.named_scope("indexer_kl"):
        target_BTS = jax.lax.stop_gradient(target_BTS)
        log_predicted_BTS = jax.nn.log_softmax(jnp.where(among_BTS, scores_BTS, MASKED), axis=-1)
        log_target_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1.0))
        return jnp.sum(jnp.where(among_BTS, target_BTS * (log_target_BTS - log_predicted_BTS), 0.0), axis=-1)


class Indexer(nn.Module):
    """Parameters of the indexer. Its inputs are detached here, so that its loss cannot reach the trunk."""

    config: ModelConfig

    def setup(self):
        c, i = self.config, self.config.indexer
        source, axis = (c.attention.query_rank, "query_rank") if c.attention.query_rank else (c.width, "width")
        init = nn.initializers.normal(c.init_std)
        self.query = self.param("query", named(init, (axis, "replicated", "head_width")), (source, i.heads, i.width), jnp.float32)
        self.key = self.param("key", named(init, ("width", "head_width")), (c.width, i.width), jnp.float32)
        self.head_weight = self.param("head_weight", named(init, ("width", "replicated")), (c.width, i.heads), jnp.float32)
        self.key_norm = LayerNorm(i.norm_eps, axis="head_width")

    def __call__(self, hidden_BTD: Array, query_latent_BTR: Array, positions_BT: Array) -> tuple[IndexerQuery, Array]:
        """Returns the queries and the keys [B, T, C] of these tokens. `query_latent` is the hidden state itself in a model without query latents."""
        i = self.config.indexer
        hidden_BTD, query_latent_BTR = jax.lax.stop_gradient((hidden_BTD, query_latent_BTR))
        rope = self.config.rope
        angles_BTP = rope_angles(positions_BT, i.rope_width, rope)
        turn = functools.partial(rotate, angles_BTP=angles_BTP, rope=rope, interleaved=rope.indexer_interleaved)

        with jax.named_scope("indexer_projections"):
            q_BTIC = turn(linear(query_latent_BTR, self.query))
            k_BTC = turn(self.key_norm(linear(hidden_BTD, self.key))[:, :, None])[:, :, 0]
            w_BTI = linear(hidden_BTD, self.head_weight).astype(jnp.float32) * (i.heads * i.width) ** -0.5
        return IndexerQuery(q_BTIC, w_BTI), k_BTC
