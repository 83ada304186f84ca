"""Cases of SkyRL, NeMo RL, and of the authors of GMPO, GTPO and Dr.GRPO as specs of the table."""

import numpy as np

from tests.rl.golden_others import COMPLETIONS, NO_BOUND, TOKENS, TOOLS, corrected
from tests.rl.golden_specs import OWN, Case, Ours, fields_of, own_rewards, size, spec

REDUCTIONS = {
    "token_mean": TOKENS,
    "sequence_mean": COMPLETIONS,
    "seq_mean_token_sum_norm": {"aggregate": "constant"},
    "prompt_mean": {"aggregate": "prompt_mean"},
}
BOUNDED = {"kl_log_clamp": 20, "kl_clamp": 10}


def skyrl(case: Case) -> Ours | str:
    """Returns a case of SkyRL, which averages by scaling advantages."""
    call, fields = case["call"], fields_of(case)
    if case["kind"] == "divergence":
        kind = {"abs": "absolute"}.get(call["kl_estimator_type"], call["kl_estimator_type"])
        return Ours(spec("grpo", BOUNDED if kind == "k3" else {}, kl_estimator=kind))
    if case["kind"] == "value":
        return Ours(spec("grpo", COMPLETIONS), {"clip": call["value_clip"] or 0.0})
    if case["kind"] == "loss":
        return _skyrl_loss(case)
    if "gamma" in call:
        if case["inputs"] == "holes":
            return TOOLS
        given = own_rewards(case) | {"old_values": fields["new_values"]}
        if "lambd" in call:
            return Ours(spec("ppo", OWN, gamma=call["gamma"], lam=call["lambd"]), given)
        found = spec("reinforce_pp", OWN, gamma=call["gamma"])
        return Ours(found, given, returns=found + "&whiten=false")
    name = call["function"].removeprefix("compute_").removesuffix("_advantage")
    scaled = call.get("grpo_norm_by_std", True)
    advantage, options = {
        "maxrl": ("over_mean", {"eps": 1e-6, "single": "reward"}),
        "rloo_outcome": ("leave_one_out", {}),
        "grpo_outcome": ("group_zscore" if scaled else "group_centred", {"single": "reward"}),
    }[name]
    return Ours(spec("grpo", options, kl=0, advantage=advantage))


def _skyrl_loss(case: Case) -> Ours | str:
    call, fields, given = case["call"], fields_of(case), {}
    kind, reduction = call["policy_loss_type"], call["loss_reduction"]
    bounds = {"low": call["eps_clip_low"], "high": call["eps_clip_high"]}
    if "cispo_eps_clip_low" in call:
        bounds = {"low": call["cispo_eps_clip_low"], "high": call["cispo_eps_clip_high"]}
    if call.get("dppo_type"):
        bounds = {"low": call["delta_low"], "high": call["delta_high"]}
    tv = call.get("dppo_type") == "binary_tv"
    values = {
        "regular": bounds | {"log_clamp": 20},
        "dual_clip": bounds | {"log_clamp": 20, "dual_clip": call.get("clip_ratio_c")},
        "sapo": {"surrogate": "soft_gate", "log_clamp": 20},
        "gspo": bounds | {"ratio": "sequence_token", "log_clamp": 10},
        "cispo": bounds | {"surrogate": "cispo", "bounds": "relative", "log_clamp": 20},
        "rollout_is": bounds
        | {"surrogate": "cispo", "bounds": "relative", "outside": "dropped", "log_clamp": 20},
        "dppo": bounds
        | {"surrogate": "total_variation" if tv else "binary_divergence", "as_ratio": True}
        | {"most": NO_BOUND, "log_clamp": 20},
        "importance_sampling": {"surrogate": "unclipped"},
        "cross_entropy": {"surrogate": "log_likelihood"},
        "kl_cov": {"surrogate": "covariance_penalty", "selection": "kl_cov"}
        | {"cov_share": call.get("kl_cov_frac"), "coefficient": call.get("ppo_kl_coef")},
    }[kind]
    if kind == "rollout_is" or call.get("cispo_anchor") == "rollout":
        given["old"] = fields["sampler"]
    if kind == "cross_entropy":
        given["advantages"] = np.ones(size(case))
    aggregate = REDUCTIONS.get(reduction)
    if aggregate is None or kind in ("kl_cov", "cross_entropy"):
        # The loss is a sum, whatever the advantages were scaled by.
        aggregate = {"aggregate": "token_sum"}
        given.setdefault("advantages", _scaled(case, reduction))
    options = _skyrl_correction(call["off_policy_correction"])
    return Ours(spec("grpo", aggregate, values, options, kl=0), given)


def _scaled(case: Case, reduction: str) -> np.ndarray:
    """Returns advantages scaled for a mean over tokens of each microbatch, or over completions."""
    mask, A = fields_of(case)["mask"], fields_of(case)["advantages"]
    if reduction == "sequence_mean":
        return A / (size(case) * mask.sum(1, keepdims=True))
    parts = [slice(start, start + 4) for start in range(0, size(case), 4)]
    return np.concatenate([A[rows] / mask[rows].sum() / len(parts) for rows in parts])


def _skyrl_correction(rules: Case) -> dict:
    """Returns options of the weights and masks between sampler and trainer."""
    found = {}
    if level := rules.get("tis_ratio_type"):
        high = rules[f"{level}_tis_ratio_clip_high"]
        found |= {"correction": f"{level}_truncate", "correction_high": high}
    kinds = {"geo_mask": "sequence_mean_k1", "product_mask": "sequence_sum_k1"}
    kinds |= {
        "outlier_token_is_threshold": "sequence_all_k1",
        "token_mask_is_threshold": "token_k1",
    }
    for name, kind in kinds.items():
        if f"{name}_low" in rules:
            found |= {"rejection": kind}
            found |= {"rejection_low": rules[f"{name}_low"]}
            found |= {"rejection_high": rules[f"{name}_high"]}
    return found


def nemo_rl(case: Case) -> Ours | str:
    """Returns a case of NeMo RL, whose divergence goes by a ratio with a gradient."""
    if case["kind"] == "advantage":
        return _nemo_advantage(case)
    call = case["call"]
    if call.get("positive_example_nll_weight"):
        return "a likelihood of the right completions beside the loss: no term of ours"
    columns = {"surrogate": "clipped", "low": call["ratio_clip_min"]}
    columns |= {"high": call["ratio_clip_max"], "dual_clip": call.get("ratio_clip_c")}
    if call.get("use_cispo"):
        columns |= {"surrogate": "cispo", "bounds": "relative"}
    if call.get("disable_ppo_ratio"):
        columns = {"surrogate": "log_likelihood"}
    if call.get("force_on_policy_ratio"):
        columns |= {"ratio": "on_policy"}
    if call.get("sequence_level_importance_ratios"):
        columns |= {"ratio": "sequence"}
    options = {"kl": call["reference_policy_kl_penalty"]}
    if options["kl"]:
        kind = call.get("reference_policy_kl_type", "k3")
        approximate = call.get("use_on_policy_kl_approximation")
        options |= {"kl_estimator": f"unbiased_{kind}"} | BOUNDED
        options |= {"kl_ratio": "sampler" if approximate else "own"}
    if call.get("use_importance_sampling_correction"):
        kind = call.get("truncated_importance_sampling_type", "tis")
        low = call.get("truncated_importance_sampling_ratio_min")
        options |= corrected(kind, low, call.get("truncated_importance_sampling_ratio"))
        if call.get("sequence_level_importance_ratios"):
            options |= {"correction": "sequence_truncate"}
    aggregate = TOKENS if call.get("token_level_loss", True) else COMPLETIONS
    return Ours(spec("grpo", aggregate, columns, options))


def _nemo_advantage(case: Case) -> Ours | str:
    call, fields = case["call"], fields_of(case)
    if call["function"] == "GDPOAdvantageEstimator":
        given = {"rewards": fields["named_rewards"]}
        if call["reward_weights"]:
            given["weights"] = call["reward_weights"]
        baseline = "others" if call["use_leave_one_out_baseline"] else "mean"
        return Ours(spec("gdpo", baseline=baseline, whiten_eps=0), given)
    if call["function"].startswith("Reinforce"):
        options = {"advantage": "whitened_centred", "penalty": "own", "whiten_ddof": 0}
        options |= {"baseline": "group" if call["minus_baseline"] else "none"}
        divergence = {"kl": call["reference_policy_kl_penalty"], "kl_in": "reward"}
        return Ours(spec("grpo", options, divergence, BOUNDED, kl_estimator="k3"))
    scaled = call["normalize_rewards"]
    if call["use_leave_one_out_baseline"]:
        options = {"advantage": "leave_one_out", "spread": "others" if scaled else "none"}
    else:
        options = {"advantage": "group_zscore" if scaled else "group_centred"}
    return Ours(spec("grpo", options, kl=0))


def gmpo(case: Case) -> Ours | str:
    """Returns a case of GMPO's authors, with the ablations of their paper."""
    call = case["call"]
    kind, clip = call["critic_type_modify"], call["cliprange"]
    advantage = {"kl": 0, "advantage": "group_centred"}
    if kind in ("gmpo_without_norm", "gmpo_seqclip"):
        return "an ablation of GMPO's paper: without the root, or with a clip before it"
    clip = 1e9 if kind == "gmpo_noclip" else clip
    return Ours(spec("gmpo", advantage, low=clip, high=clip), rewarded=True)


def r1_zero(case: Case) -> Ours | str:
    """Returns a case of Dr.GRPO's authors."""
    call = case["call"]
    scaled = {"advantage": "group_zscore", "eps": 1e-8} | COMPLETIONS
    columns = scaled if call["critic_type"] == "grpo" else {}
    if case["kind"] == "advantage":
        return Ours(spec("dr_grpo", columns))
    values = {"kl": call.get("beta", 0), "kl_estimator": "k3"}
    if call.get("tis_c"):
        values |= {"correction": "token_truncate", "correction_high": call["tis_c"]}
    return Ours(spec("dr_grpo", columns, values), rewarded=True)


def gtpo(case: Case) -> Ours | str:
    """Returns a case of GTPO's authors, who count conflicts as form=reference does."""
    fields, rows = fields_of(case), case["call"]["rows"]
    given = {name: fields[name][rows] for name in ("mask", "tokens")}
    # Advantages add up to 0 in each group: as rewards of one group they are their own.
    given |= {"rewards": fields["sequence_advantages"][rows], "group": np.zeros(len(rows), int)}
    found = spec("gtpo_conflict", form="reference")
    if case["kind"] == "mask":
        return Ours(found, given, skip=("mask",))
    given |= {"logprobs": np.asarray(case["logprobs"])[rows]}
    given |= {"old": given["logprobs"]}
    given |= {"entropy": np.asarray(case["entropies"])[:, None] * given["mask"]}
    return Ours(found, given, weight=1, rewarded=True)
