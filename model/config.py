"""Describes what a model is made of, with the legend of every shape in the codebase.

    B batch (rows)     T query positions   S key positions     D hidden_size
    N heads            H head width        R latent rank       V vocabulary, or a value's width
    E experts          K top-k experts, or key-value heads     F hidden width of an FFN
    I indexer heads    L layers            P prompts           G completions of one prompt
    C indexer width, or tokens of a completion or a chunk      M microbatches
    W words of a bitmask, 32 keys each

`q_BTNH` is a query of shape [B, T, N, H]. A letter with another meaning is explained in the
docstring of the function or file that uses it.

Fields of the model have the names of Hugging Face's config.json (DeepSeek-V3's, and Qwen's where
DeepSeek has none) wherever it has a key for them, without a prefix that the section already says:
`model.indexer.topk` is index_topk. Fields without such a key have names of our own.
"""

import dataclasses

from errors import FieldChecks
from model.layer_configs import (
    DeltaConfig,
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    MoEConfig,
    RopeConfig,
)
from model.stacks import LayerKind, LayerStack, layer_stacks

STAGES = ("dense", "warmup", "sparse")
NORMS = ("scale", "zero_centred")
MTP_INPUTS = ("residual", "normed")
REMAT_POLICIES = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")
ATTENTION_FORMS = ("auto", "chunks", "gathered", "tiles")
EXPERT_MATMULS = ("auto", "blocks", "bucketed", "megablox", "reference", "tokamax")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The section `model` of a config: the architecture, and how it is computed."""

    vocab_size: int = 0  # V, rows of the embedding; 0 takes the tokenizer's
    hidden_size: int = 256  # D
    num_hidden_layers: int = 6  # L, the dense ones included
    # The attention of each layer: "mla" (model.mla) | "gqa" (model.gqa) | "delta" (model.delta).
    # The list begins again when it is used up: ("delta", "delta", "delta", "gqa") is Qwen3-Next's.
    layer_types: tuple[str, ...] = ("mla",)
    first_k_dense_replace: int = 1  # the first layers have one dense FFN in place of experts
    mlp_only_layers: tuple[int, ...] = ()  # numbers (from 0) of further layers that have one
    intermediate_size: int = 704  # F, hidden width of that FFN
    # Tokens that a causal convolution over the hidden states before attention spans (Canon-A,
    # arXiv 2512.17351); 0 for none.
    canon_kernel_size: int = 0
    num_nextn_predict_layers: int = 1  # multi-token prediction modules; 0 for none
    # The input of the first MTP module: the last layer's output | "normed": after the final norm,
    # as released.
    mtp_input: str = "residual"
    tie_word_embeddings: bool = False  # the output head is the embedding transposed
    norm: str = "scale"  # RMS norms multiply by their parameter | "zero_centred": by 1 + it
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02  # standard deviation of every weight matrix
    dtype: str = "float32"  # of the computation: "float32" | "bfloat16"; parameters are float32
    # What a layer keeps for its backward pass: "dots" the results of its matmuls | "full" its input
    # alone | "none" all.
    remat: str = "dots"
    scan_unroll: int = 1  # periods of layers per iteration of the scan over them
    # "chunks" of queries by XLA | "tiles" by Pallas kernels (TPU and Hopper; interpreted on a CPU,
    # very slowly) | "gathered": in stage "sparse" the selected latents alone, else chunks | "auto":
    # tiles on TPU where a row has 512 tokens or more; gathered on a CPU where a row has twelve
    # times as many as the indexer selects; else chunks.
    attention_form: str = "auto"
    query_chunk: int = 512  # queries handled at a time by "chunks"
    # The parts that "chunks" cuts a sequence into, each attending over the keys up to its own end.
    causal_parts: int = 4
    logit_chunk: int = 1024  # tokens of a row that the output head handles at a time
    # "auto" | "blocks" | "bucketed" | "megablox" | "reference" | "tokamax": model/experts/table.py
    expert_matmul: str = "auto"
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    mla: MLAConfig = dataclasses.field(default_factory=MLAConfig)
    gqa: GQAConfig = dataclasses.field(default_factory=GQAConfig)
    delta: DeltaConfig = dataclasses.field(default_factory=DeltaConfig)
    indexer: IndexerConfig = dataclasses.field(default_factory=IndexerConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self):
        check = FieldChecks(self, "model")
        check.positive("hidden_size", "num_hidden_layers", "query_chunk", "causal_parts")
        check.positive("logit_chunk", "scan_unroll")
        check.that(self.vocab_size >= 0, "vocab_size", "must be 0 (the tokenizer's) or positive")
        # A type of attention is a section that says what it costs.
        types = [name for name, section in vars(self).items() if hasattr(section, "cost")]
        known = len(self.layer_types) > 0 and all(kind in types for kind in self.layer_types)
        check.that(known, "layer_types", f"must be one or several of {', '.join(types)}")
        layers = self.num_hidden_layers
        check.that(
            0 <= self.first_k_dense_replace <= layers,
            "first_k_dense_replace",
            f"must be between 0 and model.num_hidden_layers = {layers}",
        )
        inside = all(0 <= layer < layers for layer in self.mlp_only_layers)
        check.that(inside, "mlp_only_layers", f"must be numbers of layers, 0 to {layers - 1}")
        wide = self.moe_layers == layers or self.intermediate_size > 0
        check.that(wide, "intermediate_size", "must be positive")
        spans = self.canon_kernel_size == 0 or self.canon_kernel_size >= 2
        check.that(spans, "canon_kernel_size", "must be 0 (no convolution) or at least 2 tokens")
        check.not_negative("num_nextn_predict_layers")
        if self.indexer.n_heads > 0:
            FieldChecks(self.indexer, "model.indexer").that(
                "mla" in self.layer_types,
                "n_heads",
                'the indexer selects keys of "mla", and model.layer_types has none: set 0',
            )
        check.one_of("mtp_input", MTP_INPUTS)
        check.one_of("norm", NORMS)
        check.one_of("dtype", DTYPES)
        check.one_of("remat", REMAT_POLICIES)
        check.one_of("attention_form", ATTENTION_FORMS)
        check.one_of("expert_matmul", EXPERT_MATMULS)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, in order."""
        dense = {*range(self.first_k_dense_replace), *self.mlp_only_layers}
        return tuple(
            LayerKind(self.layer_types[layer % len(self.layer_types)], layer not in dense)
            for layer in range(self.num_hidden_layers)
        )

    @property
    def mtp_kind(self) -> LayerKind:
        """The kind of an MTP module's layer.

        Its attention is the last of the model's that is not delta's (released modules have none),
        and it has experts if any layer has.
        """
        full = [kind.attention for kind in self.kinds if kind.attention != "delta"]
        return LayerKind(full[-1] if full else "gqa", self.moe_layers > 0)

    @property
    def stacks(self) -> tuple[LayerStack, ...]:
        """The layers, cut into stacks that are scanned."""
        return layer_stacks(self.kinds)

    @property
    def moe_layers(self) -> int:
        """The number of layers with experts."""
        return sum(kind.moe for kind in self.kinds)
