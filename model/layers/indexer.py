"""The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1).

Its parameters and projections are here. Its equations (scores, selection, loss) are in
kernels/reference.py.
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
from model.layers.parameter import parameter
from model.layers.rope import rope_angles, rotate


class Indexer(nn.Module):
    """The indexer's queries, keys and head weights.

    Its inputs are detached here, so that its loss cannot reach the trunk.
    """

    config: ModelConfig

    def setup(self):
        """Declares the parameters."""
        c, i = self.config, self.config.indexer
        source, axis = (
            (c.mla.q_lora_rank, "query_rank") if c.mla.q_lora_rank else (c.hidden_size, "embed")
        )
        weight = functools.partial(
            parameter, self, init=nn.initializers.normal(c.initializer_range)
        )
        self.query = weight(
            "query",
            shape=(source, i.n_heads, i.head_dim),
            axes=(axis, "replicated", "head_dim"),
        )
        self.key = weight("key", shape=(c.hidden_size, i.head_dim), axes=("embed", "head_dim"))
        self.head_weight = weight(
            "head_weight", shape=(c.hidden_size, i.n_heads), axes=("embed", "replicated")
        )
        self.key_norm = LayerNorm(i.norm_eps, axis="head_dim")

    def __call__(
        self, hidden_BTD: Array, query_latent_BTR: Array, positions_BT: Array
    ) -> tuple[IndexerQuery, Array]:
        """Projects tokens to the indexer's queries and keys.

        Args:
          hidden_BTD: the normalised hidden states.
          query_latent_BTR: the query latents; the hidden states in a model without.
          positions_BT: for RoPE.

        Returns: the queries with their head weights, and the keys k_BTC.
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
