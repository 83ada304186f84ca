"""The transformer: embedding, stacks of layers, multi-token prediction.

    variables = init(config, key)      {"params": ..., "router": ...}, axis names attached
    output = Transformer(config).apply(
        variables, tokens_BT, positions_BT, segments_BT, stage="sparse")
    logprobs_BT, entropy_BT = token_logprobs(
        config, variables["params"], output.hidden_BTD, targets_BT)

The output head is in model/heads.py, decoding token by token in model/decode.py. A layer's
attention is chosen in model/layers/table.py.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.adapters import COLLECTION
from model.attention.reference import IndexerStats
from model.cache import LayerCache
from model.config import ModelConfig
from model.heads import embed
from model.layers.convolution import Canon
from model.layers.linear import linear
from model.layers.moe import FFN, MoE, RouterStats
from model.layers.norm import RMSNorm
from model.layers.parameter import parameter
from model.layers.table import ATTENTION_TYPES
from model.segments import TokenInfo, same_segment, shift_left
from model.sharding import constrain
from model.stacks import LayerKind, LayerStack

policies = jax.checkpoint_policies
REMAT = {
    "full": policies.nothing_saveable,
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names("attention", "gate_and_up"),
    ),
}


@flax.struct.dataclass
class LayerStats:
    """Statistics of layers for the losses and metrics: of one layer, or stacked over L.

    indexer: zeros of layers without an indexer.
    router: zeros of layers without experts.
    """

    indexer: IndexerStats
    router: RouterStats


@flax.struct.dataclass
class Output:
    """Holds the results of the model for whole sequences.

    hidden_BTD: hidden states, normalised: ready for the output head.
    mtp_hidden: those of MTP depth 1, 2, ...; the k-th predicts the token k + 1 places on.
    stats: stacked over the layers, MTP modules last.
    entries: cache entries of the main layers, one a layer.
    further_BTD: what the first MTP module reads of the trunk.
    mtp_entries: cache entries of the MTP modules.
    """

    hidden_BTD: Array
    mtp_hidden: tuple[Array, ...]
    stats: LayerStats
    entries: tuple[LayerCache, ...]
    further_BTD: Array
    mtp_entries: tuple[LayerCache, ...] = ()


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + FFN(norm(x)), or experts."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x_BTD: Array, tokens: TokenInfo, past: LayerCache | None = None
    ) -> tuple[Array, tuple[LayerStats, LayerCache]]:
        """Returns the hidden states, what the layer did, and its cache entries of these tokens.

        With `past` the entries are the whole cache with the tokens in it.
        """
        c = self.config
        normed_BTD = RMSNorm(c.rms_norm_eps, c.norm, name="attention_norm")(x_BTD)
        recent_BPD = jnp.zeros((x_BTD.shape[0], 0, c.hidden_size), x_BTD.dtype)
        if c.canon_kernel_size:
            normed_BTD, recent_BPD = Canon(c.canon_kernel_size, name="canon")(
                normed_BTD,
                tokens.segments_BT,
                None if past is None else past.recent_BPD,
                tokens.every,
            )
        attention = ATTENTION_TYPES[self.kind.attention].module(c, name="attention")
        attended_BTD, indexer, entries = attention(
            normed_BTD, tokens, None if past is None else past.attention
        )
        x_BTD = constrain(x_BTD + attended_BTD, "batch", "time", "hidden")
        normed_BTD = RMSNorm(c.rms_norm_eps, c.norm, name="ffn_norm")(x_BTD)
        if self.kind.moe:
            out_BTD, router = MoE(c, name="moe")(normed_BTD, tokens.segments_BT > 0)
        else:
            out_BTD = FFN(c, c.intermediate_size, name="ffn")(normed_BTD)
            router = RouterStats.zero(c.moe.num_experts)
        x_BTD = constrain(x_BTD + out_BTD, "batch", "time", "hidden")
        self.sow("record", "hidden", x_BTD)
        return x_BTD, (LayerStats(indexer, router), LayerCache(entries, recent_BPD))


class Period(nn.Module):
    """One block of each kind, one after the other."""

    config: ModelConfig
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, x_BTD: Array, tokens: TokenInfo) -> tuple[Array, tuple]:
        """Returns the hidden states, and the stats and cache entries of each block."""
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.config.remat], prevent_cse=False)
        results = []
        for number, kind in enumerate(self.kinds):
            x_BTD, result = block(self.config, kind, name=block_name(number))(x_BTD, tokens)
            results.append(result)
        return x_BTD, tuple(results)


def stack_name(number: int) -> str:
    """Returns the name that the parameters of the config's number-th stack of layers have."""
    return f"layers_{number}"


def block_name(number: int) -> str:
    """Returns the name of a period's number-th block, its parameters stacked over repeats."""
    return f"block_{number}"


def layer_paths(config: ModelConfig) -> list[tuple[str, str, int]]:
    """Returns where each layer's parameters are: (stack, block, index on the leading axis)."""
    return [
        (stack_name(number), block_name(layer % len(stack.kinds)), layer // len(stack.kinds))
        for number, stack in enumerate(config.stacks)
        for layer in range(stack.layers)
    ]


def scanned_stack(config: ModelConfig, stack: LayerStack, name: str) -> nn.Module:
    """Returns a stack of layers: the period's parameters get a leading axis, one scan runs it."""
    broadcast: Any = (nn.broadcast,)  # flax declares that axes are numbers
    periods = nn.scan(
        Period,
        variable_axes={"params": 0, "router": 0, "record": 0, "replay": 0, COLLECTION: 0},
        split_rngs={"params": True},
        in_axes=broadcast,
        length=stack.repeats,
        unroll=min(config.scan_unroll, stack.repeats),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return periods(config, stack.kinds, name=name)


def in_layer_order(stacked: tuple, stack: LayerStack) -> list:
    """Takes the results of each block of the period, stacked over repeats, apart by layer."""
    return [
        jax.tree.map(
            lambda leaf, i=layer // len(stack.kinds): leaf[i], stacked[layer % len(stack.kinds)]
        )
        for layer in range(stack.layers)
    ]


class MTPModule(nn.Module):
    """One depth of multi-token prediction (arXiv 2412.19437, section 2.2, eq. 21-23).

    h' = TRM(M [norm(emb of the token k places on); norm(h)])
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        previous_BTD: Array,
        embedded_BTD: Array,
        tokens: TokenInfo,
        past: LayerCache | None = None,
    ) -> tuple[Array, tuple[LayerStats, LayerCache]]:
        """Returns the hidden states of this depth, and what `Block` returns.

        Args:
          previous_BTD: the hidden states of the depth before.
          embedded_BTD: the embeddings of the tokens k places on.
          tokens: with segment 0 where there is no such token.
          past: as of `Block`.
        """
        c = self.config
        merge_2DD = parameter(
            self,
            "merge",
            nn.initializers.normal(c.initializer_range),
            (2, c.hidden_size, c.hidden_size),
            ("stacked", "embed", "replicated"),
        )
        embedded_BTD = RMSNorm(c.rms_norm_eps, c.norm, name="embedding_norm")(embedded_BTD)
        hidden_BTD = linear(embedded_BTD, merge_2DD[0])
        previous_BTD = RMSNorm(c.rms_norm_eps, c.norm, name="hidden_norm")(previous_BTD)
        hidden_BTD += linear(previous_BTD, merge_2DD[1])
        return Block(c, c.mtp_kind, name="block")(hidden_BTD, tokens, past)


class Transformer(nn.Module):
    """All parameters of the model and its forward pass over whole sequences."""

    config: ModelConfig

    def setup(self):
        """Declares the parameters."""
        c = self.config
        V, D, depths = c.vocab_size, c.hidden_size, range(c.num_nextn_predict_layers)
        weight = functools.partial(
            parameter, self, init=nn.initializers.normal(c.initializer_range)
        )
        self.embedding = weight("embedding", shape=(V, D), axes=("vocab", "embed"))
        self.stacks = [scanned_stack(c, stack, stack_name(i)) for i, stack in enumerate(c.stacks)]
        self.final_norm = RMSNorm(c.rms_norm_eps, c.norm)
        if not c.tie_word_embeddings:
            self.head = weight("head", shape=(D, V), axes=("embed", "vocab"))
        self.mtp = [MTPModule(c) for _ in depths]
        self.mtp_norm = [RMSNorm(c.rms_norm_eps, c.norm) for _ in depths]

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        *,
        stage: str,
        mtp: bool = True,
        mtp_until_B: Array | None = None,
    ) -> Output:
        """Computes hidden states, before the output head.

        Args:
          tokens_BT: token ids.
          positions_BT: the position of each token in its segment.
          segments_BT: the segment of each token; 0 is padding.
          stage: "dense" | "warmup" | "sparse", see `model.attention.reference.attend_expanded`.
          mtp: False leaves the MTP modules out.
          mtp_until_B: in each row they read the positions before this one alone.
        """
        c, tokens = self.config, TokenInfo(positions_BT, segments_BT, stage)
        x_BTD = embed(c, self.embedding, tokens_BT)
        stats, entries = [], []
        for stack, layers in zip(c.stacks, self.stacks, strict=True):
            x_BTD, stacked = layers(x_BTD, tokens)
            for layer_stats, layer_entries in in_layer_order(stacked, stack):
                stats.append(layer_stats)
                entries.append(layer_entries)
        hidden_BTD = self.final_norm(x_BTD)
        further_BTD = hidden_BTD if c.mtp_input == "normed" else x_BTD
        mtp_hidden, mtp_entries = [], []
        if mtp or self.is_initializing():
            mtp_hidden, mtp_stats, mtp_entries = self.predict_further(
                tokens_BT, tokens, further_BTD, mtp_until_B
            )
            stats += mtp_stats
        stacked_stats = jax.tree.map(lambda *layers: jnp.stack(layers), *stats)
        return Output(
            hidden_BTD,
            tuple(mtp_hidden),
            stacked_stats,
            tuple(entries),
            further_BTD,
            tuple(mtp_entries),
        )

    def predict_further(
        self,
        tokens_BT: Array,
        tokens: TokenInfo,
        previous_BTD: Array,
        until_B: Array | None = None,
    ) -> tuple[list[Array], list[LayerStats], list[LayerCache]]:
        """Computes the hidden states of each MTP depth, and what `Block` returns of its layer."""
        c, hidden, stats, entries = self.config, [], [], []
        for depth, module in enumerate(self.mtp, start=1):
            with jax.named_scope(f"mtp_{depth}"):
                embedded_BTD = embed(c, self.embedding, shift_left(tokens_BT, depth))
                # Where the token `depth` places on is of another segment the module has nothing to
                # read: padding, to it.
                readable_BT = same_segment(tokens.segments_BT, depth)
                if until_B is not None:
                    readable_BT &= tokens.positions_BT < until_B[:, None]
                readable = dataclasses.replace(
                    tokens, segments_BT=jnp.where(readable_BT, tokens.segments_BT, 0)
                )
                x_BTD, (layer_stats, written) = module(previous_BTD, embedded_BTD, readable)
                hidden.append(self.mtp_norm[depth - 1](x_BTD))
                previous_BTD = hidden[-1] if c.mtp_input == "normed" else x_BTD
                stats.append(layer_stats)
                entries.append(written)
        return hidden, stats, entries


def init(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Makes fresh variables {"params", "router"}, each leaf in its box (`sharding.Named`).

    `flax.linen.meta.unbox` takes the boxes off. For shapes alone, use `boxed_shapes`.
    """
    # Under a mesh a batch must divide over it, even one of which only the shapes matter.
    rows = max(jax.sharding.get_abstract_mesh().size, 1)
    zeros = jnp.zeros((rows, 2), jnp.int32)
    stage = "sparse" if config.indexer.n_heads else "dense"
    variables = Transformer(config).init(key, zeros, zeros, zeros + 1, stage=stage)
    return {"params": variables["params"], "router": variables.get("router", {})}


@functools.cache
def boxed_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the shapes and types of the variables, each in its box (`sharding.Named`).

    A box has the names of the axes and the parameter's use. They are kept, because tracing a model
    takes a second and several ask.
    """
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))
