"""Routing, balance, and the ways to compute the same mixture; the TPU's runs in Pallas'
interpreter, where memory that nobody wrote is NaN.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from kernels import grouped_matmul
from kernels.grouped_matmul import Tiles, megablox
from model.config import EXPERT_MATMULS
from model.experts.bucketed import sorted_by_expert
from model.experts.table import (
    IMPLEMENTATIONS,
    experts_blocks,
    experts_bucketed,
    experts_grouped,
    experts_reference,
    pick,
)
from model.layers.moe import MoE, choose_experts, expert_gates, sequence_balance
from tests import tiny

E, K, D, F = 5, 2, 6, 7
TOKENS = 40


def loads(name: str) -> jnp.ndarray:
    """chosen_TK. Two different experts a token, as top-k gives them, but "one": both choices of
    every token are expert 3.
    """
    rng = np.random.default_rng(0)
    pairs = {
        "uneven": [
            rng.choice(E, K, replace=False, p=[0.7, 0.1, 0.1, 0.05, 0.05]) for _ in range(TOKENS)
        ],
        "one empty": [rng.choice([0, 1, 3, 4], K, replace=False) for _ in range(TOKENS)],
        "one": [(3, 3)] * TOKENS,
        "elsewhere": [
            (rng.integers(-3, 0), rng.integers(0, E)) if t % 2 else (E, E + 2)
            for t in range(TOKENS)
        ],  # other devices' experts get no slot
    }
    return jnp.asarray(pairs[name], jnp.int32)


MIXTURES = {
    "reference": experts_reference,
    "blocks": experts_blocks,
    "bucketed": experts_bucketed,
    "megablox": functools.partial(
        experts_grouped, functools.partial(megablox, tiles=Tiles(128, interpret=True)), 128
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(implementation, chosen_TK, arrays):
    def loss(arrays):
        out_TD = MIXTURES[implementation](arrays[0], chosen_TK, *arrays[1:])
        return jnp.sum(jnp.sin(out_TD)), out_TD

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("load", ["uneven", "one empty", "one", "elsewhere"])
def test_implementations_agree(load):
    """Outputs, and gradients to tokens, gates and weights: float32 sums in another order."""
    rng = np.random.default_rng(1)
    arrays = tuple(
        jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
        for shape in ((TOKENS, D), (TOKENS, K), (E, D, F), (E, D, F), (E, F, D))
    )
    expected = value_and_gradient("reference", loads(load), arrays)
    assert tiny.tree_max(expected[1][2]) > 0.1
    for implementation in ("blocks", "bucketed", "megablox"):
        tiny.assert_close(
            value_and_gradient(implementation, loads(load), arrays), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "counts",
    [
        [500, 12, 0, 0],
        [128, 129, 127, 128],
        [0, 0, 0, 512],
        [257, 255, 0, 0],
        [64, 65, 300, 83],
        [0, 0, 0, 2],
    ],
)
def test_windows_hold_every_token_once(counts):
    """And are no longer than an eighth of the mean share beyond what they hold, where that is
    between three quarters of it and one and a quarter.
    """
    chosen_TK = jnp.asarray(
        np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts)).reshape(-1, 2),
        jnp.int32,
    )
    token_S, _, slot_of_TK, visits, sizes = sorted_by_expert(
        chosen_TK, jnp.ones(chosen_TK.shape), 4
    )
    held = [
        (int(e), int(first), int(rows), sizes[int(size)])
        for e, size, first, rows in zip(*visits, strict=True)
    ]
    own = {
        e: [
            row
            for expert, first, rows, _ in held
            for row in range(first, first + rows)
            if expert == e
        ]
        for e in range(4)
    }
    for expert in range(4):
        np.testing.assert_array_equal(own[expert], np.sort(slot_of_TK[chosen_TK == expert]))
    assert all(
        rows <= size and first + size <= token_S.shape[0] for _, first, rows, size in held if rows
    )
    assert all(size - rows < 128 / 8 for _, _, rows, size in held if 96 < rows <= 160)


@pytest.mark.parametrize("installed", [False, True])
def test_the_table(installed, monkeypatch):
    monkeypatch.setattr(grouped_matmul.importlib.util, "find_spec", lambda name: installed or None)

    def grouped(implementation) -> str:
        return implementation.args[0].func.__name__

    assert pick("auto", "cpu", 10_000, 8) is experts_bucketed
    assert (
        grouped(pick("auto", "tpu", 10_000, 8))
        == grouped(pick("megablox", "tpu", 16, 8))
        == "megablox"
    )
    assert (
        grouped(pick("auto", "gpu", 10_000, 8)) == "tokamax"
        if installed
        else pick("auto", "gpu", 10_000, 8) is experts_blocks
    )
    assert pick("auto", "tpu", 16, 8) is pick("reference", "tpu", 10_000, 8) is experts_reference
    assert not installed or grouped(pick("tokamax", "tpu", 16, 8)) == "tokamax"
    assert {"auto", *IMPLEMENTATIONS} == set(EXPERT_MATMULS)


@pytest.mark.parametrize(
    ("name", "platform", "said"),
    [
        ("tokamax", "cpu", "runs on tpu and gpu, and this is cpu"),
        ("tokamax", "tpu", "pip install tokamax"),
        ("megablox", "gpu", "runs on tpu, and this is gpu"),
        ("ragged", "tpu", "must be one of auto, blocks"),
    ],
)
def test_what_a_person_can_get_wrong_is_one_line(name, platform, said, monkeypatch):
    monkeypatch.setattr(grouped_matmul.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said) as error:
        pick(name, platform, 10_000, 8)
    assert "\n" not in str(error.value) and str(error.value).startswith("model.expert_matmul = ")


def brute_force_choice(biased_E, chosen, groups, chosen_groups):
    """arXiv 2412.19437, section 2.1.2: the groups of the largest sums of their K / M best, then the
    best experts in them.
    """
    size = len(biased_E) // groups
    rank = [
        sum(sorted(biased_E[g * size : (g + 1) * size])[-max(1, chosen // chosen_groups) :])
        for g in range(groups)
    ]
    open_groups = sorted(range(groups), key=lambda g: -rank[g])[:chosen_groups]
    candidates = [e for e in range(len(biased_E)) if e // size in open_groups]
    return sorted(candidates, key=lambda e: -biased_E[e])[:chosen]


@pytest.mark.parametrize(
    "chosen, groups, chosen_groups",
    [(2, 1, 1), (4, 4, 2), (3, 4, 2), (2, 6, 3), (1, 3, 2), (6, 3, 3)],
)
def test_group_limited_choice(chosen, groups, chosen_groups):
    rng = np.random.default_rng(0)
    scores_BTE, bias_E = rng.random((3, 7, 12), np.float32), rng.normal(size=12).astype(np.float32)
    found = choose_experts(
        jnp.asarray(scores_BTE),
        jnp.asarray(bias_E),
        chosen=chosen,
        groups=groups,
        chosen_groups=chosen_groups,
    )
    expected = [
        [
            brute_force_choice(scores_BTE[b, t] + bias_E, chosen, groups, chosen_groups)
            for t in range(7)
        ]
        for b in range(3)
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
    """An MoE layer's variables without its bias, and 2 x 24 tokens."""
    x_BTD = jax.random.normal(jax.random.key(0), (2, tiny.T, CONFIG.hidden_size))
    params = jax.tree.map(
        lambda leaf: leaf[0], tiny.variables(CONFIG)["params"]["layers_1"]["block_0"]["moe"]
    )
    return params, x_BTD


@jax.jit
def apply(params, bias_E, x_BTD, real_BT):
    return MoE(CONFIG).apply({"params": params, "router": {"bias": bias_E}}, x_BTD, real_BT)


def test_the_bias_chooses_and_does_not_weigh():
    """A bias equal for all experts, or too small to turn a choice, changes nothing, to the last
    bit. A large one does, and its own gradient is zero.
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


def test_dropless():
    """All tokens on the same two experts: the output is still the two experts' mixture for every
    token, and every choice is counted.
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
    """Two experts, one chosen. Row 0: three tokens, f = 2/3 * (2, 1), P = mean of shares (0.75,
    0.5, 0.4) -> 0.55, so f.P = (1.1 + 0.45) * 2/3 = 31/30, times its 3 tokens. Row 1: one real
    token, f = (0, 2), P = (0.2, 0.8): 1.6. Row 2: padding alone, 0.
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
