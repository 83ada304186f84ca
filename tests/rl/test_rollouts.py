"""Groups that are sampled in parts: what a step takes, what goes on, and where a run resumes."""

import dataclasses
import functools
import json
from base64 import b64decode
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest

from data.tasks.problem import Problem
from errors import UserError
from model.record import CHOICES
from rl.config import ReinforceConfig, SamplingConfig
from rl.curriculum import Curriculum
from rl.engine import Engine
from rl.generate import Completion
from rl.pay import Rewards
from rl.problems import problem_of_draw
from rl.request import Prompt
from rl.rollouts import Group, Rollouts, Taken
from rl.trajectory import STOP, UNFINISHED, Trajectory
from rl.trajectory_bytes import from_bytes, to_bytes
from tests import tiny
from tests.rl.test_engine import MESH, MODELS, assert_same, by_number
from tests.rl.test_recorded import conversations
from tests.rl.test_support import conversations as restricted
from tests.rl.test_turns import NEW, WIDTH, engine, prompts_of
from tests.trajectories import trajectory

MODEL, SIZE = MODELS["mla"], 2
PROBLEMS = [Problem(f"what is {n}?", str(n), trace="", ops=1) for n in range(5)]
CONFIG = ReinforceConfig(prompts_per_step=2, group_size=SIZE)


def test_trajectories_come_back_from_bytes_with_their_records():
    """Those with records of choices, of supports, and without any, in one file."""
    plain = trajectory([1, 2], [3], group=4)
    cut = dataclasses.replace(trajectory([1], [], group=5), ended=UNFINISHED, sample=3)
    given = [*conversations().values(), plain, *restricted().values(), cut]
    back = from_bytes(to_bytes(given))
    assert {each.routes_TLK is None for each in back} == {True, False}
    assert {each.support_T is None for each in back} == {True, False}
    for one, other in zip(given, back, strict=True):
        assert_same(one, other)
        assert (one.ended, one.group, one.sample) == (other.ended, other.group, other.sample)
    assert from_bytes(to_bytes([])) == []


@pytest.mark.heavy
def test_what_is_taken_out_goes_on():
    """In another engine, with the same weights: the same tokens. What it had stays as it was, and
    log-probs after it are those of a pass over it, up to the order of sums.
    """
    expected = by_number(engine("mla").run(prompts_of(7, new=20)))
    own = engine("mla")
    ended = list(own.run(prompts_of(7, new=20), most_tokens=30))
    begun = own.take_out()
    assert not own.busy and len(ended) + len(begun) == 7
    assert any(0 < each.sampled_T.sum() < 20 for each in begun)
    other = engine("mla", rows=3)
    for prompt in prompts_of(7, new=20):
        of_prompt = [each for each in [*ended, *begun] if each.group == prompt.group]
        other.submit(prompt, {each.sample: each for each in of_prompt})
    found = by_number([*ended, *other.run()])
    had = {(each.group, each.sample): len(each.tokens_T) for each in begun}
    for number, each in expected.items():
        np.testing.assert_array_equal(found[number].tokens_T, each.tokens_T)
        kept = slice(had.get(number, len(each.tokens_T)))
        np.testing.assert_array_equal(found[number].logprobs_T[kept], each.logprobs_T[kept])
        tiny.assert_close(found[number].logprobs_T, each.logprobs_T, atol=1e-5)
        assert found[number].ended == each.ended


@pytest.mark.heavy
def test_siblings_that_have_only_their_prompt_are_read_once_when_read_again():
    own = engine("mla", rows=2)
    (prompt,) = prompts_of(1, new=20)
    keys_G2 = np.concatenate([each.keys_G2 for each in prompts_of(6)])
    prompt = dataclasses.replace(prompt, keys_G2=keys_G2)
    ended = list(own.run([prompt], most_tokens=5))
    before = dataclasses.replace(own.counts)
    own.load(tiny.variables(MODEL), read_again=True)
    ended += own.run()
    assert sorted(each.sample for each in ended) == list(range(6))
    began = own.counts.since(before).read - len(prompt.tokens)  # those of two rows in slots
    assert 2 * len(prompt.tokens) < began <= 2 * (len(prompt.tokens) + 8)


@pytest.mark.heavy
def test_what_is_in_the_slots_is_not_disturbed():
    """By an evaluation in the midst, with other weights: it goes on to the bit."""
    expected = by_number(engine("mla").run(prompts_of(7, new=20)))
    own, variables = engine("mla"), tiny.variables(MODEL)
    found = list(own.run(prompts_of(7, new=20), most_tokens=30))
    with own.loaded(jax.tree.map(lambda x: x * 1.05, variables)):
        assert len(list(own.run(prompts_of(3, new=5, first=9)))) == 3
        own.submit(prompts_of(1)[0])
    assert own.busy
    own.load(variables)
    for number, each in by_number([*found, *own.run()]).items():
        assert_same(each, expected[number])


@pytest.mark.heavy
def test_after_a_rejected_draft_nothing_is_read_again():
    sampling = SamplingConfig(
        max_prompt_tokens=WIDTH, max_new_tokens=NEW, drafts=1, draft_acceptance="rejection"
    )
    own = Engine(dataclasses.replace(MODEL, num_nextn_predict_layers=1), MESH, sampling, rows=2)
    variables = tiny.variables(dataclasses.replace(MODEL, num_nextn_predict_layers=1))
    own.load(variables)
    next(own.run(prompts_of(3, new=20), most_tokens=30), None)
    with pytest.raises(UserError, match="as its last draft may have been rejected; 'coupled' can"):
        own.load(variables, read_again=True)


class Lengths:
    """A generator whose prompts are numbers, and whose completions have lengths of 3 to 40."""

    def __init__(self, rows: int = 3, record: tuple[str, ...] = ()):
        sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
        self.sampling = sampling
        self.engine = Engine(MODEL, MESH, sampling, rows=rows, steps=3, record=record)

    def prompt(self, problem: Problem, keys_G2: np.ndarray, group: int) -> Prompt:
        new = (3, 40, 8, 25, 12)[group % 5]
        return Prompt(list(range(20, 22 + group % 7)), keys_G2, new, group=group)

    def completion(self, trajectory: Trajectory) -> Completion:
        return Completion(trajectory, "")


def variables_of(step: int) -> dict:
    """Those that a step samples with: each has others."""
    return jax.tree.map(lambda x: x * (1 + 0.01 * step), tiny.variables(MODEL))


def rollouts(**changes) -> Rollouts:
    config = dataclasses.replace(CONFIG, **changes)
    generate = Lengths(record=CHOICES)
    curriculum = Curriculum(PROBLEMS, config, draws=16, seed=0)
    given = generate, PROBLEMS, curriculum, config, pay, solves, jax.random.key(1)
    return Rollouts(*given)  # pyright: ignore


def pay(problem: Problem, completions: Sequence[Completion]) -> Rewards:
    """One for an even first id, so that about half of the groups of two differ."""
    ids = [int(each.trajectory.completion[0]) for each in completions]
    return Rewards(("even",), np.ones(1, np.float32), 1 - np.asarray([[ids]], np.float32) % 2)


def solves(rewards: Rewards) -> np.ndarray:
    return rewards.total_PG.ravel() == 1


def steps_of(own: Rollouts, first: int, last: int) -> Iterator[list[Group]]:
    for step in range(first, last + 1):
        yield own.take(step, variables_of(step)).groups


def numbers_of(groups: list[Group]) -> list[int]:
    return [group.completions[0].trajectory.group for group in groups]


def tokens_of(groups: list[Group]) -> list[Trajectory]:
    return [each.trajectory for group in groups for each in group.completions]


PARTS = {"prompts_in_flight": 4, "rollout_tokens": 40}


@functools.cache
def in_parts(unfinished: str) -> list[list[Group]]:
    return list(steps_of(rollouts(unfinished=unfinished, **PARTS), 1, 8))


@pytest.mark.heavy
def test_by_default_a_step_waits_for_all_that_it_begins():
    for step, groups in enumerate(steps_of(rollouts(), 1, 2), start=1):
        assert numbers_of(groups) == [2 * step - 2, 2 * step - 1]
        for each in tokens_of(groups):
            assert each.ended != UNFINISHED and set(each.versions_T[each.sampled_T]) == {step - 1}
        assert [group.problem for group in groups] == [
            problem_of_draw(number, PROBLEMS, 0) for number in numbers_of(groups)
        ]


@pytest.mark.heavy
@pytest.mark.parametrize("unfinished", ["read_again", "kept"])
def test_each_group_is_learnt_from_once_whenever_it_is_complete(unfinished):
    """Some are by several policies, some steps have fewer groups than they may, none has none."""
    steps = in_parts(unfinished)
    numbers = [number for groups in steps for number in numbers_of(groups)]
    assert len(set(numbers)) == len(numbers) and numbers != sorted(numbers)
    assert {len(groups) for groups in steps} == {1, 2}
    several = 0
    for step, groups in enumerate(steps, start=1):
        for each in tokens_of(groups):
            assert len(each.completion) == (3, 40, 8, 25, 12)[each.group % 5]
            versions_N = each.versions_T[each.sampled_T]
            assert (np.diff(versions_N) >= 0).all() and versions_N[-1] < step
            assert each.routes_TLK is not None and len(each.routes_TLK) == len(each.tokens_T)
            several += len(set(versions_N)) > 1
        assert [each.sample for each in tokens_of(groups)] == list(range(SIZE)) * len(groups)
    assert several > 3


@pytest.mark.heavy
@pytest.mark.parametrize("unfinished", ["read_again", "kept"])
def test_a_run_resumes_to_the_bit(unfinished):
    """From its state, by way of JSON, in another engine. Where caches are kept, both runs have
    saved at the same step.
    """
    whole = rollouts(unfinished=unfinished, **PARTS)
    first = list(steps_of(whole, 1, 4))
    whole.settle()
    state = json.loads(json.dumps(whole.get_state()))
    assert any(each.sampled_T.any() for each in from_bytes(b64decode(state["trajectories"])))
    expected = list(steps_of(whole, 5, 8))
    resumed = rollouts(unfinished=unfinished, **PARTS)
    resumed.set_state(state)
    for one, other in zip(expected, steps_of(resumed, 5, 8), strict=True):
        assert numbers_of(one) == numbers_of(other)
        for each, its in zip(tokens_of(one), tokens_of(other), strict=True):
            assert_same(each, its)
            assert each.ended == its.ended
    if unfinished == "read_again":
        flat = [each for groups in [*first, *expected] for each in tokens_of(groups)]
        never_saved = [each for groups in in_parts("read_again") for each in tokens_of(groups)]
        for each, its in zip(flat, never_saved, strict=True):
            assert_same(each, its)


@pytest.mark.heavy
def test_what_is_not_saved_begins_anew():
    """A place that is taken while caches are kept has no tokens of what is in the engine."""
    own = rollouts(unfinished="kept", **PARTS)
    list(steps_of(own, 1, 3))
    state, flying = own.place().get_state(), own.metrics(own.take(4, variables_of(4)))
    again = rollouts(unfinished="kept", **PARTS)
    again.set_state(state)
    assert state["begun"] == again.get_state()["begun"] and flying["unfinished"] >= 2
    for each in from_bytes(b64decode(state["trajectories"])):
        assert each.ended != UNFINISHED
    for each in tokens_of(again.take(4, variables_of(4)).groups):
        assert each.ended != STOP


def test_metrics_tell_of_parts_alone():
    taken = Taken([Group(PROBLEMS[0], [], pay(PROBLEMS[0], tokens_of_one()))], [])
    assert rollouts().metrics(taken) == {}
    assert rollouts(**PARTS).metrics(taken) == {"groups": 1, "unfinished": 0}


def tokens_of_one() -> list[Completion]:
    return [Completion(trajectory([1], [2, 3, 4]), "")]


def differs(group: Group) -> bool:
    return np.ptp(group.rewards.total_PG) > 0


@pytest.mark.heavy
def test_what_teaches_nothing_is_dropped_or_replaced():
    """Replaced, a step has as many groups as it may, each of them differing; what it sampled for
    that is left out. Dropped, it has those that are left.
    """
    plain = [rollouts().take(step, variables_of(step)) for step in (1, 2, 3)]
    assert any(differs(g) for t in plain for g in t.groups)
    assert not all(differs(g) for t in plain for g in t.groups)
    own = rollouts(zero_variance="dropped")
    for step, taken in enumerate(plain, start=1):
        found = own.take(step, variables_of(step))
        expected = [group for group in taken.groups if differs(group)]
        assert numbers_of(found.groups) == numbers_of(expected or taken.groups)
        assert len(found.groups) + len(found.left_out) == 2
    own = rollouts(zero_variance="replaced")
    begun = []
    for step in (1, 2, 3):
        found = own.take(step, variables_of(step))
        assert len(found.groups) == 2 and all(map(differs, found.groups))
        assert not any(map(differs, found.left_out))
        begun += numbers_of([*found.groups, *found.left_out])
        assert own.metrics(found) == {"groups": 2, "left_out": len(found.left_out)}
    assert sorted(begun) == list(range(len(begun))) and len(begun) > 6


@pytest.mark.heavy
def test_a_step_does_not_sample_for_ever():
    """Where nothing differs it stops at the limit, and learns from what it has."""
    own = rollouts(zero_variance="replaced", resample_limit=3, variance_reward="")
    own._pay = lambda problem, completions: Rewards(
        ("same",), np.ones(1, np.float32), np.zeros((1, 1, SIZE), np.float32)
    )
    taken = own.take(1, variables_of(1))
    assert len(taken.groups) == 2 and len(taken.left_out) == 4
    own = rollouts(zero_variance="dropped")
    own._pay = lambda problem, completions: Rewards(
        ("same",), np.ones(1, np.float32), np.zeros((1, 1, SIZE), np.float32)
    )
    taken = own.take(1, variables_of(1))
    assert len(taken.groups) == 2 and not taken.left_out


@pytest.mark.heavy
def test_replacing_and_a_curriculum_resume_to_the_bit():
    changes = {"zero_variance": "replaced", "order": "unsolved", "retire_at": 0.9, **PARTS}
    whole = rollouts(**changes)
    list(steps_of(whole, 1, 3))
    whole.settle()
    state = json.loads(json.dumps(whole.get_state()))
    resumed = rollouts(**changes)
    resumed.set_state(state)
    for step in (4, 5, 6):
        one, other = (own.take(step, variables_of(step)) for own in (whole, resumed))
        assert numbers_of(one.groups) == numbers_of(other.groups)
        assert [group.problem for group in one.groups] == [group.problem for group in other.groups]
        for each, its in zip(tokens_of(one.groups), tokens_of(other.groups), strict=True):
            assert_same(each, its)
        assert whole.metrics(one) == resumed.metrics(other)
    gone = rollouts(**changes)
    gone._problems = PROBLEMS[:1]
    with pytest.raises(UserError, match="the run has completions of it to learn from"):
        gone.set_state(state)


def test_bounds_that_cannot_be_are_one_line():
    for changes, message in (
        ({"prompts_in_flight": 1}, "prompts_in_flight = 1: must be 0 or at least"),
        ({"rollout_tokens": -1}, "rollout_tokens = -1"),
        ({"unfinished": "dropped"}, "unfinished = 'dropped'"),
        ({"lag": -1}, "lag = -1"),
        ({"lag": 3, "most_stale": 2}, "most_stale = 2: must be at least reinforce.lag = 3"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(CONFIG, **changes)
    assert not CONFIG.in_parts and CONFIG.in_flight == 2
    assert dataclasses.replace(CONFIG, prompts_in_flight=2).in_parts is False
    assert dataclasses.replace(CONFIG, prompts_in_flight=3).in_parts
    assert dataclasses.replace(CONFIG, rollout_tokens=1).in_parts
