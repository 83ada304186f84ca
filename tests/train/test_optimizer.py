"""The schedule, what learns, what decays, and the updates of AdamW and Muon."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.sharding import Named, is_named
from model.transformer import boxed_shapes
from tests import tiny
from train.optimizer import decays, make_optimizer, path_of, schedule, trainable

CONFIG = tiny.model_config()
PARAMETERS = boxed_shapes(CONFIG)["params"]


def paths(mask) -> set[str]:
    return {path_of(path) for path, on in jax.tree.leaves_with_path(mask) if on}


def one_step(config, gradients):
    """Returns by how much a step moves each parameter, by its path."""
    params = tiny.variables(CONFIG)["params"]
    optimizer = make_optimizer(config, PARAMETERS)
    updates, _ = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params))(gradients)
    return {
        path_of(path): float(jnp.max(jnp.abs(leaf)))
        for path, leaf in jax.tree.leaves_with_path(updates)
    }


def test_schedule():
    """Two steps of warm-up, three at the peak, five of cosine to a tenth, then constant. The first
    step is at half the peak, not at 0.
    """
    rate = schedule(tiny.train_config(learning_rate=1.0))
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * n / 5)) / 2 for n in range(6)]
    np.testing.assert_allclose(
        [np.asarray(rate(step)) for step in range(13)],
        [0.5, 1, 1, 1, *cosine, 0.1, 0.1, 0.1],
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"warmup_steps": 0, "constant_steps": 0, "cosine_steps": 2}, [1, 0.55, 0.1, 0.1]),
        # Without a cosine nothing falls.
        ({"warmup_steps": 0, "constant_steps": 2, "cosine_steps": 0}, [1, 1, 1, 1]),
        ({"warmup_steps": 4, "steps": 2}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_schedule_without_some_of_its_parts(changes, expected):
    rate = schedule(tiny.train_config(learning_rate=1.0, **changes))
    np.testing.assert_allclose([np.asarray(rate(step)) for step in range(4)], expected, atol=1e-6)


def test_each_stage_trains_what_its_loss_reaches():
    params = tiny.variables(CONFIG)["params"]
    everything = paths(jax.tree.map(lambda _: True, params))
    indexer, mtp = (
        {path for path in everything if "/indexer/" in path},
        {path for path in everything if path.startswith("mtp_")},
    )
    assert indexer & mtp and indexer - mtp and mtp - indexer

    def trained(**changes):
        return paths(trainable(tiny.train_config(**changes), params))

    assert trained(stage="dense") == everything - indexer
    assert trained(stage="warmup") == indexer
    assert trained(stage="sparse") == everything
    assert trained(stage="sparse", indexer_weight=0.0) == everything - indexer
    # As in reinforcement: no loss reaches an MTP module, its indexer included.
    assert trained(stage="sparse", mtp_weight=0.0) == everything - mtp
    assert trained(stage="dense", trainable="attention/(gate|out)$") == {
        path for path in everything if path.endswith(("attention/gate", "attention/out"))
    }


def test_a_pattern_that_trains_nothing_is_an_error():
    config = tiny.train_config(stage="warmup", trainable="attention/gate")
    message = "'attention/gate': matches no parameter that stage 'warmup' trains"
    with pytest.raises(UserError, match=f"train.trainable = {message}"):
        trainable(config, tiny.variables(CONFIG)["params"])


def test_what_is_frozen_does_not_move():
    """Not by its gradient, and not by decay; nor does its gradient count in the norm that is
    clipped.
    """
    params = tiny.variables(CONFIG)["params"]
    config = tiny.train_config(stage="warmup")
    moved = one_step(config, jax.tree.map(jnp.ones_like, params))
    assert {path for path, by in moved.items() if by > 0} == paths(trainable(config, params))
    loud = jax.tree.map(
        lambda leaf, learns: leaf if learns else 1e9 * jnp.ones_like(leaf),
        jax.tree.map(jnp.ones_like, params),
        trainable(config, params),
    )
    assert one_step(config, loud) == moved


def test_decay_falls_on_matrices():
    """Without any gradient a step is decay alone: learning rate 1/2 * 1e-2, weight decay 0.1."""
    params = tiny.variables(CONFIG)["params"]
    decayed = paths(jax.tree.map(decays, PARAMETERS, is_leaf=is_named))
    everything = paths(jax.tree.map(lambda _: True, params))
    assert everything - decayed == {
        path for path in everything if path.endswith(("/scale", "/bias", "/taps"))
    }
    moved = one_step(tiny.train_config(), jax.tree.map(jnp.zeros_like, params))
    assert {path for path, by in moved.items() if by > 0} == decayed
    largest = float(jnp.max(jnp.abs(params["embedding"])))
    assert moved["embedding"] == pytest.approx(0.5e-2 * 0.1 * largest, rel=1e-5)


def test_adamw_by_hand():
    """A gradient of 3 is clipped to 1, one of 1/2 is not; bias-corrected moments of both."""
    config = tiny.train_config(
        stage="dense", weight_decay=0.0, learning_rate=1.0, warmup_steps=0, constant_steps=5
    )
    optimizer = make_optimizer(config, {"w": Named(jnp.zeros(()), ())})
    params = {"w": jnp.zeros(())}
    update = cast(Callable[..., tuple[dict, Any]], optimizer.update)
    once, state = update({"w": jnp.asarray(3.0)}, optimizer.init(params), params)
    twice, _ = update({"w": jnp.asarray(0.5)}, state, params)
    assert float(once["w"]) == pytest.approx(-1.0, rel=1e-6)
    mean, square = 0.9 * 0.1 * 1.0 + 0.1 * 0.5, 0.95 * 0.05 * 1.0 + 0.05 * 0.25
    assert float(twice["w"]) == pytest.approx(
        -(mean / (1 - 0.9**2)) / np.sqrt(square / (1 - 0.95**2)), rel=1e-5
    )


@pytest.mark.heavy
def test_muon_orthogonalises_each_matrix_of_each_layer():
    """The first update, against the singular vectors of a layer's gradient with heads merged; its
    root mean square is 0.2 of the learning rate, up to what five Newton-Schulz iterations leave of
    the singular values (they lie between 0.7 and 1.2).
    """
    params = tiny.variables(CONFIG)["params"]
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params))))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)
    config = tiny.train_config(
        optimizer="muon", weight_decay=0.0, learning_rate=1.0, warmup_steps=0, constant_steps=5
    )
    optimizer = make_optimizer(config, PARAMETERS)
    updates, _ = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params))(gradients)
    layers = ("layers_1", "block_0")
    cases = {
        (*layers, "attention", "query_up"): (1, 1),
        (*layers, "attention", "out"): (1, 2),
        (*layers, "attention", "latent_down"): (1, 1),
        (*layers, "moe", "down"): (2, 1),
        (*layers, "moe", "router"): (1, 1),
        (*layers, "moe", "shared", "up"): (1, 1),
        ("mtp_0", "merge"): (1, 1),
        ("mtp_0", "block", "attention", "gate"): (0, 1),
    }
    for path, (stacked, inputs) in cases.items():
        update, gradient = (
            functools.reduce(lambda tree, key: tree[key], path, tree)
            for tree in (updates, gradients)
        )
        rows = np.prod(update.shape[stacked : stacked + inputs])
        flat_update, flat_gradient = (
            np.asarray(leaf).reshape(-1, rows, np.prod(leaf.shape[stacked + inputs :]))
            for leaf in (update, gradient)
        )
        for one, of in zip(flat_update, flat_gradient, strict=True):
            left, values, right = np.linalg.svd(of, full_matrices=False)
            singular = -left.T @ one @ right.T / (0.2 * np.sqrt(max(one.shape)))
            np.testing.assert_allclose(
                singular, np.diag(np.diag(singular)), atol=0.01, err_msg=str(path)
            )
            # An iteration lifts a small value 3.4 times; one below a hundredth of the norm has not
            # arrived after five.
            assert (np.diag(singular)[values > 0.01 * np.linalg.norm(of)] > 0.65).all() and (
                np.diag(singular) < 1.25
            ).all(), path


@pytest.mark.heavy
def test_muon_leaves_embedding_and_norms_to_adamw():
    params = tiny.variables(CONFIG)["params"]
    muon, adamw = (
        one_step(tiny.train_config(optimizer=name), jax.tree.map(jnp.ones_like, params))
        for name in ("muon", "adamw")
    )
    same = {path for path in muon if muon[path] == pytest.approx(adamw[path], rel=1e-6)}
    assert {
        "embedding",
        "final_norm/scale",
        "layers_1/block_0/attention/latent_norm/scale",
        "layers_1/block_0/canon/taps",
    } <= same
    assert not {path for path in same if path.endswith(("query_up", "router", "down"))}


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(UserError, match=r"train.optimizer = 'adam': must be one of adamw, muon"):
        tiny.train_config(optimizer="adam")
