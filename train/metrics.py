"""Writes and reads a run's metrics: `metrics.jsonl`, one line a step, and TensorBoard's scalars.

Trackers get what metrics.jsonl has (train/sinks.py).
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from errors import UserError
from files import AppendedFile, write_text
from train.events import EventFile
from train.metric_names import by_present_names
from train.sinks import Sink


class Metrics:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`.

    On processes other than the first it does nothing.

    Args:
      workdir: the run's working directory, created if need be.
      phase: what the lines are of ("pretrain", "reinforce", ...); their key is "stage". Phases may
        share a workdir.
      resume_step: the step the run goes on from, 0 when it starts afresh. Later lines of this phase
        come from a run that died after its last checkpoint, and are dropped; from 0, all of
        them. None keeps every line.
      sinks: trackers that get the scalars too, `train.sinks`.

    Raises:
      UserError: the workdir cannot be written to, or a tracker cannot begin.
    """

    def __init__(
        self,
        workdir: Path,
        phase: str,
        resume_step: int | None = None,
        sinks: Sequence[str] = (),
    ):
        self.path = Path(workdir) / "metrics.jsonl"
        self.phase = phase
        self._file = None
        if jax.process_index() != 0:
            return
        if self.path.exists():
            self._drop_lines_after(resume_step)
        self._file = AppendedFile(self.path)
        first_step = None if resume_step is None else resume_step + 1
        self._events = EventFile(self.path.parent / "tensorboard", phase, first_step)
        lines = _read_lines(self.path) if sinks else []
        written = [line for line in lines if line.get("stage") == phase]
        self._sinks: list[Sink] = []
        try:
            for name in sinks:
                self._sinks.append(Sink(name, self.path.parent, phase, written))
        except UserError:
            self.close(failed=True)
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line `{"step", "stage", "time", ...}`, time in seconds since 1970.

        Args:
          step: optimizer steps done.
          values: name -> number, JAX or numpy array, or string. What is not finite is written as
            null; TensorBoard gets the scalars.

        Raises:
          UserError: the disk is full, or the like.
        """
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        line = {"step": int(step), "stage": self.phase, "time": round(time.time(), 3)} | plain
        self._file.append((json.dumps(line, allow_nan=False) + "\n").encode())
        scalars = {
            f"{self.phase}/{name}": value
            for name, value in plain.items()
            if isinstance(value, int | float)
        }
        self._events.scalars(int(step), scalars)
        for sink in self._sinks:
            sink.put(line)

    def close(self, *, failed: bool = False) -> None:
        """Closes both files, and the sinks.

        Args:
          failed: whether an error ended the run, which trackers are told.
        """
        if self._file is None:
            return
        self._file.close()
        self._events.close()
        for sink in self._sinks:
            sink.close(failed=failed)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)

    def _drop_lines_after(self, step: int | None) -> None:
        """Rewrites the file without this phase's lines after `step`.

        A last line that was cut short goes too.
        """
        kept = [
            line
            for line in _read_lines(self.path)
            if step is None or line.get("stage") != self.phase or line["step"] <= step > 0
        ]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, in order.

    Null is NaN again. A last line that was cut short is left out.

    Raises:
      UserError: no such file, or a line that is no JSON object.
    """
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in _read_lines(Path(path))
    ]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of metrics.jsonl; raises UserError for one that is no JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as failure:
        raise UserError(f"{path}: cannot read: {failure.strerror}") from failure
    whole, _, _cut = text.rpartition("\n")
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(by_present_names(dict(json.loads(line))))
        except (ValueError, TypeError) as failure:
            raise UserError(
                f"{path}:{number}: not a JSON object; delete the line to go on"
            ) from failure
    return lines


def _plain(value: Any) -> Any:
    """Returns Python's numbers and lists of them, None for what is not finite."""
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    if not np.issubdtype(array.dtype, np.integer) and array.dtype != bool:
        # Through str, a float32 1.2 is written as 1.2 and not as 1.2000000476837158; read as
        # float32 it is the same number.
        number = float(str(array[()]))
        return number if math.isfinite(number) else None
    return array.item()
