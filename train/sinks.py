"""What follows metrics.jsonl into experiment trackers (`train.sinks`).

A sink sends each line of metrics.jsonl once, in order, in a thread of its own: a tracker that is
slow, or gone, holds nothing up, and one that fails costs a run one line of warning. What it has
sent last is in `sinks/NAME.json` of the workdir, with the id of the run there. So a run that goes
on goes on in the same run of the tracker: lines that the tracker lacks, because it failed, died
with the run or was not asked for yet, are sent first; steps that are taken again after a kill are
not sent again.
"""

import contextlib
import itertools
import queue
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from files import read_json, write_json
from train.trackers import TRACKERS, Started, Tracker

WAITING = 20_000  # lines that may wait to be sent, beside those that were there at the start
PATIENCE = 60.0  # seconds that the end of a run waits for them
OF_LINE = ("step", "stage", "time")  # what no metric is


class Place(NamedTuple):
    """A line of a phase's metrics: the number-th of a step, from 1 on."""

    step: int
    number: int


class Sink:
    """Sends the metrics of a run to a tracker.

    Args:
      name: of `TRACKERS`.
      workdir: the run's, with its config.json.
      phase: of the metrics.
      written: the lines of the phase that metrics.jsonl has.

    Raises:
      UserError: it is the first start, and the tracker cannot begin. A run that goes on does so
        without.
    """

    def __init__(self, name: str, workdir: Path, phase: str, written: Iterable[Mapping[str, Any]]):
        self.name, self._phase = name, phase
        self._path = workdir / "sinks" / f"{name}.json"
        self._record = read_json(self._path) if self._path.exists() else {}
        known = self._record.get(phase)
        self._sent = Place(known["step"], known["number"]) if known else Place(0, 0)
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING)
        self._failed, self._run_failed = False, False
        config = flat_config(workdir)
        run = Started(workdir, workdir.resolve().name, phase, config, known and known["id"])
        try:
            self._tracker: Tracker = TRACKERS[name](run)
            if self._tracker.last is not None:
                self._sent = min(self._sent, Place(self._tracker.last, sys.maxsize))
            self._note(self._sent)
        except Exception as error:
            if not known:
                raise UserError(f"train.sinks: {name} cannot begin: {line_of(error)}") from error
            self._fail(error)
            return
        self._thread = threading.Thread(
            target=self._follow, args=(written,), name=f"sink {name}", daemon=True
        )
        self._thread.start()

    def put(self, line: Mapping[str, Any]) -> None:
        """Has a line of metrics.jsonl sent, unless it has been. It never waits, and never fails."""
        if self._failed:
            return
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._fail("it takes lines more slowly than they come")

    def close(self, *, failed: bool = False) -> None:
        """Waits, for a while, until all is sent.

        Args:
          failed: whether an error ended the run.
        """
        if self._failed:
            return
        self._run_failed = failed
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
            self._thread.join(PATIENCE)
        if not self._failed and self._thread.is_alive():
            self._fail(f"{self._waiting.qsize():,} lines are not sent after {PATIENCE:.0f} s")

    def _follow(self, written: Iterable[Mapping[str, Any]]) -> None:
        """Sends what is written, then what is put, until None is."""
        place = Place(0, 0)
        try:
            for line in itertools.chain(written, iter(self._waiting.get, None)):
                if self._failed:
                    return
                number = place.number + 1 if line["step"] == place.step else 1
                place = Place(line["step"], number)
                if place <= self._sent:
                    continue
                if values := scalars(line):
                    self._tracker.log(place.step, values, float(line["time"]))
                self._note(place)
            self._tracker.close(failed=self._run_failed)
        except Exception as error:
            self._fail(error)

    def _note(self, place: Place) -> None:
        """Writes down what was sent last, and the tracker's id of the run."""
        self._record[self._phase] = {"id": self._tracker.id} | place._asdict()
        write_json(self._path, self._record)

    def _fail(self, why: Exception | str) -> None:
        self._failed = True
        words = why if isinstance(why, str) else line_of(why)
        print(
            f"warning: train.sinks: {self.name} gets no more of this run: {words}; metrics.jsonl "
            "goes on, and the next start sends what is missing",
            file=sys.stderr,
            flush=True,
        )


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a line that are finite numbers."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float) and name not in OF_LINE
    }


def flat_config(workdir: Path) -> dict[str, Any]:
    """Returns the config that a workdir records, dotted field -> value; {} where there is none."""
    path = workdir / "config.json"
    found = read_json(path).get("config") if path.exists() else None
    return dict(_flat(found)) if isinstance(found, Mapping) else {}


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def line_of(error: Exception) -> str:
    """Returns an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
