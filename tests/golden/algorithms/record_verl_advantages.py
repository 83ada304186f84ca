"""Advantages of verl, and rewards less a divergence."""

import itertools
import types

import numpy as np
import torch
from common import INPUTS, field
from library import double_names

OUTCOME = [
    "grpo",
    "grpo_vectorized",
    "rloo",
    "rloo_vectorized",
    "opo",
    "reinforce_plus_plus_baseline",
    "gpg",
]


def estimator(table, name, inputs, rewards, tag="", arguments=None, **options):
    """One advantage estimator on the rewards of tokens named."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    kwargs = {
        "token_level_rewards": field(inputs, rewards),
        "response_mask": field(inputs, "mask"),
        **options,
        **(arguments or {}),
    }
    if name not in ("gae", "remax", "reinforce_plus_plus"):
        kwargs["index"] = np.array(INPUTS[inputs]["groups"])
    with double_names():
        advantages, returns = get_adv_estimator_fn(name)(**kwargs)
    shown = {
        key: value if isinstance(value, (int, float, bool, str)) else dict(vars(value))
        for key, value in options.items()
    }
    call = {
        "function": "get_adv_estimator_fn",
        "name": name,
        "token_level_rewards": rewards,
        **shown,
        **{key: f"field {key}" for key in arguments or {}},
    }
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
        estimator(
            table,
            "grpo_passk",
            inputs,
            "final_rewards",
            f"std={scaled}",
            config=Settings(norm_adv_by_std_in_grpo=scaled),
        )
    for inputs, rewards, gamma in itertools.product(
        ["mixed", "holes", "ragged"], ["final_rewards", "token_rewards"], [1.0, 0.9]
    ):
        estimator(
            table,
            "reinforce_plus_plus",
            inputs,
            rewards,
            f"gamma={gamma}",
            config=Settings(gamma=gamma),
        )
    estimator(
        table,
        "reinforce_plus_plus",
        "four",
        "final_rewards",
        "gamma=1.0",
        config=Settings(gamma=1.0),
    )
    for inputs, rewards in itertools.product(
        ["mixed", "holes", "ragged"], ["final_rewards", "token_rewards"]
    ):
        estimator(
            table,
            "remax",
            inputs,
            rewards,
            arguments={"reward_baselines": field(inputs, "baselines")},
        )
    for inputs, rewards, (gamma, lam) in itertools.product(
        ["three", "mixed", "holes", "ragged"],
        ["final_rewards", "token_rewards"],
        [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)],
    ):
        if inputs in ("ragged", "three", "holes") and (gamma == 0.99):
            continue
        estimator(
            table,
            "gae",
            inputs,
            rewards,
            f"gamma={gamma},lam={lam}",
            arguments={"values": field(inputs, "values")},
            gamma=gamma,
            lam=lam,
        )
    for name, inputs, rewards, tail, weighted in itertools.product(
        ["optimal_token_baseline", "tir_optimal_token_baseline"],
        ["mixed", "holes", "ragged"],
        ["final_rewards", "token_rewards"],
        [True, False],
        [True, False],
    ):
        if weighted and (rewards == "final_rewards" or not tail):
            continue
        given = {
            "old_log_probs": field(inputs, "old_logprobs"),
            "sum_pi_squared": field(inputs, "sum_pi_squared"),
        }
        if weighted:
            given["rollout_is_weights"] = field(inputs, "weights")
        estimator(
            table,
            name,
            inputs,
            rewards,
            f"tail={tail},weighted={weighted}",
            given,
            handle_zero_tail=tail,
        )
    several(table)
    penalised(table)
    controlled(table)


def several(table):
    """Several named rewards, each normalised alone, then weighted and whitened."""
    from verl.trainer.ppo import core_algos

    inputs = "mixed"
    mask = field(inputs, "mask")
    names = ["first", "second", "third"]
    batch = {
        "prompts": torch.zeros(8, 2),
        "attention_mask": torch.cat([torch.ones(8, 2), mask], dim=1).long(),
    }
    single, np.float32 = np.float32, np.float64
    for weights, scaled in itertools.product([None, [1.0, 0.5, 2.0]], [True, False]):
        config = Settings(gdpo_reward_keys=names, gdpo_reward_weights=weights)
        with double_names():
            found, _ = core_algos.get_adv_estimator_fn("gdpo")(
                field(inputs, "final_rewards"),
                mask,
                np.array(INPUTS[inputs]["groups"]),
                norm_adv_by_std_in_grpo=scaled,
                config=config,
                batch=batch,
                non_tensor_batch=dict(zip(names, INPUTS[inputs]["named_rewards"], strict=True)),
            )
        call = {
            "function": "get_adv_estimator_fn",
            "name": "gdpo",
            "rewards": "named_rewards",
            "gdpo_reward_weights": weights,
            "norm_adv_by_std_in_grpo": scaled,
        }
        table.add(
            f"verl/gdpo/mixed/weights={weights},std={scaled}",
            "advantage",
            call,
            inputs,
            advantages=found,
        )
    np.float32 = single
    estimator(table, "gdpo", "ragged", "final_rewards")


def controlled(table):
    """The coefficient of the divergence over steps, as the adaptive controller sets it."""
    from verl.trainer.ppo.core_algos import AdaptiveKLController

    seen = [0.02, 0.3, 0.1, 0.11, 0.05, 0.0]
    controller = AdaptiveKLController(0.2, 0.1, 1000)
    values = []
    for current in seen:
        controller.update(current, 64)
        values.append(controller.value)
    table.add(
        "verl/AdaptiveKLController",
        "controller",
        {
            "function": "AdaptiveKLController",
            "init_kl_coef": 0.2,
            "target_kl": 0.1,
            "horizon": 1000,
            "n_steps": 64,
            "current_kl": seen,
        },
        None,
        values=values,
    )


def penalised(table):
    """Rewards of tokens less a divergence, and advantages of those."""
    from verl.protocol import DataProto
    from verl.trainer.ppo.core_algos import FixedKLController, get_adv_estimator_fn
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty

    for inputs, kind, beta in itertools.product(
        ["mixed", "holes", "ragged"], ["kl", "abs", "mse", "low_var_kl"], [0.1]
    ):
        mask = field(inputs, "mask")
        data = DataProto.from_dict(
            tensors={
                "response_mask": mask,
                "token_level_scores": field(inputs, "final_rewards"),
                "old_log_probs": field(inputs, "old_logprobs"),
                "ref_log_prob": field(inputs, "reference_logprobs"),
            }
        )
        data, metrics = apply_kl_penalty(data, FixedKLController(beta), kind)
        rewards = data.batch["token_level_rewards"]
        found, _ = get_adv_estimator_fn("reinforce_plus_plus")(
            rewards, mask, config=Settings(gamma=1.0)
        )
        call = {
            "function": "apply_kl_penalty",
            "kl_penalty": kind,
            "kl_coef": beta,
            "token_level_scores": "final_rewards",
            "ref_log_prob": "reference_logprobs",
            "then": "reinforce_plus_plus",
            "gamma": 1.0,
        }
        table.add(
            f"verl/apply_kl_penalty/{inputs}/{kind},beta={beta}",
            "advantage",
            call,
            inputs,
            rewards=rewards * mask,
            advantages=found,
            metrics={"current_kl": metrics["actor/reward_kl_penalty"]},
        )
