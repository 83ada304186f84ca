"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1) with a gated output (arXiv
2505.06708) and sparse selection (arXiv 2512.02556).

    c_q = norm(W_qa h)                 the query latent
    q   = W_qb c_q                     per head: a part without position, and a rotated part
    c   = norm(W_kva h)                the key-value latent: what the cache holds
    k_r = rope(W_kr h)                 one rotated key for all heads: the cache holds it too
    [k; v] = W_kvb c                   per head
    out = W_o (sigmoid(W_g h) * attention(q, [k; k_r], v))

The expanded form computes k and v; the absorbed form moves W_kvb to the query and the output, and
attends over c itself.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.decode import attend_latent
from model.attention.reference import IndexerInputs, IndexerStats
from model.attention.table import expanded_form
from model.cache import LatentCache
from model.config import ModelConfig
from model.layers.gate import gate_weight, gated
from model.layers.indexer import Indexer
from model.layers.linear import linear
from model.layers.norm import RMSNorm
from model.layers.rope import rope_angles, rotate
from model.sharding import constrain, named


class LatentAttention(nn.Module):
    """Parameters of MLA and its two forms."""

    config: ModelConfig

    def setup(self):
        c, a = self.config, self.config.mla
        init = nn.initializers.normal(c.initializer_range)

        def weight(name, shape, axes):
            return self.param(name, named(init, axes), shape, jnp.float32)

        if a.q_lora_rank:
            self.query_down = weight(
                "query_down", (c.hidden_size, a.q_lora_rank), ("width", "query_rank")
            )
            self.query_norm = RMSNorm(a.norm_eps, c.norm, axis="query_rank")
        source, axis = (a.q_lora_rank, "query_rank") if a.q_lora_rank else (c.hidden_size, "width")
        self.query_up = weight(
            "query_up",
            (source, a.num_attention_heads, a.qk_head_dim),
            (axis, "heads", "head_width"),
        )
        self.latent_down = weight(
            "latent_down",
            (c.hidden_size, a.kv_lora_rank + a.qk_rope_head_dim),
            ("width", "latent_rank"),
        )
        self.latent_norm = RMSNorm(a.norm_eps, c.norm, axis="latent_rank")
        self.key_up = weight(
            "key_up",
            (a.kv_lora_rank, a.num_attention_heads, a.qk_nope_head_dim),
            ("latent_rank", "heads", "head_width"),
        )
        self.value_up = weight(
            "value_up",
            (a.kv_lora_rank, a.num_attention_heads, a.v_head_dim),
            ("latent_rank", "heads", "head_width"),
        )
        self.out = weight(
            "out",
            (a.num_attention_heads, a.v_head_dim, c.hidden_size),
            ("heads", "head_width", "width"),
        )
        self.gate = gate_weight(self, c, a.gate, a.num_attention_heads, a.v_head_dim)
        if c.indexer.n_heads:
            self.indexer = Indexer(c)

    def __call__(
        self,
        hidden_BTD: Array,
        positions_BT: Array,
        segments_BT: Array,
        stage: str,
        past: LatentCache | None = None,
        allowed_BTS: Array | None = None,
        at: Array | None = None,
    ) -> tuple[Array, IndexerStats, LatentCache]:
        """Attends and projects back to the width.

        Without `past`: over the sequence itself, expanded form; returns its cache entries [B, T,
        ...].
        With `past`: the tokens are written to its slots from `at` on and attend to the slots in
        `allowed_BTS`, absorbed form; returns the cache with them.
        """
        a, dtype = self.config.mla, hidden_BTD.dtype
        rope = self.config.rope
        angles_BTP = rope_angles(positions_BT, a.qk_rope_head_dim, rope)
        with jax.named_scope("projections"):
            query_latent_BTR = (
                self.query_norm(linear(hidden_BTD, self.query_down))
                if a.q_lora_rank
                else hidden_BTD
            )
            q_BTNH = linear(query_latent_BTR, self.query_up) * jnp.asarray(
                a.qk_head_dim**-0.5 * a.logit_scale, dtype
            )
            q_BTNH = constrain(q_BTNH, "batch", "time", "heads", None)
            q_nope_BTNH, q_rope_BTNP = (
                q_BTNH[..., : a.qk_nope_head_dim],
                rotate(
                    q_BTNH[..., a.qk_nope_head_dim :],
                    angles_BTP,
                    rope,
                    interleaved=rope.rope_interleave,
                ),
            )
            down_BTR = linear(hidden_BTD, self.latent_down)
            latent_BTR = self.latent_norm(down_BTR[..., : a.kv_lora_rank])
            k_rope_BTP = rotate(
                down_BTR[..., None, a.kv_lora_rank :],
                angles_BTP,
                rope,
                interleaved=rope.rope_interleave,
            )[:, :, 0]
        query = index_key_BTC = None
        if self.config.indexer.n_heads and (
            stage != "dense" or past is None or past.index_key_BSC.shape[-1]
        ):
            query, index_key_BTC = self.indexer(hidden_BTD, query_latent_BTR, positions_BT)
        no_key = jnp.zeros((*latent_BTR.shape[:2], 0), dtype)
        entries = LatentCache(
            jnp.concatenate([latent_BTR, k_rope_BTP], axis=-1),
            no_key if index_key_BTC is None else index_key_BTC,
        )

        if past is None:
            indexer = None if query is None else IndexerInputs(query, index_key_BTC)
            out_BTNV, report = self.expanded(
                q_nope_BTNH, q_rope_BTNP, latent_BTR, k_rope_BTP, segments_BT, indexer, stage
            )
        else:
            entries, report = past.write(entries, at), IndexerStats.zero()
            out_BTNV = self.absorbed(
                q_nope_BTNH, q_rope_BTNP, entries, allowed_BTS, query if stage == "sparse" else None
            )
        out_BTNV = gated(out_BTNV, hidden_BTD, self.gate)
        with jax.named_scope("output_projection"):
            return linear(out_BTNV, self.out, axes=2), report, entries

    def expanded(
        self, q_nope_BTNH, q_rope_BTNP, latent_BSR, k_rope_BSP, segments_BT, indexer, stage
    ) -> tuple[Array, IndexerStats]:
        N = self.config.mla.num_attention_heads
        with jax.named_scope("expand"):
            k_nope_BSNH = linear(latent_BSR, self.key_up)
            k_rope_BSNP = jnp.broadcast_to(
                k_rope_BSP[:, :, None], (*k_rope_BSP.shape[:2], N, k_rope_BSP.shape[-1])
            )
            k_BSNH = constrain(
                jnp.concatenate([k_nope_BSNH, k_rope_BSNP], axis=-1), "batch", "time", "heads", None
            )
            v_BSNV = constrain(linear(latent_BSR, self.value_up), "batch", "time", "heads", None)
        q_BTNH = jnp.concatenate([q_nope_BTNH, q_rope_BTNP], axis=-1)
        attend, record = (
            expanded_form(self.config, q_BTNH.shape[1]),
            self.is_mutable_collection("record"),
        )
        out_BTNV, report, selected_BTk = attend(
            q_BTNH,
            k_BSNH,
            v_BSNV,
            segments_BT,
            indexer,
            stage=stage,
            topk=self.config.indexer.topk,
            record=record,
        )
        if selected_BTk is not None:
            self.sow("record", "selected", selected_BTk)
        return out_BTNV, report

    def absorbed(self, q_nope_BTNH, q_rope_BTNP, cache: LatentCache, allowed_BTS, query) -> Array:
        dtype, a = q_nope_BTNH.dtype, self.config.mla
        with jax.named_scope("absorb"):
            q_latent_BTNR = jnp.einsum("BTNH,RNH->BTNR", q_nope_BTNH, self.key_up.astype(dtype))
            q_BTNR = jnp.concatenate([q_latent_BTNR, q_rope_BTNP], axis=-1)
        indexer = None if query is None else IndexerInputs(query, cache.index_key_BSC)
        options = {
            "topk": self.config.indexer.topk,
            "mass": cache.attention_top_p,
            "estimate": cache.estimate,
        }
        mixed_BTNR = attend_latent(
            q_BTNR, cache.latent_BSR, a.kv_lora_rank, allowed_BTS, indexer, **options
        )
        return jnp.einsum("BTNR,RNV->BTNV", mixed_BTNR, self.value_up.astype(dtype))
