"""What a step has seen and been paid, before it is learnt from, and what advantages make of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Experience:
    """The N trajectories of a step, of M rewards, in B rows of T tokens.

    Arrays [B, T] stand at the token itself, float32 unless said. Those that nothing asks for are
    None.

    Attributes:
      rewards_MN: what each reward pays each trajectory.
      weights_M: of the rewards.
      outcome_N: the weighted sum, equal to the bit where all that is paid is equal.
      groups_N: int32, a number below N for each prompt: advantages compare within it.
      present_N: bool; the others are padding, of groups of their own.
      trajectory_BT: int32, which of the N a token belongs to; -1 on padding.
      mask_BT: bool, tokens that are learnt from.
      tokens_BT: int32 ids.
      penalty_BT: what a token loses of its reward, such as a divergence.
      old_BT, reference_BT: log-probs of the policy and of the reference.
      entropy_BT: of the policy's distribution that the token was drawn from.
      values_BT: the critic's, of what comes before the token.
      greedy_N: the total reward of the greedy completion of each one's prompt.
    """

    rewards_MN: Array
    weights_M: Array
    outcome_N: Array
    groups_N: Array
    present_N: Array
    trajectory_BT: Array
    mask_BT: Array
    tokens_BT: Array
    penalty_BT: Array | None = None
    old_BT: Array | None = None
    reference_BT: Array | None = None
    entropy_BT: Array | None = None
    values_BT: Array | None = None
    greedy_N: Array | None = None

    @property
    def size(self) -> int:
        """N, the number of trajectories, padding included."""
        return self.present_N.shape[0]

    @property
    def total_N(self) -> Array:
        """What a trajectory earns in all: its outcome less the penalties of its tokens."""
        if self.penalty_BT is None:
            return self.outcome_N
        return self.outcome_N - self.sum_N(self.penalty_BT)

    @property
    def differs(self) -> Array:
        """Whether any two trajectories have different outcomes, a bool scalar.

        Where none do, nothing says what is better. An advantage that also has penalties or a
        critic's values in it, and is scaled, would make noise of full size of them.
        """
        least = jnp.min(jnp.where(self.present_N, self.outcome_N, jnp.inf))
        return jnp.any(self.present_N & (self.outcome_N > least))

    @property
    def lengths_N(self) -> Array:
        """How many tokens of each trajectory are learnt from, float32."""
        return self.sum_N(self.mask_BT.astype(jnp.float32))

    def sum_N(self, values_BT: Array) -> Array:
        """Sums values over the tokens of each trajectory that are learnt from."""
        values_BT = jnp.where(self.mask_BT, values_BT, 0.0)
        places_BT = jnp.where(self.trajectory_BT < 0, self.size, self.trajectory_BT)
        return jax.ops.segment_sum(values_BT.ravel(), places_BT.ravel(), self.size + 1)[:-1]

    def mean_N(self, values_BT: Array) -> Array:
        """Averages values over the tokens of each trajectory that are learnt from."""
        return self.sum_N(values_BT) / jnp.maximum(self.lengths_N, 1)

    def at_tokens(self, values_N: Array) -> Array:
        """Gives each token that is learnt from the value of its trajectory; others have 0."""
        return jnp.where(self.mask_BT, values_N[jnp.maximum(self.trajectory_BT, 0)], 0.0)

    @property
    def places_BT(self) -> Array:
        """How many tokens that are learnt from come before each in its trajectory, float32."""
        counted_BT = self.mask_BT.astype(jnp.float32)
        before_BT = jnp.cumsum(counted_BT, axis=1) - counted_BT
        previous_BT = jnp.pad(self.trajectory_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-2)
        # Counts never fall along a row, so the latest start of a trajectory has the largest.
        at_start_BT = jnp.where(self.trajectory_BT != previous_BT, before_BT, 0.0)
        return before_BT - jax.lax.cummax(at_start_BT, axis=1)

    @property
    def last_BT(self) -> Array:
        """Which tokens are the last of their trajectory that are learnt from, bool."""
        lengths_BT = self.at_tokens(self.lengths_N)
        return self.mask_BT & (self.places_BT == lengths_BT - 1)

    def table_NT(self, values_BT: Array, fill: Any) -> Array:
        """Lays out the learnt-from tokens of each trajectory from its first one on, [N, T]."""
        rows_BT = jnp.where(self.mask_BT, self.trajectory_BT, self.size)
        table = jnp.full((self.size + 1, self.mask_BT.shape[1]), fill, values_BT.dtype)
        return table.at[rows_BT, self.places_BT.astype(jnp.int32)].set(values_BT)[:-1]

    def of_table(self, values_NT: Array) -> Array:
        """Gives each token that is learnt from its value in such a table; others have 0."""
        found_BT = values_NT[jnp.maximum(self.trajectory_BT, 0), self.places_BT.astype(jnp.int32)]
        return jnp.where(self.mask_BT, found_BT, 0)

    def group_sum(self, values_N: Array) -> Array:
        """Gives each trajectory the sum over its group."""
        values_N = jnp.where(self.present_N, values_N, 0.0)
        return jax.ops.segment_sum(values_N, self.groups_N, self.size)[self.groups_N]

    @property
    def group_sizes_N(self) -> Array:
        """The number of completions of each one's prompt, float32, at least 1."""
        return jnp.maximum(self.group_sum(jnp.ones(self.size)), 1.0)

    def group_mean(self, values_N: Array) -> Array:
        """Gives each trajectory the mean over its group."""
        return self.group_sum(values_N) / self.group_sizes_N

    def group_centred(self, values_N: Array) -> Array:
        """Returns values less the mean of their group, exactly 0 where all of it are equal."""
        # Taken from the least of the group, so that equal values stay exactly equal: the mean of
        # eight times 1.1 is not 1.1 in float32, and a z-score would blow that rounding up to an
        # advantage of 0.1.
        inside_N = jnp.where(self.present_N, values_N, jnp.inf)
        least_N = jax.ops.segment_min(inside_N, self.groups_N, self.size)[self.groups_N]
        values_N = jnp.where(self.present_N, values_N - least_N, 0.0)
        return jnp.where(self.present_N, values_N - self.group_mean(values_N), 0.0)

    def group_std(self, centred_N: Array, ddof: int) -> Array:
        """Gives each trajectory the standard deviation of its group, of centred values."""
        degrees_N = jnp.maximum(self.group_sizes_N - ddof, 1.0)
        return jnp.sqrt(self.group_sum(jnp.square(centred_N)) / degrees_N)

    def std(self, values_N: Array, ddof: int) -> Array:
        """Returns the standard deviation over all trajectories, a scalar."""
        count = jnp.sum(self.present_N)
        mean = jnp.sum(jnp.where(self.present_N, values_N, 0.0)) / jnp.maximum(count, 1)
        square_N = jnp.where(self.present_N, jnp.square(values_N - mean), 0.0)
        return jnp.sqrt(jnp.sum(square_N) / jnp.maximum(count - ddof, 1))

    def whitened(self, values_BT: Array, *, ddof: int = 1, eps: float = 1e-8) -> Array:
        """Returns values with mean 0 and variance 1 over all tokens that are learnt from.

        Args:
          ddof: the variance divides by the number of tokens less this.
          eps: added to the variance.
        """
        count = jnp.maximum(jnp.sum(self.mask_BT), 1)
        mean = jnp.sum(jnp.where(self.mask_BT, values_BT, 0.0)) / count
        centred_BT = jnp.where(self.mask_BT, values_BT - mean, 0.0)
        variance = jnp.sum(jnp.square(centred_BT)) / jnp.maximum(count - ddof, 1)
        return centred_BT * jax.lax.rsqrt(variance + eps)

    def backwards(
        self,
        advance: Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[tuple[Array, ...], Array]],
        carries: int,
        *given: Array,
    ) -> Array:
        """Goes over the tokens of each trajectory that are learnt from, the last one first.

        Args:
          advance: (carry, values of a token) -> (carry, result), of B rows at once.
          carries: how many arrays [B] a carry has; all are 0 behind the end of a trajectory.
          given: [B, T] each, what values come from.

        Returns:
          The results [B, T], 0 on tokens that are not learnt from: these are passed over.
        """
        after_BT = jnp.pad(self.trajectory_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        last_BT = self.trajectory_BT != after_BT
        nothing = tuple(jnp.zeros(len(last_BT)) for _ in range(carries))

        def step(carry: tuple[Array, ...], at: tuple[Array, ...]) -> tuple:
            last_B, mask_B, *values = at
            carry = tuple(jnp.where(last_B, 0.0, x_B) for x_B in carry)
            new, result_B = advance(carry, tuple(values))
            kept = tuple(jnp.where(mask_B, *both) for both in zip(new, carry, strict=True))
            return kept, jnp.where(mask_B, result_B, 0.0)

        inputs = tuple(x_BT.T for x_BT in (last_BT, self.mask_BT, *given))
        _, results_TB = jax.lax.scan(step, nothing, inputs, reverse=True)
        return results_TB.T


class Advantages(NamedTuple):
    """What a step makes of its experience, [B, T] each, 0 where nothing is learnt from.

    A step whose advantages are all 0 changes nothing.

    advantages_BT: how much better than expected a token was.
    returns_BT: what the critic should have said; None without a critic.
    weights_BT: how much each token counts beside its advantage; None where it is 1.
    """

    advantages_BT: Array
    returns_BT: Array | None = None
    weights_BT: Array | None = None


Advantage = Callable[[Experience], Advantages]


def per_trajectory(function: Callable[[Experience], Array]) -> Advantage:
    """Makes an advantage of a function experience -> advantages_N: every token has its own's."""
    return lambda experience: Advantages(experience.at_tokens(function(experience)))
