"""TRL's cases as specs of the table.

A loss of one of its accumulation steps is the share of a batch as many times as large.
"""

import numpy as np

from tests.rl.golden_specs import Case, Ours, fields_of, size, spec, tokens

# loss_type -> surrogate and aggregation.
COMPLETIONS, TOKENS = {"aggregate": "sequence_mean"}, {"aggregate": "token_mean"}
CLIPPED = {"surrogate": "clipped"}
TYPES = {
    "grpo": CLIPPED | COMPLETIONS,
    "bnpo": CLIPPED | TOKENS,
    "dr_grpo": CLIPPED | {"aggregate": "constant"},
    "dapo": CLIPPED | TOKENS,
    "luspo": CLIPPED | {"aggregate": "constant", "divisor": 1},
    "cispo": {"surrogate": "cispo", "bounds": "absolute", "low": 0} | TOKENS,
    "sapo": {"surrogate": "soft_gate"} | COMPLETIONS,
    "vespo": {"surrogate": "gamma_weighted"} | TOKENS,
}
OF_ITEMS = ("dapo", "cispo", "vespo")  # divided by num_items_in_batch
LEVELS = {
    "token": {"ratio": "token"},
    "sequence": {"ratio": "sequence"},
    "sequence_token": {"ratio": "sequence_token"},
}
OPTIONS = {
    "delta": "delta",
    "off_policy_mask_threshold": "off_policy",
    "sapo_temperature_pos": "tau_positive",
    "sapo_temperature_neg": "tau_negative",
    "vespo_k_pos": "k_positive",
    "vespo_lambda_pos": "lambda_positive",
    "vespo_k_neg": "k_negative",
    "vespo_lambda_neg": "lambda_negative",
}
NO_BOUND = 1e30
PADDING = "a mean over all places, those of padding too, whose divergence is read"


def trl(case: Case) -> Ours | str:
    """Returns a case of TRL in our terms."""
    function = case["call"]["function"]
    if case["kind"] in ("pair", "distribution"):
        return "a loss over pairs, or over distributions: no algorithm of this table"
    if case["kind"] == "loss":
        return _rloo(case) if function.startswith("RLOO") else _loss(case)
    if case["kind"] == "advantage":
        return _rloo_advantage(case) if function.startswith("RLOO") else _advantage(case)
    if case["kind"] == "reward":
        call = case["call"]
        buffer, longest = call["soft_punish_cache"], call["max_completion_len"]
        return Ours(spec("grpo", soft_overlong=buffer), longest=longest)
    if function.endswith("get_off_policy_mask"):
        return Ours(spec("dapo", kl=0, off_policy=case["call"]["off_policy_threshold"]))
    if function.endswith("get_gamma_weights"):
        return Ours(spec("vespo", kl=0))
    return Ours(spec("grpo", _correction(case["call"])))


def _loss(case: Case) -> Ours | str:
    call, fields = case["call"], fields_of(case)
    kind, level = call["loss_type"], call["importance_sampling_level"]
    gmpo = call["function"].startswith("GMPO")
    if gmpo and "top_entropy_quantile" in call:
        return "GMPO of the tokens of much entropy: completions that have none add a constant"
    if kind == "luspo" and (call["beta"] or level == "token"):
        return _padded_luspo(case)
    columns = TYPES[kind] | LEVELS[level]
    values = {"kl": call["beta"], "kl_estimator": "k3"}
    if call.get("use_bias_correction_kl"):
        values |= {"kl_estimator": "unbiased_k3", "kl_ratio": "row"}
    if "surrogate" in columns and columns["surrogate"] == "clipped":
        values |= {"low": call["epsilon"], "high": call["epsilon_high"]}
    if kind == "cispo" and call["epsilon_high"] >= 1:
        values |= {"high": call["epsilon_high"]}
    elif kind == "cispo":
        # Ours refuses such a bound, which is the other convention's number.
        columns = {"surrogate": "unclipped"} | TOKENS | LEVELS[level]
        values |= {"most": call["epsilon_high"]}
    if gmpo:
        columns = {"surrogate": "geometric_mean"} | COMPLETIONS
    values |= {own: call[key] for key, own in OPTIONS.items() if call.get(key) is not None}
    values |= _chosen(call) | _correction(call)
    given, steps = {}, call["current_gradient_accumulation_steps"]
    if call["old_per_token_logps"] is None:
        given["on_policy"] = np.ones(size(case), bool)
    if call["sampling_per_token_logps"] is None:
        given["sampler"] = fields["old"]
    if case["inputs"] != "spans":
        given["advantages"] = fields["sequence_advantages"]
    weight = {"grpo": size(case), "dr_grpo": size(case), "sapo": size(case), "luspo": size(case)}
    of_tokens = tokens(case) * steps
    if kind in OF_ITEMS:
        items = call["num_items_in_batch"]
        of_tokens = tokens(case) if items == "mask sum" else items
    return Ours(
        spec("grpo", columns, values),
        given,
        longest=call["max_completion_length"],
        weight=weight[kind] * steps if kind in weight else of_tokens,
        entropy_weight=of_tokens if call.get("entropy_coef") and kind in OF_ITEMS else None,
    )


def _padded_luspo(case: Case) -> Ours | str:
    """Returns LUSPO on tokens: of all places, padding too, each by the length of its completion.

    Padding is a token that is learnt from, then.
    """
    call, fields = case["call"], fields_of(case)
    if call["beta"]:
        return PADDING
    mask = fields["mask"]
    given = {"mask": np.ones(mask.shape, int), "counted": mask.sum(1), "sampler": fields["old"]}
    if case["inputs"] != "spans":
        given["advantages"] = fields["sequence_advantages"]
    values = {"kl": 0, "low": call["epsilon"], "high": call["epsilon_high"]}
    return Ours(spec("grpo", CLIPPED, TOKENS, values), given)


def _chosen(call: Case) -> dict:
    """Returns options of the tokens of much entropy, and of the bonus of entropy."""
    found, share = {}, call.get("top_entropy_quantile", 1.0)
    if share < 1:
        found |= {"selection": "low_entropy", "entropy_share": share}
    if call.get("entropy_coef"):
        of = "kept" if share < 1 else None
        found |= {"entropy": call["entropy_coef"], "entropy_mean": "token", "entropy_of": of}
    return found


def _correction(call: Case) -> dict:
    """Returns options of the weights between sampler and trainer."""
    if not call.get("vllm_importance_sampling_mode"):
        return {}
    least = call.get("vllm_importance_sampling_clip_min")
    most = call.get("vllm_importance_sampling_clip_max", 3.0)
    return {
        "correction": call["vllm_importance_sampling_mode"],
        "correction_low": least or 0.0,
        "correction_high": NO_BOUND if most is None else most,
    }


def _rloo(case: Case) -> Ours:
    """Returns RLOO's loss: of whole completions, with the product of their ratios."""
    call, fields = case["call"], fields_of(case)
    values = {"kl": 0, "low": call["epsilon"], "high": call["epsilon_high"]}
    columns = CLIPPED | COMPLETIONS | {"ratio": "sequence_product"}
    given = {"advantages": fields["sequence_advantages"]}
    return Ours(spec("rloo", columns, values), given)


def _advantage(case: Case) -> Ours | str:
    call, fields = case["call"], fields_of(case)
    rewards = fields[call["rewards"]].astype(float)
    for row, column in call.get("missing", ()):
        rewards[column, row] = np.nan
    given = {"group": np.arange(size(case)) // call["num_generations"]}
    if call.get("missing"):
        # Who has no reward at all is absent; of several a missing one adds nothing.
        given["present"] = ~np.isnan(rewards).all(axis=0)
        rewards = np.nan_to_num(rewards)
    given["rewards"] = rewards
    if call.get("reward_weights"):
        given["weights"] = call["reward_weights"]
    if call.get("multi_objective_aggregation") == "normalize_then_sum":
        if call.get("missing"):
            return "a reward that some completions miss, normalised over the others"
        return Ours(spec("gdpo", eps=1e-4), given)
    scaled = {
        "group": {"advantage": "group_zscore", "eps": 1e-4},
        "batch": {"advantage": "step_zscore", "eps": 1e-4, "spread": "rewards"},
        "none": {"advantage": "group_centred"},
    }[call.get("scale_rewards", "group")]
    return Ours(spec("grpo", scaled, kl=0), given)


def _rloo_advantage(case: Case) -> Ours | str:
    call, fields = case["call"], fields_of(case)
    rewards = fields["rewards"]
    if "reward_clip_range" in call:
        rewards = np.clip(rewards, *call["reward_clip_range"])
    given = {"rewards": rewards, "group": np.arange(size(case)) // call["num_generations"]}
    options = {"kl": call["beta"], "kl_in": "reward", "kl_estimator": "k1"}
    if call.get("normalize_advantages"):
        options |= {"spread": "step", "eps": 1e-4}
    return Ours(spec("rloo", options), given)
