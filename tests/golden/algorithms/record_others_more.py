"""Losses, advantages and masks of SkyRL, GMPO, GTPO, Dr. GRPO and NeMo RL."""

import enum
import gc
import itertools
import logging
import math
import os
import time
import types

import numpy as np
import torch
from common import INPUTS, Cases, field, leaf, whole
from library import double_names, load


def text(options):
    """Options as a short text for a case's name."""
    return ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def skyrl(path, commit):
    """SkyRL: losses under each reduction, corrections, divergences, advantages."""
    table = Cases("skyrl", commit)
    base = f"{path}/skyrl/backends/skyrl_train/utils"
    tools = load(f"{base}/torch_utils.py", ["masked_mean", "safe_exp_delta"])
    beside = {"masked_mean": tools.masked_mean, "safe_exp_delta": tools.safe_exp_delta}
    correction = load(f"{base}/off_policy_correction_utils.py", [
        "off_policy_correction_enabled", "compute_tis_ratio", "compute_outlier_token_mask",
        "compute_token_mask", "compute_sequence_mask", "compute_off_policy_correction",
        "apply_off_policy_correction"], **beside)
    taken = load(f"{base}/ppo_utils.py", [
        "ppo_policy_loss", "sapo_policy_loss", "gspo_policy_loss", "compute_policy_loss_cispo",
        "rollout_is_policy_loss", "dppo_policy_loss", "compute_policy_loss_kl_cov", "masked_var",
        "masked_whiten", "importance_sampling_loss", "cross_entropy_loss", "reduce_loss",
        "apply_loss_reduction_to_advantages_minibatch", "compute_approx_kl", "ppo_critic_loss",
        "compute_maxrl_advantage", "compute_rloo_outcome_advantage",
        "compute_grpo_outcome_advantage", "compute_gae_advantage_return",
        "compute_reinforce_plus_plus_outcome_advantage"],
        apply_off_policy_correction=correction.apply_off_policy_correction, **beside)
    losses = {"regular": ("ppo_policy_loss", {}), "dual_clip": ("ppo_policy_loss",
                                                                {"clip_ratio_c": 1.2}),
              "sapo": ("sapo_policy_loss", {"tau_pos": 1.0, "tau_neg": 1.05}),
              "gspo": ("gspo_policy_loss", {"eps_clip_low": 3e-4, "eps_clip_high": 4e-4}),
              "cispo": ("compute_policy_loss_cispo", {"cispo_eps_clip_low": 0.2,
                                                      "cispo_eps_clip_high": 0.28}),
              "rollout_is": ("rollout_is_policy_loss", {}),
              "dppo": ("dppo_policy_loss", {"dppo_type": "binary_tv", "delta_low": 0.2,
                                            "delta_high": 0.2}),
              "kl_cov": ("compute_policy_loss_kl_cov", {"kl_cov_frac": 0.2, "ppo_kl_coef": 1.0}),
              "importance_sampling": ("importance_sampling_loss", {}),
              "cross_entropy": ("cross_entropy_loss", {})}
    runs = [(kind, "mixed", "sequence_mean", {}, {}) for kind in losses]
    runs += [("regular", "mixed", reduction, {}, {}) for reduction in [
        "token_mean", "token_mean_legacy", "seq_mean_token_sum_norm", "prompt_mean"]]
    runs += [(kind, "holes", "token_mean", {}, {}) for kind in ["regular", "gspo", "dppo"]]
    runs += [("dppo", "mixed", "token_mean", {"dppo_type": "binary_kl", "delta_low": 0.05,
                                              "delta_high": 0.02}, {}),
             ("cispo", "mixed", "token_mean", {"cispo_anchor": "rollout"}, {})]
    runs += [("regular", "mixed", "token_mean", {}, rule) for rule in [
        {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.5},
        {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 2.0},
        {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.15},
        {"sequence_mask_metric": "product", "product_mask_low": 0.5, "product_mask_high": 2.0},
        {"outlier_token_is_threshold_low": 0.5, "outlier_token_is_threshold_high": 2.2},
        {"token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 1.5},
        {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.5, "sequence_mask_metric":
         "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.15}]]
    for kind, inputs, reduction, changed, rule in runs:
        name, options = losses[kind]
        options = {"eps_clip_low": 0.2, "eps_clip_high": 0.28, **options, **changed}
        wrt, mask = leaf(inputs), field(inputs, "mask")
        advantages = taken.apply_loss_reduction_to_advantages_minibatch(
            field(inputs, "advantages"), mask, reduction, 4, 16, [(0, 4), (4, 8)])
        part = types.SimpleNamespace(**{"cispo_anchor": "old", "dppo_type": None, **options})
        empty = dict.fromkeys([
            "tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
            "outlier_token_is_threshold_high", "token_mask_is_threshold_low",
            "token_mask_is_threshold_high"])
        config = types.SimpleNamespace(
            policy_loss_type=kind, loss_reduction="sequence_mean", sapo=part, cispo=part,
            dppo=part, kl_cov=part, **options, off_policy_correction=types.SimpleNamespace(
                **{**empty, **rule}))
        sampled = rule or kind in ("rollout_is",) or changed.get("cispo_anchor") == "rollout"
        rollout = field(inputs, "sampler_logprobs") if sampled else None
        with double_names():
            loss, _ = getattr(taken, name)(wrt, field(inputs, "old_logprobs"), advantages, config,
                                           mask, rollout)
        call = {"function": name, "policy_loss_type": kind, **options, "off_policy_correction":
                rule, "rollout_logprobs": "sampler_logprobs" if sampled else None,
                "advantages": "apply_loss_reduction_to_advantages_minibatch", "loss_reduction":
                reduction, "micro_batch_size": 4, "max_seq_len": 16,
                "prompt_boundaries": [[0, 4], [4, 8]]}
        table.loss(f"skyrl/{kind}/{inputs}/{reduction}/{text({**changed, **rule})}", call, inputs,
                   loss, wrt)
    for kind in ["k1", "abs", "k2", "k3"]:
        wrt = leaf("far")
        values = taken.compute_approx_kl(wrt, field("far", "reference_logprobs"),
                                         field("far", "mask"), kind)
        table.divergence(f"skyrl/compute_approx_kl/far/{kind}", {
            "function": "compute_approx_kl", "kl_estimator_type": kind}, "far", values, wrt)
    for clip in [None, 0.2]:
        wrt = leaf("holes", "values")
        loss, _ = taken.ppo_critic_loss(wrt, field("holes", "old_values"), field(
            "holes", "returns"), types.SimpleNamespace(value_clip=clip), field("holes", "mask"))
        table.loss(f"skyrl/ppo_critic_loss/holes/value_clip={clip}", {
            "function": "ppo_critic_loss", "value_clip": clip}, "holes", loss, wrt, kind="value",
            of="values")
    skyrl_advantages(table, taken)
    return table


def skyrl_advantages(table, taken):
    """Advantages of SkyRL, where they differ from verl's or verl has none."""
    runs = [("compute_maxrl_advantage", "ragged", {}), ("compute_maxrl_advantage", "mixed", {}),
            ("compute_rloo_outcome_advantage", "ragged", {}),
            ("compute_grpo_outcome_advantage", "ragged", {}),
            ("compute_grpo_outcome_advantage", "ragged", {"grpo_norm_by_std": False})]
    runs += [("compute_gae_advantage_return", name, {"gamma": 0.9, "lambd": 0.8})
             for name in ["three", "holes"]]
    runs += [("compute_reinforce_plus_plus_outcome_advantage", name, {"gamma": 0.9})
             for name in ["mixed", "holes"]]
    quiet = logging.getLogger("skyrl")
    quiet.disabled = True
    import loguru

    loguru.logger.disable("taken")
    for name, inputs, options in runs:
        rewards = "token_rewards" if "gamma" in options else "final_rewards"
        mask = field(inputs, "mask")
        given = {"values": field(inputs, "values")} if "lambd" in options else {}
        found, returns = getattr(taken, name)(
            token_level_rewards=field(inputs, rewards), response_mask=mask,
            index=np.array(INPUTS[inputs]["groups"]), **given, **options)
        table.add(f"skyrl/{name}/{inputs}/{text(options)}", "advantage", {
            "function": name, "token_level_rewards": rewards, **options}, inputs,
            advantages=found, returns=returns)


class Rows:
    """A stand-in for the learner of oat: scores are looked up by row."""

    def __init__(self, inputs, options, aggregator):
        self.args = types.SimpleNamespace(**{
            "reward_scale": 1.0, "train_batch_size_per_device": 1, "temperature": 1.0,
            "num_ppo_epochs": 1, "reinforce_update": False, "num_samples": 4, "beta": 0.0,
            "kl_penalty_coef": 0.0, "critic_type": "drgrpo", "tis_c": None, "cliprange": 0.2,
            "critic_type_modify": "none", **options})
        self.inputs, self.wrt, self.losses = inputs, leaf(inputs), []
        self.ref_model = "reference" if self.args.beta > 0 else None
        self.optimizer = self.scheduler = None
        self.masked_aggregator = aggregator
        self.model = lambda ids, attention_mask: {"logits": torch.zeros(*ids.shape, 2)}
        self.strategy = types.SimpleNamespace(
            backward=lambda loss, *_: self.losses.append(loss), grad_acc_step=1,
            get_gradient_norm=lambda model: 0.0, optimizer_step=lambda *_: None)

    def get_completion_mask(self, attention, prompt_lengths):
        """One token of prompt, then the mask."""
        mask = field(self.inputs, "mask").bool()
        return torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1)

    def rows(self, key, ids):
        """The log-probabilities of the rows whose number stands in the ids."""
        if not torch.is_grad_enabled():
            key = field(self.inputs, key)
        else:
            key = self.wrt
        return key[ids[:, 0]][:, :ids.shape[1] - 1]

    def learn(self, module, name="old_logprobs"):
        """The mean of the losses of the step's minibatches."""
        mask = whole(self.inputs, "mask")
        count, width = mask.shape
        number = torch.arange(count).unsqueeze(1).repeat(1, width + 1)
        lengths = torch.ones(count, 1, dtype=torch.long)
        rewards = [[reward] for reward in INPUTS[self.inputs]["rewards"]]
        sampler = field(self.inputs, "sampler_logprobs")
        module.learning_step(self, {
            "input_ids": number, "attention_mask": torch.cat([lengths, torch.ones_like(mask)], 1),
            "rewards": rewards, "prompt_ids_lens": [1] * count, "loss_masks": [1.0] * count,
            "action_logprobs": [row[kept.bool()].tolist() for row, kept in zip(sampler, mask)]})
        return torch.stack([loss.reshape(()) for loss in self.losses]).mean()


def ordered():
    """numpy without the shuffle."""
    return types.SimpleNamespace(random=types.SimpleNamespace(permutation=np.arange))


def gmpo(path, commit):
    """The authors' GMPO: geometric means, one sequence a minibatch."""
    table = Cases("gmpo", commit)
    torch.cuda.current_device = lambda: "cpu"
    for inputs, (kind, clip) in itertools.product(["mixed", "holes"], [
            ("gmpo", 0.4), ("gmpo", 0.1), ("gmpo_noclip", 0.0), ("gmpo_seqclip", 0.1),
            ("gmpo_without_norm", 0.4)]):
        taken = load(f"{path}/train_zero_math_gmpo.py", [
            "learning_step", "compute_monte_carlo_advantages"], np=ordered(), gc=gc, time=time,
            logging=logging, entropy_from_logits=lambda scores: scores[..., 0],
            masked_mean=lambda values, mask, axis=None: values.sum())
        stub = Rows(inputs, {"critic_type_modify": kind, "cliprange": clip}, None)
        stub.compute_monte_carlo_advantages = types.MethodType(
            taken.compute_monte_carlo_advantages, stub)
        stub.get_batch_logps = lambda scores, ids, mask: stub.rows("old_logprobs", ids)
        loss = stub.learn(taken)
        table.loss(f"gmpo/{kind}/{inputs}/cliprange={clip}", {
            "function": "learning_step", "critic_type": "drgrpo", "critic_type_modify": kind,
            "cliprange": clip, "advantages": "rewards less the mean of four",
            "reduced": "mean over minibatches of one sequence"}, inputs, loss, stub.wrt)
    return table


def r1_zero(path, commit):
    """Dr. GRPO: the step of oat's learner with the authors' advantages and sums."""
    table = Cases("r1_zero", commit, oat=os.environ.get("OAT_COMMIT", ""))
    torch.cuda.current_device = lambda: "cpu"
    oat = os.environ["OAT_PATH"]
    tools = load(f"{oat}/oat/utils/ops.py", ["masked_sum", "masked_mean"])
    taken = load(f"{oat}/oat/algorithms/ppo.py", ["learning_step"], np=ordered(), gc=gc,
                 time=time, logging=logging, masked_mean=tools.masked_mean,
                 masked_sum=tools.masked_sum)
    scores = load(f"{path}/train_zero_math.py", ["compute_monte_carlo_advantages"])
    runs = [{}, {"critic_type": "grpo"}, {"critic_type": "grpo", "beta": 0.04}, {"beta": 0.04},
            {"tis_c": 1.5}, {"train_batch_size_per_device": 4}]
    for inputs, options in itertools.product(["mixed", "holes"], runs):
        if options.get("critic_type") == "grpo":
            aggregator = tools.masked_mean
        else:
            aggregator = lambda values, mask, axis: tools.masked_sum(values, mask, axis, 16)
        stub = Rows(inputs, options, aggregator)
        stub.compute_monte_carlo_advantages = types.MethodType(
            scores.compute_monte_carlo_advantages, stub)

        def logps(model, input_ids, **_):
            key = "reference_logprobs" if model == "reference" else "old_logprobs"
            found = stub.rows(key, input_ids)
            return found, torch.zeros_like(found)

        stub.get_batch_logps = logps
        loss = stub.learn(taken)
        given = {"critic_type": "drgrpo", "cliprange": 0.2, "train_batch_size_per_device": 1,
                 "generate_max_length": 16, **options}
        table.loss(f"r1_zero/learning_step/{inputs}/{text(options)}", {
            "function": "learning_step", **given, "action_logprobs": "sampler_logprobs",
            "advantages": "compute_monte_carlo_advantages of rewards in groups of four",
            "reduced": "mean over minibatches"}, inputs, loss, stub.wrt)
    for inputs, kind in itertools.product(["mixed"], ["drgrpo", "grpo"]):
        stub = types.SimpleNamespace(args=types.SimpleNamespace(num_samples=4, critic_type=kind))
        found = scores.compute_monte_carlo_advantages(stub, field(inputs, "final_rewards"), None)
        table.add(f"r1_zero/advantages/{inputs}/{kind}", "advantage", {
            "function": "compute_monte_carlo_advantages", "critic_type": kind, "rewards":
            "final_rewards", "num_samples": 4}, inputs, advantages=found)
    return table


def gtpo(path, commit):
    """GTPO: weights of conflicting tokens, and the loss through its own autograd function."""
    table = Cases("gtpo", commit)
    taken = load(f"{path}/gtpo/gtpo_training.py", [
        "ENT_THRESHOLD", "ENT_SCALE", "W_RAW", "EPS", "build_conflict_mask", "gtpo_compute_loss",
        "compute_completion_stats", "UnslothEfficientGTPO"], PAD_ID=0,
        wandb=types.SimpleNamespace(run=None))
    tokens, mask = whole("conflicts", "tokens"), whole("conflicts", "mask")
    signs = whole("conflicts", "signs")
    for name, rows in [("first", slice(0, 3)), ("second", slice(3, 6)), ("both", slice(0, 6))]:
        with double_names():
            weights, conflict, count = taken.build_conflict_mask(
                tokens[rows], mask[rows], signs[rows] > 0, signs[rows] < 0, 10)
        table.add(f"gtpo/build_conflict_mask/conflicts/{name}", "mask", {
            "function": "build_conflict_mask", "rows": list(range(6))[rows], "PAD_ID": 0,
            "W_RAW": 2.0}, "conflicts", weights=weights, mask=conflict, counts=count)
    for name, rows in [("first", slice(0, 3)), ("second", slice(3, 6)), ("both", slice(0, 6))]:
        scores = leaf("conflicts", "logits")
        advantages = field("conflicts", "sequence_advantages")[rows]
        group = scores[rows]
        padded = torch.cat([group, torch.zeros_like(group[:, :1])], dim=1).unsqueeze(0)
        with double_names():
            loss, tokens_seen, _ = taken.UnslothEfficientGTPO.apply(
                padded, padded.detach(), torch.eye(10), tokens[rows].unsqueeze(0),
                mask[rows].unsqueeze(0), advantages, field("conflicts", "rewards")[rows], 0.0,
                None, 1)
        whole_gradient, = torch.autograd.grad(loss.sum(), scores)
        chosen = tokens.unsqueeze(-1)
        probability = scores.detach().softmax(-1).gather(-1, chosen)
        gradient = (whole_gradient.gather(-1, chosen) / (1 - probability)).squeeze(-1)
        entropy = torch.stack([taken.compute_completion_stats(one, one, ids, kept)[0] for
                               one, ids, kept in zip(scores.detach(), tokens, mask)])
        table.add(f"gtpo/UnslothEfficientGTPO/conflicts/{name}", "loss", {
            "function": "UnslothEfficientGTPO.forward", "rows": list(range(6))[rows],
            "advantages": "sequence_advantages", "beta": 0.0, "ENT_THRESHOLD": 0.7,
            "ENT_SCALE": 0.1, "W_RAW": 2.0}, "conflicts", loss=loss.sum(), gradient=gradient,
            entropies=entropy[rows], logprobs=scores.detach().log_softmax(-1).gather(
                -1, chosen).squeeze(-1))
    return table


def nemo_rl(path, commit):
    """NeMo RL: its clipped loss with divergences and corrections, and its advantages."""
    import pydantic

    table = Cases("nemo_rl", commit)
    base = f"{path}/nemo_rl/algorithms"
    tools = load(f"{base}/utils.py", ["calculate_kl", "masked_mean", "masked_var",
                                      "calculate_baseline_and_std_per_prompt",
                                      "get_gdpo_reward_component_keys"])
    kinds = load(f"{base}/loss/interfaces.py", ["LossType", "MetricNormalizer", "LossInputType"],
                 enum=enum)
    beside = {"BaseModel": pydantic.BaseModel, "calculate_kl": tools.calculate_kl,
              "masked_mean": tools.masked_mean, "LossFunction": object,
              "LossType": kinds.LossType, "MetricNormalizer": kinds.MetricNormalizer,
              "LossInputType": kinds.LossInputType}
    taken = load(f"{base}/loss/loss_functions.py", ["ClippedPGLossConfig", "ClippedPGLossFn"],
                 **beside)
    bounds = {"ratio_clip_min": 0.2, "ratio_clip_max": 0.28, "reference_policy_kl_penalty": 0.0}
    corrected = {**bounds, "use_importance_sampling_correction": True}
    runs = [("mixed", {**bounds, "token_level_loss": level}) for level in [True, False]]
    runs += [("holes", bounds), ("spans", {**bounds, "ratio_clip_c": 1.2}),
             ("mixed", {**bounds, "ratio_clip_c": 2.0}), ("mixed", {**bounds, "use_cispo": True}),
             ("mixed", {**bounds, "disable_ppo_ratio": True}),
             ("mixed", {**bounds, "force_on_policy_ratio": True}),
             ("mixed", {**bounds, "positive_example_nll_weight": 0.1})]
    gspo = {**corrected, "token_level_loss": False, "sequence_level_importance_ratios": True,
            "ratio_clip_min": 3e-4, "ratio_clip_max": 4e-4}
    runs += [("mixed", gspo), ("holes", {**gspo, "use_importance_sampling_correction": False})]
    runs += [("mixed", {**bounds, "reference_policy_kl_penalty": 0.1, "reference_policy_kl_type":
                        kind, "use_on_policy_kl_approximation": approximate})
             for kind in ["k1", "k2", "k3"] for approximate in [False, True]]
    runs += [("far", {**bounds, "reference_policy_kl_penalty": 0.1})]
    runs += [("mixed", corrected)]
    runs += [("mixed", {**corrected, "truncated_importance_sampling_type": kind,
                        "truncated_importance_sampling_ratio": high,
                        "truncated_importance_sampling_ratio_min": low})
             for kind, low, high in [("tis", None, 1.5), ("tis", 0.8, 1.5), ("icepop", 0.5, 1.5),
                                     ("seq-mask-tis", 0.9, 1.15)]]
    for inputs, options in runs:
        wrt, mask = leaf(inputs), field(inputs, "mask")
        front = torch.zeros(len(mask), 1)
        data = {name: torch.cat([front, field(inputs, key)], dim=1) for name, key in [
            ("token_mask", "mask"), ("advantages", "advantages"), ("prev_logprobs",
                                                                   "old_logprobs"),
            ("generation_logprobs", "sampler_logprobs"),
            ("reference_policy_logprobs", "reference_logprobs")]}
        data["sample_mask"] = torch.ones(len(mask))
        if inputs == "mixed":
            data["rewards"] = field(inputs, "rewards")
        loss, _ = taken.ClippedPGLossFn(taken.ClippedPGLossConfig(**options))(
            wrt, data, torch.tensor(float(len(mask))), mask.sum())
        table.loss(f"nemo_rl/ClippedPGLossFn/{inputs}/{text(options)}", {
            "function": "ClippedPGLossFn", **options, "prev_logprobs": "old_logprobs",
            "generation_logprobs": "sampler_logprobs"}, inputs, loss, wrt)
    nemo_advantages(table, base, tools)
    return table


def nemo_advantages(table, base, tools):
    """Advantages of NeMo RL, over groups of equal and unequal sizes."""
    taken = load(f"{base}/advantage_estimator.py", [
        "GRPOAdvantageEstimator", "ReinforcePlusPlusAdvantageEstimator",
        "GDPOAdvantageEstimator"], **{
            name: getattr(tools, name) for name in [
                "calculate_kl", "masked_mean", "masked_var",
                "calculate_baseline_and_std_per_prompt", "get_gdpo_reward_component_keys"]})
    loss = types.SimpleNamespace(use_kl_in_reward=True, reference_policy_kl_penalty=0.1,
                                 reference_policy_kl_type="k3")
    runs = [("GRPOAdvantageEstimator", name, {"use_leave_one_out_baseline": out,
                                              "normalize_rewards": scaled})
            for name in ["mixed", "ragged"] for out in [True, False] for scaled in [True, False]]
    runs += [("ReinforcePlusPlusAdvantageEstimator", name, {"minus_baseline": minus})
             for name in ["mixed", "ragged"] for minus in [True, False]]
    runs += [("GDPOAdvantageEstimator", "mixed", {
        "use_leave_one_out_baseline": out, "normalize_rewards": True, "reward_weights": weights})
        for out in [True, False] for weights in [None, [1.0, 0.5, 2.0]]]
    for name, inputs, options in runs:
        mask = field(inputs, "mask")
        estimator = getattr(taken, name)(types.SimpleNamespace(**options), loss)
        given = {}
        if "GDPO" in name:
            given["repeated_batch"] = dict(zip(["reward/1", "reward/2", "reward/3"],
                                               field(inputs, "named_rewards")))
        else:
            given["logprobs_policy"] = field(inputs, "old_logprobs")
            given["logprobs_reference"] = field(inputs, "reference_logprobs")
        found = estimator.compute_advantage(whole(inputs, "groups").unsqueeze(1), field(
            inputs, "rewards"), mask, **given)
        rows = found * mask
        if not math.isfinite(float(rows.abs().sum())):
            rows = rows.nan_to_num(0.0)
        call = {"function": name, **options, "rewards": "rewards"}
        if "Plus" in name:
            call.update(use_kl_in_reward=True, reference_policy_kl_penalty=0.1, logprobs_policy=
                        "old_logprobs", logprobs_reference="reference_logprobs")
        if "GDPO" in name:
            call["rewards"] = "named_rewards"
        table.add(f"nemo_rl/{name}/{inputs}/{text(options)}", "advantage", call, inputs,
                  advantages=rows)
