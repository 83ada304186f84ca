"""Completions with a budget of thought that are taken out of an engine, and go on."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from data.tokenizer_training import bytes_tokenizer
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.halting import ThinkingBudget
from rl.request import keys_of
from rl.trajectory import LENGTH, UNFINISHED, Role
from tests import tiny
from tests.rl.test_engine import MESH, by_number
from tests.rl.test_turns import after

TOKENIZER = bytes_tokenizer()
BUDGET = ThinkingBudget(TOKENIZER, most_tokens=20, answer_tokens=9, stops=(1,), end="</t>",
                        interruption="stop</t>\n")  # fmt: skip


@pytest.mark.parametrize(
    "begun, left, in_turn, thinks",
    [
        (after("hm"), 18, 2, True),
        (after("hm</t>"), 9, 0, False),
        (after("hm</t>ye"), 7, 2, False),
        (after("hm", injected="stop</t>\n"), 7, 2, False),  # with its answer behind the phrase
        (after("", injected="stop</t>\n"), 9, 0, False),
    ],
)
def test_it_goes_on_where_it_was(begun, left, in_turn, thinks):
    resumed = BUDGET.resumes(begun)
    assert (resumed.turn.max_new_tokens, resumed.in_turn) == (left, in_turn)
    assert bool(resumed.turn.halts) == thinks
    assert (list(resumed.turn.tokens), resumed.turn.stops) == ([], (1,))


def test_a_thought_that_was_told_to_wait_goes_on_as_a_thought():
    waiting = dataclasses.replace(BUDGET, waits=1, wait=" Wait")
    resumed = waiting.resumes(after("so", injected=" Wait"))
    assert resumed.in_turn == 2 and resumed.turn.halts is not None
    # `after` has nothing before the phrase: of 20 tokens two are sampled.
    assert resumed.turn.max_new_tokens == 18


@pytest.mark.heavy
def test_what_is_taken_out_again_and_again_is_what_it_would_have_been():
    """In thoughts that end by themselves, ones that are cut, and answers; each by its own key."""
    model = tiny.model_config(
        num_nextn_predict_layers=0, vocab_size=TOKENIZER.vocab_size, initializer_range=0.15
    )
    own = Engine(model, MESH, SamplingConfig(max_prompt_tokens=60, max_new_tokens=60), rows=3,
                 steps=2)  # fmt: skip
    variables = tiny.variables(model)
    keys = keys_of(jax.random.key(0), range(6), 2)

    def asked(budget: ThinkingBudget):
        return [budget.prompt([65, 66], keys[n], group=n) for n in range(6)]

    plain = dataclasses.replace(BUDGET, most_tokens=8, stops=TOKENIZER.stops)
    with own.loaded(variables):
        texts = [TOKENIZER.decode(each.tokens_T[3:9].tolist()) for each in own.run(asked(plain))]
    # The letter that most thoughts of eight tokens have, so that not all of them are cut.
    end = collections.Counter(c for text in texts for c in set(text) if c.isascii()).most_common(1)
    budget = dataclasses.replace(plain, end=end[0][0], interruption=f" so{end[0][0]}")
    with own.loaded(variables):
        expected = by_number(own.run(asked(budget)))
    injected = [bool((each.roles_T == Role.INJECTED).any()) for each in expected.values()]
    assert any(injected) and not all(injected)
    have: dict[int, dict] = {n: {} for n in range(6)}
    rounds = 0
    while True:
        with own.loaded(variables):
            for prompt in asked(budget):
                own.submit(prompt, have[prompt.group])
            if not own.busy:
                break
            for each in [*own.run(most_tokens=7), *own.take_out()]:
                have[each.group][each.sample] = each
        rounds += 1
    assert rounds > 5
    for (group, sample), each in expected.items():
        found = have[group][sample]
        np.testing.assert_array_equal(found.tokens_T, each.tokens_T)
        np.testing.assert_array_equal(found.roles_T, each.roles_T)
        assert found.ended == each.ended != UNFINISHED
    assert LENGTH in {each.ended for each in expected.values()}
