"""Writes TensorBoard's scalars, each step at once, so that a full disk is an error and no silence.

SummaryWriter of tensorboardX hands events to a thread; where that thread fails, the run waits for
it for ever. Its message types and checksums are used here, its thread is not.
"""

import itertools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from files import AppendedFile

# protobuf makes the classes when the modules are imported
Event, SessionLog = vars(event_pb2)["Event"], vars(event_pb2)["SessionLog"]
Summary: Any = vars(summary_pb2)["Summary"]
PREFIX = "events.out.tfevents."


class EventFile:
    """A new file of events beside those of earlier starts of the run.

    TensorBoard reads the files of a directory in the order of their names, so the number in the
    name is one above those that are there, whatever the clock says.

    Args:
      directory: where the files are, created if need be.
      phase: the end of the name.
      first_step: the step from which on earlier events no longer count; None where all do.

    Raises:
      UserError: it cannot be written, here and in every method.
    """

    def __init__(self, directory: Path, phase: str, first_step: int | None):
        names = [path.name for path in directory.glob(f"{PREFIX}*")]
        numbers = (name.removeprefix(PREFIX).split(".")[0] for name in names)
        number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
        self._file = AppendedFile(
            directory / f"{PREFIX}{number:010d}.{socket.gethostname()}.{phase}"
        )
        self._write(file_version="brain.Event:2")
        if first_step is not None:
            self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the scalars of a step, by their tags."""
        found = itertools.starmap(_value, values.items())
        self._write(step=step, summary=Summary(value=found))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        """Appends a record: length and its checksum, the event and its checksum."""
        event = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checks = (struct.pack("<I", masked_crc32c(data)) for data in (length, event))
        self._file.append(length + next(checks) + event + next(checks))


def _value(tag: str, number: float) -> Any:
    return Summary.Value(tag=tag, simple_value=number)
