"""A loss over pairs is one over pairs of the global batch, wherever they stand in it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from data.tokenizer_training import bytes_tokenizer
from model.mesh import MeshConfig
from model.sharding import batch_sharding, make_mesh
from tests import tiny
from train.objective import split_microbatches
from train.preference_objective import (
    METRICS,
    REFERENCE,
    pair_count,
    preference_objective,
    scored_by_reference,
)
from train.preferences import get_preference
from train.setup import Setup
from train.state import TrainState, abstract_state, first_state, state_shardings
from train.step import loss_and_gradient

pytestmark = pytest.mark.heavy

CONFIG = tiny.model_config(
    num_hidden_layers=1, first_k_dense_replace=0, vocab_size=64, remat="none"
)
# The balance loss takes a row for a sequence, so where pairs stand matters to it, as in every
# phase that packs; it is tried below.
TRAIN = tiny.train_config(stage="dense", balance_weight=0.0, mtp_weight=0.0)
# Conversations of pairs: (prompt, chosen answer, rejected answer), in tokens.
PAIRS = ((2, 3, 5), (1, 2, 1), (3, 4, 4), (1, 1, 2), (2, 6, 1), (4, 2, 3), (1, 1, 1))
# Pairs of each row, and where its padding is.
LAYOUT = (((0, 1), "right"), ((2,), "left"), ((), "left"), ((3, 4), "right"), ((5,), "right"))
LAYOUT += (((6,), "left"), ((), "right"), ((), "right"))
SPECS = ("dpo?nll=0.5", "orpo?nll_mean=token&nll_of=conversation", "simpo")
# Sums of hundreds of float32 terms in another order; gradients are of size 0.1 to 10.
ROUNDING = {"rtol": 2e-5, "atol": 1e-5}
# As tests/train/test_sharding.py has it: sums inside products are cut too.
ON_MESH = {"rtol": 1e-4, "atol": 1e-5}


def batch_of(layout=LAYOUT, width: int = tiny.T, noise: int = 0) -> dict[str, jax.Array]:
    """The pairs in rows: a conversation has the same tokens in each, padding those of `noise`."""
    padding = np.random.default_rng(noise).integers(0, 64, (len(layout), width))
    batch = {name: np.zeros((len(layout), width), np.int32) for name in ("positions", "segments")}
    batch |= {"tokens": padding.astype(np.int32), "weights": np.zeros(padding.shape, np.float32)}
    for row, (numbers, side) in enumerate(layout):
        spans = [(n, sign) for n in numbers for sign in (1, -1)]
        lengths = [PAIRS[n][0] + PAIRS[n][1 if sign > 0 else 2] for n, sign in spans]
        at = 0 if side == "right" else width - sum(lengths)
        for segment, ((number, sign), length) in enumerate(zip(spans, lengths, strict=True), 1):
            where, prompt = slice(at, at + length), PAIRS[number][0]
            drawn = np.random.default_rng([number, sign + 1]).integers(0, 64, length)
            drawn[:prompt] = np.random.default_rng([number]).integers(0, 64, prompt)
            batch["tokens"][row, where] = drawn
            batch["positions"][row, where] = np.arange(length)
            batch["segments"][row, where] = segment
            batch["weights"][row, at + prompt : at + length] = sign
            at += length
    return {name: jnp.asarray(value) for name, value in batch.items()}


@functools.cache
def reference() -> dict:
    """Parameters other than those that learn."""
    return jax.tree.map(lambda leaf: leaf * 0.9, tiny.variables(CONFIG))


def setup_on(mesh: Mesh) -> Setup:
    return Setup(CONFIG, bytes_tokenizer(), mesh)  # whose tokenizer encodes nothing here


@functools.cache
def setup() -> Setup:
    return setup_on(make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1]))


@functools.cache
def compiled(spec: str, microbatches: int = 1):
    """A function (variables, batch) -> gradients, means and loss."""
    objective = preference_objective(CONFIG, TRAIN, get_preference(spec))

    @jax.jit
    def run(variables, batch):
        count = jnp.zeros((), jnp.int32)
        params, router = variables["params"], variables["router"]
        state = TrainState(count, params, router, (), skipped=count, skipped_in_row=count)
        mask = jax.tree.map(lambda _: True, params)
        gradients, means, _ = loss_and_gradient(objective, mask, state, batch, microbatches)
        return {"gradients": gradients, "means": means, "loss": objective.loss(means)}

    return run


@functools.cache
def scorer(microbatches: int):
    train = dataclasses.replace(TRAIN, microbatches=microbatches)
    return scored_by_reference(setup(), train, reference())


def scored(batch: dict, microbatches: int = 1) -> dict:
    return scorer(microbatches)(batch)


def result(spec: str, batch: dict, microbatches: int = 1) -> dict:
    return compiled(spec, microbatches)(tiny.variables(CONFIG), scored(batch, microbatches))


def test_pairs_are_counted():
    assert float(pair_count(batch_of())) == len(PAIRS)
    cut = split_microbatches(batch_of(), 4)
    counts = [float(pair_count(jax.tree.map(lambda x, m=m: x[m], cut))) for m in range(4)]
    assert sum(counts) == len(PAIRS) and 0 in counts, counts


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("microbatches", [4])
def test_loss_and_gradient_do_not_depend_on_microbatches(spec, microbatches):
    """Nor do the reference's log-probs; one of four microbatches has no pair."""
    found, expected = result(spec, batch_of(), microbatches), result(spec, batch_of())
    tiny.assert_close(found, expected, **ROUNDING)
    gradients = tiny.tree_max(expected["gradients"])
    assert gradients > 0.05, "there is something to compare"


@pytest.mark.parametrize("spec", SPECS)
def test_loss_and_gradient_do_not_depend_on_packing_or_padding(spec):
    """Other rows, neighbours, order and padding, whose tokens are others too."""
    layout = (((4,), "left"), ((6, 3), "right"), ((5,), "left"), ((), "right"))
    layout += (((2,), "right"), ((1, 0), "left"), ((), "left"), ((), "right"))
    found, expected = (result(spec, batch) for batch in (batch_of(layout, noise=1), batch_of()))
    for each in (found, expected):
        del each["means"]["balance"]  # of a row, and without a coefficient here
    tiny.assert_close(found, expected, **ROUNDING)


def test_a_mean_over_microbatches_would_be_seen():
    """Each microbatch over its own pairs: the mistake that the objective rules out."""
    rows = [((0, 4), (1, 5)), ((2, 6), (3, 7))]
    losses = []
    for half in rows:
        keep = [row for pair in half for row in pair]
        batch = jax.tree.map(lambda x, keep=keep: x[jnp.asarray(keep)], batch_of())
        alone = compiled("simpo")(tiny.variables(CONFIG), scored(batch))
        losses.append(float(alone["means"]["preference_loss"].value))
    whole = float(result("simpo", batch_of())["means"]["preference_loss"].value)
    assert abs(sum(losses) / 2 - whole) > 1e-3 * abs(whole)


def test_the_terms_are_what_each_loss_says():
    """By hand from the model's log-probs, the reference's too."""
    batch = scored(batch_of())
    logits_BTV = {
        name: tiny.forward(CONFIG, variables, batch, "dense")["logits_BTV"]
        for name, variables in (("policy", tiny.variables(CONFIG)), ("reference", reference()))
    }
    sums = {name: {} for name in logits_BTV}
    for name, values_BTV in logits_BTV.items():
        logprobs_BTV = np.asarray(jax.nn.log_softmax(values_BTV))
        for row, t in np.argwhere(np.asarray(batch["weights"]) != 0):
            pair = row, (int(batch["segments"][row, t]) + 1) // 2
            side = float(batch["weights"][row, t])
            token = logprobs_BTV[row, t - 1, int(batch["tokens"][row, t])]
            sums[name].setdefault((pair, side), []).append(token)
    pairs = sorted({pair for pair, _ in sums["policy"]})
    assert len(pairs) == len(PAIRS)
    ratios = [
        [sum(sums["policy"][p, side]) - sum(sums["reference"][p, side]) for side in (1, -1)]
        for p in pairs
    ]
    found = {
        name: float(mean.value) for name, mean in result("dpo?nll=0.5", batch)["means"].items()
    }
    h = np.asarray([chosen - rejected for chosen, rejected in ratios])
    assert found["preference_loss"] == pytest.approx(np.log1p(np.exp(-0.1 * h)).mean(), rel=1e-5)
    assert found["rewards/margins"] == pytest.approx(0.1 * h.mean(), rel=1e-4)
    assert found["rewards/accuracies"] == pytest.approx((h > 0).mean())
    assert 0 < found["rewards/accuracies"] < 1
    means = [np.mean(sums["policy"][p, 1]) for p in pairs]
    assert found["nll_loss"] == pytest.approx(-np.mean(means), rel=1e-5)
    assert set(METRICS) < set(found)


def test_a_policy_that_is_its_reference_has_a_loss_of_log_2():
    batch = scored_by_reference(setup(), TRAIN, tiny.variables(CONFIG))(batch_of())
    assert REFERENCE in batch
    found = compiled("dpo?nll=0.5")(tiny.variables(CONFIG), batch)
    # Log-probs by two programs, sums of them of size 20, times beta.
    assert float(found["means"]["preference_loss"].value) == pytest.approx(np.log(2), abs=1e-5)
    assert scored_by_reference(setup(), TRAIN, None)(batch) is batch


@pytest.mark.mesh
def test_eight_devices_compute_what_one_does():
    """A row a device, of which some have no pair; the reference is scored there too."""
    spec = "dpo?nll=0.5"
    expected = jax.device_get(result(spec, batch_of()))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2, tensor=1))
    where = state_shardings(abstract_state(CONFIG, optax.identity(), mesh))

    def placed(variables: dict) -> dict:
        state = jax.device_get(first_state(variables, optax.identity()))
        return jax.tree.map(jax.device_put, state, where).variables

    with jax.set_mesh(mesh):
        batch = jax.device_put(batch_of(), batch_sharding(mesh))
        batch = scored_by_reference(setup_on(mesh), TRAIN, placed(reference()))(batch)
        assert batch[REFERENCE].sharding.is_equivalent_to(batch_sharding(mesh), 2)
        found = compiled(spec)(placed(tiny.variables(CONFIG)), batch)
    tiny.assert_close(jax.device_get(found), expected, **ON_MESH)
