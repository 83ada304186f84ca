"""Losses of TRL's trainers that keep all but the loss, and its masks alone."""

import itertools

from common import field
from record_trl import grpo


def experimental(table):
    """The trainers that keep all but the loss."""
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
    from trl.experimental.gspo_token.grpo_trainer import GRPOTrainer

    for inputs, (low, high), beta in itertools.product(
        ["three", "mixed", "holes"], [(0.4, 0.4), (0.1, 0.6)], [0.0, 0.04]
    ):
        grpo(
            table,
            inputs,
            {"epsilon": low, "epsilon_high": high, "beta": beta},
            method=GMPOTrainer._compute_loss,
            name="trl.experimental.gmpo",
        )
    grpo(
        table,
        "mixed",
        {"epsilon": 0.4, "epsilon_high": 0.4, "top_entropy_quantile": 0.5},
        method=GMPOTrainer._compute_loss,
        name="trl.experimental.gmpo",
    )
    for kind, inputs in itertools.product(
        ["grpo", "bnpo", "dr_grpo", "dapo"], ["mixed", "spans", "three"]
    ):
        grpo(
            table,
            inputs,
            {
                "loss_type": kind,
                "importance_sampling_level": "sequence_token",
                "epsilon": 3e-4,
                "epsilon_high": 4e-4,
            },
            method=GRPOTrainer._compute_loss,
            name="trl.experimental.gspo_token",
        )
    for options in [{"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.04}, {"delta": 1.2}]:
        grpo(
            table,
            "mixed",
            {"loss_type": "dapo", "importance_sampling_level": "sequence_token", **options},
            method=GRPOTrainer._compute_loss,
            name="trl.experimental.gspo_token",
        )


def masks(table):
    """The off-policy mask and the sequence weights alone."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    for inputs, threshold in itertools.product(["three", "mixed", "holes"], [0.02, 0.1, 0.5]):
        advantages = field(inputs, "sequence_advantages").unsqueeze(1)
        kept = GRPOTrainer.get_off_policy_mask(
            advantages,
            field(inputs, "logprobs"),
            field(inputs, "sampler_logprobs"),
            field(inputs, "mask"),
            threshold,
        )
        table.add(
            f"trl/get_off_policy_mask/{inputs}/{threshold}",
            "mask",
            {
                "function": "GRPOTrainer.get_off_policy_mask",
                "off_policy_threshold": threshold,
                "sampling_per_token_logps": "sampler_logprobs",
            },
            inputs,
            mask=kept,
        )
        ratio = field(inputs, "logprobs") - field(inputs, "old_logprobs")
        if threshold == 0.1:
            weights = GRPOTrainer.get_gamma_weights(advantages, ratio, field(inputs, "mask"), None)
            table.add(
                f"trl/get_gamma_weights/{inputs}",
                "weight",
                {"function": "GRPOTrainer.get_gamma_weights", "importance_sampling_ratio": None},
                inputs,
                weights=weights,
            )
