"""The sections c.reinforce, c.sampling and c.evaluate of configs/base.py, validated. The meaning
and unit of each field stands there.
"""

import dataclasses
import math

from errors import require
from rl.algorithms import get_algorithm

ATTENTIONS = ("sparse", "dense")
OLD_LOGPROBS = ("sampler", "trainer")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    temperature: float
    top_k: int
    top_p: float
    max_prompt_tokens: int
    max_new_tokens: int
    attention: str
    attention_top_p: float

    def __post_init__(self):
        require(
            0 <= self.temperature < math.inf,
            "sampling.temperature",
            self.temperature,
            "must be 0 (greedy) or positive",
        )
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "must be 0 (all) or positive")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "must be in (0, 1]")
        for name in ("max_prompt_tokens", "max_new_tokens"):
            require(
                getattr(self, name) > 0, f"sampling.{name}", getattr(self, name), "must be positive"
            )
        require(
            0 < self.attention_top_p <= 1,
            "sampling.attention_top_p",
            self.attention_top_p,
            "must be in (0, 1]; 1 reads every selected key",
        )
        require(
            self.attention in ATTENTIONS,
            "sampling.attention",
            self.attention,
            f"must be one of {', '.join(ATTENTIONS)}",
        )


@dataclasses.dataclass(frozen=True)
class ReinforceConfig:
    algorithm: str
    task: str
    prompts_per_step: int
    group_size: int
    minibatches: int
    epochs: int
    kl_weight: float
    answer_reward: float
    format_reward: float
    old_logprobs: str

    def __post_init__(self):
        get_algorithm(self.algorithm, max_completion=1)  # raises if there is no such row
        require(
            self.task.startswith("task:"),
            "reinforce.task",
            self.task,
            "must be 'task:NAME' or 'task:NAME?option=value', see data/tasks",
        )
        for name in ("prompts_per_step", "minibatches", "epochs"):
            require(
                getattr(self, name) > 0,
                f"reinforce.{name}",
                getattr(self, name),
                "must be positive",
            )
        require(
            self.group_size > 1,
            "reinforce.group_size",
            self.group_size,
            "must be at least 2: an advantage compares completions of one prompt",
        )
        rows = self.prompts_per_step * self.group_size
        require(
            rows % self.minibatches == 0,
            "reinforce.minibatches",
            self.minibatches,
            f"does not divide reinforce.prompts_per_step * reinforce.group_size = {rows}",
        )
        allowed = self.kl_weight == -1 or 0 <= self.kl_weight < math.inf
        require(
            allowed,
            "reinforce.kl_weight",
            self.kl_weight,
            "must be -1 (the algorithm's own), 0 (off) or positive",
        )
        for name in ("answer_reward", "format_reward"):
            require(
                math.isfinite(getattr(self, name)),
                f"reinforce.{name}",
                getattr(self, name),
                "must be finite",
            )
        require(
            self.old_logprobs in OLD_LOGPROBS,
            "reinforce.old_logprobs",
            self.old_logprobs,
            f"must be one of {', '.join(OLD_LOGPROBS)}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    problems: int
    samples: int
    infill_documents: int
    bootstrap: int

    def __post_init__(self):
        for name in ("samples", "bootstrap"):
            require(
                getattr(self, name) > 0, f"evaluate.{name}", getattr(self, name), "must be positive"
            )
        for name in ("problems", "infill_documents"):
            require(
                getattr(self, name) >= 0,
                f"evaluate.{name}",
                getattr(self, name),
                "must be 0 (none) or positive",
            )
