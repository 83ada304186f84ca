"""Tokenizers of other projects, loaded from their files and saved with them."""

import base64
import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data.chat import encode_chat
from data.tokenizer_files import load_tokenizer
from errors import UserError
from tests.data.chats import assistant, user
from tests.data.conftest import ADDED

R1 = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


def hugging_face(path, added: dict[str, bool], config: dict | None = None):
    """Writes a byte-level tokenizer.json as another project would.

    `added` says of each added token whether the file flags it as special.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in added.items()]
    )
    backend.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path / "tokenizer.json"


@pytest.mark.parametrize(
    "spelling",
    [
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ],
)
def test_fim_tokens_are_special_even_if_not_flagged(tmp_path, spelling):
    """DeepSeek's file does not flag its FIM tokens; in a text they must be text all the same."""
    added = {"</s>": True, **dict.fromkeys(spelling, False)}
    loaded = load_tokenizer(hugging_face(tmp_path, added))
    texts = [loaded.decode([index], skip_special_tokens=False) for index in loaded.fim]
    assert texts == list(spelling)
    forged = loaded.encode("".join(spelling))
    assert not set(loaded.fim) & set(forged)


def test_flagged_tokens_are_special_whatever_their_spelling(tmp_path):
    loaded = load_tokenizer(hugging_face(tmp_path, {"</s>": True, "[INST]": True}))
    assert loaded.special_token_id("[INST]") is not None
    assert loaded.special_token_id("[INST]") not in loaded.encode("[INST]")


def test_ordinary_added_tokens_stay_ordinary(tmp_path):
    """Some families add runs of spaces: those must be found in text."""
    loaded = load_tokenizer(hugging_face(tmp_path, {"</s>": True, "    ": False}))
    assert len(loaded.encode("a    b")) == 3


def test_roles_are_read_from_the_config_beside_it(tmp_path):
    added = {"<|endoftext|>": True, "<|im_end|>": True}
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "bos_token": None,
    }
    loaded = load_tokenizer(hugging_face(tmp_path, added, config))
    assert (loaded.bos, loaded.eos, loaded.pad) == (
        None,
        loaded.special_token_id("<|im_end|>"),
        loaded.special_token_id("<|endoftext|>"),
    )


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(UserError, match=r"wrong.json: not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="no token that ends a document"):
        load_tokenizer(hugging_face(tmp_path, {"<s>": True}))
    with pytest.raises(UserError, match="no fill-in-the-middle tokens"):
        _ = load_tokenizer(hugging_face(tmp_path, {"</s>": True})).fim


@pytest.mark.parametrize(
    "listed, bos", [({}, "<|user|>"), ({"added_tokens_decoder": {}}, "<|system|>")]
)
def test_the_older_map_of_special_tokens_counts_unless_the_config_lists_tokens(
    checkpoint, listed, bos
):
    config = {
        "bos_token": "<|system|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "unk_token": None,
        **listed,
    }
    tokenizer = load_tokenizer(
        checkpoint("r1", config, special_tokens_map={"bos_token": {"content": "<|user|>"}})
    )
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.special_tokens == {"bos_token": bos, "eos_token": "<|im_end|>"}
    assert tokenizer.bos == tokenizer.special_token_id(bos)


def test_only_rendered_text_makes_special_ids(checkpoint):
    tokenizer = load_tokenizer(checkpoint("chatml"))
    found = [tokenizer.special_token_id(text) for text in ADDED]
    special = {index for index in found if index is not None}
    assert set(tokenizer.encode_rendered("".join(ADDED))) >= special
    assert not special & set(tokenizer.encode("".join(ADDED)))
    assert set(map(tokenizer.is_special, special)) == {True} and not tokenizer.is_special(0)


def test_a_role_may_be_a_token_of_the_vocabulary_alone(checkpoint):
    """Transformers adds it, with the id it has.

    Like any other it must be found in a template's text and not in ordinary text.
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


def test_a_saved_tokenizer_is_complete(checkpoint, tmp_path):
    """The template may have come in a file of its own or in the config."""
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
        for attribute in ("bos", "eos", "pad", "stops", "vocab_size"):
            assert getattr(loaded, attribute) == getattr(first, attribute)
        assert loaded.stops == (262, 258)
        assert loaded.chat_template is not None and first.chat_template is not None
        assert loaded.chat_template.source == first.chat_template.source
        assert loaded.chat_template.special_tokens == first.chat_template.special_tokens
        messages = [user("q1"), assistant("hi"), user("q2"), assistant("hi")]
        chats = [encode_chat(messages, each, "checkpoint") for each in (loaded, first)]
        assert chats[0] == chats[1]


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


def test_stops_that_are_no_ids_are_refused(checkpoint):
    with pytest.raises(
        UserError,
        match=r"generation_config.json: eos_token_id = \['<eos>'\]: must be an id, or a list",
    ):
        load_tokenizer(checkpoint("chatml", generation_config={"eos_token_id": ["<eos>"]}))


def test_a_broken_file_beside_the_tokenizer_is_named(checkpoint):
    directory = checkpoint("chatml")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: not UTF-8 at byte 0"):
        load_tokenizer(directory)
    (directory / "generation_config.json").write_text("[1]")
    with pytest.raises(
        UserError, match=r"generation_config.json: must be a JSON object, not a list"
    ):
        load_tokenizer(directory)


@pytest.mark.parametrize("charsmap", [b"", b"\xff" * 8, bytes(8), b"\x04\0\0\0abcd" + b"x" * 99])
def test_a_compiled_normaliser_of_nonsense_is_one_line(tmp_path, charsmap):
    """The library panics or aborts at it."""
    path = hugging_face(tmp_path, {"</s>": True})
    normalizer = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))
    with pytest.raises(UserError, match=r"tokenizer.json: not a .* \(its normalizer is damaged\)"):
        load_tokenizer(path)


def test_a_regex_that_never_ends_is_one_line(tmp_path):
    """The library panics, which is no Exception."""
    path = hugging_face(tmp_path, {"</s>": True})
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"}
    split["invert"] = False
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("abc")
    for encode in (
        tokenizer.encode,
        tokenizer.encode_rendered,
        lambda x: tokenizer.encode_batch([x]),
    ):
        with pytest.raises(
            UserError, match=r"tokenizer.json: the tokenizer fails at a text \(.*retry"
        ):
            encode("x" * 5000)


def test_an_id_beyond_all_vocabularies_is_one_line(tmp_path):
    path = hugging_face(tmp_path, {"</s>": True})
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["zz"] = 2**32 - 1
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="id 4294967295: a vocabulary has at most 10,000,000"):
        load_tokenizer(path)


@pytest.mark.parametrize("listed", [[1], [{}], [{"name": "default"}], [["default", "x"]], [None]])
def test_a_list_that_is_none_of_templates_is_one_line(checkpoint, listed):
    config = {"eos_token": "<|im_end|>", "chat_template": listed}
    with pytest.raises(UserError, match=r'tokenizer_config.json: "chat_template": a list must'):
        load_tokenizer(checkpoint(None, config))
