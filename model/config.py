"""What a model is made of, and the legend of every shape in the codebase.

    B batch          T query positions    S key positions      D width of the hidden state
    N heads          H head width         R latent rank        V vocabulary
    E experts        K chosen experts     F hidden width of an FFN
    I indexer heads  C indexer width      L layers             G group of completions

`q_BTNH` is a query of shape [B, T, N, H]. The meaning and unit of each field stands in configs/base.py.
"""

import dataclasses

from errors import UserError

REMAT_POLICIES = ("none", "full", "dots")
GATES = ("none", "head", "element")
DTYPES = ("float32", "bfloat16")
EXPERT_MATMULS = ("auto", "blocks", "ragged", "reference")


def require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{field} = {value!r}: {rule}")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1) with a gated output (arXiv 2505.06708)."""

    heads: int
    query_rank: int
    latent_rank: int
    nope_width: int
    rope_width: int
    value_width: int
    rope_theta: float
    gate: str

    def __post_init__(self):
        for name in ("heads", "latent_rank", "nope_width", "value_width"):
            require(getattr(self, name) > 0, f"model.attention.{name}", getattr(self, name), "must be positive")
        require(self.query_rank >= 0, "model.attention.query_rank", self.query_rank, "must be 0 (no query latent) or positive")
        require(self.rope_width > 0 and self.rope_width % 2 == 0, "model.attention.rope_width", self.rope_width, "must be even and positive")
        require(self.gate in GATES, "model.attention.gate", self.gate, f"must be one of {', '.join(GATES)}")

    @property
    def query_width(self) -> int:
        return self.nope_width + self.rope_width


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1). No heads, no indexer."""

    heads: int
    width: int
    rope_width: int
    topk: int

    def __post_init__(self):
        require(self.heads >= 0, "model.indexer.heads", self.heads, "must be 0 (no indexer) or positive")
        fits = 0 <= self.rope_width <= self.width and self.rope_width % 2 == 0
        require(fits, "model.indexer.rope_width", self.rope_width, f"must be even and at most the width, {self.width}")
        require(self.topk > 0, "model.indexer.topk", self.topk, "must be positive")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """DeepSeek-V3's mixture of experts (arXiv 2412.19437, section 2.1.2)."""

    experts: int
    chosen: int
    shared: int
    width: int
    groups: int
    chosen_groups: int
    route_scale: float

    def __post_init__(self):
        require(self.experts > 0, "model.moe.experts", self.experts, "must be positive")
        divisors = ", ".join(str(n) for n in range(1, self.experts + 1) if self.experts % n == 0)
        divides = self.groups > 0 and self.experts % self.groups == 0
        require(divides, "model.moe.groups", self.groups, f"does not divide model.moe.experts = {self.experts} (try {divisors})")
        require(0 < self.chosen_groups <= self.groups, "model.moe.chosen_groups", self.chosen_groups, f"must be between 1 and model.moe.groups = {self.groups}")
        available = self.experts // self.groups * self.chosen_groups
        require(0 < self.chosen <= available, "model.moe.chosen", self.chosen, f"must be between 1 and the {available} experts of the chosen groups")
        require(self.shared >= 0, "model.moe.shared", self.shared, "must not be negative")
        require(self.width > 0, "model.moe.width", self.width, "must be positive")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab: int
    width: int
    layers: int
    dense_layers: int
    dense_width: int
    canon: int
    mtp_depth: int
    tie_embeddings: bool
    norm_eps: float
    init_std: float
    dtype: str
    remat: str
    scan_unroll: int
    query_chunk: int
    causal_parts: int
    logit_chunk: int
    expert_matmul: str
    attention: AttentionConfig
    indexer: IndexerConfig
    moe: MoEConfig

    def __post_init__(self):
        for name in ("width", "layers", "query_chunk", "causal_parts", "logit_chunk", "scan_unroll"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(self.vocab >= 0, "model.vocab", self.vocab, "must be 0 (the tokenizer's) or positive")
        require(0 <= self.dense_layers <= self.layers, "model.dense_layers", self.dense_layers, f"must be between 0 and model.layers = {self.layers}")
        require(self.dense_layers == 0 or self.dense_width > 0, "model.dense_width", self.dense_width, "must be positive")
        require(self.canon == 0 or self.canon >= 2, "model.canon", self.canon, "must be 0 (no convolution) or at least 2 taps")
        require(self.mtp_depth >= 0, "model.mtp_depth", self.mtp_depth, "must not be negative")
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        require(self.remat in REMAT_POLICIES, "model.remat", self.remat, f"must be one of {', '.join(REMAT_POLICIES)}")
        require(self.expert_matmul in EXPERT_MATMULS, "model.expert_matmul", self.expert_matmul, f"must be one of {', '.join(EXPERT_MATMULS)}")

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers
