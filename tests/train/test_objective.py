"""A term's gradient is over one global weight: however the batch is cut, padded or filled up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.segments import same_segment
from tests import tiny
from tests.tiny import T
from train.objective import language_objective, split_microbatches, target_weights
from train.state import TrainState
from train.step import loss_and_gradient

CONFIG = tiny.model_config()
# Four ragged rows, then four of which the odd ones are padding: two microbatches have
# the rows 0, 2, 4, 6 / 1, 3, 5, 7, and four the rows 0, 4 / 1, 5 / ...
BATCH = tiny.batch_of((*tiny.LAYOUT, ((1, 24),), ((0, 24),), ((1, 2), (0, 22)), ((0, 24),)))
# Gradients here are of size 1e-2 to 1: float32 sums of hundreds of terms, in another order in
# microbatches (2e-6 was seen, of a largest of 0.65).
ROUNDING = {"rtol": 2e-5, "atol": 4e-6}


def train_config(stage):
    return tiny.train_config(stage=stage)


@functools.cache
def compiled(stage: str, microbatches: int, config=CONFIG, train=None):
    objective = language_objective(config, train or train_config(stage))

    @jax.jit
    def run(params, router, batch):
        count = jnp.zeros((), jnp.int32)
        state = TrainState(count, params, router, (), skipped=count, skipped_in_row=count)
        gradients, means, totals = loss_and_gradient(
            objective, jax.tree.map(lambda _: True, params), state, batch, microbatches
        )
        return {"gradients": gradients, "means": means, "counts": totals.counts_LE}

    return run


def run(program, variables, batch=BATCH):
    return program(variables["params"], variables["router"], batch)


def gradient(batch, microbatches=1, stage="sparse"):
    return run(compiled(stage, microbatches), tiny.variables(CONFIG), batch)


def only(rows):
    return tiny.without_rows(BATCH, rows)


def test_target_weights_by_hand():
    """Two segments and padding. What the last of a segment would predict is another document."""
    batch = {
        "segments": jnp.asarray([[1, 1, 1, 2, 2, 0]]),
        "weights": jnp.asarray([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]),
    }
    np.testing.assert_array_equal(target_weights(batch, 1), [[2, 3, 0, 5, 0, 0]])
    np.testing.assert_array_equal(target_weights(batch, 2), [[3, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(target_weights(batch, 3), np.zeros((1, 6)))


@pytest.mark.heavy
def test_losses_by_hand():
    """lm and mtp_1 from the model's logits: position t predicts token t + 1, and the MTP module,
    which has read t + 1, token t + 2.
    """
    found = gradient(BATCH)
    outputs = tiny.forward(CONFIG, tiny.variables(CONFIG), BATCH, "sparse")
    tokens_BT, weights_BT, segments_BT = (
        np.asarray(BATCH[name]) for name in ("tokens", "weights", "segments")
    )
    for name, logits_BTV, ahead in (
        ("lm", outputs["logits_BTV"], 1),
        ("mtp_1", outputs["mtp_BTV"][0], 2),
    ):
        logprobs_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
        total = weight = 0.0
        for b, t in np.ndindex(tokens_BT.shape[0], T - ahead):
            if segments_BT[b, t] and segments_BT[b, t] == segments_BT[b, t + ahead]:
                weight += weights_BT[b, t + ahead]
                total -= weights_BT[b, t + ahead] * logprobs_BTV[b, t, tokens_BT[b, t + ahead]]
        assert float(found["means"][name].weight) == weight
        # A float32 sum of 100 terms.
        assert float(found["means"][name].total) == pytest.approx(total, rel=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_gradient_does_not_depend_on_microbatches(microbatches):
    """All terms: lm, MTP, the indexer's KL, balance. Rows and weights are ragged, and one of four
    microbatches has padding rows only.
    """
    batch = (
        BATCH
        if microbatches == 2
        else jax.tree.map(lambda x: x[jnp.asarray([0, 1, 2, 5, 3, 4, 6, 7])], BATCH)
    )
    cut = split_microbatches(batch, microbatches)
    assert microbatches == 2 or not jnp.any(cut["segments"][3]), "rows 5 and 7 are padding"
    tiny.assert_close(gradient(batch, microbatches), gradient(batch), **ROUNDING)


@pytest.mark.heavy
def test_dividing_by_microbatch_would_be_seen():
    """The mistake the objective exists to rule out: each microbatch over its own weights, then
    the mean.
    """
    gradients = [gradient(only(rows))["gradients"] for rows in ((0, 1), (2, 3), (4, 5), (6, 7))]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *gradients)
    whole = gradient(BATCH)["gradients"]
    assert tiny.tree_max(jax.tree.map(jnp.subtract, mean, whole)) > 0.1 * tiny.tree_max(whole)


def test_rows_and_columns_of_padding_change_nothing():
    """The odd half of the batch goes; then the row's padding moves from right to left, and holds
    something else.
    """
    tiny.assert_close(gradient(only((0, 1, 2, 3, 4, 6))), gradient(BATCH), **ROUNDING)
    rolled = tiny.batch_of((*tiny.LAYOUT, ((1, 24),), ((0, 24),), ((0, 22), (1, 2)), ((0, 24),)))
    moved = rolled | {
        name: rolled[name].at[6, -2:].set(BATCH[name][6, :2]) for name in ("tokens", "weights")
    }
    tiny.assert_close(gradient(moved), gradient(BATCH), **ROUNDING)


def minimised(stage: str, **changes) -> dict[str, float | None]:
    """Returns the coefficients of the terms that the loss has."""
    terms = language_objective(CONFIG, tiny.train_config(stage=stage, **changes)).terms
    return {term.name: term.coefficient for term in terms if term.coefficient is not None}


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_a_stage_that_trains_the_model_minimises_its_terms_by_their_weights(stage):
    weights = {"balance_weight": 0.5, "mtp_weight": 0.3, "indexer_weight": 0.25}
    found = minimised(stage, **weights, layer_losses="mean")
    assert (found["lm"], found["mtp_1"], found["balance"]) == (1.0, 0.3, 0.5)
    assert found.get("indexer_kl") == (0.25 if stage == "sparse" else None)


def test_the_warmup_minimises_the_indexer_s_loss_alone():
    """Everything else, the recall included, is reported only."""
    found = minimised("warmup", indexer_weight=0.25, layer_losses="mean")
    assert found == {"indexer_kl": 0.25}


def test_the_losses_of_layers_are_added_over_those_that_have_them():
    """As DeepSeek's code adds them: the layers with experts, or an indexer, and the MTP module."""
    assert (len(CONFIG.kinds), CONFIG.moe_layers, CONFIG.num_nextn_predict_layers) == (3, 2, 1)
    found = minimised("sparse", balance_weight=0.5, indexer_weight=0.25)
    assert (found["balance"], found["indexer_kl"]) == (0.5 * 3, 0.25 * 4)
    without_mtp = minimised("sparse", balance_weight=0.5, indexer_weight=0.25, mtp_weight=0.0)
    assert (without_mtp["balance"], without_mtp["indexer_kl"]) == (0.5 * 2, 0.25 * 3)


def test_the_loss_is_the_sum_of_its_terms_by_their_coefficients():
    objective = language_objective(CONFIG, train_config("sparse"))
    means = gradient(BATCH)["means"]
    assert set(means) == {term.name for term in objective.terms}
    expected = sum(
        term.coefficient * float(means[term.name].value)
        for term in objective.terms
        if term.coefficient is not None
    )
    assert float(objective.loss(means)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.heavy
def test_mtp_modules_without_weight_are_not_there():
    """No loss, no gradient, and no balance or indexer loss of their own: the step is that of a
    model without them.
    """
    train, without = (
        tiny.train_config(stage="sparse", mtp_weight=0.0),
        tiny.model_config(num_nextn_predict_layers=0),
    )
    variables = tiny.variables(CONFIG)
    unused = run(compiled("sparse", 1, CONFIG, train), variables)
    main = {
        kind: {name: value for name, value in tree.items() if not name.startswith("mtp_")}
        for kind, tree in variables.items()
    }
    expected = run(compiled("sparse", 1, without), main)
    for name in [name for name in unused["gradients"] if name.startswith("mtp_")]:
        assert tiny.tree_max(unused["gradients"].pop(name)) == 0
    tiny.assert_close(unused, expected, **ROUNDING)
    assert "mtp_1" not in unused["means"] and "mtp_1" in gradient(BATCH)["means"]


@pytest.mark.heavy
def test_reports_are_means():
    """Perfect balance is 1, and a share of attention mass is at most 1: so their weights count
    what their totals do. In the warm-up, which alone has a recall.
    """
    found = gradient(BATCH, stage="warmup")
    means = {name: float(mean.value) for name, mean in found["means"].items()}
    assert 0.9 < means["balance"] < 2
    assert 0 < means["indexer_recall_random"] < 1 and 0 < means["indexer_recall"] < 1
    candidates = np.asarray(BATCH["positions"] + 1)[np.asarray(BATCH["segments"]) > 0]
    with_next = np.asarray(same_segment(BATCH["segments"], 1))
    # The main layers, and the MTP module.
    counted = [(candidates, 3), (np.asarray(BATCH["positions"] + 1)[with_next], 1)]
    over = [(c[c > 4], layers) for c, layers in counted]
    assert float(found["means"]["indexer_recall"].weight) == sum(
        len(c) * layers for c, layers in over
    )
    assert float(found["means"]["indexer_recall_random"].total) == pytest.approx(
        sum((4 / c).sum() * layers for c, layers in over), rel=1e-5
    )
