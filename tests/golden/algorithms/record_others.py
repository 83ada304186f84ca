"""Losses, divergences, advantages and masks of OpenRLHF, slime, prime-rl and AReaL."""

import asyncio
import itertools
import logging
import types

import torch
from common import INPUTS, Cases, field, leaf, whole
from library import double_names, load
from record_others_more import gmpo, gtpo, nemo_rl, r1_zero, skyrl

__all__ = ["openrlhf", "slime", "prime_rl", "areal", "skyrl", "gmpo", "gtpo", "r1_zero", "nemo_rl"]


def text(options):
    """Options as a short text for a case's name."""
    return ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def openrlhf(path, commit):
    """OpenRLHF: policy, value and pair losses, divergences, advantages."""
    table = Cases("openrlhf", commit)
    utils = load(f"{path}/openrlhf/models/utils.py",
                 ["compute_approx_kl", "masked_mean", "compute_reward"])
    models = load(f"{path}/openrlhf/models/loss.py",
                  ["aggregate_loss", "PolicyLoss", "ValueLoss", "DPOLoss"],
                  masked_mean=utils.masked_mean)
    bounds = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    runs = [("mixed", {**bounds, "token_level_loss": level}, {}) for level in [True, False]]
    runs += [("holes", {**bounds, "token_level_loss": True}, {}), ("three", bounds, {}),
             ("spans", {**bounds, "dual_clip": 1.2}, {}), ("far", bounds, {})]
    runs += [("mixed", {**bounds, "dual_clip": c}, {}) for c in [1.05, 2.0]]
    runs += [(name, {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "policy_loss_type": "gspo"}, {})
             for name in ["three", "mixed", "holes"]]
    runs += [("mixed", {**bounds, "enable_vllm_is_correction": True,
                        "vllm_is_truncated_threshold": limits, "vllm_is_correction_type": kind,
                        "token_level_loss": level}, {})
             for kind, limits in [("tis", [0.5, 1.5]), ("tis", [0.0, 2.0]), ("icepop", [0.5, 1.5]),
                                  ("seq-mask-tis", [0.9, 1.15])] for level in [True, False]]
    runs.append(("mixed", {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "policy_loss_type": "gspo",
                           "enable_vllm_is_correction": True,
                           "vllm_is_truncated_threshold": [0.5, 1.5]}, {}))
    runs += [("mixed", {**bounds, "token_level_loss": level},
              {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16})
             for level in [True, False]]
    for inputs, options, batch in runs:
        wrt = leaf(inputs)
        found = models.PolicyLoss(**options)(
            wrt, field(inputs, "old_logprobs"), field(inputs, "advantages"),
            field(inputs, "mask"), field(inputs, "sampler_logprobs"), **batch)
        table.loss(f"openrlhf/PolicyLoss/{inputs}/{text({**options, **batch})}", {
            "function": "PolicyLoss", **options, **batch, "rollout_log_probs":
            "sampler_logprobs"}, inputs, found[0], wrt, metrics={"clip_ratio": found[1],
                                                                 "ppo_kl": found[2]})
    for inputs, bound, level in itertools.product(["mixed", "holes"], [None, 0.2], [True, False]):
        wrt = leaf(inputs, "values")
        loss = models.ValueLoss(bound, level)(wrt, field(inputs, "old_values"),
                                              field(inputs, "returns"), field(inputs, "mask"))
        table.loss(f"openrlhf/ValueLoss/{inputs}/clip_eps={bound},token_level_loss={level}", {
            "function": "ValueLoss", "clip_eps": bound, "token_level_loss": level}, inputs, loss,
            wrt, kind="value", of="values")
    for inputs, kind in itertools.product(["three", "far"], ["k1", "k2", "k3"]):
        wrt = leaf(inputs)
        values = utils.compute_approx_kl(wrt, field(inputs, "reference_logprobs"), kind)
        table.divergence(f"openrlhf/compute_approx_kl/{inputs}/{kind}", {
            "function": "compute_approx_kl", "kl_estimator": kind}, inputs, values, wrt,
            field(inputs, "mask"))
    for options in [{}, {"label_smoothing": 0.1}, {"ipo": True}]:
        chosen, rejected = (leaf("pairs", f"{name}_logps") for name in ("chosen", "rejected"))
        loss, _, _ = models.DPOLoss(beta=0.1, **options)(
            chosen, rejected, field("pairs", "reference_chosen_logps"),
            field("pairs", "reference_rejected_logps"))
        first, second = torch.autograd.grad(loss, [chosen, rejected])
        table.add(f"openrlhf/DPOLoss/pairs/{text(options)}", "pair", {
            "function": "DPOLoss", "beta": 0.1, **options}, "pairs", loss=loss,
            gradient_chosen=first, gradient_rejected=second)
    openrlhf_advantages(table, path, utils)
    return table


def openrlhf_advantages(table, path, utils):
    """The advantages of OpenRLHF, with and without a divergence in the reward."""
    maker = load(f"{path}/openrlhf/trainer/ppo_utils/experience_maker.py",
                 ["compute_advantages_and_returns", "get_advantages_and_returns",
                  "get_cumulative_returns"], itertools=itertools,
                 compute_reward=utils.compute_reward, logger=logging.getLogger("openrlhf"),
                 apply_length_penalties=lambda experiences, args: None)
    kinds = ["gae", "reinforce", "rloo", "reinforce_baseline", "group_norm", "dr_grpo"]
    for kind, inputs, beta, gamma in itertools.product(kinds, ["mixed", "holes"], [0.0, 0.1],
                                                       [1.0, 0.9]):
        if (gamma != 1.0 and kind not in ("gae", "reinforce")) or (inputs == "holes" and beta):
            continue
        options = types.SimpleNamespace(estimator=kind, gamma=gamma, lambd=0.95, no_std_norm=False)
        stub = types.SimpleNamespace(
            strategy=types.SimpleNamespace(args=types.SimpleNamespace(
                algo=types.SimpleNamespace(advantage=options),
                rollout=types.SimpleNamespace(n_samples_per_prompt=4),
                reward=types.SimpleNamespace(clip_range=None))),
            advantage_estimator=kind, kl_ctl=types.SimpleNamespace(value=beta))
        for name in ("get_advantages_and_returns", "get_cumulative_returns"):
            setattr(stub, name, types.MethodType(getattr(maker, name), stub))
        mask = field(inputs, "mask")
        gap = field(inputs, "old_logprobs") - field(inputs, "reference_logprobs")
        one = types.SimpleNamespace(
            index=list(range(len(mask))), rewards=field(inputs, "rewards"), kl=gap * mask,
            action_mask=mask, values=field(inputs, "values"), info={})
        one, = maker.compute_advantages_and_returns(stub, [one])
        table.add(f"openrlhf/{kind}/{inputs}/kl_coef={beta},gamma={gamma}", "advantage", {
            "function": "compute_advantages_and_returns", "estimator": kind, "gamma": gamma,
            "lambd": 0.95, "kl_coef": beta, "kl": "(old_logprobs - reference_logprobs) * mask",
            "rewards": "rewards, at the last token of the mask", "n_samples_per_prompt": 4},
            inputs, advantages=one.advantages, returns=one.returns)


def slime(path, commit):
    """slime: divergences, masks, clipped losses, GAE, log-probabilities over kept words."""
    table = Cases("slime", commit)
    names = ["compute_approx_kl", "compute_opsm_mask", "compute_gspo_kl", "compute_policy_loss",
             "compute_cispo_loss", "vanilla_gae", "chunked_discounted_returns", "chunked_gae",
             "calculate_log_probs_and_entropy", "_calculate_log_probs_and_entropy_chunk",
             "_VocabParallelLogProbEntropy", "_get_vocab_parallel_rank_size", "_maybe_all_reduce"]
    taken = load(f"{path}/slime/utils/ppo_utils.py", names, dist=torch.distributed)
    for inputs, kind, weighted in itertools.product(["three", "mixed", "far"],
                                                    ["k1", "k2", "k3", "low_var_kl"],
                                                    [False, True]):
        if inputs == "far" and kind in ("k1", "k2"):
            continue
        wrt, mask = leaf(inputs), field(inputs, "mask")
        ratio = (wrt - field(inputs, "old_logprobs")).exp() if weighted else None
        values = taken.compute_approx_kl(wrt, field(inputs, "reference_logprobs"), kind, ratio)
        table.divergence(f"slime/compute_approx_kl/{inputs}/{kind},unbiased={weighted}", {
            "function": "compute_approx_kl", "kl_loss_type": kind,
            "importance_ratio": "exp(logprobs - old_logprobs)" if weighted else None}, inputs,
            values, wrt, mask)
    for inputs, delta in itertools.product(["mixed", "holes", "spans"], [0.02, 0.2]):
        rows = [list(field(inputs, key)) for key in ("logprobs", "old_logprobs", "advantages",
                                                     "mask")]
        kept, share = taken.compute_opsm_mask(types.SimpleNamespace(opsm_delta=delta), *rows)
        table.add(f"slime/compute_opsm_mask/{inputs}/{delta}", "mask", {
            "function": "compute_opsm_mask", "opsm_delta": delta}, inputs,
            mask=kept.view(field(inputs, "mask").shape), metrics={"opsm_clipfrac": share})
    slime_losses(table, taken)
    for inputs, (gamma, lam) in itertools.product(["mixed", "three"], [(1.0, 0.95), (0.9, 0.8)]):
        mask = field(inputs, "mask")
        given = field(inputs, "token_rewards") * mask, field(inputs, "values") * mask
        for name in ["vanilla_gae", "chunked_gae"]:
            found, returns = getattr(taken, name)(*given, gamma, lam)
            table.add(f"slime/{name}/{inputs}/gamma={gamma},lambd={lam}", "advantage", {
                "function": name, "gamma": gamma, "lambd": lam, "rewards": "token_rewards * mask",
                "values": "values * mask"}, inputs, advantages=found, returns=returns)
    for names, kept in itertools.product([("logits", "tokens", "keep"), (
            "simple_logits", "simple_tokens", "simple_keep")], [True, False]):
        wrt = leaf("logits", names[0])
        flat = wrt.reshape(-1, wrt.shape[-1])
        keep = whole("logits", names[2]).bool().reshape(flat.shape) if kept else None
        logp, entropy = taken.calculate_log_probs_and_entropy(
            flat.clone(), whole("logits", names[1]).reshape(-1), None, True,
            log_prob_keep_mask=keep)
        gradient, = torch.autograd.grad(logp.sum(), wrt, retain_graph=True)
        table.add(f"slime/calculate_log_probs_and_entropy/logits/{names[0]},keep={kept}",
                  "logprob", {"function": "calculate_log_probs_and_entropy", "logits": names[0],
                              "tokens": names[1],
                              "log_prob_keep_mask": names[2] if kept else None},
                  "logits", values=logp.reshape(wrt.shape[:-1]),
                  entropies=entropy.reshape(wrt.shape[:-1]), gradient=gradient,
                  gradient_of=names[0])
    return table


def slime_losses(table, taken):
    """Losses of tokens, kept as their masked mean over tokens, which slime leaves to the caller."""
    runs = [("policy", "mixed", 0.2, 0.28, None), ("policy", "spans", 0.2, 0.28, 1.2),
            ("policy", "mixed", 0.2, 0.28, 2.0), ("gspo", "mixed", 3e-4, 4e-4, None),
            ("gspo", "three", 3e-4, 4e-4, None), ("gspo", "holes", 0.01, 0.1, None),
            ("cispo", "mixed", 0.2, 0.28, None), ("cispo", "mixed", 1.0, 4.0, None),
            ("cispo", "three", 0.2, 0.28, None)]
    for kind, inputs, low, high, c in runs:
        wrt, mask = leaf(inputs), field(inputs, "mask")
        old, advantages = field(inputs, "old_logprobs"), field(inputs, "advantages")
        gap = old - wrt
        if kind == "gspo":
            gap = taken.compute_gspo_kl(list(wrt), list(old), list(wrt),
                                        list(mask)).view(mask.shape)
        if kind == "cispo":
            losses, _ = taken.compute_cispo_loss(gap, wrt, advantages, low, high)
        else:
            losses, _ = taken.compute_policy_loss(gap, advantages, low, high, c)
        loss = (losses * mask).sum() / mask.sum()
        table.loss(f"slime/{kind}/{inputs}/low={low},high={high},c={c}", {
            "function": "compute_cispo_loss" if kind == "cispo" else "compute_policy_loss",
            "ppo_kl": "compute_gspo_kl" if kind == "gspo" else "old_logprobs - logprobs",
            "eps_clip": low, "eps_clip_high": high, "eps_clip_c": c,
            "reduced": "recorder: masked sum / number of tokens"}, inputs, loss, wrt)


def prime_rl(path, commit):
    """prime-rl: its losses over samples, and the scores of a group."""
    table = Cases("prime_rl", commit)
    taken = load(f"{path}/src/prime_rl/trainer/rl/loss.py", [
        "LossInputs", "LossOutputs", "_safe_mean", "compute_importance_ratio_and_mismatch_kl",
        "default_loss_fn", "ipo_loss_fn", "ref_kl_loss_fn", "ce_loss_fn", "compute_loss"])
    default = {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3}
    ipo = {"ipo_threshold": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3}
    runs = [("default_loss_fn", name, default) for name in ["three", "mixed", "holes", "spans"]]
    runs += [("default_loss_fn", "mixed", {**default, **changed}) for changed in [
        {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1}, {"dppo_mask_high": 0.05, "kl_tau": 0.0},
        {"adv_tau": 0.5, "kl_tau": 0.1}]]
    runs += [("ipo_loss_fn", name, ipo) for name in ["three", "mixed", "spans"]]
    runs += [("ref_kl_loss_fn", name, {}) for name in ["three", "mixed"]]
    runs += [("ce_loss_fn", "mixed", {})]
    for name, inputs, options in runs:
        wrt, mask = leaf(inputs), whole(inputs, "mask").bool()
        weights = field(inputs, "mask") if name in ("ref_kl_loss_fn", "ce_loss_fn") else None
        tokens = int(mask.sum())
        config = types.SimpleNamespace(**options)
        empty = None if weights is None else list(torch.zeros_like(wrt))
        loss, _ = taken.compute_loss(
            list(wrt), list(field(inputs, "sampler_logprobs")),
            list(field(inputs, "reference_logprobs")), list(field(inputs, "advantages")),
            list(mask), empty, list(weights) if name == "ce_loss_fn" else None,
            list(weights) if name == "ref_kl_loss_fn" else None,
            lambda given, name=name: getattr(taken, name)(given, config), tokens, tokens, tokens)
        table.loss(f"prime_rl/{name}/{inputs}/{text(options)}", {
            "function": f"compute_loss with {name}", **options, "inference_logprobs":
            "sampler_logprobs", "ref_logprobs": "reference_logprobs",
            "scale": "number of tokens"}, inputs, loss, wrt)
    for kind, file, lengths in [("MaxRLAlgorithm", "max_rl", None), ("GRPOAlgorithm", "grpo", None),
                                ("GRPOAlgorithm", "grpo", (0.1, 0.05, 0.2))]:
        for inputs in ["mixed", "ragged"]:
            found = prime_rl_scores(path, kind, file, lengths, inputs)
            table.add(f"prime_rl/{kind}/{inputs}/length_penalty={lengths}", "advantage", {
                "function": f"{kind}.score_group", "rewards": "rewards", "length_penalty": lengths,
                "num_output_tokens": "mask sum", "num_total_tokens": "mask sum + 5",
                "num_turns": "1 + row modulo 3"}, inputs, advantages=found)
    return table


def prime_rl_scores(path, kind, file, lengths, inputs):
    """The advantage of each sequence, group after group."""
    scores = {}
    taken = load(f"{path}/src/prime_rl/orchestrator/algo/{file}.py", [kind], Algorithm=object,
                 iter_trainable_traces=lambda episodes: [(None, one) for one in episodes],
                 assign_advantages=lambda trace, score: scores.__setitem__(trace.row, score))
    penalty = None if lengths is None else types.SimpleNamespace(
        num_output_tokens_weight=lengths[0], num_input_tokens_weight=lengths[1],
        num_turns_weight=lengths[2])
    stub = types.SimpleNamespace(length_penalty=penalty)
    groups = INPUTS[inputs]["groups"]
    with double_names():
        for group in dict.fromkeys(groups):
            traces = [types.SimpleNamespace(
                row=row, reward=INPUTS[inputs]["rewards"][row], num_turns=1 + row % 3,
                num_output_tokens=sum(INPUTS[inputs]["mask"][row]),
                num_total_tokens=sum(INPUTS[inputs]["mask"][row]) + 5)
                for row, own in enumerate(groups) if own == group]
            asyncio.run(getattr(taken, kind).score_group(stub, traces))
    return [scores[row] for row in range(len(groups))]


def areal(path, commit):
    """AReaL: the decoupled loss with its rejections, SAPO, M2PO's mask, the critic's loss."""
    table = Cases("areal", commit)
    estimator = load(f"{path}/areal/utils/data.py", ["KLEstimator"]).KLEstimator
    config = load(f"{path}/areal/api/cli_args.py", ["RejectionSamplingConfig"])
    taken = load(f"{path}/areal/utils/functional/functional.py", [
        "_compute_sequence_level_ratio_and_advantages", "RejectionSamplingResult",
        "_check_bounds", "apply_rejection_sampling", "ppo_actor_loss_fn", "sapo_loss_fn",
        "_huber_loss", "_mse_loss", "ppo_critic_loss_fn"], KLEstimator=estimator)
    actor = load(f"{path}/areal/trainer/ppo/actor.py", ["_apply_m2po_masking",
                                                        "_get_m2po_loss_mask"])
    runs = [("mixed", options, None) for options in [
        {"eps_clip": 0.2}, {"eps_clip": 0.2, "eps_clip_higher": 0.28}, {"eps_clip": 0.2,
                                                                       "c_clip": 1.05},
        {"eps_clip": 0.2, "c_clip": 2.0}, {"eps_clip": 3e-4, "eps_clip_higher": 4e-4,
                                           "importance_sampling_level": "sequence"}]]
    runs += [("spans", {"eps_clip": 0.2, "importance_sampling_level": level}, None)
             for level in ["token", "sequence"]]
    runs += [("holes", {"eps_clip": 0.2, "eps_clip_higher": 0.28}, None)]
    runs += [("mixed", {"eps_clip": 0.2}, options) for options in [
        {"upper": 5.0}, {"upper": 1.5, "lower": 0.5}, {"upper": 1.5, "lower": 0.5,
                                                       "action": "clamp"},
        *({"level": "sequence", "agg": agg, "upper": 1.2, "lower": 0.9, "action": action}
          for agg in ["mean", "sum", "max"] for action in ["mask", "clamp"]),
        *({"metric": f"kl_{kind}", "upper": 0.1} for kind in ["k1", "k2", "k3"]),
        *({"metric": f"kl_{kind}", "upper": 0.05, "level": "sequence", "agg": agg}
          for kind in ["k1", "k2", "k3"] for agg in ["mean", "sum", "max"])]]
    for inputs, options, rejection in runs:
        wrt = leaf(inputs)
        rules = None if rejection is None else config.RejectionSamplingConfig(**rejection)
        loss, stat = taken.ppo_actor_loss_fn(
            wrt, field(inputs, "old_logprobs"), field(inputs, "sampler_logprobs"),
            field(inputs, "advantages"), loss_mask=whole(inputs, "mask").bool(),
            rejection_sampling=rules, **options)
        more = {} if rejection is None else {"weights": stat["behave_imp_weight"]}
        table.loss(f"areal/ppo_actor_loss_fn/{inputs}/{text({**options, **(rejection or {})})}", {
            "function": "ppo_actor_loss_fn", **options, "proximal_logprobs": "old_logprobs",
            "old_logprobs": "sampler_logprobs", "rejection_sampling": rejection}, inputs, loss,
            wrt, **more)
    for inputs, level in itertools.product(["mixed", "spans"], ["token", "sequence"]):
        wrt = leaf(inputs)
        loss, _ = taken.sapo_loss_fn(wrt, field(inputs, "old_logprobs"),
                                     field(inputs, "advantages"), 1.0, 1.05,
                                     whole(inputs, "mask").bool(), level)
        table.loss(f"areal/sapo_loss_fn/{inputs}/{level}", {
            "function": "sapo_loss_fn", "tau_pos": 1.0, "tau_neg": 1.05,
            "importance_sampling_level": level}, inputs, loss, wrt)
    for inputs, limit in itertools.product(["three", "mixed", "holes"], [0.005, 0.04, 0.5]):
        kept = actor._apply_m2po_masking(field(inputs, "sampler_logprobs"),
                                         field(inputs, "old_logprobs"),
                                         whole(inputs, "mask").bool(), limit)
        table.add(f"areal/m2po/{inputs}/{limit}", "mask", {
            "function": "_apply_m2po_masking", "m2_threshold": limit, "old_logp":
            "sampler_logprobs", "prox_logp": "old_logprobs"}, inputs, mask=kept)
    for inputs, bound, kind in itertools.product(["mixed"], [0.2, 0.5], ["mse", "huber"]):
        wrt = leaf(inputs, "values")
        with double_names():
            loss, _ = taken.ppo_critic_loss_fn(wrt, field(inputs, "old_values"),
                                               field(inputs, "returns"), bound,
                                               whole(inputs, "mask").bool(), kind)
        table.loss(f"areal/ppo_critic_loss_fn/{inputs}/{kind},clip={bound}", {
            "function": "ppo_critic_loss_fn", "value_eps_clip": bound, "loss_fn_type": kind},
            inputs, loss, wrt, kind="value", of="values")
    return table
