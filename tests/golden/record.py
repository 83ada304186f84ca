"""What the public implementation computes from a checkpoint.

Forward hooks see it, and golden.npz has it as arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from cases import NEW_TOKENS
from checkpoint import unfused
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

PADDED = 11


@dataclass
class Trace:
    """One forward pass over [B, T] tokens; the dictionaries have the layers with such a module."""

    logits: torch.Tensor = None  # [B, T, V]
    normed: torch.Tensor = None  # [B, T, D] after the final norm
    # [B, N, T, T] for each layer with softmax attention
    attention: list[torch.Tensor] = field(default_factory=list)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # [B, T, D] leaving the layer
    # logits [BT, E], gates [BT, K], experts [BT, K]
    routers: dict[int, tuple] = field(default_factory=dict)
    # scores [B, T, T], chosen positions [B, T, k], some of them not causal where t < k
    indexers: dict[int, tuple] = field(default_factory=dict)


def index_scores(
    indexer: torch.nn.Module, x: torch.Tensor, q_latent: torch.Tensor, rope: tuple
) -> torch.Tensor:
    """Returns the indexer's scores [B, T, S], which its forward does not return.

    The projections are its own; `trace` checks the choices.
    """
    rotated = indexer.qk_rope_head_dim
    q_BTHD = indexer.wq_b(q_latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k_BSD = indexer.k_norm(indexer.wk(x))
    q_rope, k_rope = apply_rotary_pos_emb(
        q_BTHD[..., :rotated], k_BSD[:, :, None, :rotated], *rope, unsqueeze_dim=2
    )
    q_BTHD = torch.cat([q_rope, q_BTHD[..., rotated:]], -1)
    k_BSD = torch.cat([k_rope[:, :, 0], k_BSD[..., rotated:]], -1)
    dot_BTHS = torch.einsum("bthd,bsd->bths", q_BTHD, k_BSD).relu()
    scores_BTS = torch.einsum("bth,bths->bts", indexer.weights_proj(x), dot_BTHS)
    return scores_BTS / (indexer.n_heads * indexer.head_dim) ** 0.5


def trace(model: PreTrainedModel, ids: torch.Tensor) -> Trace:
    """Runs `model` over `ids` without a cache.

    Gradients are computed unless the caller has switched them off.
    """
    seen, hooks = Trace(), []
    for number, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(keeper(seen.hidden, number)))
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(keeper(seen.routers, number)))
        if indexer := getattr(getattr(layer, "self_attn", None), "indexer", None):
            hooks.append(indexer.register_forward_hook(indexer_keeper(seen.indexers, number)))
    normed = {}
    hooks.append(model.model.norm.register_forward_hook(keeper(normed, 0)))
    out = model(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True)
    for hook in hooks:
        hook.remove()
    seen.logits, seen.normed = out.logits, normed[0]
    seen.attention = [weights for weights in out.attentions if weights is not None]
    for scores, chosen in seen.indexers.values():
        causal = scores.masked_fill(
            torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf
        )
        assert set_of(causal.topk(chosen.shape[-1]).indices).equal(set_of(chosen)), (
            "index_scores is not what the indexer scores by"
        )
    return seen


def keeper(kept: dict, number: int) -> Callable:
    """Returns a forward hook that keeps what a module gives out as kept[number]."""

    def hook(module, inputs, out):
        kept[number] = out

    return hook


def indexer_keeper(kept: dict, number: int) -> Callable:
    """Returns a forward hook that keeps an indexer's scores and choices as kept[number]."""

    def hook(module, inputs, out):
        kept[number] = index_scores(module, *inputs[:3]), out

    return hook


def set_of(indices: torch.Tensor) -> torch.Tensor:
    """Returns the causal ones of positions [..., T, k], sorted, then -1."""
    limit = torch.arange(indices.shape[-2])[:, None]
    allowed = (
        torch.where(indices <= limit, indices, torch.iinfo(torch.int32).max)
        .to(torch.int32)
        .sort(-1)
        .values
    )
    return torch.where(allowed <= limit, allowed, -1).to(torch.int32)


def mtp_trace(
    model: PreTrainedModel, layer: MtpLayer, normed: torch.Tensor, ids: torch.Tensor
) -> Trace:
    """Runs the module over T-1 positions: t has seen tokens 0..t+1 and predicts t+2.

    Positions count from 1, as transformers' own.
    """
    seen, block = Trace(), layer.mtp_block
    hooks = [block.mlp.gate.register_forward_hook(keeper(seen.routers, 0))]
    if indexer := getattr(block.self_attn, "indexer", None):
        hooks.append(indexer.register_forward_hook(indexer_keeper(seen.indexers, 0)))
    embedded = model.model.embed_tokens(ids[:, 1:])
    positions = torch.arange(1, ids.shape[1])[None]
    later = torch.full(
        (1, 1, ids.shape[1] - 1, ids.shape[1] - 1), torch.finfo(torch.float32).min
    ).triu(1)
    rope = model.model.rotary_emb(embedded, positions)
    out = layer(
        embedded,
        normed[:, :-1],
        position_embeddings=rope,
        attention_mask=later,
        position_ids=positions,
        past_key_values=None,
    )
    for hook in hooks:
        hook.remove()
    seen.logits = model.lm_head(out)
    return seen


def greedy(
    model: PreTrainedModel, ids: torch.Tensor, cache: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens that follow `ids` [B, N], and the scores [B, N, V] they are best of."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=cache,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.scores, 1)


def gradient_norms(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, float]:
    """Returns the norm of the loss's gradient for each tensor on disk that has one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {
        disk: part
        for name, tensor in model.named_parameters()
        if tensor.grad is not None
        for disk, part in unfused(name, tensor.grad)
    }
    return {name: float(part.double().norm()) for name, part in sorted(gradients.items())}


def golden(
    model: PreTrainedModel, ids: torch.Tensor, mtp: MtpLayer | None
) -> dict[str, np.ndarray]:
    """Returns the arrays of golden.npz."""
    seen = trace(model, ids)
    loss = F.cross_entropy(seen.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    norms = gradient_norms(model, loss)
    with torch.no_grad():
        arrays = {
            "input_ids": ids.to(torch.int32),
            "logits": seen.logits,
            "hidden": torch.stack([seen.hidden[n] for n in sorted(seen.hidden)], 1),
            "greedy": greedy(model, ids)[0].to(torch.int32),
            "padded_logits": model(ids[:1, :PADDED]).logits[0, -1],
        }
        if seen.routers:
            chosen = {
                n: experts.to(torch.int32).sort(-1).values.reshape(*ids.shape, -1)
                for n, (_, _, experts) in seen.routers.items()
            }
            none = torch.full_like(next(iter(chosen.values())), -1)
            arrays["routes"] = torch.stack([chosen.get(n, none) for n in sorted(seen.hidden)], 1)
        if seen.indexers:
            arrays["indexer"] = torch.stack(
                [set_of(chosen) for _, chosen in seen.indexers.values()], 1
            )
        if mtp is not None:
            arrays["mtp_logits"] = mtp_trace(model, mtp, seen.normed, ids).logits
    arrays = {name: array.detach().numpy() for name, array in arrays.items()}
    return arrays | {
        "loss": np.float64(loss.item()),
        "grad_names": np.array(list(norms)),
        "grad_norms": np.array(list(norms.values())),
    }
