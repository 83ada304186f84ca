"""The decoupled loss of AReaL with its rejections, SAPO, M2PO, critic and penalties."""

import itertools

from common import Cases, field, leaf, text, whole
from library import double_names, load


def areal(path, commit):
    """AReaL: the decoupled loss with its rejections, SAPO, M2PO's mask, the critic's loss."""
    table = Cases("areal", commit)
    estimator = load(f"{path}/areal/utils/data.py", ["KLEstimator"]).KLEstimator
    config = load(f"{path}/areal/api/cli_args.py", ["RejectionSamplingConfig"])
    taken = load(
        f"{path}/areal/utils/functional/functional.py",
        [
            "_compute_sequence_level_ratio_and_advantages",
            "RejectionSamplingResult",
            "_check_bounds",
            "apply_rejection_sampling",
            "ppo_actor_loss_fn",
            "sapo_loss_fn",
            "_huber_loss",
            "_mse_loss",
            "ppo_critic_loss_fn",
        ],
        KLEstimator=estimator,
    )
    actor = load(
        f"{path}/areal/trainer/ppo/actor.py", ["_apply_m2po_masking", "_get_m2po_loss_mask"]
    )
    runs = [
        ("mixed", options, None)
        for options in [
            {"eps_clip": 0.2},
            {"eps_clip": 0.2, "eps_clip_higher": 0.28},
            {"eps_clip": 0.2, "c_clip": 1.05},
            {"eps_clip": 0.2, "c_clip": 2.0},
            {"eps_clip": 3e-4, "eps_clip_higher": 4e-4, "importance_sampling_level": "sequence"},
        ]
    ]
    runs += [
        ("spans", {"eps_clip": 0.2, "importance_sampling_level": level}, None)
        for level in ["token", "sequence"]
    ]
    runs += [("holes", {"eps_clip": 0.2, "eps_clip_higher": 0.28}, None)]
    runs += [
        ("mixed", {"eps_clip": 0.2}, options)
        for options in [
            {"upper": 5.0},
            {"upper": 1.5, "lower": 0.5},
            {"upper": 1.5, "lower": 0.5, "action": "clamp"},
            *(
                {"level": "sequence", "agg": agg, "upper": 1.2, "lower": 0.9, "action": action}
                for agg in ["mean", "sum", "max"]
                for action in ["mask", "clamp"]
            ),
            *({"metric": f"kl_{kind}", "upper": 0.1} for kind in ["k1", "k2", "k3"]),
            *(
                {"metric": f"kl_{kind}", "upper": 0.05, "level": "sequence", "agg": agg}
                for kind in ["k1", "k2", "k3"]
                for agg in ["mean", "sum", "max"]
            ),
        ]
    ]
    for inputs, options, rejection in runs:
        wrt = leaf(inputs)
        rules = None if rejection is None else config.RejectionSamplingConfig(**rejection)
        loss, stat = taken.ppo_actor_loss_fn(
            wrt,
            field(inputs, "old_logprobs"),
            field(inputs, "sampler_logprobs"),
            field(inputs, "advantages"),
            loss_mask=whole(inputs, "mask").bool(),
            rejection_sampling=rules,
            **options,
        )
        more = {} if rejection is None else {"weights": stat["behave_imp_weight"]}
        table.loss(
            f"areal/ppo_actor_loss_fn/{inputs}/{text({**options, **(rejection or {})})}",
            {
                "function": "ppo_actor_loss_fn",
                **options,
                "proximal_logprobs": "old_logprobs",
                "old_logprobs": "sampler_logprobs",
                "rejection_sampling": rejection,
            },
            inputs,
            loss,
            wrt,
            **more,
        )
    for inputs, level in itertools.product(["mixed", "spans"], ["token", "sequence"]):
        wrt = leaf(inputs)
        loss, _ = taken.sapo_loss_fn(
            wrt,
            field(inputs, "old_logprobs"),
            field(inputs, "advantages"),
            1.0,
            1.05,
            whole(inputs, "mask").bool(),
            level,
        )
        table.loss(
            f"areal/sapo_loss_fn/{inputs}/{level}",
            {
                "function": "sapo_loss_fn",
                "tau_pos": 1.0,
                "tau_neg": 1.05,
                "importance_sampling_level": level,
            },
            inputs,
            loss,
            wrt,
        )
    for inputs, limit in itertools.product(["three", "mixed", "holes"], [0.005, 0.04, 0.5]):
        kept = actor._apply_m2po_masking(
            field(inputs, "sampler_logprobs"),
            field(inputs, "old_logprobs"),
            whole(inputs, "mask").bool(),
            limit,
        )
        table.add(
            f"areal/m2po/{inputs}/{limit}",
            "mask",
            {
                "function": "_apply_m2po_masking",
                "m2_threshold": limit,
                "old_logp": "sampler_logprobs",
                "prox_logp": "old_logprobs",
            },
            inputs,
            mask=kept,
        )
    areal_m2po(table, taken, actor)
    areal_lengths(table, path)
    for inputs, bound, kind in itertools.product(["mixed"], [0.2, 0.5], ["mse", "huber"]):
        wrt = leaf(inputs, "values")
        with double_names():
            loss, _ = taken.ppo_critic_loss_fn(
                wrt,
                field(inputs, "old_values"),
                field(inputs, "returns"),
                bound,
                whole(inputs, "mask").bool(),
                kind,
            )
        table.loss(
            f"areal/ppo_critic_loss_fn/{inputs}/{kind},clip={bound}",
            {"function": "ppo_critic_loss_fn", "value_eps_clip": bound, "loss_fn_type": kind},
            inputs,
            loss,
            wrt,
            kind="value",
            of="values",
        )
    return table


def areal_m2po(table, taken, actor):
    """The decoupled loss over the tokens that M2PO keeps."""
    for inputs, limit in itertools.product(["mixed", "holes"], [0.005, 0.04]):
        wrt = leaf(inputs)
        old, sampler = field(inputs, "old_logprobs"), field(inputs, "sampler_logprobs")
        kept = actor._apply_m2po_masking(sampler, old, whole(inputs, "mask").bool(), limit)
        loss, _ = taken.ppo_actor_loss_fn(wrt, old, sampler, field(inputs, "advantages"), 0.2, kept)
        table.loss(
            f"areal/m2po loss/{inputs}/{limit}",
            {
                "function": "_apply_m2po_masking, then ppo_actor_loss_fn with its mask",
                "m2_threshold": limit,
                "eps_clip": 0.2,
                "proximal_logprobs": "old_logprobs",
                "old_logprobs": "sampler_logprobs",
            },
            inputs,
            loss,
            wrt,
        )


def areal_lengths(table, path):
    """What AReaL takes off the rewards of long responses."""
    taken = load(f"{path}/areal/utils/functional/functional.py", ["reward_overlong_penalty"])
    for longest, buffer, factor in [(12, 4, 1.0), (10, 5, 0.5)]:
        data = {
            "rewards": field("mixed", "rewards"),
            "input_ids": whole("mixed", "mask"),
            "loss_mask": whole("mixed", "mask"),
        }
        found = taken.reward_overlong_penalty(data, buffer, factor, longest)
        table.add(
            f"areal/reward_overlong_penalty/mixed/{longest},{buffer},{factor}",
            "reward",
            {
                "function": "reward_overlong_penalty",
                "max_response_length": longest,
                "overlong_tokens": buffer,
                "overlong_penalty_factor": factor,
            },
            "mixed",
            rewards=found["rewards"],
        )
