"""Losses over pairs: by hand, and as TRL and OpenRLHF compute them, values and gradients."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from train.preference_objective import (
    likelihood_mask,
    pair_count,
    preference_totals,
)
from train.preferences import ROWS, Answers, get_preference

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "preferences" / "trl.json").read_text())
INPUTS = json.loads((GOLDEN / "algorithms" / "inputs.json").read_text())
# Float32 against float64: roundings of log-probs of size 10 and of a few sums of them, beside the
# largest number of a result. The largest difference is half of this.
RELATIVE = 2e-6


def close(found, expected) -> None:
    expected = np.asarray(expected, np.float64)
    assert np.isfinite(np.asarray(found)).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def answers(logprob: float, length: float = 1.0, reference: float = 0.0) -> Answers:
    return Answers(*(jnp.asarray([x], jnp.float32) for x in (logprob, length, reference)))


def loss_of(spec: str, chosen: Answers, rejected: Answers) -> float:
    return float(get_preference(spec).compare(chosen, rejected).loss[0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # log pi / pi_ref is 3 of the chosen, of 4 tokens, and 1 of the rejected, of 2: h = 2.
        ("dpo?beta=0.5", math.log(1 + math.exp(-1))),
        ("dpo?beta=0.5&label_smoothing=0.25", math.log(1 + math.e) - 0.75),
        ("dpo?beta=0.25&form=hinge", 0.5),
        ("dpo?beta=1.0&form=hinge", 0.0),
        ("dpo?beta=0.5&form=ipo", 1.0),
        # The means are 3/4 and 1/2.
        ("dpo?beta=0.5&form=ipo&logps=mean", 0.75**2),
        ("dpo?beta=4.0&logps=mean", math.log(1 + math.exp(-1))),
        # log pi is -4 and -8, their means -1 and -4.
        ("simpo?beta=2.0&gamma=1.0", math.log(1 + math.exp(-5))),
        ("simpo?beta=1.0&gamma=0.0&label_smoothing=0.1", math.log(1 + math.exp(3)) - 0.9 * 3),
    ],
)
def test_a_pair_by_hand(spec, expected):
    found = loss_of(spec, answers(-4.0, 4, -7.0), answers(-8.0, 2, -9.0))
    assert found == pytest.approx(expected, rel=1e-6)


def test_odds_by_hand():
    """Means of log-probs of log 0.8 and log 0.5: the odds are 4 and 1, their ratio is 4."""
    chosen, rejected = answers(3 * math.log(0.8), 3), answers(2 * math.log(0.5), 2)
    assert loss_of("orpo", chosen, rejected) == pytest.approx(-math.log(0.8), rel=1e-6)
    preference = get_preference("orpo?weight=0.3")
    assert (preference.coefficient, preference.nll) == (0.3, 1.0)


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-7, -1e-3, -0.5, -0.8, -50.0, -1e4])
def test_odds_are_finite_and_have_a_gradient_however_likely_an_answer_is(logprob):
    """Of one that is certain too: a float32 knows no odds above 2 ** 24."""
    preference = get_preference("orpo")

    def loss(*logprobs):
        sides = (Answers(x, jnp.ones(1), jnp.zeros(1)) for x in logprobs)
        return preference.compare(*sides).loss[0]

    at = jnp.asarray([logprob], jnp.float32), jnp.asarray([-1.0], jnp.float32)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(*at)
    assert np.isfinite(value) and all(np.isfinite(each).all() for each in gradients)
    if -50 <= logprob <= -1e-3:
        log_odds = logprob - math.log(-math.expm1(logprob)) + 1 + math.log(-math.expm1(-1))
        assert float(value) == pytest.approx(math.log1p(math.exp(-log_odds)), rel=1e-5)


def packed() -> tuple[dict, list[tuple[int, dict[str, slice]]]]:
    """The recorded pairs, two in a row, with padding; and where each conversation stands."""
    width = 32
    types = {"tokens": np.int32, "segments": np.int32, "weights": np.float32}
    batch: dict = {name: np.zeros((2, width), dtype) for name, dtype in types.items()}
    places = []
    for number, pair in enumerate(RECORDED["pairs"]):
        row, first = divmod(number, 2)
        at, place = 0 if first == 0 else int((batch["segments"][row] > 0).sum()), {}
        for segment, side, sign in ((1, "chosen", 1), (2, "rejected", -1)):
            ids = pair[side]
            place[side] = slice(at, at + len(ids))
            batch["tokens"][row, place[side]] = ids
            batch["segments"][row, place[side]] = 2 * first + segment
            batch["weights"][row, at + pair["prompt"] : at + len(ids)] = sign
            at += len(ids)
        places.append((row, place))
    return {name: jnp.asarray(value) for name, value in batch.items()}, places


BATCH, PLACES = packed()


def scores(name: str) -> jax.Array:
    """The recorded scores of a model where the tokens of the batch stand, [2, T, V]."""
    found = np.zeros((*BATCH["tokens"].shape, 5), np.float32)
    for (row, place), pair in zip(PLACES, RECORDED["pairs"], strict=True):
        for side in place:
            found[row, place[side]] = pair[f"{side}_{name}"]
    return jnp.asarray(found)


def next_logprobs(scores_BTV: jax.Array) -> jax.Array:
    """The log-prob of the next token at each position."""
    next_BT = jnp.pad(BATCH["tokens"][:, 1:], ((0, 0), (0, 1)))
    logprobs_BTV = jax.nn.log_softmax(scores_BTV)
    return jnp.take_along_axis(logprobs_BTV, next_BT[..., None], axis=-1)[..., 0]


def means(spec: str) -> Callable[[jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """A function of scores that gives the loss, and every term over its weight."""
    preference = get_preference(spec)
    reference_BT = jnp.pad(next_logprobs(scores("reference"))[:, :-1], ((0, 0), (1, 0)))
    batch = BATCH | {"reference_logprobs": reference_BT}

    def of(scores_BTV: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        totals = preference_totals(preference, next_logprobs(scores_BTV), batch)
        tokens = jnp.sum(likelihood_mask(preference, batch))
        by_token = preference.nll_mean == "token"
        found = {
            name: total / (tokens if by_token and name == "nll_loss" else pair_count(batch))
            for name, total in totals.items()
        }
        loss = preference.coefficient * found["preference_loss"]
        return loss + preference.nll * found.get("nll_loss", 0.0), found

    return of


@pytest.mark.golden
@pytest.mark.parametrize("spec", RECORDED["cases"])
def test_a_loss_and_its_metrics_are_those_of_trl(spec):
    """From scores of words on: sums over answers, means over pairs, and the gradient of scores."""
    case = RECORDED["cases"][spec]
    of_scores = jax.value_and_grad(means(spec), has_aux=True)
    (loss, found), gradient_BTV = of_scores(scores("policy"))
    close(loss, case["loss"])
    for name, value in case["metrics"].items():
        if name != "nll_loss" or get_preference(spec).nll:
            close(found[name], value)
    largest = max(np.abs(rows).max() for side in case["gradient"].values() for rows in side)
    for number, (row, place) in enumerate(PLACES):
        for side, where in place.items():
            np.testing.assert_allclose(
                gradient_BTV[row, where],
                case["gradient"][side][number],
                rtol=0,
                atol=RELATIVE * largest,
            )


def recorded(name: str) -> list[dict]:
    tables = json.loads((GOLDEN / "algorithms" / f"{name}.json").read_text())
    tables = tables if isinstance(tables, list) else [tables]
    return [case for table in tables for case in table["cases"] if case["kind"] == "pair"]


def spec_of(case: dict) -> str | None:
    """What names a recorded loss over pairs here; None where it is another loss."""
    call = case["call"]
    if call["function"] == "DPOLoss":
        form = "ipo" if call.get("ipo") else "sigmoid"
        return f"dpo?form={form}&label_smoothing={call.get('label_smoothing', 0)}&beta=0.1"
    if call["function"] == "DPOTrainer._compute_loss":
        plain = call["f_divergence_type"] == "reverse_kl" and not call["ld_alpha"]
        rows = {"sigmoid": "sum", "hinge": "sum", "ipo": "mean", "sigmoid_norm": "mean"}
        kind = call["loss_type"][0]
        if len(call["loss_type"]) > 1 or kind not in rows or not plain:
            return None
        form = kind.removesuffix("_norm")
        return f"dpo?form={form}&logps={rows[kind]}&beta={call['beta']}"
    if call["function"] == "CPOTrainer.cpo_loss" and call["loss_type"] in ("simpo", "sigmoid"):
        smoothing = call["label_smoothing"]
        gamma = call["simpo_gamma"]
        return f"simpo?beta={call['beta']}&gamma={gamma}&label_smoothing={smoothing}"
    if call["function"] == "ORPOTrainer.odds_ratio_loss":
        return f"orpo?weight={call['beta']}"
    return None


CASES = [
    (spec, case)
    for case in recorded("trl") + recorded("others")
    if (spec := spec_of(case)) is not None
]


def sums_of(case: dict) -> tuple[Answers, Answers]:
    """The answers of a case's input, chosen and rejected."""
    fields = {name: np.asarray(value) for name, value in INPUTS[case["inputs"]].items()}
    if case["inputs"] == "mixed":
        mask = fields["mask"]
        logprobs, reference = (
            (fields[name] * mask).sum(1) for name in ("logprobs", "reference_logprobs")
        )
        sides = [(x[:4], x[4:]) for x in (logprobs, mask.sum(1), reference)]
    else:
        names = "{}_logps", "{}_lengths", "reference_{}_logps"
        sides = [[fields[name.format(s)] for s in ("chosen", "rejected")] for name in names]
    chosen, rejected = (Answers(*(jnp.float32(x[side]) for x in sides)) for side in (0, 1))
    return chosen, rejected


@pytest.mark.golden
@pytest.mark.parametrize(("spec", "case"), CASES, ids=[case["id"] for _, case in CASES])
def test_a_loss_of_sums_is_what_a_library_has_recorded(spec, case):
    preference, (chosen, rejected) = get_preference(spec), sums_of(case)

    def loss(one, other):
        pair = (
            Answers(x, answer.lengths, answer.reference)
            for x, answer in ((one, chosen), (other, rejected))
        )
        return preference.coefficient * jnp.mean(preference.compare(*pair).loss)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(chosen.logprobs, rejected.logprobs)
    close(value, case["loss"])
    if "gradient" in case:  # of each token of an answer
        of_tokens = np.asarray(case["gradient"])
        mask = np.asarray(INPUTS["mixed"]["mask"])
        close(np.concatenate(gradients)[:, None] * mask, of_tokens)
    else:
        by_mean = "lengths" in case["call"].get("logps", "")
        for found, side, name in zip(
            gradients, (chosen, rejected), ("chosen", "rejected"), strict=True
        ):
            close(found * (side.lengths if by_mean else 1), case[f"gradient_{name}"])


def test_every_recorded_loss_that_a_row_has_is_compared():
    rows = [spec.partition("?")[0] for spec, _ in CASES]
    assert {name: rows.count(name) for name in ROWS} == {"dpo": 11, "orpo": 2, "simpo": 5}


def test_the_likelihood_is_of_answers_by_pair_unless_an_option_says_otherwise():
    """By hand from the log-probs: means of pairs, all tokens alike, and with the prompt."""
    logprobs_BT = np.asarray(next_logprobs(scores("policy")))
    by_pair, tokens, with_prompt = [], [], []
    for (row, place), pair in zip(PLACES, RECORDED["pairs"], strict=True):
        where = place["chosen"]
        of_all = logprobs_BT[row, where.start : where.stop - 1]
        of_answer = of_all[pair["prompt"] - 1 :]
        by_pair.append(of_answer.mean())
        tokens += of_answer.tolist()
        with_prompt += of_all.tolist()
    for options, expected in (
        ("", by_pair),
        ("&nll_mean=token", tokens),
        ("&nll_mean=token&nll_of=conversation", with_prompt),
    ):
        _, found = means(f"dpo?nll=1.0{options}")(scores("policy"))
        assert float(found["nll_loss"]) == pytest.approx(-np.mean(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dop", "finetune.loss = 'dop': no loss 'dop'; did you mean dpo"),
        ("next-token", "did you mean next_token"),
        ("kto", "there are next_token, dpo, orpo, simpo"),
        ("dpo?bta=1", "no option 'bta'; did you mean beta"),
        ("orpo?beta=1", "'orpo.beta=1': no option 'beta'; there are weight, nll_mean, nll_of"),
        ("dpo?beta", "'beta' has no value; write beta=VALUE"),
        ("dpo?beta=x", "beta = x: is not of type float"),
        ("dpo?beta=0", "beta = 0.0: must be positive"),
        ("simpo?gamma=-1", "gamma = -1.0: must not be negative"),
        ("dpo?form=ipoo", "form = ipoo: must be one of sigmoid, hinge, ipo"),
        ("dpo?form=ipo&label_smoothing=0.1", "label_smoothing = 0.1: is of form = .sigmoid. alone"),
        ("dpo?label_smoothing=0.5", "must be at least 0 and below 0.5"),
        ("dpo?nll_mean=token", "nll_mean = token: says how nll is taken, and nll = 0 takes none"),
        ("dpo?nll=-1", "nll = -1.0: must not be negative"),
    ],
)
def test_what_is_wrong_is_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        get_preference(spec)
