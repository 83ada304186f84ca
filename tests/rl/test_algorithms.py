"""The rows of the table: by hand, however a batch is laid out and cut, and by string."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from rl.algorithms import surrogates
from rl.algorithms.row import Algorithm
from rl.algorithms.spec import FUNCTIONS, get_algorithm, get_row
from rl.algorithms.table import ROWS
from rl.algorithms.tokens import NEEDS
from rl.objective import policy_totals, predicted, tokens_of
from tests.rl.losses import (
    LIVE,
    batch_of,
    loss_and_gradient,
    loss_of,
    paid_of,
    signals,
    weights_of,
)

ROUNDING = 3e-7  # absolute: a few float32 roundings of terms of size 1

# One prompt, two completions: "right" of two tokens, "wrong" of one. Rewards 1 and 0.
#   ratios                      1.5, 1.0   |  1.25
#   GRPO advantages             +-0.5 / (sqrt(0.5) + 1e-6) = +-a, a = 0.70710578
#   Dr.GRPO advantages         +-0.5
HAND = {
    "old": np.log([[0.4, 0.5], [0.4, 1.0]]),
    "logprobs": np.log([[0.6, 0.5], [0.5, 1.0]]),
    "reference": np.log([[0.3, 0.5], [0.5, 1.0]]),
    "mask": [[1, 1], [1, 0]],
    "rewards": [1.0, 0.0],
    "group": [0, 0],
}
A = 0.70710578


def hand(spec: str, max_completion: int):
    algorithm = get_algorithm(spec, max_completion=max_completion)
    value, slope_BT = loss_and_gradient(
        algorithm, signals(algorithm, batch_of(HAND), paid_of(HAND))
    )
    return value, slope_BT[:, 1:]


def test_grpo_by_hand():
    """Surrogates 1.2 a (clipped), a, and -1.25 a. k3 of the first token, where reference / policy
    is 1/2, is 1/2 + log 2 - 1 with slope 1 - 1/2; others 0.
    """
    value, slope_BT = hand("grpo", max_completion=9)
    surrogate = ((1.2 * A + A) / 2 - 1.25 * A) / 2
    divergence = ((0.19314718 + 0) / 2 + 0) / 2
    assert float(value) == pytest.approx(-surrogate + 0.04 * divergence, abs=ROUNDING)
    expected_BT = [[0 + 0.04 * 0.5 / 4, -1.0 * A / 4], [1.25 * A / 2, 0]]
    np.testing.assert_allclose(slope_BT, expected_BT, atol=ROUNDING)


def test_dr_grpo_by_hand():
    """Surrogates 0.6 (clipped), 0.5 and -0.625, all over a longest completion of 4, over two rows.
    No KL.
    """
    value, slope_BT = hand("dr_grpo", max_completion=4)
    assert float(value) == pytest.approx(-(0.6 + 0.5 - 0.625) / 4 / 2, abs=ROUNDING)
    np.testing.assert_allclose(slope_BT, [[0, -0.5 / 8], [0.625 / 8, 0]], atol=ROUNDING)


def test_deepseek_v32_by_hand():
    """Advantages +-1/2, means over lengths of 2 and 1; of the wrong completion log pi_old - log pi
    is log 0.8 < 0, so it stays; with what drifted the other way it is dropped, its KL is not.
    """
    value, slope_BT = hand("deepseek_v32", max_completion=4)
    assert float(value) == pytest.approx(-((0.6 + 0.5) / 2 - 0.625) / 2, abs=ROUNDING)
    drifted = HAND | {"logprobs": np.log([[0.6, 0.5], [0.2, 1.0]])}
    algorithm = get_algorithm("deepseek_v32?kl=0.1", max_completion=4)
    batch = signals(algorithm, batch_of(drifted), paid_of(drifted))
    value, slope_BT = loss_and_gradient(algorithm, batch)
    # r k3: 1.5 (1/2 + log 2 - 1) and 0.5 (2.5 - log 2.5 - 1).
    kl = (1.5 * 0.19314718 / 2 + 0.5 * (1.5 - np.log(2.5))) / 2
    assert float(value) == pytest.approx(-(0.6 + 0.5) / 2 / 2 + 0.1 * kl, abs=ROUNDING)
    # d/dlog pi of r k3 is r (k3 + 1 - exp(-d)), and nothing else of the dropped one.
    slope = 0.5 * (1.5 - np.log(2.5) + 1 - 2.5)
    assert float(slope_BT[1, 1]) == pytest.approx(0.1 * slope / 2, abs=ROUNDING)


B, T = 8, 7


@functools.cache
def inputs() -> dict:
    """Two prompts of four completions each, of many lengths, some far from the old policy."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([7, 3, 1, 5, 2, 6, 4, 7])[:, None]
    old = -rng.exponential(size=(B, T)) - 0.05
    near = {
        "logprobs": np.minimum(old + 0.3 * rng.normal(size=(B, T)), -0.01),
        "sampler": np.minimum(old + 0.2 * rng.normal(size=(B, T)), -0.01),
        "reference": np.minimum(old + 0.4 * rng.normal(size=(B, T)), -0.01),
    }
    return near | {
        "mask": mask,
        "old": old,
        "entropy": rng.exponential(size=(B, T)),
        "old_entropy": 0.5 * rng.exponential(size=(B, T)),
        "old_values": rng.normal(size=(B, T)),
        "tokens": rng.integers(0, 3, size=(B, T)).astype(np.int32),
        "rewards": [[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], rng.random(B)],
        "weights": [1.0, 0.1],
        "greedy": [0.5] * 4 + [0.0] * 4,
        "group": [0] * 4 + [1] * 4,
    }


EVERYTHING = (
    "?kl=0.1&entropy=0.01&dual_clip=3&delta=4&correction=token_truncate&correction_high=1.2"
    "&rejection=sequence_mean_k3&rejection_high=0.03&rejected=removed&old_logprobs=trainer"
)
SPECS = [
    *ROWS,
    "passk?advantage=pass_at_k&k=2",
    "gdpo?whiten=tokens",
    "dapo?selection=low_entropy&entropy_share=0.5",
    "clip_cov?cov_share=0.3&cov_low=0.01",
    "grpo" + EVERYTHING.replace("&old_logprobs=trainer", ""),
    "deepseek_v32" + EVERYTHING,
    "sapo?delta=1.05",
    "gspo?correction=sequence_mask&correction_high=1.5&correction_mean_one=true",
    "reinforce_pp?correction=token_mask&correction_low=0.8&correction_high=1.3",
    "vespo?correction=sequence_truncate&correction_high=1.5",
    "dapo?selection=low_entropy&entropy_share=0.5&entropy=0.1&entropy_mean=token&entropy_of=kept",
    "rloo?ratio=sequence_product&spread=others&correction=geometric_truncate&correction_high=1.1",
    "gdpo?baseline=others&whiten_eps=0&kl=0.1&kl_estimator=unbiased_k1&kl_ratio=own",
    "dppo_tv?sides=both&as_ratio=true&log_square=0.1&advantage=discounted&baseline=zscore",
    "reinforce_pp_baseline?penalty=own&kl_in=reward&kl_estimator=k1&whiten_ddof=0"
    "&rejection=sequence_all_k1&rejection_low=0.7&rejection_high=1.5",
]


def algorithm_of(spec: str) -> Algorithm:
    return get_algorithm(spec, max_completion=T)


@functools.cache
def whole(spec: str):
    """The batch that is learnt from, the loss and its gradient at the tokens [B, 1 + T]."""
    algorithm = algorithm_of(spec)
    batch = signals(algorithm, batch_of(inputs()), paid_of(inputs()))
    return batch, *loss_and_gradient(algorithm, batch)


@pytest.mark.heavy
@pytest.mark.parametrize("spec", SPECS)
def test_a_layout_does_not_matter(spec):
    """Two trajectories in a row, wider rows, a row of padding and absent trajectories, whatever
    stands in them: the loss, and each one's gradient, are those of rows of its own.
    """
    algorithm, (_, value, slope_BT) = algorithm_of(spec), whole(spec)
    plain = batch_of(inputs())
    pairs = np.array([[3, 0], [1, 5], [7, 4], [2, 6]])
    outside = {"trajectory": -1, "group": -1, "versions": -1, "mask": 0, "segments": 0}

    def packed(name: str, x: jax.Array) -> jax.Array:
        first, second = x[pairs[:, 0]], x[pairs[:, 1]]
        second = jnp.where(second > 0, second + 1, 0) if name == "segments" else second
        both = jnp.concatenate([first, second], axis=1)
        return jnp.pad(both, ((0, 1), (0, 3)), constant_values=outside.get(name, 7))

    absent = {"present_N": False, "groups_N": 0}
    paid = {
        name: x
        if name == "weights_M"
        else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2)], constant_values=absent.get(name, 5.0))
        for name, x in paid_of(inputs()).items()
    }
    batch = {name: packed(name, x) for name, x in plain.items()}
    batch = signals(algorithm, batch, paid)
    found, packed_slope_BT = loss_and_gradient(algorithm, batch)
    assert float(found) == pytest.approx(float(value), rel=1e-5, abs=ROUNDING)
    expected = np.concatenate([slope_BT[pairs[:, 0]], slope_BT[pairs[:, 1]]], axis=1)
    expected = np.pad(expected, ((0, 1), (0, 3)))
    np.testing.assert_allclose(packed_slope_BT, expected, rtol=1e-5, atol=ROUNDING)


@pytest.mark.heavy
@pytest.mark.parametrize("spec", SPECS)
def test_microbatches_add_up(spec):
    """Their totals over the weights of the whole: also where a loss couples completions."""
    algorithm, (batch, value, slope_BT) = algorithm_of(spec), whole(spec)
    weights = weights_of(algorithm, batch)

    def loss(rows: slice, logprobs_BT: jax.Array) -> jax.Array:
        part = {name: x[rows] for name, x in batch.items()} | {"logprobs": logprobs_BT}
        live = (predicted(part, name) for name in LIVE)
        totals, _ = policy_totals(algorithm, tokens_of(part, *live), part)
        return loss_of(algorithm, totals, weights)

    found, slopes = 0.0, []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part, slope = jax.value_and_grad(functools.partial(loss, rows))(batch["logprobs"][rows])
        found += float(part)
        slopes.append(slope)
    assert found == pytest.approx(float(value), rel=1e-5, abs=ROUNDING)
    np.testing.assert_allclose(np.concatenate(slopes), slope_BT, rtol=1e-5, atol=ROUNDING)


@pytest.mark.parametrize("spec", SPECS)
def test_something_is_learnt_from_what_was_sampled_and_nothing_else(spec):
    _, value, slope_BT = whole(spec)
    assert np.isfinite(float(value)) and np.isfinite(slope_BT).all()
    mask_BT = np.asarray(batch_of(inputs())["mask"])
    np.testing.assert_array_equal(np.asarray(slope_BT)[~mask_BT], 0)
    assert np.mean(np.asarray(slope_BT)[mask_BT] != 0) > 0.1


# Rows whose gradient at the old policy is a token's advantage, times a weight of the mask alone.
ON_POLICY = [name for name in ROWS if name not in ("m2po", "gtpo_conflict", "kl_cov", "clip_cov")]


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_gradient_is_reinforce(name):
    """At ratio 1 they are all a weighted REINFORCE: nothing is clipped, squared terms are 0."""
    algorithm = get_algorithm(name, max_completion=T, kl_weight=0)
    given = {**inputs(), "logprobs": inputs()["old"], "sampler": inputs()["old"]}
    given["advantages"] = np.array([1.0, -1, 0.5, 2, -0.3, -2, 1, 1])
    batch = signals(algorithm, batch_of(given), paid_of(given))
    _, slope_BT = loss_and_gradient(algorithm, batch)
    tokens = tokens_of(batch, *(predicted(batch, name) for name in LIVE))
    sequences, aggregate = tokens.sequences, algorithm.aggregate
    weights_BT = jax.grad(lambda x: aggregate.total(x, sequences) / aggregate.weight(sequences))(
        jnp.zeros((B, T + 1))
    )
    expected_BT = jnp.pad((-tokens.advantages_BT * weights_BT)[:, :-1], ((0, 0), (1, 0)))
    np.testing.assert_allclose(slope_BT, expected_BT, rtol=1e-5, atol=ROUNDING)


def test_a_step_without_a_difference_learns_nothing():
    """All rewards equal: no row has an advantage, but for one whose teacher speaks."""
    given = {**inputs(), "rewards": np.full((2, B), 0.3), "greedy": np.full(B, 0.33)}
    for spec in sorted(set(SPECS) - {"opd"}):
        algorithm = algorithm_of(spec)
        batch = signals(algorithm, batch_of(given), paid_of(given))
        np.testing.assert_array_equal(batch["advantages"], 0, err_msg=spec)


def test_kl_weight_of_the_config():
    """-1 keeps the row's own; 0 turns it off; a number replaces it, in rows whose paper has none
    too.
    """

    def kl(name: str, weight: float) -> tuple[float, str]:
        options = get_algorithm(name, max_completion=4, kl_weight=weight).options
        return options.kl, options.kl_estimator

    assert kl("grpo", -1) == (0.04, "k3") and kl("grpo", 0)[0] == 0
    assert kl("grpo", 0.1) == (0.1, "k3") and kl("grpo?kl=0.2", -1) == (0.2, "k3")
    assert kl("dr_grpo", -1)[0] == 0 and kl("dr_grpo", 0.1) == (0.1, "unbiased_k3")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_it_is_and_what_it_needs(name):
    """Its options are options of its functions or of every row, and stand in the formula."""
    row, algorithm = ROWS[name], get_algorithm(name, max_completion=4)
    assert row.paper and row.formula and algorithm.needs <= NEEDS.keys()
    again = "&".join(f"{option}={value}" for option, value in row.options.items())
    found = get_algorithm(f"{name}?{again}", max_completion=4)
    assert (found.options, found.needs) == (algorithm.options, algorithm.needs)


def test_an_options_changes_the_function_it_is_of():
    low, high = (get_algorithm(f"dapo?high={high}", max_completion=4) for high in (0.1, 0.9))
    batch = batch_of({**inputs(), "advantages": np.ones(B)})
    values = [loss_and_gradient(a, signals(a, batch, paid_of(inputs())))[0] for a in (low, high)]
    assert values[0] > values[1]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("drgrpo", "reinforce.algorithm = 'drgrpo': did you mean 'dr_grpo'"),
        ("GRPO", "did you mean 'grpo'"),
        ("Dr_GRPO?kl=1", "'Dr_GRPO': did you mean 'dr_grpo'"),
        ("zzz", r"'zzz': .*ppo, grpo, dr_grpo"),
        ("dapo?hihg=0.3", "'dapo.hihg=0.3': no option 'hihg'; did you mean high"),
        ("dapo?tau=0.3", "no option 'tau'"),
        ("dapo?high", "'high' has no value; write high=VALUE"),
        ("dapo?high=a", "high = a: is not of type float"),
        ("dapo?high=nan", "high = nan: must be finite"),
        ("dapo?high=0.3&high=0.4", "high is given twice"),
        ("dapo?surrogate=cipso", "surrogate = 'cipso': no function 'cipso'; did you mean cispo"),
        ("dapo?kl=-1", "kl = -1.0: must be 0 or positive"),
        ("dapo?kl=0.1&kl_in=rewards", "kl_in = 'rewards': must be one of loss, reward"),
        ("dapo?kl=0.1&kl_in=reward", "kl_in = reward: unbiased_k3 is for the loss"),
        ("dapo?dual_clip=0.5", "dual_clip = 0.5: must be above 1"),
        ("cispo?delta=0.5", "delta = 0.5: must be above 1"),
        ("gpg?delta=4", "delta = 4.0: gpg has no ratio that it could bound"),
        ("dapo?correction=tis", "correction = 'tis': must be one of token_truncate"),
        ("deepseek_v32?rejection=token_k3", "add old_logprobs=trainer"),
        ("sapo?tau_positive=0", "must be positive"),
        ("ppo?gamma=2", "gamma must be in"),
        ("nowhere.py:mine", "nowhere.py: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        get_algorithm(spec, max_completion=4)


OWN = """
from rl.algorithms.row import Row
from rl.algorithms.surrogates import Gain

def squared(*, scale: float = 1.0):
    def surrogate(tokens, ratio_BT):
        nowhere_BT = tokens.mask_BT & False
        return Gain(scale * ratio_BT**2 * tokens.advantages_BT, nowhere_BT, nowhere_BT)
    return surrogate

mine = Row("mine, unpublished", "scale r^2 A", surrogate=squared)
broken = Row("mine", "", surrogate=lambda: 1 / 0)
nothing = 3
"""


def test_a_row_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rows.py").write_text(OWN)
    assert get_row("my_rows.py:mine").paper == "mine, unpublished"
    algorithm = get_algorithm("my_rows.py:mine?scale=2&aggregate=token_mean", max_completion=4)
    batch = signals(algorithm, batch_of(HAND), paid_of(HAND))
    value, _ = loss_and_gradient(algorithm, batch)
    assert float(value) == pytest.approx(-2 * A * (1.5**2 + 1 - 1.25**2) / 3, abs=2 * ROUNDING)
    for name, message in (
        ("broken", r"my_rows.py:\d+: ZeroDivisionError"),
        ("nothing", "is a int, not a"),
        ("mini", "did you mean 'mine'"),
    ):
        with pytest.raises(UserError, match=message):
            get_algorithm(f"my_rows.py:{name}", max_completion=4)


def test_a_divisor_is_the_longest_completion_unless_it_is_given():
    for spec, divisor in (("dr_grpo", 16), ("dr_grpo?divisor=3", 3), ("rloo", 1)):
        algorithm = get_algorithm(spec, max_completion=16)
        sequences = tokens_of(
            whole("dapo")[0], jnp.zeros((B, T + 1)), jnp.zeros((B, T + 1))
        ).sequences
        assert float(algorithm.aggregate.share(sequences)) == pytest.approx(1 / divisor)


def test_functions_of_two_columns_share_no_option():
    """So an option in a string is of one function, whatever columns a person combines. The delta
    of every row is one that the clipped surrogate reads for itself.
    """
    import inspect

    by_column = {
        column: {
            parameter
            for function in functions.values()
            for parameter in inspect.signature(function).parameters
        }
        for column, functions in FUNCTIONS.items()
    }
    by_column["every row"] = {field.name for field in dataclasses.fields(
        get_algorithm("grpo", max_completion=4).options)}  # fmt: skip
    names = [name for found in by_column.values() for name in found]
    assert [name for name in set(names) if names.count(name) > 1] == ["delta"]
    assert FUNCTIONS["surrogate"] == surrogates.SURROGATES
