"""How far each discrete choice is from going the other way.

And whether a checkpoint tells the right rule from the likely wrong ones.
"""

import copy

import torch
from record import Trace, greedy, mtp_trace, trace
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpLayer

LEAST = 2e-4  # and at least ten times the "choice noise"
GROUP_SCORE = {
    "best two": lambda members: members.topk(2).values.sum(-1),  # the rule
    "best": lambda members: members.amax(-1),
    "sum": lambda members: members.sum(-1),
}


def gap(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the k-th largest score less the next."""
    best = scores.topk(k + 1).values
    return best[..., k - 1] - best[..., k]


def expert_scores(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Returns the scores [N, E] that experts are chosen by, before groups.

    A softmax has the order of its logits.
    """
    if hasattr(router, "e_score_correction_bias"):
        return logits.sigmoid() + router.e_score_correction_bias
    return logits


def group_scores(
    router: torch.nn.Module, scores: torch.Tensor, rule: str = "best two"
) -> torch.Tensor:
    """Returns the scores of groups [N, G], of one group where the model has none."""
    return GROUP_SCORE[rule](scores.unflatten(-1, (getattr(router, "num_group", 1), -1)))


def in_best_groups(
    router: torch.nn.Module, scores: torch.Tensor, rule: str = "best two", fill: float = -torch.inf
) -> torch.Tensor:
    """Returns `scores` with those of the losing groups' experts at `fill`."""
    ranks = group_scores(router, scores, rule).argsort(descending=True).argsort()
    lost = (ranks >= getattr(router, "topk_group", 1)).repeat_interleave(
        scores.shape[-1] // ranks.shape[-1], -1
    )
    return scores.masked_fill(lost, fill)


def wrong_rules(seen: Trace, routers: dict[int, torch.nn.Module]) -> dict[str, float]:
    """Returns the share of tokens whose set of experts each mistake would change.

    Only models with groups of experts have such mistakes.
    """
    changed = {}
    for number, (logits, _, experts) in seen.routers.items():
        router, scores = routers[number], expert_scores(routers[number], logits)
        right = in_best_groups(router, scores)
        tried = {
            "right": right,
            "group by its best": in_best_groups(router, scores, "best"),
            "group by its sum": in_best_groups(router, scores, "sum"),
            "losers masked with 0": in_best_groups(router, scores, fill=0.0),
            "no bias": logits.masked_fill(right.isneginf(), -torch.inf),
            "no groups": scores,
        }
        for name, tried_scores in tried.items():
            differs = (
                tried_scores.topk(experts.shape[-1]).indices.sort(-1).values
                != experts.sort(-1).values
            ).any(-1)
            changed.setdefault(name, []).append(differs.float().mean().item())
    shares = {name: sum(layers) / len(layers) for name, layers in changed.items()}
    assert shares.pop("right", 0.0) == 0.0, "in_best_groups is not what the router chooses by"
    return shares if getattr(next(iter(routers.values()), None), "num_group", 1) > 1 else {}


def route_gaps(router: torch.nn.Module, outputs: tuple) -> dict[str, float]:
    """Returns the smallest gap between the last expert chosen and the first not; so for groups."""
    logits, _, experts = outputs
    scores = expert_scores(router, logits)
    gaps = {"expert": gap(in_best_groups(router, scores), experts.shape[-1]).min().item()}
    if getattr(router, "num_group", 1) > 1:
        gaps["group"] = gap(group_scores(router, scores), router.topk_group).min().item()
    return gaps


def routers_of(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """Returns the router of each layer that has one."""
    return {
        number: layer.mlp.gate
        for number, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    }


@torch.no_grad()
def margins(model: PreTrainedModel, ids: torch.Tensor, mtp: MtpLayer | None) -> dict[str, float]:
    """Returns the smallest gaps over `ids` and the tokens generated after them."""
    new, scores = greedy(model, ids)
    everything = torch.cat([ids, new], 1)
    seen, routers = trace(model, everything), routers_of(model)
    found = [route_gaps(routers[n], outputs) for n, outputs in seen.routers.items()]
    indexers = list(seen.indexers.values())
    if mtp is not None:
        drafted = mtp_trace(model, mtp, seen.normed, everything)
        found.append(route_gaps(mtp.mtp_block.mlp.gate, drafted.routers[0]))
        indexers += drafted.indexers.values()
    k = getattr(model.config, "index_topk", 0)
    found += [
        {"indexer": gap(scores[:, t, : t + 1], k).min().item()}
        for scores, _ in indexers
        for t in range(k, scores.shape[1])
    ]
    found.append({"greedy": gap(scores, 1).min().item()})
    return {
        name: min(gaps[name] for gaps in found if name in gaps)
        for name in ("expert", "group", "indexer", "greedy")
        if any(name in gaps for gaps in found)
    }


@torch.no_grad()
def character(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """Returns what makes the case worth comparing with, and its noise.

    Noise is how far logits, and the scores that choices are made by, move with a rounding of each
    weight.
    """
    moved, rng = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in moved.parameters():
        weight.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(weight.shape, generator=rng))
    seen, other, routers = trace(model, ids), trace(moved, ids), routers_of(model)
    noise = [
        expert_scores(routers[n], outputs[0]) - expert_scores(routers[n], other.routers[n][0])
        for n, outputs in seen.routers.items()
    ]
    noise += [(scores - other.indexers[n][0]).tril() for n, (scores, _) in seen.indexers.items()]
    best = torch.stack([weights.amax(-1).mean() for weights in seen.attention])
    facts = {
        "logits std": seen.logits.std().item(),
        "best attention": best.mean().item(),
        "noise": (other.logits - seen.logits).abs().max().item(),
    }
    if noise:
        facts["choice noise"] = max(difference.abs().max().item() for difference in noise)
    return facts | wrong_rules(seen, routers)
