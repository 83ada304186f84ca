"""What the sampler's layers chose is recorded, and a trainer that does it again agrees with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from errors import UserError
from model.record import CHOICES, recorded_forward, routing_layers, selecting_layers
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.halting import StopSequences
from rl.records import check_fits, experts_of, token_bytes
from rl.trajectory import Role, Trajectory, batch_of
from tests import tiny
from tests.compilations import ENGINE, compilations_of
from tests.rl.test_engine import MESH, MODELS, assert_same, by_number
from tests.rl.test_turns import NEW, WIDTH, conversation, prompts_of
from train.scoring import logprobs_at_tokens

CONFIG = MODELS["mla"]

logprobs_at_tokens = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))
recorded_forward = jax.jit(recorded_forward, static_argnums=(0, 5))


@functools.cache
def engine(rows: int = 4, steps: int = 3) -> Engine:
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
    made = Engine(CONFIG, MESH, sampling, rows=rows, steps=steps, record=CHOICES)
    made.load(tiny.variables(CONFIG))
    return made


@functools.cache
def conversations(steps: int = 3) -> dict[tuple[int, int], Trajectory]:
    options = {
        "reply": conversation(3, turns=2),
        "halts": StopSequences(tuple((n,) for n in range(30, 45))),
    }
    return by_number(engine(steps=steps).run(prompts_of(**options)))


@pytest.mark.heavy
def test_the_record_is_what_a_forward_pass_chooses():
    """Prompts, turns and sampled tokens, of rows that were rewound; with this seed no choice is so
    close that another order of sums turns it. The last token was not read where the row ended.
    """
    trajectories = list(conversations().values())
    batch = jax.tree.map(jnp.asarray, batch_of(trajectories, WIDTH + NEW, pad=0))
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    _, found = recorded_forward(CONFIG, tiny.variables(CONFIG), *inputs, "sparse")
    for row, each in enumerate(trajectories):
        read = len(each.tokens_T) - int(each.roles_T[-1] == Role.MODEL)
        assert each.routes_TLK is not None and each.selected_TL is not None
        for recorded, layers, expected in (
            (experts_of(each.routes_TLK), routing_layers(CONFIG), found.routes_BLTK),
            (each.selected_TL.lists(), selecting_layers(CONFIG), found.selected_BLTk),
        ):
            expected_TLK = np.moveaxis(np.asarray(expected[row]), 0, 1)[:, layers]
            np.testing.assert_array_equal(recorded[: read - 1], expected_TLK[: read - 1])
            assert (recorded[read:] == -1).all()


@pytest.mark.heavy
@pytest.mark.parametrize("steps", [1, 5])
def test_the_record_depends_on_no_schedule(steps):
    for number, each in conversations(steps).items():
        assert_same(each, conversations()[number])


@pytest.mark.heavy
def test_a_trainer_with_other_weights_does_the_same_again():
    """Its log-probs are those of a pass in which the choices are forced, whatever its own are: here
    those of a model a little off, whose own choices differ.
    """
    trajectories = list(conversations().values())
    batch = jax.tree.map(jnp.asarray, batch_of(trajectories, WIDTH + NEW, pad=0))
    without = {name: x for name, x in batch.items() if name not in ("routes", "selected")}
    score = functools.partial(logprobs_at_tokens, CONFIG, "sparse", 1.0)
    off = jax.tree.map(lambda x: x * 1.02, tiny.variables(CONFIG))
    tiny.assert_close(score(tiny.variables(CONFIG), batch), batch["sampler_logprobs"], atol=1e-5)
    again = jnp.abs(score(off, batch) - batch["sampler_logprobs"])
    anew = jnp.abs(score(off, without) - batch["sampler_logprobs"])
    assert jnp.max(again) < jnp.max(anew)


def test_only_what_is_asked_for_is_recorded():
    """By name; and of what is recorded on the devices nothing, for as long as it is not wanted."""
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
    own = Engine(CONFIG, MESH, sampling, rows=2, record=["routes"])
    with own.loaded(tiny.variables(CONFIG)):
        recorded = next(own.run(prompts_of(1)))
    assert recorded.routes_TLK is not None and recorded.selected_TL is None
    assert recorded.routes_TLK.dtype == np.uint8
    assert batch_of([recorded], WIDTH + NEW, pad=0).keys() >= {"routes"}
    assert "routes" not in batch_of([recorded], WIDTH + NEW, pad=0, records=["selected"])
    with compilations_of(*ENGINE) as compiled, own.loaded(tiny.variables(CONFIG), recording=False):
        plain = next(own.run(prompts_of(1)))
    assert plain.routes_TLK is None and "routes" not in batch_of([plain], WIDTH + NEW, pad=0)
    np.testing.assert_array_equal(plain.tokens_T, recorded.tokens_T)
    assert not compiled
    with pytest.raises(UserError, match="record = \\['router'\\]: must be of routes, selected, "):
        Engine(CONFIG, MESH, sampling, rows=2, record=["router"])


def test_what_is_recorded_takes_no_more_than_is_said(capsys):
    """The bytes of a token, of whole trajectories; and a step that would take more is refused."""
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
    each = token_bytes(CONFIG, sampling, CHOICES)
    # Two layers with experts; three that select 4 of 160 keys: 4 x 5 low bits, a bitmap of 4 + 4.
    assert each == {"routes": 2 * 2, "selected": 4 + 3 * (3 + 1 + 1)}
    for trajectory in conversations().values():
        tokens = len(trajectory.tokens_T)
        assert trajectory.routes_TLK is not None and trajectory.selected_TL is not None
        assert trajectory.routes_TLK.nbytes == tokens * each["routes"]
        assert trajectory.selected_TL.nbytes <= tokens * each["selected"]
    check_fits(CONFIG, sampling, CHOICES, 10)
    expected = "records     at most 23 B a token on the host (routes 4, selected 19), 3.43e-05 GiB"
    assert expected in capsys.readouterr().out
    small = dataclasses.replace(sampling, record_gib=3e-5)
    with pytest.raises(UserError, match=r"sampling\.record_gib = 3e-05: the records of 10 co"):
        check_fits(CONFIG, small, CHOICES, 10)
    check_fits(CONFIG, small, (), 10)
    assert not capsys.readouterr().out
