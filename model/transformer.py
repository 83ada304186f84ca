"""The transformer: embedding, layers scanned, multi-token prediction, output head.

    variables = init(config, key)                            {"params": ..., "router": ...}, axis
    names attached output = Transformer(config).apply(variables, tokens_BT, positions_BT,
    segments_BT, stage="sparse") logprobs_BT, entropy_BT = token_logprobs(config, params,
    output.hidden_BTD, targets_BT)

Decoding token by token is in model/decode.py.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.attention.reference import IndexerStats
from model.cache import LayerCache
from model.config import ModelConfig
from model.stacks import LayerKind, LayerStack
from model.heads import embed
from model.layers.convolution import Canon
from model.layers.delta import GatedDeltaNet
from model.layers.gqa import GroupedAttention
from model.layers.linear import linear
from model.layers.mla import LatentAttention
from model.layers.moe import FFN, MoE, RouterStats
from model.layers.norm import RMSNorm
from model.segments import same_segment, shift_left
from model.sharding import constrain, named

ATTENTION_LAYERS = {"mla": LatentAttention, "gqa": GroupedAttention, "delta": GatedDeltaNet}

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
    """What the layers report, stacked, MTP modules last: indexer values and the router's balance
    [L'], its counts [L', E]; zeros of layers without.
    """

    indexer: IndexerStats
    router: RouterStats


@flax.struct.dataclass
class Output:
    hidden_BTD: Array  # normalised, ready for the output head
    mtp_hidden: tuple[Array, ...]  # of depth 1, 2, ...; the k-th predicts the token k + 1 places on
    stats: LayerStats
    entries: tuple[LayerCache, ...]  # cache entries of the main layers, one a layer


class Block(nn.Module):
    """x + attention(norm(x)), then + FFN or experts(norm(x))."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self,
        x_BTD,
        positions_BT,
        segments_BT,
        stage,
        past: LayerCache | None = None,
        allowed_BTS=None,
        at=None,
    ):
        c = self.config
        normed_BTD = RMSNorm(c.rms_norm_eps, c.norm, name="attention_norm")(x_BTD)
        recent_BKD = jnp.zeros((x_BTD.shape[0], 0, c.hidden_size), x_BTD.dtype)
        if c.canon_kernel_size:
            normed_BTD, recent_BKD = Canon(c.canon_kernel_size, name="canon")(
                normed_BTD, segments_BT, None if past is None else past.recent_BKD
            )
        attention = ATTENTION_LAYERS[self.kind.attention](c, name="attention")
        remembered = None if past is None else past.attention
        attended_BTD, indexer, entries = attention(
            normed_BTD, positions_BT, segments_BT, stage, remembered, allowed_BTS, at
        )
        x_BTD = constrain(x_BTD + attended_BTD, "batch", "time", "hidden")
        normed_BTD = RMSNorm(c.rms_norm_eps, c.norm, name="ffn_norm")(x_BTD)
        if self.kind.moe:
            out_BTD, router = MoE(c, name="moe")(normed_BTD, segments_BT > 0)
        else:
            out_BTD, router = (
                FFN(c, c.intermediate_size, name="ffn")(normed_BTD),
                RouterStats.zero(c.moe.num_experts),
            )
        x_BTD = constrain(x_BTD + out_BTD, "batch", "time", "hidden")
        self.sow("record", "hidden", x_BTD)
        return x_BTD, (indexer, router, LayerCache(entries, recent_BKD))


class Period(nn.Module):
    """One block of each kind, one after the other."""

    config: ModelConfig
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT, stage):
        block = Block
        if self.config.remat != "none":
            block = nn.remat(
                Block, policy=REMAT[self.config.remat], prevent_cse=False, static_argnums=(4,)
            )
        said = []
        for number, kind in enumerate(self.kinds):
            x_BTD, one = block(self.config, kind, name=block_name(number))(
                x_BTD, positions_BT, segments_BT, stage
            )
            said.append(one)
        return x_BTD, tuple(said)


def stack_name(number: int) -> str:
    """Of the parameters of the config's number-th run of layers."""
    return f"layers_{number}"


def block_name(number: int) -> str:
    """Of the parameters of a run's blocks of one kind, stacked over the run's repeats."""
    return f"block_{number}"


def layer_paths(config: ModelConfig) -> list[tuple[str, str, int]]:
    """Where each layer's parameters are: (run, block, index on the leading axis)."""
    return [
        (stack_name(number), block_name(layer % len(run.kinds)), layer // len(run.kinds))
        for number, run in enumerate(config.stacks)
        for layer in range(run.layers)
    ]


def scanned(config: ModelConfig, run: LayerStack, name: str) -> nn.Module:
    """A run of layers: the period's parameters stacked on a leading axis, run by one scan."""
    periods = nn.scan(
        Period,
        variable_axes={"params": 0, "router": 0, "record": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
        length=run.repeats,
        unroll=min(config.scan_unroll, run.repeats),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return periods(config, run.kinds, name=name)


def in_order(stacked: tuple, run: LayerStack) -> list:
    """What each block of the period said, stacked over repeats, as a list over the layers."""
    return [
        jax.tree.map(
            lambda leaf, i=layer // len(run.kinds): leaf[i], stacked[layer % len(run.kinds)]
        )
        for layer in range(run.layers)
    ]


class MTPModule(nn.Module):
    """One depth of multi-token prediction (arXiv 2412.19437, section 2.2, eq. 21-23): h' = TRM(M
    [norm(emb of the token k places on); norm(h)]).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, previous_BTD, embedded_BTD, positions_BT, segments_BT, stage):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        merge_2DD = self.param(
            "merge",
            named(init, (None, "width", "replicated")),
            (2, c.hidden_size, c.hidden_size),
            jnp.float32,
        )
        hidden_BTD = linear(
            RMSNorm(c.rms_norm_eps, c.norm, name="embedding_norm")(embedded_BTD), merge_2DD[0]
        )
        hidden_BTD += linear(
            RMSNorm(c.rms_norm_eps, c.norm, name="hidden_norm")(previous_BTD), merge_2DD[1]
        )
        return Block(c, c.mtp_kind, name="block")(hidden_BTD, positions_BT, segments_BT, stage)


class Transformer(nn.Module):
    """All parameters of the model and its forward pass over whole sequences."""

    config: ModelConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.embedding = self.param(
            "embedding", named(init, ("vocab", "width")), (c.vocab_size, c.hidden_size), jnp.float32
        )
        self.runs = [scanned(c, run, stack_name(number)) for number, run in enumerate(c.stacks)]
        self.final_norm = RMSNorm(c.rms_norm_eps, c.norm)
        if not c.tie_word_embeddings:
            self.head = self.param(
                "head", named(init, ("width", "vocab")), (c.hidden_size, c.vocab_size), jnp.float32
            )
        self.mtp = [MTPModule(c) for _ in range(c.num_nextn_predict_layers)]
        self.mtp_norm = [RMSNorm(c.rms_norm_eps, c.norm) for _ in range(c.num_nextn_predict_layers)]

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        *,
        stage: str,
        mtp: bool = True,
    ) -> Output:
        """Hidden states, before the output head. `stage` as in model/attention/reference.py;
        `mtp=False` leaves the MTP modules out.
        """
        c = self.config
        x_BTD = embed(c, self.embedding, tokens_BT)
        reports, entries = [], []
        for run, layers in zip(c.stacks, self.runs, strict=True):
            x_BTD, stacked = layers(x_BTD, positions_BT, segments_BT, stage)
            said = in_order(stacked, run)
            reports += [LayerStats(indexer, router) for indexer, router, _ in said]
            entries += [cached for _, _, cached in said]
        hidden_BTD = self.final_norm(x_BTD)

        mtp_hidden, previous_BTD = [], hidden_BTD if c.mtp_input == "normed" else x_BTD
        for depth, module in enumerate(self.mtp if mtp or self.is_initializing() else [], start=1):
            with jax.named_scope(f"mtp_{depth}"):
                embedded_BTD = embed(c, self.embedding, shift_left(tokens_BT, depth))
                # Where the token `depth` places on is of another segment the module has nothing to
                # read: padding, to it.
                its_segments_BT = jnp.where(same_segment(segments_BT, depth), segments_BT, 0)
                x_BTD, (indexer, router, _) = module(
                    previous_BTD, embedded_BTD, positions_BT, its_segments_BT, stage
                )
                mtp_hidden.append(self.mtp_norm[depth - 1](x_BTD))
                previous_BTD = mtp_hidden[-1] if c.mtp_input == "normed" else x_BTD
                reports.append(LayerStats(indexer, router))
        reports = jax.tree.map(lambda *layers: jnp.stack(layers), *reports)
        return Output(hidden_BTD, tuple(mtp_hidden), reports, tuple(entries))


def init(config: ModelConfig, key: Array) -> dict:
    """Fresh variables {"params", "router"}, each leaf boxed with its logical axis names
    (`flax.linen.meta.unbox` takes them off). For shapes alone, use it under `jax.eval_shape`.
    """
    rows = max(
        jax.sharding.get_abstract_mesh().size, 1
    )  # under a mesh a batch must divide over it, even one of which only the shapes matter
    zeros = jnp.zeros((rows, 2), jnp.int32)
    variables = Transformer(config).init(
        key, zeros, zeros, zeros + 1, stage="sparse" if config.indexer.n_heads else "dense"
    )
    return {"params": variables["params"], "router": variables.get("router", {})}
