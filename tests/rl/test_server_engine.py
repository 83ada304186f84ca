"""An engine outside: what comes back is what our own samples.

The server of tests/model_server.py samples by our own engine with the key that the seed says, so
that completions and log-probs must be the same to the bit.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints.hf.safetensors import TensorFiles
from errors import UserError
from rl.canary import TOKENS_OUTSIDE, Canary
from rl.generate import Generator
from rl.halting import StopSequences, ThinkingBudget
from rl.request import Prompt, Row, Turn
from rl.servers.engine import seed_of
from rl.trajectory import UNFINISHED, Role, Trajectory
from tests.model_server import ModelServer
from tests.rl.served import (
    MESH,
    SAMPLING,
    STOPS,
    assert_same,
    connected,
    engine_of,
    expected_by,
    own_engine,
    prompts_of,
    sampled,
)
from tests.tiny_checkpoint import MODEL
from train.restore import load_variables


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_server_samples_what_this_process_does(
    api, serve, served_setup, policy, expected, tmp_path
):
    """By the weights that it is handed, in a directory that keeps the newest alone, and which are
    written once however often they are loaded; by the old ones when these are handed over again.
    """
    served = serve(api)
    server = connected(served, served_setup, tmp_path)
    engine = engine_of(server)
    with engine.loaded(policy, version=7):
        assert_same(sampled(engine, prompts_of()), expected)
    assert len({len(each.tokens_T) for each in expected.values()}) > 3  # some stopped
    with engine.loaded(policy, version=7):
        assert_same(sampled(engine, prompts_of()), expected)
    assert served.loaded == [str(tmp_path / "served" / server.version)]
    of_origin = load_variables(MODEL, MESH, f"hf:{served.origin}")
    with engine.loaded(of_origin):
        found = sampled(engine, prompts_of())
    assert {number: each.tokens_T.tolist() for number, each in found.items()} == {
        number: each.tokens_T.tolist()
        for number, each in expected_by(served.origin, 1.0, 1.0).items()
    }
    assert [path.name for path in (tmp_path / "served").iterdir()] == [server.version]
    assert engine.counts.sampled == sum(
        int(each.sampled_T.sum()) for some in (expected, expected, found) for each in some.values()
    )
    assert not engine.busy and 1 < served.most <= 8


def test_seeds_and_types(serve, served_setup, policy, tmp_path):
    """A completion's seed is its key, another where it goes on, and none where none is wanted; the
    weights have the type that is asked for.
    """
    served = serve()
    sampling = dataclasses.replace(SAMPLING, server_seeds=False, dtype="bfloat16")
    server = connected(served, served_setup, tmp_path, sampling)
    engine = engine_of(server, sampling)
    with engine.loaded(policy):
        assert len(sampled(engine, prompts_of(1))) == 2
    assert served.asked[-1]["seed"] is None
    names = TensorFiles(Path(served.loaded[-1])).dtypes.values()
    assert {str(dtype) for dtype in names} == {"bfloat16"}
    (prompt,) = prompts_of(1)
    one, other = Row.begin(prompt, 0), Row.begin(prompt, 1)
    seeds = {seed_of(one, 3), seed_of(one, 4), seed_of(one, 5), seed_of(other, 3)}
    assert len(seeds) == 4 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    words = np.frombuffer(seed_of(one, 3).to_bytes(8, "big", signed=True), ">u4")
    np.testing.assert_array_equal(words, prompt.keys_G2[0])


def conversation(trajectory: Trajectory) -> Turn | None:
    turns = int(np.sum(trajectory.roles_T == Role.TOOL)) // 2
    return Turn((80, 81), Role.TOOL, 4, STOPS) if turns < 2 else None


def test_turns_and_halts(serve, served_setup, policy, tmp_path):
    """Greedy, which needs no seeds: a tool speaks between, and a text ends a turn."""
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    prompts = prompts_of(3, max_new_tokens=4, reply=conversation)
    own = own_engine(greedy)
    own.load(policy)
    first = sampled(own, prompts)[0, 0].completion
    pair = tuple(map(int, first[1:3]))
    prompts.append(
        dataclasses.replace(prompts_of(1)[0], halts=StopSequences((pair,)), group=9, stops=())
    )
    expected = sampled(own, prompts)
    engine = engine_of(connected(serve(), served_setup, tmp_path), greedy)
    engine.load(policy)
    assert_same(sampled(engine, prompts), expected, atol=1e-5)
    assert expected[9, 0].completion.tolist()[-2:] == list(pair)
    assert any(each.roles_T.tolist().count(Role.TOOL) == 4 for each in expected.values())


class Letters:
    """A text that has a letter for each id."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 256 for letter in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(256 + each) for each in ids)


def test_thoughts_are_cut(serve, served_setup, policy, tmp_path):
    """As by the own engine: some end by themselves, and what was sampled beyond is dropped."""
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    own = own_engine(greedy)
    own.load(policy)
    plain = sampled(own, prompts_of(3, stops=()))
    end = Letters().decode(plain[1, 0].completion[2:3].tolist())
    budget = ThinkingBudget(Letters(), 6, 4, (), end=end, interruption=Letters().decode([80]) + end)
    prompts = [budget.prompt(p.tokens, p.keys_G2, group=p.group) for p in prompts_of(3)]
    expected = sampled(own, prompts)
    cut = {bool((each.roles_T == Role.INJECTED).any()) for each in expected.values()}
    assert cut == {True, False}
    engine = engine_of(connected(serve(), served_setup, tmp_path), greedy)
    engine.load(policy)
    assert_same(sampled(engine, prompts), expected, atol=1e-5)


LONG = dataclasses.replace(SAMPLING, max_new_tokens=60, temperature=0.0)


def long_server(serve, api: str) -> ModelServer:
    """A server whose prompts may be what a run's completions have become."""
    served = serve(api)
    served.sampling = dataclasses.replace(LONG, max_prompt_tokens=90)
    return served


def long_prompts(policy: dict) -> tuple[list[Prompt], dict[tuple[int, int], Trajectory]]:
    """Two short completions and six long ones, and what they are."""
    prompts = [
        dataclasses.replace(each, max_new_tokens=4 if each.group == 0 else 60, stops=())
        for each in prompts_of()
    ]
    own = own_engine(LONG)
    own.load(policy)
    return prompts, sampled(own, prompts)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_what_is_taken_out_goes_on(api, serve, served_setup, policy, served_origin, tmp_path):
    """A server ends what is under way and says what there is of it; it goes on by other weights,
    or by the same ones, to what it would have been. Greedy, as seeds are others by then.
    """
    prompts, expected = long_prompts(policy)
    engine = engine_of(connected(long_server(serve, api), served_setup, tmp_path, LONG), LONG)
    with engine.loaded(policy):
        ended = list(engine.run(prompts, most_tokens=1))
        begun = engine.take_out()
        assert not engine.busy and len(ended) + len(begun) == 8
        cut = [each for each in begun if each.ended == UNFINISHED]
        assert any(0 < each.sampled_T.sum() < 60 for each in cut)
        again = {(each.group, each.sample): each for each in (*ended, *begun)}
        for prompt in prompts:
            of_prompt = {g: again[prompt.group, g] for g in range(2)}
            engine.submit(prompt, of_prompt)
        found = again | sampled(engine, [])
    assert_same(found, expected, atol=1e-5)


def test_what_is_under_way_outlives_an_evaluation(serve, served_setup, policy, tmp_path):
    """By other weights: it is withdrawn, waits, and goes on by its own to what it would be."""
    prompts, expected = long_prompts(policy)
    engine = engine_of(connected(long_server(serve, "vllm"), served_setup, tmp_path, LONG), LONG)
    engine.load(policy)
    found = {(each.group, each.sample): each for each in engine.run(prompts, most_tokens=1)}
    assert engine.busy
    with engine.loaded(jax.tree.map(lambda x: x * 0.9, policy)):
        assert len(sampled(engine, prompts_of(2))) == 4
        engine.submit(prompts_of(1)[0])
    engine.load(policy)
    assert_same(found | sampled(engine, []), expected, atol=1e-5)


def test_two_engines_share_a_server(serve, served_setup, policy, served_origin, tmp_path):
    """One draws and one is greedy; the weights are handed over once."""
    served = serve()
    server = connected(served, served_setup, tmp_path)
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    for sampling in (SAMPLING, greedy, SAMPLING):
        engine = engine_of(server, sampling)
        with engine.loaded(policy, version=7):
            found = sampled(engine, prompts_of())
        assert_same(found, expected_by(served_origin, 1.1, sampling.temperature))
    assert len(served.loaded) == 1


def test_a_key_is_sent(serve, served_setup, tmp_path, monkeypatch):
    monkeypatch.setenv("ATHANOR_SERVER_KEY", "secret")
    served = serve()
    connected(served, served_setup, tmp_path)
    assert served.keys == ["Bearer secret"]


def test_the_canary_compares_with_a_server(serve, served_setup, policy, tmp_path):
    """By more tokens, and the bound of bfloat16; with weights that did not arrive it stops."""
    served, sampling = serve(), dataclasses.replace(SAMPLING, max_new_tokens=12)
    server = connected(served, served_setup, tmp_path)
    generate = Generator(
        served_setup, sampling, "checkpoint", completions=8, group_size=2, server=server
    )
    prompt = served_setup.tokenizer.encode("two and two")
    given: dict[str, Any] = {"stage": "dense", "sampling": sampling}
    assert Canary(served_setup, generate.engine, prompt, **given).check(1, policy) < 1e-5
    assert len(served.asked[-1]["prompt"]) == len(prompt)
    assert served.asked[-1]["max_tokens"] == min(TOKENS_OUTSIDE, 12)
    served.reload = lambda directory: None
    other = jax.tree.map(lambda x: x * 2, policy)
    with pytest.raises(UserError, match=r"rounding in bfloat16 explains 0\.25"):
        Canary(served_setup, generate.engine, prompt, **given).check(2, other)
