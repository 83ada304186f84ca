"""The table of algorithms: one row for each paper.

Reading down a column compares papers. A new paper is a new row, and a new function only where it
brings a new idea. `python -m launch.algorithms` prints the table, `--row=NAME` one of them.

In the formulas A is the advantage, r a token's ratio pi / pi_old, s that of a completion, sg the
stop of a gradient; r[i] is a completion's reward, G the size of a group, |o| a length.
"""

from rl.algorithms import aggregations, credit, outcomes, ratios, returns, selections, surrogates
from rl.algorithms.row import Row

_CLIP = "min(r A, clip(r, 1 - low, 1 + high) A)"

ROWS: dict[str, Row] = {
    "reinforce": Row(
        "REINFORCE, Williams 1992; with importance weights",
        "A = r[i] - b\nr A, a sum over each completion",
        advantage=outcomes.reward,
        surrogate=surrogates.unclipped,
        aggregate=aggregations.constant,
        options={"divisor": 1.0, "baseline": "step"},
    ),
    "ppo": Row(
        "PPO, arXiv 1707.06347, eq. 7; GAE, arXiv 1506.02438, eq. 16",
        f"A = whiten(GAE(gamma, lambda)) by a critic\n{_CLIP}, a mean over tokens",
        advantage=returns.generalised,
        aggregate=aggregations.token_mean,
    ),
    "grpo": Row(
        "GRPO, arXiv 2402.03300, eq. 3 and 4",
        "A = (r[i] - mean) / std of the group\n"
        f"{_CLIP} - 0.04 k3, a mean over completions of means",
        options={"kl": 0.04, "kl_estimator": "k3"},
    ),
    "dr_grpo": Row(
        "Dr.GRPO, arXiv 2503.20783, section 3.2",
        "A = r[i] - mean of the group\n"
        f"{_CLIP}, a sum over each completion by the longest there may be",
        advantage=outcomes.group_centred,
        aggregate=aggregations.constant,
    ),
    "bnpo": Row(
        "GRPO with a mean over the tokens of the batch, as TRL's bnpo",
        f"A = (r[i] - mean) / std of the group\n{_CLIP}, a mean over tokens",
        aggregate=aggregations.token_mean,
    ),
    # Eq. 8 divides by the tokens of one prompt; this row, as the authors' code, by those of the
    # batch; aggregate=prompt_mean is the equation.
    "dapo": Row(
        "DAPO, arXiv 2503.14476, eq. 8 and 10",
        f"A = (r[i] - mean) / std of the group\n{_CLIP} with high > low, a mean over tokens",
        aggregate=aggregations.token_mean,
        options={"high": 0.28},
    ),
    # The log-probability of a completion is a sum, so the divisor is 1.
    "rloo": Row(
        "RLOO, arXiv 2402.14740, token by token",
        f"A = r[i] - mean of the others\n{_CLIP}, a sum over each completion",
        advantage=outcomes.leave_one_out,
        aggregate=aggregations.constant,
        options={"divisor": 1.0},
    ),
    "reinforce_pp": Row(
        "REINFORCE++, arXiv 2501.03262",
        "A[t] = whiten(r[i] - kl sum of k1 from t on), over the step's tokens\n"
        f"{_CLIP}, a mean over tokens",
        advantage=returns.discounted,
        aggregate=aggregations.token_mean,
        options={"kl": 0.001, "kl_estimator": "k1", "kl_in": "reward"},
    ),
    "reinforce_pp_baseline": Row(
        "REINFORCE++ with a baseline, arXiv 2501.03262, section 3",
        "A = whiten(r[i] - mean of the group), over the step's tokens\n"
        f"{_CLIP} - kl k2, a mean over tokens",
        advantage=returns.whitened_centred,
        aggregate=aggregations.token_mean,
        options={"kl": 0.001, "kl_estimator": "k2"},
    ),
    "remax": Row(
        "ReMax, arXiv 2310.10505, section 4",
        "A = r[i] - r of the greedy completion\nr A, a sum over each completion",
        advantage=outcomes.greedy_baseline,
        surrogate=surrogates.unclipped,
        aggregate=aggregations.constant,
        options={"divisor": 1.0},
    ),
    "opo": Row(
        "OPO, arXiv 2505.23585",
        "A = r[i] - sum_j |o_j| r[j] / sum_j |o_j|\nr A, a mean over tokens",
        advantage=outcomes.length_weighted,
        surrogate=surrogates.unclipped,
        aggregate=aggregations.token_mean,
    ),
    "gpg": Row(
        "GPG, arXiv 2504.02546",
        "A = alpha (r[i] - mean of the group), alpha = all / those with a signal\n"
        "A log pi, a mean over tokens",
        advantage=outcomes.signal_scaled,
        surrogate=surrogates.log_likelihood,
        aggregate=aggregations.token_mean,
    ),
    "maxrl": Row(
        "MaxRL, arXiv 2602.02710",
        f"A = (r[i] - mean) / mean of the group\n{_CLIP}, a mean over tokens",
        advantage=outcomes.over_mean,
        aggregate=aggregations.token_mean,
    ),
    "gdpo": Row(
        "GDPO, arXiv 2601.05242",
        "A = whiten(sum_m weight[m] (r[m, i] - mean) / std of the group)\n"
        f"{_CLIP}, a mean over completions of means",
        advantage=outcomes.per_reward,
    ),
    "passk": Row(
        "pass@k by the best of a group, arXiv 2503.19595; in closed form (arXiv 2508.10751) with "
        "advantage=pass_at_k",
        f"A = (r[best] - r[second]) / std for the best, 0 for others\n{_CLIP}, a mean over tokens",
        advantage=outcomes.best_over_second,
        aggregate=aggregations.token_mean,
    ),
    "gspo": Row(
        "GSPO, arXiv 2507.18071, eq. 5 to 7",
        "s = exp(mean log r)\nmin(s A, clip(s, 1 - low, 1 + high) A), a mean over completions",
        ratio=ratios.sequence,
        options={"low": 3e-4, "high": 4e-4},
    ),
    "gmpo": Row(
        "GMPO, arXiv 2507.20673",
        "A exp(mean of log r, clipped in log space), a mean over completions",
        surrogate=surrogates.geometric_mean,
    ),
    "luspo": Row(
        "LUSPO, arXiv 2602.05261: GSPO without its bias by length",
        "|o| min(s A, clip(s, 1 - low, 1 + high) A), a mean over completions",
        ratio=ratios.sequence,
        aggregate=aggregations.constant,
        options={"divisor": 1.0, "low": 3e-4, "high": 4e-4},
    ),
    "cispo": Row(
        "CISPO, MiniMax-M1, arXiv 2506.13585",
        "sg(min(r, high)) A log pi, a mean over tokens",
        surrogate=surrogates.cispo,
        aggregate=aggregations.token_mean,
    ),
    "sapo": Row(
        "SAPO, arXiv 2511.20347",
        "4 sigmoid(tau (r - 1)) / tau A, a mean over completions of means",
        surrogate=surrogates.soft_gate,
    ),
    "dppo_tv": Row(
        "DPPO by total variation, arXiv 2602.04879",
        "sg(min(r, 20) M) A log pi, M = 0 where pi - pi_old passed a bound; a mean over tokens",
        surrogate=surrogates.total_variation,
        aggregate=aggregations.token_mean,
    ),
    "dppo_kl": Row(
        "DPPO by binary KL, arXiv 2602.04879",
        "sg(min(r, 20) M) A log pi, M = 0 where KL(pi_old | pi) passed a bound; a mean over tokens",
        surrogate=surrogates.binary_divergence,
        aggregate=aggregations.token_mean,
    ),
    "vespo": Row(
        "VESPO, arXiv 2602.10693",
        "sg(w^k exp(lambda (1 - w))) A log pi, w = prod r; a mean over tokens",
        surrogate=surrogates.gamma_weighted,
        aggregate=aggregations.token_mean,
    ),
    "clip_cov": Row(
        "Clip-Cov, arXiv 2505.22617",
        f"{_CLIP}, 0 on a few tokens of large covariance of A and log pi; a mean over tokens",
        aggregate=aggregations.token_mean,
        selection=selections.clip_cov,
    ),
    "kl_cov": Row(
        "KL-Cov, arXiv 2505.22617",
        "r A - |log r| on the tokens of the largest covariance of A and log pi; a mean over tokens",
        surrogate=surrogates.covariance_penalty,
        aggregate=aggregations.token_mean,
        selection=selections.kl_cov,
    ),
    "gtpo_entropy": Row(
        "GTPO by policy entropy, arXiv 2508.04349",
        "A[t] = z-score of rewards shared out by entropy, right and wrong completions apart\n"
        f"{_CLIP}, a mean over tokens",
        advantage=credit.entropy_tokens,
        aggregate=aggregations.token_mean,
        options={"high": 0.28},
    ),
    "grpo_s": Row(
        "GRPO-S, arXiv 2508.04349",
        "A = z-score of rewards shared out by mean entropy; w = mean r\n"
        "min(w A, clip(w, 1 - low, 1 + high) A), a mean over completions",
        advantage=credit.entropy_sequences,
        ratio=ratios.sequence_average,
        options={"high": 0.28},
    ),
    "gtpo_conflict": Row(
        "Trajectory-based policy optimization, arXiv 2508.03772",
        "A = r[i] - mean - 0.1 H, 0 where H > 0.7; tokens in conflict weigh 2 or 0\n"
        "r A with r = 1, a mean over completions of means",
        advantage=credit.conflicts,
        ratio=ratios.on_policy,
        surrogate=surrogates.unclipped,
        options={"count": "all"},
    ),
    "kimi": Row(
        "Online mirror descent, Kimi k1.5, arXiv 2501.12599",
        "A = r[i] - mean of the group\n"
        "A log pi - tau/2 (log pi / pi_old)^2, a sum over each completion",
        advantage=outcomes.group_centred,
        surrogate=surrogates.mirror_descent,
        aggregate=aggregations.constant,
        options={"divisor": 1.0},
        loop={"reset_optimizer_every": 1},
    ),
    "m2po": Row(
        "M2PO, arXiv 2510.01161",
        f"{_CLIP}, a mean over tokens\n"
        "without those of largest (log pi / pi_sampler)^2, until its mean is below 0.04",
        aggregate=aggregations.token_mean,
        selection=selections.second_moment,
    ),
    "decoupled_ppo": Row(
        "Decoupled PPO, AReaL, arXiv 2505.24298",
        "A = (r[i] - mean) / std of the group\n"
        "sg(pi_old / pi_sampler) min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old of the "
        "trainer;\na mean over tokens",
        aggregate=aggregations.token_mean,
        options={"correction": "token_truncate", "correction_high": 1e6},
        loop={"old_logprobs": "trainer"},
    ),
    "opd": Row(
        "On-policy distillation, thinkingmachines.ai/blog/on-policy-distillation",
        "A[t] = log pi_teacher - log pi_old\nr A, a mean over tokens; the teacher is the reference",
        advantage=returns.teacher,
        surrogate=surrogates.unclipped,
        aggregate=aggregations.token_mean,
    ),
    # The bound of the mask and the coefficient of the KL are not published: 0.5 is TRL's advice,
    # and for mathematics the paper finds a weak KL or none best.
    "deepseek_v32": Row(
        "DeepSeek-V3.2, arXiv 2512.02556, section 3.1",
        "A = r[i] - mean of the group\n"
        f"M {_CLIP} - kl r k3, M = 0 on wrong completions that drifted\n"
        "a mean over completions of means; experts, keys and sampling masks are the sampler's",
        advantage=outcomes.group_centred,
        options={"off_policy": 0.5},
        loop={
            "old_logprobs": "sampler",
            "keep_routing": True,
            "keep_selection": True,
            "keep_sampling_mask": True,
        },
    ),
    "scale_rl": Row(
        "ScaleRL, arXiv 2510.13786, section 3",
        "A = (r[i] - mean of the group) / std of the step\n"
        "sg(min(r, 5)) A log pi, a mean over prompts of means over tokens\n"
        "prompts without a difference are dropped, those solved nine times of ten retired",
        advantage=outcomes.step_zscore,
        surrogate=surrogates.cispo,
        aggregate=aggregations.prompt_mean,
        loop={"zero_variance": "dropped", "retire_at": 0.9},
    ),
    "dro": Row(
        "Direct reward optimization, arXiv 2405.19107, token by token",
        "A log pi - tau/2 (log r)^2, a mean over tokens",
        surrogate=surrogates.mirror_descent,
        aggregate=aggregations.token_mean,
        options={"level": "token"},
    ),
}
