"""What a loss sees of each token."""

from collections.abc import Callable

import flax.struct
import jax.numpy as jnp
from jax import Array

from rl.algorithms.sequences import Sequences


@flax.struct.dataclass
class Tokens:
    """Holds what is known of the next token at each position, [B, T] each, float32.

    Only what stands on tokens that are learnt from is meaningful. Two of them are live: a loss is
    differentiated through them. The others have no gradient.

    Attributes:
      sequences: which tokens are learnt from, and which sequence each belongs to.
      logprobs_BT: of the policy, live; 0 elsewhere.
      entropy_BT: of the policy's distribution, live.
      old_BT: log-probs of the policy that the ratio is taken to.
      sampler_BT: log-probs as the sampler recorded them.
      advantages_BT: how much better than expected each token was.
      reference_BT: log-probs of the reference; None where nothing asks for them.
      correction_BT: how much each token counts since sampler and trainer differ
        (rl/algorithms/corrections.py); None where it is 1.
      chosen_BT: bool, the tokens that a selection singled out (rl/algorithms/selections.py); None
        without one.
    """

    sequences: Sequences
    logprobs_BT: Array
    entropy_BT: Array
    old_BT: Array
    sampler_BT: Array
    advantages_BT: Array
    reference_BT: Array | None = None
    correction_BT: Array | None = None
    chosen_BT: Array | None = None

    @property
    def mask_BT(self) -> Array:
        """Which tokens are learnt from, bool."""
        return self.sequences.mask_BT

    @property
    def log_ratio_BT(self) -> Array:
        """log pi - log pi_old, live; 0 elsewhere, without gradient."""
        return jnp.where(self.mask_BT, self.logprobs_BT - self.old_BT, 0.0)


PerToken = Callable[[Tokens], Array]


def needing(function: Callable, *names: str) -> Callable:
    """Notes on a function what must be computed before it can be called, and returns it.

    The names are those of `NEEDS`.
    """
    function.needs = frozenset(names)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def needs_of(function: object) -> frozenset[str]:
    """Returns what `needing` has noted on a function; nothing where it has not."""
    return getattr(function, "needs", frozenset())


def ignoring(function: Callable) -> Callable:
    """Notes on a ratio or a surrogate that it does not see how likely the sampler was."""
    function.ignores_sampler = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


NEEDS = {
    "group": "several completions of each prompt",
    "reference": "a model as large as the policy, and a forward pass of it over a step's tokens",
    "teacher": "the name of the model that teaches, reinforce.reference",
    "old": "a forward pass of the policy over a step's tokens, where old_logprobs is trainer",
    "entropy": "a forward pass of the policy over a step's tokens",
    "current": "a forward pass of the policy over an update's tokens before each update",
    "values": "a critic as large as the policy: parameters, moments, a forward pass, its updates",
    "greedy": "one greedy completion of each prompt beside the others",
    "group_tokens": "nothing more",
}
"""What an algorithm may need beside log-probs and rewards, and what that costs."""
