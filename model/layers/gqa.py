"""Grouped-query attention (arXiv 2305.13245) as Qwen3 has it (arXiv 2505.09388, section 2).

Queries and keys are normalised and rotated over a part of their width; Qwen3-Next gates the output
(arXiv 2505.06708).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.caches import KeyValueCache
from model.attention.decode import attend_cached
from model.attention.reference import IndexerStats
from model.attention.table import sequence_form
from model.config import ModelConfig
from model.layers.gate import gate_weight, gated
from model.layers.linear import linear
from model.layers.norm import RMSNorm
from model.layers.parameter import parameter
from model.layers.rope import rope_angles, rotate
from model.segments import TokenInfo
from model.sharding import constrain


class GroupedAttention(nn.Module):
    """Attention with K key-value heads, each for N / K query heads side by side."""

    config: ModelConfig

    def setup(self):
        """Declares the parameters."""
        c, g = self.config, self.config.gqa
        D, N, K, H = c.hidden_size, g.num_attention_heads, g.num_key_value_heads, g.head_dim
        weight = functools.partial(
            parameter, self, init=nn.initializers.normal(c.initializer_range)
        )
        axes = ("embed", "heads", "head_dim")
        self.query = weight("query", shape=(D, N, H), axes=axes)
        self.key = weight("key", shape=(D, K, H), axes=axes)
        self.value = weight("value", shape=(D, K, H), axes=axes)
        self.out = weight("out", shape=(N, H, D), axes=("heads", "head_dim", "embed"), input_axes=2)
        self.gate = gate_weight(self, c, g.gate, N, H)
        if g.qk_norm:
            self.query_norm = RMSNorm(c.rms_norm_eps, c.norm, axis="head_dim")
            self.key_norm = RMSNorm(c.rms_norm_eps, c.norm, axis="head_dim")

    def __call__(
        self, hidden_BTD: Array, tokens: TokenInfo, past: KeyValueCache | None = None
    ) -> tuple[Array, IndexerStats, KeyValueCache]:
        """Attends to every key in every stage: there is no indexer.

        See `LatentAttention.__call__` for the arguments and what is returned.
        """
        c, g = self.config, self.config.gqa
        turn = functools.partial(
            rotate,
            angles_BTP=rope_angles(tokens.positions_BT, g.rotary_dim, c.rope),
            rope=c.rope,
            interleaved=False,
        )
        with jax.named_scope("projections"):
            q_BTNH, k_BTKH, v_BTKH = (
                linear(hidden_BTD, weight) for weight in (self.query, self.key, self.value)
            )
            if g.qk_norm:
                q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
            q_BTNH = turn(q_BTNH) * jnp.asarray(g.head_dim**-0.5, q_BTNH.dtype)
            q_BTNH = constrain(q_BTNH, "batch", "time", "heads", None)
            entries = KeyValueCache(turn(k_BTKH), v_BTKH)
        if past is None:
            attend = sequence_form(c, q_BTNH.shape[1])
            # Without an indexer every stage is dense, and topk means nothing.
            out_BTNH, _, _ = attend(
                q_BTNH,
                entries.k_BSKH,
                entries.v_BSKH,
                tokens.segments_BT,
                None,
                stage="dense",
                topk=1,
            )
        else:
            assert tokens.allowed_BTS is not None and tokens.index_BT is not None
            entries = past.write(entries, tokens.index_BT)
            out_BTNH = attend_cached(q_BTNH, entries, tokens.allowed_BTS)
        out_BTNH = gated(out_BTNH, hidden_BTD, self.gate)
        with jax.named_scope("output_projection"):
            return linear(out_BTNH, self.out, axes=2), IndexerStats.zero(), entries
