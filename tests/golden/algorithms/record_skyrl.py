"""Losses under each reduction, corrections and advantages of SkyRL."""

import logging
import types

import numpy as np
from common import INPUTS, Cases, field, leaf, text
from library import double_names, load


def skyrl(path, commit):
    """SkyRL: losses under each reduction, corrections, divergences, advantages."""
    table = Cases("skyrl", commit)
    base = f"{path}/skyrl/backends/skyrl_train/utils"
    tools = load(f"{base}/torch_utils.py", ["masked_mean", "safe_exp_delta"])
    beside = {"masked_mean": tools.masked_mean, "safe_exp_delta": tools.safe_exp_delta}
    correction = load(
        f"{base}/off_policy_correction_utils.py",
        [
            "off_policy_correction_enabled",
            "compute_tis_ratio",
            "compute_outlier_token_mask",
            "compute_token_mask",
            "compute_sequence_mask",
            "compute_off_policy_correction",
            "apply_off_policy_correction",
        ],
        **beside,
    )
    taken = load(
        f"{base}/ppo_utils.py",
        [
            "ppo_policy_loss",
            "sapo_policy_loss",
            "gspo_policy_loss",
            "compute_policy_loss_cispo",
            "rollout_is_policy_loss",
            "dppo_policy_loss",
            "compute_policy_loss_kl_cov",
            "masked_var",
            "masked_whiten",
            "importance_sampling_loss",
            "cross_entropy_loss",
            "reduce_loss",
            "apply_loss_reduction_to_advantages_minibatch",
            "compute_approx_kl",
            "ppo_critic_loss",
            "compute_maxrl_advantage",
            "compute_rloo_outcome_advantage",
            "compute_grpo_outcome_advantage",
            "compute_gae_advantage_return",
            "compute_reinforce_plus_plus_outcome_advantage",
        ],
        apply_off_policy_correction=correction.apply_off_policy_correction,
        **beside,
    )
    losses = {
        "regular": ("ppo_policy_loss", {}),
        "dual_clip": ("ppo_policy_loss", {"clip_ratio_c": 1.2}),
        "sapo": ("sapo_policy_loss", {"tau_pos": 1.0, "tau_neg": 1.05}),
        "gspo": ("gspo_policy_loss", {"eps_clip_low": 3e-4, "eps_clip_high": 4e-4}),
        "cispo": (
            "compute_policy_loss_cispo",
            {"cispo_eps_clip_low": 0.2, "cispo_eps_clip_high": 0.28},
        ),
        "rollout_is": ("rollout_is_policy_loss", {}),
        "dppo": (
            "dppo_policy_loss",
            {"dppo_type": "binary_tv", "delta_low": 0.2, "delta_high": 0.2},
        ),
        "kl_cov": ("compute_policy_loss_kl_cov", {"kl_cov_frac": 0.2, "ppo_kl_coef": 1.0}),
        "importance_sampling": ("importance_sampling_loss", {}),
        "cross_entropy": ("cross_entropy_loss", {}),
    }
    runs = [(kind, "mixed", "sequence_mean", {}, {}) for kind in losses]
    runs += [
        ("regular", "mixed", reduction, {}, {})
        for reduction in [
            "token_mean",
            "token_mean_legacy",
            "seq_mean_token_sum_norm",
            "prompt_mean",
        ]
    ]
    runs += [(kind, "holes", "token_mean", {}, {}) for kind in ["regular", "gspo", "dppo"]]
    runs += [
        (
            "dppo",
            "mixed",
            "token_mean",
            {"dppo_type": "binary_kl", "delta_low": 0.05, "delta_high": 0.02},
            {},
        ),
        ("cispo", "mixed", "token_mean", {"cispo_anchor": "rollout"}, {}),
    ]
    runs += [
        ("regular", "mixed", "token_mean", {}, rule)
        for rule in [
            {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.5},
            {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 2.0},
            {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.15},
            {"sequence_mask_metric": "product", "product_mask_low": 0.5, "product_mask_high": 2.0},
            {"outlier_token_is_threshold_low": 0.5, "outlier_token_is_threshold_high": 2.2},
            {"token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 1.5},
            {
                "tis_ratio_type": "token",
                "token_tis_ratio_clip_high": 1.5,
                "sequence_mask_metric": "geometric",
                "geo_mask_low": 0.9,
                "geo_mask_high": 1.15,
            },
        ]
    ]
    for kind, inputs, reduction, changed, rule in runs:
        name, options = losses[kind]
        options = {"eps_clip_low": 0.2, "eps_clip_high": 0.28, **options, **changed}
        wrt, mask = leaf(inputs), field(inputs, "mask")
        advantages = taken.apply_loss_reduction_to_advantages_minibatch(
            field(inputs, "advantages"), mask, reduction, 4, 16, [(0, 4), (4, 8)]
        )
        part = types.SimpleNamespace(**{"cispo_anchor": "old", "dppo_type": None, **options})
        empty = dict.fromkeys(
            [
                "tis_ratio_type",
                "sequence_mask_metric",
                "outlier_token_is_threshold_low",
                "outlier_token_is_threshold_high",
                "token_mask_is_threshold_low",
                "token_mask_is_threshold_high",
            ]
        )
        config = types.SimpleNamespace(
            policy_loss_type=kind,
            loss_reduction="sequence_mean",
            sapo=part,
            cispo=part,
            dppo=part,
            kl_cov=part,
            **options,
            off_policy_correction=types.SimpleNamespace(**{**empty, **rule}),
        )
        sampled = rule or kind in ("rollout_is",) or changed.get("cispo_anchor") == "rollout"
        rollout = field(inputs, "sampler_logprobs") if sampled else None
        with double_names():
            loss, _ = getattr(taken, name)(
                wrt, field(inputs, "old_logprobs"), advantages, config, mask, rollout
            )
        call = {
            "function": name,
            "policy_loss_type": kind,
            **options,
            "off_policy_correction": rule,
            "rollout_logprobs": "sampler_logprobs" if sampled else None,
            "advantages": "apply_loss_reduction_to_advantages_minibatch",
            "loss_reduction": reduction,
            "micro_batch_size": 4,
            "max_seq_len": 16,
            "prompt_boundaries": [[0, 4], [4, 8]],
        }
        table.loss(
            f"skyrl/{kind}/{inputs}/{reduction}/{text({**changed, **rule})}",
            call,
            inputs,
            loss,
            wrt,
        )
    for kind in ["k1", "abs", "k2", "k3"]:
        wrt = leaf("far")
        values = taken.compute_approx_kl(
            wrt, field("far", "reference_logprobs"), field("far", "mask"), kind
        )
        table.divergence(
            f"skyrl/compute_approx_kl/far/{kind}",
            {"function": "compute_approx_kl", "kl_estimator_type": kind},
            "far",
            values,
            wrt,
        )
    for clip in [None, 0.2]:
        wrt = leaf("holes", "values")
        loss, _ = taken.ppo_critic_loss(
            wrt,
            field("holes", "old_values"),
            field("holes", "returns"),
            types.SimpleNamespace(value_clip=clip),
            field("holes", "mask"),
        )
        table.loss(
            f"skyrl/ppo_critic_loss/holes/value_clip={clip}",
            {"function": "ppo_critic_loss", "value_clip": clip},
            "holes",
            loss,
            wrt,
            kind="value",
            of="values",
        )
    skyrl_advantages(table, taken)
    return table


def skyrl_advantages(table, taken):
    """Advantages of SkyRL, where they differ from verl's or verl has none."""
    runs = [
        ("compute_maxrl_advantage", "ragged", {}),
        ("compute_maxrl_advantage", "mixed", {}),
        ("compute_rloo_outcome_advantage", "ragged", {}),
        ("compute_grpo_outcome_advantage", "ragged", {}),
        ("compute_grpo_outcome_advantage", "ragged", {"grpo_norm_by_std": False}),
    ]
    runs += [
        ("compute_gae_advantage_return", name, {"gamma": 0.9, "lambd": 0.8})
        for name in ["three", "holes"]
    ]
    runs += [
        ("compute_reinforce_plus_plus_outcome_advantage", name, {"gamma": 0.9})
        for name in ["mixed", "holes"]
    ]
    quiet = logging.getLogger("skyrl")
    quiet.disabled = True
    import loguru

    loguru.logger.disable("taken")
    for name, inputs, options in runs:
        rewards = "token_rewards" if "gamma" in options else "final_rewards"
        mask = field(inputs, "mask")
        given = {"values": field(inputs, "values")} if "lambd" in options else {}
        found, returns = getattr(taken, name)(
            token_level_rewards=field(inputs, rewards),
            response_mask=mask,
            index=np.array(INPUTS[inputs]["groups"]),
            **given,
            **options,
        )
        table.add(
            f"skyrl/{name}/{inputs}/{text(options)}",
            "advantage",
            {"function": name, "token_level_rewards": rewards, **options},
            inputs,
            advantages=found,
            returns=returns,
        )
