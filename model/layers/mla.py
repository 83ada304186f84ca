"""Multi-head latent attention (arXiv 2412.19437, section 2.1.1).

With a gated output (arXiv 2505.06708) and sparse selection (arXiv 2512.02556):

    c_q = norm(W_qa h)                 the query latent
    q   = W_qb c_q                     per head: a part without position, and a rotated part
    c   = norm(W_kva h)                the key-value latent: the cache keeps it
    k_r = rope(W_kr h)                 one rotated key for all heads: the cache keeps it too
    [k; v] = W_kvb c                   per head
    out = W_o (sigmoid(W_g h) * attention(q, [k; k_r], v))

The expanded form computes k and v; the absorbed form moves W_kvb to the query and the output, and
attends over c itself.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kernels.reference import IndexerQuery
from model.attention.caches import LatentCache
from model.attention.reference import IndexerInputs, IndexerStats
from model.attention.selected import attend_selected
from model.attention.table import gathers_latents, latent_form, sequence_form
from model.config import ModelConfig
from model.layers.gate import gate_weight, gated
from model.layers.indexer import Indexer
from model.layers.linear import linear
from model.layers.norm import RMSNorm
from model.layers.parameter import parameter, replayed
from model.layers.rope import rope_angles, rotate
from model.segments import TokenInfo
from model.sharding import constrain


class Projections(NamedTuple):
    """Holds the queries and latents that MLA computes of some tokens.

    query_latent_BTR: the query latent, or the hidden state itself in a model without.
    q_nope_BTNH, q_rope_BTNH: each head's query, scaled: the part without position, the rotated one.
    latent_BTR: the normalised key-value latent.
    k_rope_BTH: the rotated key that all heads share.
    """

    query_latent_BTR: Array
    q_nope_BTNH: Array
    q_rope_BTNH: Array
    latent_BTR: Array
    k_rope_BTH: Array


class LatentAttention(nn.Module):
    """The parameters of MLA and its two forms."""

    config: ModelConfig

    def setup(self):
        """Declares the parameters."""
        c, a = self.config, self.config.mla
        D, N, rank = c.hidden_size, a.num_attention_heads, a.kv_lora_rank
        weight = functools.partial(
            parameter, self, init=nn.initializers.normal(c.initializer_range)
        )
        if a.q_lora_rank:
            self.query_down = weight(
                "query_down", shape=(D, a.q_lora_rank), axes=("embed", "query_rank")
            )
            self.query_norm = RMSNorm(a.norm_eps, c.norm, axis="query_rank")
        source, axis = (a.q_lora_rank, "query_rank") if a.q_lora_rank else (D, "embed")
        self.query_up = weight(
            "query_up", shape=(source, N, a.qk_head_dim), axes=(axis, "heads", "head_dim")
        )
        self.latent_down = weight(
            "latent_down", shape=(D, rank + a.qk_rope_head_dim), axes=("embed", "latent_rank")
        )
        self.latent_norm = RMSNorm(a.norm_eps, c.norm, axis="latent_rank")
        up_axes = ("latent_rank", "heads", "head_dim")
        self.key_up = weight("key_up", shape=(rank, N, a.qk_nope_head_dim), axes=up_axes)
        self.value_up = weight("value_up", shape=(rank, N, a.v_head_dim), axes=up_axes)
        self.out = weight(
            "out", shape=(N, a.v_head_dim, D), axes=("heads", "head_dim", "embed"), input_axes=2
        )
        self.gate = gate_weight(self, c, a.gate, N, a.v_head_dim)
        if c.indexer.n_heads:
            self.indexer = Indexer(c)

    def __call__(
        self, hidden_BTD: Array, tokens: TokenInfo, past: LatentCache | None = None
    ) -> tuple[Array, IndexerStats, LatentCache]:
        """Attends and projects back to hidden_size.

        Args:
          hidden_BTD: the normalised hidden states.
          tokens: what is known about them.
          past: without it, tokens attend to their own sequence, in the expanded form. With it, they
            are written to it at `tokens.index_BT` and attend to the places in `tokens.allowed_BTS`,
            in the absorbed form.

        Returns: the output [B, T, D]; what the indexer did; the tokens' cache entries [B, T, ...],
        or with `past` the whole cache with them.
        """
        projected = self.project(hidden_BTD, tokens.positions_BT)
        index_query = None
        index_key_BTC = jnp.zeros((*projected.latent_BTR.shape[:2], 0), hidden_BTD.dtype)
        if self.config.indexer.n_heads:
            index_query, index_key_BTC = self.indexer(
                hidden_BTD, projected.query_latent_BTR, tokens.positions_BT
            )
        entries = LatentCache(
            jnp.concatenate([projected.latent_BTR, projected.k_rope_BTH], axis=-1), index_key_BTC
        )
        if past is None:
            given_BTk = replayed(self, "selected") if tokens.stage == "sparse" else None
            indexer = (
                None
                if index_query is None
                else IndexerInputs(index_query, index_key_BTC, given_BTk)
            )
            length = hidden_BTD.shape[1]
            if indexer is not None and gathers_latents(self.config, tokens.stage, length):
                attended = self.selected(projected, entries, tokens, indexer)
            else:
                attended = self.expanded(projected, tokens, indexer)
            out_BTNV, stats, selected_BTk = attended
        else:
            assert tokens.allowed_BTS is not None and tokens.index_BT is not None
            entries, stats = past.write(entries, tokens.index_BT), IndexerStats.zero()
            out_BTNV, selected_BTk = self.absorbed(
                projected,
                entries,
                tokens.allowed_BTS,
                index_query if tokens.stage == "sparse" else None,
            )
        if selected_BTk is not None:
            self.sow("record", "selected", selected_BTk)
        out_BTNV = gated(out_BTNV, hidden_BTD, self.gate)
        with jax.named_scope("output_projection"):
            return linear(out_BTNV, self.out, axes=2), stats, entries

    def project(self, hidden_BTD: Array, positions_BT: Array) -> Projections:
        """Projects hidden states to queries, latents and rotated keys."""
        a, rope = self.config.mla, self.config.rope
        turn = functools.partial(
            rotate,
            angles_BTP=rope_angles(positions_BT, a.qk_rope_head_dim, rope),
            rope=rope,
            interleaved=rope.rope_interleave,
        )
        with jax.named_scope("projections"):
            query_latent_BTR = (
                self.query_norm(linear(hidden_BTD, self.query_down))
                if a.q_lora_rank
                else hidden_BTD
            )
            q_BTNH = linear(query_latent_BTR, self.query_up) * jnp.asarray(
                a.qk_head_dim**-0.5 * a.logit_scale, hidden_BTD.dtype
            )
            q_BTNH = constrain(q_BTNH, "batch", "time", "heads", None)
            q_nope_BTNH, q_rope_BTNH = (
                q_BTNH[..., : a.qk_nope_head_dim],
                turn(q_BTNH[..., a.qk_nope_head_dim :]),
            )
            down_BTR = linear(hidden_BTD, self.latent_down)
            latent_BTR = self.latent_norm(down_BTR[..., : a.kv_lora_rank])
            k_rope_BTH = turn(down_BTR[..., None, a.kv_lora_rank :])[:, :, 0]
        return Projections(query_latent_BTR, q_nope_BTNH, q_rope_BTNH, latent_BTR, k_rope_BTH)

    def expanded(
        self, projected: Projections, tokens: TokenInfo, indexer: IndexerInputs | None
    ) -> tuple[Array, IndexerStats, Array | None]:
        """Attends over keys and values of each head, made from the latents: a whole sequence.

        Returns out_BTNV, what the indexer did, and where "record" is mutable the selected keys.
        """
        N, k_rope_BSH = self.config.mla.num_attention_heads, projected.k_rope_BTH
        with jax.named_scope("expand"):
            k_nope_BSNH = linear(projected.latent_BTR, self.key_up)
            k_rope_BSNH = jnp.broadcast_to(
                k_rope_BSH[:, :, None], (*k_rope_BSH.shape[:2], N, k_rope_BSH.shape[-1])
            )
            k_BSNH = constrain(
                jnp.concatenate([k_nope_BSNH, k_rope_BSNH], axis=-1), "batch", "time", "heads", None
            )
            v_BSNV = linear(projected.latent_BTR, self.value_up)
            v_BSNV = constrain(v_BSNV, "batch", "time", "heads", None)
        q_BTNH = jnp.concatenate([projected.q_nope_BTNH, projected.q_rope_BTNH], axis=-1)
        attend = sequence_form(self.config, q_BTNH.shape[1])
        return attend(
            q_BTNH,
            k_BSNH,
            v_BSNV,
            tokens.segments_BT,
            indexer,
            stage=tokens.stage,
            topk=self.config.indexer.topk,
            record=self.is_mutable_collection("record"),
        )

    def selected(
        self,
        projected: Projections,
        entries: LatentCache,
        tokens: TokenInfo,
        indexer: IndexerInputs,
    ) -> tuple[Array, IndexerStats, Array | None]:
        """Attends over the latents that the indexer selects, and reads no others.

        See `expanded`, which computes the same in stage "sparse".
        """
        c = self.config
        mixed_BTNR, stats, selected_BTk = attend_selected(
            self.absorb_key(projected),
            entries.latent_BSR,
            tokens.segments_BT,
            indexer,
            value_rank=c.mla.kv_lora_rank,
            topk=c.indexer.topk,
            query_chunk=c.query_chunk,
            causal_parts=c.causal_parts,
            record=self.is_mutable_collection("record"),
        )
        return self.absorb_value(mixed_BTNR), stats, selected_BTk

    def absorbed(
        self,
        projected: Projections,
        cache: LatentCache,
        allowed_BTS: Array,
        index_query: IndexerQuery | None,
    ) -> tuple[Array, Array | None]:
        """Attends over cached latents, which the indexer selects where there is an `index_query`.

        Returns out_BTNV, and where "record" is mutable the selected keys.
        """
        q_BTNR, topk = self.absorb_key(projected), self.config.indexer.topk
        attend = latent_form(cache, q_BTNR.shape[1], None if index_query is None else topk)
        rank = self.config.mla.kv_lora_rank
        record = self.is_mutable_collection("record")
        mixed_BTNR, selected_BTk = attend(
            q_BTNR, cache, allowed_BTS, index_query, value_rank=rank, topk=topk, record=record
        )
        return self.absorb_value(mixed_BTNR), selected_BTk

    def absorb_key(self, projected: Projections) -> Array:
        """Moves the keys' up-projection to the queries. Returns q_BTNR, rotated part last."""
        q_nope_BTNH = projected.q_nope_BTNH
        with jax.named_scope("absorb"):
            q_latent_BTNR = jnp.einsum(
                "BTNH,RNH->BTNR", q_nope_BTNH, self.key_up.astype(q_nope_BTNH.dtype)
            )
            return jnp.concatenate([q_latent_BTNR, projected.q_rope_BTNH], axis=-1)

    def absorb_value(self, mixed_BTNR: Array) -> Array:
        """Applies the values' up-projection to attention's mean of latents. Returns out_BTNV."""
        return jnp.einsum("BTNR,RNV->BTNV", mixed_BTNR, self.value_up.astype(mixed_BTNR.dtype))
