"""Divergences, masks, losses, weights, advantages and kept words of slime."""

import itertools
import sys
import types

import torch
from common import Cases, field, leaf, text, whole
from library import load


def slime(path, commit):
    """slime: divergences, masks, clipped losses, GAE, log-probabilities over kept words."""
    table = Cases("slime", commit)
    names = [
        "compute_approx_kl",
        "compute_opsm_mask",
        "compute_gspo_kl",
        "compute_policy_loss",
        "compute_cispo_loss",
        "vanilla_gae",
        "chunked_discounted_returns",
        "chunked_gae",
        "calculate_log_probs_and_entropy",
        "_calculate_log_probs_and_entropy_chunk",
        "_VocabParallelLogProbEntropy",
        "_get_vocab_parallel_rank_size",
        "_maybe_all_reduce",
    ]
    taken = load(f"{path}/slime/utils/ppo_utils.py", names, dist=torch.distributed)
    for inputs, kind, weighted in itertools.product(
        ["three", "mixed", "far"], ["k1", "k2", "k3", "low_var_kl"], [False, True]
    ):
        if inputs == "far" and kind in ("k1", "k2"):
            continue
        wrt, mask = leaf(inputs), field(inputs, "mask")
        ratio = (wrt - field(inputs, "old_logprobs")).exp() if weighted else None
        values = taken.compute_approx_kl(wrt, field(inputs, "reference_logprobs"), kind, ratio)
        table.divergence(
            f"slime/compute_approx_kl/{inputs}/{kind},unbiased={weighted}",
            {
                "function": "compute_approx_kl",
                "kl_loss_type": kind,
                "importance_ratio": "exp(logprobs - old_logprobs)" if weighted else None,
            },
            inputs,
            values,
            wrt,
            mask,
        )
    for inputs, delta in itertools.product(["mixed", "holes", "spans"], [0.02, 0.2]):
        rows = [
            list(field(inputs, key)) for key in ("logprobs", "old_logprobs", "advantages", "mask")
        ]
        kept, share = taken.compute_opsm_mask(types.SimpleNamespace(opsm_delta=delta), *rows)
        table.add(
            f"slime/compute_opsm_mask/{inputs}/{delta}",
            "mask",
            {"function": "compute_opsm_mask", "opsm_delta": delta},
            inputs,
            mask=kept.view(field(inputs, "mask").shape),
            metrics={"opsm_clipfrac": share},
        )
    slime_losses(table, taken)
    for inputs, (gamma, lam) in itertools.product(["mixed", "three"], [(1.0, 0.95), (0.9, 0.8)]):
        mask = field(inputs, "mask")
        given = field(inputs, "token_rewards") * mask, field(inputs, "values") * mask
        for name in ["vanilla_gae", "chunked_gae"]:
            found, returns = getattr(taken, name)(*given, gamma, lam)
            table.add(
                f"slime/{name}/{inputs}/gamma={gamma},lambd={lam}",
                "advantage",
                {
                    "function": name,
                    "gamma": gamma,
                    "lambd": lam,
                    "rewards": "token_rewards * mask",
                    "values": "values * mask",
                },
                inputs,
                advantages=found,
                returns=returns,
            )
    slime_weights(table, path)
    slime_returns(table, path)
    for names, kept in itertools.product(
        [("logits", "tokens", "keep"), ("simple_logits", "simple_tokens", "simple_keep")],
        [True, False],
    ):
        wrt = leaf("logits", names[0])
        flat = wrt.reshape(-1, wrt.shape[-1])
        keep = whole("logits", names[2]).bool().reshape(flat.shape) if kept else None
        logp, entropy = taken.calculate_log_probs_and_entropy(
            flat.clone(), whole("logits", names[1]).reshape(-1), None, True, log_prob_keep_mask=keep
        )
        (gradient,) = torch.autograd.grad(logp.sum(), wrt, retain_graph=True)
        table.add(
            f"slime/calculate_log_probs_and_entropy/logits/{names[0]},keep={kept}",
            "logprob",
            {
                "function": "calculate_log_probs_and_entropy",
                "logits": names[0],
                "tokens": names[1],
                "log_prob_keep_mask": names[2] if kept else None,
            },
            "logits",
            values=logp.reshape(wrt.shape[:-1]),
            entropies=entropy.reshape(wrt.shape[:-1]),
            gradient=gradient,
            gradient_of=names[0],
        )
    return table


def slime_losses(table, taken):
    """Losses of tokens, kept as their masked mean over tokens, which slime leaves to the caller."""
    runs = [
        ("policy", "mixed", 0.2, 0.28, None),
        ("policy", "spans", 0.2, 0.28, 1.2),
        ("policy", "mixed", 0.2, 0.28, 2.0),
        ("gspo", "mixed", 3e-4, 4e-4, None),
        ("gspo", "three", 3e-4, 4e-4, None),
        ("gspo", "holes", 0.01, 0.1, None),
        ("cispo", "mixed", 0.2, 0.28, None),
        ("cispo", "mixed", 1.0, 4.0, None),
        ("cispo", "three", 0.2, 0.28, None),
    ]
    for kind, inputs, low, high, c in runs:
        wrt, mask = leaf(inputs), field(inputs, "mask")
        old, advantages = field(inputs, "old_logprobs"), field(inputs, "advantages")
        gap = old - wrt
        if kind == "gspo":
            gap = taken.compute_gspo_kl(list(wrt), list(old), list(wrt), list(mask)).view(
                mask.shape
            )
        if kind == "cispo":
            losses, _ = taken.compute_cispo_loss(gap, wrt, advantages, low, high)
        else:
            losses, _ = taken.compute_policy_loss(gap, advantages, low, high, c)
        loss = (losses * mask).sum() / mask.sum()
        table.loss(
            f"slime/{kind}/{inputs}/low={low},high={high},c={c}",
            {
                "function": "compute_cispo_loss" if kind == "cispo" else "compute_policy_loss",
                "ppo_kl": "compute_gspo_kl" if kind == "gspo" else "old_logprobs - logprobs",
                "eps_clip": low,
                "eps_clip_high": high,
                "eps_clip_c": c,
                "reduced": "recorder: masked sum / number of tokens",
            },
            inputs,
            loss,
            wrt,
        )


def slime_weights(table, path):
    """The weights and masks of slime's correction helper and of its two built-in functions."""
    names = [
        "masked_sum",
        "masked_mean",
        "masked_min",
        "masked_max",
        "metrics_append",
        "calculate_veto_mask",
        "truncate",
        "clip",
        "mask",
        "compute_mis_weights",
        "add_ppl_metrics",
    ]
    helper = load(f"{path}/examples/train_infer_mismatch_helper/mis.py", names)
    empty = {
        "use_tis": True,
        "tis_level": "token",
        "tis_mode": "truncate",
        "tis_upper_bound": 1.5,
        "tis_lower_bound": None,
        "tis_batch_normalize": False,
        "use_rs": False,
        "rs_level": "token",
        "rs_lower_bound": None,
        "rs_upper_bound": None,
        "rs_veto_threshold": None,
    }
    runs = [
        {"tis_level": level, "tis_mode": mode, "tis_lower_bound": lower, "tis_upper_bound": upper}
        for level, lower, upper in [
            ("token", 0.5, 1.5),
            ("sequence", 0.5, 2.0),
            ("geometric", 0.9, 1.15),
        ]
        for mode in ["truncate", "clip", "mask"]
    ]
    runs += [{"tis_level": level, "tis_batch_normalize": True} for level in ["token", "sequence"]]
    runs += [
        {"use_rs": True, "rs_level": level, "rs_lower_bound": 0.8, "rs_upper_bound": 1.2}
        for level in ["token", "sequence", "geometric"]
    ]
    runs += [
        {
            "use_rs": True,
            "rs_veto_threshold": 0.5,
            "rs_level": "geometric",
            "rs_lower_bound": 0.1,
            "rs_upper_bound": 10.0,
        },
        {"tis_mode": "mask"},
    ]
    inputs = "mixed"
    rows = {key: list(field(inputs, key)) for key in ("old_logprobs", "sampler_logprobs", "mask")}
    for options in runs:
        weights, masks, _ = helper.compute_mis_weights(
            types.SimpleNamespace(**{**empty, **options}),
            train_log_probs=rows["old_logprobs"],
            rollout_log_probs=rows["sampler_logprobs"],
            loss_masks=rows["mask"],
        )
        table.add(
            f"slime/compute_mis_weights/{inputs}/{text(options)}",
            "weight",
            {
                "function": "compute_mis_weights",
                **empty,
                **options,
                "train_log_probs": "old_logprobs",
                "rollout_log_probs": "sampler_logprobs",
            },
            inputs,
            weights=torch.stack(weights),
            mask=torch.stack(masks),
        )
    inside = load(
        f"{path}/slime/backends/megatron_utils/loss.py", ["vanilla_tis_function", "icepop_function"]
    )
    for name, low, high in [
        ("vanilla_tis_function", 0.0, 1.5),
        ("vanilla_tis_function", 0.8, 1.2),
        ("icepop_function", 0.5, 1.5),
    ]:
        factor, _, _ = getattr(inside, name)(
            types.SimpleNamespace(tis_clip_low=low, tis_clip=high),
            pg_loss=torch.ones_like(torch.cat(rows["mask"])),
            train_log_probs=rows["old_logprobs"],
            rollout_log_probs=rows["sampler_logprobs"],
            loss_masks=rows["mask"],
        )
        table.add(
            f"slime/{name}/{inputs}/low={low},high={high}",
            "weight",
            {
                "function": name,
                "tis_clip_low": low,
                "tis_clip": high,
                "train_log_probs": "old_logprobs",
                "rollout_log_probs": "sampler_logprobs",
            },
            inputs,
            weights=factor.view(len(rows["mask"]), -1) * field(inputs, "mask"),
        )


def slime_returns(table, path):
    """REINFORCE++ of slime before its whitening, with a divergence in the reward."""
    core = types.ModuleType("megatron.core")
    core.__dict__["mpu"] = types.SimpleNamespace(get_context_parallel_world_size=lambda: 1)
    sys.modules.setdefault("megatron", types.ModuleType("megatron"))
    sys.modules["megatron.core"] = core
    taken = load(
        f"{path}/slime/utils/ppo_utils.py",
        [
            "get_reinforce_plus_plus_returns",
            "get_reinforce_plus_plus_baseline_advantages",
            "chunked_discounted_returns",
            "get_grpo_returns",
        ],
    )
    for inputs, beta, gamma in itertools.product(["mixed", "holes"], [0.0, 0.1], [1.0, 0.9]):
        mask = field(inputs, "mask")
        gap = (field(inputs, "old_logprobs") - field(inputs, "reference_logprobs")) * mask
        lengths = [mask.shape[1]] * len(mask)
        found = taken.get_reinforce_plus_plus_returns(
            field(inputs, "rewards"), list(gap), list(mask), lengths, lengths, beta, gamma
        )
        call = {
            "kl": "(old_logprobs - reference_logprobs) * mask",
            "kl_coef": beta,
            "rewards": "rewards",
        }
        table.add(
            f"slime/reinforce_plus_plus/{inputs}/kl_coef={beta},gamma={gamma}",
            "advantage",
            {"function": "get_reinforce_plus_plus_returns", **call, "gamma": gamma},
            inputs,
            returns=torch.stack(found),
        )
        if gamma == 1.0:
            found = taken.get_reinforce_plus_plus_baseline_advantages(
                field(inputs, "rewards"), list(gap), list(mask), beta
            )
            table.add(
                f"slime/reinforce_plus_plus_baseline/{inputs}/kl_coef={beta}",
                "advantage",
                {"function": "get_reinforce_plus_plus_baseline_advantages", **call},
                inputs,
                advantages=torch.stack(found),
            )
