"""Mixture of experts: the router, the routed experts on a mesh, and the shared ones.

DeepSeek-V3's (arXiv 2412.19437, section 2.1.2) has sigmoid scores, choice by score plus bias, gates
without the bias, and shared experts; Qwen's (arXiv 2505.09388) softmax scores and no bias, and in
Qwen3-Next a gate on the shared expert.

The router bias is state, not a parameter: it lives in the collection "router" and the train step
moves it (train/balance.py). How the experts' matmuls are done is chosen in model/experts/table.py.
"""

import functools
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from kernels.device import platform
from model.config import ModelConfig
from model.experts import table
from model.experts.swiglu import swiglu
from model.layers.linear import linear
from model.layers.parameter import parameter, replayed
from model.sharding import (
    ParameterUse,
    ambient_shards,
    map_shards,
    mesh_axis,
    named,
    on_one_device,
    spec,
)


@flax.struct.dataclass
class RouterStats:
    """Statistics of one layer's router.

    balance: its balance loss, summed over tokens.
    counts_E: how many real tokens chose each expert.
    """

    balance: Array
    counts_E: Array

    @classmethod
    def zero(cls, experts: int) -> "RouterStats":
        """Returns the statistics of a layer without experts."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((experts,), jnp.int32))


def router_scores(logits_BTE: Array, kind: str) -> Array:
    """Computes each expert's affinity to a token.

    It is the "sigmoid" of the expert's own logit (arXiv 2412.19437, eq. 15), or its share in a
    "softmax" over all experts.
    """
    return jax.nn.sigmoid(logits_BTE) if kind == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)


def choose_experts(
    scores_BTE: Array,
    bias_E: Array,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    group_topk: int = 0,
) -> Array:
    """Chooses the experts of highest score plus bias (arXiv 2412.19437, eq. 16).

    They come out of the best groups (node-limited routing). A group's rank is the sum of its best
    biased scores. No gradient. Letters: G groups, e experts of a group, g groups that are taken.

    Args:
      scores_BTE: each expert's affinity.
      bias_E: the router bias.
      top_k: K, how many experts a token goes to.
      n_group: into how many groups the experts are divided.
      topk_group: how many groups a token's experts may come from.
      group_topk: how many scores a group's rank sums; with 0, K / topk_group, as the paper says
        (released code: always 2, which for DeepSeek-V3 is the same).

    Returns: the experts [B, T, K], best first.
    """
    with jax.named_scope("choose_experts"):
        biased_BTE = jax.lax.stop_gradient(scores_BTE) + bias_E
        if topk_group < n_group:
            biased_BTGe = biased_BTE.reshape(*biased_BTE.shape[:-1], n_group, -1)
            best, _ = jax.lax.top_k(biased_BTGe, group_topk or max(1, top_k // topk_group))
            _, group_BTg = jax.lax.top_k(jnp.sum(best, axis=-1), topk_group)
            in_group_BTG = jnp.any(group_BTg[..., None] == jnp.arange(n_group), axis=-2)
            biased_BTE = jnp.where(in_group_BTG[..., None], biased_BTGe, -jnp.inf).reshape(
                biased_BTE.shape
            )
        return jax.lax.top_k(biased_BTE, top_k)[1]


def expert_gates(
    scores_BTE: Array, expert_BTK: Array, route_scale: float, normalise: bool = True
) -> Array:
    """Returns the chosen experts' own scores [B, T, K] as gates. The bias is nowhere in them.

    They are normalised to sum to `route_scale` (arXiv 2412.19437, eq. 13), or only multiplied by
    it.
    """
    picked_BTK = jnp.take_along_axis(scores_BTE, expert_BTK, axis=-1)
    if normalise:
        picked_BTK /= jnp.sum(picked_BTK, axis=-1, keepdims=True) + 1e-20
    return picked_BTK * route_scale


def sequence_balance(scores_BTE: Array, real_BT: Array, top_k: int) -> Array:
    """Computes the sequence-wise balance loss (arXiv 2412.19437, eq. 17-20) without alpha.

        sum_i f_i P_i,   f_i = E / (K T) * #{t: i in topK of the scores without bias},
                         P_i = mean_t s_i / sum_j s_j

    It is multiplied by the sequence's tokens and summed over sequences: a total over real tokens. A
    sequence is a row of the batch; padding, where `real_BT` is false, is not counted.
    """
    with jax.named_scope("sequence_balance"):
        E = scores_BTE.shape[-1]
        _, top_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), top_k)
        picked_BTE = jnp.sum(top_BTK[..., None] == jnp.arange(E), axis=-2, dtype=jnp.float32)
        share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
        real_BT1 = real_BT[..., None].astype(jnp.float32)
        tokens_B = jnp.sum(real_BT, axis=-1).astype(jnp.float32)
        f_BE = jnp.sum(picked_BTE * real_BT1, axis=1) * E / top_k  # T f_i
        p_BE = jnp.sum(share_BTE * real_BT1, axis=1)  # T P_i
        return jnp.sum(jnp.sum(f_BE * p_BE, axis=-1) / jnp.maximum(tokens_B, 1))


def mix_experts(
    x_BTD: Array,
    expert_BTK: Array,
    gates_BTK: Array,
    weights: tuple[Array, Array, Array],
    implementation: str,
) -> Array:
    """Computes the routed experts' output for every token, under whatever mesh is ambient.

    With a mesh, tokens are gathered over the expert axis, each device computes its own experts'
    part for all of them, and the parts are summed back to the tokens' owners. For K chosen experts
    over K or fewer devices this moves no more bytes than sending each token to its experts would.

    Args:
      x_BTD: the tokens.
      expert_BTK, gates_BTK: each token's experts and their gates.
      weights: gate_EDF, up_EDF and down_EFD of all experts, in x's dtype.
      implementation: `model.expert_matmul`, see model/experts/table.py.
    """
    devices = ambient_shards("experts")

    def apply_experts(x_BTD, expert_BTK, gates_BTK, *weights):
        """Computes what this device's experts add to the output of the tokens."""
        B, T, D = x_BTD.shape
        experts = table.pick(
            implementation,
            platform(),
            expert_BTK.size,
            weights[0].shape[0],
            devices,
        )
        return experts(
            x_BTD.reshape(B * T, D),
            expert_BTK.reshape(B * T, -1),
            gates_BTK.reshape(B * T, -1),
            *weights,
        ).reshape(B, T, D)

    if on_one_device():
        return apply_experts(x_BTD, expert_BTK, gates_BTK, *weights)
    axis = mesh_axis("experts")

    def per_device(x_BTD, expert_BTK, gates_BTK, *weights):
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=0, tiled=True)
        # Ids are counted from this device's first expert: those of other devices are out of range,
        # and add nothing.
        first = jax.lax.axis_index(axis) * weights[0].shape[0]
        part_BTD = apply_experts(
            gather(x_BTD), gather(expert_BTK) - first, gather(gates_BTK), *weights
        )
        part_BTD = jax.lax.psum(part_BTD, mesh_axis("ffn"))
        return jax.lax.psum_scatter(part_BTD, axis, scatter_dimension=0, tiled=True)

    rows = spec("batch")
    up, down = spec("experts", None, "ffn"), spec("experts", "ffn", None)
    mix = map_shards(per_device, (rows, rows, rows, up, up, down), rows)
    return mix(x_BTD, expert_BTK, gates_BTK, *weights)


class FFN(nn.Module):
    """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202, eq. 6).

    It is the FFN of the first layers, and of the shared experts. `hidden` is F, its hidden width.
    """

    config: ModelConfig
    hidden: int

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """Maps tokens [B, T, D] to [B, T, D]."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        inside, outside = (c.hidden_size, self.hidden), (self.hidden, c.hidden_size)
        gate_DF = parameter(self, "gate", init, inside, ("embed", "ffn"))
        up_DF = parameter(self, "up", init, inside, ("embed", "ffn"))
        down_FD = parameter(self, "down", init, outside, ("ffn", "embed"))
        return linear(swiglu(linear(x_BTD, gate_DF), linear(x_BTD, up_DF)), down_FD)


class MoE(nn.Module):
    """Routed and shared experts."""

    config: ModelConfig

    def setup(self):
        """Declares the parameters, and the router bias."""
        c, m = self.config, self.config.moe
        D, E, F = c.hidden_size, m.num_experts, m.intermediate_size
        weight = functools.partial(
            parameter, self, init=nn.initializers.normal(c.initializer_range)
        )
        self.router = weight(
            "router", shape=(D, E), axes=("embed", "replicated"), keep_float32=True
        )
        if m.router_bias:
            zeros = functools.partial(jnp.zeros, (E,), jnp.float32)
            use = ParameterUse(per_channel=True, keep_float32=True)
            self.bias = self.variable("router", "bias", named(zeros, ("replicated",), use))
        self.gate = weight("gate", shape=(E, D, F), axes=("experts", "embed", "ffn"))
        self.up = weight("up", shape=(E, D, F), axes=("experts", "embed", "ffn"))
        self.down = weight("down", shape=(E, F, D), axes=("experts", "ffn", "embed"))
        if m.n_shared_experts:
            self.shared = FFN(c, m.shared_intermediate_size)
            if m.shared_expert_gate:
                self.shared_gate = weight("shared_gate", shape=(D, 1), axes=("embed", "replicated"))

    def __call__(self, x_BTD: Array, real_BT: Array) -> tuple[Array, RouterStats]:
        """Sends tokens through their experts.

        Args:
          x_BTD: the normalised hidden states.
          real_BT: false for padding, which is computed but not counted.

        Returns: the output [B, T, D], and what the router did.
        """
        m = self.config.moe
        expert_BTK, gates_BTK, stats = self.route(x_BTD, real_BT)
        with jax.named_scope("routed_experts"):
            gate_EDF, up_EDF, down_EFD = (
                w.astype(x_BTD.dtype) for w in (self.gate, self.up, self.down)
            )
            weights = gate_EDF, up_EDF, down_EFD
            out_BTD = mix_experts(x_BTD, expert_BTK, gates_BTK, weights, self.config.expert_matmul)
        if m.n_shared_experts:
            with jax.named_scope("shared_experts"):
                shared_BTD = self.shared(x_BTD)
                if m.shared_expert_gate:
                    shared_BTD = shared_BTD * jax.nn.sigmoid(linear(x_BTD, self.shared_gate))
                out_BTD = out_BTD + shared_BTD
        return out_BTD, stats

    def route(self, x_BTD: Array, real_BT: Array) -> tuple[Array, Array, RouterStats]:
        """Returns each token's experts and gates [B, T, K], and what the router did."""
        m, E = self.config.moe, self.config.moe.num_experts
        with jax.named_scope("router"):
            scores_BTE = router_scores(
                linear(x_BTD.astype(jnp.float32), self.router), m.scoring_func
            )
            bias_E = cast(Array, self.bias.value) if m.router_bias else jnp.zeros((E,), jnp.float32)
            expert_BTK = choose_experts(
                scores_BTE,
                bias_E,
                top_k=m.num_experts_per_tok,
                n_group=m.n_group,
                topk_group=m.topk_group,
                group_topk=m.group_topk,
            )
            given_BTK = replayed(self, "routes")
            if given_BTK is not None:  # -1 where a token has no record
                expert_BTK = jnp.where(given_BTK >= 0, given_BTK.astype(jnp.int32), expert_BTK)
            gates_BTK = expert_gates(
                scores_BTE, expert_BTK, m.routed_scaling_factor, m.norm_topk_prob
            )
            self.sow("record", "routes", expert_BTK)
            counts_E = jnp.sum(
                (expert_BTK[..., None] == jnp.arange(E)) & real_BT[..., None, None],
                axis=(0, 1, 2),
                dtype=jnp.int32,
            )
        balance = sequence_balance(scores_BTE, real_BT, m.num_experts_per_tok)
        return expert_BTK, gates_BTK, RouterStats(balance, counts_E)
