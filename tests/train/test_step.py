"""The step, with an objective small enough to work by hand: minimise (w - x)^2 over the rows of a
batch.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.mesh import MeshConfig
from model.sharding import Named, make_mesh
from tests import tiny
from train.objective import Objective, Term, Totals
from train.optimizer import make_optimizer
from train.state import TrainState
from train.step import indexer_norm, jit_evaluation, make_step

# It has no experts, so there is no router to update.
CONFIG = tiny.model_config(first_k_dense_replace=3, num_nextn_predict_layers=0)
TRAIN = tiny.train_config(stage="dense", weight_decay=0.0)


def totals(variables, batch):
    error_B = variables["params"]["w"] - batch["x"]
    terms = {
        "square": jnp.sum(batch["weight"] * error_B**2),
        "bias": jnp.sum(batch["weight"] * error_B),
    }
    maxima, minima = {"below_0": jnp.max(error_B - 5)}, {"above_0": jnp.min(error_B + 5)}
    return Totals(terms, jnp.zeros((3, 4), jnp.int32), maxima, minima)


def weight(batch):
    return jnp.sum(batch["weight"])


OBJECTIVE = Objective((Term("square", weight, coefficient=2.0), Term("bias", weight)), totals)


def fresh(train, objective=OBJECTIVE):
    optimizer = make_optimizer(train, {"w": Named(jnp.zeros(()), ())})
    params = {"w": jnp.asarray(1.0)}
    count = jnp.zeros((), jnp.int32)
    return TrainState(count, params, {}, optimizer.init(params), count, count), jax.jit(
        make_step(CONFIG, train, objective, optimizer)
    )


def batch(*x):
    return {"x": jnp.asarray(x, jnp.float32), "weight": jnp.arange(len(x), dtype=jnp.float32)}


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_metrics_are_over_the_global_batch(microbatches):
    """Weights 0, 1, 2, 3 and errors 1, 0, -1, -2: square (0 + 2 + 12) / 6, bias (0 - 2 - 6) / 6,
    loss twice the square. Of four microbatches the first weighs 0.
    """
    state, step = fresh(tiny.train_config(stage="dense", microbatches=microbatches))
    state, metrics = step(state, batch(0, 1, 2, 3))
    expected = {
        "square": 14 / 6,
        "bias": -8 / 6,
        "loss": 28 / 6,
        "below_0": -4.0,
        "above_0": 3.0,
        "grad_norm": 4 * 8 / 6,
        "learning_rate": 0.5e-2,
        "skipped": 0,
    }
    chex.assert_trees_all_close(
        {name: float(metrics[name]) for name in expected}, expected, rtol=1e-6
    )
    assert int(state.step) == 1


def test_the_norm_of_indexers_is_over_all_of_theirs_and_nothing_else():
    """Of a layer's and of an MTP module's: 3, 4 and 12."""
    other = jnp.full(5, 100.0)
    gradients = {
        "layers_0": {"indexer": {"key": jnp.asarray(3.0), "query": jnp.asarray([4.0])}},
        "mtp_0": {"attention": {"indexer": {"key": jnp.asarray([[0.0, 12.0]])}, "out": other}},
        "indexer_of_books": other,
    }
    assert float(indexer_norm(gradients)) == 13
    assert float(indexer_norm({"embedding": other})) == 0


def test_a_step_without_finite_gradients_changes_its_counters_alone():
    state, step = fresh(TRAIN)
    state, _ = step(state, batch(0, 1, 2, 3))
    for bad in (np.nan, np.inf, -np.inf):
        before = state
        state, metrics = step(state, batch(0, 1, 2, bad))
        chex.assert_trees_all_equal(
            (state.params, state.opt_state, state.router),
            (before.params, before.opt_state, before.router),
        )
        assert (
            int(state.step) == int(before.step) + 1
            and int(state.skipped_in_row) == int(before.skipped_in_row) + 1
        )
    assert int(metrics["skipped"]) == 3 and int(metrics["skipped_in_row"]) == 3
    after, metrics = step(state, batch(0, 1, 2, 3))
    assert int(after.skipped) == 3 and int(after.skipped_in_row) == 0
    assert float(after.params["w"]) != float(state.params["w"])


def test_a_step_without_a_signal_changes_its_counters_alone():
    """With moments, decay and a gradient; and it is no sign that gradients are finite again."""
    signal = dataclasses.replace(OBJECTIVE, signal=lambda batch: jnp.any(batch["weight"] > 2))
    state, step = fresh(tiny.train_config(stage="dense", weight_decay=0.1), signal)
    state, _ = step(state, batch(0, 1, 2, 3))
    state, _ = step(state, batch(0, 1, 2, np.nan))
    after, metrics = step(state, batch(0, 1, 2))
    assert float(metrics["grad_norm"]) > 0
    chex.assert_trees_all_equal(
        (after.params, after.opt_state, after.router), (state.params, state.opt_state, state.router)
    )
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (3, 2, 1)
    moved, _ = step(after, batch(0, 1, 2, 3))
    assert (int(moved.step), int(moved.skipped), int(moved.skipped_in_row)) == (4, 2, 0)
    assert float(moved.params["w"]) != float(after.params["w"])


def test_the_reported_learning_rate_is_the_one_applied():
    """A skipped step does not move the schedule, so it must not move the report of it. Adam's first
    step is the learning rate itself.
    """
    state, step = fresh(TRAIN)
    state, _ = step(state, batch(0, 1, 2, np.nan))
    after, metrics = step(state, batch(0, 1, 2, 3))
    assert float(after.params["w"] - state.params["w"]) == pytest.approx(
        float(metrics["learning_rate"]), rel=1e-4
    )


def test_evaluation_adds_up():
    evaluate = jit_evaluation(OBJECTIVE, make_mesh(MeshConfig()))
    found = [
        evaluate({"params": {"w": jnp.asarray(1.0)}}, part)
        for part in (batch(0, 1, 2, 3), batch(5, 5))
    ]
    square = found[0]["square"] + found[1]["square"]
    assert float(square.total) == 14 + 16 and float(square.weight) == 7
