"""Advantages and importance weights of TRL, through the trainers' own scoring."""

import functools
import itertools
import math
import types
from collections import defaultdict

import torch
from common import INPUTS, field, leaf
from record_trl import LIMITS, SAMPLER, accelerator


def given(value, *_, **__):
    """The value, whatever else is asked."""
    return value


class Model:
    """A model that only says that it is being trained."""

    training = True
    is_gradient_checkpointing = False


def rewards_of(inputs, names):
    """Rewards [B, M] of the functions named: one of the input's, or the several named ones."""
    rows = [INPUTS[inputs]["rewards"]] if names == "rewards" else INPUTS[inputs]["named_rewards"]
    return torch.tensor(rows).T.clone()


def score(inputs, options, rewards=None, module="grpo", weights=None):
    """What the trainer makes of a batch of completions: advantages and weights."""
    if module == "grpo":
        from trl.trainer.grpo_trainer import GRPOTrainer as Trainer
    else:
        from trl.trainer.rloo_trainer import RLOOTrainer as Trainer
    rewards = rewards_of(inputs, "rewards") if rewards is None else rewards
    given = {
        **SAMPLER,
        "scale_rewards": "group",
        "beta": 0.0,
        "num_generations": 4,
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "reward_clip_range": None,
        **options,
    }
    mask = INPUTS[inputs]["mask"]
    lengths = [max(place for place, kept in enumerate(row) if kept) + 1 for row in mask]
    numbers = [[1] * length for length in lengths]
    tools = [row[:length] for row, length in zip(mask, lengths, strict=True)]
    sampler = [
        row[:length]
        for row, length in zip(INPUTS[inputs]["sampler_logprobs"], lengths, strict=True)
    ]
    prompts = [[2]] * len(mask)
    functions = range(rewards.shape[1])
    logps = iter([field(inputs, "old_logprobs"), field(inputs, "reference_logprobs")])
    generated = (prompts, numbers, tools, ["text"] * len(mask), sampler, None, None, None)
    if module == "rloo":
        generated = (prompts, numbers, ["text"] * len(mask))
    stub = types.SimpleNamespace(
        **{key: given[key] for key in given},
        accelerator=accelerator(),
        model=Model(),
        ref_model=Model(),
        environment_factories=None,
        environments=None,
        tools=None,
        _generate=lambda prompts: generated,
        _tokenizer=types.SimpleNamespace(pad_token_id=0, eos_token_id=9),
        pad_to_multiple_of=None,
        processing_class=types.SimpleNamespace(batch_decode=lambda ids, **_: ["text"] * len(ids)),
        mask_truncated_completions=False,
        num_iterations=2,
        _is_vlm=False,
        args=types.SimpleNamespace(
            per_device_train_batch_size=8,
            steps_per_generation=2,
            gradient_accumulation_steps=3,
            gradient_checkpointing_kwargs=None,
        ),
        use_vllm=given["vllm_importance_sampling_mode"] is not None,
        vllm_importance_sampling_correction=True,
        reward_funcs=list(functions),
        reward_func_names=[str(number) for number in functions],
        reward_weights=torch.ones(len(functions)) if weights is None else torch.tensor(weights),
        _get_per_token_logps_and_entropies=lambda *_, **__: (next(logps), None, None),
        _calculate_rewards=lambda *_: rewards,
        log_multimodal=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
    )
    return Trainer._generate_and_score_completions(stub, [{"prompt": "text"} for _ in mask])


def grpo_advantages(table):
    """Scaling, aggregation and weights of several rewards; rewards that are missing."""
    runs = [("mixed", "rewards", None)] + [
        ("mixed", "named_rewards", weights) for weights in [None, [1.0, 0.5, 2.0]]
    ]
    for (inputs, names, weights), scaling, many in itertools.product(
        runs, ["group", "batch", "none"], ["sum_then_normalize", "normalize_then_sum"]
    ):
        if many == "normalize_then_sum" and scaling != "group":
            continue
        options = {"scale_rewards": scaling, "multi_objective_aggregation": many}
        found = score(inputs, options, rewards_of(inputs, names), weights=weights)
        table.add(
            f"trl/advantages/{inputs}/{names},{scaling},{many},weights={weights}",
            "advantage",
            {
                "function": "GRPOTrainer._generate_and_score_completions",
                **options,
                "rewards": names,
                "reward_weights": weights,
                "num_generations": 4,
            },
            inputs,
            advantages=found["advantages"],
        )
    missing = rewards_of("mixed", "named_rewards")
    holes = [(1, 0), (1, 1), (1, 2), (5, 1), (2, 0)]
    for row, column in holes:
        missing[row, column] = math.nan
    for options in [
        {"scale_rewards": "group"},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ]:
        found = score("mixed", options, missing.clone())
        text = ",".join(f"{key}={value}" for key, value in options.items())
        table.add(
            f"trl/advantages/mixed/missing,{text}",
            "advantage",
            {
                "function": "GRPOTrainer._generate_and_score_completions",
                **options,
                "rewards": "named_rewards",
                "num_generations": 4,
                "missing": holes,
            },
            "mixed",
            advantages=found["advantages"],
        )
    for count in [2, 8, 1]:
        found = score("mixed", {"num_generations": count})
        table.add(
            f"trl/advantages/mixed/num_generations={count}",
            "advantage",
            {
                "function": "GRPOTrainer._generate_and_score_completions",
                "scale_rewards": "group",
                "rewards": "rewards",
                "num_generations": count,
            },
            "mixed",
            advantages=found["advantages"],
        )


def sampler_weights(table):
    """The weights between sampler and trainer in every mode."""
    for inputs, mode, (low, high) in itertools.product(
        ["three", "mixed", "holes"],
        ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        [(None, 3.0), (None, 1.2), (0.5, 1.5), (0.8, None)],
    ):
        if inputs == "holes" and low is None:
            continue
        options = {
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_min": low,
            "vllm_importance_sampling_clip_max": high,
        }
        found = score(inputs, {**options, "num_generations": len(INPUTS[inputs]["mask"])})
        table.add(
            f"trl/importance_sampling_ratio/{inputs}/{mode},min={low},max={high}",
            "weight",
            {
                "function": "GRPOTrainer._generate_and_score_completions",
                **options,
                "old": "old_logprobs",
                "sampling_per_token_logps": "sampler_logprobs",
            },
            inputs,
            weights=found["importance_sampling_ratio"],
        )


def rloo(table):
    """The RLOO trainer: advantages with a divergence in the reward, and its loss."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    for options in [
        {},
        {"normalize_advantages": True},
        {"beta": 0.05},
        {"beta": 0.05, "normalize_advantages": True},
        {"reward_clip_range": [0.2, 0.6]},
        {"num_generations": 1},
    ]:
        found = score("mixed", options, module="rloo")
        text = ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"
        table.add(
            f"trl/rloo advantages/mixed/{text}",
            "advantage",
            {
                "function": "RLOOTrainer._generate_and_score_completions",
                "beta": 0.0,
                "num_generations": 4,
                **options,
                "rewards": "rewards",
                "ref_per_token_logps": "reference_logprobs",
            },
            "mixed",
            advantages=found["advantages"],
        )
    for inputs, (low, high) in itertools.product(
        ["three", "mixed", "holes"], [(0.2, 0.2), (0.1, 0.4), (0.9, 9.0)]
    ):
        wrt, mask = leaf(inputs), field(inputs, "mask")
        stub = types.SimpleNamespace(
            epsilon_low=low,
            epsilon_high=high,
            aux_loss_enabled=False,
            model=Model(),
            accelerator=accelerator(),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=functools.partial(
                given, (wrt, field(inputs, "entropies"), None)
            ),
        )
        ones = torch.ones(len(mask), 1, dtype=torch.long)
        loss = RLOOTrainer._compute_loss(
            stub,
            None,
            {
                "prompt_ids": ones,
                "prompt_mask": ones,
                "completion_ids": mask.long(),
                "completion_mask": mask,
                "advantages": field(inputs, "sequence_advantages"),
                "old_logps": (field(inputs, "old_logprobs") * mask).sum(1),
            },
        )
        table.loss(
            f"trl/rloo/{inputs}/low={low},high={high}",
            {
                "function": "RLOOTrainer._compute_loss",
                "epsilon": low,
                "epsilon_high": high,
                "max_completion_length": LIMITS[inputs],
            },
            inputs,
            loss,
            wrt,
        )


def lengths(table):
    """What TRL takes off for long completions."""
    from trl.rewards import get_soft_overlong_punishment

    numbers = [list(range(sum(row))) for row in INPUTS["mixed"]["mask"]]
    for longest, cache in [(12, 4), (10, 5)]:
        found = get_soft_overlong_punishment(longest, cache)(completion_ids=numbers)
        table.add(
            f"trl/get_soft_overlong_punishment/mixed/{longest},{cache}",
            "reward",
            {
                "function": "get_soft_overlong_punishment",
                "max_completion_len": longest,
                "soft_punish_cache": cache,
            },
            "mixed",
            rewards=found,
        )


def record(table):
    """Add the cases to TRL's."""
    lengths(table)
    grpo_advantages(table)
    sampler_weights(table)
    rloo(table)
