"""Losses of prime-rl and the scores of its groups."""

import asyncio
import types

import torch
from common import INPUTS, Cases, field, leaf, text, whole
from library import double_names, load


def prime_rl(path, commit):
    """prime-rl: its losses over samples, and the scores of a group."""
    table = Cases("prime_rl", commit)
    taken = load(
        f"{path}/src/prime_rl/trainer/rl/loss.py",
        [
            "LossInputs",
            "LossOutputs",
            "_safe_mean",
            "compute_importance_ratio_and_mismatch_kl",
            "default_loss_fn",
            "ipo_loss_fn",
            "ref_kl_loss_fn",
            "ce_loss_fn",
            "compute_loss",
        ],
    )
    default = {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}
    ipo = {"ipo_threshold": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3}
    runs = [("default_loss_fn", name, default) for name in ["three", "mixed", "holes", "spans"]]
    runs += [
        ("default_loss_fn", "mixed", {**default, **changed})
        for changed in [
            {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1},
            {"dppo_mask_high": 0.05, "kl_tau": 0.0},
            {"adv_tau": 0.5, "kl_tau": 0.1},
        ]
    ]
    runs += [("ipo_loss_fn", name, ipo) for name in ["three", "mixed", "spans"]]
    runs += [("ref_kl_loss_fn", name, {}) for name in ["three", "mixed"]]
    runs += [("ce_loss_fn", "mixed", {})]
    for name, inputs, options in runs:
        wrt, mask = leaf(inputs), whole(inputs, "mask").bool()
        weights = field(inputs, "mask") if name in ("ref_kl_loss_fn", "ce_loss_fn") else None
        tokens = int(mask.sum())
        config = types.SimpleNamespace(**options)
        empty = None if weights is None else list(torch.zeros_like(wrt))
        rows = None if weights is None else list(weights)
        loss, _ = taken.compute_loss(
            list(wrt),
            list(field(inputs, "sampler_logprobs")),
            list(field(inputs, "reference_logprobs")),
            list(field(inputs, "advantages")),
            list(mask),
            empty,
            rows if name == "ce_loss_fn" else None,
            rows if name == "ref_kl_loss_fn" else None,
            lambda given, name=name, config=config: getattr(taken, name)(given, config),
            tokens,
            tokens,
            tokens,
        )
        table.loss(
            f"prime_rl/{name}/{inputs}/{text(options)}",
            {
                "function": f"compute_loss with {name}",
                **options,
                "inference_logprobs": "sampler_logprobs",
                "ref_logprobs": "reference_logprobs",
                "scale": "number of tokens",
            },
            inputs,
            loss,
            wrt,
        )
    for kind, file, lengths in [
        ("MaxRLAlgorithm", "max_rl", None),
        ("GRPOAlgorithm", "grpo", None),
        ("GRPOAlgorithm", "grpo", (0.1, 0.05, 0.2)),
    ]:
        for inputs in ["mixed", "ragged"]:
            found = prime_rl_scores(path, kind, file, lengths, inputs)
            table.add(
                f"prime_rl/{kind}/{inputs}/length_penalty={lengths}",
                "advantage",
                {
                    "function": f"{kind}.score_group",
                    "rewards": "rewards",
                    "length_penalty": lengths,
                    "num_output_tokens": "mask sum",
                    "num_total_tokens": "mask sum + 5",
                    "num_turns": "1 + row modulo 3",
                },
                inputs,
                advantages=found,
            )
    return table


def prime_rl_scores(path, kind, file, lengths, inputs):
    """The advantage of each sequence, group after group."""
    scores = {}
    taken = load(
        f"{path}/src/prime_rl/orchestrator/algo/{file}.py",
        [kind],
        Algorithm=object,
        iter_trainable_traces=lambda episodes: [(None, one) for one in episodes],
        assign_advantages=lambda trace, score: scores.__setitem__(trace.row, score),
    )
    penalty = (
        None
        if lengths is None
        else types.SimpleNamespace(
            num_output_tokens_weight=lengths[0],
            num_input_tokens_weight=lengths[1],
            num_turns_weight=lengths[2],
        )
    )
    stub = types.SimpleNamespace(length_penalty=penalty)
    groups = INPUTS[inputs]["groups"]
    with double_names():
        for group in dict.fromkeys(groups):
            traces = [
                types.SimpleNamespace(
                    row=row,
                    reward=INPUTS[inputs]["rewards"][row],
                    num_turns=1 + row % 3,
                    num_output_tokens=sum(INPUTS[inputs]["mask"][row]),
                    num_total_tokens=sum(INPUTS[inputs]["mask"][row]) + 5,
                )
                for row, own in enumerate(groups)
                if own == group
            ]
            asyncio.run(getattr(taken, kind).score_group(stub, traces))
    return [scores[row] for row in range(len(groups))]
