"""launch.reinforce with a mesh in two: some devices sample while the others learn."""

import threading
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import pytest
from ml_collections import ConfigDict

from errors import UserError
from experiment import setup
from experiment.schema import Config
from launch import reinforce
from model.sharding import make_mesh
from rl.learner import Learner
from rl.sampler import Sampler
from tests.launch.documented_metrics import check_documented
from tests.launch.test_reinforce import (
    in_a_place_with_rewards,  # noqa: F401, a fixture that every test has
    lines,
    run_of,
)
from tests.launch.test_training_commands import final_variables, stopped_at

pytestmark = pytest.mark.command

EVERY = jax.devices()
TWO = ConfigDict({"data": 1, "fsdp": 2, "expert": 1, "tensor": 1})


@pytest.fixture
def sees(monkeypatch) -> Callable[[int], None]:
    """Sets how many devices there are."""
    monkeypatch.setattr(setup, "make_mesh", make_mesh)
    return lambda count: monkeypatch.setattr(jax, "devices", lambda: EVERY[:count])


def lagging(**changes) -> Config:
    given = {"reinforce__lag": 2, "reinforce__algorithm": "cispo", "train__steps": 5}
    return run_of("length", **given | changes)


def test_who_samples_elsewhere_samples_the_same(sees):
    """To the bit what one device does in turns, with its evaluation."""
    found = {}
    for apart in (0, 1):
        sees(1 + apart)
        config = lagging(reinforce__sampler_devices=apart, train__eval_every=2)
        assert reinforce.run(config, Path(f"apart_{apart}"))
        found[apart] = lines(f"apart_{apart}"), lines(f"apart_{apart}", "validation_reward")
        assert final_variables(config, Path(f"apart_{apart}"))["params"]
    assert found[1] == found[0] and [len(each) for each in found[0]] == [5, 3]
    chex.assert_trees_all_equal(*(final_variables(lagging(), Path(f"apart_{n}")) for n in (0, 1)))


@pytest.mark.mesh
def test_four_devices_sample_while_four_learn(sees, monkeypatch):
    """Stopped and resumed to the bit. Both threads are seen at work at the same time."""
    sees(8)
    config = lagging(
        reinforce__sampler_devices=4,
        reinforce__sampler_mesh=ConfigDict({"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}),
        mesh__fsdp=2,
        reinforce__keep_routing=True,
    )
    at_work, together = set(), []

    def noted(kind: type, name: str):
        method = getattr(kind, name)

        def watched(*args, **options):
            at_work.add(name)
            together.append(set(at_work))
            try:
                return method(*args, **options)
            finally:
                at_work.discard(name)

        monkeypatch.setattr(kind, name, watched)

    noted(Sampler, "take")
    noted(Learner, "__call__")
    assert reinforce.run(config, Path("whole"))
    assert {"take", "__call__"} in together
    with monkeypatch.context() as patch:
        stopped_at(3, patch)
        assert not reinforce.run(config, Path("parts"))
    assert not [each for each in threading.enumerate() if each.name.startswith("sampler")]
    assert reinforce.run(config, Path("parts"))
    assert lines("parts") == lines("whole")
    chex.assert_trees_all_equal(*(final_variables(config, Path(n)) for n in ("parts", "whole")))
    assert [line["sampling/staleness/max"] for line in lines("whole")] == [0, 1, 2, 2, 2]
    check_documented("whole", "split", "lag", "experts compared")
    assert max(line["sampling/canary_gap"] for line in lines("whole")) < 1e-4


def test_a_sampler_that_fails_costs_no_step(sees, monkeypatch):
    """Its error ends the run with one line; what was learnt is saved, and gone on from."""
    sees(2)
    config = lagging(reinforce__sampler_devices=1, train__steps=6)
    taken = Sampler.take

    def fails(sampler, step, variables):
        if step == 4:
            raise UserError("the sampler is gone")
        return taken(sampler, step, variables)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "take", fails)
        with pytest.raises(UserError, match=r"the sampler is gone; step [3-5] is saved"):
            reinforce.run(config, Path("run"))
    done = len(lines("run"))
    assert reinforce.run(config, Path("run"))
    assert [line["step"] for line in lines("run")] == list(range(1, 7)) and done >= 3


def test_devices_that_are_not_there_are_one_line(sees):
    sees(2)
    for changes, message in (
        ({"sampler_devices": 2}, "leaves none of 2 device"),
        ({"sampler_devices": -1}, "must not be negative|at least 0"),
        (
            {"sampler_devices": 1, "sampler_mesh": TWO},
            "reinforce.sampler_mesh data=1,fsdp=2,expert=1,tensor=1 needs 2 devices",
        ),
    ):
        with pytest.raises(UserError, match=message):
            reinforce.run(
                lagging(**{f"reinforce__{k}": v for k, v in changes.items()}), Path("run")
            )
