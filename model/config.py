"""What a model is made of, and the legend of every shape in the codebase.

    B batch          T query positions    S key positions      D width of the hidden state
    N heads          H head width         R latent rank        V vocabulary
    E experts        K chosen experts     F hidden width of an FFN
    I indexer heads  C indexer width      L layers             G group of completions

`q_BTNH` is a query of shape [B, T, N, H]. Where keys and values have fewer heads than queries (`gqa`, `delta`), theirs are K, unless K means experts.
The meaning and unit of each field stands in configs/base.py.
"""

import dataclasses
import functools
from typing import NamedTuple

from errors import UserError

ATTENTIONS = ("mla", "gqa", "delta")
NORMS = ("scale", "zero_centred")
MTP_INPUTS = ("residual", "normed")
ROUTERS = ("sigmoid", "softmax")
REMAT_POLICIES = ("none", "full", "dots")
GATES = ("none", "head", "element")
DTYPES = ("float32", "bfloat16")
ATTENTION_FORMS = ("auto", "chunks", "tiles")
EXPERT_MATMULS = ("auto", "blocks", "by_size", "megablox", "reference", "tokamax")


def require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{field} = {value!r}: {rule}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), stretched by YaRN (arXiv 2309.00071) where `stretch` is above 1."""

    theta: float
    stretch: float
    context: int
    beta_fast: float
    beta_slow: float
    whole_channels: bool
    scale: float
    interleaved: bool
    indexer_interleaved: bool

    def __post_init__(self):
        require(self.theta > 1, "model.rope.theta", self.theta, "must be above 1")
        require(self.stretch >= 1, "model.rope.stretch", self.stretch, "must be at least 1 (1: no YaRN)")
        require(self.stretch == 1 or self.context > 0, "model.rope.context", self.context, "must be positive: the tokens of context before stretching")
        ordered = self.beta_fast >= self.beta_slow > 0
        require(ordered, "model.rope.beta_fast", self.beta_fast, f"must be at least model.rope.beta_slow = {self.beta_slow}, and that above 0")
        require(self.scale > 0, "model.rope.scale", self.scale, "must be positive")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1) with a gated output (arXiv 2505.06708)."""

    heads: int
    query_rank: int
    latent_rank: int
    nope_width: int
    rope_width: int
    value_width: int
    logit_scale: float
    norm_eps: float
    gate: str

    def __post_init__(self):
        for name in ("heads", "latent_rank", "nope_width", "value_width"):
            require(getattr(self, name) > 0, f"model.attention.{name}", getattr(self, name), "must be positive")
        require(self.query_rank >= 0, "model.attention.query_rank", self.query_rank, "must be 0 (no query latent) or positive")
        require(self.rope_width > 0 and self.rope_width % 2 == 0, "model.attention.rope_width", self.rope_width, "must be even and positive")
        require(self.logit_scale > 0, "model.attention.logit_scale", self.logit_scale, "must be positive")
        require(self.gate in GATES, "model.attention.gate", self.gate, f"must be one of {', '.join(GATES)}")

    @property
    def query_width(self) -> int:
        return self.nope_width + self.rope_width


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys (arXiv 2505.09388, section 2) and a gated output (arXiv 2505.06708)."""

    heads: int
    kv_heads: int
    head_width: int
    rope_width: int
    qk_norm: bool
    gate: str

    def __post_init__(self):
        for name in ("heads", "kv_heads", "head_width"):
            require(getattr(self, name) > 0, f"model.gqa.{name}", getattr(self, name), "must be positive")
        require(self.heads % self.kv_heads == 0, "model.gqa.kv_heads", self.kv_heads, f"does not divide model.gqa.heads = {self.heads}")
        fits = 0 <= self.rope_width <= self.head_width and self.rope_width % 2 == 0
        require(fits, "model.gqa.rope_width", self.rope_width, f"must be even and at most the head width, {self.head_width}")
        require(self.gate in GATES, "model.gqa.gate", self.gate, f"must be one of {', '.join(GATES)}")


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet (arXiv 2412.06464): attention without a softmax, over a state of fixed size."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int
    chunk: int

    def __post_init__(self):
        for name in ("key_heads", "value_heads", "key_width", "value_width", "chunk"):
            require(getattr(self, name) > 0, f"model.delta.{name}", getattr(self, name), "must be positive")
        divides = self.value_heads % self.key_heads == 0
        require(divides, "model.delta.key_heads", self.key_heads, f"does not divide model.delta.value_heads = {self.value_heads}")
        require(self.taps >= 1, "model.delta.taps", self.taps, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1). No heads, no indexer."""

    heads: int
    width: int
    rope_width: int
    topk: int
    norm_eps: float

    def __post_init__(self):
        require(self.heads >= 0, "model.indexer.heads", self.heads, "must be 0 (no indexer) or positive")
        fits = 0 <= self.rope_width <= self.width and self.rope_width % 2 == 0
        require(fits, "model.indexer.rope_width", self.rope_width, f"must be even and at most the width, {self.width}")
        require(self.topk > 0, "model.indexer.topk", self.topk, "must be positive")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: DeepSeek-V3's (arXiv 2412.19437, section 2.1.2), and with a softmax router Qwen's (arXiv 2505.09388)."""

    experts: int
    chosen: int
    shared: int
    width: int
    shared_width: int
    shared_gate: bool
    router: str
    router_bias: bool
    normalise: bool
    groups: int
    chosen_groups: int
    group_best: int
    route_scale: float

    def __post_init__(self):
        require(self.router in ROUTERS, "model.moe.router", self.router, f"must be one of {', '.join(ROUTERS)}")
        require(self.experts > 0, "model.moe.experts", self.experts, "must be positive")
        divisors = ", ".join(str(n) for n in range(1, self.experts + 1) if self.experts % n == 0)
        divides = self.groups > 0 and self.experts % self.groups == 0
        require(divides, "model.moe.groups", self.groups, f"does not divide model.moe.experts = {self.experts} (try {divisors})")
        require(0 < self.chosen_groups <= self.groups, "model.moe.chosen_groups", self.chosen_groups, f"must be between 1 and model.moe.groups = {self.groups}")
        available = self.experts // self.groups * self.chosen_groups
        require(0 < self.chosen <= available, "model.moe.chosen", self.chosen, f"must be between 1 and the {available} experts of the chosen groups")
        each = self.experts // self.groups
        require(0 <= self.group_best <= each, "model.moe.group_best", self.group_best, f"must be 0 (chosen / chosen_groups) or at most the {each} of a group")
        require(self.shared >= 0, "model.moe.shared", self.shared, "must not be negative")
        require(self.shared_width >= 0, "model.moe.shared_width", self.shared_width, "must be 0 (model.moe.width) or positive")
        something = self.shared > 0 or not self.shared_gate
        require(something, "model.moe.shared_gate", self.shared_gate, "gates the shared experts, and model.moe.shared = 0 builds none")
        require(self.width > 0, "model.moe.width", self.width, "must be positive")

    @property
    def shared_hidden(self) -> int:
        """Hidden width of all shared experts together, which are one FFN."""
        return self.shared * (self.shared_width or self.width)


class LayerKind(NamedTuple):
    """What a layer is made of."""

    attention: str
    moe: bool


class Run(NamedTuple):
    """Layers `first` .. `first + len(kinds) * repeats - 1`: the same few kinds again and again, compiled once and scanned."""

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.kinds) * self.repeats


@functools.cache
def runs_of(kinds: tuple[LayerKind, ...]) -> tuple[Run, ...]:
    """Cuts the layers into runs: from each start on, the period that repeats over the most layers, the shorter one where two are even."""
    found, first = [], 0
    while first < len(kinds):
        best = Run(first, kinds[first : first + 1], 1)
        for period in range(1, (len(kinds) - first) // 2 + 1):
            repeats = 1
            while kinds[first + repeats * period : first + (repeats + 1) * period] == kinds[first : first + period]:
                repeats += 1
            if repeats > 1 and period * repeats > best.layers:
                best = Run(first, kinds[first : first + period], repeats)
        found.append(best)
        first += best.layers
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab: int
    width: int
    layers: int
    attention_kinds: tuple[str, ...]
    dense_layers: int
    dense_also: tuple[int, ...]
    dense_width: int
    canon: int
    mtp_depth: int
    mtp_input: str
    tie_embeddings: bool
    norm: str
    norm_eps: float
    init_std: float
    dtype: str
    remat: str
    scan_unroll: int
    attention_form: str
    query_chunk: int
    causal_parts: int
    logit_chunk: int
    expert_matmul: str
    rope: RopeConfig
    attention: AttentionConfig
    gqa: GQAConfig
    delta: DeltaConfig
    indexer: IndexerConfig
    moe: MoEConfig

    def __post_init__(self):
        for name in ("width", "layers", "query_chunk", "causal_parts", "logit_chunk", "scan_unroll"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        require(self.vocab >= 0, "model.vocab", self.vocab, "must be 0 (the tokenizer's) or positive")
        known = len(self.attention_kinds) > 0 and all(kind in ATTENTIONS for kind in self.attention_kinds)
        require(known, "model.attention_kinds", self.attention_kinds, f"must be one or several of {', '.join(ATTENTIONS)}")
        require(0 <= self.dense_layers <= self.layers, "model.dense_layers", self.dense_layers, f"must be between 0 and model.layers = {self.layers}")
        inside = all(0 <= layer < self.layers for layer in self.dense_also)
        require(inside, "model.dense_also", self.dense_also, f"must be numbers of layers, 0 to {self.layers - 1}")
        require(self.moe_layers == self.layers or self.dense_width > 0, "model.dense_width", self.dense_width, "must be positive")
        require(self.canon == 0 or self.canon >= 2, "model.canon", self.canon, "must be 0 (no convolution) or at least 2 taps")
        require(self.mtp_depth >= 0, "model.mtp_depth", self.mtp_depth, "must not be negative")
        require(self.mtp_input in MTP_INPUTS, "model.mtp_input", self.mtp_input, f"must be one of {', '.join(MTP_INPUTS)}")
        require(self.norm in NORMS, "model.norm", self.norm, f"must be one of {', '.join(NORMS)}")
        latent = self.indexer.heads == 0 or "mla" in self.attention_kinds
        require(latent, "model.indexer.heads", self.indexer.heads, 'the indexer selects keys of attention "mla", and model.attention_kinds has none: set 0')
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        require(self.remat in REMAT_POLICIES, "model.remat", self.remat, f"must be one of {', '.join(REMAT_POLICIES)}")
        require(self.attention_form in ATTENTION_FORMS, "model.attention_form", self.attention_form, f"must be one of {', '.join(ATTENTION_FORMS)}")
        require(self.expert_matmul in EXPERT_MATMULS, "model.expert_matmul", self.expert_matmul, f"must be one of {', '.join(EXPERT_MATMULS)}")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer."""
        attentions, dense = self.attention_kinds, {*range(self.dense_layers), *self.dense_also}
        return tuple(LayerKind(attentions[layer % len(attentions)], layer not in dense) for layer in range(self.layers))

    @property
    def mtp_kind(self) -> LayerKind:
        """Of an MTP module's layer: the last attention that is not delta's (released modules have none), and experts if any layer has."""
        full = [kind.attention for kind in self.kinds if kind.attention != "delta"]
        return LayerKind(full[-1] if full else "gqa", self.moe_layers > 0)

    @property
    def runs(self) -> tuple[Run, ...]:
        return runs_of(self.kinds)

    @property
    def moe_layers(self) -> int:
        return sum(kind.moe for kind in self.kinds)
