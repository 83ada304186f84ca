"""From a step's completions to the rows that its updates learn from."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model.sharding import batch_sharding, batch_shards
from rl.config import ReinforceConfig, SamplingConfig
from rl.generate import Completion
from rl.packing import packed_rows
from rl.trajectory import Trajectory, batch_of
from train.setup import Setup, to_host


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the completions of a step become rows that it learns from.

    Attributes:
      setup: of the mesh that learns.
      made: the records that there are of this model.
      kept: those that the trainer does again.
      parts: into how many the rows of a step are cut, for updates and their microbatches.
    """

    setup: Setup
    sampling: SamplingConfig
    reinforce: ReinforceConfig
    made: frozenset[str]
    kept: frozenset[str]
    parts: int

    @property
    def most(self) -> int:
        """The rows of a step, if no two trajectories share one; fewer trajectories leave some."""
        return self.reinforce.prompts_per_step * self.reinforce.group_size

    def __call__(self, completions: Sequence[Completion], step: int) -> dict[str, Array]:
        """Returns the batch of a step, on the devices: what is learnt from, with its age."""
        setup, reinforce = self.setup, self.reinforce
        trajectories = [completion.trajectory for completion in completions]
        multiple = self.parts * batch_shards(setup.mesh) if reinforce.packing else None
        given = trajectories, setup, self.sampling, self.kept
        batch = learnt_from(
            rows(*given, most=self.most, multiple=multiple), completions, reinforce.truncated
        )
        if reinforce.in_parts or reinforce.lag:
            batch = with_ages(batch, step, reinforce.most_stale)
        return setup.whole_on_devices(batch)

    def recorded(self, trajectories: Sequence[Trajectory], most: int) -> dict[str, np.ndarray]:
        """Returns `most` rows of trajectories with all that is recorded of them, on the host."""
        return rows(trajectories, self.setup, self.sampling, self.made, most=most)


def rows(
    trajectories: Sequence[Trajectory],
    setup: Setup,
    sampling: SamplingConfig,
    kept: Collection[str],
    *,
    most: int,
    multiple: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns trajectories as rows to learn from, see `rl.trajectory.batch_of`.

    Args:
      kept: the records that the trainer does again.
      most: the number of rows; where there are fewer trajectories the last ones are padding.
      multiple: packs them, into a multiple of so many rows, at most `most` (rl/packing.py); None
        does not.
    """
    width = sampling.max_prompt_tokens + sampling.max_new_tokens
    lengths = [len(trajectory.tokens_T) for trajectory in trajectories]
    if multiple:
        layout = packed_rows(lengths, width, multiple, most)
    else:
        layout = [[place] if place < len(lengths) else [] for place in range(most)]
    return batch_of(trajectories, width, setup.tokenizer.pad, layout, kept)


def learnt_from(
    batch: dict[str, np.ndarray], completions: Sequence[Completion], truncated: str
) -> dict[str, np.ndarray]:
    """Returns the batch with a mask that leaves out what is not learnt from.

    Args:
      truncated: "mask" leaves out completions that were cut before their stop token.
    """
    if truncated != "mask":
        return batch
    whole_N = np.asarray([not completion.truncated for completion in completions])
    return batch | {"mask": batch["mask"] & whole_N[batch["trajectory"]]}


def with_ages(batch: dict[str, np.ndarray], step: int, most: int) -> dict[str, np.ndarray]:
    """Returns a batch with "stale", bool [B, T]: tokens that a policy before the step's sampled.

    Args:
      step: its number, from 1 on.
      most: those that are older than by so many steps leave the mask; -1 leaves all.
    """
    ages_BT = step - 1 - batch["versions"]
    mask_BT = batch["mask"] & ((ages_BT <= most) | (most == -1))
    return batch | {"mask": mask_BT, "stale": mask_BT & (ages_BT > 0)}


def minibatches(
    setup: Setup, batch: dict[str, Array], config: ReinforceConfig, *, seed: int, step: int
) -> Iterator[dict[str, Array]]:
    """Yields epochs x minibatches parts of the batch, each epoch in its own order.

    Rows of padding are spread over the parts. Where one part is all of the batch, it comes as it
    is.
    """
    if config.minibatches == 1:
        yield from itertools.repeat(batch, config.epochs)
        return
    empty_B = ~to_host(jnp.any(batch["segments"] > 0, axis=1))
    sharding = batch_sharding(setup.mesh)
    for epoch in range(config.epochs):
        order = np.random.default_rng((seed, step, epoch)).permutation(len(empty_B))
        order = order[np.argsort(empty_B[order], kind="stable")]
        for number in range(config.minibatches):
            part = order[number :: config.minibatches]
            yield {name: jax.device_put(x[part], sharding) for name, x in batch.items()}
