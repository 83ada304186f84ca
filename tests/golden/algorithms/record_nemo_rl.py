"""The clipped loss of NeMo RL with divergences and corrections, and its advantages."""

import enum
import types

import torch
from common import Cases, field, leaf, text, whole
from library import load


def nemo_rl(path, commit):
    """NeMo RL: its clipped loss with divergences and corrections, and its advantages."""
    import pydantic

    table = Cases("nemo_rl", commit)
    base = f"{path}/nemo_rl/algorithms"
    tools = load(
        f"{base}/utils.py",
        [
            "calculate_kl",
            "masked_mean",
            "masked_var",
            "calculate_baseline_and_std_per_prompt",
            "get_gdpo_reward_component_keys",
        ],
    )
    kinds = load(
        f"{base}/loss/interfaces.py", ["LossType", "MetricNormalizer", "LossInputType"], enum=enum
    )
    beside = {
        "BaseModel": pydantic.BaseModel,
        "calculate_kl": tools.calculate_kl,
        "masked_mean": tools.masked_mean,
        "LossFunction": object,
        "LossType": kinds.LossType,
        "MetricNormalizer": kinds.MetricNormalizer,
        "LossInputType": kinds.LossInputType,
    }
    taken = load(
        f"{base}/loss/loss_functions.py", ["ClippedPGLossConfig", "ClippedPGLossFn"], **beside
    )
    bounds = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.28, "reference_policy_kl_penalty": 0.0}
    corrected = {**bounds, "use_importance_sampling_correction": True}
    runs = [("mixed", {**bounds, "token_level_loss": level}) for level in [True, False]]
    runs += [
        ("holes", bounds),
        ("spans", {**bounds, "ratio_clip_c": 1.2}),
        ("mixed", {**bounds, "ratio_clip_c": 2.0}),
        ("mixed", {**bounds, "use_cispo": True}),
        ("mixed", {**bounds, "disable_ppo_ratio": True}),
        ("mixed", {**bounds, "force_on_policy_ratio": True}),
        ("mixed", {**bounds, "positive_example_nll_weight": 0.1}),
    ]
    gspo = {
        **corrected,
        "token_level_loss": False,
        "sequence_level_importance_ratios": True,
        "ratio_clip_min": 3e-4,
        "ratio_clip_max": 4e-4,
    }
    runs += [("mixed", gspo), ("holes", {**gspo, "use_importance_sampling_correction": False})]
    runs += [
        (
            "mixed",
            {
                **bounds,
                "reference_policy_kl_penalty": 0.1,
                "reference_policy_kl_type": kind,
                "use_on_policy_kl_approximation": approximate,
            },
        )
        for kind in ["k1", "k2", "k3"]
        for approximate in [False, True]
    ]
    runs += [("far", {**bounds, "reference_policy_kl_penalty": 0.1})]
    runs += [("mixed", corrected)]
    runs += [
        (
            "mixed",
            {
                **corrected,
                "truncated_importance_sampling_type": kind,
                "truncated_importance_sampling_ratio": high,
                "truncated_importance_sampling_ratio_min": low,
            },
        )
        for kind, low, high in [
            ("tis", None, 1.5),
            ("tis", 0.8, 1.5),
            ("icepop", 0.5, 1.5),
            ("seq-mask-tis", 0.9, 1.15),
        ]
    ]
    for inputs, options in runs:
        wrt, mask = leaf(inputs), field(inputs, "mask")
        front = torch.zeros(len(mask), 1)
        data = {
            name: torch.cat([front, field(inputs, key)], dim=1)
            for name, key in [
                ("token_mask", "mask"),
                ("advantages", "advantages"),
                ("prev_logprobs", "old_logprobs"),
                ("generation_logprobs", "sampler_logprobs"),
                ("reference_policy_logprobs", "reference_logprobs"),
            ]
        }
        data["sample_mask"] = torch.ones(len(mask))
        if inputs == "mixed":
            data["rewards"] = field(inputs, "rewards")
        loss, _ = taken.ClippedPGLossFn(taken.ClippedPGLossConfig(**options))(
            wrt, data, torch.tensor(float(len(mask))), mask.sum()
        )
        table.loss(
            f"nemo_rl/ClippedPGLossFn/{inputs}/{text(options)}",
            {
                "function": "ClippedPGLossFn",
                **options,
                "prev_logprobs": "old_logprobs",
                "generation_logprobs": "sampler_logprobs",
            },
            inputs,
            loss,
            wrt,
        )
    nemo_advantages(table, base, tools)
    return table


def nemo_advantages(table, base, tools):
    """Advantages of NeMo RL, over groups of equal and unequal sizes."""
    taken = load(
        f"{base}/advantage_estimator.py",
        ["GRPOAdvantageEstimator", "ReinforcePlusPlusAdvantageEstimator", "GDPOAdvantageEstimator"],
        **{
            name: getattr(tools, name)
            for name in [
                "calculate_kl",
                "masked_mean",
                "masked_var",
                "calculate_baseline_and_std_per_prompt",
                "get_gdpo_reward_component_keys",
            ]
        },
    )
    loss = types.SimpleNamespace(
        use_kl_in_reward=True, reference_policy_kl_penalty=0.1, reference_policy_kl_type="k3"
    )
    runs = [
        (
            "GRPOAdvantageEstimator",
            name,
            {"use_leave_one_out_baseline": out, "normalize_rewards": scaled},
        )
        for name in ["mixed", "ragged"]
        for out in [True, False]
        for scaled in [True, False]
    ]
    runs += [
        ("ReinforcePlusPlusAdvantageEstimator", name, {"minus_baseline": minus})
        for name in ["mixed", "ragged"]
        for minus in [True, False]
    ]
    runs += [
        (
            "GDPOAdvantageEstimator",
            "mixed",
            {
                "use_leave_one_out_baseline": out,
                "normalize_rewards": True,
                "reward_weights": weights,
            },
        )
        for out in [True, False]
        for weights in [None, [1.0, 0.5, 2.0]]
    ]
    for name, inputs, options in runs:
        mask = field(inputs, "mask")
        estimator = getattr(taken, name)(types.SimpleNamespace(**options), loss)
        given = {}
        if "GDPO" in name:
            given["repeated_batch"] = dict(
                zip(
                    ["reward/1", "reward/2", "reward/3"],
                    field(inputs, "named_rewards"),
                    strict=True,
                )
            )
        else:
            given["logprobs_policy"] = field(inputs, "old_logprobs")
            given["logprobs_reference"] = field(inputs, "reference_logprobs")
        found = estimator.compute_advantage(
            whole(inputs, "groups").unsqueeze(1), field(inputs, "rewards"), mask, **given
        )
        call = {"function": name, **options, "rewards": "rewards"}
        if "Plus" in name:
            call.update(
                use_kl_in_reward=True,
                reference_policy_kl_penalty=0.1,
                logprobs_policy="old_logprobs",
                logprobs_reference="reference_logprobs",
            )
        if "GDPO" in name:
            call["rewards"] = "named_rewards"
        table.add(
            f"nemo_rl/{name}/{inputs}/{text(options)}",
            "advantage",
            call,
            inputs,
            advantages=found * mask,
        )
