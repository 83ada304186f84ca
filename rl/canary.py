"""A canary: one prompt that tells whether sampler and trainer still have the same policy.

After the updates of a step the engine samples a few tokens after it with the new weights, by the
programs that sample rollouts, and the trainer scores them. Weights that did not arrive, or a
program that computes something else, stop the run before it learns from what they sample.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from errors import UserError
from kernels.device import compiler_options
from model.sharding import batch_shards, replicated
from rl.config import SamplingConfig
from rl.engines import AnyEngine
from rl.request import Prompt, keys_of
from rl.trajectory import batch_of
from train.scoring import logprobs_at_tokens
from train.setup import Setup

TOKENS = 3  # sampled: the first after the pass over the prompt, the others after cached steps
# By an engine outside, whose experts and keys the trainer cannot take for its own: a tie that the
# two break differently moves a token by more than rounding, and the mean of more tokens by less.
TOKENS_OUTSIDE = 32
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
"""Mean of |difference of log-probs|, in nats, that rounding explains: by the type of computation.

`python -m bench.drift` measures what rounding makes of it in small models, choices replayed: at
most 2e-6 in float32 and 0.04 in bfloat16, and twice that with weights twice as wide. The bounds are
several times more, for larger models, which round more often. In bfloat16 it is thus a coarse net:
weights of one update before, at a small learning rate, are within.

An engine outside has the bound of bfloat16 unless sampling.dtype says what it computes in.
"""


class Canary:
    """A prompt after which sampler and trainer must agree.

    Args:
      setup: the run's.
      engine: that samples the rollouts. What it records the trainer does again, so that a tie which
        the two break differently stops nothing.
      prompt: ids, at most sampling.max_prompt_tokens.
      stage: "dense" or "sparse" attention, of the trainer.
      sampling: the engine's.
      tolerance: in nats; -1 takes that of the coarser type of computation, of the two.
    """

    def __init__(
        self,
        setup: Setup,
        engine: AnyEngine,
        prompt: Sequence[int],
        *,
        stage: str,
        sampling: SamplingConfig,
        tolerance: float = -1.0,
    ):
        self._setup, self._engine = setup, engine
        tokens = TOKENS_OUTSIDE if engine.outside else TOKENS
        self._prompt = Prompt(prompt, keys_of(0, [0], 1)[0], min(tokens, sampling.max_new_tokens))
        computes = sampling.dtype or ("bfloat16" if engine.outside else setup.model.dtype)
        self._dtype = max(setup.model.dtype, computes, key=TOLERANCE.__getitem__)
        self._tolerance = TOLERANCE[self._dtype] if tolerance == -1 else tolerance
        self._score = jit_mean_gap(setup, stage, sampling.temperature)

    def check(self, step: int, variables: dict) -> float:
        """Returns the mean of |difference of log-probs| over the tokens sampled, in nats.

        Raises UserError where it is more than rounding explains.
        """
        with self._engine.loaded(variables):
            (trajectory,) = self._engine.run([self._prompt])
        # A row for every device that has rows of a batch.
        rows = [trajectory] * batch_shards(self._setup.mesh)
        batch = batch_of(rows, len(trajectory.tokens_T), self._setup.tokenizer.pad)
        gap = float(self._score(variables, self._setup.whole_on_devices(batch)))
        if not gap <= self._tolerance:
            raise UserError(
                f"step {step}: sampler and trainer do not have the same policy: their log-probs "
                f"after the canary prompt are {gap:.3g} nats apart, and rounding in "
                f"{self._dtype} explains {self._tolerance:.3g}; go on from the last "
                "checkpoint, or raise reinforce.canary_tolerance if the model is known to round so"
            )
        return gap


def jit_mean_gap(setup: Setup, stage: str, temperature: float) -> Callable[[dict, dict], Array]:
    """Returns the jitted (variables, batch) -> mean of |difference of log-probs|, a scalar."""

    def mean_gap(variables: dict, batch: dict) -> Array:
        scored_BT = logprobs_at_tokens(setup.model, stage, temperature, variables, batch)
        gap_BT = jnp.abs(scored_BT - batch["sampler_logprobs"])
        return jnp.sum(gap_BT) / jnp.sum(batch["mask"])

    return jax.jit(
        mean_gap,
        compiler_options=compiler_options(setup.mesh),
        out_shardings=replicated(setup.mesh),
    )
