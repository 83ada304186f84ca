"""Mixture of experts: DeepSeek-V3's (arXiv 2412.19437, section 2.1.2) with sigmoid scores, choice
by score plus bias, gates without the bias, and shared experts; Qwen's (arXiv 2505.09388) with
softmax scores and no bias, and in Qwen3-Next a gate on the shared expert.

The router bias is state, not a parameter: it lives in the collection "router" and the train step
moves it (`train/balance.py`).
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from kernels.device import platform
from model.config import ModelConfig
from model.experts import table
from model.experts.swiglu import swiglu
from model.layers.linear import linear
from model.sharding import RULES, named


@flax.struct.dataclass
class RouterStats:
    """What one layer's router did: its balance loss summed over tokens, and how many real tokens
    chose each expert.
    """

    balance: Array
    counts_E: Array

    @classmethod
    def zero(cls, experts: int) -> "RouterStats":
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((experts,), jnp.int32))


def router_scores(logits_BTE: Array, kind: str) -> Array:
    """Each expert's affinity to a token: "sigmoid" of its own logit (arXiv 2412.19437, eq. 15), or
    its share in a "softmax" over all table.
    """
    return jax.nn.sigmoid(logits_BTE) if kind == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)


def choose_experts(
    scores_BTE: Array,
    bias_E: Array,
    *,
    chosen: int,
    groups: int,
    chosen_groups: int,
    group_best: int = 0,
) -> Array:
    """The K experts of highest score plus bias, out of the best groups (arXiv 2412.19437, eq. 16
    and node-limited routing).

    A group's rank is the sum of its `group_best` best biased scores; with 0, of K / chosen_groups,
    as the paper says (released code: always 2, which for DeepSeek-V3 is the same). Returns
    chosen_BTK, best first; no gradient.
    """
    with jax.named_scope("choose_experts"):
        biased_BTE = jax.lax.stop_gradient(scores_BTE) + bias_E
        if chosen_groups < groups:
            biased_BTGe = biased_BTE.reshape(*biased_BTE.shape[:-1], groups, -1)
            best, _ = jax.lax.top_k(biased_BTGe, group_best or max(1, chosen // chosen_groups))
            _, group_BTg = jax.lax.top_k(jnp.sum(best, axis=-1), chosen_groups)
            in_group_BTG = jnp.any(group_BTg[..., None] == jnp.arange(groups), axis=-2)
            biased_BTE = jnp.where(in_group_BTG[..., None], biased_BTGe, -jnp.inf).reshape(
                biased_BTE.shape
            )
        return jax.lax.top_k(biased_BTE, chosen)[1]


def expert_gates(
    scores_BTE: Array, chosen_BTK: Array, route_scale: float, normalise: bool = True
) -> Array:
    """The chosen experts' own scores, normalised to sum to route_scale (eq. 13), or only multiplied
    by it. The bias is nowhere in it.
    """
    picked_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
    if normalise:
        picked_BTK /= jnp.sum(picked_BTK, axis=-1, keepdims=True) + 1e-20
    return picked_BTK * route_scale


def sequence_balance(scores_BTE: Array, real_BT: Array, chosen: int) -> Array:
    """The sequence-wise balance loss without alpha (eq. 17-20), times the sequence's tokens, summed
    over sequences: a total over real tokens.

        sum_i f_i P_i,   f_i = E / (K T) * #{t: i in topK of the scores without bias},   P_i =
        mean_t s_i / sum_j s_j

    A sequence is a row of the batch; padding is not counted.
    """
    with jax.named_scope("sequence_balance"):
        E = scores_BTE.shape[-1]
        _, top_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), chosen)
        picked_BTE = jnp.sum(top_BTK[..., None] == jnp.arange(E), axis=-2, dtype=jnp.float32)
        share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
        real_BT1 = real_BT[..., None].astype(jnp.float32)
        tokens_B = jnp.sum(real_BT, axis=-1).astype(jnp.float32)
        f_BE = jnp.sum(picked_BTE * real_BT1, axis=1) * E / chosen  # times T
        p_BE = jnp.sum(share_BTE * real_BT1, axis=1)  # times T
        return jnp.sum(jnp.sum(f_BE * p_BE, axis=-1) / jnp.maximum(tokens_B, 1))


def mix_experts(
    x_BTD: Array,
    chosen_BTK: Array,
    gates_BTK: Array,
    weights: tuple[Array, Array, Array],
    implementation: str,
) -> Array:
    """The routed experts' output for every token, under whatever mesh is ambient.

    With a mesh: tokens are gathered over the expert axis, each device computes its own experts'
    part for all of them, and the parts are summed back to the tokens' owners. For K chosen experts
    over K or fewer devices this moves no more bytes than sending each token to its experts would.
    """

    mesh = jax.sharding.get_abstract_mesh()

    def local(x_BTD, chosen_BTK, gates_BTK, *weights):
        B, T, D = x_BTD.shape
        pick = table.pick(
            implementation,
            platform(),
            chosen_BTK.size,
            weights[0].shape[0],
            mesh.shape.get("expert", 1),
        )
        return pick(
            x_BTD.reshape(B * T, D),
            chosen_BTK.reshape(B * T, -1),
            gates_BTK.reshape(B * T, -1),
            *weights,
        ).reshape(B, T, D)

    if mesh.empty or mesh.size == 1:
        return local(x_BTD, chosen_BTK, gates_BTK, *weights)

    def sharded(x_BTD, chosen_BTK, gates_BTK, *weights):
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
        first = jax.lax.axis_index("expert") * weights[0].shape[0]
        part_BTD = local(gather(x_BTD), gather(chosen_BTK) - first, gather(gates_BTK), *weights)
        part_BTD = jax.lax.psum(part_BTD, "tensor")
        return jax.lax.psum_scatter(part_BTD, "expert", scatter_dimension=0, tiled=True)

    rows = P(RULES["batch"])
    into, outof = P("expert", None, "tensor"), P("expert", "tensor", None)
    return jax.shard_map(
        sharded, in_specs=(rows, rows, rows, into, into, outof), out_specs=rows, check_vma=False
    )(x_BTD, chosen_BTK, gates_BTK, *weights)


class FFN(nn.Module):
    """(silu(x W_gate) * x W_up) W_down (arXiv 2002.05202, eq. 6): the FFN of the first layers, and
    of the shared table.
    """

    config: ModelConfig
    hidden: int

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        gate_DF = self.param(
            "gate", named(init, ("width", "ffn")), (c.hidden_size, self.hidden), jnp.float32
        )
        up_DF = self.param(
            "up", named(init, ("width", "ffn")), (c.hidden_size, self.hidden), jnp.float32
        )
        down_FD = self.param(
            "down", named(init, ("ffn", "width")), (self.hidden, c.hidden_size), jnp.float32
        )
        return linear(swiglu(linear(x_BTD, gate_DF), linear(x_BTD, up_DF)), down_FD)


class MoE(nn.Module):
    """Routed and shared table."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array, real_BT: Array) -> tuple[Array, RouterStats]:
        """`real_BT` marks the tokens that are not padding: only they are counted."""
        c, m = self.config, self.config.moe
        init = nn.initializers.normal(c.initializer_range)
        router_DE = self.param(
            "router",
            named(init, ("width", "replicated")),
            (c.hidden_size, m.num_experts),
            jnp.float32,
        )
        bias_E = jnp.zeros((m.num_experts,), jnp.float32)
        if m.router_bias:
            bias_E = self.variable("router", "bias", named(lambda: bias_E, ("replicated",))).value
        weights = (
            self.param(
                "gate",
                named(init, ("experts", "width", "ffn")),
                (m.num_experts, c.hidden_size, m.intermediate_size),
                jnp.float32,
            ),
            self.param(
                "up",
                named(init, ("experts", "width", "ffn")),
                (m.num_experts, c.hidden_size, m.intermediate_size),
                jnp.float32,
            ),
            self.param(
                "down",
                named(init, ("experts", "ffn", "width")),
                (m.num_experts, m.intermediate_size, c.hidden_size),
                jnp.float32,
            ),
        )
        with jax.named_scope("router"):
            scores_BTE = router_scores(linear(x_BTD.astype(jnp.float32), router_DE), m.scoring_func)
            rule = {
                "chosen": m.num_experts_per_tok,
                "groups": m.n_group,
                "chosen_groups": m.topk_group,
                "group_best": m.group_topk,
            }
            chosen_BTK = choose_experts(scores_BTE, bias_E, **rule)
            gates_BTK = expert_gates(
                scores_BTE, chosen_BTK, m.routed_scaling_factor, m.norm_topk_prob
            )
            self.sow("record", "routes", chosen_BTK)
            counts_E = jnp.sum(
                (chosen_BTK[..., None] == jnp.arange(m.num_experts)) & real_BT[..., None, None],
                axis=(0, 1, 2),
                dtype=jnp.int32,
            )
        with jax.named_scope("routed_experts"):
            out_BTD = mix_experts(
                x_BTD,
                chosen_BTK,
                gates_BTK,
                tuple(w.astype(x_BTD.dtype) for w in weights),
                c.expert_matmul,
            )
        if m.n_shared_experts:
            with jax.named_scope("shared_experts"):
                shared_BTD = FFN(c, m.shared_intermediate_size, name="shared")(x_BTD)
                if m.shared_expert_gate:
                    gate_D1 = self.param(
                        "shared_gate",
                        named(init, ("width", "replicated")),
                        (c.hidden_size, 1),
                        jnp.float32,
                    )
                    shared_BTD = shared_BTD * jax.nn.sigmoid(linear(x_BTD, gate_D1))
                out_BTD = out_BTD + shared_BTD
        return out_BTD, RouterStats(
            sequence_balance(scores_BTE, real_BT, m.num_experts_per_tok), counts_E
        )
