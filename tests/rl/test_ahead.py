"""Sampling ahead of the trainer: whose policy samples what, in one thread and in two."""

import dataclasses
import functools
import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from errors import UserError
from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl.ahead import Ahead
from rl.clock import Parts
from rl.sampler import Sampled, Sampler
from rl.weights import Weights, fingerprint
from tests import tiny
from tests.rl.test_engine import MESH, assert_same
from tests.rl.test_rollouts import MODEL, PARTS, numbers_of, rollouts, tokens_of, variables_of


class OfRollouts(Sampler):
    """A sampler of rollouts alone. It fails at one step, or waits for an event in it."""

    def __init__(self, fails_at: int = 0, waits_at: int = 0, **changes):
        self._rollouts = rollouts(**changes)
        self._generate = self._rollouts._generate
        self._canary, self._greedy, self._judged = None, None, False
        self._parts = Parts()
        self.setup = SimpleNamespace(mesh=MESH)  # pyright: ignore
        self.fails_at, self.waits_at = fails_at, waits_at
        self.began, self.may_end = threading.Event(), threading.Event()
        self.threads: set[str] = set()

    def take(self, step: int, variables: dict) -> Sampled:
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise OSError("the sampler is gone")
        if step == self.waits_at:
            self.began.set()
            assert self.may_end.wait(60)
        return super().take(step, variables)


def weights(*, checked: bool = True) -> Weights:
    return Weights(MODEL, MESH, checked=checked)


def taken(own: Ahead, first: int, last: int) -> list[Sampled]:
    return [own.take(step, variables_of(step)) for step in range(first, last + 1)]


def assert_equal(found: list[Sampled], expected: list[Sampled]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert numbers_of(one.groups) == numbers_of(other.groups)
        for each, its in zip(tokens_of(one.groups), tokens_of(other.groups), strict=True):
            assert_same(each, its)


@functools.cache
def in_turn(lag: int) -> list[Sampled]:
    with Ahead(OfRollouts(lag=lag), lag) as own:
        return taken(own, 1, 6)


@pytest.mark.heavy
def test_a_lag_is_that_of_the_policy_and_of_nothing_else():
    """Each step's groups are those of its number, by the policy of two steps before; a run that
    goes on from its state has them too.
    """
    with Ahead(OfRollouts(lag=2), 2) as own:
        taken(own, 1, 3)
        state = json.loads(json.dumps(own.get_state()))
        found = own.metrics(6, taken(own, 4, 6)[-1])
    for step, each in enumerate(in_turn(2), start=1):
        assert numbers_of(each.groups) == [2 * step - 2, 2 * step - 1]
        versions = [set(t.versions_T[t.sampled_T]) for t in tokens_of(each.groups)]
        assert versions == [{max(step - 3, 0)}] * len(versions)
    with Ahead(OfRollouts(lag=2), 2) as again:
        again.set_state(state)
        resumed = taken(again, 4, 6)
    assert_equal(resumed, in_turn(2)[3:])
    assert [each.counts for each in resumed] == [each.counts for each in in_turn(2)[3:]]
    assert found["sampling/staleness/mean"] == found["sampling/staleness/max"] == 2
    assert [found[f"sampling/staleness/share_{age}"] for age in range(3)] == [0, 0, 1]


@pytest.mark.heavy
def test_a_step_of_parts_has_tokens_of_several_ages():
    with Ahead(OfRollouts(**PARTS), 0) as own:
        found = [own.metrics(step, own.take(step, variables_of(step))) for step in range(1, 7)]
    assert {each["sampling/staleness/max"] for each in found} >= {0, 1}
    assert all(each["sampling/staleness/mean"] <= each["sampling/staleness/max"] for each in found)


@pytest.mark.heavy
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_thread_of_its_own_changes_nothing(lag):
    """To the bit, whoever is faster; the variables are gone when the trainer goes on."""
    sampler = OfRollouts(lag=lag)
    with Ahead(sampler, lag, weights()) as own:
        found = []
        for step in range(1, 7):
            variables = variables_of(step)
            found.append(own.take(step, variables))
            jax.tree.map(lambda x: x.delete(), variables)
    assert_equal(found, in_turn(lag))
    (name,) = sampler.threads
    assert name.startswith("sampler") and name != threading.current_thread().name


@pytest.mark.heavy
def test_both_work_at_once():
    """The trainer has the groups of its step while those of the next are being sampled."""
    sampler = OfRollouts(lag=1, waits_at=2)
    with Ahead(sampler, 1, weights()) as own:
        own.take(1, variables_of(1))
        own.take(2, variables_of(2))  # which the first policy sampled
        assert sampler.began.wait(60) and not sampler.may_end.is_set()
        sampler.may_end.set()
        assert_equal([own.take(3, variables_of(3))], in_turn(1)[2:3])


@pytest.mark.heavy
def test_what_a_checkpoint_has_waits_for_the_sampler():
    """Noted before it is done, and read after; a run goes on from there to the bit."""
    sampler = OfRollouts(lag=1, waits_at=3)
    with Ahead(sampler, 1, weights()) as own:
        taken(own, 1, 3)
        assert sampler.began.wait(60)
        place = own.place()
        sampler.may_end.set()
        own.settle()
        states = [json.loads(json.dumps(each.get_state())) for each in (place, own)]
    assert states[0] == states[1]
    with Ahead(OfRollouts(lag=1), 1, weights()) as again:
        again.set_state(states[0])
        assert_equal(taken(again, 4, 6), in_turn(1)[3:])


@pytest.mark.heavy
@pytest.mark.parametrize("apart", [False, True])
def test_a_sampler_that_fails_loses_no_step(apart):
    """What was asked for later fails too; the place noted before goes on without it, and what
    failed is sampled by the next policy.
    """
    sampler = OfRollouts(lag=2, fails_at=3)
    with Ahead(sampler, 2, weights() if apart else None) as own:
        taken(own, 1, 2)
        place = own.place()
        with pytest.raises(OSError, match="the sampler is gone"):
            for step in range(3, 9):
                own.take(step, variables_of(step))
                place = own.place()
        state = json.loads(json.dumps(place.get_state()))
        with pytest.raises(OSError, match="the sampler is gone"):
            own.settle()
    with Ahead(OfRollouts(lag=2), 2) as again:
        again.set_state(state)
        waiting = len(state["waiting"])
        first = 5 - waiting  # four steps had been sampled
        assert_equal(taken(again, first, 4), in_turn(2)[first - 1 : 4])
        assert numbers_of(again.take(5, variables_of(5)).groups) == [8, 9]


@pytest.mark.heavy
def test_weights_that_change_on_their_way_stop_the_run(monkeypatch):
    put = jax.device_put

    def wrongly(x, *where, **how):
        return put(jax.tree.map(lambda x: x.at[(0,) * x.ndim].multiply(1.001), x), *where, **how)

    monkeypatch.setattr("rl.weights.jax.device_put", wrongly)
    message = "step 1: the weights that reached the sampler are not"
    with pytest.raises(UserError, match=message), Ahead(OfRollouts(lag=1), 1, weights()) as own:
        own.take(1, variables_of(1))
    with Ahead(OfRollouts(lag=1), 1, weights(checked=False)) as own:
        own.take(1, variables_of(1))


def test_an_error_does_not_wait_for_what_is_sampled():
    """A rollout without end is left in its midst."""
    sampler = OfRollouts(lag=1)
    rollout, began = sampler._rollouts, threading.Event()

    class Endless:
        counts = SimpleNamespace(sampled=0)
        busy = True

        def step(self):
            began.set()
            return []

        def __getattr__(self, _):
            return lambda *_: None

    rollout._generate.engine = Endless()  # pyright: ignore
    rollout._config = dataclasses.replace(rollout._config, unfinished="kept")
    job = threading.Thread(target=leave_in_the_midst, args=(sampler, began))
    job.start()
    job.join(60)
    assert not job.is_alive()


def leave_in_the_midst(sampler: Sampler, began: threading.Event) -> None:
    with pytest.raises(ZeroDivisionError), Ahead(sampler, 1, weights()) as own:
        asked = threading.Thread(target=lambda: own._executor.submit(sampler._rollouts.take, 1, {}))
        asked.start()
        assert began.wait(60)
        raise ZeroDivisionError


def test_a_fingerprint_is_of_the_bits_and_not_of_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2, tensor=1))
    apart = Weights(MODEL, mesh, checked=True)
    variables = tiny.variables(MODEL)
    there = apart.sent(variables, 1)()
    assert jax.tree.leaves(there)[0].sharding.mesh == mesh
    own = np.asarray(jax.jit(fingerprint)(variables))
    np.testing.assert_array_equal(jax.jit(fingerprint)(there), own)
    for end in (0, -1):
        nudged = jax.tree.map(functools.partial(with_one_bit_more, end=end), variables)
        assert (np.asarray(jax.jit(fingerprint)(nudged)) != own).all()


def with_one_bit_more(x: jax.Array, end: int) -> np.ndarray:
    flat = np.array(x).ravel()
    flat[end] = np.nextafter(flat[end], np.float32(9))
    return flat.reshape(x.shape)
