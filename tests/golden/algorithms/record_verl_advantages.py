"""Advantages, rewards with a divergence, importance weights and masks of verl."""

import itertools
import types

import numpy as np
import torch
from common import INPUTS, Cases, field, leaf
from record_verl import BOUNDS, actor_config

OUTCOME = ["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo",
           "reinforce_plus_plus_baseline", "gpg"]
REJECTIONS = {
    "token_k1": ["1.3", "0.6_1.6"], "token_k2": ["0.02", "0.2"], "token_k3": ["0.02", "0.2"],
    "seq_sum_k1": ["1.5", "0.5_2.0"], "seq_sum_k2": ["0.1", "0.4"], "seq_sum_k3": ["0.1", "0.4"],
    "seq_mean_k1": ["1.05", "0.9_1.2"], "seq_mean_k2": ["0.02", "0.06"],
    "seq_mean_k3": ["0.02", "0.06"], "seq_max_k2": ["0.1", "0.25"], "seq_max_k3": ["0.1", "0.25"],
}
WEIGHT_METRICS = ["rollout_is_mean", "rollout_is_std", "rollout_is_max", "rollout_is_min",
                  "rollout_is_ratio_fraction_high", "rollout_is_ratio_fraction_low",
                  "rollout_is_eff_sample_size", "rollout_is_oob_ratio",
                  "rollout_is_batch_norm_factor"]


class Padded(dict):
    """A batch that is padded already, for functions that unpack one first."""

    def select(self, *names):
        """The same batch: unused fields do no harm."""
        return self

    def to_padded_tensor(self):
        """The same batch."""
        return self


def whole_losses(table):
    """The sum of policy loss, entropy bonus and divergence that the actor minimises."""
    from verl.workers.utils import losses

    losses.no_padding_2_padding = lambda values, data: values
    runs = [{"entropy_coeff": 0.01}, {"entropy_coeff": 0.3, "loss_agg_mode": "seq-mean-token-mean"}]
    runs += [{"use_kl_loss": True, "kl_loss_coef": coefficient, "kl_loss_type": kind}
             for coefficient, kind in [(0.001, "low_var_kl"), (0.04, "k3"), (0.04, "k3+"),
                                       (0.1, "k1"), (0.1, "k2"), (0.1, "abs"), (0.1, "k1+")]]
    runs += [{"use_kl_loss": True, "kl_loss_coef": 0.05, "kl_loss_type": "k2",
              "entropy_coeff": 0.02, "loss_agg_mode": mode, "loss_scale_factor": scale}
             for mode, scale in [("seq-mean-token-sum", None), ("seq-mean-token-sum-norm", 16),
                                 ("seq-mean-token-mean", None)]]
    for options, inputs in itertools.product(runs, ["mixed", "holes"]):
        if inputs == "holes" and "loss_agg_mode" not in options:
            continue
        wrt, entropy = leaf(inputs), leaf(inputs, "entropies")
        data = Padded(dp_size=1, batch_num_tokens=None, global_batch_size=None,
                      response_mask=field(inputs, "mask"),
                      old_log_probs=field(inputs, "old_logprobs"),
                      advantages=field(inputs, "advantages"),
                      ref_log_prob=field(inputs, "reference_logprobs"))
        bonus = "entropy_coeff" in options
        output = {"log_probs": wrt, "entropy": entropy if bonus else None}
        loss, _ = losses.ppo_loss(actor_config({**BOUNDS, **options}), output, data)
        grads = torch.autograd.grad(loss, [wrt, entropy], allow_unused=True, retain_graph=True)
        call = {"function": "ppo_loss", "config": {**BOUNDS, **options},
                "ref_log_prob": "reference_logprobs", "entropy": "entropies" if bonus else None}
        tag = ",".join(f"{key}={value}" for key, value in options.items())
        more = {"entropy_gradient": grads[1]} if bonus else {}
        table.loss(f"verl/ppo_loss/{inputs}/{tag}", call, inputs, loss, wrt, **more)


def estimator(table, name, inputs, rewards, tag="", arguments=None, **options):
    """One advantage estimator on the rewards of tokens named."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    kwargs = {"token_level_rewards": field(inputs, rewards),
              "response_mask": field(inputs, "mask"), **options, **(arguments or {})}
    if name not in ("gae", "remax", "reinforce_plus_plus"):
        kwargs["index"] = np.array(INPUTS[inputs]["groups"])
    advantages, returns = get_adv_estimator_fn(name)(**kwargs)
    shown = {key: value if isinstance(value, (int, float, bool, str)) else dict(vars(value))
             for key, value in options.items()}
    call = {"function": "get_adv_estimator_fn", "name": name, "token_level_rewards": rewards,
            **shown, **{key: f"field {key}" for key in arguments or {}}}
    title = "/".join(part for part in ["verl", name, inputs, rewards, tag] if part)
    more = {"returns": returns} if name in ("gae", "reinforce_plus_plus") else {}
    table.add(title, "advantage", call, inputs, advantages=advantages, **more)


class Settings(types.SimpleNamespace):
    """Settings that are read both as attributes and with get."""

    def get(self, key, default=None):
        """One setting."""
        return getattr(self, key, default)


def advantages(table):
    """Every registered estimator with its options."""
    for name, inputs in itertools.product(OUTCOME, ["mixed", "ragged", "holes", "four"]):
        estimator(table, name, inputs, "final_rewards")
    for name, inputs in itertools.product(["grpo", "grpo_vectorized"], ["mixed", "ragged"]):
        estimator(table, name, inputs, "final_rewards", "no std", norm_adv_by_std_in_grpo=False)
        estimator(table, name, inputs, "final_rewards", "epsilon=1e-4", epsilon=1e-4)
    estimator(table, "gpg", "ragged", "final_rewards", "f_norm=2", f_norm=2.0)
    for inputs, scaled in itertools.product(["mixed", "four"], [True, False]):
        estimator(table, "grpo_passk", inputs, "final_rewards", f"std={scaled}",
                  config=Settings(norm_adv_by_std_in_grpo=scaled))
    for inputs, rewards, gamma in itertools.product(
            ["mixed", "holes", "ragged"], ["final_rewards", "token_rewards"], [1.0, 0.9]):
        estimator(table, "reinforce_plus_plus", inputs, rewards, f"gamma={gamma}",
                  config=Settings(gamma=gamma))
    estimator(table, "reinforce_plus_plus", "four", "final_rewards", "gamma=1.0",
              config=Settings(gamma=1.0))
    for inputs, rewards in itertools.product(["mixed", "holes", "ragged"],
                                             ["final_rewards", "token_rewards"]):
        estimator(table, "remax", inputs, rewards,
                  arguments={"reward_baselines": field(inputs, "baselines")})
    for inputs, rewards, (gamma, lam) in itertools.product(
            ["three", "mixed", "holes", "ragged"], ["final_rewards", "token_rewards"],
            [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)]):
        if inputs in ("ragged", "three", "holes") and (gamma == 0.99):
            continue
        estimator(table, "gae", inputs, rewards, f"gamma={gamma},lam={lam}",
                  arguments={"values": field(inputs, "values")}, gamma=gamma, lam=lam)
    for name, inputs, rewards, tail, weighted in itertools.product(
            ["optimal_token_baseline", "tir_optimal_token_baseline"], ["mixed", "holes", "ragged"],
            ["final_rewards", "token_rewards"], [True, False], [True, False]):
        if weighted and (rewards == "final_rewards" or not tail):
            continue
        given = {"old_log_probs": field(inputs, "old_logprobs"),
                 "sum_pi_squared": field(inputs, "sum_pi_squared")}
        if weighted:
            given["rollout_is_weights"] = field(inputs, "weights")
        estimator(table, name, inputs, rewards, f"tail={tail},weighted={weighted}", given,
                  handle_zero_tail=tail)
    several(table)
    penalised(table)


def several(table):
    """Several named rewards, each normalised alone, then weighted and whitened."""
    from verl.trainer.ppo import core_algos

    inputs = "mixed"
    mask = field(inputs, "mask")
    names = ["first", "second", "third"]
    batch = {"prompts": torch.zeros(8, 2), "attention_mask":
             torch.cat([torch.ones(8, 2), mask], dim=1).long()}
    singles = torch.float32, np.float32
    torch.float32, np.float32 = torch.float64, np.float64
    for weights, scaled in itertools.product([None, [1.0, 0.5, 2.0]], [True, False]):
        config = Settings(gdpo_reward_keys=names, gdpo_reward_weights=weights)
        found, _ = core_algos.get_adv_estimator_fn("gdpo")(
            field(inputs, "final_rewards"), mask, np.array(INPUTS[inputs]["groups"]),
            norm_adv_by_std_in_grpo=scaled, config=config, batch=batch,
            non_tensor_batch=dict(zip(names, INPUTS[inputs]["named_rewards"])))
        call = {"function": "get_adv_estimator_fn", "name": "gdpo", "rewards": "named_rewards",
                "gdpo_reward_weights": weights, "norm_adv_by_std_in_grpo": scaled}
        table.add(f"verl/gdpo/mixed/weights={weights},std={scaled}", "advantage", call, inputs,
                  advantages=found)
    torch.float32, np.float32 = singles
    estimator(table, "gdpo", "ragged", "final_rewards")


def penalised(table):
    """Rewards of tokens less a divergence, and advantages of those."""
    from verl.protocol import DataProto
    from verl.trainer.ppo.core_algos import FixedKLController, get_adv_estimator_fn
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty

    for inputs, kind, beta in itertools.product(["mixed", "holes", "ragged"],
                                                ["kl", "abs", "mse", "low_var_kl"], [0.1]):
        mask = field(inputs, "mask")
        data = DataProto.from_dict(tensors={
            "response_mask": mask, "token_level_scores": field(inputs, "final_rewards"),
            "old_log_probs": field(inputs, "old_logprobs"),
            "ref_log_prob": field(inputs, "reference_logprobs")})
        data, metrics = apply_kl_penalty(data, FixedKLController(beta), kind)
        rewards = data.batch["token_level_rewards"]
        found, _ = get_adv_estimator_fn("reinforce_plus_plus")(
            rewards, mask, config=Settings(gamma=1.0))
        call = {"function": "apply_kl_penalty", "kl_penalty": kind, "kl_coef": beta,
                "token_level_scores": "final_rewards", "ref_log_prob": "reference_logprobs",
                "then": "reinforce_plus_plus", "gamma": 1.0}
        table.add(f"verl/apply_kl_penalty/{inputs}/{kind},beta={beta}", "advantage", call, inputs,
                  rewards=rewards * mask, advantages=found,
                  metrics={"current_kl": metrics["actor/reward_kl_penalty"]})


def corrections(table: Cases):
    """Importance weights, rejection masks and the measures of the gap."""
    from verl.trainer.ppo import rollout_corr_helper as helper

    source = {"log_ratio": "old_logprobs - sampler_logprobs"}
    for inputs, level, bound, normal in itertools.product(
            ["three", "mixed", "holes"], ["token", "sequence"],
            [1.2, 2.0, 5.0, "0.5_1.5", "0.8_5.0"], [False, True]):
        if normal and inputs == "three":
            continue
        ratio = field(inputs, "old_logprobs") - field(inputs, "sampler_logprobs")
        weights, metrics = helper.compute_rollout_correction_weights(
            ratio, field(inputs, "mask"), level, bound, normal)
        call = {"function": "compute_rollout_correction_weights", **source, "rollout_is": level,
                "rollout_is_threshold": bound, "rollout_is_batch_normalize": normal}
        table.add(f"verl/weights/{inputs}/{level},threshold={bound},normalize={normal}", "weight",
                  call, inputs, weights=weights,
                  metrics={key: metrics[key] for key in WEIGHT_METRICS if key in metrics})
    for level in ["token", "sequence"]:
        ratio = field("three", "logprobs") - field("three", "old_logprobs")
        weights, _ = helper.compute_rollout_correction_weights(
            ratio, field("three", "mask"), level, 1.2)
        call = {"function": "compute_rollout_correction_weights", "rollout_is": level,
                "log_ratio": "logprobs - old_logprobs", "rollout_is_threshold": 1.2}
        table.add(f"verl/weights/three/{level},of the policy", "weight", call, "three",
                  weights=weights)
    runs = [(mode, bound) for mode, bounds in REJECTIONS.items() for bound in bounds]
    runs += [("token_k1,seq_mean_k3", "0.6_1.6,0.06"), ("seq_max_k2,token_k3", "0.25,0.02")]
    for inputs, (mode, bound) in itertools.product(["mixed", "holes"], runs):
        ratio = field(inputs, "old_logprobs") - field(inputs, "sampler_logprobs")
        mask, metrics = helper.compute_rollout_rejection_mask(
            ratio, field(inputs, "mask"), mode, bound)
        call = {"function": "compute_rollout_rejection_mask", **source, "rollout_rs": mode,
                "rollout_rs_threshold": bound}
        shares = {key: value for key, value in metrics.items() if "masked_fraction" in key}
        table.add(f"verl/rejection/{inputs}/{mode},threshold={bound}", "mask", call, inputs,
                  mask=mask, metrics=shares)
    for inputs in ["three", "mixed", "holes"]:
        metrics = helper.compute_offpolicy_metrics(
            field(inputs, "old_logprobs"), field(inputs, "sampler_logprobs"),
            field(inputs, "mask"))
        table.add(f"verl/compute_offpolicy_metrics/{inputs}", "metric", {
            "function": "compute_offpolicy_metrics", "old_log_prob": "old_logprobs",
            "rollout_log_prob": "sampler_logprobs"}, inputs, metrics=metrics)
