"""What a model is made of, and the legend of every shape in the codebase.

    B batch          T query positions    S key positions      D width of the hidden state
    N heads          H head width         R latent rank        V vocabulary
    E experts        K chosen experts     F hidden width of an FFN
    I indexer heads  C indexer width      L layers             G group of completions

`q_BTNH` is a query of shape [B, T, N, H]. Where keys and values have fewer heads than queries
(`gqa`, `delta`), theirs are K, unless K means experts. The meaning and unit of each field stands in
configs/base.py.
"""

import dataclasses
import functools
from typing import NamedTuple

from errors import require

LAYER_TYPES = ("mla", "gqa", "delta")
NORMS = ("scale", "zero_centred")
MTP_INPUTS = ("residual", "normed")
ROUTERS = ("sigmoid", "softmax")
REMAT_POLICIES = ("none", "full", "dots")
GATES = ("none", "head", "element")
DTYPES = ("float32", "bfloat16")
ATTENTION_FORMS = ("auto", "chunks", "tiles")
EXPERT_MATMULS = ("auto", "blocks", "bucketed", "megablox", "reference", "tokamax")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), stretched by YaRN (arXiv 2309.00071) where `stretch` is
    above 1.
    """

    rope_theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    rope_interleave: bool
    indexer_rope_interleave: bool

    def __post_init__(self):
        require(self.rope_theta > 1, "model.rope.rope_theta", self.rope_theta, "must be above 1")
        require(
            self.factor >= 1, "model.rope.factor", self.factor, "must be at least 1 (1: no YaRN)"
        )
        require(
            self.factor == 1 or self.original_max_position_embeddings > 0,
            "model.rope.original_max_position_embeddings",
            self.original_max_position_embeddings,
            "must be positive: the tokens of context before stretching",
        )
        ordered = self.beta_fast >= self.beta_slow > 0
        require(
            ordered,
            "model.rope.beta_fast",
            self.beta_fast,
            f"must be at least model.rope.beta_slow = {self.beta_slow}, and that above 0",
        )
        require(
            self.attention_factor > 0,
            "model.rope.attention_factor",
            self.attention_factor,
            "must be positive",
        )


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1) with a gated output (arXiv
    2505.06708).
    """

    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    logit_scale: float
    norm_eps: float
    gate: str

    def __post_init__(self):
        for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require(
                getattr(self, name) > 0,
                f"model.mla.{name}",
                getattr(self, name),
                "must be positive",
            )
        require(
            self.q_lora_rank >= 0,
            "model.mla.q_lora_rank",
            self.q_lora_rank,
            "must be 0 (no query latent) or positive",
        )
        require(
            self.qk_rope_head_dim > 0 and self.qk_rope_head_dim % 2 == 0,
            "model.mla.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "must be even and positive",
        )
        require(self.logit_scale > 0, "model.mla.logit_scale", self.logit_scale, "must be positive")
        require(
            self.gate in GATES, "model.mla.gate", self.gate, f"must be one of {', '.join(GATES)}"
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys (arXiv
    2505.09388, section 2) and a gated output (arXiv 2505.06708).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: bool
    gate: str

    def __post_init__(self):
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            require(
                getattr(self, name) > 0,
                f"model.gqa.{name}",
                getattr(self, name),
                "must be positive",
            )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "model.gqa.num_key_value_heads",
            self.num_key_value_heads,
            f"does not divide model.gqa.num_attention_heads = {self.num_attention_heads}",
        )
        fits = 0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0
        require(
            fits,
            "model.gqa.rotary_dim",
            self.rotary_dim,
            f"must be even and at most the head width, {self.head_dim}",
        )
        require(
            self.gate in GATES, "model.gqa.gate", self.gate, f"must be one of {', '.join(GATES)}"
        )


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet (arXiv 2412.06464): attention without a softmax, over a state of fixed
    size.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int
    chunk_size: int

    def __post_init__(self):
        for name in (
            "num_key_heads",
            "num_value_heads",
            "key_head_dim",
            "value_head_dim",
            "chunk_size",
        ):
            require(
                getattr(self, name) > 0,
                f"model.delta.{name}",
                getattr(self, name),
                "must be positive",
            )
        divides = self.num_value_heads % self.num_key_heads == 0
        require(
            divides,
            "model.delta.num_key_heads",
            self.num_key_heads,
            f"does not divide model.delta.num_value_heads = {self.num_value_heads}",
        )
        require(
            self.conv_kernel_dim >= 1,
            "model.delta.conv_kernel_dim",
            self.conv_kernel_dim,
            "must be at least 1",
        )


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1). No heads,
    no indexer.
    """

    n_heads: int
    head_dim: int
    rope_head_dim: int
    topk: int
    norm_eps: float

    def __post_init__(self):
        require(
            self.n_heads >= 0,
            "model.indexer.n_heads",
            self.n_heads,
            "must be 0 (no indexer) or positive",
        )
        fits = 0 <= self.rope_head_dim <= self.head_dim and self.rope_head_dim % 2 == 0
        require(
            fits,
            "model.indexer.rope_head_dim",
            self.rope_head_dim,
            f"must be even and at most the width, {self.head_dim}",
        )
        require(self.topk > 0, "model.indexer.topk", self.topk, "must be positive")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: DeepSeek-V3's (arXiv 2412.19437, section 2.1.2), and with a softmax
    router Qwen's (arXiv 2505.09388).
    """

    num_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    intermediate_size: int
    shared_expert_intermediate_size: int
    shared_expert_gate: bool
    scoring_func: str
    router_bias: bool
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    group_topk: int
    routed_scaling_factor: float

    def __post_init__(self):
        require(
            self.scoring_func in ROUTERS,
            "model.moe.scoring_func",
            self.scoring_func,
            f"must be one of {', '.join(ROUTERS)}",
        )
        require(self.num_experts > 0, "model.moe.num_experts", self.num_experts, "must be positive")
        divisors = ", ".join(
            str(n) for n in range(1, self.num_experts + 1) if self.num_experts % n == 0
        )
        divides = self.n_group > 0 and self.num_experts % self.n_group == 0
        require(
            divides,
            "model.moe.n_group",
            self.n_group,
            f"does not divide model.moe.num_experts = {self.num_experts} (try {divisors})",
        )
        require(
            0 < self.topk_group <= self.n_group,
            "model.moe.topk_group",
            self.topk_group,
            f"must be between 1 and model.moe.n_group = {self.n_group}",
        )
        available = self.num_experts // self.n_group * self.topk_group
        require(
            0 < self.num_experts_per_tok <= available,
            "model.moe.num_experts_per_tok",
            self.num_experts_per_tok,
            f"must be between 1 and the {available} experts of the chosen groups",
        )
        each = self.num_experts // self.n_group
        require(
            0 <= self.group_topk <= each,
            "model.moe.group_topk",
            self.group_topk,
            f"must be 0 (chosen / chosen_groups) or at most the {each} of a group",
        )
        require(
            self.n_shared_experts >= 0,
            "model.moe.n_shared_experts",
            self.n_shared_experts,
            "must not be negative",
        )
        require(
            self.shared_expert_intermediate_size >= 0,
            "model.moe.shared_expert_intermediate_size",
            self.shared_expert_intermediate_size,
            "must be 0 (model.moe.intermediate_size) or positive",
        )
        something = self.n_shared_experts > 0 or not self.shared_expert_gate
        require(
            something,
            "model.moe.shared_expert_gate",
            self.shared_expert_gate,
            "gates the shared experts, and model.moe.n_shared_experts = 0 builds none",
        )
        require(
            self.intermediate_size > 0,
            "model.moe.intermediate_size",
            self.intermediate_size,
            "must be positive",
        )

    @property
    def shared_intermediate_size(self) -> int:
        """Hidden width of all shared experts together, which are one FFN."""
        return self.n_shared_experts * (
            self.shared_expert_intermediate_size or self.intermediate_size
        )


class LayerKind(NamedTuple):
    """What a layer is made of."""

    attention: str
    moe: bool


class LayerStack(NamedTuple):
    """Layers `first` .. `first + len(kinds) * repeats - 1`: the same few kinds again and again,
    compiled once and scanned.
    """

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.kinds) * self.repeats


@functools.cache
def layer_stacks(kinds: tuple[LayerKind, ...]) -> tuple[LayerStack, ...]:
    """Cuts the layers into runs: from each start on, the period that repeats over the most layers,
    the shorter one where two are even.
    """
    found, first = [], 0
    while first < len(kinds):
        best = LayerStack(first, kinds[first : first + 1], 1)
        for period in range(1, (len(kinds) - first) // 2 + 1):
            repeats = 1
            while (
                kinds[first + repeats * period : first + (repeats + 1) * period]
                == kinds[first : first + period]
            ):
                repeats += 1
            if repeats > 1 and period * repeats > best.layers:
                best = LayerStack(first, kinds[first : first + period], repeats)
        found.append(best)
        first += best.layers
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    first_k_dense_replace: int
    mlp_only_layers: tuple[int, ...]
    intermediate_size: int
    canon_kernel_size: int
    num_nextn_predict_layers: int
    mtp_input: str
    tie_word_embeddings: bool
    norm: str
    rms_norm_eps: float
    initializer_range: float
    dtype: str
    remat: str
    scan_unroll: int
    attention_form: str
    query_chunk: int
    causal_parts: int
    logit_chunk: int
    expert_matmul: str
    rope: RopeConfig
    mla: MLAConfig
    gqa: GQAConfig
    delta: DeltaConfig
    indexer: IndexerConfig
    moe: MoEConfig

    def __post_init__(self):
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "query_chunk",
            "causal_parts",
            "logit_chunk",
            "scan_unroll",
        ):
            require(
                getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive"
            )
        require(
            self.vocab_size >= 0,
            "model.vocab_size",
            self.vocab_size,
            "must be 0 (the tokenizer's) or positive",
        )
        known = len(self.layer_types) > 0 and all(kind in LAYER_TYPES for kind in self.layer_types)
        require(
            known,
            "model.layer_types",
            self.layer_types,
            f"must be one or several of {', '.join(LAYER_TYPES)}",
        )
        require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            "model.first_k_dense_replace",
            self.first_k_dense_replace,
            f"must be between 0 and model.num_hidden_layers = {self.num_hidden_layers}",
        )
        inside = all(0 <= layer < self.num_hidden_layers for layer in self.mlp_only_layers)
        require(
            inside,
            "model.mlp_only_layers",
            self.mlp_only_layers,
            f"must be numbers of layers, 0 to {self.num_hidden_layers - 1}",
        )
        require(
            self.moe_layers == self.num_hidden_layers or self.intermediate_size > 0,
            "model.intermediate_size",
            self.intermediate_size,
            "must be positive",
        )
        require(
            self.canon_kernel_size == 0 or self.canon_kernel_size >= 2,
            "model.canon_kernel_size",
            self.canon_kernel_size,
            "must be 0 (no convolution) or at least 2 taps",
        )
        require(
            self.num_nextn_predict_layers >= 0,
            "model.num_nextn_predict_layers",
            self.num_nextn_predict_layers,
            "must not be negative",
        )
        require(
            self.mtp_input in MTP_INPUTS,
            "model.mtp_input",
            self.mtp_input,
            f"must be one of {', '.join(MTP_INPUTS)}",
        )
        require(self.norm in NORMS, "model.norm", self.norm, f"must be one of {', '.join(NORMS)}")
        latent = self.indexer.n_heads == 0 or "mla" in self.layer_types
        require(
            latent,
            "model.indexer.n_heads",
            self.indexer.n_heads,
            'the indexer selects keys of attention "mla", and model.layer_types has none: set 0',
        )
        require(
            self.dtype in DTYPES, "model.dtype", self.dtype, f"must be one of {', '.join(DTYPES)}"
        )
        require(
            self.remat in REMAT_POLICIES,
            "model.remat",
            self.remat,
            f"must be one of {', '.join(REMAT_POLICIES)}",
        )
        require(
            self.attention_form in ATTENTION_FORMS,
            "model.attention_form",
            self.attention_form,
            f"must be one of {', '.join(ATTENTION_FORMS)}",
        )
        require(
            self.expert_matmul in EXPERT_MATMULS,
            "model.expert_matmul",
            self.expert_matmul,
            f"must be one of {', '.join(EXPERT_MATMULS)}",
        )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer."""
        attentions, dense = (
            self.layer_types,
            {*range(self.first_k_dense_replace), *self.mlp_only_layers},
        )
        return tuple(
            LayerKind(attentions[layer % len(attentions)], layer not in dense)
            for layer in range(self.num_hidden_layers)
        )

    @property
    def mtp_kind(self) -> LayerKind:
        """Of an MTP module's layer: the last attention that is not delta's (released modules have
        none), and experts if any layer has.
        """
        full = [kind.attention for kind in self.kinds if kind.attention != "delta"]
        return LayerKind(full[-1] if full else "gqa", self.moe_layers > 0)

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        return layer_stacks(self.kinds)

    @property
    def moe_layers(self) -> int:
        return sum(kind.moe for kind in self.kinds)
