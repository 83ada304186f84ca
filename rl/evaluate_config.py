"""The section `evaluate` of a config, which rl/config.py has beside the others."""

import dataclasses
import math

from errors import FieldChecks
from rl.rewards import check_weights
from rl.voting import TIES

SPLITS = ("validation", "train")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Sets how much held-out text and how many problems an evaluation has, and samples of each."""

    # Batches of held-out documents of data.sources, for their loss; 0 for none. A run of
    # launch.reinforce has none: it learns from no text.
    text_batches: int = 8
    problems: int = 128  # or as many as there are: 1_000_000 asks for all; 0 for none
    # Which problems launch.evaluate has: "validation", held out | "train", those that a run of
    # launch.reinforce with this config draws, for reinforce.pass_rates_from.
    split: str = "validation"
    samples: int = 8  # completions of a problem; pass@k and cons@k for k up to this
    ks: tuple[int, ...] = ()  # k of pass@k and cons@k; () for 1, 2, 4, ... and `samples`
    # Temperatures that launch.evaluate has problems at, one after the other, each with a sampler of
    # its own; the first gives the figures by themselves. () for sampling.temperature.
    temperatures: tuple[float, ...] = ()
    # What becomes of answers with equally many votes, in cons@k: "share" pays the share of them
    # that are right | "first" takes the one that was sampled first (rl/voting.py).
    consensus_ties: str = "share"
    # Tokens of thought to force completions to, for accuracy against thinking length; () for none.
    # A thought that is longer is cut, and one that ends before is told to wait, so often.
    thinking: tuple[int, ...] = ()
    thinking_waits: int = 0
    thinking_answer_tokens: int = 64  # that may be sampled behind a forced thought
    # The reward that pass@k counts, named as in reinforce.rewards, and the least of it with which a
    # completion solves its problem.
    reward: str = "answer"
    success: float = 1.0
    infill_documents: int = 64  # held out, for infilling and the indexer's recall; 0 for none
    bootstrap: int = 1_000  # resamples of the problems

    def __post_init__(self):
        check_weights({self.reward: 1.0}, "evaluate.reward")
        check = FieldChecks(self, "evaluate")
        check.positive("samples", "bootstrap", "thinking_answer_tokens")
        for k in self.ks:
            fits = 1 <= k <= self.samples
            check.that(fits, "ks", f"must be between 1 and evaluate.samples = {self.samples}")
        check.that(list(self.ks) == sorted(set(self.ks)), "ks", "must rise")
        for temperature in self.temperatures:
            finite = 0 <= temperature < math.inf
            check.that(finite, "temperatures", "must be 0 (greedy) or positive, each of them")
        different = len(set(self.temperatures)) == len(self.temperatures)
        check.that(different, "temperatures", "must differ from one another")
        check.one_of("consensus_ties", TIES)
        check.one_of("split", SPLITS)
        check.that(all(x > 0 for x in self.thinking), "thinking", "must be positive, each of them")
        check.not_negative("thinking_waits")
        check.at_most(100, "thinking_waits")
        check.that(math.isfinite(self.success), "success", "must be finite")
        for name in ("text_batches", "problems", "infill_documents"):
            check.that(getattr(self, name) >= 0, name, "must be 0 (none) or positive")
        check.at_most(1_000_000, "text_batches", "problems", "infill_documents", "bootstrap")
        check.at_most(100_000, "samples")
