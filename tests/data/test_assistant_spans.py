"""The spans of a rendered conversation that are as the assistant would have sampled them."""

import json

import pytest

from errors import UserError
from tests.data.chats import THOUGHT, TOOL_USE, TOOLS, assistant, inline_template, user


def spans_of(template, messages, tools=None):
    """Returns (message, text) of each span."""
    text, spans = template.render_with_spans(messages, tools)
    assert text == template.render(messages, add_generation_prompt=False, tools=tools)
    return [(span.message, text[span.start : span.end]) for span in spans]


def test_a_turn_that_keeps_its_thought_counts(template):
    """Both turns are after the last question."""
    first = (
        '<think>\nadd them\n</think>\n\n<tool_call>\n{"name": "add", "arguments": '
        '{"x": [1, 2], "y": [3, 4]}}\n</tool_call><|im_end|>\n'
    )
    assert spans_of(template("chatml"), TOOL_USE, TOOLS) == [
        (2, first),
        (4, "<think>\neasy\n</think>\n\n10<|im_end|>\n"),
    ]


def test_a_turn_that_loses_its_thought_is_context(template):
    messages = [user("q1"), assistant(THOUGHT), user("q2"), assistant(THOUGHT)]
    assert spans_of(template("chatml"), messages) == [
        (4, "<think>\nwhy\n</think>\n\nbecause<|im_end|>\n")
    ]
    assert spans_of(template("chatml"), [*messages, user("q3")]) == []


def test_a_last_turn_without_the_thought_that_its_prompt_opens_counts(template):
    """It spans from where the prompt's tag would be.

    An earlier turn, which was sampled after such a tag, is context.
    """
    messages = [user("q1"), assistant("a1"), user("q2"), assistant(THOUGHT)]
    assert spans_of(template("r1"), messages) == [(4, "because<｜end▁of▁sentence｜>")]


PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}|{% endfor %}"
    "{% if add_generation_prompt %}{{ generation_prompt }}{% endif %}"
)


@pytest.mark.parametrize(
    "generation_prompt, content, span",
    [
        ("assistant: <think>\n", "a", "a|"),
        # The plain case: the turn begins as its prompt ends.
        ("assistant: <think>\n", THOUGHT, "why\n</think>\n\nbecause|"),
        ("assistant: <think>\n\n</think>\n\n", "a", "a|"),
        # All of the thought counts, though it begins like the prompt's empty one.
        ("assistant: <think>\n\n</think>\n\n", THOUGHT, THOUGHT + "|"),
        ("assistant: </think>", "a", "a|"),
        ("assistant: [THINK]", "a", "a|"),
        ("assistant: <seed:think>", "a", "a|"),
        # Without a generation prompt the assistant is to write its own name.
        ("", "a", "assistant: a|"),
    ],
)
def test_tags_of_a_thought_that_only_the_prompt_has_are_left_out(generation_prompt, content, span):
    template = inline_template(PLAIN, generation_prompt=generation_prompt)
    assert spans_of(template, [user("q"), assistant(content)]) == [(2, span)]


@pytest.mark.parametrize(
    "generation_prompt", ["bot: ", "assistant: \n", "assistant: I think", "bot: <think>"]
)
def test_a_last_turn_that_does_not_follow_its_prompt_is_refused(generation_prompt):
    template = inline_template(PLAIN, generation_prompt=generation_prompt)
    with pytest.raises(UserError) as error:
        template.render_with_spans([user("q"), assistant("a")])
    end = json.dumps(f"user: q|{generation_prompt}")
    assert str(error.value) == (
        "chat_template.jinja: message 2 of 2 is not written as its prompt would have it begin "
        f"(which ends {end})"
    )


def test_a_greeting_answers_no_prompt():
    template = inline_template("{% for m in messages %}{{ m.content }}|{% endfor %}")
    messages = [assistant("hello"), user("q"), assistant("a")]
    assert spans_of(template, messages) == [(3, "a|")]


def test_a_conversation_without_the_assistant_has_no_targets(template):
    with pytest.raises(UserError, match='none of the 1 messages has role "assistant"'):
        template("chatml").render_with_spans([user("q")])
