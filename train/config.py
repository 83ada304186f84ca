"""The section c.train of configs/base.py, validated. The meaning and unit of each field stands
there.
"""

import dataclasses
import re

from errors import UserError, require
from model.attention.reference import STAGES

OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    stage: str
    steps: int
    microbatches: int
    optimizer: str
    learning_rate: float
    warmup_steps: int
    constant_steps: int
    cosine_steps: int
    final_ratio: float
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    trainable: str
    mtp_weight: float
    balance_weight: float
    router_bias_rate: float
    indexer_weight: float
    log_every: int
    eval_every: int
    eval_batches: int
    save_every: int
    max_to_keep: int
    max_skipped: int

    def __post_init__(self):
        require(
            self.stage in STAGES, "train.stage", self.stage, f"must be one of {', '.join(STAGES)}"
        )
        for name in (
            "steps",
            "microbatches",
            "log_every",
            "save_every",
            "max_to_keep",
            "max_skipped",
        ):
            require(
                getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be positive"
            )
        for name in (
            "warmup_steps",
            "constant_steps",
            "eval_every",
            "eval_batches",
            "weight_decay",
            "clip_norm",
        ):
            require(
                getattr(self, name) >= 0,
                f"train.{name}",
                getattr(self, name),
                "must not be negative",
            )
        for name in ("mtp_weight", "balance_weight", "router_bias_rate", "indexer_weight"):
            require(
                getattr(self, name) >= 0,
                f"train.{name}",
                getattr(self, name),
                "must not be negative",
            )
        require(
            self.cosine_steps >= -1,
            "train.cosine_steps",
            self.cosine_steps,
            "must be -1 (what is left) or not negative",
        )
        require(
            self.optimizer in OPTIMIZERS,
            "train.optimizer",
            self.optimizer,
            f"must be one of {', '.join(OPTIMIZERS)}",
        )
        require(
            self.learning_rate > 0, "train.learning_rate", self.learning_rate, "must be positive"
        )
        require(
            0 <= self.final_ratio <= 1,
            "train.final_ratio",
            self.final_ratio,
            "must be between 0 and 1",
        )
        for name in ("beta1", "beta2"):
            require(
                0 <= getattr(self, name) < 1,
                f"train.{name}",
                getattr(self, name),
                "must be at least 0 and less than 1",
            )
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise UserError(
                f"train.trainable = {self.trainable!r}: not a regular expression ({error})"
            ) from None
