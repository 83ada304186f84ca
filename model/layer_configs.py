"""The sections of the model's config that describe one kind of layer each.

Fields have the names of Hugging Face's config.json where there is one (see model/config.py). Each
is written once, here, with its default, meaning and unit.
"""

import dataclasses
from typing import NamedTuple

from errors import FieldChecks

SCORING_FUNCS = ("sigmoid", "softmax")
GATES = ("none", "head", "element")


class AttentionCost(NamedTuple):
    """The multiply-adds of one layer's attention besides those of its parameters.

    Attributes:
      expanded: for each key that a query attends to, in training and prefill.
      cached: the same in decoding, over what is cached.
      constant: for each token, whatever the context.
      most_keys: how many keys a query attends to at most; None for no limit.
    """

    expanded: int = 0
    cached: int = 0
    constant: int = 0
    most_keys: int | None = None


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), and YaRN (arXiv 2309.00071) where factor > 1."""

    rope_theta: float = 10_000.0  # the slowest channels turn once in about 2 pi theta tokens
    factor: float = 1.0  # YaRN: the context is this many times the original one; 1 for none
    original_max_position_embeddings: int = 4_096  # tokens of context before YaRN
    # Channels that turn more often than beta_fast over the original context keep their speed, those
    # that turn less often than beta_slow are slowed by `factor`, and between the two is a ramp.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp begins and ends on whole channels
    # Multiplies cos and sin: YaRN's 0.1 ln(factor) + 1, where it is not in mla.logit_scale.
    attention_factor: float = 1.0
    # MLA rotates the channels (0, 1), (2, 3), ...; else (0, H/2), (1, H/2 + 1), ... as gqa does.
    rope_interleave: bool = True
    indexer_rope_interleave: bool = False  # the same for the indexer; released weights want halves

    def __post_init__(self):
        check = FieldChecks(self, "model.rope")
        check.that(self.rope_theta > 1, "rope_theta", "must be above 1")
        check.that(self.factor >= 1, "factor", "must be at least 1 (1: no YaRN)")
        check.that(
            self.factor == 1 or self.original_max_position_embeddings > 0,
            "original_max_position_embeddings",
            "must be positive: the tokens of context before YaRN",
        )
        check.that(
            self.beta_fast >= self.beta_slow > 0,
            "beta_fast",
            f"must be at least model.rope.beta_slow = {self.beta_slow}, and that above 0",
        )
        check.positive("attention_factor")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1) with a gated output.

    The gate is that of arXiv 2505.06708.
    """

    num_attention_heads: int = 8  # N
    q_lora_rank: int = 128  # width of the query latent; 0 projects queries from the hidden state
    kv_lora_rank: int = 64  # R, width of the key-value latent
    qk_nope_head_dim: int = 32  # per head, without position
    qk_rope_head_dim: int = 16  # per head, rotated; its key is shared by all heads
    v_head_dim: int = 32  # V, per head
    # Multiplies the logits beside qk_head_dim ** -0.5: DeepSeek's YaRN has
    # (0.1 mscale_all_dim ln(factor) + 1) ** 2.
    logit_scale: float = 1.0
    norm_eps: float = 1e-6  # of the norms of the two latents
    gate: str = "element"  # sigmoid gate on the attention output: "none" | "head" | "element"

    def __post_init__(self):
        check = FieldChecks(self, "model.mla")
        check.positive("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        check.that(self.q_lora_rank >= 0, "q_lora_rank", "must be 0 (no query latent) or positive")
        even = self.qk_rope_head_dim > 0 and self.qk_rope_head_dim % 2 == 0
        check.that(even, "qk_rope_head_dim", "must be even and positive")
        check.positive("logit_scale")
        check.one_of("gate", GATES)

    @property
    def qk_head_dim(self) -> int:
        """The width of a head's query and key, rotated part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cost(self) -> AttentionCost:
        """The cost of attention per head, and over latents in decoding."""
        heads = self.num_attention_heads
        return AttentionCost(
            expanded=heads * (self.qk_head_dim + self.v_head_dim),
            cached=heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim),
        )


@dataclasses.dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention (arXiv 2305.13245) with normed queries and keys and a gated output.

    The norms are those of arXiv 2505.09388, section 2; the gate is that of arXiv 2505.06708.
    """

    num_attention_heads: int = 8  # N
    num_key_value_heads: int = 2  # K
    head_dim: int = 32  # H
    rotary_dim: int = 32  # channels of a head that are rotated
    qk_norm: bool = True  # RMS norm over each head's query and key
    gate: str = "element"  # as in model.mla

    def __post_init__(self):
        check = FieldChecks(self, "model.gqa")
        check.positive("num_attention_heads", "num_key_value_heads", "head_dim")
        check.that(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            f"does not divide model.gqa.num_attention_heads = {self.num_attention_heads}",
        )
        fits = 0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0
        check.that(fits, "rotary_dim", f"must be even and at most head_dim = {self.head_dim}")
        check.one_of("gate", GATES)

    @property
    def cost(self) -> AttentionCost:
        """The cost of attention, the same over a sequence and over a cache."""
        each = 2 * self.num_attention_heads * self.head_dim
        return AttentionCost(expanded=each, cached=each)


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet (arXiv 2412.06464): attention without a softmax, over a state of fixed size.

    Hugging Face's keys are these with the prefix linear_.
    """

    num_key_heads: int = 4  # queries have as many
    num_value_heads: int = (
        8  # value head n reads with key head n * num_key_heads // num_value_heads
    )
    key_head_dim: int = 32
    value_head_dim: int = 32
    conv_kernel_dim: int = 4  # tokens the causal convolutions over queries, keys and values span
    chunk_size: int = 64  # tokens between which the state is carried; within, it is matmuls

    def __post_init__(self):
        check = FieldChecks(self, "model.delta")
        check.positive("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        check.positive("chunk_size")
        check.that(
            self.num_value_heads % self.num_key_heads == 0,
            "num_key_heads",
            f"does not divide model.delta.num_value_heads = {self.num_value_heads}",
        )
        check.that(self.conv_kernel_dim >= 1, "conv_kernel_dim", "must be at least 1")

    @property
    def cost(self) -> AttentionCost:
        """The cost of reading, correcting and writing the state."""
        state = self.num_value_heads * self.key_head_dim * self.value_head_dim
        return AttentionCost(constant=3 * state)


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The lightning indexer of DeepSeek sparse attention (arXiv 2512.02556, section 2.1).

    Hugging Face's keys are these with the prefix index_.
    """

    n_heads: int = 4  # I; 0 builds no indexer
    head_dim: int = 32  # C
    rope_head_dim: int = 16  # channels of a head that are rotated
    topk: int = 64  # keys each query attends to in the sparse stage, or all where there are fewer
    norm_eps: float = 1e-6  # of the layer norm of its keys

    def __post_init__(self):
        check = FieldChecks(self, "model.indexer")
        check.that(self.n_heads >= 0, "n_heads", "must be 0 (no indexer) or positive")
        fits = 0 <= self.rope_head_dim <= self.head_dim and self.rope_head_dim % 2 == 0
        check.that(fits, "rope_head_dim", f"must be even and at most head_dim = {self.head_dim}")
        check.positive("topk")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: DeepSeek-V3's (arXiv 2412.19437, section 2.1.2) and Qwen's.

    Qwen's (arXiv 2505.09388) has a softmax router, no groups and no bias. `intermediate_size` is
    Hugging Face's moe_intermediate_size.
    """

    num_experts: int = 8  # E, routed; DeepSeek's config.json says n_routed_experts
    num_experts_per_tok: int = 2  # K, routed experts per token
    n_shared_experts: int = 1  # experts every token goes through
    intermediate_size: int = 176  # F, hidden width of one expert
    shared_expert_intermediate_size: int = 0  # of one shared expert; 0 takes intermediate_size
    shared_expert_gate: bool = False  # the shared experts' output times sigmoid(x w)
    # An expert's score: "sigmoid" of its own logit | "softmax" over all experts.
    scoring_func: str = "sigmoid"
    # Experts are chosen by score plus a bias that evens out their load; the gates do not see it.
    router_bias: bool = True
    norm_topk_prob: bool = True  # the gates of the chosen experts are divided by their sum
    n_group: int = 1  # experts are chosen from the best topk_group of n_group groups
    topk_group: int = 1
    # A group counts for the sum of its so many best biased scores; 0 takes
    # num_experts_per_tok / topk_group, as the paper has it (released code: always 2).
    group_topk: int = 0
    routed_scaling_factor: float = 1.0  # multiplies the gates of the routed experts

    def __post_init__(self):
        check = FieldChecks(self, "model.moe")
        check.one_of("scoring_func", SCORING_FUNCS)
        check.positive("num_experts", "intermediate_size")
        count = self.num_experts
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        check.that(
            self.n_group > 0 and count % self.n_group == 0,
            "n_group",
            f"does not divide model.moe.num_experts = {count} (try {divisors})",
        )
        check.that(
            0 < self.topk_group <= self.n_group,
            "topk_group",
            f"must be between 1 and model.moe.n_group = {self.n_group}",
        )
        a_group = count // self.n_group
        check.that(
            0 < self.num_experts_per_tok <= a_group * self.topk_group,
            "num_experts_per_tok",
            f"must be between 1 and the {a_group * self.topk_group} experts of the chosen groups",
        )
        check.that(
            0 <= self.group_topk <= a_group,
            "group_topk",
            f"must be 0 (num_experts_per_tok / topk_group) or at most the {a_group} of a group",
        )
        check.not_negative("n_shared_experts")
        check.that(
            self.shared_expert_intermediate_size >= 0,
            "shared_expert_intermediate_size",
            "must be 0 (model.moe.intermediate_size) or positive",
        )
        check.that(
            self.n_shared_experts > 0 or not self.shared_expert_gate,
            "shared_expert_gate",
            "gates the shared experts, and model.moe.n_shared_experts = 0 builds none",
        )

    @property
    def shared_intermediate_size(self) -> int:
        """The hidden width of all shared experts together, which are one FFN."""
        one = self.shared_expert_intermediate_size or self.intermediate_size
        return self.n_shared_experts * one
