"""The templates "think" and "r1"."""

import re

import pytest

from data.chat import encode_chat, encode_prompt, spelled_out
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer
from errors import UserError

USER = {"role": "user", "content": "1+1? <think>"}
ASSISTANT = {"role": "assistant", "content": "<think>1+1=2</think><answer>2</answer>"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def test_think_has_markers_and_the_assistant_as_target(tokenizer):
    ids, weights = encode_chat([USER, ASSISTANT], tokenizer, "think")
    written = "<|user|>1+1? <think><|assistant|><think>1+1=2</think><answer>2</answer><|eos|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == written
    # The one of the assistant; the user's is text.
    assert ids.count(tokenizer.special_token_id("<think>")) == 1
    targets = [index for index, weight in zip(ids, weights, strict=True) if weight]
    target_text = tokenizer.decode(targets, skip_special_tokens=False)
    assert target_text == written.partition("<|assistant|>")[2]
    assert set(weights) == {0.0, 1.0}


def test_r1_is_the_prompt_of_the_paper(tokenizer):
    """arXiv 2501.12948, table 1: "... User: prompt. Assistant:"."""
    ids = encode_prompt([USER], tokenizer, "r1")
    text = tokenizer.decode(ids)
    assert text.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it."
    )
    assert text.endswith(
        "<think> reasoning process here </think> <answer> answer here </answer>. "
        "User: 1+1? <think>. Assistant:"
    )
    # Both are in the template; the user's is text.
    assert ids.count(tokenizer.special_token_id("<think>")) == 2


@pytest.mark.parametrize("template", ["think", "r1"])
@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER]]
)
def test_a_prompt_is_the_beginning_of_the_whole_conversation(tokenizer, template, messages):
    """A model fine-tuned on conversations meets, when sampled, the context of its training."""
    prompt = encode_prompt(messages, tokenizer, template)
    ids, weights = encode_chat([*messages, ASSISTANT], tokenizer, template)
    assert ids[: len(prompt)] == prompt
    assert weights[len(prompt) :] == [1.0] * (len(ids) - len(prompt))
    turns = 1 + sum(message["role"] == "assistant" for message in messages)
    eos_weights = [
        weight for index, weight in zip(ids, weights, strict=True) if index == tokenizer.eos
    ]
    assert eos_weights == [1.0] * turns


def without(tmp_path, *specials):
    """Returns a tokenizer of bytes that lacks these special tokens."""
    bytes_tokenizer().save(tmp_path / "tokenizer.json")
    stripped = (tmp_path / "tokenizer.json").read_text()
    for special in specials:
        stripped = stripped.replace(f'"{special}"', f'"<|unused {special.strip("<|>")}|>"')
    (tmp_path / "tokenizer.json").write_text(stripped)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "mark", ["<|user|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>"]
)
def test_a_mark_that_the_tokenizer_lacks_is_never_spelled_out(tmp_path, mark):
    """As characters it would be a template that no model was trained on."""
    with pytest.raises(UserError, match=rf'"think": the tokenizer .*has no {re.escape(mark)}'):
        encode_chat([USER, ASSISTANT], without(tmp_path, mark), "think")


def test_r1_is_plain_text_where_the_tokenizer_has_no_tags(tmp_path):
    """Its prompt is made for base models, whose tokenizers have none of the tags."""
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    tokenizer = without(tmp_path, *tags)
    assert spelled_out("r1", tokenizer) == tags and spelled_out("think", tokenizer) == []
    assert spelled_out("r1", bytes_tokenizer()) == []
    ids, _ = encode_chat([USER, ASSISTANT], tokenizer, "r1")
    assert all(index < 256 for index in ids[:-1])
    assert tokenizer.decode(ids).endswith(f"Assistant: {ASSISTANT['content']}")


@pytest.mark.parametrize("template", ["think", "r1"])
@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_in_a_field_is_written_in_tags(tokenizer, template, field):
    answer = {"role": "assistant", "content": "<answer>2</answer>", field: "1+1=2"}
    assert encode_chat([USER, answer], tokenizer, template) == encode_chat(
        [USER, ASSISTANT], tokenizer, template
    )


CALL = {"tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}


@pytest.mark.parametrize("template", ["think", "r1"])
def test_calls_and_tools_cannot_be_written(tokenizer, template):
    """They are refused, or by option the turns concerned have no weight and are counted."""
    messages = [USER, {"role": "assistant", "content": "", **CALL}, USER, ASSISTANT]
    with pytest.raises(UserError, match=r'message 2 of 4: .*leaves out its "tool_calls"'):
        encode_chat(messages, tokenizer, template)
    with pytest.raises(UserError, match="leaves out tools"):
        encode_chat([USER, ASSISTANT], tokenizer, template, tools=[{"name": "add"}])
    lines = []
    ids, weights = encode_chat(messages, tokenizer, template, omitted=lines.append)
    targets = [index for index, weight in zip(ids, weights, strict=True) if weight]
    assert len(lines) == 1 and targets.count(tokenizer.eos) == 1
    _, weights = encode_chat(
        [USER, ASSISTANT], tokenizer, template, [{"name": "add"}], lines.append
    )
    assert len(lines) == 2 and not any(weights)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "it is empty"),
        ([SYSTEM], "it is empty"),
        ([USER], 'must end with a message of role "assistant", not "user"'),
        ([ASSISTANT], 'message 1 of 1 has role "assistant" where "user" is due'),
        ([USER, USER], 'message 2 of 2 has role "user" where "assistant" is due'),
        ([USER, SYSTEM, ASSISTANT], 'message 2 of 3 has role "system"'),
        ([USER, {"role": "tool", "content": ""}], 'has role "tool"'),
    ],
)
def test_turns_out_of_order_are_refused(tokenizer, messages, words):
    with pytest.raises(UserError) as error:
        encode_chat(messages, tokenizer, "think")
    assert words in str(error.value)


def test_a_prompt_ends_with_the_user(tokenizer):
    with pytest.raises(UserError, match='must end with a message of role "user"'):
        encode_prompt([USER, ASSISTANT], tokenizer, "think")
    with pytest.raises(UserError, match='template = "chatml": must be one of think, r1'):
        encode_prompt([USER], tokenizer, "chatml")
