"""The transformer: embedding, layers scanned, multi-token prediction, output head.

    variables = init(config, key)                            {"params": ..., "router": ...}, axis names attached
    output = Transformer(config).apply(variables, tokens_BT, positions_BT, segments_BT, stage="sparse")
    logprobs_BT, entropy_BT = token_logprobs(config, params, output.hidden_BTD, targets_BT)

Decoding token by token is in model/decode.py.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from model.attend import IndexerReport
from model.attention import LatentAttention
from model.cache import LayerCache
from model.config import ModelConfig
from model.linear import linear
from model.moe import FFN, MoE, RouterReport
from model.norm import RMSNorm
from model.sharding import constrain, named

policies = jax.checkpoint_policies
REMAT = {
    "full": policies.nothing_saveable,
    "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("attention", "gate_and_up")),
}


@flax.struct.dataclass
class LayerReports:
    """What the layers report, stacked: indexer values [L'], router values of the MoE layers [L'] and [L', E], MTP modules last."""

    indexer: IndexerReport
    router: RouterReport


@flax.struct.dataclass
class Output:
    hidden_BTD: Array  # normalised, ready for the output head
    mtp_hidden: tuple[Array, ...]  # of depth 1, 2, ...; the k-th predicts the token k + 1 places on
    reports: LayerReports
    entries: tuple[LayerCache, ...]  # cache entries of the main layers, one a layer


class Block(nn.Module):
    """x + attention(norm(x)), then + FFN or experts(norm(x))."""

    config: ModelConfig
    moe: bool

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT, stage, past=None, allowed_BTS=None, at=None):
        c = self.config
        attended_BTD, indexer, entries = LatentAttention(c, name="attention")(
            RMSNorm(c.norm_eps, name="attention_norm")(x_BTD), positions_BT, segments_BT, stage, past, allowed_BTS, at
        )
        x_BTD = constrain(x_BTD + attended_BTD, "batch", "time", "hidden")
        normed_BTD = RMSNorm(c.norm_eps, name="ffn_norm")(x_BTD)
        if self.moe:
            out_BTD, router = MoE(c, name="moe")(normed_BTD, segments_BT > 0)
        else:
            out_BTD, router = FFN(c, c.dense_width, name="ffn")(normed_BTD), RouterReport.zero(c.moe.experts)
        return constrain(x_BTD + out_BTD, "batch", "time", "hidden"), (indexer, router, entries)


def stack(config: ModelConfig, moe: bool, length: int, name: str) -> nn.Module:
    """`length` blocks, parameters stacked on a leading axis, run by one scan."""
    block = Block
    if config.remat != "none":
        block = nn.remat(Block, policy=REMAT[config.remat], prevent_cse=False, static_argnums=(4,))
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
        length=length,
        unroll=min(config.scan_unroll, length),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, moe, name=name)


class MTPModule(nn.Module):
    """One depth of multi-token prediction (arXiv 2412.19437, section 2.2, eq. 21-23): h' = TRM(M [norm(h); norm(emb of the token k places on)])."""

    config: ModelConfig

    @nn.compact
    def __call__(self, previous_BTD, embedded_BTD, positions_BT, segments_BT, stage):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        merge_2DD = self.param("merge", named(init, (None, "width", "replicated")), (2, c.width, c.width), jnp.float32)
        hidden_BTD = linear(RMSNorm(c.norm_eps, name="hidden_norm")(previous_BTD), merge_2DD[0])
        hidden_BTD += linear(RMSNorm(c.norm_eps, name="embedding_norm")(embedded_BTD), merge_2DD[1])
        return Block(c, moe=c.moe_layers > 0, name="block")(hidden_BTD, positions_BT, segments_BT, stage)


def shift_left(x_BT: Array, by: int) -> Array:
    """x[t + by] at t, zeros at the end."""
    return jnp.pad(x_BT[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (x_BT.ndim - 2))


def same_segment(segments_BT: Array, ahead: int) -> Array:
    """Whether the token `ahead` places on is of the same segment. [B, T] bool."""
    return (shift_left(segments_BT, ahead) == segments_BT) & (segments_BT > 0)


class Transformer(nn.Module):
    """All parameters of the model and its forward pass over whole sequences."""

    config: ModelConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        self.embedding = self.param("embedding", named(init, ("vocab", "width")), (c.vocab, c.width), jnp.float32)
        self.dense_layers = stack(c, False, c.dense_layers, "dense_layers") if c.dense_layers else None
        self.moe_layers = stack(c, True, c.moe_layers, "moe_layers") if c.moe_layers else None
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.head = self.param("head", named(init, ("width", "vocab")), (c.width, c.vocab), jnp.float32)
        self.mtp = [MTPModule(c) for _ in range(c.mtp_depth)]
        self.mtp_norm = [RMSNorm(c.norm_eps) for _ in range(c.mtp_depth)]

    def __call__(self, tokens_BT: Array, positions_BT: Array, segments_BT: Array, *, stage: str, mtp: bool = True) -> Output:
        """Hidden states, before the output head. `stage` as in model/attend.py; `mtp=False` leaves the MTP modules out."""
        x_BTD = embed(self.config, self.embedding, tokens_BT)
        reports, entries = [], []
        for layers in (self.dense_layers, self.moe_layers):
            if layers is not None:
                x_BTD, (indexer, router, stacked) = layers(x_BTD, positions_BT, segments_BT, stage)
                reports.append(LayerReports(indexer, router))
                entries += [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(stacked.latent_BSR.shape[0])]

        mtp_hidden, previous_BTD = [], x_BTD
        for depth, module in enumerate(self.mtp if mtp or self.is_initializing() else [], start=1):
            with jax.named_scope(f"mtp_{depth}"):
                embedded_BTD = embed(self.config, self.embedding, shift_left(tokens_BT, depth))
                # Where the token `depth` places on is of another segment the module has nothing to read: padding, to it.
                its_segments_BT = jnp.where(same_segment(segments_BT, depth), segments_BT, 0)
                previous_BTD, (indexer, router, _) = module(previous_BTD, embedded_BTD, positions_BT, its_segments_BT, stage)
                mtp_hidden.append(self.mtp_norm[depth - 1](previous_BTD))
                reports.append(jax.tree.map(lambda leaf: leaf[None], LayerReports(indexer, router)))
        reports = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *reports)
        return Output(self.final_norm(x_BTD), tuple(mtp_hidden), reports, tuple(entries))


def embed(config: ModelConfig, embedding_VD: Array, tokens_BT: Array) -> Array:
    with jax.named_scope("embed"):
        return constrain(jnp.take(embedding_VD, tokens_BT, axis=0).astype(config.dtype), "batch", "time", "hidden")


def init(config: ModelConfig, key: Array) -> dict:
    """Fresh variables {"params", "router"}, each leaf boxed with its logical axis names (`flax.linen.meta.unbox` takes them off). For shapes alone, use it
    under `jax.eval_shape`."""
    rows = max(jax.sharding.get_abstract_mesh().size, 1)  # under a mesh a batch must divide over it, even one of which only the shapes matter
    zeros = jnp.zeros((rows, 2), jnp.int32)
    variables = Transformer(config).init(key, zeros, zeros, zeros + 1, stage="sparse" if config.indexer.heads else "dense")
    return {"params": variables["params"], "router": variables.get("router", {})}


def head_weights(config: ModelConfig, params) -> Array:
    return params["embedding"].T if config.tie_embeddings else params["head"]


def logits_of(config: ModelConfig, params, hidden_BTD: Array) -> Array:
    """[..., V] float32."""
    with jax.named_scope("output_head"):
        return linear(hidden_BTD, head_weights(config, params), output=jnp.float32)


def token_logprobs(config: ModelConfig, params, hidden_BTD: Array, targets_BT: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """Log-probability of each target and entropy of its distribution, [B, T] float32 in nats, without holding [B, T, V] when a row is longer than a chunk.

    The row is handled `config.logit_chunk` positions at a time; the backward pass recomputes their logits.
    """

    def chunk(hidden_BCD, targets_BC):
        logits_BCV = logits_of(config, params, hidden_BCD) / temperature
        logprobs_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        entropy_BC = -jnp.sum(jnp.exp(logprobs_BCV) * logprobs_BCV, axis=-1)
        return jnp.take_along_axis(logprobs_BCV, targets_BC[..., None], axis=-1)[..., 0], entropy_BC

    B, T = targets_BT.shape
    size = min(config.logit_chunk, T)
    chunks = -(-T // size)
    if chunks == 1:
        return chunk(hidden_BTD, targets_BT)
    padding = chunks * size - T

    def cut(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, chunks, size, *x_BT.shape[2:]), 1, 0)

    body = functools.partial(jax.checkpoint, prevent_cse=False)(lambda _, piece: (None, chunk(*piece)))
    _, outputs = jax.lax.scan(body, None, (cut(hidden_BTD), cut(targets_BT)))
    return jax.tree.map(lambda x_nBC: jnp.moveaxis(x_nBC, 0, 1).reshape(B, chunks * size)[:, :T], outputs)
