"""What the sampler's layers chose is recorded, and a trainer that does it again agrees with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.record import recorded_forward, routing_layers, selecting_layers
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.halting import StopSequences
from rl.objective import logprobs_at_tokens
from rl.trajectory import Role, Trajectory, batch_of
from tests import tiny
from tests.rl.test_engine import MESH, MODELS, assert_same, by_number
from tests.rl.test_turns import NEW, WIDTH, conversation, prompts_of

CONFIG = MODELS["mla"]

logprobs_at_tokens = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))


@functools.cache
def engine(rows: int = 4, steps: int = 3) -> Engine:
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
    made = Engine(CONFIG, MESH, sampling, rows=rows, steps=steps, record=True)
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
    for each in conversations().values():
        batch = jax.tree.map(jnp.asarray, batch_of([each], len(each.tokens_T), pad=0))
        inputs = batch["tokens"], batch["positions"], batch["segments"]
        _, found = recorded_forward(CONFIG, tiny.variables(CONFIG), *inputs, "sparse")
        read = len(each.tokens_T) - int(each.roles_T[-1] == Role.MODEL)
        assert each.routes_TLK is not None and each.selected_TLk is not None
        for recorded, layers, expected in (
            (each.routes_TLK, routing_layers(CONFIG), found.routes_BLTK),
            (each.selected_TLk, selecting_layers(CONFIG), found.selected_BLTk),
        ):
            expected_TLK = np.moveaxis(np.asarray(expected[0]), 0, 1)[:, layers]
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


def test_nothing_is_recorded_unless_it_is_asked_for():
    sampling = SamplingConfig(max_prompt_tokens=WIDTH, max_new_tokens=NEW, attention="sparse")
    own = Engine(CONFIG, MESH, sampling, rows=2)
    own.load(tiny.variables(CONFIG))
    each = next(own.run(prompts_of(1)))
    assert each.routes_TLK is None and "routes" not in batch_of([each], WIDTH + NEW, pad=0)
