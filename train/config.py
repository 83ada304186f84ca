"""The section `train` of a config. Each field is written once, here, with default and meaning."""

import dataclasses
import math
import re

from errors import FieldChecks
from model.config import STAGES

OPTIMIZERS = ("adamw", "muon")
LAYER_LOSSES = ("sum", "mean")
SINKS = ("wandb", "trackio", "mlflow")  # the classes of train/trackers.py, which brings jax
LORA_SCALES = ("rank", "sqrt_rank")
NEXT_TOKEN = "next_token"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Chooses what is minimised, how long, by which optimizer, and what is written meanwhile."""

    # "dense": full attention | "warmup": full attention, and the indexer alone learns, by its KL |
    # "sparse": top-k attention, and the indexer learns on the selected keys.
    stage: str = "dense"
    steps: int = 1_000
    microbatches: int = 1  # the batch is cut into this many, and their gradients are summed
    # "adamw" | "muon": orthogonalised momentum for matrices, AdamW for embedding, head and norms
    # (arXiv 2502.16982).
    optimizer: str = "adamw"
    learning_rate: float = 1e-3  # at the peak
    warmup_steps: int = 50  # linear from 0 to the peak
    constant_steps: int = 0  # at the peak
    cosine_steps: int = -1  # from the peak to final_ratio of it; -1 takes what is left
    final_ratio: float = 0.1  # of the peak, constant to the end
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # on matrices alone
    clip_norm: float = 1.0  # of the global gradient; 0 for none
    # Regular expression over parameter paths; the rest is frozen. Stage "warmup" also freezes all
    # but the indexer.
    trainable: str = ".*"
    # LoRA (arXiv 2106.09685, docs/lora.md): the rank of the adapters, which then learn alone; 0 is
    # none, and all parameters learn. Their learning rate is about ten times that of all parameters.
    lora: int = 0
    lora_alpha: float = 32.0  # what they add is multiplied by alpha / rank
    # "rank" | "sqrt_rank": by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    lora_scale: str = "rank"
    # Which matrices have one: "attention" | "ffn" | "experts" | "shared_experts" | "router" |
    # "indexer" | "mtp", or how paths of parameters end: "query_up", "moe/down".
    lora_modules: tuple[str, ...] = ("attention", "ffn", "experts", "shared_experts")
    lora_from: str = ""  # a directory in peft's format, whose adapters a new run begins with
    mtp_weight: float = 0.3  # lambda of arXiv 2412.19437, eq. 25; with 0 the MTP modules do not run
    balance_weight: float = 1e-4  # alpha of the sequence-wise balance loss, eq. 17
    router_bias_rate: float = 1e-3  # gamma: how far a step moves the router bias
    indexer_weight: float = 1.0  # of the indexer's KL
    # How the losses that each layer has, balance and the indexer's KL, come together: "sum", each
    # is added to the loss, as arXiv 2412.19437 (eq. 17) and 2512.02556 (eq. 3, 4) define them, of
    # one layer | "mean" over the layers. metrics.jsonl has the mean either way.
    layer_losses: str = "sum"
    log_every: int = 10  # steps
    # Steps between evaluations, of which one is at the end; 0 is that one alone, and none in
    # reinforcement, which evaluates held-out problems as the section `evaluate` says.
    eval_every: int = 0
    eval_batches: int = 8  # of held-out text
    save_every: int = 500  # steps; the last step is always saved
    max_to_keep: int = 2  # checkpoints
    # Trackers that get what metrics.jsonl and TensorBoard get: "wandb", "trackio", "mlflow",
    # each a package to install. docs/metrics.md has their environment variables.
    sinks: tuple[str, ...] = ()
    max_skipped: int = 10  # steps in a row without finite gradients before the run stops

    def __post_init__(self):
        check = FieldChecks(self, "train")
        check.one_of("stage", STAGES)
        check.positive("steps", "microbatches", "log_every", "save_every", "max_to_keep")
        check.positive("max_skipped")
        check.not_negative("warmup_steps", "constant_steps", "eval_every", "eval_batches")
        check.not_negative("weight_decay", "clip_norm", "mtp_weight", "balance_weight")
        check.not_negative("router_bias_rate", "indexer_weight")
        rule = "must be -1 (what is left) or not negative"
        check.that(self.cosine_steps >= -1, "cosine_steps", rule)
        check.one_of("optimizer", OPTIMIZERS)
        check.one_of("layer_losses", LAYER_LOSSES)
        for name in self.sinks:
            known = f"must be a tuple of {', '.join(SINKS)}, such as ('wandb', 'mlflow')"
            check.that(name in SINKS, "sinks", known)
        check.that(len(set(self.sinks)) == len(self.sinks), "sinks", "has one of them twice")
        check.not_negative("lora")
        check.that(0 < self.lora_alpha < math.inf, "lora_alpha", "must be positive")
        check.one_of("lora_scale", LORA_SCALES)
        rule = "names nothing to adapt; with train.lora = 0 there are no adapters"
        check.that(not self.lora or bool(self.lora_modules), "lora_modules", rule)
        rule = "begins adapters, and train.lora = 0 has none; give train.lora their rank"
        check.that(not self.lora_from or self.lora > 0, "lora_from", rule)
        check.positive("learning_rate")
        check.that(0 <= self.final_ratio <= 1, "final_ratio", "must be between 0 and 1")
        for name in ("beta1", "beta2"):
            inside = 0 <= getattr(self, name) < 1
            check.that(inside, name, "must be at least 0 and less than 1")
        try:
            re.compile(self.trainable)
        except re.error as error:
            check.that(False, "trainable", f"not a regular expression ({error})")

    def microbatch_rows(self, rows: int, what: str) -> int:
        """Returns the rows of a microbatch of a batch of `rows`, which is called `what`.

        Raises UserError if they do not divide.
        """
        check = FieldChecks(self, "train")
        check.that(
            rows % self.microbatches == 0, "microbatches", f"does not divide {what} = {rows}"
        )
        return rows // self.microbatches


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Chooses what launch.finetune learns of its conversations."""

    # "next_token": what the assistant writes | of pairs of which one answer is preferred, a row of
    # train/preferences.py with options (docs/preferences.md): "dpo?beta=0.1&label_smoothing=0.0",
    # "orpo?weight=0.1", "simpo?beta=2.0&gamma=1.0". The sources are then of pairs.
    loss: str = NEXT_TOKEN

    def __post_init__(self):
        if self.learns_from_pairs:
            from train.preferences import get_preference  # brings jax: `--help` must not wait

            get_preference(self.loss)

    @property
    def learns_from_pairs(self) -> bool:
        """Whether the loss is one over pairs."""
        return self.loss != NEXT_TOKEN
