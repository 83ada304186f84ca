"""What a completion samples is its own affair: not its slot's, its company's or its time's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.mesh import MeshConfig
from model.sharding import make_mesh
from rl import programs
from rl.coding import CodedSets
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.generate import slots_that_fit
from rl.request import Prompt, keys_of
from rl.trajectory import LENGTH, STOP, Role, Trajectory, batch_of
from tests import tiny
from tests.compilations import ENGINE, compilations_of
from train.scoring import logprobs_at_tokens

NEW, WIDTH, GROUP = 8, 40, 2
STOPS = (5, 6, 7, 8, 9, 10, 11, 12)
# Of both widths that prompts are read in, 32 and 40.
LENGTHS = (3, 16, 2, 35, 1, 40, 7)
MESH = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), jax.devices()[:1])
MODELS = {
    "mla": tiny.model_config(num_nextn_predict_layers=0, initializer_range=0.15),
    "hybrid": dataclasses.replace(
        tiny.HYBRID, num_nextn_predict_layers=0, initializer_range=0.15, canon_kernel_size=3
    ),
}
SETTINGS = {
    "sparse": ("mla", SamplingConfig(temperature=0.7, top_k=20, top_p=0.9)),
    "dense": ("mla", SamplingConfig(attention="dense")),
    "greedy": ("mla", SamplingConfig(temperature=0.0)),
    "hybrid": ("hybrid", SamplingConfig(attention="dense")),
}

logprobs_at_tokens = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))


@functools.cache
def engine(name: str, rows: int = 8, steps: int = 3, group_size: int = GROUP) -> Engine:
    """An engine with the tests' variables; those of one setting share their compilations."""
    model, sampling = SETTINGS[name]
    sampling = dataclasses.replace(sampling, max_prompt_tokens=WIDTH, max_new_tokens=NEW)
    made = Engine(MODELS[model], MESH, sampling, rows=rows, group_size=group_size, steps=steps)
    made.load(tiny.variables(MODELS[model]), version=3)
    return made


def prompts_of(
    lengths=LENGTHS, seed: int = 0, numbers=None, group_size: int = GROUP, **changes
) -> list[Prompt]:
    numbers = range(len(lengths)) if numbers is None else numbers
    keys = keys_of(jax.random.key(seed), numbers, group_size)
    options = {"max_new_tokens": NEW, "stops": STOPS} | changes
    return [
        Prompt(
            np.random.default_rng(number).integers(20, tiny.VOCAB, lengths[place]).tolist(),
            keys[place],
            group=number,
            **options,
        )
        for place, number in enumerate(numbers)
    ]


def by_number(trajectories) -> dict[tuple[int, int], Trajectory]:
    return {(each.group, each.sample): each for each in trajectories}


@functools.cache
def sampled(name: str) -> dict[tuple[int, int], Trajectory]:
    return by_number(engine(name).run(prompts_of()))


def assert_same(found: Trajectory | CodedSets, expected: Trajectory | CodedSets) -> None:
    """To the bit."""
    for name, value in vars(expected).items():
        if isinstance(value, CodedSets):
            assert_same(getattr(found, name), value)
        else:
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_the_record_is_what_the_trainer_computes(name):
    """Tokens of rows of many lengths, stopped at different places; float32 log-probs of size 1 to
    10 through three layers or more.
    """
    model, settings = SETTINGS[name]
    trajectories = list(sampled(name).values())
    batch = jax.tree.map(jnp.asarray, batch_of(trajectories, WIDTH + NEW, pad=0))
    scored = logprobs_at_tokens(
        MODELS[model],
        settings.attention,
        settings.temperature,
        tiny.variables(MODELS[model]),
        batch,
    )
    tiny.assert_close(scored, batch["sampler_logprobs"], atol=1e-5)
    assert jnp.all((batch["sampler_logprobs"] < 0) == batch["mask"])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sparse", "hybrid"])
def test_a_completion_depends_on_its_key_alone(name):
    """Random schedules: prompts in other order and company, submitted at other times. To the bit,
    in float32.
    """
    rng = np.random.default_rng(0)
    for _ in range(4):
        prompts = prompts_of()
        # Others come between, of other lengths and with ends of their own.
        for number in range(100, 100 + int(rng.integers(0, 6))):
            prompts += prompts_of(
                [int(rng.integers(1, WIDTH))], 1, [number], max_new_tokens=int(rng.integers(1, NEW))
            )
        rng.shuffle(prompts)
        found, waiting = [], list(prompts)
        while waiting or engine(name).busy:
            for _ in range(int(rng.integers(0, 4))):
                if waiting:
                    engine(name).submit(waiting.pop())
            if engine(name).busy:
                found += engine(name).step()
        found = by_number(found)
        for number, expected in sampled(name).items():
            assert_same(found[number], expected)


@pytest.mark.heavy
@pytest.mark.parametrize("steps", [1, 5])
def test_how_many_tokens_are_sampled_at_a_time_does_not_matter(steps):
    found = by_number(engine("sparse", steps=steps).run(prompts_of()))
    for number, expected in sampled("sparse").items():
        assert_same(found[number], expected)


def test_other_numbers_and_seeds_are_other_samples():
    expected = sampled("dense")
    for others in (prompts_of(seed=1), prompts_of(numbers=range(50, 50 + len(LENGTHS)))):
        prompts = [
            dataclasses.replace(prompt, tokens=own.tokens)
            for prompt, own in zip(others, prompts_of(), strict=True)
        ]
        found = list(engine("dense").run(prompts))
        assert any(
            not np.array_equal(each.tokens_T, expected[each.group % 50, each.sample].tokens_T)
            for each in found
        )
    assert not np.array_equal(expected[0, 0].tokens_T, expected[0, 1].tokens_T)


def test_rows_end_at_a_stop_token():
    found = sampled("dense")
    assert {each.ended for each in found.values()} == {STOP, LENGTH}
    for each in found.values():
        assert not np.isin(each.completion[:-1], STOPS).any()
        assert (each.completion[-1] in STOPS) == (each.ended == STOP)
        assert len(each.completion) == NEW or each.ended == STOP


def test_every_token_has_its_author_and_version():
    for (number, _), each in sampled("dense").items():
        prompt = prompts_of()[number].tokens
        assert each.prompt_length == len(prompt)
        np.testing.assert_array_equal(each.tokens_T[: len(prompt)], prompt)
        assert set(each.roles_T[: len(prompt)]) == {Role.PROMPT}
        assert set(each.roles_T[len(prompt) :]) == {Role.MODEL}
        np.testing.assert_array_equal(each.versions_T, np.where(each.sampled_T, 3, -1))
        np.testing.assert_array_equal(each.logprobs_T < 0, each.sampled_T)
        np.testing.assert_array_equal(each.log_kept_T, 0)  # nothing is left out


def test_greedy_takes_the_likeliest_token():
    """Of the full forward pass, over prompt and completion; and the rows of a group are one and the
    same.
    """
    found = sampled("greedy")
    model = MODELS["mla"]
    batch = jax.tree.map(jnp.asarray, batch_of(list(found.values()), WIDTH + NEW, pad=0))
    logits_BTV = tiny.forward(model, tiny.variables(model), batch, "sparse")["logits_BTV"]
    likeliest_BT = np.roll(jnp.argmax(logits_BTV, axis=-1), 1, axis=1)
    mask_BT = np.asarray(batch["mask"])
    np.testing.assert_array_equal(likeliest_BT[mask_BT], np.asarray(batch["tokens"])[mask_BT])
    for number in range(len(LENGTHS)):
        np.testing.assert_array_equal(found[number, 0].tokens_T, found[number, 1].tokens_T)


def test_each_prompt_has_its_own_ends():
    """Its own stop ids and its own number of tokens, side by side."""
    prompts = prompts_of()
    first = int(sampled("dense")[1, 0].completion[0])
    prompts[0] = dataclasses.replace(prompts[0], max_new_tokens=2, stops=())
    prompts[1] = dataclasses.replace(prompts[1], stops=(first,))
    prompts[2] = dataclasses.replace(prompts[2], stops=())
    found = by_number(engine("dense").run(prompts))
    assert [len(found[0, g].completion) for g in range(GROUP)] == [2, 2]
    assert found[1, 0].completion.tolist() == [first]
    assert [len(found[2, g].completion) for g in range(GROUP)] == [NEW, NEW]
    assert_same(found[3, 1], sampled("dense")[3, 1])


def test_nothing_is_compiled_again_whatever_the_lengths(monkeypatch):
    """One program for each width that prompts are read in, and four more, where none goes on."""
    monkeypatch.setattr("rl.engine.Programs", programs.Programs)  # none that is shared
    with compilations_of(*ENGINE) as compiled:
        own = engine.__wrapped__("dense", steps=4)
        list(own.run(prompts_of()))
    assert len(compiled) == 4 + 2, compiled
    rng = np.random.default_rng(1)
    with compilations_of(*ENGINE) as compiled:
        for seed in range(3):
            lengths = rng.integers(1, WIDTH + 1, int(rng.integers(1, 12)))
            new = int(rng.integers(1, NEW + 1))
            list(own.run(prompts_of(lengths, seed, max_new_tokens=new)))
        own.load(tiny.variables(MODELS["mla"]), version=4)
        list(own.run(prompts_of(group_size=5)))
    assert not compiled


def test_a_stream_yields_the_tokens_that_are_sampled():
    prompt = prompts_of(numbers=[1], group_size=1)[0]
    prompt = dataclasses.replace(prompt, tokens=prompts_of()[1].tokens, stops=STOPS[:2])
    own = engine("dense", rows=1, steps=1, group_size=1)
    streamed = list(own.stream(prompt))
    assert streamed == next(own.run([prompt])).completion.tolist()


WRONG = {
    "a prompt is empty": {"lengths": (0,)},
    r"sampling.max_prompt_tokens = 40: a prompt has 41 tokens": {"lengths": (41,)},
    "asks for 9 new tokens: must be between 1 and sampling.max_new_tokens = 8": {
        "max_new_tokens": 9
    },
    "asks for 0 new tokens": {"max_new_tokens": 0},
    "a prompt has 17 stop ids; at most 16": {"stops": tuple(range(17))},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_prompt_that_cannot_be_is_one_line(message):
    options = {"lengths": (3,)} | WRONG[message]
    with pytest.raises(UserError, match=message):
        list(engine("dense").run(prompts_of(**options)))
    assert not engine("dense").busy


def test_slots_are_as_many_as_fit(capsys):
    model = MODELS["mla"]
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW)
    assert slots_that_fit(model, MESH, sampling, completions=20) == 20
    assert "20 slots of 0.0" in capsys.readouterr().out
    assert slots_that_fit(model, MESH, dataclasses.replace(sampling, slots=6), 20) == 6
    # A latent of 16 and an index key of 8 for each of 48 tokens, recent inputs of 2 x 32, in three
    # layers; logits, and a few numbers.
    slot = 4 * (3 * (48 * (16 + 8) + 2 * 32) + tiny.VOCAB + 2 + 1 + 2 * 16 + 1)
    three = dataclasses.replace(sampling, cache_gib=3 * slot / 2**30)
    assert slots_that_fit(model, MESH, three, 20) == 3
    with pytest.raises(UserError, match=r"sampling.cache_gib = .*: one slot of 48 tokens takes"):
        slots_that_fit(model, MESH, dataclasses.replace(sampling, cache_gib=1e-9), 20)
