"""What a template leaves out of a conversation is an error, or a turn without weight."""

import json

import pytest

from data.chat import encode_chat, encode_prompt
from data.tokenizer_files import load_tokenizer
from errors import UserError
from tests.data.chats import THOUGHT, TOOL_USE, TOOLS, assistant, user

# Templates by what they write of a message m.
DROPPING = {
    "its tags": "m.content | replace('<think>', '') | replace('</think>', '')",
    "its thought": "m.content.split('</think>')[-1]",
    "its answer": "m.content.split('</think>')[0]",
    "its end": "m.content[:9]",
    "its case": "m.content | upper",
}
KEEPING = {
    "as it is": "m.content",
    "white space apart": "m.content | trim | replace('\n', ' ')",
    "as JSON": "m.content | tojson",
    "by other tags": "m.content | replace('<think>', '[THINK]') | replace('</think>', '[/THINK]')",
    "calls too": "m.content ~ (m.tool_calls | tojson if m.tool_calls else '')",
}


def written(checkpoint, expression: str):
    """Returns a tokenizer whose template writes an expression of the message m, for each m."""
    directory = checkpoint(None)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>"
        f"{{{{ {expression} if m.role == 'assistant' else m.content }}}}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return load_tokenizer(directory)


def weight_of(tokenizer, messages, tools=None) -> tuple[float, list[str]]:
    """Returns the weight of a conversation's targets, and what is left out."""
    lines: list[str] = []
    _, weights = encode_chat(messages, tokenizer, "checkpoint", tools, lines.append)
    return sum(weights), lines


@pytest.mark.parametrize("what", DROPPING)
def test_a_template_that_drops_something_is_named(checkpoint, what):
    tokenizer = written(checkpoint, DROPPING[what])
    messages = [user("q"), assistant(THOUGHT)]
    with pytest.raises(UserError, match='message 2 of 2: the chat template leaves out its "conten'):
        encode_chat(messages, tokenizer, "checkpoint")
    weight, lines = weight_of(tokenizer, messages)
    assert weight == 0 and len(lines) == 1


@pytest.mark.parametrize("what", KEEPING)
def test_a_template_may_write_a_message_in_its_own_way(checkpoint, what):
    tokenizer = written(checkpoint, KEEPING[what])
    weight, lines = weight_of(tokenizer, [user("q"), assistant('<think>\n"w"\n</think>\nis é')])
    assert weight > 5 and not lines


@pytest.mark.parametrize("content", ["w", "", "e"])
def test_what_ends_a_turn_is_not_taken_for_its_thought(checkpoint, content):
    """The letters of a short thought may stand in the mark that ends the turn."""
    tokenizer = written(checkpoint, "m.content")
    message = assistant(content, reasoning_content="end")
    with pytest.raises(UserError, match=r'leaves out its "reasoning_content" \("end"\)'):
        encode_chat([user("q"), message], tokenizer, "checkpoint")


@pytest.mark.parametrize("spelled", [dict, json.dumps])
@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_a_call_of_a_tool_must_be_written(checkpoint, field, spelled):
    """Its name and its arguments, which may be an object or JSON in a string."""
    call = {"name": "add", "arguments": spelled({"x": [1, 2.5], "text": 'a "b"'})}
    message = assistant("", **{field: [{"function": call}] if field == "tool_calls" else call})
    name = f"m.{field}.name" if field == "function_call" else "m.tool_calls[0].function.name"
    for expression in ("m.content", name, 'm.content ~ \'{"x": 1, "text": "a"}\''):
        tokenizer = written(checkpoint, expression)
        with pytest.raises(UserError, match=f'message 2 of 2: .*leaves out its "{field}"'):
            encode_chat([user("q"), message], tokenizer, "checkpoint")
    arguments = name.replace("name", "arguments")
    raw = arguments if spelled is json.dumps else f"({arguments} | tojson)"
    weight, lines = weight_of(written(checkpoint, f"{name} ~ ':' ~ {raw}"), [user("q"), message])
    assert weight > 0 and not lines


def test_arguments_in_a_string_may_be_written_as_they_are(checkpoint):
    """1e3 is not how Python writes the number."""
    tokenizer = written(
        checkpoint, "m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments"
    )
    call = {"function": {"name": "add", "arguments": '{"x": 1e3, "y": "\\u00e9"}'}}
    weight, lines = weight_of(tokenizer, [user("q"), assistant("", tool_calls=[call])])
    assert weight > 0 and not lines


def test_r1_and_its_like_unlearn_no_thought(checkpoint):
    """DeepSeek-R1's template drops each thought: what is left would be learnt as an answer."""
    tokenizer = load_tokenizer(checkpoint("r1", {"eos_token": "<｜end▁of▁sentence｜>"}))
    messages = [user("q1"), assistant("a1"), user("q2"), assistant(THOUGHT)]
    with pytest.raises(UserError, match=r'message 4 of 4: .* "content" \("why"\)'):
        encode_chat(messages, tokenizer, "checkpoint")
    with pytest.raises(UserError, match=r'message 4 of 4: .* "reasoning" \("w"\)'):
        encode_chat([*messages[:3], assistant("a", reasoning="w")], tokenizer, "checkpoint")


def test_a_turn_behind_a_lost_message_has_no_weight(checkpoint):
    """What came before it was written with all that it answers."""
    directory = checkpoint(None)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = load_tokenizer(directory)
    first = [user("q"), assistant("one")]
    alone, _ = weight_of(tokenizer, first)
    messages = [*first, {"role": "tool", "content": "10"}, assistant("two")]
    assert weight_of(tokenizer, messages)[0] == alone > 0
    with pytest.raises(UserError, match='message 3 of 4: the chat template leaves out its "conten'):
        encode_chat(messages, tokenizer, "checkpoint")
    with pytest.raises(UserError, match=r"message 3 of 3: .*; take another data.chat_template$"):
        encode_prompt(messages[:3], tokenizer, "checkpoint")


def test_tools_that_a_template_does_not_know_are_an_error(checkpoint):
    tokenizer = written(checkpoint, "m.content")
    messages = [user("q"), assistant("a")]
    with pytest.raises(UserError, match='the chat template leaves out the tool "add"'):
        encode_chat(messages, tokenizer, "checkpoint", TOOLS)
    weight, lines = weight_of(tokenizer, messages, TOOLS)
    assert weight == 0 and len(lines) == 1


def test_nothing_is_left_out_where_all_is_written(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    weight, lines = weight_of(tokenizer, TOOL_USE, TOOLS)
    assert weight > 50 and not lines
