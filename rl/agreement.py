"""How far the trainer's own choices are those of the sampler: experts, and selected keys.

The trainer reads a few rows as it would without a replay, and what its layers choose is compared
with the sampler's record, layer by layer and token by token, by the Jaccard index

    |A and B| / |A or B|

which is 1 where both chose the same. Only what had a choice counts: a query with at most topk keys
attends to all of them whatever the indexer says, and a router that takes every expert has none.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.device import compiler_options
from model.config import ModelConfig
from model.record import recorded_forward, routing_layers, selecting_layers
from model.sharding import batch_shards, replicated
from rl.trajectory import Trajectory
from train.mean import Mean
from train.objective import Batch, split_microbatches
from train.setup import Setup


def jaccard(one: Array, other: Array) -> Array:
    """Returns the Jaccard index of sets [..., k] of numbers from 0, float32 [...].

    A set is a list without repeats, in any order; -1 stands for nothing. Two empty sets are alike.
    """
    both = jnp.sort(jnp.concatenate([one, other], axis=-1), axis=-1)
    common = jnp.sum((both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0), axis=-1)
    union = jnp.sum(both >= 0, axis=-1) - common
    return jnp.where(union > 0, common / jnp.maximum(union, 1), 1.0)


def choices_alike(
    config: ModelConfig, stage: str, variables: dict, batch: Batch
) -> dict[str, Mean]:
    """Compares the choices of a forward pass with those recorded in the batch.

    Args:
      batch: as `rl.trajectory.batch_of` makes it, with "routes" or "selected" where recorded.

    Returns:
      "routes" and "selected", each where it is recorded and there is a choice: means over the
      tokens that had one, of the layers of `routing_layers` and `selecting_layers`, [L].
    """
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    _, own = recorded_forward(config, variables, *inputs, stage)

    def mean(name: str, own_BLTk: Array, layers: list[int], choice_BT: Array) -> Mean:
        def of_layer(layer: tuple[Array, Array]) -> tuple[Array, Array]:
            recorded_BTk, own_BTk = layer
            counted_BT = choice_BT & (recorded_BTk[..., 0] >= 0)
            alike_BT = jnp.where(counted_BT, jaccard(recorded_BTk, own_BTk), 0.0)
            return jnp.sum(alike_BT), jnp.sum(counted_BT, dtype=jnp.float32)

        both = batch[name], own_BLTk[:, np.asarray(layers)]
        # A layer at a time: lists of selected keys are long.
        return Mean(*jax.lax.map(of_layer, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), both)))

    found = {}
    if "routes" in batch and config.moe.num_experts_per_tok < config.moe.num_experts:
        any_BT = batch["segments"] > 0
        found["routes"] = mean("routes", own.routes_BLTK, routing_layers(config), any_BT)
    if "selected" in batch:
        more_BT = batch["positions"] >= config.indexer.topk
        found["selected"] = mean("selected", own.selected_BLTk, selecting_layers(config), more_BT)
    return found


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Measures on some rows of a step how far the trainer's choices are the sampler's.

    Attributes:
      setup: the run's.
      stage: "dense" or "sparse" attention.
      rows: how many are compared, rounded up to as many on every device, or all there are; 0 for
        none. Each device reads one at a time.
    """

    setup: Setup
    stage: str
    rows: int

    def some(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Returns those of a step's that are compared, spread evenly over them."""
        most = len(trajectories)
        count = self.most(most)
        return [trajectories[number * most // count] for number in range(count)]

    def most(self, rows: int) -> int:
        """Returns how many of a step's rows are compared; where there are fewer, they are all."""
        shards = batch_shards(self.setup.mesh)
        return min(-(-self.rows // shards) * shards, rows)

    def __call__(self, variables: dict, batch: Mapping[str, np.ndarray]) -> dict[str, Mean]:
        """Returns what `choices_alike` does.

        Args:
          batch: rows of `some` trajectories, on the host, with what is recorded of them.
        """
        names = {"tokens", "positions", "segments", "routes", "selected"} & batch.keys()
        if not self.rows or not names & {"routes", "selected"}:
            return {}
        on_devices = self.setup.whole_on_devices({name: batch[name] for name in names})
        return self._compare(variables, on_devices)

    @functools.cached_property
    def _compare(self) -> Callable[[dict, Batch], dict[str, Mean]]:
        compare = functools.partial(choices_alike, self.setup.model, self.stage)
        shards = batch_shards(self.setup.mesh)

        def in_parts(variables: dict, batch: Batch) -> dict[str, Mean]:
            parts = split_microbatches(batch, len(batch["tokens"]) // shards)
            found = jax.lax.map(functools.partial(compare, variables), parts)
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), found)

        mesh = self.setup.mesh
        options = compiler_options(mesh)
        return jax.jit(in_parts, compiler_options=options, out_shardings=replicated(mesh))

    def metrics(self, found: Mapping[str, Mean]) -> dict[str, np.ndarray]:
        """Returns "sampling/routes_jaccard" and "sampling/selected_jaccard", means over all layers.

        With them go those of each layer, "..._LAYER". What had no choice in any row is left out.
        """
        layers = {
            "routes": routing_layers(self.setup.model),
            "selected": selecting_layers(self.setup.model),
        }
        metrics = {}
        for name, mean in jax.device_get(found).items():
            if not mean.weight.all():
                continue
            metrics[f"sampling/{name}_jaccard"] = Mean(mean.total.sum(), mean.weight.sum()).value
            for layer, value in zip(layers[name], mean.value, strict=True):
                metrics[f"sampling/{name}_jaccard_{layer}"] = value
        return metrics
