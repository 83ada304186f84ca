"""The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1): which keys a
query shall attend to, and the loss that teaches it.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kernels.reference import IndexerQuery
from model.config import ModelConfig
from model.layers.linear import linear
from model.layers.norm import LayerNorm
from model.layers.rope import rope_angles, rotate
from model.sharding import named


class Indexer(nn.Module):
    """Parameters of the indexer. Its inputs are detached here, so that its loss cannot reach the
    trunk.
    """

    config: ModelConfig

    def setup(self):
        c, i = self.config, self.config.indexer
        source, axis = (
            (c.mla.q_lora_rank, "query_rank") if c.mla.q_lora_rank else (c.hidden_size, "width")
        )
        init = nn.initializers.normal(c.initializer_range)
        self.query = self.param(
            "query",
            named(init, (axis, "replicated", "head_width")),
            (source, i.n_heads, i.head_dim),
            jnp.float32,
        )
        self.key = self.param(
            "key", named(init, ("width", "head_width")), (c.hidden_size, i.head_dim), jnp.float32
        )
        self.head_weight = self.param(
            "head_weight",
            named(init, ("width", "replicated")),
            (c.hidden_size, i.n_heads),
            jnp.float32,
        )
        self.key_norm = LayerNorm(i.norm_eps, axis="head_width")

    def __call__(
        self, hidden_BTD: Array, query_latent_BTR: Array, positions_BT: Array
    ) -> tuple[IndexerQuery, Array]:
        """Returns the queries and the keys [B, T, C] of these tokens. `query_latent` is the hidden
        state itself in a model without query latents.
        """
        i = self.config.indexer
        hidden_BTD, query_latent_BTR = jax.lax.stop_gradient((hidden_BTD, query_latent_BTR))
        rope = self.config.rope
        angles_BTP = rope_angles(positions_BT, i.rope_head_dim, rope)
        turn = functools.partial(
            rotate, angles_BTP=angles_BTP, rope=rope, interleaved=rope.indexer_rope_interleave
        )

        with jax.named_scope("indexer_projections"):
            q_BTIC = turn(linear(query_latent_BTR, self.query))
            k_BTC = turn(self.key_norm(linear(hidden_BTD, self.key))[:, :, None])[:, :, 0]
            w_BTI = (
                linear(hidden_BTD, self.head_weight).astype(jnp.float32)
                * (i.n_heads * i.head_dim) ** -0.5
            )
        return IndexerQuery(q_BTIC, w_BTI), k_BTC
