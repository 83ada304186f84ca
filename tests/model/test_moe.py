"""Routing, gates and balance of a mixture of experts; the matmuls are test_experts.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.layers.moe import MoE, choose_experts, expert_gates, sequence_balance
from tests import tiny


def brute_force_choice(biased_E, top_k, n_group, topk_group):
    """Chooses by arXiv 2412.19437, section 2.1.2: the groups of the largest sums of their K / M
    best, then the best experts in them.
    """
    size = len(biased_E) // n_group
    rank = [
        sum(sorted(biased_E[g * size : (g + 1) * size])[-max(1, top_k // topk_group) :])
        for g in range(n_group)
    ]
    best_groups = sorted(range(n_group), key=lambda g: -rank[g])[:topk_group]
    candidates = [e for e in range(len(biased_E)) if e // size in best_groups]
    return sorted(candidates, key=lambda e: -biased_E[e])[:top_k]


@pytest.mark.parametrize(
    "top_k, n_group, topk_group",
    [(2, 1, 1), (4, 4, 2), (3, 4, 2), (2, 6, 3), (1, 3, 2), (6, 3, 3)],
)
def test_choice_is_limited_to_the_best_groups(top_k, n_group, topk_group):
    rng = np.random.default_rng(0)
    scores_BTE, bias_E = rng.random((3, 7, 12), np.float32), rng.normal(size=12).astype(np.float32)
    rule = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    found = choose_experts(jnp.asarray(scores_BTE), jnp.asarray(bias_E), **rule)
    expected = [
        [brute_force_choice(scores_BTE[b, t] + bias_E, **rule) for t in range(7)] for b in range(3)
    ]
    np.testing.assert_array_equal(found, expected)


def test_gates_are_normalised_scores():
    scores = jnp.asarray([[[0.2, 0.6, 0.9, 0.1]]])
    tiny.assert_close(
        expert_gates(scores, jnp.asarray([[[1, 0]]]), 2.0), jnp.asarray([[[1.5, 0.5]]]), rtol=1e-6
    )


CONFIG = tiny.model_config(
    moe={"num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
)


@functools.cache
def layer():
    """Makes an MoE layer's parameters, without its bias, and 2 x 24 tokens."""
    x_BTD = jax.random.normal(jax.random.key(0), (2, tiny.T, CONFIG.hidden_size))
    params = jax.tree.map(
        lambda leaf: leaf[0], tiny.variables(CONFIG)["params"]["layers_1"]["block_0"]["moe"]
    )
    return params, x_BTD


@jax.jit
def apply(params, bias_E, x_BTD, real_BT):
    return MoE(CONFIG).apply({"params": params, "router": {"bias": bias_E}}, x_BTD, real_BT)


def test_the_bias_chooses_and_does_not_weigh():
    """A bias that is equal for all experts, or too small to turn a choice, changes no bit. A large
    one does, and its own gradient is zero.
    """
    params, x_BTD = layer()
    real_BT = jnp.ones(x_BTD.shape[:2], bool)
    plain = apply(params, jnp.zeros(4), x_BTD, real_BT)
    chex.assert_trees_all_equal(apply(params, jnp.full(4, 0.25), x_BTD, real_BT), plain)
    chex.assert_trees_all_equal(
        apply(params, jnp.asarray([0.0, 1e-6, 0.0, -1e-6]), x_BTD, real_BT), plain
    )
    out_BTD, report = apply(params, jnp.asarray([0.0, 0.0, 9.0, 0.0]), x_BTD, real_BT)
    assert int(report.counts_E[2]) == real_BT.size and tiny.tree_max(out_BTD - plain[0]) > 0.1
    assert not jnp.any(
        jax.grad(lambda bias_E: jnp.sum(apply(params, bias_E, x_BTD, real_BT)[0]))(jnp.zeros(4))
    )


def test_no_token_is_dropped():
    """With all tokens on the same two experts the output is still their mixture for every token,
    and every choice is counted.
    """
    params, x_BTD = layer()
    out_BTD, report = apply(
        params, jnp.asarray([9.0, -9.0, 9.0, -9.0]), x_BTD, jnp.ones(x_BTD.shape[:2], bool)
    )
    chex.assert_trees_all_equal(report.counts_E, jnp.asarray([48, 0, 48, 0]))

    def swiglu(x_D, gate_DF, up_DF, down_FD):
        return (jax.nn.silu(x_D @ gate_DF) * (x_D @ up_DF)) @ down_FD

    scores_BTE = jax.nn.sigmoid(x_BTD @ params["router"])
    share_BTE = (
        CONFIG.moe.routed_scaling_factor * scores_BTE / (scores_BTE[..., :1] + scores_BTE[..., 2:3])
    )
    expected = sum(
        share_BTE[..., e, None]
        * swiglu(x_BTD, *(params[name][e] for name in ("gate", "up", "down")))
        for e in (0, 2)
    )
    expected += swiglu(x_BTD, *(params["shared"][name] for name in ("gate", "up", "down")))
    tiny.assert_close(
        out_BTD, expected, rtol=1e-4, atol=1e-4
    )  # sums of tens of float32 terms of size 1


def test_padding_is_not_counted_and_changes_no_token():
    params, x_BTD = layer()
    real_BT = jnp.arange(tiny.T) < jnp.asarray([[24], [9]])
    out_BTD, report = apply(params, jnp.zeros(4), x_BTD, real_BT)
    whole_BTD, _ = apply(params, jnp.zeros(4), x_BTD, jnp.ones_like(real_BT))
    assert int(jnp.sum(report.counts_E)) == 33 * CONFIG.moe.num_experts_per_tok
    chex.assert_trees_all_equal(out_BTD, whole_BTD)


def test_sequence_balance_by_hand():
    """Of two experts one is in the top k.

    Row 0: three tokens, f = 2/3 * (2, 1), P = mean of shares (0.75, 0.5, 0.4) -> 0.55, so f.P =
    (1.1 + 0.45) * 2/3 = 31/30, times its 3 tokens. Row 1: one real token, f = (0, 2), P = (0.2,
    0.8): 1.6. Row 2: padding alone, 0.
    """
    scores = jnp.asarray(
        [
            [[0.75, 0.25], [0.5, 0.5], [0.2, 0.3]],
            [[0.1, 0.4], [0.9, 0.1], [0.9, 0.1]],
            [[0.9, 0.1]] * 3,
        ]
    )
    real = jnp.asarray([[True] * 3, [True, False, False], [False] * 3])
    assert float(sequence_balance(scores, real, 1)) == pytest.approx(3 * 31 / 30 + 1.6, rel=1e-6)
    # Perfect balance gives 1 a token, whatever the number of experts and of choices.
    assert float(
        sequence_balance(jnp.tile(jnp.eye(6), (2, 2, 1)), jnp.ones((2, 12), bool), 1)
    ) == pytest.approx(24, rel=1e-6)
