"""Grouped-query attention (arXiv 2305.13245) as Qwen3 has it (arXiv 2505.09388, section 2):
normalised queries and keys, rotated over a part of their width, and with Qwen3-Next's gated output
(arXiv 2505.06708).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.decode import attend_cached
from model.attention.reference import IndexerStats
from model.attention.table import expanded_form
from model.cache import KeyValueCache
from model.config import ModelConfig
from model.layers.gate import gate_weight, gated
from model.layers.linear import linear
from model.layers.norm import RMSNorm
from model.layers.rope import rope_angles, rotate
from model.sharding import constrain, named


class GroupedAttention(nn.Module):
    """K key-value heads, each for N / K query heads side by side."""

    config: ModelConfig

    def setup(self):
        c, g = self.config, self.config.gqa
        init = nn.initializers.normal(c.initializer_range)

        def weight(name, heads, axis):
            return self.param(
                name,
                named(init, ("width", axis, "head_width")),
                (c.hidden_size, heads, g.head_dim),
                jnp.float32,
            )

        self.query = weight("query", g.num_attention_heads, "heads")
        self.key = weight("key", g.num_key_value_heads, "heads")
        self.value = weight("value", g.num_key_value_heads, "heads")
        self.out = self.param(
            "out",
            named(init, ("heads", "head_width", "width")),
            (g.num_attention_heads, g.head_dim, c.hidden_size),
            jnp.float32,
        )
        self.gate = gate_weight(self, c, g.gate, g.num_attention_heads, g.head_dim)
        if g.qk_norm:
            self.query_norm = RMSNorm(c.rms_norm_eps, c.norm, axis="head_width")
            self.key_norm = RMSNorm(c.rms_norm_eps, c.norm, axis="head_width")

    def __call__(
        self,
        hidden_BTD: Array,
        positions_BT: Array,
        segments_BT: Array,
        stage: str,
        past: KeyValueCache | None = None,
        allowed_BTS: Array | None = None,
        at: Array | None = None,
    ) -> tuple[Array, IndexerStats, KeyValueCache]:
        """As LatentAttention's. There is no indexer: it attends to every key in every stage."""
        c, g = self.config, self.config.gqa
        angles_BTP = rope_angles(positions_BT, g.rotary_dim, c.rope)
        with jax.named_scope("projections"):
            q_BTNH, k_BTKH, v_BTKH = (
                linear(hidden_BTD, weight) for weight in (self.query, self.key, self.value)
            )
            if g.qk_norm:
                q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
            q_BTNH = rotate(q_BTNH, angles_BTP, c.rope, interleaved=False) * jnp.asarray(
                g.head_dim**-0.5, q_BTNH.dtype
            )
            q_BTNH = constrain(q_BTNH, "batch", "time", "heads", None)
            entries = KeyValueCache(rotate(k_BTKH, angles_BTP, c.rope, interleaved=False), v_BTKH)
        if past is None:
            attend = expanded_form(c, q_BTNH.shape[1])
            out_BTNH, _, _ = attend(
                q_BTNH, entries.k_BSKH, entries.v_BSKH, segments_BT, None, stage="dense", topk=1
            )
        else:
            entries = past.write(entries, at)
            out_BTNH = attend_cached(
                q_BTNH,
                entries.k_BSKH,
                entries.v_BSKH,
                allowed_BTS,
                top_p=entries.attention_top_p,
                estimate=entries.estimate,
            )
        out_BTNH = gated(out_BTNH, hidden_BTD, self.gate)
        with jax.named_scope("output_projection"):
            return linear(out_BTNH, self.out, axes=2), IndexerStats.zero(), entries
