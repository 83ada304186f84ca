"""Completions that go on: turns, forced and forbidden tokens, new weights, and budgets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from rl.config import SamplingConfig
from rl.engine import Engine
from rl.halting import StopSequences, StopTexts, ThinkingBudget
from rl.request import Prompt, Turn, keys_of
from rl.trajectory import LENGTH, STOP, Role, Trajectory, batch_of
from tests import tiny
from tests.compilations import ENGINE, compilations_of
from tests.rl.test_engine import MESH, MODELS, assert_same, by_number
from tests.trajectories import trajectory
from train.scoring import logprobs_at_tokens

NEW, WIDTH, TOOL = 120, 40, (50, 51, 52)
STOPS = tuple(range(5, 13))

logprobs_at_tokens = jax.jit(logprobs_at_tokens, static_argnums=(0, 1, 2))


@functools.cache
def engine(name: str, rows: int = 4, steps: int = 3, **changes) -> Engine:
    sampling = SamplingConfig(
        max_prompt_tokens=WIDTH,
        max_new_tokens=NEW,
        attention="sparse" if name == "mla" else "dense",
    )
    sampling = dataclasses.replace(sampling, **changes)
    made = Engine(MODELS[name], MESH, sampling, rows=rows, steps=steps)
    made.load(tiny.variables(MODELS[name]))
    return made


def prompts_of(count: int = 5, new: int = 8, first: int = 0, **changes) -> list[Prompt]:
    numbers = range(first, first + count)
    keys = keys_of(jax.random.key(0), numbers, 1)
    lengths = (3, 16, 2, 35, 1, 40, 7)
    return [
        Prompt(
            np.random.default_rng(n).integers(20, tiny.VOCAB, lengths[n % len(lengths)]).tolist(),
            keys[n - first],
            new,
            STOPS,
            group=n,
            **changes,
        )
        for n in numbers
    ]


def conversation(length: int, turns: int):
    """Replies of `length` ids each, alike in every trajectory of as many turns."""

    def reply(trajectory: Trajectory) -> Turn | None:
        begins = np.flatnonzero(np.diff((trajectory.roles_T == Role.TOOL).astype(int)) == 1)
        if len(begins) == turns:
            return None
        ids = np.random.default_rng(len(begins)).integers(20, tiny.VOCAB, length)
        return Turn(ids.tolist(), Role.TOOL, 5, STOPS)

    return reply


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "length"), [("mla", 3), ("mla", 20), ("hybrid", 3)])
def test_a_conversation_is_what_the_trainer_computes(name, length):
    """Turns of one chunk and of several; what is sampled after them has the log-probs of a pass
    over all of it, and what is read has none.
    """
    own = engine(name)
    before = dataclasses.replace(own.counts)
    found = list(own.run(prompts_of(reply=conversation(length, turns=2))))
    batch = jax.tree.map(jnp.asarray, batch_of(found, WIDTH + NEW, pad=0))
    attention = "sparse" if name == "mla" else "dense"
    scored = logprobs_at_tokens(MODELS[name], attention, 1.0, tiny.variables(MODELS[name]), batch)
    tiny.assert_close(scored, batch["sampler_logprobs"], atol=1e-5)
    assert all(np.sum(each.roles_T == Role.TOOL) == 2 * length for each in found)
    # Read were the prompts, the turns, and of each turn the sampled token before it.
    prompts = sum(each.prompt_length for each in found)
    unread = sum(
        np.sum((each.roles_T[:-1] == Role.MODEL) & (each.roles_T[1:] == Role.TOOL))
        for each in found
    )
    assert own.counts.read - before.read == prompts + 2 * length * len(found) + unread
    assert own.counts.kept > before.kept


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["mla", "hybrid"])
def test_a_conversation_depends_on_its_key_alone(name):
    """Whatever else is in the slots, and however often the host looks."""
    options = {
        "reply": conversation(3, turns=2),
        "halts": StopSequences(tuple((n,) for n in range(30, 45))),
    }
    expected = by_number(engine(name).run(prompts_of(**options)))
    others = prompts_of(4, new=7, first=20) + prompts_of(3, first=40, **options)
    for steps in (1, 2, 5):
        own = engine(name, steps=steps)
        found = by_number(own.run([*others[:3], *prompts_of(**options)[::-1], *others[3:]]))
        for number, each in expected.items():
            assert_same(found[number], each)


def test_a_conversation_is_continued_by_what_is_appended_alone():
    """What it was at each turn is what it begins with at the end, then come the ids of the turn."""
    halted: dict[int, list[tuple[Trajectory, Turn | None]]] = {}
    talk = conversation(3, turns=3)

    def reply(trajectory: Trajectory) -> Turn | None:
        turn = talk(trajectory)
        halted.setdefault(trajectory.group, []).append((trajectory, turn))
        return turn

    for each in engine("mla").run(prompts_of(reply=reply)):
        assert len(halted[each.group]) == 4
        for before, turn in halted[each.group]:
            length = len(before.tokens_T)
            for field in ("tokens_T", "roles_T", "logprobs_T", "log_kept_T", "versions_T"):
                now = getattr(each, field)[:length]
                np.testing.assert_array_equal(now, getattr(before, field), err_msg=field)
            if turn:
                assert each.tokens_T[length : length + 3].tolist() == turn.tokens
                assert (each.roles_T[length : length + 3] == Role.TOOL).all()


def test_nothing_is_compiled_again_whatever_is_read():
    own = engine("mla", steps=4)
    list(own.run(prompts_of(reply=conversation(17, turns=1))))
    list(own.run(prompts_of(reply=conversation(1, turns=1))))
    with compilations_of(*ENGINE) as compiled:
        for length in (2, 9, 15, 16, 33):
            list(own.run(prompts_of(reply=conversation(length, turns=2))))
    assert not compiled


def test_a_conversation_ends_where_its_slot_is_full():
    found = list(engine("mla").run(prompts_of(reply=conversation(20, turns=99))))
    for each in found:
        assert WIDTH + NEW - 26 < len(each.tokens_T) <= WIDTH + NEW


WRONG_TURNS = {
    "the reply to a completion of prompt 0 asks for 0 new tokens": {"max_new_tokens": 0},
    "takes 99 tokens back: must be between 0 and": {"take_back": 99},
    "prompt 0 has 17 stop ids; at most 16 may be": {"stops": tuple(range(17))},
}


@pytest.mark.parametrize("message", WRONG_TURNS)
def test_a_turn_that_cannot_be_is_one_line(message):
    """And no row that never ends."""
    turn = dataclasses.replace(Turn(TOOL, Role.TOOL, 5, STOPS), **WRONG_TURNS[message])
    own = engine("mla", rows=2, steps=2)
    with pytest.raises(UserError, match=message), own.loaded(tiny.variables(MODELS["mla"])):
        list(own.run(prompts_of(1, reply=lambda trajectory: turn)))
    assert not own.busy


def test_a_halt_drops_what_was_sampled_beyond():
    """Of a sequence of two ids that does occur: the row ends as if it had stopped there."""
    plain = by_number(engine("mla").run(prompts_of(new=12)))
    longest = max(plain.values(), key=lambda each: len(each.completion))
    pair = tuple(longest.completion[2:4].tolist())
    own, before = engine("mla"), engine("mla").counts.sampled
    found = by_number(own.run(prompts_of(new=12, halts=StopSequences((pair,)))))
    assert own.counts.sampled - before == sum(len(each.completion) for each in found.values())
    cut = found[longest.group, 0]
    assert cut.ended == STOP and tuple(cut.completion[-2:].tolist()) == pair
    for number, each in found.items():
        length = len(each.tokens_T)
        np.testing.assert_array_equal(each.tokens_T, plain[number].tokens_T[:length])
        np.testing.assert_array_equal(each.logprobs_T, plain[number].logprobs_T[:length])


def test_forbidden_ids_are_never_sampled():
    """And those who forbid none are as they were, to the bit; the record says what is left."""
    own = engine("mla")
    plain = by_number(own.run(prompts_of()))
    forbidden = tuple({int(each.completion[0]) for each in plain.values()})[:3]
    mixed = [
        dataclasses.replace(prompt, forbidden=forbidden if prompt.group % 2 else ())
        for prompt in prompts_of()
    ]
    found = by_number(own.run(mixed))
    for number, each in found.items():
        if number[0] % 2:
            assert not np.isin(each.completion, forbidden).any()
            assert (each.log_kept_T[each.sampled_T] < 0).all()
        else:
            assert_same(each, plain[number])


def test_a_grammar_is_asked_before_every_token():
    """Ids must go up; it sees all that was sampled, and another row is as it was."""
    seen = []

    def ascending(ids: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        return np.arange(tiny.VOCAB) > (ids[-1] if len(ids) else 12)

    own = engine("mla")
    plain = by_number(own.run(prompts_of(2)))
    bound = dataclasses.replace(prompts_of(2)[0], allowed=ascending, max_new_tokens=4)
    found = by_number(own.run([bound, prompts_of(2)[1]]))
    ids = found[0, 0].completion
    assert seen == list(range(len(ids))) and (np.diff(ids) > 0).all()
    assert (found[0, 0].log_kept_T[-len(ids) :] < 0).all()
    assert_same(found[1, 0], plain[1, 0])
    nothing = dataclasses.replace(bound, allowed=lambda ids: np.zeros(tiny.VOCAB, bool))
    with pytest.raises(UserError, match="prompt 0: its `allowed` lets no id follow"):
        list(engine("mla", rows=2).run([nothing]))


@pytest.mark.heavy
def test_rollouts_in_parts_are_rollouts():
    """With a budget of tokens at a time, and the same weights in between: to the bit."""
    own, expected = engine("mla"), by_number(engine("mla").run(prompts_of(7, new=20)))
    found, parts = list(own.run(prompts_of(7, new=20), most_tokens=10)), 1
    while own.busy:
        own.load(tiny.variables(MODELS["mla"]))
        found += own.run(most_tokens=10)
        parts += 1
    assert parts > 3
    for number, each in by_number(found).items():
        assert_same(each, expected[number])


@pytest.mark.heavy
@pytest.mark.parametrize("read_again", [True, False])
def test_weights_may_change_in_the_midst(read_again):
    """Each token has the version that sampled it. Read again, what follows is what the new weights
    make of it: the trainer's log-probs, up to the order of sums.
    """
    own, model = engine("mla", rows=3), MODELS["mla"]
    old = tiny.variables(model)
    new = jax.tree.map(lambda x: x * 1.05, old)
    own.load(old, version=1)
    found = list(own.run(prompts_of(7, new=20), most_tokens=20))
    own.load(new, version=2, read_again=read_again)
    late = list(own.run())
    mixed = [each for each in late if {1, 2} <= set(each.versions_T)]
    assert mixed and {each.group for each in found + late} == set(range(7))
    batch = jax.tree.map(jnp.asarray, batch_of(mixed, WIDTH + NEW, pad=0))
    scored = logprobs_at_tokens(model, "sparse", 1.0, new, batch)
    by_new = np.zeros(batch["mask"].shape, bool)
    for row, each in enumerate(mixed):
        by_new[row, : len(each.tokens_T)] = each.versions_T == 2
    difference = np.abs(np.asarray(scored - batch["sampler_logprobs"]))
    assert (difference[by_new].max() < 1e-5) == read_again
    assert difference[np.asarray(batch["mask"]) & ~by_new].max() > 1e-3


TOKENIZER = bytes_tokenizer()


def ids_of(text: str) -> np.ndarray:
    return np.asarray(TOKENIZER.encode(text))


def test_a_text_halts_with_the_token_that_completes_it():
    halts = StopTexts(TOKENIZER, ["\n\n", "END"])
    for text, kept in (("a b", None), ("ab\n\ncd", 4), ("ab EN", None), ("x" * 200 + "END!", 203)):
        assert halts(ids_of(text)) == kept
    with pytest.raises(UserError, match="stop text '': the tokenizer cannot write it"):
        StopTexts(TOKENIZER, [""])


def test_sequences_halt_with_their_last_id():
    halts = StopSequences(((1, 2), (3,)))
    for ids, kept in (((5, 1, 4, 2), None), ((5, 1, 2, 9), 3), ((3, 1, 2), 1), ((), None)):
        assert halts(np.asarray(ids, np.int32)) == kept


def after(text: str, *, cut: bool = False, injected: str = "") -> Trajectory:
    """What follows a prompt, of which a first part may be injected."""
    whole = trajectory([65], TOKENIZER.encode(injected + text), cut=cut)
    roles_T = whole.roles_T.copy()
    roles_T[1 : 1 + len(TOKENIZER.encode(injected))] = Role.INJECTED
    return dataclasses.replace(whole, roles_T=roles_T)


def test_thinking_is_interrupted_and_answered():
    """Cases by hand: the budget is used up, it ends by itself, it has answered, it just stops."""
    budget = ThinkingBudget(TOKENIZER, most_tokens=20, answer_tokens=9, stops=(1,), end="</t>",
                            interruption="stop</t>")  # fmt: skip
    turn = budget.reply(after("hm hm", cut=True))
    assert turn == Turn(TOKENIZER.encode("stop</t>"), Role.INJECTED, 9, (1,))
    assert budget.reply(after("hm</t>")) == Turn([], Role.INJECTED, 9, (1,))
    assert budget.reply(after("hm</t>7", cut=True)) is None
    assert budget.reply(after("7", cut=True, injected="stop</t>")) is None
    assert budget.reply(after("hm")) is None
    with pytest.raises(UserError, match="the interruption 'no' does not end thinking"):
        dataclasses.replace(budget, interruption="no")


def test_thinking_is_extended_by_waiting():
    """An end is taken back as often as asked for, as long as there is budget."""
    budget = ThinkingBudget(TOKENIZER, most_tokens=20, answer_tokens=9, stops=(1,), end="</t>",
                            interruption="stop</t>", waits=1, wait=" Wait")  # fmt: skip
    turn = budget.reply(after("hm</t>"))
    assert turn is not None and (turn.take_back, turn.max_new_tokens) == (4, 18)
    assert turn.tokens == TOKENIZER.encode(" Wait") and turn.halts is not None
    assert budget.reply(after("no</t>", injected=" Wait")) == Turn([], Role.INJECTED, 9, (1,))
    assert budget.reply(after("h" * 20 + "</t>")) == Turn([], Role.INJECTED, 9, (1,))


def test_a_budget_is_kept_by_the_engine():
    """Every completion thinks at most so long, and has an answer."""
    model = tiny.model_config(
        num_nextn_predict_layers=0, vocab_size=TOKENIZER.vocab_size, initializer_range=0.15
    )
    sampling = SamplingConfig(max_prompt_tokens=8, max_new_tokens=60)
    own = Engine(model, MESH, sampling, rows=3)
    own.load(tiny.variables(model))
    budget = ThinkingBudget(TOKENIZER, 12, 5, TOKENIZER.stops, end="</t>", interruption=" so</t>")
    keys = keys_of(jax.random.key(0), range(4), 2)
    found = list(own.run(budget.prompt([65, 66], keys[n], group=n) for n in range(4)))
    assert len(found) == 8
    for each in found:
        text = TOKENIZER.decode(each.completion.tolist(), skip_special_tokens=False)
        _, end, answer = text.partition("</t>")
        assert (end and answer) or each.ended == STOP
        interrupted = np.flatnonzero(each.roles_T == Role.INJECTED)
        assert len(interrupted) == len(TOKENIZER.encode(" so</t>")) and interrupted[0] == 2 + 12
        assert each.ended in (STOP, LENGTH) and len(each.tokens_T) - interrupted[-1] - 1 <= 5
