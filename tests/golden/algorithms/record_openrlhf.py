"""Losses, divergences, advantages and penalties of OpenRLHF."""

import itertools
import logging
import types

import torch
from common import INPUTS, Cases, field, leaf, text
from library import load


def openrlhf(path, commit):
    """OpenRLHF: policy, value and pair losses, divergences, advantages."""
    table = Cases("openrlhf", commit)
    utils = load(
        f"{path}/openrlhf/models/utils.py", ["compute_approx_kl", "masked_mean", "compute_reward"]
    )
    models = load(
        f"{path}/openrlhf/models/loss.py",
        ["aggregate_loss", "PolicyLoss", "ValueLoss", "DPOLoss"],
        masked_mean=utils.masked_mean,
    )
    bounds = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    runs = [("mixed", {**bounds, "token_level_loss": level}, {}) for level in [True, False]]
    runs += [
        ("holes", {**bounds, "token_level_loss": True}, {}),
        ("three", bounds, {}),
        ("spans", {**bounds, "dual_clip": 1.2}, {}),
        ("far", bounds, {}),
    ]
    runs += [("mixed", {**bounds, "dual_clip": c}, {}) for c in [1.05, 2.0]]
    runs += [
        (name, {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "policy_loss_type": "gspo"}, {})
        for name in ["three", "mixed", "holes"]
    ]
    runs += [
        (
            "mixed",
            {
                **bounds,
                "enable_vllm_is_correction": True,
                "vllm_is_truncated_threshold": limits,
                "vllm_is_correction_type": kind,
                "token_level_loss": level,
            },
            {},
        )
        for kind, limits in [
            ("tis", [0.5, 1.5]),
            ("tis", [0.0, 2.0]),
            ("icepop", [0.5, 1.5]),
            ("seq-mask-tis", [0.9, 1.15]),
        ]
        for level in [True, False]
    ]
    runs.append(
        (
            "mixed",
            {
                "clip_eps_low": 3e-4,
                "clip_eps_high": 4e-4,
                "policy_loss_type": "gspo",
                "enable_vllm_is_correction": True,
                "vllm_is_truncated_threshold": [0.5, 1.5],
            },
            {},
        )
    )
    runs += [
        (
            "mixed",
            {**bounds, "token_level_loss": level},
            {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16},
        )
        for level in [True, False]
    ]
    for inputs, options, batch in runs:
        wrt = leaf(inputs)
        found = models.PolicyLoss(**options)(
            wrt,
            field(inputs, "old_logprobs"),
            field(inputs, "advantages"),
            field(inputs, "mask"),
            field(inputs, "sampler_logprobs"),
            **batch,
        )
        table.loss(
            f"openrlhf/PolicyLoss/{inputs}/{text({**options, **batch})}",
            {"function": "PolicyLoss", **options, **batch, "rollout_log_probs": "sampler_logprobs"},
            inputs,
            found[0],
            wrt,
            metrics={"clip_ratio": found[1], "ppo_kl": found[2]},
        )
    for inputs, bound, level in itertools.product(["mixed", "holes"], [None, 0.2], [True, False]):
        wrt = leaf(inputs, "values")
        loss = models.ValueLoss(bound, level)(
            wrt, field(inputs, "old_values"), field(inputs, "returns"), field(inputs, "mask")
        )
        table.loss(
            f"openrlhf/ValueLoss/{inputs}/clip_eps={bound},token_level_loss={level}",
            {"function": "ValueLoss", "clip_eps": bound, "token_level_loss": level},
            inputs,
            loss,
            wrt,
            kind="value",
            of="values",
        )
    for inputs, kind in itertools.product(["three", "far"], ["k1", "k2", "k3"]):
        wrt = leaf(inputs)
        values = utils.compute_approx_kl(wrt, field(inputs, "reference_logprobs"), kind)
        table.divergence(
            f"openrlhf/compute_approx_kl/{inputs}/{kind}",
            {"function": "compute_approx_kl", "kl_estimator": kind},
            inputs,
            values,
            wrt,
            field(inputs, "mask"),
        )
    for options in [{}, {"label_smoothing": 0.1}, {"ipo": True}]:
        chosen, rejected = (leaf("pairs", f"{name}_logps") for name in ("chosen", "rejected"))
        loss, _, _ = models.DPOLoss(beta=0.1, **options)(
            chosen,
            rejected,
            field("pairs", "reference_chosen_logps"),
            field("pairs", "reference_rejected_logps"),
        )
        first, second = torch.autograd.grad(loss, [chosen, rejected])
        table.add(
            f"openrlhf/DPOLoss/pairs/{text(options)}",
            "pair",
            {"function": "DPOLoss", "beta": 0.1, **options},
            "pairs",
            loss=loss,
            gradient_chosen=first,
            gradient_rejected=second,
        )
    openrlhf_advantages(table, path, utils)
    openrlhf_lengths(table, path)
    return table


def openrlhf_advantages(table, path, utils):
    """The advantages of OpenRLHF, with and without a divergence in the reward."""
    maker = load(
        f"{path}/openrlhf/trainer/ppo_utils/experience_maker.py",
        ["compute_advantages_and_returns", "get_advantages_and_returns", "get_cumulative_returns"],
        itertools=itertools,
        compute_reward=utils.compute_reward,
        logger=logging.getLogger("openrlhf"),
        apply_length_penalties=lambda experiences, args: None,
    )
    kinds = ["gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"]
    for kind, inputs, beta, gamma in itertools.product(
        kinds, ["mixed", "holes"], [0.0, 0.1], [1.0, 0.9]
    ):
        if (gamma != 1.0 and kind not in ("gae", "reinforce")) or (inputs == "holes" and beta):
            continue
        options = types.SimpleNamespace(estimator=kind, gamma=gamma, lambd=0.95, no_std_norm=False)
        stub = types.SimpleNamespace(
            strategy=types.SimpleNamespace(
                args=types.SimpleNamespace(
                    algo=types.SimpleNamespace(advantage=options),
                    rollout=types.SimpleNamespace(n_samples_per_prompt=4),
                    reward=types.SimpleNamespace(clip_range=None),
                )
            ),
            advantage_estimator=kind,
            kl_ctl=types.SimpleNamespace(value=beta),
        )
        for name in ("get_advantages_and_returns", "get_cumulative_returns"):
            setattr(stub, name, types.MethodType(getattr(maker, name), stub))
        mask = field(inputs, "mask")
        gap = field(inputs, "old_logprobs") - field(inputs, "reference_logprobs")
        one = types.SimpleNamespace(
            index=list(range(len(mask))),
            rewards=field(inputs, "rewards"),
            kl=gap * mask,
            action_mask=mask,
            values=field(inputs, "values"),
            info={},
        )
        (one,) = maker.compute_advantages_and_returns(stub, [one])
        table.add(
            f"openrlhf/{kind}/{inputs}/kl_coef={beta},gamma={gamma}",
            "advantage",
            {
                "function": "compute_advantages_and_returns",
                "estimator": kind,
                "gamma": gamma,
                "lambd": 0.95,
                "kl_coef": beta,
                "kl": "(old_logprobs - reference_logprobs) * mask",
                "rewards": "rewards, at the last token of the mask",
                "n_samples_per_prompt": 4,
            },
            inputs,
            advantages=one.advantages,
            returns=one.returns,
        )


def lengths_of(inputs):
    """The number of tokens of each sequence."""
    return [sum(row) for row in INPUTS[inputs]["mask"]]


def openrlhf_lengths(table, path):
    """What OpenRLHF takes off the rewards of long and of truncated responses."""
    taken = load(
        f"{path}/openrlhf/trainer/ppo_utils/length_penalty.py",
        ["apply_overlong_penalty", "apply_stop_properly_penalty"],
        logger=logging.getLogger("openrlhf"),
    )
    for longest, buffer, factor in [(12, 4, 1.0), (10, 5, 0.5)]:
        one = types.SimpleNamespace(
            rewards=field("mixed", "rewards"), response_length=torch.tensor(lengths_of("mixed"))
        )
        taken.apply_overlong_penalty([one], longest, buffer, factor)
        table.add(
            f"openrlhf/apply_overlong_penalty/mixed/{longest},{buffer},{factor}",
            "reward",
            {
                "function": "apply_overlong_penalty",
                "max_new_tokens": longest,
                "overlong_buffer_len": buffer,
                "overlong_penalty_factor": factor,
            },
            "mixed",
            rewards=one.rewards,
        )
    for coefficient in [0.5, -1.0]:
        one = types.SimpleNamespace(
            rewards=field("mixed", "rewards"),
            truncated=torch.tensor([length == 12 for length in lengths_of("mixed")]),
        )
        taken.apply_stop_properly_penalty([one], coefficient)
        table.add(
            f"openrlhf/apply_stop_properly_penalty/mixed/{coefficient}",
            "reward",
            {
                "function": "apply_stop_properly_penalty",
                "stop_properly_penalty_coef": coefficient,
                "truncated": "length == 12",
            },
            "mixed",
            rewards=one.rewards,
        )
