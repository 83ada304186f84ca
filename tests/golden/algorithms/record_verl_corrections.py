"""Importance weights and masks of verl, and the whole loss of its actor."""

import itertools

import torch
from common import Cases, field, leaf
from record_verl import BOUNDS, actor_config

REJECTIONS = {
    "token_k1": ["1.3", "0.6_1.6"],
    "token_k2": ["0.02", "0.2"],
    "token_k3": ["0.02", "0.2"],
    "seq_sum_k1": ["1.5", "0.5_2.0"],
    "seq_sum_k2": ["0.1", "0.4"],
    "seq_sum_k3": ["0.1", "0.4"],
    "seq_mean_k1": ["1.05", "0.9_1.2"],
    "seq_mean_k2": ["0.02", "0.06"],
    "seq_mean_k3": ["0.02", "0.06"],
    "seq_max_k2": ["0.1", "0.25"],
    "seq_max_k3": ["0.1", "0.25"],
}
WEIGHT_METRICS = [
    "rollout_is_mean",
    "rollout_is_std",
    "rollout_is_max",
    "rollout_is_min",
    "rollout_is_ratio_fraction_high",
    "rollout_is_ratio_fraction_low",
    "rollout_is_eff_sample_size",
    "rollout_is_oob_ratio",
    "rollout_is_batch_norm_factor",
]


class Padded(dict):
    """A batch that is padded already, for functions that unpack one first."""

    def select(self, *names):
        """The same batch: unused fields do no harm."""
        return self

    def to_padded_tensor(self):
        """The same batch."""
        return self


def bypass(table):
    """The mode in which the sampler's log-probabilities stand for the old ones."""
    runs = [{"loss_type": "ppo_clip"}, {"loss_type": "reinforce", "rollout_is": None}]
    runs += [
        {
            "loss_type": "reinforce",
            "rollout_is": level,
            "rollout_is_threshold": bound,
            "rollout_is_batch_normalize": normal,
        }
        for level in ["token", "sequence"]
        for bound in [1.5, 2.0, "0.5_1.5"]
        for normal in [False, True]
        if not (normal and bound == 1.5)
    ]
    runs += [
        {"loss_type": kind, "rollout_is": None, "rollout_rs": mode, "rollout_rs_threshold": bound}
        for kind in ["ppo_clip", "reinforce"]
        for mode, bound in [
            ("token_k1", "0.6_1.6"),
            ("seq_mean_k1", "0.8_1.2"),
            ("seq_max_k3", "0.3"),
            ("seq_sum_k1", "0.5_2.0"),
        ]
    ]
    runs.append(
        {
            "loss_type": "reinforce",
            "rollout_is": "token",
            "rollout_is_threshold": 2.0,
            "rollout_rs": "seq_mean_k3,token_k1",
            "rollout_rs_threshold": "0.2,0.5_2.0",
        }
    )
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import PolicyLossConfig

    for options, mode in itertools.product(runs, ["token-mean", "seq-mean-token-mean"]):
        if mode != "token-mean" and "rollout_rs" not in options:
            continue
        wrt = leaf("mixed")
        correction = RolloutCorrectionConfig(bypass_mode=True, **options)
        config = actor_config(
            {
                **BOUNDS,
                "policy_loss": PolicyLossConfig(
                    loss_mode="bypass_mode", rollout_correction=correction
                ),
            }
        )
        loss, _metrics = get_policy_loss_fn("bypass_mode")(
            old_log_prob=field("mixed", "sampler_logprobs"),
            log_prob=wrt,
            advantages=field("mixed", "advantages"),
            response_mask=field("mixed", "mask"),
            loss_agg_mode=mode,
            config=config,
        )
        call = {
            "function": "get_policy_loss_fn",
            "name": "bypass_mode",
            "loss_agg_mode": mode,
            "old_log_prob": "sampler_logprobs",
            "config": BOUNDS,
            "rollout_correction": options,
        }
        tag = ",".join(f"{key.replace('rollout_', '')}={value}" for key, value in options.items())
        table.loss(f"verl/bypass_mode/mixed/{mode}/{tag}", call, "mixed", loss, wrt)


def whole_losses(table):
    """The sum of policy loss, entropy bonus and divergence that the actor minimises."""
    from verl.workers.utils import losses

    losses.no_padding_2_padding = lambda values, data: values
    runs = [{"entropy_coeff": 0.01}, {"entropy_coeff": 0.3, "loss_agg_mode": "seq-mean-token-mean"}]
    runs += [
        {"use_kl_loss": True, "kl_loss_coef": coefficient, "kl_loss_type": kind}
        for coefficient, kind in [
            (0.001, "low_var_kl"),
            (0.04, "k3"),
            (0.04, "k3+"),
            (0.1, "k1"),
            (0.1, "k2"),
            (0.1, "abs"),
            (0.1, "k1+"),
        ]
    ]
    runs += [
        {
            "use_kl_loss": True,
            "kl_loss_coef": 0.05,
            "kl_loss_type": "k2",
            "entropy_coeff": 0.02,
            "loss_agg_mode": mode,
            "loss_scale_factor": scale,
        }
        for mode, scale in [
            ("seq-mean-token-sum", None),
            ("seq-mean-token-sum-norm", 16),
            ("seq-mean-token-mean", None),
        ]
    ]
    for options, inputs in itertools.product(runs, ["mixed", "holes"]):
        if inputs == "holes" and "loss_agg_mode" not in options:
            continue
        wrt, entropy = leaf(inputs), leaf(inputs, "entropies")
        data = Padded(
            dp_size=1,
            batch_num_tokens=None,
            global_batch_size=None,
            response_mask=field(inputs, "mask"),
            old_log_probs=field(inputs, "old_logprobs"),
            advantages=field(inputs, "advantages"),
            ref_log_prob=field(inputs, "reference_logprobs"),
        )
        bonus = "entropy_coeff" in options
        output = {"log_probs": wrt, "entropy": entropy if bonus else None}
        loss, _ = losses.ppo_loss(actor_config({**BOUNDS, **options}), output, data)
        grads = torch.autograd.grad(loss, [wrt, entropy], allow_unused=True, retain_graph=True)
        call = {
            "function": "ppo_loss",
            "config": {**BOUNDS, **options},
            "ref_log_prob": "reference_logprobs",
            "entropy": "entropies" if bonus else None,
        }
        tag = ",".join(f"{key}={value}" for key, value in options.items())
        more = {"entropy_gradient": grads[1]} if bonus else {}
        table.loss(f"verl/ppo_loss/{inputs}/{tag}", call, inputs, loss, wrt, **more)


def corrections(table: Cases):
    """Importance weights, rejection masks and the measures of the gap."""
    from verl.trainer.ppo import rollout_corr_helper as helper

    source = {"log_ratio": "old_logprobs - sampler_logprobs"}
    for inputs, level, bound, normal in itertools.product(
        ["three", "mixed", "holes"],
        ["token", "sequence"],
        [1.2, 2.0, 5.0, "0.5_1.5", "0.8_5.0"],
        [False, True],
    ):
        if normal and inputs == "three":
            continue
        ratio = field(inputs, "old_logprobs") - field(inputs, "sampler_logprobs")
        weights, metrics = helper.compute_rollout_correction_weights(
            ratio, field(inputs, "mask"), level, bound, normal
        )
        call = {
            "function": "compute_rollout_correction_weights",
            **source,
            "rollout_is": level,
            "rollout_is_threshold": bound,
            "rollout_is_batch_normalize": normal,
        }
        table.add(
            f"verl/weights/{inputs}/{level},threshold={bound},normalize={normal}",
            "weight",
            call,
            inputs,
            weights=weights,
            metrics={key: metrics[key] for key in WEIGHT_METRICS if key in metrics},
        )
    for level in ["token", "sequence"]:
        ratio = field("three", "logprobs") - field("three", "old_logprobs")
        weights, _ = helper.compute_rollout_correction_weights(
            ratio, field("three", "mask"), level, 1.2
        )
        call = {
            "function": "compute_rollout_correction_weights",
            "rollout_is": level,
            "log_ratio": "logprobs - old_logprobs",
            "rollout_is_threshold": 1.2,
        }
        table.add(
            f"verl/weights/three/{level},of the policy", "weight", call, "three", weights=weights
        )
    runs = [(mode, bound) for mode, bounds in REJECTIONS.items() for bound in bounds]
    runs += [("token_k1,seq_mean_k3", "0.6_1.6,0.06"), ("seq_max_k2,token_k3", "0.25,0.02")]
    for inputs, (mode, bound) in itertools.product(["mixed", "holes"], runs):
        ratio = field(inputs, "old_logprobs") - field(inputs, "sampler_logprobs")
        mask, metrics = helper.compute_rollout_rejection_mask(
            ratio, field(inputs, "mask"), mode, bound
        )
        call = {
            "function": "compute_rollout_rejection_mask",
            **source,
            "rollout_rs": mode,
            "rollout_rs_threshold": bound,
        }
        shares = {key: value for key, value in metrics.items() if "masked_fraction" in key}
        table.add(
            f"verl/rejection/{inputs}/{mode},threshold={bound}",
            "mask",
            call,
            inputs,
            mask=mask,
            metrics=shares,
        )
    for inputs in ["three", "mixed", "holes"]:
        metrics = helper.compute_offpolicy_metrics(
            field(inputs, "old_logprobs"), field(inputs, "sampler_logprobs"), field(inputs, "mask")
        )
        table.add(
            f"verl/compute_offpolicy_metrics/{inputs}",
            "metric",
            {
                "function": "compute_offpolicy_metrics",
                "old_log_prob": "old_logprobs",
                "rollout_log_prob": "sampler_logprobs",
            },
            inputs,
            metrics=metrics,
        )
