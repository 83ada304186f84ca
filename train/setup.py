"""Holds what stays the same during a run: its model, its tokenizer and its mesh.

With them goes how arrays and batches travel between a host and the devices of that mesh.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data.config import DataConfig
from data.documents import Split
from data.pipeline import batches
from data.stream import BatchStream
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.sharding import batch_sharding
from train.config import TrainConfig
from train.lora import Lora, lora_of


@dataclasses.dataclass(frozen=True)
class Setup:
    """The model, the tokenizer and the mesh that training, sampling and evaluation share.

    Attributes:
      model: its vocabulary is filled in, so it is never 0.
      tokenizer: the tokenizer of the run's working directory.
      mesh: the devices, by the axes of model/sharding.py.
      lora: the adapters that learn in place of the parameters; None where all of these do.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    lora: Lora | None = None

    def learning(self, train: TrainConfig) -> "Setup":
        """Returns the setup of a run that learns as the section `train` says.

        Raises UserError as `lora_of` does.
        """
        return dataclasses.replace(self, lora=lora_of(self.model, train))

    def on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """Makes the global batch of which this process has the rows `batch`.

        Args:
          batch: arrays [B / processes, ...].

        Returns:
          Arrays [B, ...], over the devices of the mesh.
        """
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }

    def whole_on_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Makes the global batch that every process has whole, its rows divided over the devices.

        Args:
          batch: arrays [B, ...].
        """
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
            for name, x in batch.items()
        }


def to_host(x: Array) -> np.ndarray:
    """Returns all of an array on every host, however it is spread over them.

    All processes must call it alike.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def open_batches(
    setup: Setup, data: DataConfig, split: Split, *, seed: int, chat: bool
) -> BatchStream:
    """Opens the batches of `split` that this process reads; each process reads other documents.

    The iterator's place is saved with a checkpoint.
    """
    return iter(
        batches(
            data,
            setup.tokenizer,
            split=split,
            seed=seed,
            chat=chat,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    )
