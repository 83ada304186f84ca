"""The loss of any row of the algorithm table, as an objective of the ordinary train step
(train/objective.py).

    loss = - aggregate(surrogate(ratio, advantage)) + coefficient * aggregate(divergence)

The batch is `policy_batch`'s, with advantages, old_logprobs and, if there is a divergence,
reference_logprobs [B, T] added; all at the token itself.
"""

import jax.numpy as jnp
from jax import Array

from model.config import ModelConfig
from model.heads import token_logprobs
from model.segments import shift_left
from model.transformer import Output, Transformer
from rl.algorithms import Algorithm
from train.config import TrainConfig
from train.objective import Objective, Totals, layer_coefficients, layer_totals, layer_weights


def forward_logprobs(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: dict[str, Array]
) -> tuple[Array, Array, Output]:
    """What the model makes of the next token at each position: log-probs and entropy [B, T] at the
    sampling temperature, and the forward pass.
    """
    output: Output = Transformer(config).apply(
        variables, batch["tokens"], batch["positions"], batch["segments"], stage=stage, mtp=False
    )
    logprobs_BT, entropy_BT = token_logprobs(
        config,
        variables["params"],
        output.hidden_BTD,
        shift_left(batch["tokens"], 1),
        temperature or 1.0,
    )
    return logprobs_BT, entropy_BT, output


def logprobs_at_tokens(
    config: ModelConfig, stage: str, temperature: float, variables: dict, batch: dict[str, Array]
) -> Array:
    """The log-prob of each token of the mask, at the token itself, 0 elsewhere: what
    `sampler_logprobs` holds, recomputed. [B, T].
    """
    logprobs_BT, _, _ = forward_logprobs(config, stage, temperature, variables, batch)
    at_token_BT = jnp.pad(logprobs_BT[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(batch["mask"], at_token_BT, 0.0)


def policy_objective(
    config: ModelConfig, train: TrainConfig, algorithm: Algorithm, temperature: float
) -> Objective:
    """Terms: policy, kl (with a divergence), balance, indexer_kl (stage "sparse"). Metrics:
    entropy, ratio, clip_fraction, approximate KL to the sampler (k3, as a value unbiased), and the
    gap between the trainer's and the sampler's log-probs.
    """
    token_metrics = ("entropy", "clip_fraction", "ratio", "kl_to_old", "logprob_gap_mean")

    def weights(batch):
        mask_BT = shift_left(batch["mask"], 1)
        tokens = jnp.sum(mask_BT, dtype=jnp.float32)
        own = {"policy": algorithm.aggregate.weight(mask_BT)} | dict.fromkeys(token_metrics, tokens)
        if algorithm.divergence is not None:
            own["kl"] = algorithm.aggregate.weight(mask_BT)
        return own | layer_weights(config, train.stage, batch, mtp_depth=0)

    def totals(variables, batch):
        logprobs_BT, entropy_BT, output = forward_logprobs(
            config, train.stage, temperature, variables, batch
        )
        next_token = {
            name: shift_left(batch[name], 1)
            for name in ("mask", "advantages", "old_logprobs", "sampler_logprobs")
        }
        mask_BT = next_token["mask"]
        logprobs_BT = jnp.where(mask_BT, logprobs_BT, 0.0)  # the ratio is 1 outside the mask
        ratio_BT = algorithm.ratio(logprobs_BT, next_token["old_logprobs"], mask_BT)
        surrogate_BT, clipped_BT = algorithm.surrogate(ratio_BT, next_token["advantages"])
        own = {"policy": -algorithm.aggregate.total(surrogate_BT, mask_BT)}
        if algorithm.divergence is not None:
            reference_BT = shift_left(batch["reference_logprobs"], 1)
            own["kl"] = algorithm.aggregate.total(
                algorithm.divergence.estimator(logprobs_BT, reference_BT, ratio_BT), mask_BT
            )

        def over_tokens(x_BT):
            return jnp.sum(jnp.where(mask_BT, x_BT, 0.0))

        log_ratio_BT = logprobs_BT - next_token["old_logprobs"]
        gap_BT = jnp.abs(logprobs_BT - next_token["sampler_logprobs"])
        metrics = (
            entropy_BT,
            clipped_BT,
            ratio_BT,
            jnp.exp(log_ratio_BT) - 1 - log_ratio_BT,
            gap_BT,
        )
        own |= {name: over_tokens(x_BT) for name, x_BT in zip(token_metrics, metrics, strict=True)}
        own |= layer_totals(config, train.stage, output.reports)
        return Totals(
            own,
            output.reports.router.counts_E,
            {"logprob_gap_max": jnp.max(jnp.where(mask_BT, gap_BT, 0.0))},
        )

    coefficients = layer_coefficients(config, train) | {"policy": 1.0}
    if algorithm.divergence is not None:
        coefficients["kl"] = algorithm.divergence.coefficient
    return Objective(weights, totals, coefficients)
