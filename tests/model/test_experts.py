"""All implementations of the routed experts' FFN compute the same mixture.

The TPU's runs in Pallas' interpreter, where memory that nobody wrote is NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from kernels import grouped_matmul
from kernels.grouped_matmul import Tiles, megablox
from model.config import EXPERT_MATMULS
from model.experts.blocks import experts_blocks
from model.experts.bucketed import experts_bucketed, sorted_by_expert
from model.experts.grouped import experts_grouped
from model.experts.reference import experts_reference
from model.experts.table import IMPLEMENTATIONS, pick
from tests import tiny

E, K, D, F = 5, 2, 6, 7
TOKENS = 40


def expert_ids(load: str) -> jax.Array:
    """Makes expert_TK: two different experts for each token, as top-k gives them.

    In "one" both choices of every token are expert 3.
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
        ],  # these are other devices' experts
    }
    return jnp.asarray(pairs[load], jnp.int32)


MIXTURES = {
    "reference": experts_reference,
    "blocks": experts_blocks,
    "bucketed": experts_bucketed,
    "megablox": functools.partial(
        experts_grouped, functools.partial(megablox, tiles=Tiles(128, interpret=True)), 128
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(implementation, expert_TK, arrays):
    def loss(arrays):
        out_TD = MIXTURES[implementation](arrays[0], expert_TK, *arrays[1:])
        return jnp.sum(jnp.sin(out_TD)), out_TD

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@pytest.mark.heavy
@pytest.mark.parametrize("load", ["uneven", "one empty", "one", "elsewhere"])
def test_implementations_agree(load):
    """In outputs, and in gradients to tokens, gates and weights.

    The tolerance is for float32 sums in another order.
    """
    rng = np.random.default_rng(1)
    arrays = tuple(
        jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
        for shape in ((TOKENS, D), (TOKENS, K), (E, D, F), (E, D, F), (E, F, D))
    )
    expected = value_and_gradient("reference", expert_ids(load), arrays)
    assert tiny.tree_max(expected[1][2]) > 0.1
    for implementation in ("blocks", "bucketed", "megablox"):
        tiny.assert_close(
            value_and_gradient(implementation, expert_ids(load), arrays),
            expected,
            rtol=1e-5,
            atol=1e-5,
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
def test_windows_cover_every_token_once(counts):
    """They have at most an eighth of the mean share of rows too many, for experts whose share is
    between three quarters of the mean and one and a quarter.
    """
    expert_TK = jnp.asarray(
        np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts)).reshape(-1, 2),
        jnp.int32,
    )
    token_S, _, slot_of_TK, windows, sizes = sorted_by_expert(
        expert_TK, jnp.ones(expert_TK.shape), 4
    )
    covered = [
        (int(expert), int(first), int(rows), sizes[int(size)])
        for expert, size, first, rows in zip(*windows, strict=True)
    ]
    for expert in range(4):
        own = [
            row
            for owner, first, rows, _ in covered
            for row in range(first, first + rows)
            if owner == expert
        ]
        np.testing.assert_array_equal(own, np.sort(slot_of_TK[expert_TK == expert]))
    assert all(
        rows <= size and first + size <= token_S.shape[0]
        for _, first, rows, size in covered
        if rows
    )
    assert all(size - rows < 128 / 8 for _, _, rows, size in covered if 96 < rows <= 160)


@pytest.mark.parametrize("installed", [False, True])
def test_auto_takes_what_suits_the_platform(installed, monkeypatch):
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
    ("name", "platform", "message"),
    [
        ("tokamax", "cpu", "runs on tpu and gpu, and this is cpu"),
        ("tokamax", "tpu", "pip install tokamax"),
        ("megablox", "gpu", "runs on tpu, and this is gpu"),
        ("ragged", "tpu", "must be one of auto, blocks"),
    ],
)
def test_a_wrong_implementation_is_refused_in_one_line(name, platform, message, monkeypatch):
    monkeypatch.setattr(grouped_matmul.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message) as error:
        pick(name, platform, 10_000, 8)
    assert "\n" not in str(error.value) and str(error.value).startswith("model.expert_matmul = ")
