"""Training targets of a conversation that a checkpoint's template writes, case by case."""

import itertools

import pytest

from data.chat import encode_chat
from data.tokenizer_files import load_tokenizer
from errors import UserError
from tests.data.chats import THOUGHT, assistant, user


def targets(messages, tokenizer, tools=None):
    """Returns the text of each group of neighbouring targets."""
    ids, weights = encode_chat(messages, tokenizer, "checkpoint", tools)
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.chat_template.render(
        messages, add_generation_prompt=False, tools=tools
    )
    assert set(weights) <= {0.0, 1.0} and len(weights) == len(ids)
    groups = itertools.groupby(zip(ids, weights, strict=True), key=lambda pair: pair[1])
    return [
        tokenizer.decode([index for index, _ in group], skip_special_tokens=False)
        for weight, group in groups
        if weight
    ]


def with_separator(checkpoint, separator):
    """Makes a checkpoint whose template writes the role, `separator`, the content."""
    directory = checkpoint(None)
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}"
        f"{{{{ message.role + '{separator}' + message.content + '<|im_end|>' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ 'assistant{separator}' }}}}{{% endif %}}"
    )
    return directory


def test_a_turn_ends_at_its_stop(checkpoint):
    """The end of line after the stop is the template's."""
    tokenizer = load_tokenizer(checkpoint("chatml"))
    messages = [user("q1"), assistant(THOUGHT), user("q2"), assistant(THOUGHT)]
    assert targets(messages, tokenizer) == ["<think>\nwhy\n</think>\n\nbecause<|im_end|>"]


def test_every_turn_behind_the_last_question_has_targets(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    messages = [
        user("q"),
        assistant("", thinking="t", tool_calls=[{"function": {"name": "f"}}]),
        {"role": "tool", "content": "10"},
        assistant("naïve 你", thinking="u"),
    ]
    assert targets(messages, tokenizer, [{"name": "f"}]) == [
        '<think>\nt\n</think>\n\n<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>',
        "<think>\nu\n</think>\n\nnaïve 你<|im_end|>",
    ]


def test_a_turn_may_end_with_the_marker_of_the_next_speaker(checkpoint):
    """The marker is a stop then, and the assistant writes it.

    Nobody follows the last turn, and what ends it is not in its text.
    """
    messages = [user("q1"), assistant("a1", thinking="t"), user("q2"), assistant("a2")]
    eos = {"eos_token": "<|endoftext|>"}
    stops = {"eos_token_id": [258, 266]}
    tokenizer = load_tokenizer(checkpoint("speaker", eos, generation_config=stops))
    assert targets(messages, tokenizer) == [
        "\n<think>t</think>\na1<|user|>",
        "\n<think></think>\na2",
    ]
    without = load_tokenizer(checkpoint("speaker", eos, generation_config={}))
    assert targets(messages, without)[0] == "\n<think>t</think>\na1"


def test_an_end_of_turn_need_not_be_a_stop(checkpoint):
    """A base model's text ends with <|endoftext|>, its template's turns with <|im_end|>."""
    tokenizer = load_tokenizer(checkpoint("chatml", {"eos_token": "<|endoftext|>"}))
    assert targets([user("q"), assistant("a")], tokenizer) == ["<think>\n\n</think>\n\na<|im_end|>"]


def test_a_message_that_contains_a_stop_is_refused(checkpoint):
    """Sampling would have ended there, so that the rest was never written."""
    tokenizer = load_tokenizer(checkpoint("chatml"))
    with pytest.raises(
        UserError, match=r"message 2 holds <\|im_end\|>, at which sampling stops, before its end"
    ):
        encode_chat([user("q"), assistant("a<|im_end|>b")], tokenizer, "checkpoint")
    assert targets([user("q<|im_end|>"), assistant("a<|im_end|>")], tokenizer) == [
        "<think>\n\n</think>\n\na<|im_end|>"
    ]


def test_a_token_across_the_end_of_the_prompt_is_no_target(checkpoint):
    """The assistant cannot write an id of two ends of line, of which one is the prompt's."""
    tokenizer = load_tokenizer(with_separator(checkpoint, "<think>\\n"))
    messages = [user("q"), assistant("\n</think>a")]
    ids, _ = encode_chat(messages, tokenizer, "checkpoint")
    assert 256 in ids
    assert targets(messages, tokenizer) == ["</think>a<|im_end|>"]


def test_the_space_at_the_end_of_a_prompt_is_no_target(checkpoint):
    """The tokenizer's own post-processor would say that the id for it has no characters."""
    tokenizer = load_tokenizer(with_separator(checkpoint, ": "))
    assert targets([user("q"), assistant("a b")], tokenizer) == ["a b<|im_end|>"]
