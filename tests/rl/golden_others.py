"""Cases of OpenRLHF, slime, AReaL and prime-rl as specs of the table."""

import numpy as np

from tests.rl.golden_specs import OWN, Case, Ours, fields_of, own_rewards, spec, tokens

TOKENS, COMPLETIONS = {"aggregate": "token_mean"}, {"aggregate": "sequence_mean"}
NO_BOUND = 1e30
TOOLS = "its returns count the tokens of tools as steps"


def openrlhf(case: Case) -> Ours | str:
    """Returns a case of OpenRLHF: all divergences are clamped to +-10, variances have ddof 0."""
    call = case["call"]
    if case["kind"] == "divergence":
        return Ours(spec("grpo", kl_estimator=call["kl_estimator"], kl_clamp=10))
    if case["kind"] == "value":
        aggregate = TOKENS if call["token_level_loss"] else COMPLETIONS
        return Ours(spec("grpo", aggregate), {"clip": call["clip_eps"] or 0.0})
    if case["kind"] == "reward":
        return _openrlhf_overlong(case)
    if case["kind"] == "advantage":
        return _openrlhf_advantage(case)
    if case["kind"] == "pair":
        return "a loss over pairs: no algorithm of this table"
    return _openrlhf_loss(case)


def _openrlhf_loss(case: Case) -> Ours:
    call, fields, given = case["call"], fields_of(case), {}
    whole = call.get("policy_loss_type") == "gspo"
    of_tokens = call.get("token_level_loss", True) and not whole
    values = {"kl": 0, "low": call["clip_eps_low"], "high": call["clip_eps_high"]}
    values |= {"log_clamp": None if whole else 20, "dual_clip": call.get("dual_clip")}
    values |= {"ratio": "sequence" if whole else "token"}
    if call.get("enable_vllm_is_correction") and whole:
        given = {"old": fields["sampler"]}
    elif call.get("enable_vllm_is_correction"):
        values |= corrected(call["vllm_is_correction_type"], *call["vllm_is_truncated_threshold"])
    count = call.get("batch_num_tokens" if of_tokens else "global_batch_size")
    weight = count / call["dp_size"] if count else None
    return Ours(spec("grpo", values, TOKENS if of_tokens else COMPLETIONS), given, weight=weight)


def corrected(kind: str, low: float | None, high: float | None) -> dict:
    """Returns options of truncated weights, of IcePop, or of weights within a geometric mean."""
    bounds = {"correction_low": low or 0.0, "correction_high": high or NO_BOUND}
    if kind == "seq-mask-tis":
        rejection = {"rejection": "sequence_mean_k1", "rejection_low": low, "rejection_high": high}
        return {"correction": "token_truncate", "correction_high": NO_BOUND} | rejection
    return {"correction": "token_mask" if kind == "icepop" else "token_truncate"} | bounds


def _openrlhf_advantage(case: Case) -> Ours | str:
    call, fields = case["call"], fields_of(case)
    kind, gamma = call["estimator"], call["gamma"]
    if case["inputs"] == "holes" and (kind == "gae" or gamma != 1):
        return TOOLS
    common = {"kl": call["kl_coef"], "kl_in": "reward", "kl_estimator": "k1", "gamma": gamma}
    if kind == "gae":
        given = {"old_values": fields["new_values"]}
        return Ours(spec("ppo", common, lam=call["lambd"], whiten_ddof=0), given)
    baseline = {
        "reinforce": "none",
        "rloo": "others",
        "reinforce_baseline": "group",
        "group_norm": "zscore",
        "dr_grpo": "group",
    }[kind]
    options = {"advantage": "discounted", "baseline": baseline, "eps": 1e-9}
    plain = spec("grpo", common, options, whiten="false")
    whitened = spec("grpo", common, options, whiten_ddof=0)
    return Ours(whitened if kind.startswith("reinforce") else plain, returns=plain)


def _openrlhf_overlong(case: Case) -> Ours | str:
    call = case["call"]
    if call["function"] == "apply_stop_properly_penalty":
        return "a factor on the reward of what is truncated: a reward, not a column"
    options = {
        "soft_overlong": call["overlong_buffer_len"],
        "overlong_weight": call["overlong_penalty_factor"],
    }
    given = {"paid": fields_of(case)["rewards"]}
    return Ours(spec("grpo", options), given, longest=call["max_new_tokens"])


def slime(case: Case) -> Ours | str:
    """Returns a case of slime, whose losses of tokens the recorder has averaged."""
    call, fields = case["call"], fields_of(case)
    function = call["function"]
    if case["kind"] == "divergence":
        kind = "k3" if call["kl_loss_type"] == "low_var_kl" else call["kl_loss_type"]
        clamp = 10 if call["kl_loss_type"] == "low_var_kl" else None
        prefix = "unbiased_" if call["importance_ratio"] else ""
        return Ours(spec("grpo", kl_estimator=prefix + kind, kl_clamp=clamp))
    if case["kind"] == "loss":
        return _slime_loss(case)
    if case["kind"] == "mask":
        given = {"sampler": fields["old"]}
        return Ours(spec("dapo", kl=0, off_policy=call["opsm_delta"]), given)
    if case["kind"] == "weight":
        return _slime_weights(case)
    if case["kind"] == "logprob":
        return "log-probs over kept ids are the head's: tests/rl/test_support.py"
    if function.endswith("_gae"):
        given = own_rewards(case) | {"old_values": fields["new_values"]}
        options = {"gamma": call["gamma"], "lam": call["lambd"], "whiten": "false"}
        return Ours(spec("ppo", OWN, options), given)
    common = {"kl": call["kl_coef"], "kl_in": "reward", "kl_estimator": "k1", "whiten": "false"}
    if function.endswith("baseline_advantages"):
        options = {"advantage": "whitened_centred", "baseline": "none", "penalty": "own"}
        return Ours(spec("grpo", common, options))
    if case["inputs"] == "holes" and call["gamma"] != 1:
        return TOOLS
    found = spec("reinforce_pp", common, gamma=call["gamma"])
    return Ours(found, returns=found)


def _slime_loss(case: Case) -> Ours:
    call = case["call"]
    values = {"kl": 0, "low": call["eps_clip"], "high": call["eps_clip_high"]}
    if call["function"] == "compute_cispo_loss":
        return Ours(spec("grpo", values, TOKENS, surrogate="cispo", bounds="relative"))
    ratio = "sequence" if call["ppo_kl"] == "compute_gspo_kl" else "token"
    return Ours(spec("grpo", values, TOKENS, ratio=ratio, dual_clip=call["eps_clip_c"]))


def _slime_weights(case: Case) -> Ours:
    call = case["call"]
    if call["function"] != "compute_mis_weights":
        kind = "icepop" if call["function"] == "icepop_function" else "tis"
        return Ours(spec("grpo", corrected(kind, call["tis_clip_low"], call["tis_clip"])))
    high, level = call["tis_upper_bound"], call["tis_level"]
    low = call["tis_lower_bound"] or 1 / high
    options = {
        "correction": f"{level}_{'mask' if call['tis_mode'] == 'mask' else 'truncate'}",
        "correction_low": 0 if call["tis_mode"] == "truncate" else low,
        "correction_high": high,
        "correction_mean_one": call["tis_batch_normalize"],
    }
    if call["rs_veto_threshold"]:
        options |= {"rejection": "sequence_all_k1", "rejection_high": NO_BOUND}
        options |= {"rejection_low": call["rs_veto_threshold"]}
    elif call["use_rs"]:
        kind = {"token": "token", "sequence": "sequence_sum", "geometric": "sequence_mean"}
        options |= {"rejection": f"{kind[call['rs_level']]}_k1"}
        options |= {"rejection_low": call["rs_lower_bound"]}
        options |= {"rejection_high": call["rs_upper_bound"]}
    elif call["tis_mode"] == "mask":
        kind = {"token": "token", "sequence": "sequence_sum", "geometric": "sequence_mean"}
        options |= {"rejection": f"{kind[level]}_k1"}
        options |= {"rejection_low": low, "rejection_high": high}
    return Ours(spec("grpo", options, rejected="removed"))


def areal(case: Case) -> Ours | str:
    """Returns a case of AReaL, whose old log-probs are the sampler's and proximal ones the old."""
    call, fields = case["call"], fields_of(case)
    if case["kind"] == "value":
        return Ours(spec("grpo", TOKENS), {"clip": call["value_eps_clip"]})
    if case["kind"] == "reward":
        options = {
            "soft_overlong": call["overlong_tokens"],
            "overlong_weight": call["overlong_penalty_factor"],
        }
        if case["id"].endswith("10,5,0.5"):
            return "a penalty that goes on falling behind the longest completion"
        given = {"paid": fields["rewards"]}
        return Ours(spec("grpo", options), given, longest=call["max_response_length"])
    if "m2_threshold" in call:
        # Its moment is of the old policy, not of the one that learns.
        found = spec("m2po", kl=0, moment=call["m2_threshold"])
        return Ours(found, step={"logprobs": fields["old"]})
    return _areal_loss(case)


def _areal_loss(case: Case) -> Ours | str:
    call, fields, given = case["call"], fields_of(case), {}
    values = {"kl": 0}
    if call["function"] == "sapo_loss_fn":
        values |= {"surrogate": "soft_gate"}
        values |= {"tau_positive": call["tau_pos"], "tau_negative": call["tau_neg"]}
    else:
        values |= {"low": call["eps_clip"], "high": call.get("eps_clip_higher", call["eps_clip"])}
        values |= {"dual_clip": call.get("c_clip")}
    if call.get("importance_sampling_level") == "sequence":
        values |= {"ratio": "sequence"}
        mask = fields["mask"]
        given["advantages"] = (fields["advantages"] * mask).sum(1) / mask.sum(1)
    if not call.get("rejection_sampling"):
        return Ours(spec("grpo", values, TOKENS), given)
    rules = {"metric": "ratio", "level": "token", "agg": "mean", "action": "mask"}
    rules |= call["rejection_sampling"]
    low, high, metric = rules.get("lower"), rules["upper"], rules["metric"]
    of_ratio, of_tokens = metric == "ratio", rules["level"] == "token"
    level = "token" if of_tokens or not of_ratio else "geometric"
    options = {"correction": f"{level}_truncate", "correction_high": NO_BOUND}
    if rules["action"] == "clamp":
        if not of_tokens and rules["agg"] != "mean":
            return "a geometric mean that is truncated where another statistic is out of bounds"
        options |= {"correction_low": low, "correction_high": high}
        return Ours(spec("grpo", values, TOKENS, options), given)
    kind = "k1" if of_ratio else metric.removeprefix("kl_")
    over = "token" if of_tokens else f"sequence_{rules['agg']}"
    options |= {"rejection": f"{over}_{kind}", "rejection_high": high}
    if kind == "k1":
        bound = high if of_ratio else float(np.exp(high))
        options |= {"rejection_low": low or 0.0, "rejection_high": bound}
    step = {}
    if kind == "k3":
        # Its k3 is of the sampler over the trainer, ours upside down.
        given |= {"correction": np.exp(fields["old"] - fields["sampler"])}
        options |= {"correction": None, "correction_high": None}
        step = {"old": fields["sampler"], "sampler": fields["old"]}
    return Ours(spec("grpo", values, TOKENS, options), given, step=step)


def prime_rl(case: Case) -> Ours | str:
    """Returns a case of prime-rl, whose old policy is the sampler's."""
    call, fields = case["call"], fields_of(case)
    if case["kind"] == "advantage":
        if call["length_penalty"]:
            return "a length penalty by the group's mean reward: a reward, not a column"
        over_mean = call["function"].startswith("MaxRL")
        return Ours(spec("maxrl" if over_mean else "dr_grpo"))
    name = call["function"].removeprefix("compute_loss with ")
    given = {"old": fields["sampler"]}
    if name == "ce_loss_fn":
        found = spec("grpo", TOKENS, kl=0, surrogate="log_likelihood")
        return Ours(found, {"advantages": np.ones(len(fields["mask"]))})
    shared = {"kl": 0, "surrogate": "total_variation", "as_ratio": True, "most": NO_BOUND}
    if name == "ref_kl_loss_fn":
        given |= {"advantages": fields["reference"] - fields["logprobs"]}
        options = {"low": 0.2, "high": NO_BOUND, "sides": "both", "log_square": 1e-3}
        return Ours(spec("grpo", TOKENS, shared, options), given)
    given |= {"advantages": call["adv_tau"] * fields["advantages"]}
    options = {"log_square": call["kl_tau"]}
    if name == "ipo_loss_fn":
        options |= {"low": call["ipo_threshold"], "high": call["ipo_threshold"], "sides": "both"}
    else:
        options |= {"low": call["dppo_mask_low"], "high": call["dppo_mask_high"]}
    return Ours(spec("grpo", TOKENS, shared, options), given, weight=tokens(case))
