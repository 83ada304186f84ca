"""Which tensor of a Hugging Face checkpoint is which part of which parameter of ours: one table,
read in both directions.

A tensor there is one layer's, and one expert's; a parameter here is stacked over layers and
experts. So a tensor is one or several `Part`s of ours, and a layout says how its rows become
theirs. It is handled a few rows at a time: neither side ever needs a whole tensor in memory.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from model.config import ModelConfig
from model.stacks import LayerKind
from model.transformer import layer_paths


class Part(NamedTuple):
    """A piece of one of our leaves: the leaf's name, the place on its leading axes, and the shape
    of the rest.
    """

    leaf: str  # "params/layers_1/block_0/moe/gate"
    index: tuple[int, ...]
    shape: tuple[int, ...]


Piece = tuple[Part, tuple[slice, ...], np.ndarray]  # values for `index` + slices of the part's leaf


@dataclasses.dataclass(frozen=True)
class Rows:
    """Kept as it is: embeddings, norms, biases. Its rows are ours."""

    shape: tuple[int, ...]
    step: int = 1

    def slices(self, part: Part, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(start, stop), *(slice(0, size) for size in part.shape[1:]))

    def decode(self, rows: np.ndarray, parts: tuple[Part, ...], start: int) -> list[np.ndarray]:
        return [rows]

    def encode(self, values: list[np.ndarray]) -> np.ndarray:
        return values[0]


@dataclasses.dataclass(frozen=True)
class Linear:
    """torch's [out, in] to our [*inputs, *outputs]. The rows of several of our parts may be
    interleaved by group (a head, mostly): each group has first its rows of the first part, then
    those of the second, and so on.
    """

    inputs: tuple[int, ...]
    groups: int
    outputs: tuple[tuple[int, ...], ...]  # of each part; the first axis is a multiple of the groups

    @property
    def widths(self) -> list[int]:
        """Rows of each part in a group."""
        return [math.prod(output) // self.groups for output in self.outputs]

    @property
    def step(self) -> int:
        """Rows of a group: as few as can be handled at a time."""
        return sum(self.widths)

    @property
    def shape(self) -> tuple[int, int]:
        return self.groups * self.step, math.prod(self.inputs)

    def slices(self, part: Part, start: int, stop: int) -> tuple[slice, ...]:
        outputs = part.shape[len(self.inputs) :]
        each = outputs[0] // self.groups
        first, last = start // self.step * each, stop // self.step * each
        return (
            *(slice(0, size) for size in self.inputs),
            slice(first, last),
            *(slice(0, size) for size in outputs[1:]),
        )

    def decode(self, rows: np.ndarray, parts: tuple[Part, ...], start: int) -> list[np.ndarray]:
        grouped = rows.reshape(-1, self.step, rows.shape[-1])
        pieces = np.split(grouped, np.cumsum(self.widths)[:-1], axis=1)
        return [
            piece.reshape(-1, rows.shape[-1]).T.reshape(
                *self.inputs, len(grouped) * (output[0] // self.groups), *output[1:]
            )
            for piece, output in zip(pieces, self.outputs, strict=True)
        ]

    def encode(self, values: list[np.ndarray]) -> np.ndarray:
        columns = math.prod(self.inputs)
        pieces = [
            value.reshape(columns, -1).T.reshape(-1, width, columns)
            for value, width in zip(values, self.widths, strict=True)
        ]
        return np.concatenate(pieces, axis=1).reshape(-1, columns)


@dataclasses.dataclass(frozen=True)
class ConvKernel:
    """torch's depthwise Conv1d [channels, 1, taps], the oldest input's tap first, to our [taps,
    heads, width] of several parts, one after the other.
    """

    taps: int
    outputs: tuple[tuple[int, int], ...]

    @property
    def step(self) -> int:
        return sum(math.prod(output) for output in self.outputs)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.step, 1, self.taps

    def slices(self, part: Part, start: int, stop: int) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in part.shape)

    def decode(self, rows: np.ndarray, parts: tuple[Part, ...], start: int) -> list[np.ndarray]:
        pieces = np.split(
            rows[:, 0], np.cumsum([math.prod(output) for output in self.outputs])[:-1]
        )
        return [
            piece.T[::-1].reshape(self.taps, *output)
            for piece, output in zip(pieces, self.outputs, strict=True)
        ]

    def encode(self, values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([value.reshape(self.taps, -1)[::-1].T for value in values])[:, None]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """All experts' matrices in one tensor, as transformers has them in memory (and saves them if
    told not to take them apart): its rows are the experts.
    """

    experts: int
    one: Linear
    step: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts, *self.one.shape

    def slices(self, part: Part, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(start, stop), *(slice(0, size) for size in part.shape[1:]))

    def decode(self, rows: np.ndarray, parts: tuple[Part, ...], start: int) -> list[np.ndarray]:
        return [
            np.stack(of_part)
            for of_part in zip(*(self.one.decode(expert, parts, 0) for expert in rows), strict=True)
        ]

    def encode(self, values: list[np.ndarray]) -> np.ndarray:
        return np.stack(
            [self.one.encode(list(of_expert)) for of_expert in zip(*values, strict=True)]
        )


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint. `copy_of` names the tensor it repeats, where it does: it may
    then be missing.
    """

    name: str
    layout: Rows | Linear | ConvKernel | Stacked
    parts: tuple[Part, ...]
    copy_of: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    def blocks(self, most: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of rows, together all of them, each at most about `most` elements."""
        rows, step = self.shape[0], self.layout.step
        wanted = max(1, most // (step * math.prod(self.shape[1:]))) * step
        return ((start, min(start + wanted, rows)) for start in range(0, rows, wanted))

    def decode(self, rows: np.ndarray, start: int) -> list[Piece]:
        """Rows from `start` on, as pieces of our leaves."""
        values = self.layout.decode(rows, self.parts, start)
        where = [self.layout.slices(part, start, start + len(rows)) for part in self.parts]
        return list(zip(self.parts, where, values, strict=True))

    def wanted(self, start: int, stop: int) -> list[tuple[Part, tuple[slice, ...]]]:
        """What of our leaves `encode` needs for these rows."""
        return [(part, self.layout.slices(part, start, stop)) for part in self.parts]

    def encode(self, values: list[np.ndarray]) -> np.ndarray:
        return self.layout.encode(values)


def fused(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a checkpoint with all experts in one."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def tensors(model: ModelConfig, fused: bool = False) -> list[Tensor]:
    """Every tensor of a checkpoint of this model, in the order in which released checkpoints have
    them; `fused`: with all experts of a layer in two of them.
    """
    D, V = model.hidden_size, model.vocab_size
    found = [
        Tensor("model.embed_tokens.weight", Rows((V, D)), (Part("params/embedding", (), (V, D)),))
    ]
    for layer, ((run, block, index), kind) in enumerate(
        zip(layer_paths(model), model.kinds, strict=True)
    ):
        found += _layer(model, kind, f"model.layers.{layer}", f"{run}/{block}", (index,), fused)
    found.append(_vector("model.norm.weight", "params/final_norm/scale", (), D))
    head = (
        (Part("params/embedding", (), (V, D)),)
        if model.tie_word_embeddings
        else (Part("params/head", (), (D, V)),)
    )
    layout = Rows((V, D)) if model.tie_word_embeddings else Linear((D,), V, ((V,),))
    found.append(
        Tensor(
            "lm_head.weight",
            layout,
            head,
            "model.embed_tokens.weight" if model.tie_word_embeddings else "",
        )
    )
    for depth in range(model.num_nextn_predict_layers):
        found += _mtp(model, depth, fused)
    return found


def _vector(name: str, leaf: str, index: tuple[int, ...], size: int) -> Tensor:
    return Tensor(name, Rows((size,)), (Part(leaf, index, (size,)),))


def _linear(
    name: str,
    inputs: tuple[int, ...],
    groups: int,
    index: tuple[int, ...],
    *outputs: tuple[str, tuple[int, ...]],
) -> Tensor:
    """`outputs`: each part's leaf, and the shape of what comes after the inputs."""
    layout = Linear(inputs, groups, tuple(shape for _, shape in outputs))
    return Tensor(
        name, layout, tuple(Part(leaf, index, (*inputs, *shape)) for leaf, shape in outputs)
    )


def _layer(
    model: ModelConfig, kind: LayerKind, theirs: str, ours: str, index: tuple[int, ...], fused: bool
) -> list[Tensor]:
    attention = {"mla": _latent, "gqa": _grouped, "delta": _delta}[kind.attention]
    found = [
        _vector(
            f"{theirs}.input_layernorm.weight",
            f"params/{ours}/attention_norm/scale",
            index,
            model.hidden_size,
        )
    ]
    found += attention(model, theirs, f"params/{ours}/attention", index)
    if kind.moe:
        found += _experts(model, f"{theirs}.mlp", ours, index, fused)
    else:
        found += _ffn(model, f"{theirs}.mlp", f"params/{ours}/ffn", index, model.intermediate_size)
    return [
        *found,
        _vector(
            f"{theirs}.post_attention_layernorm.weight",
            f"params/{ours}/ffn_norm/scale",
            index,
            model.hidden_size,
        ),
    ]


def _latent(model: ModelConfig, theirs: str, ours: str, index: tuple[int, ...]) -> list[Tensor]:
    a, i, D, theirs = model.mla, model.indexer, model.hidden_size, f"{theirs}.self_attn"
    N, R, Q = a.num_attention_heads, a.kv_lora_rank, a.q_lora_rank
    if Q:
        found = [
            _linear(f"{theirs}.q_a_proj.weight", (D,), Q, index, (f"{ours}/query_down", (Q,))),
            _vector(f"{theirs}.q_a_layernorm.weight", f"{ours}/query_norm/scale", index, Q),
            _linear(
                f"{theirs}.q_b_proj.weight",
                (Q,),
                N,
                index,
                (f"{ours}/query_up", (N, a.qk_head_dim)),
            ),
        ]
    else:
        found = [
            _linear(
                f"{theirs}.q_proj.weight", (D,), N, index, (f"{ours}/query_up", (N, a.qk_head_dim))
            )
        ]
    up = (f"{ours}/key_up", (N, a.qk_nope_head_dim)), (f"{ours}/value_up", (N, a.v_head_dim))
    found += [
        _linear(
            f"{theirs}.kv_a_proj_with_mqa.weight",
            (D,),
            R + a.qk_rope_head_dim,
            index,
            (f"{ours}/latent_down", (R + a.qk_rope_head_dim,)),
        ),
        _vector(f"{theirs}.kv_a_layernorm.weight", f"{ours}/latent_norm/scale", index, R),
        _linear(f"{theirs}.kv_b_proj.weight", (R,), N, index, *up),
        _linear(f"{theirs}.o_proj.weight", (N, a.v_head_dim), D, index, (f"{ours}/out", (D,))),
    ]
    if i.n_heads:
        found += [
            _linear(
                f"{theirs}.indexer.wq_b.weight",
                (Q or D,),
                i.n_heads,
                index,
                (f"{ours}/indexer/query", (i.n_heads, i.head_dim)),
            ),
            _linear(
                f"{theirs}.indexer.wk.weight",
                (D,),
                i.head_dim,
                index,
                (f"{ours}/indexer/key", (i.head_dim,)),
            ),
            _vector(
                f"{theirs}.indexer.k_norm.weight",
                f"{ours}/indexer/key_norm/scale",
                index,
                i.head_dim,
            ),
            _vector(
                f"{theirs}.indexer.k_norm.bias", f"{ours}/indexer/key_norm/bias", index, i.head_dim
            ),
            _linear(
                f"{theirs}.indexer.weights_proj.weight",
                (D,),
                i.n_heads,
                index,
                (f"{ours}/indexer/head_weight", (i.n_heads,)),
            ),
        ]
    return found


def _grouped(model: ModelConfig, theirs: str, ours: str, index: tuple[int, ...]) -> list[Tensor]:
    g, D, theirs = model.gqa, model.hidden_size, f"{theirs}.self_attn"
    N, K, H = g.num_attention_heads, g.num_key_value_heads, g.head_dim
    gate = (
        ((f"{ours}/gate", (N, H)),) if g.gate == "element" else ()
    )  # a head's gate stands behind its query
    found = [
        _linear(f"{theirs}.q_proj.weight", (D,), N, index, (f"{ours}/query", (N, H)), *gate),
        _linear(f"{theirs}.k_proj.weight", (D,), K, index, (f"{ours}/key", (K, H))),
        _linear(f"{theirs}.v_proj.weight", (D,), K, index, (f"{ours}/value", (K, H))),
        _linear(f"{theirs}.o_proj.weight", (N, H), D, index, (f"{ours}/out", (D,))),
    ]
    if g.qk_norm:
        found += [
            _vector(f"{theirs}.{letter}_norm.weight", f"{ours}/{name}_norm/scale", index, H)
            for letter, name in (("q", "query"), ("k", "key"))
        ]
    return found


def _delta(model: ModelConfig, theirs: str, ours: str, index: tuple[int, ...]) -> list[Tensor]:
    d, D, theirs = model.delta, model.hidden_size, f"{theirs}.linear_attn"
    keys, values = (d.num_key_heads, d.key_head_dim), (d.num_value_heads, d.value_head_dim)
    taps = ConvKernel(d.conv_kernel_dim, (keys, keys, values))
    names = ("query", keys), ("key", keys), ("value", values)
    projections = *((f"{ours}/{name}", shape) for name, shape in names), (f"{ours}/gate", values)
    rates = (f"{ours}/strength", (d.num_value_heads,)), (f"{ours}/decay", (d.num_value_heads,))
    return [
        _linear(f"{theirs}.in_proj_qkvz.weight", (D,), d.num_key_heads, index, *projections),
        _linear(f"{theirs}.in_proj_ba.weight", (D,), d.num_key_heads, index, *rates),
        Tensor(
            f"{theirs}.conv1d.weight",
            taps,
            tuple(
                Part(f"{ours}/{name}_taps", index, (d.conv_kernel_dim, *shape))
                for name, shape in names
            ),
        ),
        _vector(f"{theirs}.A_log", f"{ours}/decay_rate", index, d.num_value_heads),
        _vector(f"{theirs}.dt_bias", f"{ours}/decay_bias", index, d.num_value_heads),
        _vector(f"{theirs}.norm.weight", f"{ours}/out_norm/scale", index, d.value_head_dim),
        _linear(f"{theirs}.out_proj.weight", values, D, index, (f"{ours}/out", (D,))),
    ]


def _ffn(
    model: ModelConfig, theirs: str, ours: str, index: tuple[int, ...], F: int
) -> list[Tensor]:
    D = model.hidden_size
    return [
        _linear(f"{theirs}.gate_proj.weight", (D,), F, index, (f"{ours}/gate", (F,))),
        _linear(f"{theirs}.up_proj.weight", (D,), F, index, (f"{ours}/up", (F,))),
        _linear(f"{theirs}.down_proj.weight", (F,), D, index, (f"{ours}/down", (D,))),
    ]


def _experts(
    model: ModelConfig, theirs: str, ours: str, index: tuple[int, ...], fused: bool
) -> list[Tensor]:
    m, D, moe = model.moe, model.hidden_size, f"{ours}/moe"
    found = [
        _linear(
            f"{theirs}.gate.weight",
            (D,),
            m.num_experts,
            index,
            (f"params/{moe}/router", (m.num_experts,)),
        )
    ]
    if m.router_bias:
        found.append(
            _vector(
                f"{theirs}.gate.e_score_correction_bias", f"router/{moe}/bias", index, m.num_experts
            )
        )
    if fused:
        E, F = m.num_experts, m.intermediate_size
        gate, up, down = (
            Part(f"params/{moe}/{name}", index, (E, *shape))
            for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))
        )
        found.append(
            Tensor(
                f"{theirs}.experts.gate_up_proj",
                Stacked(E, Linear((D,), 1, ((F,), (F,)))),
                (gate, up),
            )
        )
        found.append(
            Tensor(f"{theirs}.experts.down_proj", Stacked(E, Linear((F,), D, ((D,),))), (down,))
        )
    for expert in range(0 if fused else m.num_experts):
        found += _ffn(
            model,
            f"{theirs}.experts.{expert}",
            f"params/{moe}",
            (*index, expert),
            m.intermediate_size,
        )
    if m.n_shared_experts:
        found += _ffn(
            model,
            f"{theirs}.shared_expert{'' if m.shared_expert_gate else 's'}",
            f"params/{moe}/shared",
            index,
            m.shared_intermediate_size,
        )
    if m.shared_expert_gate:
        found.append(
            _linear(
                f"{theirs}.shared_expert_gate.weight",
                (D,),
                1,
                index,
                (f"params/{moe}/shared_gate", (1,)),
            )
        )
    return found


def _mtp(model: ModelConfig, depth: int, fused: bool) -> list[Tensor]:
    """DeepSeek's modules are layers after the last, with copies of the embedding and the head;
    Qwen3-Next's one is `mtp`.
    """
    D, V, ours, norm = (
        model.hidden_size,
        model.vocab_size,
        f"mtp_{depth}",
        f"params/mtp_norm_{depth}/scale",
    )
    if model.mtp_kind.attention == "mla":
        theirs = layer = f"model.layers.{model.num_hidden_layers + depth}"
        names = {
            "embedding": "enorm",
            "hidden": "hnorm",
            "merge": "eh_proj",
            "norm": "shared_head.norm",
        }
    else:
        theirs, layer = "mtp", f"mtp.layers.{depth}"
        names = {
            "embedding": "pre_fc_norm_embedding",
            "hidden": "pre_fc_norm_hidden",
            "merge": "fc",
            "norm": "norm",
        }
    found = [
        _vector(
            f"{theirs}.{names['embedding']}.weight", f"params/{ours}/embedding_norm/scale", (), D
        ),
        _vector(f"{theirs}.{names['hidden']}.weight", f"params/{ours}/hidden_norm/scale", (), D),
        _linear(f"{theirs}.{names['merge']}.weight", (2, D), D, (), (f"params/{ours}/merge", (D,))),
        *_layer(model, model.mtp_kind, layer, f"{ours}/block", (), fused),
        _vector(f"{theirs}.{names['norm']}.weight", norm, (), D),
    ]
    if model.mtp_kind.attention == "mla":
        embedding = Tensor(
            f"{theirs}.embed_tokens.weight",
            Rows((V, D)),
            (Part("params/embedding", (), (V, D)),),
            "model.embed_tokens.weight",
        )
        head = Tensor(
            f"{theirs}.shared_head.head.weight",
            Linear((D,), V, ((V,),)),
            (Part("params/head", (), (D, V)),),
            "lm_head.weight",
        )
        found = [embedding, *found, head]
    return found
