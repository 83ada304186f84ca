"""Maps the tensors of a Hugging Face checkpoint to slices of our parameters.

The mapping is one table, read in both directions. Names on the left are those of the checkpoint,
names on the right are the paths of our parameters below the layer they stand in. `layouts.py` says
how a tensor and a parameter differ.
"""

import dataclasses
import math
from collections.abc import Iterable

from checkpoints.hf.layouts import (
    ConvKernel,
    SameOrder,
    StackedExperts,
    Tensor,
    Transposed,
    whole,
)
from model.config import LayerKind, ModelConfig
from model.transformer import layer_paths

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def experts_are_fused(names: Iterable[str]) -> bool:
    """Returns whether tensors of these names have all experts of a layer in two tensors."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def tensors(model: ModelConfig, fused_experts: bool = False) -> list[Tensor]:
    """Returns every tensor of a checkpoint of this model, in the order of released checkpoints.

    Args:
      model: the model, with its vocabulary filled in.
      fused_experts: all experts of a layer are in two tensors, instead of three tensors an expert.
    """
    D, V = model.hidden_size, model.vocab_size
    top = Module("", "")
    found = [top.same(EMBEDDING, "embedding", (V, D))]
    paths = zip(layer_paths(model), model.kinds, strict=True)
    for layer, ((stack, block, index), kind) in enumerate(paths):
        module = Module(f"model.layers.{layer}.", f"{stack}/{block}/", (index,))
        found += _layer(model, kind, module, fused_experts)
    found.append(top.same("model.norm.weight", "final_norm/scale", (D,)))
    if model.tie_word_embeddings:
        head = top.same(HEAD, "embedding", (V, D)).as_copy_of(EMBEDDING)
    else:
        head = top.linear(HEAD, (D,), ("head", (V,)))
    found.append(head)
    for depth in range(model.num_nextn_predict_layers):
        found += _mtp(model, depth, fused_experts)
    return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A part of the model: where its tensors are in the checkpoint, and where among our parameters.

    Attributes:
      prefix: the beginning of its tensors' names, such as "model.layers.3.mlp.".
      path: the beginning of its parameters' paths, such as "layers_1/block_0/moe/".
      stacked: its place on the leading axes of our parameters: the layer, and the expert.
    """

    prefix: str
    path: str
    stacked: tuple[int, ...] = ()

    def inner(self, prefix: str, path: str, *stacked: int) -> "Module":
        """Returns the module of these names within this one."""
        return Module(self.prefix + prefix, self.path + path, (*self.stacked, *stacked))

    def same(
        self, name: str, leaf: str, shape: tuple[int, ...], collection: str = "params"
    ) -> Tensor:
        """Returns a tensor that is the same array here: an embedding, a norm, a bias."""
        part = whole(f"{collection}/{self.path}{leaf}", self.stacked, shape)
        return Tensor(self.prefix + name, shape, SameOrder(), (part,), axis=len(self.stacked))

    def linear(
        self,
        name: str,
        inputs: tuple[int, ...],
        *outputs: tuple[str, tuple[int, ...]],
        groups: int = 0,
    ) -> Tensor:
        """Returns a matrix, which may hold several of our parameters.

        Args:
          name: the tensor's name.
          inputs: the axes of our parameters that are the matrix's columns.
          *outputs: the path of each parameter, and its axes behind the inputs.
          groups: how often the rows of the first parameter, then those of the second, and so on
            follow each other; by default the first parameter's first axis.
        """
        columns, groups = math.prod(inputs), groups or outputs[0][1][0]
        widths = tuple(math.prod(shape) // groups for _, shape in outputs)
        return Tensor(
            self.prefix + name,
            (groups * sum(widths), columns),
            Transposed(columns, widths),
            tuple(
                whole(f"params/{self.path}{leaf}", self.stacked, (*inputs, *shape))
                for leaf, shape in outputs
            ),
            axis=len(self.stacked) + len(inputs),
            step=sum(widths),
        )

    def stacked_experts(
        self, name: str, experts: int, inputs: int, *outputs: tuple[str, int]
    ) -> Tensor:
        """Returns the matrices of all experts: `outputs` are the paths and widths of our own."""
        widths = tuple(width for _, width in outputs)
        return Tensor(
            self.prefix + name,
            (experts, sum(widths), inputs),
            StackedExperts(inputs, widths),
            tuple(
                whole(f"params/{self.path}{leaf}", self.stacked, (experts, inputs, width))
                for leaf, width in outputs
            ),
            axis=len(self.stacked),
        )

    def convolution(
        self, name: str, kernel_size: int, *outputs: tuple[str, tuple[int, int]]
    ) -> Tensor:
        """Returns the kernels of depthwise convolutions; all channels stay in one block.

        `outputs` are our paths, each with its heads and their width.
        """
        channels = tuple(math.prod(shape) for _, shape in outputs)
        return Tensor(
            self.prefix + name,
            (sum(channels), 1, kernel_size),
            ConvKernel(kernel_size, channels),
            tuple(
                whole(f"params/{self.path}{leaf}", self.stacked, (kernel_size, *shape))
                for leaf, shape in outputs
            ),
            axis=len(self.stacked) + 1,
            step=sum(channels),
        )


def _layer(model: ModelConfig, kind: LayerKind, layer: Module, fused: bool) -> list[Tensor]:
    """Lists the tensors of one layer: norms, attention, and FFN or experts."""
    D = model.hidden_size
    if kind.moe:
        ffn = _experts(model, layer.inner("mlp.", "moe/"), fused)
    else:
        ffn = _ffn(layer.inner("mlp.", "ffn/"), D, model.intermediate_size)
    return [
        layer.same("input_layernorm.weight", "attention_norm/scale", (D,)),
        *ATTENTION[kind.attention](model, layer),
        *ffn,
        layer.same("post_attention_layernorm.weight", "ffn_norm/scale", (D,)),
    ]


def _mla(model: ModelConfig, layer: Module) -> list[Tensor]:
    """Returns the tensors of multi-head latent attention; Q is the rank of the query latent."""
    a, D, module = model.mla, model.hidden_size, layer.inner("self_attn.", "attention/")
    N, R, Q = a.num_attention_heads, a.kv_lora_rank, a.q_lora_rank
    compressed = R + a.qk_rope_head_dim
    query = ("query_up", (N, a.qk_head_dim))
    if Q:
        queries = [
            module.linear("q_a_proj.weight", (D,), ("query_down", (Q,))),
            module.same("q_a_layernorm.weight", "query_norm/scale", (Q,)),
            module.linear("q_b_proj.weight", (Q,), query),
        ]
    else:
        queries = [module.linear("q_proj.weight", (D,), query)]
    keys, values = ("key_up", (N, a.qk_nope_head_dim)), ("value_up", (N, a.v_head_dim))
    return [
        *queries,
        module.linear("kv_a_proj_with_mqa.weight", (D,), ("latent_down", (compressed,))),
        module.same("kv_a_layernorm.weight", "latent_norm/scale", (R,)),
        module.linear("kv_b_proj.weight", (R,), keys, values),
        module.linear("o_proj.weight", (N, a.v_head_dim), ("out", (D,))),
        *(_indexer(model, module) if model.indexer.n_heads else []),
    ]


def _indexer(model: ModelConfig, attention: Module) -> list[Tensor]:
    """Lists the tensors of an attention's indexer."""
    # Queries read the query latent where there is one.
    D, query_inputs = model.hidden_size, model.mla.q_lora_rank or model.hidden_size
    I, C = model.indexer.n_heads, model.indexer.head_dim
    module = attention.inner("indexer.", "indexer/")
    return [
        module.linear("wq_b.weight", (query_inputs,), ("query", (I, C))),
        module.linear("wk.weight", (D,), ("key", (C,))),
        module.same("k_norm.weight", "key_norm/scale", (C,)),
        module.same("k_norm.bias", "key_norm/bias", (C,)),
        module.linear("weights_proj.weight", (D,), ("head_weight", (I,))),
    ]


def _gqa(model: ModelConfig, layer: Module) -> list[Tensor]:
    """Lists the tensors of grouped-query attention."""
    g, D, module = model.gqa, model.hidden_size, layer.inner("self_attn.", "attention/")
    N, K, H = g.num_attention_heads, g.num_key_value_heads, g.head_dim
    # The gate of a head stands behind its query.
    gate = (("gate", (N, H)),) if g.gate == "element" else ()
    found = [
        module.linear("q_proj.weight", (D,), ("query", (N, H)), *gate),
        module.linear("k_proj.weight", (D,), ("key", (K, H))),
        module.linear("v_proj.weight", (D,), ("value", (K, H))),
        module.linear("o_proj.weight", (N, H), ("out", (D,))),
    ]
    if g.qk_norm:
        found.append(module.same("q_norm.weight", "query_norm/scale", (H,)))
        found.append(module.same("k_norm.weight", "key_norm/scale", (H,)))
    return found


def _delta(model: ModelConfig, layer: Module) -> list[Tensor]:
    """Lists the tensors of Gated DeltaNet."""
    d, D, module = model.delta, model.hidden_size, layer.inner("linear_attn.", "attention/")
    K, N = d.num_key_heads, d.num_value_heads
    key, value = (K, d.key_head_dim), (N, d.value_head_dim)
    inputs = (("query", key), ("key", key), ("value", value))
    return [
        module.linear("in_proj_qkvz.weight", (D,), *inputs, ("gate", value)),
        module.linear("in_proj_ba.weight", (D,), ("strength", (N,)), ("decay", (N,)), groups=K),
        module.convolution(
            "conv1d.weight",
            d.conv_kernel_dim,
            *((f"{name}_taps", shape) for name, shape in inputs),
        ),
        module.same("A_log", "decay_rate", (N,)),
        module.same("dt_bias", "decay_bias", (N,)),
        module.same("norm.weight", "out_norm/scale", (d.value_head_dim,)),
        module.linear("out_proj.weight", value, ("out", (D,))),
    ]


ATTENTION = {"mla": _mla, "gqa": _gqa, "delta": _delta}


def _ffn(module: Module, D: int, F: int) -> list[Tensor]:
    return [
        module.linear("gate_proj.weight", (D,), ("gate", (F,))),
        module.linear("up_proj.weight", (D,), ("up", (F,))),
        module.linear("down_proj.weight", (F,), ("down", (D,))),
    ]


def _experts(model: ModelConfig, module: Module, fused: bool) -> list[Tensor]:
    """Lists the tensors of a router and its experts, whose matrices `fused` stacks."""
    m, D = model.moe, model.hidden_size
    E, F = m.num_experts, m.intermediate_size
    found = [module.linear("gate.weight", (D,), ("router", (E,)))]
    if m.router_bias:
        found.append(module.same("gate.e_score_correction_bias", "bias", (E,), "router"))
    if fused:
        found += [
            module.stacked_experts("experts.gate_up_proj", E, D, ("gate", F), ("up", F)),
            module.stacked_experts("experts.down_proj", E, F, ("down", D)),
        ]
    else:
        for expert in range(E):
            found += _ffn(module.inner(f"experts.{expert}.", "", expert), D, F)
    if m.n_shared_experts:
        name = "shared_expert" if m.shared_expert_gate else "shared_experts"
        found += _ffn(module.inner(f"{name}.", "shared/"), D, m.shared_intermediate_size)
    if m.shared_expert_gate:
        found.append(module.linear("shared_expert_gate.weight", (D,), ("shared_gate", (1,))))
    return found


def _mtp(model: ModelConfig, depth: int, fused: bool) -> list[Tensor]:
    """Returns the tensors of an MTP module.

    DeepSeek's modules are layers after the last one, with copies of the embedding and of the head.
    Qwen3-Next's one is named `mtp`.
    """
    D, V = model.hidden_size, model.vocab_size
    deepseek = model.mtp_kind.attention == "mla"
    if deepseek:
        prefix = f"model.layers.{model.num_hidden_layers + depth}."
        layer, names = "", ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    else:
        prefix, layer = "mtp.", f"layers.{depth}."
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    top, module = Module(prefix, ""), Module(prefix, f"mtp_{depth}/")
    embedding, hidden, merge, norm = (f"{name}.weight" for name in names)
    found = [
        module.same(embedding, "embedding_norm/scale", (D,)),
        module.same(hidden, "hidden_norm/scale", (D,)),
        module.linear(merge, (2, D), ("merge", (D,))),
        *_layer(model, model.mtp_kind, module.inner(layer, "block/"), fused),
        top.same(norm, f"mtp_norm_{depth}/scale", (D,)),
    ]
    if deepseek:
        embedding_copy = top.same("embed_tokens.weight", "embedding", (V, D)).as_copy_of(EMBEDDING)
        head_copy = top.linear("shared_head.head.weight", (D,), ("head", (V,))).as_copy_of(HEAD)
        found = [embedding_copy, *found, head_copy]
    return found
