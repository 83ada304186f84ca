"""The experiment trackers that a run can log to: W&B, Trackio and MLflow.

Each is a package of its own, which is imported only where it is asked for. Its own environment
variables say where it writes and who does, and whether it is off line (docs/metrics.md).
"""

import importlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from errors import UserError

PROJECT = "athanor"
"""Of what a tracker's environment names no other project, or experiment, for."""
PARAMETERS = 100  # that MLflow takes at once


class Started(NamedTuple):
    """What a tracker is told of a run.

    Attributes:
      workdir: the run's.
      name: of the run.
      phase: "pretrain", "reinforce", ...
      config: dotted field -> its value.
      id: that the tracker gave the run when it first began; None where it begins now.
    """

    workdir: Path
    name: str
    phase: str
    config: Mapping[str, Any]
    id: str | None


class Tracker(Protocol):
    """A run in a tracker. Whatever goes wrong raises, the tracker's own error or another.

    Attributes:
      id: by which the tracker finds the run when it goes on.
      last: the last step that the tracker has of a run that goes on, 0 if that is none. What it was
        given last it may not have: a client that sends behind a run's back dies with it. None where
        it has all that it was given.
    """

    id: str
    last: int | None

    def log(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Logs scalars of a step; `when` is in seconds since 1970."""
        ...

    def close(self, *, failed: bool) -> None:
        """Ends the run, for now, and waits until all is sent."""
        ...


class Wandb:
    """A run of Weights & Biases, in the project WANDB_PROJECT.

    What it keeps on the disk is in the run's workdir, under wandb/. Off line each start has a
    directory there, which cannot go on from another: so it gets all of the run.
    """

    def __init__(self, run: Started):
        wandb: Any = importlib.import_module("wandb")
        self.id = run.id or new_id()
        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=self.id,
            resume=None if offline else "allow",
            reinit="create_new",
            dir=str(run.workdir),
            job_type=run.phase,
            config=dict(run.config),
            settings=wandb.Settings(console="off"),  # the terminal stays the run's own
        )
        self.last: int | None = self._run.step - 1 if self._run.resumed else 0

    def log(self, step: int, values: Mapping[str, float], when: float) -> None:
        """See `Tracker`. W&B takes the time from its own clock."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, in the project TRACKIO_PROJECT, on this machine unless TRACKIO_SPACE_ID.

    Trackio finds runs by their names, so the id is part of it.
    """

    def __init__(self, run: Started):
        trackio: Any = importlib.import_module("trackio")
        self.id = run.id or new_id()
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{run.name}-{self.id}",
            group=run.phase,
            config=dict(run.config),
            resume="allow",
            embed=False,
        )
        self.last: int | None = getattr(self._run, "_next_step", 0) - 1 if run.id else 0

    def log(self, step: int, values: Mapping[str, float], when: float) -> None:
        """See `Tracker`. Trackio takes the time from its own clock."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`. Trackio does not tell runs that failed from others."""
        self._run.finish()


class Mlflow:
    """A run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME at MLFLOW_TRACKING_URI."""

    def __init__(self, run: Started):
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        self.last: int | None = None
        if run.id is not None:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"phase": run.phase}
        self.id = self._client.create_run(number, run_name=run.name, tags=tags).info.run_id
        parameters = [self._entities.Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(parameters), PARAMETERS):
            some = parameters[first : first + PARAMETERS]
            self._client.log_batch(self.id, params=some)

    def log(self, step: int, values: Mapping[str, float], when: float) -> None:
        """See `Tracker`."""
        at = round(1000 * when)
        metrics = [
            self._entities.Metric(name, float(value), at, step) for name, value in values.items()
        ]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        ended = round(1000 * time.time())
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED", end_time=ended)


TRACKERS: dict[str, Callable[[Started], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}
"""By the name of the package that each needs, as `train.sinks` has it."""


def new_id() -> str:
    """Returns an id that no other run has."""
    return uuid.uuid4().hex[:12]


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for the first tracker whose package is not there, on process 0 alone."""
    for name in names if jax.process_index() == 0 else ():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.sinks: {name} is not installed; pip install {name}")
