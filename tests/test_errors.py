"""Messages for people: one that a value makes long keeps where, what and what to do."""

import dataclasses

import pytest

from errors import MESSAGE_CHARACTERS, VALUE_CHARACTERS, FieldChecks, UserError, shortened


@dataclasses.dataclass
class Section:
    name: str = "x"
    count: int = 1


@pytest.mark.parametrize("length", [VALUE_CHARACTERS + 1, 5_000, 10**6])
def test_a_long_value_is_cut_and_the_rule_is_not(length):
    with pytest.raises(UserError) as error:
        FieldChecks(Section(name="a" * length), "data").one_of("name", ("b", "c"))
    message = str(error.value)
    assert message.startswith("data.name = 'aaa") and message.endswith("must be one of b, c")
    assert len(message) < 2 * VALUE_CHARACTERS


def test_a_long_message_keeps_its_two_ends():
    message = str(UserError(f"init_from = {'x' * 5_000!r}: no such run; give another"))
    assert message.startswith("init_from = 'xx") and message.endswith(": no such run; give another")
    assert len(message) < MESSAGE_CHARACTERS + 50


@pytest.mark.parametrize("text", ["", "short", "x" * VALUE_CHARACTERS])
def test_what_is_short_stays(text):
    assert shortened(text) == text and str(UserError(text)) == text


def test_what_is_cut_says_how_much():
    cut = shortened("a" * 1_000 + "z" * 3_000, limit=300)
    head, words, tail = cut.partition(" ...3,700 characters... ")
    assert words and head == "a" * 200 and tail == "z" * 100


def test_what_utf8_cannot_write_is_escaped():
    assert str(UserError("caf\udce9.txt: \ud83d")) == r"caf\udce9.txt: \ud83d"


def test_a_bound_is_said():
    with pytest.raises(UserError, match=r"^data.count = 1001: must be at most 1,000$"):
        FieldChecks(Section(count=1001), "data").at_most(1000, "count")


def test_a_message_is_one_line():
    assert str(UserError("x.parquet: damaged (page\nheader failed.\n); replace it")) == (
        "x.parquet: damaged (page header failed. ); replace it"
    )
