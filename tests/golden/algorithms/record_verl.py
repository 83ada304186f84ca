"""Policy losses, aggregations, divergences and value losses of verl."""

import itertools
import sys

import torch
from common import Cases, field, leaf

MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
IGNORE_MODE = ["gspo", "sapo", "geo_mean"]
FOLLOW_MODE = ["vanilla", "dppo_tv", "dppo_kl", "gpg", "clip_cov", "kl_cov", "dro", "cispo"]
BOUNDS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
DEFAULTS = {
    "vanilla": BOUNDS,
    "cispo": BOUNDS,
    "sapo": {},
    "gpg": {},
    "dppo_tv": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
    "dppo_kl": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05},
    "gspo": {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "geo_mean": {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4},
    "clip_cov": {
        **BOUNDS,
        "policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0},
    },
    "kl_cov": {"policy_loss": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0}},
    "dro": {"policy_loss": {"dro_beta": 0.5}},
}
SHORT = {"clip_ratio_low": "low", "clip_ratio_high": "high", "clip_ratio_c": "c"}


def options_text(options):
    """Options as a short text for a case's name."""
    parts = []
    for key, value in options.items():
        if isinstance(value, dict):
            parts += [f"{name}={inner}" for name, inner in value.items()]
        else:
            parts.append(f"{SHORT.get(key, key)}={value}")
    return ",".join(parts)


def actor_config(options, batch=None):
    """The library's actor settings with the given ones set."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    options = dict(options)
    if isinstance(options.get("policy_loss"), dict):
        options["policy_loss"] = PolicyLossConfig(**options["policy_loss"])
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        use_dynamic_bsz=True,
        global_batch_info=dict(batch or {}),
        **options,
    )


def policy_loss(table, loss_name, inputs, mode, options=None, weights=False, batch=None, tag=""):
    """One policy loss: name of the loss, aggregation, options, with or without weights."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    options = DEFAULTS[loss_name] if options is None else options
    wrt = leaf(inputs)
    factors = field(inputs, "weights") if weights else None
    loss, metrics = get_policy_loss_fn(loss_name)(
        old_log_prob=field(inputs, "old_logprobs"),
        log_prob=wrt,
        advantages=field(inputs, "advantages"),
        response_mask=field(inputs, "mask"),
        loss_agg_mode=mode,
        config=actor_config(options, batch),
        rollout_is_weights=factors,
    )
    call = {
        "function": "get_policy_loss_fn",
        "name": loss_name,
        "loss_agg_mode": mode,
        "config": options,
        "rollout_is_weights": "weights" if weights else None,
    }
    if batch:
        call["global_batch_info"] = batch
    name = "/".join(
        part
        for part in ["verl", loss_name, inputs, mode, tag, "weighted" if weights else ""]
        if part
    )
    table.loss(name, call, inputs, loss, wrt, metrics=metrics)


def each_mode(table):
    """Every loss in every aggregation, with and without weights, on the mixed input."""
    for name, mode, weights in itertools.product(FOLLOW_MODE, MODES, [False, True]):
        policy_loss(table, name, "mixed", mode, weights=weights)
    for name, mode, weights in itertools.product(
        IGNORE_MODE, ["token-mean", "seq-mean-token-mean"], [False, True]
    ):
        policy_loss(table, name, "mixed", mode, weights=weights)
    for name, inputs in itertools.product(FOLLOW_MODE + IGNORE_MODE, ["three", "holes", "spans"]):
        for mode in ["token-mean", "seq-mean-token-mean"]:
            if mode == "token-mean" or (name not in IGNORE_MODE and inputs != "spans"):
                policy_loss(table, name, inputs, mode)
    for mode in MODES:
        policy_loss(table, "vanilla", "holes", mode, weights=True)
        policy_loss(
            table,
            "vanilla",
            "three",
            mode,
            options={"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
            tag="golden",
        )
    for mode, batch in itertools.product(
        MODES,
        [
            {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16},
            {
                "dp_size": 1,
                "batch_num_tokens": 70,
                "global_batch_size": 12,
                "loss_scale_factor": 20,
            },
        ],
    ):
        policy_loss(table, "vanilla", "mixed", mode, batch=batch, tag=options_text(batch))
    for name in ["gspo", "cispo", "sapo"]:
        batch = {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16}
        policy_loss(table, name, "mixed", "seq-mean-token-mean", batch=batch, tag="global")


def each_option(table):
    """Bounds, the dual clip, temperatures and shares, one at a time."""
    vanilla = [
        {"clip_ratio_low": low, "clip_ratio_high": high}
        for low, high in [(0.2, 0.2), (0.1, 0.3), (0.3, 0.1), (0.5, 2.0), (1.0, 9.0)]
    ]
    vanilla += [{**BOUNDS, "clip_ratio_c": c} for c in [1.05, 1.2, 2.0, 10.0]]
    runs = [("vanilla", options) for options in vanilla]
    runs += [
        ("dppo_tv", {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": c})
        for low, high, c in [(0.05, 0.1, 3.0), (0.3, 0.15, 1.2), (0.2, 0.2, 20.0)]
    ]
    runs += [
        ("dppo_kl", {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": c})
        for low, high, c in [(0.01, 0.02, 3.0), (0.1, 0.003, 1.2), (0.05, 0.05, 20.0)]
    ]
    runs += [
        ("gspo", {"clip_ratio_low": low, "clip_ratio_high": high})
        for low, high in [(0.2, 0.28), (0.01, 0.1), (0.1, 0.01)]
    ]
    runs += [
        ("sapo", {"tau_pos": pos, "tau_neg": neg})
        for pos, neg in [(1.0, 1.0), (2.0, 0.5), (0.3, 3.0)]
    ]
    runs += [
        (
            "clip_cov",
            {
                **BOUNDS,
                "policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": lower, "clip_cov_ub": upper},
            },
        )
        for lower, upper in [(-5.0, 5.0), (0.3, 0.9), (1.0, 5.0), (-0.2, 0.2)]
    ]
    policy_loss(table, "kl_cov", "three", "token-mean", {}, tag="defaults")
    runs += [
        ("kl_cov", {"policy_loss": {"kl_cov_ratio": share, "ppo_kl_coef": coefficient}})
        for share, coefficient in [(0.0002, 0.1), (0.5, 0.1), (0.1, 1.0), (1.0, 0.3)]
    ]
    runs += [
        ("geo_mean", {"clip_ratio_low": low, "clip_ratio_high": high})
        for low, high in [(0.2, 0.28), (0.1, 0.6), (3.0, 3.0)]
    ]
    runs += [("dro", {"policy_loss": {"dro_beta": beta}}) for beta in [0.05, 2.0]]
    runs += [
        ("cispo", {"clip_ratio_low": low, "clip_ratio_high": high})
        for low, high in [(0.2, 0.2), (1.0, 0.28), (1.0, 4.0), (0.5, 1.0)]
    ]
    for name, options in runs:
        for inputs in ["mixed", "spans"]:
            policy_loss(table, name, inputs, "token-mean", options, tag=options_text(options))
    for c in [1.05, 1.5]:
        policy_loss(
            table,
            "vanilla",
            "mixed",
            "token-mean",
            {**BOUNDS, "clip_ratio_c": c},
            weights=True,
            tag=f"c={c}",
        )
    for name in ["vanilla", "gspo", "sapo", "cispo"]:
        policy_loss(table, name, "far", "token-mean")


def divergences(table):
    """Every estimator of the divergence, with the gradient of its masked sum."""
    from verl.trainer.ppo.core_algos import kl_penalty

    kinds = [
        "k1",
        "kl",
        "abs",
        "k2",
        "mse",
        "k3",
        "low_var_kl",
        "k1+",
        "abs+",
        "k2+",
        "k3+",
        "low_var_kl+",
    ]
    for inputs, kind in itertools.product(["three", "mixed", "far"], kinds):
        wrt = leaf(inputs)
        values = kl_penalty(wrt, field(inputs, "reference_logprobs"), kind)
        call = {"function": "kl_penalty", "kl_penalty": kind, "ref_logprob": "reference_logprobs"}
        table.divergence(
            f"verl/kl_penalty/{inputs}/{kind}",
            call,
            inputs,
            values,
            wrt,
            mask=field(inputs, "mask"),
        )


def aggregations(table):
    """The aggregation alone, over entropies, with the counts of a larger batch."""
    from verl.trainer.ppo.core_algos import agg_loss, compute_entropy_loss

    batches = [
        {},
        {"dp_size": 4, "batch_num_tokens": 200, "global_batch_size": 32},
        {"batch_num_tokens": 60, "global_batch_size": 10},
        {"loss_scale_factor": 30},
    ]
    for inputs, mode, batch in itertools.product(["mixed", "holes"], MODES, batches):
        if inputs == "holes" and batch:
            continue
        wrt = leaf(inputs, "entropies")
        loss = agg_loss(wrt, field(inputs, "mask"), mode, **batch)
        call = {"function": "agg_loss", "loss_agg_mode": mode, "loss_mat": "entropies", **batch}
        tag = options_text(batch) or "alone"
        table.loss(
            f"verl/agg_loss/{inputs}/{mode}/{tag}",
            call,
            inputs,
            loss,
            wrt,
            kind="aggregation",
            of="entropies",
        )
    for mode in MODES:
        wrt = leaf("logits", "logits")
        loss = compute_entropy_loss(wrt, field("logits", "mask"), mode)
        table.loss(
            f"verl/compute_entropy_loss/logits/{mode}",
            {"function": "compute_entropy_loss", "loss_agg_mode": mode, "logits": "logits"},
            "logits",
            loss,
            wrt,
            kind="entropy",
            of="logits",
        )


def value_losses(table):
    """The critic's loss with narrow and wide bounds and each aggregation."""
    from verl.trainer.ppo.core_algos import compute_value_loss

    runs = list(itertools.product(["mixed", "holes", "three"], [0.2, 0.5, 1e9], ["token-mean"]))
    runs += list(itertools.product(["mixed"], [0.2], MODES[1:]))
    for inputs, bound, mode in runs:
        wrt = leaf(inputs, "values")
        loss, share = compute_value_loss(
            wrt,
            field(inputs, "returns"),
            field(inputs, "old_values"),
            field(inputs, "mask"),
            bound,
            mode,
        )
        table.loss(
            f"verl/compute_value_loss/{inputs}/{mode}/clip={bound}",
            {
                "function": "compute_value_loss",
                "vpreds": "values",
                "values": "old_values",
                "cliprange_value": bound,
                "loss_agg_mode": mode,
            },
            inputs,
            loss,
            wrt,
            kind="value",
            of="values",
            metrics={"vf_clipfrac": share},
        )


def defaults():
    """What the library takes for the settings that a case does not name."""
    config = actor_config({})
    names = ["clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg"]
    cov = ["clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef"]
    return {
        **{name: getattr(config, name) for name in names},
        "policy_loss": {name: getattr(config.policy_loss, name) for name in cov},
    }


def record(path, commit):
    """All cases of verl in `path`, a checkout at `commit`."""
    sys.path.insert(0, path)
    torch.manual_seed(0)
    table = Cases("verl", commit, defaults=defaults())
    each_mode(table)
    each_option(table)
    divergences(table)
    aggregations(table)
    value_losses(table)
    from record_verl_advantages import advantages
    from record_verl_corrections import bypass, corrections, whole_losses

    bypass(table)
    whole_losses(table)
    advantages(table)
    corrections(table)
    return table
