"""The seconds of the parts of a step: each its own, and what a device computes with its part."""

import threading

import jax
import jax.numpy as jnp
import pytest

from rl.clock import Parts


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_a_part_within_another_has_its_seconds_alone():
    clock = Clock()
    parts = Parts(clock)
    parts.begin()
    clock.passes(1)
    for _ in range(2):
        with parts("gen"):
            clock.passes(2)
            with parts("reward"):
                clock.passes(3)
            clock.passes(4)
    with parts("update_actor"):
        clock.passes(5)
    found = parts.collect()
    assert found == {
        "timing_s/gen": 12, "timing_s/reward": 6, "timing_s/update_actor": 5, "step_time": 24,
    }  # fmt: skip
    clock.passes(1)
    assert parts.collect() == {"step_time": 25}, "the others are collected"
    parts.begin()
    assert parts.collect() == {"step_time": 0}


def test_some_parts_are_collected_by_themselves():
    clock = Clock()
    parts = Parts(clock)
    with parts("testing"):
        clock.passes(2)
    with parts("save_checkpoint"):
        clock.passes(3)
    assert parts.collect("testing") == {"timing_s/testing": 2}
    assert parts.collect("testing") == {"timing_s/testing": 0}
    assert parts.collect() == {"timing_s/save_checkpoint": 3}, "no step has begun"
    with parts("testing"):
        clock.passes(1)
    parts.begin()
    assert parts.collect() == {"step_time": 0}, "what a step before left is no part of this one"


def test_an_error_ends_its_parts():
    clock = Clock()
    parts = Parts(clock)
    with pytest.raises(ZeroDivisionError), parts("gen"), parts("reward"):
        clock.passes(2)
        1 / 0  # noqa: B018
    with parts("gen"):
        clock.passes(1)
    assert parts.collect() == {"timing_s/gen": 1, "timing_s/reward": 2}


def test_threads_have_parts_at_once():
    """A part of one thread is not within one of another, and those of one name add up."""
    clock = Clock()
    parts = Parts(clock)
    inside, done = threading.Event(), threading.Event()

    def rewarding():
        with parts("reward"):
            inside.set()
            assert done.wait(10)

    with parts("gen"):
        thread = threading.Thread(target=rewarding)
        thread.start()
        assert inside.wait(10)
        clock.passes(2)
        done.set()
        thread.join()
        with parts("reward"):
            clock.passes(1)
    assert parts.collect() == {"timing_s/gen": 2, "timing_s/reward": 3}


def test_until_waits_for_what_a_device_computes(monkeypatch):
    """JAX may return before: without the wait the seconds would be those of a later part."""
    waited = []
    block = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.append(tree) or block(tree))
    tree = {"x": jnp.ones(3), "n": 2}
    assert Parts().until(tree)["n"] == 2 and waited == [tree]
