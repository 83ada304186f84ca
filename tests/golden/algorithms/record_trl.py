"""Losses of TRL's GRPO trainer, through a stand-in for the trainer."""

import itertools
import sys
import types
from collections import defaultdict

import torch
from common import Cases, field, leaf

TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]
LIMITS = {"three": 4, "mixed": 16, "holes": 16, "spans": 16, "far": 6}
DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "delta": None,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
SAMPLER = {
    "vllm_importance_sampling_mode": None,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 3.0,
}
SHORT = {
    "importance_sampling_level": "level",
    "off_policy_mask_threshold": "opsm",
    "use_bias_correction_kl": "unbiased",
    "top_entropy_quantile": "entropy",
    "vllm_importance_sampling_mode": "vllm",
    "vllm_importance_sampling_clip_min": "min",
    "vllm_importance_sampling_clip_max": "max",
}


def accelerator():
    """One process: what is gathered is what it has."""
    return types.SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        sync_gradients=True,
        gather=lambda value: value,
        gather_for_metrics=lambda value: value,
        reduce=lambda value, reduction: value,
        pad_across_processes=lambda value, dim, pad_index: value,
    )


def trainer(options, per_token, entropies, limit, accumulation=1):
    """What the trainer's methods read of the trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    given = {**DEFAULTS, **SAMPLER, **options}
    metrics = defaultdict(lambda: defaultdict(list))
    stub = types.SimpleNamespace(
        args=types.SimpleNamespace(**given),
        **{
            key: given[key]
            for key in [
                "loss_type",
                "importance_sampling_level",
                "beta",
                "off_policy_mask_threshold",
                "top_entropy_quantile",
                "entropy_coef",
                *SAMPLER,
            ]
        },
        epsilon_low=given["epsilon"],
        epsilon_high=given["epsilon_high"],
        use_vllm=given["vllm_importance_sampling_mode"] is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=given["entropy_coef"] != 0.0,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=accumulation,
        max_completion_length=limit,
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator(),
        _metrics=metrics,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (per_token, entropies, None),
    )
    stub.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, stub)
    return stub


def tag(options):
    """Options as a short text for a case's name."""
    return ",".join(
        f"{SHORT.get(key, key)}={value}" for key, value in options.items() if key != "loss_type"
    )


def batch(inputs, old: str | None = "old_logprobs", sampler=False, items=None):
    """The trainer's own batch from the fields of an input."""
    mask = field(inputs, "mask")
    rows = mask.shape[0]
    found = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "completion_mask": mask,
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "advantages": field(inputs, "advantages" if inputs == "spans" else "sequence_advantages"),
        "num_items_in_batch": mask.sum() if items is None else torch.tensor(float(items)),
        "ref_per_token_logps": field(inputs, "reference_logprobs"),
    }
    if old is not None:
        found["old_per_token_logps"] = field(inputs, old)
    if sampler:
        found["sampling_per_token_logps"] = field(inputs, "sampler_logprobs")
    return found


def grpo(
    table,
    inputs,
    options,
    old: str | None = "old_logprobs",
    sampler=False,
    items=None,
    accumulation=1,
    method=None,
    name="trl",
):
    """One loss of the trainer, or of the trainer whose method is given."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    wrt, entropies = leaf(inputs), leaf(inputs, "entropies")
    given = batch(inputs, old, sampler, items)
    if options.get("vllm_importance_sampling_mode"):
        given["importance_sampling_ratio"] = sampler_ratio(inputs, options)
    stub = trainer(options, wrt, entropies, LIMITS[inputs], accumulation)
    loss = (method or GRPOTrainer._compute_loss)(stub, None, given)
    bonus = options.get("entropy_coef", 0.0) != 0.0
    more = {}
    if bonus:
        (more["entropy_gradient"],) = torch.autograd.grad(loss, entropies, retain_graph=True)
    call = {
        "function": "GRPOTrainer._compute_loss" if method is None else method.__qualname__,
        **{
            key: value
            for key, value in DEFAULTS.items()
            if key in ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "beta")
        },
        **options,
        "old_per_token_logps": old,
        "sampling_per_token_logps": "sampler_logprobs" if sampler else None,
        "num_items_in_batch": "mask sum" if items is None else items,
        "current_gradient_accumulation_steps": accumulation,
        "max_completion_length": LIMITS[inputs],
    }
    if method is not None:
        call["module"] = method.__module__
    extra = [
        f"old={old}" if old != "old_logprobs" else "",
        "sampler" if sampler else "",
        f"items={items}" if items else "",
        f"steps={accumulation}" if accumulation > 1 else "",
    ]
    title = "/".join(
        part
        for part in [
            name,
            options.get("loss_type", "grpo"),
            inputs,
            tag(options) or "defaults",
            *extra,
        ]
        if part
    )
    metrics = {
        key: value[-1]
        for key, value in stub._metrics["train"].items()
        if key in ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean")
    }
    table.loss(title, call, inputs, loss, wrt, metrics=metrics, **more)


def sampler_ratio(inputs, options):
    """The importance weights that the trainer makes for a batch."""
    from record_trl_advantages import score

    return score(inputs, options)["importance_sampling_ratio"]


def bounds(kind):
    """The bounds that a type's own paper or the library's guide gives."""
    return {"epsilon_high": 5.0} if kind == "cispo" else {}


def each_type(table):
    """Every type with both levels, each divergence, on several inputs."""
    for kind, level, (beta, unbiased) in itertools.product(
        TYPES, ["token", "sequence"], [(0.0, False), (0.04, False), (0.04, True)]
    ):
        options = {"loss_type": kind, "importance_sampling_level": level, **bounds(kind)}
        if beta:
            options.update(beta=beta, use_bias_correction_kl=unbiased)
        grpo(table, "mixed", options)
    for kind, inputs in itertools.product(TYPES, ["three", "holes", "spans"]):
        grpo(table, inputs, {"loss_type": kind, **bounds(kind)})
    for kind in TYPES:
        grpo(
            table,
            "three",
            {
                "loss_type": kind,
                "importance_sampling_level": "sequence",
                "epsilon": 3e-4,
                "epsilon_high": 4e-4,
            },
        )
        grpo(table, "mixed", {"loss_type": kind, "beta": 0.04, **bounds(kind)}, old=None)
    for beta, unbiased in [(0.04, False), (0.04, True)]:
        grpo(
            table, "three", {"loss_type": "grpo", "beta": beta, "use_bias_correction_kl": unbiased}
        )
    grpo(table, "three", {"loss_type": "cispo", "epsilon_high": 1.28})
    grpo(table, "three", {"loss_type": "grpo", "delta": 1.3})


def each_option(table):
    """Bounds, caps, masks and coefficients, one at a time."""
    for low, high in [(0.2, 0.2), (0.1, 0.3), (0.5, 2.0), (3e-4, 4e-4), (10.0, 10.0)]:
        for kind in ["grpo", "dapo"]:
            grpo(table, "mixed", {"loss_type": kind, "epsilon": low, "epsilon_high": high})
        grpo(
            table,
            "mixed",
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": low,
                "epsilon_high": high,
            },
        )
    for delta, level, kind in itertools.product(
        [1.3, 2.0, 4.0], ["token", "sequence"], ["grpo", "dapo"]
    ):
        grpo(
            table, "mixed", {"loss_type": kind, "importance_sampling_level": level, "delta": delta}
        )
    for high in [0.28, 1.28, 2.0]:
        grpo(table, "mixed", {"loss_type": "cispo", "epsilon_high": high})
    for threshold, kind in itertools.product(
        [0.02, 0.2], ["grpo", "dapo", "dr_grpo", "cispo", "sapo"]
    ):
        options = {"loss_type": kind, "off_policy_mask_threshold": threshold, **bounds(kind)}
        grpo(table, "mixed", options)
        grpo(table, "mixed", options, sampler=True)
    for threshold in [0.02, 0.2]:
        grpo(
            table,
            "holes",
            {
                "loss_type": "dapo",
                "off_policy_mask_threshold": threshold,
                "beta": 0.04,
                "use_bias_correction_kl": True,
            },
            sampler=True,
        )
    for share, kind in itertools.product([0.2, 0.5, 0.8], ["grpo", "dapo", "dr_grpo", "cispo"]):
        grpo(table, "mixed", {"loss_type": kind, "top_entropy_quantile": share, **bounds(kind)})
    grpo(table, "holes", {"loss_type": "dapo", "top_entropy_quantile": 0.2, "beta": 0.04})
    for kind, share in itertools.product(["grpo", "dapo", "dr_grpo", "bnpo"], [1.0, 0.5]):
        grpo(
            table, "mixed", {"loss_type": kind, "entropy_coef": 0.05, "top_entropy_quantile": share}
        )
    for positive, negative in [(1.0, 1.0), (2.0, 0.5), (0.3, 3.0)]:
        grpo(
            table,
            "mixed",
            {
                "loss_type": "sapo",
                "sapo_temperature_pos": positive,
                "sapo_temperature_neg": negative,
            },
        )
    for options in [
        {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0},
        {"vespo_k_neg": 2.0, "vespo_lambda_neg": 0.5},
    ]:
        grpo(table, "mixed", {"loss_type": "vespo", **options})
    for kind in ["dapo", "cispo", "vespo"]:
        grpo(table, "mixed", {"loss_type": kind, **bounds(kind)}, items=100)
    for kind in ["grpo", "bnpo", "dr_grpo", "luspo", "dapo"]:
        grpo(table, "mixed", {"loss_type": kind, "beta": 0.04}, accumulation=4)
    for kind in ["grpo", "cispo", "sapo", "vespo"]:
        grpo(table, "far", {"loss_type": kind, **bounds(kind)})


def each_correction(table):
    """The weights between sampler and trainer, in each mode."""
    for kind, mode, (low, high) in itertools.product(
        ["grpo", "dapo", "cispo", "vespo"],
        ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        [(None, 2.0), (0.5, 1.5)],
    ):
        grpo(
            table,
            "mixed",
            {
                "loss_type": kind,
                "vllm_importance_sampling_mode": mode,
                "vllm_importance_sampling_clip_min": low,
                "vllm_importance_sampling_clip_max": high,
                **bounds(kind),
            },
            sampler=True,
        )
    grpo(
        table,
        "holes",
        {
            "loss_type": "dapo",
            "vllm_importance_sampling_mode": "token_truncate",
            "beta": 0.04,
            "off_policy_mask_threshold": 0.1,
        },
        sampler=True,
    )
    grpo(
        table,
        "holes",
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
        sampler=True,
    )


def record(path, commit):
    """All cases of TRL in `path`, a checkout at `commit`."""
    sys.path.insert(0, path)
    table = Cases("trl", commit, defaults={**DEFAULTS, **SAMPLER})
    each_type(table)
    each_option(table)
    each_correction(table)
    import record_trl_advantages
    import record_trl_experimental
    import record_trl_pairs

    record_trl_experimental.experimental(table)
    record_trl_experimental.masks(table)
    record_trl_advantages.record(table)
    record_trl_pairs.record(table)
    return table
