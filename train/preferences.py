"""Losses over pairs of answers, of which one is preferred: the table of `finetune.loss`.

A row is a function of its options. It returns a `Preference`: what the loss of a pair is, of the
log-probs of its two answers, and whether a reference is needed and the chosen answer imitated too.

    y_w, y_l       the answer that is chosen, and the one that is rejected
    log pi(y|x)    the sum of the log-probs of an answer's tokens; |y| is their number
    sigma          the logistic function; -log sigma(z) is softplus(-z)

Where a paper and TRL (1.16) differ, an option names the convention, and the paper's is the default.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from data.options import option_value, split_options, unknown
from errors import UserError
from train.config import NEXT_TOKEN

# No mean log-prob is closer to 0 than this, the float32 next to 1: the odds of what is certain
# would be infinite.
LEAST_SURPRISE = 2.0**-24

FORMS = ("sigmoid", "hinge", "ipo")
LOGPS = ("sum", "mean")
NLL_MEANS = ("pair", "token")
NLL_OF = ("answer", "conversation")


@flax.struct.dataclass
class Answers:
    """One answer of each pair, the chosen or the rejected one; float32 arrays of one shape.

    Attributes:
      logprobs: log pi(y|x).
      lengths: |y|, at least 1.
      reference: log pi_ref(y|x); zeros where nothing is compared with a reference.
    """

    logprobs: Array
    lengths: Array
    reference: Array

    @property
    def mean(self) -> Array:
        """The mean log-prob of a token, log pi(y|x) / |y|."""
        return self.logprobs / self.lengths

    @property
    def log_ratio(self) -> Array:
        """How much likelier an answer has become: log pi(y|x) - log pi_ref(y|x)."""
        return self.logprobs - self.reference


class Compared(NamedTuple):
    """What comes of comparing the two answers of each pair; arrays of the shape of theirs.

    loss: of a pair.
    rewards: of the chosen and of the rejected answer, as TRL logs them.
    logps: their log-probs as TRL logs them, as sums or means.
    metrics: what else TRL logs, by name.
    """

    loss: Array
    rewards: tuple[Array, Array]
    logps: tuple[Array, Array]
    metrics: Mapping[str, Array] = {}


@dataclasses.dataclass(frozen=True)
class Preference:
    """A row with its options.

    Attributes:
      compare: (chosen, rejected) -> Compared.
      coefficient: of the mean of `Compared.loss` over pairs.
      nll: coefficient of the negative log-likelihood of what is chosen; 0 for none.
      nll_mean: "pair", the mean over pairs of the mean over tokens | "token", over all tokens.
      nll_of: "answer", its targets | "conversation", the prompt too.
      needs_reference: whether `Answers.reference` is read.
      metrics: the names of `Compared.metrics`.
    """

    compare: Callable[[Answers, Answers], Compared]
    coefficient: float = 1.0
    nll: float = 0.0
    nll_mean: str = "pair"
    nll_of: str = "answer"
    needs_reference: bool = False
    metrics: tuple[str, ...] = ()

    def __post_init__(self):
        """Raises UserError where the options of the likelihood are none."""
        _check(self.nll >= 0, "nll", self.nll, "must not be negative")
        _check_one_of("nll_mean", self.nll_mean, NLL_MEANS)
        _check_one_of("nll_of", self.nll_of, NLL_OF)
        for option, default in (("nll_mean", NLL_MEANS[0]), ("nll_of", NLL_OF[0])):
            value = getattr(self, option)
            rule = "says how nll is taken, and nll = 0 takes none; add nll=1"
            _check(self.nll > 0 or value == default, option, value, rule)


def dpo(
    *,
    beta: float = 0.1,
    form: str = "sigmoid",
    label_smoothing: float = 0.0,
    logps: str = "sum",
    nll: float = 0.0,
    nll_mean: str = "pair",
    nll_of: str = "answer",
) -> Preference:
    """Direct preference optimization (arXiv 2305.18290, eq. 7), and others of its log-ratios.

        h = log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)

        sigmoid   -log sigma(beta h)                eq. 7
        hinge     max(0, 1 - beta h)                SLiC (2305.10425) as in RSO (2309.06657)
        ipo       (h - 1 / (2 beta))^2              IPO (2310.12036, eq. 17), whose tau is beta

    Args:
      beta: how strongly the reference holds the policy back.
      form: "sigmoid" | "hinge" | "ipo".
      label_smoothing: how likely a label of "sigmoid" is wrong, epsilon of conservative DPO:
        -(1 - epsilon) log sigma(beta h) - epsilon log sigma(-beta h).
      logps: "sum", as the papers write | "mean": each log-ratio over its answer's length, as TRL
        has it in "ipo", and calls "sigmoid" with it "sigmoid_norm".
      nll: coefficient of the likelihood of what is chosen (iterative RPO, 2404.19733, eq. 1 and 2).
      nll_mean: of RPO "pair"; TRL's "sft" has "token".
      nll_of: "answer", as both have it | "conversation".
    """
    _check(beta > 0, "beta", beta, "must be positive")
    _check_one_of("form", form, FORMS)
    _check_one_of("logps", logps, LOGPS)
    _check_smoothing(label_smoothing)
    rule = 'is of form = "sigmoid" alone'
    _check(form == "sigmoid" or not label_smoothing, "label_smoothing", label_smoothing, rule)

    def compare(chosen: Answers, rejected: Answers) -> Compared:
        ratios = chosen.log_ratio, rejected.log_ratio
        if logps == "mean":
            h = ratios[0] / chosen.lengths - ratios[1] / rejected.lengths
        else:
            h = ratios[0] - ratios[1]
        if form == "sigmoid":
            loss = _smoothed(beta * h, label_smoothing)
        elif form == "hinge":
            loss = jax.nn.relu(1 - beta * h)
        else:
            loss = jnp.square(h - 1 / (2 * beta))
        rewards = beta * ratios[0], beta * ratios[1]
        return Compared(loss, rewards, (chosen.logprobs, rejected.logprobs))

    return Preference(compare, nll=nll, nll_mean=nll_mean, nll_of=nll_of, needs_reference=True)


def orpo(*, weight: float = 0.1, nll_mean: str = "pair", nll_of: str = "answer") -> Preference:
    """Odds ratio preference optimization (arXiv 2403.07691, eq. 6 and 7).

        L = -log P(y_w|x) - lambda log sigma(log odds(y_w|x) / odds(y_l|x))

    with odds = P / (1 - P) and P of an answer the geometric mean of its tokens' probabilities, so
    that log P is a mean of log-probs.

    Args:
      weight: lambda; TRL's `beta`.
      nll_mean: of the paper "pair"; TRL has "token".
      nll_of: of the paper "answer"; TRL has "conversation".
    """
    _check(weight > 0, "weight", weight, "must be positive")

    def compare(chosen: Answers, rejected: Answers) -> Compared:
        log_odds = _log_odds(chosen.mean) - _log_odds(rejected.mean)
        loss = jax.nn.softplus(-log_odds)
        rewards = weight * chosen.mean, weight * rejected.mean
        metrics = {"log_odds_ratio": -loss, "log_odds_chosen": log_odds}
        return Compared(loss, rewards, (chosen.mean, rejected.mean), metrics)

    names = "log_odds_ratio", "log_odds_chosen"
    return Preference(
        compare, coefficient=weight, nll=1.0, nll_mean=nll_mean, nll_of=nll_of, metrics=names
    )


def simpo(
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    nll: float = 0.0,
    nll_mean: str = "pair",
    nll_of: str = "answer",
) -> Preference:
    """Simple preference optimization, without a reference (arXiv 2405.14734, eq. 6).

        -log sigma(beta / |y_w| log pi(y_w|x) - beta / |y_l| log pi(y_l|x) - gamma)

    Args:
      beta: factor of the mean log-probs, which are the rewards. The paper has 2 to 2.5.
      gamma: by how much the rewards should differ, itself and not over beta: as `simpo_gamma` of
        TRL, and beta times `gamma_beta_ratio` of the authors' code. The defaults are the paper's
        for Llama 3 8B, base.
      label_smoothing: as of `dpo`; TRL has it, the paper does not.
      nll: coefficient of the likelihood of what is chosen; TRL's `cpo_alpha`, the paper has none.
      nll_mean: "pair"; TRL has "token".
      nll_of: "answer"; TRL's `CPOTrainer` has it so too.
    """
    _check(beta > 0, "beta", beta, "must be positive")
    _check(gamma >= 0, "gamma", gamma, "must not be negative")
    _check_smoothing(label_smoothing)

    def compare(chosen: Answers, rejected: Answers) -> Compared:
        rewards = beta * chosen.mean, beta * rejected.mean
        loss = _smoothed(rewards[0] - rewards[1] - gamma, label_smoothing)
        return Compared(loss, rewards, (chosen.mean, rejected.mean))

    return Preference(compare, nll=nll, nll_mean=nll_mean, nll_of=nll_of)


ROWS: dict[str, Callable[..., Preference]] = {"dpo": dpo, "orpo": orpo, "simpo": simpo}


@functools.cache
def get_preference(spec: str) -> Preference:
    """Returns the row that a string names, with its options: "ROW" or "ROW?option=value&...".

    Raises UserError if there is no such row or option, or a value is refused.
    """
    name, _, query = spec.partition("?")
    try:
        if name not in ROWS:
            raise UserError(unknown(name, (NEXT_TOKEN, *ROWS), "loss"))
        known = {
            option: type(parameter.default)
            for option, parameter in inspect.signature(ROWS[name]).parameters.items()
        }
        values = {}
        for option, text in split_options(query).items():
            if option not in known:
                raise UserError(unknown(option, known))
            values[option] = option_value(option, text, known[option])
        return ROWS[name](**values)
    except UserError as error:
        raise UserError(f"finetune.loss = {spec!r}: {error}") from error


def _smoothed(margin: Array, label_smoothing: float) -> Array:
    """Returns -(1 - epsilon) log sigma(margin) - epsilon log sigma(-margin)."""
    loss = (1 - label_smoothing) * jax.nn.softplus(-margin)
    return loss + label_smoothing * jax.nn.softplus(margin) if label_smoothing else loss


def _log_odds(logprob: Array) -> Array:
    """Returns log(P / (1 - P)) of log P below 0, exact where P is near 0 and where it is near 1."""
    logprob = jnp.minimum(logprob, -LEAST_SURPRISE)
    near_1 = logprob > -jnp.log(2.0)
    # Each is given what it is exact for: of what is not selected the gradient must be finite too.
    log_rest = jnp.where(
        near_1,
        jnp.log(-jnp.expm1(jnp.where(near_1, logprob, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_1, -1.0, logprob))),
    )
    return logprob - log_rest


def _check(holds: bool, option: str, value: object, rule: str) -> None:
    if not holds:
        raise UserError(f"{option} = {value}: {rule}")


def _check_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, option, value, f"must be one of {', '.join(allowed)}")


def _check_smoothing(value: float) -> None:
    rule = "must be at least 0 and below 0.5, where a label would say nothing"
    _check(0 <= value < 0.5, "label_smoothing", value, rule)
