"""The sections `sampling`, `reinforce` and `evaluate` of a config.

Each field is written once, here, with its default and meaning.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from data.python_files import is_attribute
from errors import FieldChecks
from model.config import DTYPES
from model.mesh import MeshConfig
from rl.evaluate_config import EvaluateConfig as EvaluateConfig  # so that all are found here
from rl.rewards import check_weights

ATTENTIONS = ("sparse", "dense")
SERVER_APIS = ("vllm", "sglang")
DRAFT_ACCEPTANCES = ("coupled", "rejection")
OLD_LOGPROBS = ("sampler", "trainer")
INDEXERS = ("trained", "frozen")
TRUNCATED = ("reward", "no_reward", "mask")
UNFINISHED = ("read_again", "kept")
ORDERS = ("shuffled", "easy_first", "unsolved")
ZERO_VARIANCE = ("kept", "dropped", "replaced")
GUESSED = ("kept", "left_out")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of the sampling of completions."""

    temperature: float = 1.0  # 0 is greedy
    # Tokens that are drawn from, 0 for all, and the share of probability that they hold. The loss
    # compares the distributions over these: see reinforce.keep_sampling_mask.
    top_k: int = 0
    top_p: float = 1.0
    max_prompt_tokens: int = 96
    # Leaves out problems whose prompt is longer than max_prompt_tokens, and says how many; without
    # it one such prompt is an error before the first step.
    filter_overlong_prompts: bool = False
    max_new_tokens: int = 64
    # Tokens of thought after which a completion of a problem is told to answer, by a phrase that is
    # read and never learnt from, and tokens that its answer may then have (forced interruption:
    # ScaleRL, arXiv 2510.13786). All three are within max_new_tokens. 0 lets it think as it likes.
    thinking: int = 0
    thinking_answer_tokens: int = 64
    # Sequences that a device samples at a time, at most, and the memory in GiB that they may take
    # on it; the others wait for their turn.
    slots: int = 256
    cache_gib: float = 8.0
    # Tokens that the MTP modules draft behind each one that is drawn, at most as many as there are
    # modules; the model verifies them in one pass, and what is sampled stays its own.
    drafts: int = 0
    # When a draft is taken: "coupled" draws it with the random numbers that the model's own draw at
    # its place has, and takes it where both draw the same, so that samples are the same with and
    # without drafts (arXiv 2408.07978) | "rejection" takes more of them, with probability
    # min(1, p / q), and samples others of the same distribution (arXiv 2211.17192).
    draft_acceptance: str = "coupled"
    # The host's memory in GiB that the records of a step may take: experts, selected keys and ids
    # drawn from, where they are recorded for the trainer to do the same again.
    record_gib: float = 64.0
    # Of the computation while sampling: "" for model.dtype | "float32" | "bfloat16". In a coarser
    # one than the trainer's, log-probs differ: an algorithm should correct for that.
    dtype: str = ""
    attention: str = "sparse"  # "sparse" | "dense"
    # Below 1, each new token attends to the fewest of its keys that by estimate hold this share of
    # its attention (Twilight, arXiv 2502.02770): by the indexer's softmax over what it selected, or
    # without an indexer by 4-bit keys. Samples are then not quite the model's own: docs/decode.md
    # says what that means for reinforcement.
    attention_top_p: float = 1.0
    # The URL of a server that samples in launch.reinforce in place of this process, such as
    # "http://host:8000", and which it is: "vllm" | "sglang" (docs/reinforce.md, "Another engine
    # samples"). "" for none.
    server: str = ""
    server_api: str = "vllm"
    # The directory in which it is given the policy's weights, in sampling.dtype; the server sees it
    # by the same path. "" is served/ in the workdir.
    server_weights: str = ""
    # Seconds that an answer may take: a whole completion, or the loading of weights. And how often
    # what fails is asked again, after 1, 2, 4, ... and at most 60 seconds: 10 make five minutes.
    server_timeout: float = 600.0
    server_retries: int = 10
    # Whether each completion is asked for with a seed of its own, that of its problem's place and
    # its number. vLLM draws with seeds row by row, and on a CPU dies of them.
    server_seeds: bool = True

    def __post_init__(self):
        check = FieldChecks(self, "sampling")
        finite = 0 <= self.temperature < math.inf
        check.that(finite, "temperature", "must be 0 (greedy) or positive")
        check.that(self.top_k >= 0, "top_k", "must be 0 (all) or positive")
        check.that(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        check.positive("max_prompt_tokens", "max_new_tokens", "slots")
        check.positive("thinking_answer_tokens")
        check.not_negative("drafts", "thinking")
        check.at_most(16, "drafts")
        check.one_of("draft_acceptance", DRAFT_ACCEPTANCES)
        check.one_of("dtype", ("", *DTYPES))
        roomy = 0 < self.cache_gib < math.inf
        check.that(roomy, "cache_gib", "must be positive")
        check.that(self.record_gib > 0, "record_gib", "must be positive")
        share = 0 < self.attention_top_p <= 1
        check.that(share, "attention_top_p", "must be in (0, 1]; 1 reads every selected key")
        check.one_of("attention", ATTENTIONS)
        check.that(not self.server or _is_url(self.server), "server", "must be 'http://HOST:PORT'")
        check.one_of("server_api", SERVER_APIS)
        patient = 0 < self.server_timeout < math.inf
        check.that(patient, "server_timeout", "must be positive")
        check.not_negative("server_retries")

    @property
    def most_sampled(self) -> int:
        """The most tokens that a completion of a problem may sample."""
        if not self.thinking:
            return self.max_new_tokens
        return min(self.thinking + self.thinking_answer_tokens, self.max_new_tokens)

    @property
    def restricts(self) -> bool:
        """Whether tokens are drawn from the likeliest alone."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclasses.dataclass(frozen=True)
class ReinforceConfig:
    """Chooses the problems, the algorithm, and how many completions and updates a step has."""

    # A row of rl/algorithms/table.py, with options: "dapo?high=0.3&kl=0.01", or one of your own,
    # "FILE.py:NAME"; `python -m launch.algorithms` lists them.
    algorithm: str = "dr_grpo"
    # "task:NAME?option=value" | "task:jsonl:FILE#QUESTION,ANSWER" | "task:parquet:...": data/tasks
    task: str = "task:arithmetic"
    prompts_per_step: int = 16
    group_size: int = 8  # G, completions of a prompt; 1 where the algorithm compares none
    # Prompts whose completions are sampled at a time; a step takes the first `prompts_per_step` of
    # them to be complete, and the others go on in the next: partial rollouts (Kimi k1.5, arXiv
    # 2501.12599), see docs/reinforce.md. 0 is as many as a step takes, so that it waits for all.
    prompts_in_flight: int = 0
    # Tokens that a step samples, or a few more, before it learns from what is complete, which is at
    # least one prompt's completions and may be fewer than `prompts_per_step`; 0 is no bound.
    rollout_tokens: int = 0
    # A step learns from what the policy of so many steps before it has sampled (rl/ahead.py); the
    # algorithm should correct for that (docs/reinforce.md).
    lag: int = 0
    # Devices, the last ones, that sample and do nothing else, while the others, by the section
    # `mesh`, learn; 0 has all of them take turns. Both work at once where lag is at least 1.
    sampler_devices: int = 0
    sampler_mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # how they are divided
    # Tokens that a policy of more steps before has sampled are not learnt from; -1 learns from all.
    most_stale: int = -1
    # How unfinished completions go on after an update: "read_again" by the new policy | "kept" from
    # the cache that older ones made of what they have, which costs that memory during the update.
    unfinished: str = "read_again"
    # Whose turn is when: "shuffled" | "easy_first", by measured pass rate, else by the number of
    # operations, over the steps of the run | "unsolved", in proportion to 1 - pass rate
    # (rl/curriculum.py). Of completions that solve a problem see evaluate.reward and
    # evaluate.success.
    order: str = "shuffled"
    # A problem is not drawn again once its completions have solved it so often: 0.9 is ScaleRL's
    # no-positive-resampling (arXiv 2510.13786); 0 never.
    retire_at: float = 0.0
    # The workdir of an evaluation of the training problems (evaluate.split = "train"), by this
    # model or another, whose tries `order` and `retire_at` count before the run's own; "" for none.
    # What it says is copied into the run's workdir at its first start.
    pass_rates_from: str = ""
    # Problems whose pass rate there is lower or higher are left out (Kimi k1.5, arXiv 2501.12599,
    # section 2.1); 0 and 1 leave none out. What was not measured stays.
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0
    # Problems that the evaluation solves with the least of evaluate.thinking, which is to be no
    # thought, in one of so many attempts: "kept" | "left_out", as easy to hack (the same section).
    guessed: str = "kept"
    guess_attempts: int = 8
    # Groups whose completions all earn the same: "kept" | "dropped", they do not count in the mean
    # of the loss | "replaced", a step samples on until it has `prompts_per_step` others (dynamic
    # sampling: DAPO, arXiv 2503.14476, eq. 11).
    zero_variance: str = "kept"
    # The reward that such a group is judged by; "" is the sum of all.
    variance_reward: str = ""
    resample_limit: int = 10  # times `prompts_per_step` groups that a step samples, at most
    minibatches: int = 1  # optimizer updates in a pass over the completions of a step
    epochs: int = 1  # passes over them
    # Coefficient of the divergence to the reference (the model that reinforcement started from,
    # which the workdir keeps); -1 takes the algorithm's own, 0 turns it off.
    kl_weight: float = -1.0
    # What a divergence compares with, or who teaches: "" is the model that reinforcement started
    # from; else a run's workdir or `hf:DIR`, of the same shape as the policy.
    reference: str = ""
    reference_every: int = 0  # steps after which the policy becomes the reference; 0 never
    # The optimizer's moments begin anew after so many steps (Kimi k1.5, arXiv 2501.12599); 0 never.
    reset_optimizer_every: int = 0
    # Of an algorithm with a critic. Its learning rate, 0 for ten times train.learning_rate, about
    # what published runs have; the first steps, in which it alone learns; how far an update may
    # move a value, in units of the reward, 0 for any; and the workdir of a run whose critic it
    # begins as, "" for the policy's own parameters.
    critic_learning_rate: float = 0.0
    critic_warmup_steps: int = 0
    value_clip: float = 0.2
    critic_from: str = ""
    # Reward -> its weight in the sum that is maximised: "answer" | "format" (rl/rewards), or
    # "FILE.py:NAME", a function of one's own (docs/reinforce.md).
    rewards: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"answer": 1.0, "format": 0.1}
    )
    # A completion that is cut before its stop token: "reward" pays it like any other | "no_reward"
    # pays 0 | "mask" pays it in its group, and learns from none of its tokens.
    truncated: str = "reward"
    # The trainer sends each token to the experts that the sampler sent it to (gates are of its own
    # scores), and in stage "sparse" lets it attend to the keys that the sampler selected: both are
    # recorded while sampling (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
    keep_routing: bool = False
    keep_selection: bool = True
    # What becomes of the indexer in stage "sparse"; in "dense" nothing selects, and it stays as it
    # is. "trained": by its KL over the keys that the trainer attends to, with keep_selection the
    # sampler's, times train.indexer_weight: 0, as in configs/reinforce.py, freezes it too |
    # "frozen": whatever that weight is, no gradient, decay or moment reaches it.
    indexer: str = "trained"
    # Several completions share a row of the trainer where they fit, each apart from the others, so
    # that less padding is computed (rl/packing.py). Off by default: each number of rows is compiled
    # when it comes up first, which takes a small run longer than its padding.
    packing: bool = False
    # Where sampling.top_k or sampling.top_p restrict: the ids that each token was drawn from are
    # recorded, and the trainer's log-probs are those of its distribution over them (the same
    # section). Without it these fields are refused.
    keep_sampling_mask: bool = True
    # pi_old in the ratio: "sampler" as recorded | "trainer" as it computes them before the first
    # update, in which the ratio is exactly 1.
    old_logprobs: str = "sampler"
    # Rows of a step on which the trainer's own choices of experts and keys are compared with the
    # sampler's (a forward pass more over so many); 0 for none. What is compared is recorded.
    agreement_rows: int = 8
    # Nats that the log-probs of sampler and trainer may be apart, on average over a few tokens
    # after a canary prompt, before a step samples; more stops the run. -1 takes what rounding
    # explains in the coarser of model.dtype and sampling.dtype (rl/canary.py), 0 checks nothing. It
    # is not checked where sampling reads a share of attention, nor where there are choices of which
    # nothing is recorded.
    canary_tolerance: float = -1.0
    # Completions of a step that is logged which are kept in traces.jsonl, token by token: the first
    # ones; -1 for all.
    trace_completions: int = 2

    def __post_init__(self):
        check_weights(self.rewards)
        check = FieldChecks(self, "reinforce")
        a_task = self.task.startswith("task:")
        check.that(
            a_task, "task", "must be 'task:NAME' or 'task:NAME?option=value', see data/tasks"
        )
        check.positive("prompts_per_step", "minibatches", "epochs")
        check.at_most(1_000_000, "prompts_per_step", "prompts_in_flight", "group_size")
        check.at_most(10_000, "minibatches", "epochs")
        check.positive("group_size")
        enough = not self.prompts_in_flight or self.prompts_in_flight >= self.prompts_per_step
        check.that(
            enough,
            "prompts_in_flight",
            f"must be 0 or at least reinforce.prompts_per_step = {self.prompts_per_step}",
        )
        check.not_negative("rollout_tokens", "lag", "sampler_devices")
        check.at_most(1_000, "lag")
        check.that(self.most_stale >= -1, "most_stale", "must be -1 (any) or not negative")
        check.that(
            self.most_stale == -1 or self.most_stale >= self.lag,
            "most_stale",
            f"must be at least reinforce.lag = {self.lag}, or nothing is learnt from",
        )
        check.one_of("unfinished", UNFINISHED)
        check.one_of("order", ORDERS)
        check.one_of("zero_variance", ZERO_VARIANCE)
        check.that(0 <= self.retire_at <= 1, "retire_at", "must be between 0 (never) and 1")
        self._check_measured(check)
        check.positive("resample_limit")
        paid = not self.variance_reward or self.variance_reward in self.rewards
        check.that(paid, "variance_reward", f"is none of reinforce.rewards: {list(self.rewards)}")
        rows = self.prompts_per_step * self.group_size
        check.that(
            rows % self.minibatches == 0,
            "minibatches",
            f"does not divide reinforce.prompts_per_step * reinforce.group_size = {rows}",
        )
        allowed = self.kl_weight == -1 or 0 <= self.kl_weight < math.inf
        check.that(allowed, "kl_weight", "must be -1 (the algorithm's own), 0 (off) or positive")
        if not is_attribute(self.algorithm.partition("?")[0]):  # no one's file is run for this
            from rl.algorithms.spec import get_algorithm  # brings jax: `--help` must not wait

            weight = self.kl_weight
            self.check_algorithm(
                get_algorithm(self.algorithm, max_completion=1, kl_weight=weight).needs
            )
        check.not_negative("reference_every", "reset_optimizer_every", "critic_warmup_steps")
        check.not_negative("critic_learning_rate", "value_clip")
        check.that(
            not (self.reference and self.reference_every),
            "reference_every",
            "must be 0 where reinforce.reference names a model",
        )
        check.that(self.trace_completions >= -1, "trace_completions", "must be -1 (all) or more")
        check.one_of("truncated", TRUNCATED)
        check.one_of("old_logprobs", OLD_LOGPROBS)
        check.one_of("indexer", INDEXERS)
        check.not_negative("agreement_rows")
        tolerable = self.canary_tolerance == -1 or 0 <= self.canary_tolerance < math.inf
        check.that(
            tolerable,
            "canary_tolerance",
            "must be -1 (by the type of computation), 0 (off) or positive",
        )

    def _check_measured(self, check: FieldChecks) -> None:
        """Checks what leaves problems out by an evaluation of them."""
        check.that(0 <= self.min_pass_rate <= 1, "min_pass_rate", "must be between 0 and 1")
        within = self.min_pass_rate <= self.max_pass_rate <= 1
        rule = f"must be between reinforce.min_pass_rate = {self.min_pass_rate} and 1"
        check.that(within, "max_pass_rate", rule)
        check.one_of("guessed", GUESSED)
        check.positive("guess_attempts")
        unused = {"min_pass_rate": 0, "max_pass_rate": 1, "guessed": "kept"}
        for name, value in unused.items():
            known = self.pass_rates_from or getattr(self, name) == value
            check.that(bool(known), name, "needs reinforce.pass_rates_from, an evaluation of them")

    def check_algorithm(self, needs: Collection[str]) -> None:
        """Checks what only some algorithms have, by what this one needs.

        Raises UserError for a field that it has no use for, or groups that it cannot compare.
        """
        check = FieldChecks(self, "reinforce")
        several = self.group_size > 1 or "group" not in needs
        rule = f"must be at least 2: {self.algorithm!r} compares completions of one prompt"
        check.that(several, "group_size", rule)
        for name in ("reference_every", "reference"):
            used = "reference" in needs or not getattr(self, name)
            check.that(used, name, f"{self.algorithm!r} compares with no reference; add kl=0.01")
        taught = bool(self.reference) or "teacher" not in needs
        check.that(taught, "reference", f"must name the teacher of {self.algorithm!r}")
        for name in ("critic_from", "critic_warmup_steps", "critic_learning_rate"):
            used = "values" in needs or not getattr(self, name)
            check.that(used, name, f"{self.algorithm!r} has no critic; 'ppo' has one")

    @property
    def remembers(self) -> bool:
        """Whether what a step samples depends on more than its number and the policy.

        A run then has the state of its rollouts in its checkpoints.
        """
        by_rates = self.order != "shuffled" or self.retire_at > 0
        return self.in_parts or self.lag > 0 or by_rates or self.zero_variance == "replaced"

    @property
    def in_parts(self) -> bool:
        """Whether completions may go on in a later step than they began in."""
        return self.rollout_tokens > 0 or self.in_flight > self.prompts_per_step

    @property
    def in_flight(self) -> int:
        """How many prompts are in flight."""
        return self.prompts_in_flight or self.prompts_per_step


def _is_url(text: str) -> bool:
    """Returns whether a text is the URL of a server."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
