"""A checkpoint's chat template as ids and weights. The literal ids are what transformers 5.23 gave:
apply_chat_template(tokenize=True), from the same files.
"""

import json

import pytest

from data.chat import encode_chat, encode_prompt
from data.tokenizer import bytes_tokenizer, load_tokenizer
from errors import UserError
from tests.data.conftest import ADDED


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


R1 = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
TWO = [
    user("q1"),
    assistant("<think>\nwhy\n</think>\n\nbecause"),
    user("q2"),
    assistant("<think>\nwhy\n</think>\n\nbecause"),
]


def targets(messages, tokenizer, tools=None):
    """What counts of a conversation, run by run, as text."""
    ids, weights = encode_chat(messages, tokenizer, "checkpoint", tools)
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.chat_template.render(
        messages, add_generation_prompt=False, tools=tools
    )
    assert set(weights) <= {0.0, 1.0} and len(weights) == len(ids)
    runs = [[]]
    for index, weight in zip(ids, weights, strict=True):
        if weight:
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def plain(checkpoint, behind):
    """A checkpoint whose template writes the role, `behind`, the content."""
    directory = checkpoint(None)
    turn = f"{{{{ message.role + '{behind}' + message.content + '<|im_end|>' }}}}"
    cue = f"{{{{ 'assistant{behind}' }}}}"
    source = f"{{% for message in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{cue}{{% endif %}}"
    (directory / "chat_template.jinja").write_text(source)
    return directory


@pytest.mark.parametrize(
    "name, config, messages, ids",
    [
        (
            "chatml",
            {"eos_token": "<|im_end|>"},
            TWO,
            "259 84 82 68 81 198 80 16 260 198 259 64 82 82 72 82 83 64 77 83 198 65 68 66 64 84 82 68 260 198 259 84 82 68 81 198 80 17 260 198 259 64 82 82 "
            "72 82 83 64 77 83 198 268 198 86 71 88 198 269 198 198 65 68 66 64 84 82 68 260 198",
        ),
        (
            "chatml",
            {"eos_token": "<|im_end|>"},
            [
                {"role": "system", "content": "Be short."},
                user([{"text": "q"}, {"text": "naïve 你"}]),
                assistant("hi"),
            ],
            "259 82 88 82 83 68 76 198 33 68 220 82 71 78 81 83 13 260 198 259 84 82 68 81 198 80 220 77 64 127 107 85 68 220 160 121 254 260 198 259 64 82 82 "
            "72 82 83 64 77 83 198 268 256 269 198 198 257 260 198",
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
            "58 82 83 64 81 83 60 266 198 80 16 267 198 268 86 269 198 257 266 198 80 17 267 198 268 269 198 257",
        ),
    ],
)
def test_ids_are_those_of_transformers(checkpoint, name, config, messages, ids):
    """Added tokens count whether or not their file flags them special, and neighbours merge as in
    one text.
    """
    assert encode_chat(messages, load_tokenizer(checkpoint(name, config)), "checkpoint")[0] == [
        int(index) for index in ids.split()
    ]


def test_a_prompt_is_that_of_transformers(checkpoint):
    """A special token, and a run of spaces that is a token, count in what the user says too."""
    tokenizer = load_tokenizer(checkpoint("chatml"))
    ids = encode_prompt([user("q <|im_end|>     x")], tokenizer, "checkpoint")
    assert ids == [
        259,
        84,
        82,
        68,
        81,
        198,
        80,
        220,
        260,
        272,
        220,
        87,
        260,
        198,
        259,
        64,
        82,
        82,
        72,
        82,
        83,
        64,
        77,
        83,
        198,
    ]


def test_ordinary_text_still_makes_no_special_ids(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    special = {tokenizer.special_token_id(text) for text in ADDED} - {None}
    assert set(tokenizer.encode_rendered("".join(ADDED))) >= special
    assert not special & set(tokenizer.encode("".join(ADDED)))
    assert set(map(tokenizer.is_special, special)) == {True} and not tokenizer.is_special(0)


def test_a_role_may_be_a_token_of_the_vocabulary_alone(checkpoint):
    """transformers adds it, with the id it has; ours must find it in a template's text and not in
    ordinary text, as any other.
    """
    tokenizer = load_tokenizer(checkpoint("r1", {"bos_token": "hi", "eos_token": "<|im_end|>"}))
    assert (tokenizer.bos, tokenizer.vocab_size) == (257, 258 + len(ADDED))
    assert tokenizer.encode_rendered("hi") == [tokenizer.bos]


def test_a_role_may_be_an_added_token_that_its_file_does_not_flag(checkpoint):
    tokenizer = load_tokenizer(
        checkpoint("r1", {"bos_token": "<tool_call>", "eos_token": "<|im_end|>"})
    )
    assert (
        tokenizer.encode_rendered("<tool_call>")
        == [tokenizer.bos]
        == [tokenizer.special_token_id("<tool_call>")]
    )
    assert tokenizer.bos not in tokenizer.encode("<tool_call>")


def test_weights_cover_what_the_assistant_writes(checkpoint):
    """Up to the id that ends the turn: the end of line behind it is the template's."""
    tokenizer = load_tokenizer(checkpoint("chatml"))
    assert targets(TWO, tokenizer) == ["<think>\nwhy\n</think>\n\nbecause<|im_end|>"]
    call = {"function": {"name": "f"}}
    tools = [{"name": "f"}]
    messages = [
        user("q"),
        assistant("", thinking="t", tool_calls=[call]),
        {"role": "tool", "content": "10"},
        assistant("naïve 你", thinking="u"),
    ]
    assert targets(messages, tokenizer, tools) == [
        '<think>\nt\n</think>\n\n<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>',
        "<think>\nu\n</think>\n\nnaïve 你<|im_end|>",
    ]
    assert encode_prompt(messages[:1], tokenizer, "checkpoint", tools) != encode_prompt(
        messages[:1], tokenizer, "checkpoint"
    )


@pytest.mark.parametrize(
    "name, config",
    [("chatml", {"eos_token": "<|im_end|>"}), ("speaker", {"eos_token": "<|user|>"})],
)
def test_prompt_is_what_comes_before_the_assistant(checkpoint, name, config):
    """So that a model fine-tuned on conversations meets, when sampled, what it was trained
    after.
    """
    tokenizer = load_tokenizer(checkpoint(name, config))
    for turns in ([user("q")], [user("q"), assistant("a"), user("r")]):
        prompt = encode_prompt(turns, tokenizer, "checkpoint")
        ids, weights = encode_chat(
            [*turns, assistant("so it is", thinking="t")], tokenizer, "checkpoint"
        )
        assert ids[: len(prompt)] == prompt
        assert weights[len(prompt)] == 1.0 and not weights[len(prompt) - 1]


def test_a_turn_may_end_with_the_next_speaker(checkpoint):
    """Whose marker is then a stop: the assistant writes it. Nobody follows the last turn, and what
    ends it is not in its text.
    """
    messages = [user("q1"), assistant("a1", thinking="t"), user("q2"), assistant("a2")]
    tokenizer = load_tokenizer(
        checkpoint(
            "speaker",
            {"eos_token": "<|endoftext|>"},
            generation_config={"eos_token_id": [258, 266]},
        )
    )
    assert targets(messages, tokenizer) == [
        "\n<think>t</think>\na1<|user|>",
        "\n<think></think>\na2",
    ]
    without = load_tokenizer(
        checkpoint("speaker", {"eos_token": "<|endoftext|>"}, generation_config={})
    )
    assert targets(messages, without)[0] == "\n<think>t</think>\na1"


def test_an_end_of_turn_need_not_be_a_stop(checkpoint):
    """A base model's: its text ends with <|endoftext|>, its template's turns with <|im_end|>."""
    tokenizer = load_tokenizer(checkpoint("chatml", {"eos_token": "<|endoftext|>"}))
    assert targets([user("q"), assistant("a")], tokenizer) == ["<think>\n\n</think>\n\na<|im_end|>"]


def test_a_message_that_holds_a_stop(checkpoint):
    """Sampling would have ended there: what is behind it was never written."""
    tokenizer = load_tokenizer(checkpoint("chatml"))
    with pytest.raises(
        UserError, match=r"message 2 holds <\|im_end\|>, at which sampling stops, before its end"
    ):
        encode_chat([user("q"), assistant("a<|im_end|>b")], tokenizer, "checkpoint")
    assert targets([user("q<|im_end|>"), assistant("a<|im_end|>")], tokenizer) == [
        "<think>\n\n</think>\n\na<|im_end|>"
    ]


def test_an_id_across_the_end_of_the_prompt_does_not_count(checkpoint):
    """Behind "<think>\\n" an assistant cannot write the id of two ends of line, half of which is
    the prompt's.
    """
    tokenizer = load_tokenizer(plain(checkpoint, "<think>\\n"))
    ids, _ = encode_chat([user("q"), assistant("\n</think>a")], tokenizer, "checkpoint")
    assert 256 in ids
    assert targets([user("q"), assistant("\n</think>a")], tokenizer) == ["</think>a<|im_end|>"]


def test_the_space_in_which_a_prompt_ends_does_not_count(checkpoint):
    """Though the tokenizer's own post-processor says that the id for it has no characters."""
    assert targets([user("q"), assistant("a b")], load_tokenizer(plain(checkpoint, ": "))) == [
        "a b<|im_end|>"
    ]


def test_a_saved_tokenizer_has_all_of_the_checkpoints(checkpoint, tmp_path):
    """Whether the template came in a file of its own or in the config."""
    directory = checkpoint(
        "r1",
        R1 | {"pad_token": "<|endoftext|>", "unk_token": "<|system|>"},
        generation_config={"eos_token_id": [262, 258]},
    )
    source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    first = load_tokenizer(directory)
    (directory / "chat_template.jinja").unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": source}), encoding="utf-8"
    )
    for number, tokenizer in enumerate((first, load_tokenizer(directory))):
        workdir = tmp_path / f"{number}"
        tokenizer.save(workdir / "tokenizer.json")
        assert {path.name for path in workdir.iterdir()} == {
            "tokenizer.json",
            "chat_template.jinja",
            "tokenizer_config.json",
            "generation_config.json",
        }
        loaded = load_tokenizer(workdir / "tokenizer.json")
        for kept in ("bos", "eos", "pad", "stops", "vocab"):
            assert getattr(loaded, kept) == getattr(first, kept)
        assert loaded.stops == (262, 258)
        assert (loaded.chat_template.source, loaded.chat_template.special_tokens) == (
            first.chat_template.source,
            first.chat_template.special_tokens,
        )
        assert encode_chat(TWO, loaded, "checkpoint") == encode_chat(TWO, first, "checkpoint")


@pytest.mark.parametrize(
    "files, stops",
    [
        ({}, [260]),
        ({"generation_config": {"eos_token_id": 258}}, [260, 258]),
        (
            {"generation_config": {"eos_token_id": [258, 260]}, "config": {"eos_token_id": 0}},
            [260, 258],
        ),
        (
            {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 261}},
            [260, 261],
        ),
        ({"config": {"command": "pretrain", "config": {}}}, [260]),  # a workdir's own
    ],
)
def test_stops_are_the_eos_and_what_the_checkpoint_names(checkpoint, files, stops):
    tokenizer = load_tokenizer(checkpoint("chatml", **files))
    assert (tokenizer.eos, tokenizer.stops) == (260, tuple(stops))


def test_stops_that_are_no_ids(checkpoint):
    with pytest.raises(
        UserError,
        match=r"generation_config.json: eos_token_id = \['<eos>'\]: must be an id, or a list of ids",
    ):
        load_tokenizer(checkpoint("chatml", generation_config={"eos_token_id": ["<eos>"]}))


def test_a_broken_file_beside_the_tokenizer(checkpoint):
    directory = checkpoint("chatml")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: not UTF-8 at byte 0"):
        load_tokenizer(directory)
    (directory / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config.json: a JSON list, not an object"):
        load_tokenizer(directory)


def test_a_tokenizer_without_a_template(checkpoint):
    for tokenizer in (bytes_tokenizer(), load_tokenizer(checkpoint(None))):
        with pytest.raises(
            UserError,
            match=r'data.chat_template = "checkpoint": the tokenizer .* has no chat template \(no chat_template.jinja beside it',
        ):
            encode_prompt([user("q")], tokenizer, "checkpoint")


def test_other_templates_write_text_alone(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    with pytest.raises(
        UserError,
        match=r'message 1 of 1 has no text as "content", which only data.chat_template = "checkpoint" can write',
    ):
        encode_prompt([user([{"type": "text", "text": "q"}])], tokenizer, "think")
