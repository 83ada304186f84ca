"""Doubles of the packages wandb, trackio and mlflow: what is used of them, and no more.

`test_the_doubles_are_like_the_packages` compares their signatures with the packages' where these
are installed.
"""

import dataclasses
import types
from typing import Any

import pytest


@dataclasses.dataclass
class Stored:
    """A run as a tracker has it."""

    name: str
    config: dict[str, Any]
    logged: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    ended: list[Any] = dataclasses.field(default_factory=list)
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, metric: str) -> list[tuple[int, float]]:
        return [(step, values[metric]) for step, values in self.logged if metric in values]


class FakeWandb(types.ModuleType):
    """`stored` has a run for each id; off line, one for each start."""

    def __init__(self):
        super().__init__("wandb")
        self.stored: dict[str, Stored] = {}

    class Settings:
        def __init__(self, *, console: str = "auto"):
            self.console = console

    def init(
        self,
        project: str | None = None,
        name: str | None = None,
        id: str | None = None,
        resume: Any = None,
        reinit: Any = None,
        dir: str | None = None,
        job_type: str | None = None,
        config: dict[str, Any] | None = None,
        settings: Any = None,
    ) -> Any:
        asked = dict(locals())
        assert name and id and settings.console == "off"
        resumed = resume == "allow" and id in self.stored
        key = id if resume == "allow" else f"{id} {len(self.stored)}"
        stored = self.stored.setdefault(key, Stored(name, dict(config or {})))
        stored.asked = asked
        return WandbRun(stored, resumed)


class WandbRun:
    def __init__(self, stored: Stored, resumed: bool):
        self._stored, self.resumed = stored, resumed

    @property
    def step(self) -> int:
        return max((step for step, _ in self._stored.logged), default=-1) + 1

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        if step < self.step - 1:
            pytest.fail(f"W&B takes no step {step} after {self.step - 1}")
        self._stored.logged.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self._stored.ended.append(exit_code)


class FakeTrackio(types.ModuleType):
    """`stored` has a run for each name. `lose` makes it forget what it was given last."""

    def __init__(self):
        super().__init__("trackio")
        self.stored: dict[str, Stored] = {}

    def init(
        self,
        project: str,
        name: str | None = None,
        group: str | None = None,
        config: dict | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> Any:
        asked = dict(locals())
        assert name and resume == "allow" and not embed
        stored = self.stored.setdefault(name, Stored(name, dict(config or {})))
        stored.asked = asked
        return TrackioRun(stored)

    def lose(self, after: int) -> None:
        for stored in self.stored.values():
            stored.logged = [each for each in stored.logged if each[0] <= after]


class TrackioRun:
    def __init__(self, stored: Stored):
        self._stored = stored
        self._next_step = max((step for step, _ in stored.logged), default=-1) + 1

    def log(self, metrics: dict, step: int | None = None) -> None:
        assert step is not None
        self._stored.logged.append((step, metrics))

    def finish(self) -> None:
        self._stored.ended.append(None)


@dataclasses.dataclass
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


@dataclasses.dataclass
class Param:
    key: str
    value: str


class FakeMlflow(types.ModuleType):
    """`stored` has a run for each id."""

    def __init__(self):
        super().__init__("mlflow")
        self.stored: dict[str, Stored] = {}
        self.experiments: list[str] = []
        self.entities = types.ModuleType("mlflow.entities")
        vars(self.entities).update({"Metric": Metric, "Param": Param})

    def MlflowClient(self) -> "MlflowClient":
        return MlflowClient(self)


class MlflowClient:
    def __init__(self, package: FakeMlflow):
        self._package = package

    def get_experiment_by_name(self, name: str) -> Any:
        if name not in self._package.experiments:
            return None
        return types.SimpleNamespace(experiment_id=str(self._package.experiments.index(name)))

    def create_experiment(self, name: str) -> str:
        self._package.experiments.append(name)
        return str(len(self._package.experiments) - 1)

    def create_run(
        self,
        experiment_id: str,
        tags: dict[str, Any] | None = None,
        run_name: str | None = None,
    ) -> Any:
        run_id = f"run {len(self._package.stored)}"
        self._package.stored[run_id] = Stored(run_name or "", {}, asked=dict(tags or {}))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str | None = None) -> None:
        self._package.stored[run_id].ended.append(status)

    def log_batch(
        self, run_id: str, metrics: list[Metric] | tuple = (), params: list[Param] | tuple = ()
    ) -> None:
        stored = self._package.stored[run_id]
        assert len(params) <= 100 and len(metrics) <= 1000, "MLflow takes no more at once"
        stored.config |= {each.key: each.value for each in params}
        if metrics:
            (step,) = {each.step for each in metrics}
            stored.logged.append((step, {each.key: each.value for each in metrics}))
            stored.asked["timestamp"] = metrics[0].timestamp

    def set_terminated(
        self, run_id: str, status: str | None = None, end_time: int | None = None
    ) -> None:
        self._package.stored[run_id].ended.append(status)


FAKES = {"wandb": FakeWandb, "trackio": FakeTrackio, "mlflow": FakeMlflow}
