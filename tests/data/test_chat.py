import pytest

from data.chat import Parsed, encode_chat, encode_prompt, parse_completion
from data.tokenizer import bytes_tokenizer, load_tokenizer
from errors import UserError

USER = {"role": "user", "content": "1+1? <think>"}
ASSISTANT = {"role": "assistant", "content": "<think>1+1=2</think><answer>2</answer>"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def test_think_template(tokenizer):
    ids, weights = encode_chat([USER, ASSISTANT], tokenizer, "think")
    written = "<|user|>1+1? <think><|assistant|><think>1+1=2</think><answer>2</answer><|eos|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == written
    assert ids.count(tokenizer.special_token_id("<think>")) == 1  # the assistant's; the user's is text
    assert (
        tokenizer.decode(
            [index for index, weight in zip(ids, weights, strict=True) if weight],
            skip_special_tokens=False,
        )
        == written.partition("<|assistant|>")[2]
    )
    assert set(weights) == {0.0, 1.0}


def test_r1_template(tokenizer):
    """arXiv 2501.12948, table 1: "... User: prompt. Assistant:"."""
    ids = encode_prompt([USER], tokenizer, "r1")
    text = tokenizer.decode(ids)
    assert text.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it."
    )
    assert text.endswith(
        "<think> reasoning process here </think> <answer> answer here </answer>. User: 1+1? <think>. Assistant:"
    )
    assert ids.count(tokenizer.special_token_id("<think>")) == 2  # both in the template; the user's is text


@pytest.mark.parametrize("template", ["think", "r1"])
@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT, USER]]
)
def test_prompt_is_what_comes_before_the_assistant(tokenizer, template, messages):
    """So that a model fine-tuned on conversations meets, when sampled, what it was trained
    after.
    """
    prompt = encode_prompt(messages, tokenizer, template)
    ids, weights = encode_chat([*messages, ASSISTANT], tokenizer, template)
    assert ids[: len(prompt)] == prompt
    assert weights[len(prompt) :] == [1.0] * (len(ids) - len(prompt))
    turns = sum(message["role"] == "assistant" for message in messages)
    assert ids.count(tokenizer.eos) == turns + 1
    assert (
        sum(weight for index, weight in zip(ids, weights, strict=True) if index == tokenizer.eos)
        == turns + 1
    )


def test_markers_are_text_where_the_tokenizer_has_none(tmp_path):
    plain = bytes_tokenizer()
    plain.save(tmp_path / "tokenizer.json")
    stripped = (tmp_path / "tokenizer.json").read_text()
    for special in ("<|user|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>"):
        stripped = stripped.replace(f'"{special}"', f'"<|unused {special.strip("<|>")}|>"')
    (tmp_path / "tokenizer.json").write_text(stripped)
    tokenizer = load_tokenizer(tmp_path)
    ids, _ = encode_chat([USER, ASSISTANT], tokenizer, "think")
    assert (
        tokenizer.decode(ids)
        == "<|user|>1+1? <think><|assistant|><think>1+1=2</think><answer>2</answer>"
    )
    assert all(index < 256 for index in ids[:-1])


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
def test_turns_out_of_order(tokenizer, messages, words):
    with pytest.raises(UserError) as error:
        encode_chat(messages, tokenizer, "think")
    assert words in str(error.value)


def test_a_prompt_ends_with_the_user(tokenizer):
    with pytest.raises(UserError, match='must end with a message of role "user"'):
        encode_prompt([USER, ASSISTANT], tokenizer, "think")
    with pytest.raises(UserError, match='template = "chatml": must be one of think, r1'):
        encode_prompt([USER], tokenizer, "chatml")


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("<think>a</think><answer>b</answer>", ("a", "b")),
        (" \n<think> a\nc </think>\n <answer> b </answer>\n", ("a\nc", "b")),
        ("<think></think><answer></answer>", ("", "")),
        ("<think>a < b</think><answer>$x > 1$</answer>", ("a < b", "$x > 1$")),
    ],
)
def test_well_formed_completions(text, parsed):
    assert parse_completion(text) == Parsed(*parsed, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "<answer>b</answer>",
        "<think>a</think>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "x<think>a</think><answer>b</answer>",
        "<think>a</think>x<answer>b</answer>",
        "<think>a</think><answer>b</answer>x",
        "<think>a</think><answer>b</answer><|eos|>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</think></answer>",
        "<think>a</think><answer>c</answer><think>a</think><answer>b</answer>",
        "<Think>a</Think><answer>b</answer>",
    ],
)
def test_malformed_completions(text):
    assert parse_completion(text) == Parsed("", "", False)
