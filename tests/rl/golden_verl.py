"""verl's cases as specs of the table.

Its losses clamp log-ratios to +-20 and `vanilla` has a dual clip of 3 unless told otherwise.
"""

import numpy as np

from tests.rl.golden_specs import OWN, Case, Ours, fields_of, own_rewards, spec

MODES = {
    "token-mean": {"aggregate": "token_mean"},
    "token-sum": {"aggregate": "token_sum"},
    "seq-mean-token-sum": {"aggregate": "constant", "divisor": 1},
    "seq-mean-token-mean": {"aggregate": "sequence_mean"},
    "seq-mean-token-sum-norm": {"aggregate": "constant"},
}
# The loss -> ratio and surrogate, and their options -> those of verl's config, with its defaults.
LOSSES = {
    "vanilla": ({"log_clamp": 20}, {"low": 0.2, "high": 0.2, "dual_clip": 3}),
    "dppo_tv": (
        {"surrogate": "total_variation", "log_clamp": 20},
        {"low": 0.2, "high": 0.2, "most": 3},
    ),
    "dppo_kl": (
        {"surrogate": "binary_divergence", "log_clamp": 20},
        {"low": 0.2, "high": 0.2, "most": 3},
    ),
    "gspo": ({"ratio": "sequence_token", "log_clamp": 10}, {"low": 0.2, "high": 0.2}),
    "sapo": (
        {"surrogate": "soft_gate", "log_clamp": 20},
        {"tau_positive": 1.0, "tau_negative": 1.05},
    ),
    "gpg": ({"surrogate": "log_likelihood"}, {}),
    "clip_cov": (
        {"selection": "clip_cov"},
        {"low": 0.2, "high": 0.2, "cov_share": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
    ),
    "kl_cov": (
        {"surrogate": "covariance_penalty", "selection": "kl_cov"},
        {"cov_share": 2e-4, "coefficient": 0.1},
    ),
    "geo_mean": ({"surrogate": "geometric_mean"}, {"low": 0.2, "high": 0.2}),
    "dro": ({"surrogate": "mirror_descent", "level": "token"}, {"tau": None}),
    "cispo": (
        {"surrogate": "cispo", "bounds": "relative", "log_clamp": 20},
        {"low": 0.2, "high": 0.2},
    ),
}
OPTIONS = {
    "clip_ratio_low": ("low",),
    "clip_ratio_high": ("high",),
    "clip_ratio_c": ("dual_clip", "most"),
    "tau_pos": ("tau_positive",),
    "tau_neg": ("tau_negative",),
    "clip_cov_ratio": ("cov_share",),
    "clip_cov_lb": ("cov_low",),
    "clip_cov_ub": ("cov_high",),
    "kl_cov_ratio": ("cov_share",),
    "ppo_kl_coef": ("coefficient",),
    "dro_beta": ("tau",),
}
WHOLE = ("gspo", "sapo", "geo_mean")  # a mean over completions, whatever loss_agg_mode says
BOUNDED_K3 = {"kl_estimator": "k3", "kl_log_clamp": 20, "kl_clamp": 10}
DIVERGENCES = {
    "k1": {"kl_estimator": "k1"},
    "abs": {"kl_estimator": "absolute"},
    "k2": {"kl_estimator": "k2"},
    "k3": BOUNDED_K3,
    "k1+": {"kl_estimator": "k1_plus"},
    "abs+": {"kl_estimator": "absolute_plus"},
    "k2+": {"kl_estimator": "k2"},
    "k3+": BOUNDED_K3 | {"kl_estimator": "k3_plus"},
}
ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "low_var_kl+": "k3+"}
GROUPS_OF_ONE = {"single": "reward"}
ADVANTAGES = {
    "grpo": ("group_zscore", GROUPS_OF_ONE),
    "grpo_vectorized": ("group_zscore", GROUPS_OF_ONE),
    "rloo": ("leave_one_out", GROUPS_OF_ONE),
    "rloo_vectorized": ("leave_one_out", {}),
    "opo": ("length_weighted", GROUPS_OF_ONE),
    "reinforce_plus_plus_baseline": ("whitened_centred", GROUPS_OF_ONE),
    "gpg": ("signal_scaled", {"scale": "rewards", **GROUPS_OF_ONE}),
    "grpo_passk": ("best_over_second", {}),
}


def verl(case: Case) -> Ours | str:
    """Returns a case of verl in our terms."""
    call = case["call"]
    if case["kind"] == "advantage":
        return _penalised(case) if call["function"] == "apply_kl_penalty" else _advantage(case)
    return {
        "get_policy_loss_fn": _policy,
        "ppo_loss": _whole_loss,
        "kl_penalty": lambda case: Ours(spec("grpo", _divergence(case["call"]["kl_penalty"]))),
        "agg_loss": _aggregation,
        "compute_entropy_loss": _aggregation,
        "compute_value_loss": _aggregation,
        "compute_rollout_correction_weights": _weights,
        "compute_rollout_rejection_mask": _rejection,
        "AdaptiveKLController": lambda case: "an adaptive coefficient: the loop has none",
        "compute_offpolicy_metrics": lambda case: "metrics: rl/objective.py has its own",
    }[call["function"]](case)


def _mode(case: Case, mode: str, batch: Case | None = None) -> tuple[dict, dict]:
    """Returns an aggregation, and the weight and the width of the batch that the case names."""
    batch = batch or {}
    width = fields_of(case)["mask"].shape[1]
    given = {"longest": batch.get("loss_scale_factor") or width}
    ranks = batch.get("dp_size", 1)
    if mode == "token-sum":
        given["weight"] = 1 / ranks
    elif count := batch.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size"):
        given["weight"] = count / ranks
    return MODES[mode], given


def _loss(name: str, config: Case, aggregate: Case) -> str:
    """Returns a spec of a loss with the options that a config sets."""
    columns, options = LOSSES[name]
    flat = {key: value for key, value in config.items() if not isinstance(value, dict)}
    flat |= config.get("policy_loss", {})
    values = dict(options)
    for key, value in flat.items():
        values |= {own: value for own in OPTIONS.get(key, ()) if own in options}
    return spec("grpo", {"kl": 0}, aggregate, columns, values)


def _policy(case: Case) -> Ours | str:
    call = case["call"]
    name, mode = call["name"], call["loss_agg_mode"]
    if name == "bypass_mode":
        return _bypass(case)
    if name == "dppo_kl" and case["inputs"] == "three":
        return "a log-prob above 0, of which the binary divergence is not a number"
    mode = "seq-mean-token-mean" if name in WHOLE else mode
    aggregate, given = _mode(case, mode, call.get("global_batch_info"))
    fields = {}
    if call["rollout_is_weights"]:
        fields = {"correction": fields_of(case)["factors"]}
    if fields and name == "geo_mean":
        # A completion's weight is the geometric mean of those of its tokens.
        mask, log = fields_of(case)["mask"], np.log(fields["correction"] + 1e-10)
        fields = {"correction": np.exp((log * mask).sum(1) / mask.sum(1))}
    return Ours(_loss(name, call["config"], aggregate), fields, **given)


def _bypass(case: Case) -> Ours | str:
    """Returns a case in which the sampler's log-probs are the old ones.

    Corrections compare the policy itself with the sampler. For ours that is a step whose old
    log-probs are the policy's.
    """
    call, fields = case["call"], fields_of(case)
    rules = call["rollout_correction"]
    aggregate, given = _mode(case, call["loss_agg_mode"])
    options = _correction(rules) if rules.get("rollout_is") else {}
    if "rollout_rs" in rules:
        if "," in rules["rollout_rs"]:
            return "two rejections at once: ours is one"
        options |= _within(rules["rollout_rs"], rules["rollout_rs_threshold"])
    if rules["loss_type"] == "reinforce":
        columns, values = LOSSES["gpg"]
    else:
        columns, values = LOSSES["vanilla"]
        values = values | {"high": call["config"]["clip_ratio_high"]}
    found = spec("grpo", {"kl": 0, "rejected": "removed"}, aggregate, columns, values, options)
    return Ours(found, {"old": fields["sampler"]}, step={"old": fields["logprobs"]}, **given)


def _whole_loss(case: Case) -> Ours:
    config = case["call"]["config"]
    mode = config.get("loss_agg_mode", "token-mean")
    aggregate, given = _mode(case, mode, {"loss_scale_factor": config.get("loss_scale_factor")})
    terms = {"entropy": config.get("entropy_coeff", 0.0)}
    if config.get("use_kl_loss"):
        terms |= {"kl": config["kl_loss_coef"]} | _divergence(config["kl_loss_type"])
    return Ours(_loss("vanilla", config, aggregate | terms), **given)


def _divergence(kind: str) -> dict:
    return DIVERGENCES[ALIASES.get(kind, kind)]


def _aggregation(case: Case) -> Ours:
    call = case["call"]
    aggregate, given = _mode(case, call["loss_agg_mode"], call)
    clip = {"clip": call["cliprange_value"]} if "cliprange_value" in call else {}
    return Ours(spec("grpo", aggregate), clip, **given)


def _correction(rules: Case) -> dict:
    """Returns options of an importance weight; a bound of two is IcePop's."""
    low, _, high = str(rules["rollout_is_threshold"]).rpartition("_")
    return {
        "correction": f"{rules['rollout_is']}_{'mask' if low else 'truncate'}",
        "correction_low": low or 0.0,
        "correction_high": high,
        "correction_mean_one": rules.get("rollout_is_batch_normalize", False),
    }


def _weights(case: Case) -> Ours:
    fields, ratio = fields_of(case), case["call"]["log_ratio"].split(" - ")
    given = {} if ratio[0] == "old_logprobs" else {"old": fields["logprobs"]}
    given |= {} if ratio[1] == "sampler_logprobs" else {"sampler": fields["old"]}
    return Ours(spec("grpo", _correction(case["call"])), given)


def _within(mode: str, threshold: str) -> dict:
    """Returns options of a rejection; bounds of k1 are those of the inverse ratio."""
    kind = mode.replace("seq_", "sequence_")
    if not mode.endswith("k1"):
        return {"rejection": kind, "rejection_high": threshold}
    low, _, high = threshold.rpartition("_")
    low = float(low) if low else 1 / float(high)
    return {"rejection": kind, "rejection_low": 1 / float(high), "rejection_high": 1 / low}


def _rejection(case: Case) -> Ours | str:
    call = case["call"]
    if "," in call["rollout_rs"]:
        return "two rejections at once: ours is one"
    options = _within(call["rollout_rs"], call["rollout_rs_threshold"])
    return Ours(spec("grpo", options, rejected="removed"))


def _advantage(case: Case) -> Ours | str:
    call, fields = case["call"], fields_of(case)
    name, config = call["name"], call.get("config", {})
    if name.endswith("optimal_token_baseline"):
        return "the optimal token baseline needs sums of squared probabilities, which no pass makes"
    own = call.get("token_level_rewards") == "token_rewards"
    given = own_rewards(case) if own else {}
    common = {"kl": 0} | (OWN if own else {})
    if name == "gae":
        options = {"gamma": call["gamma"], "lam": call["lam"]}
        given |= {"old_values": fields["new_values"]}
        return Ours(spec("ppo", common, options), given)
    if name == "reinforce_plus_plus":
        found = spec("reinforce_pp", common, gamma=config["gamma"])
        return Ours(found, given, returns=found + "&whiten=false")
    if name == "remax":
        found = spec("remax", common, advantage="to_go", baseline="greedy")
        return Ours(found, given | {"greedy": fields["baselines"]})
    if name == "gdpo":
        return _gdpo(case)
    advantage, options = ADVANTAGES[name]
    scaled = call.get("norm_adv_by_std_in_grpo", config.get("norm_adv_by_std_in_grpo", True))
    if advantage == "group_zscore" and not scaled:
        advantage = "group_centred"
    if name == "grpo_passk":
        options = {"scaled": scaled}
    if "f_norm" in call:
        return "f_norm, a divisor of all advantages, is a learning rate"
    options = options | ({"eps": call["epsilon"]} if "epsilon" in call else {})
    return Ours(spec("grpo", common, options, advantage=advantage))


def _gdpo(case: Case) -> Ours:
    call, fields = case["call"], fields_of(case)
    rewards = fields["named_rewards"] if call.get("rewards") else fields["rewards"]
    given = {"rewards": rewards}
    if weights := call.get("gdpo_reward_weights"):
        given["weights"] = weights
    options = {} if call.get("norm_adv_by_std_in_grpo", True) else {"scaled": False}
    return Ours(spec("gdpo", options, GROUPS_OF_ONE, whiten="tokens"), given)


def _penalised(case: Case) -> Ours:
    call = case["call"]
    options = _divergence(call["kl_penalty"]) | {"kl": call["kl_coef"]}
    return Ours(spec("reinforce_pp", options, gamma=call["gamma"]))
