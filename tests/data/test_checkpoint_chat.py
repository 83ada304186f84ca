"""Conversations as ids by a checkpoint's chat template.

The literal ids are what transformers 5.23 gave: apply_chat_template(tokenize=True) with the same
files.
"""

import pytest

from data.chat import encode_chat, encode_prompt
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from tests.data.chats import THOUGHT, assistant, user

R1 = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


@pytest.mark.parametrize(
    "name, config, messages, ids",
    [
        (
            "chatml",
            {"eos_token": "<|im_end|>"},
            [user("q1"), assistant(THOUGHT), user("q2"), assistant(THOUGHT)],
            "259 84 82 68 81 198 80 16 260 198 259 64 82 82 72 82 83 64 77 83 198 65 68 66 64 84 "
            "82 68 260 198 259 84 82 68 81 198 80 17 260 198 259 64 82 82 72 82 83 64 77 83 198 "
            "268 198 86 71 88 198 269 198 198 65 68 66 64 84 82 68 260 198",
        ),
        (
            "chatml",
            {"eos_token": "<|im_end|>"},
            [
                {"role": "system", "content": "Be short."},
                user([{"text": "q"}, {"text": "naïve 你"}]),
                assistant("hi"),
            ],
            "259 82 88 82 83 68 76 198 33 68 220 82 71 78 81 83 13 260 198 259 84 82 68 81 198 80 "
            "220 77 64 127 107 85 68 220 160 121 254 260 198 259 64 82 82 72 82 83 64 77 83 198 "
            "268 256 269 198 198 257 260 198",
        ),
        (
            "r1",
            R1,
            [user("q1"), assistant("hi"), user("q2"), assistant("hi")],
            "261 263 80 16 264 257 262 263 80 17 264 257 262",
        ),
        (
            "speaker",
            {"eos_token": "<|endoftext|>"},
            [user("q1"), assistant("hi", reasoning_content="w"), user("q2"), assistant("hi")],
            "58 82 83 64 81 83 60 266 198 80 16 267 198 268 86 269 198 257 266 198 80 17 267 198 "
            "268 269 198 257",
        ),
    ],
)
def test_ids_are_those_of_transformers(checkpoint, name, config, messages, ids):
    """Added tokens count whether or not they are flagged; their neighbours merge as in one text."""
    tokenizer = load_tokenizer(checkpoint(name, config))
    expected = [int(index) for index in ids.split()]
    assert encode_chat(messages, tokenizer, "checkpoint")[0] == expected


def test_ids_of_a_prompt_are_those_of_transformers(checkpoint):
    """A special token, and a run of spaces that is a token, count in what the user says too."""
    tokenizer = load_tokenizer(checkpoint("chatml"))
    ids = encode_prompt([user("q <|im_end|>     x")], tokenizer, "checkpoint")
    assert ids == [
        *(259, 84, 82, 68, 81, 198, 80, 220, 260, 272, 220, 87, 260, 198),
        *(259, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198),
    ]


@pytest.mark.parametrize(
    "name, config",
    [("chatml", {"eos_token": "<|im_end|>"}), ("speaker", {"eos_token": "<|user|>"})],
)
def test_a_prompt_is_the_beginning_of_the_whole_conversation(checkpoint, name, config):
    """A model fine-tuned on conversations meets, when sampled, the context of its training."""
    tokenizer = load_tokenizer(checkpoint(name, config))
    for turns in ([user("q")], [user("q"), assistant("a"), user("r")]):
        prompt = encode_prompt(turns, tokenizer, "checkpoint")
        whole = [*turns, assistant("so it is", thinking="t")]
        ids, weights = encode_chat(whole, tokenizer, "checkpoint")
        assert ids[: len(prompt)] == prompt
        assert weights[len(prompt)] == 1.0 and not weights[len(prompt) - 1]


def test_a_prompt_shows_its_tools(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    prompts = [
        encode_prompt([user("q")], tokenizer, "checkpoint", tools)
        for tools in (None, [{"name": "f"}])
    ]
    assert prompts[0] != prompts[1]


def test_a_tokenizer_without_a_template_is_refused(checkpoint):
    for tokenizer in (bytes_tokenizer(), load_tokenizer(checkpoint(None))):
        with pytest.raises(
            UserError,
            match=r'data.chat_template = "checkpoint": the tokenizer .* has no chat template '
            r"\(no chat_template.jinja beside it",
        ):
            encode_prompt([user("q")], tokenizer, "checkpoint")


def test_the_other_templates_write_text_alone(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    with pytest.raises(
        UserError,
        match=r'message 1 of 1 has no text as "content", which only '
        r'data.chat_template = "checkpoint" can write',
    ):
        encode_prompt([user([{"type": "text", "text": "q"}])], tokenizer, "think")
