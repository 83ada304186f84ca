"""What may be added to any row: terms of the loss, bounds of the ratio, corrections, penalties."""

import dataclasses
import math

from errors import UserError
from rl.algorithms.corrections import CORRECTIONS, REJECTIONS
from rl.algorithms.divergences import ESTIMATORS


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that every row has. A value of 0, or "", leaves out what it is of.

    Attributes:
      kl: coefficient of the divergence from the reference.
      kl_estimator: of rl/algorithms/divergences.py.
      kl_in: the divergence is added to the "loss", or taken from the "reward" of each token.
      kl_ratio: the ratio of an unbiased estimator is the "token"'s, or that of the "row", or is to
        the "sampler", or is 1 with the gradient of log pi: "own".
      kl_log_clamp, kl_clamp: bounds of the log-ratio to the reference, and of the estimate.
      entropy: coefficient of the entropy, which is maximised.
      entropy_mean: it is a mean as the "row"'s loss is, or over all tokens: "token".
      entropy_of: it is that of "all" tokens, or of those that a selection has "kept".
      dual_clip: where A < 0 the gain is at least dual_clip * A (arXiv 1912.09729).
      delta: the ratio that a surrogate sees is at most this, which bounds the loss where A < 0
        (INTELLECT-2, arXiv 2505.07291, section 3.4, which has it above 1 + high).
      correction: each token is weighted by pi_old / pi_sampler, one of
        rl/algorithms/corrections.py; its bounds are correction_low and correction_high, and with
        correction_mean_one the weights of a step have mean 1.
      rejection: tokens, or completions, that sampler and trainer see too differently are left out;
        its bounds are rejection_low (k1 alone has one) and rejection_high.
      rejected: they add nothing: "zero" | they do not count in the mean either: "removed".
      off_policy: completions whose advantage is negative add nothing where the mean of log
        pi_sampler - log pi is above this (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
      soft_overlong: a reward falls from 0 to -1 over so many tokens before the longest completion
        (DAPO, arXiv 2503.14476, eq. 13); overlong_weight is its weight.
    """

    kl: float = 0.0
    kl_estimator: str = "unbiased_k3"
    kl_in: str = "loss"
    kl_ratio: str = "token"
    kl_log_clamp: float = 0.0
    kl_clamp: float = 0.0
    entropy: float = 0.0
    entropy_mean: str = "row"
    entropy_of: str = "all"
    dual_clip: float = 0.0
    delta: float = 0.0
    correction: str = ""
    correction_low: float = 0.0
    correction_high: float = 2.0
    correction_mean_one: bool = False
    rejection: str = ""
    rejection_low: float = 0.5
    rejection_high: float = 2.0
    rejected: str = "zero"
    off_policy: float = 0.0
    soft_overlong: int = 0
    overlong_weight: float = 1.0

    def __post_init__(self):
        known = {
            "kl_estimator": tuple(ESTIMATORS),
            "kl_in": ("loss", "reward"),
            "kl_ratio": ("token", "row", "sampler", "own"),
            "entropy_mean": ("row", "token"),
            "entropy_of": ("all", "kept"),
            "correction": ("", *CORRECTIONS),
            "rejection": ("", *REJECTIONS),
            "rejected": ("zero", "removed"),
        }
        for name, values in known.items():
            value, words = getattr(self, name), ", ".join(filter(None, values))
            if value not in values:
                raise UserError(f"{name} = {value!r}: must be one of {words}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, float):
                continue
            if not math.isfinite(value) or (value < 0 and field.name != "entropy"):
                raise UserError(f"{field.name} = {value}: must be 0 or positive, and finite")
        for name in ("dual_clip", "delta"):
            if 0 < getattr(self, name) <= 1:
                value = getattr(self, name)
                raise UserError(f"{name} = {value}: must be above 1, or 0 for none")
        if self.kl_in == "reward" and self.kl_estimator.startswith("unbiased") and self.kl:
            raise UserError(
                f"kl_in = reward: {self.kl_estimator} is for the loss, where its gradient counts; "
                "name another, such as kl_estimator=k1"
            )

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a divergence."""
        return self.kl > 0 and self.kl_in == "loss"

    @property
    def needs(self) -> frozenset[str]:
        """What these must have computed, of `rl.algorithms.tokens.NEEDS`."""
        before = self.correction or self.rejection or (self.kl and self.kl_in == "reward")
        return frozenset(["reference"] * (self.kl > 0) + ["old"] * bool(before))
