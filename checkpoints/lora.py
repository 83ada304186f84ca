"""What a run with adapters records of them, and its parameters as a reader of slices sees them.

The checkpoints of such a run have the adapters and no other parameters. Its workdir keeps what they
are added to once, in `base/`, and in `lora.json` where that comes from and how to add them up.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.locations import LORA_RECORD, run_directory
from checkpoints.streamed import StreamedReader
from errors import UserError
from files import read_json, write_json

BASE = "base"


@dataclasses.dataclass(frozen=True)
class LoraRecord:
    """What `lora.json` has.

    Attributes:
      rank, scale, matrices: as in `train.lora.Lora`.
      source: where the base comes from: a checkpoint of a run, or `hf:DIR`; "" for parameters drawn
        from the run's seed.
      step: of the run that the source is of, else 0.
    """

    rank: int
    scale: float
    matrices: tuple[str, ...]
    source: str
    step: int

    def write(self, workdir: Path) -> None:
        """Writes the record into a workdir. Raises UserError where that cannot be."""
        write_json(workdir / LORA_RECORD, dataclasses.asdict(self), durable=True)


def recorded_lora(path: str | Path) -> LoraRecord | None:
    """Returns the record of the run that a path belongs to; None of a run without adapters.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Raises:
      UserError: the record is damaged.
    """
    record = run_directory(path) / LORA_RECORD
    if not record.exists():
        return None
    found: dict[str, Any] = read_json(record)
    try:
        found["matrices"] = tuple(found["matrices"])
        return LoraRecord(**found)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{record}: not the record of a run's adapters; put back the file, or begin in another "
            "--workdir"
        ) from error


def adapters_of(path: Path, record: LoraRecord) -> dict[str, dict[str, np.ndarray]]:
    """Reads the adapters of a run's newest checkpoint, unscaled, by the path of their matrix.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Raises:
      UserError: no checkpoint there.
    """
    reader = StreamedReader(path)
    return {
        matrix: {name: reader.read(f"params/{matrix}/{name}") for name in ("a", "b")}
        for matrix in record.matrices
    }


def open_run(path: Path) -> "StreamedReader | MergedReader":
    """Opens the newest checkpoint of a run to read slices of its parameters, adapters added.

    Args:
      path: a workdir, its directory of checkpoints, or one checkpoint in it.

    Raises:
      UserError: no checkpoint there.
    """
    reader, record = StreamedReader(path), recorded_lora(path)
    if record is None:
        return reader
    return MergedReader(reader, StreamedReader(run_directory(path) / BASE), record)


class MergedReader:
    """Reads slices of base + scale A B, as `StreamedReader` reads those of plain parameters.

    Attributes:
      checkpoint: the one with the adapters.

    Args:
      learnt: reads a checkpoint with adapters and router biases.
      base: reads the parameters that they are added to.
    """

    def __init__(self, learnt: StreamedReader, base: StreamedReader, record: LoraRecord):
        self._learnt, self._base, self._scale = learnt, base, record.scale
        self._matrices = frozenset(f"params/{path}" for path in record.matrices)
        self.checkpoint = learnt.checkpoint

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Returns leaf[index]; see `StreamedReader.read`.

        Args:
          name: the leaf's path.
          index: of slices alone, one for each axis, or () for the whole leaf.
        """
        if not name.startswith("params/"):
            return self._learnt.read(name, index)
        base = self._base.read(name, index)
        if name not in self._matrices:
            return base
        a, b = (self._factor(name, factor) for factor in ("a", "b"))
        stacked = len(a.shape) + len(b.shape) - 2 - base.ndim
        inputs = base.ndim - (len(b.shape) - 1)
        index = index or (slice(None),) * base.ndim
        # Whole along the rank: A [stacked, inputs, rank], B [stacked, rank, outputs].
        a_values = self._learnt.read(f"{name}/a", (*index[: stacked + inputs], slice(None)))
        of_b = (*index[:stacked], slice(None), *index[stacked + inputs :])
        b_values = self._learnt.read(f"{name}/b", of_b)
        rank, alone = a.shape[-1], base.shape[:stacked]
        added = a_values.reshape(*alone, -1, rank) @ b_values.reshape(*alone, rank, -1)
        return base + np.float32(self._scale) * added.reshape(base.shape)

    def _factor(self, name: str, factor: str) -> jax.ShapeDtypeStruct:
        return self._learnt.leaves[f"{name}/{factor}"]
