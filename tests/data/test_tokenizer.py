import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data.tokenizer import SPECIAL_TOKENS, DecodeStream, Tokenizer, bytes_tokenizer, load_tokenizer, train_bpe
from errors import UserError

TEXTS = [
    "the cat sat on the mat, 123 + 456 = 579\n" * 20,
    "naïve café 你好 🙂👩‍👩‍👧 \x00\t\r\n  end",
    "",
]


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request) -> Tokenizer:
    return train_bpe(TEXTS, 300) if request.param == "bpe" else bytes_tokenizer()


def hugging_face(path, added: dict[str, bool], config: dict | None = None):
    """Writes a byte-level tokenizer.json with these added tokens (text -> whether flagged special),
    as another project would.
    """
    backend = Backend(
        models.BPE(
            vocab={
                char: index
                for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
            },
            merges=[],
        )
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in added.items()]
    )
    backend.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_bytes_are_their_values():
    text = "A 你\n"
    assert bytes_tokenizer().encode(text) == list(text.encode())
    assert bytes_tokenizer().vocab_size == 256 + len(SPECIAL_TOKENS)


def test_text_cannot_forge_specials(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text)
    assert not {tokenizer.special_token_id(special) for special in SPECIAL_TOKENS} & set(ids)
    assert tokenizer.decode(ids) == text


def test_decode_drops_specials_but_keeps_tags(tokenizer):
    ids = [
        tokenizer.bos,
        tokenizer.special_token_id("<think>"),
        *tokenizer.encode("x"),
        tokenizer.special_token_id("</think>"),
        tokenizer.eos,
        tokenizer.pad,
    ]
    assert tokenizer.decode(ids) == "<think>x</think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|><think>x</think><|eos|><|pad|>"


def test_digits_are_split_one_by_one():
    tokenizer = train_bpe(["1234 1234 1234 12 34"] * 50, 300)
    one, two, three, four = (tokenizer.encode(digit)[0] for digit in "1234")
    assert tokenizer.encode("1234") == [one, two, three, four]


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_bpe(TEXTS, 320).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "deep")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [
        "tokenizer.json"
    ]  # nothing half-written beside it
    assert (loaded.vocab_size, loaded.bos, loaded.eos, loaded.pad, loaded.fim) == (
        tokenizer.vocab_size,
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
        tokenizer.fim,
    )
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    "spelling",
    [
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ],
)
def test_known_fim_spellings_even_if_not_flagged_special(tmp_path, spelling):
    """DeepSeek's file does not flag its FIM tokens as special; in a text they must be text all the
    same.
    """
    loaded = load_tokenizer(
        hugging_face(tmp_path, {"</s>": True, **dict.fromkeys(spelling, False)})
    )
    assert [loaded.decode([index], skip_special_tokens=False) for index in loaded.fim] == list(spelling)
    forged = loaded.encode("".join(spelling))
    assert not set(loaded.fim) & set(forged)


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


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(UserError, match=r"wrong.json: not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="no token that ends a document"):
        load_tokenizer(hugging_face(tmp_path, {"<s>": True}))
    with pytest.raises(UserError, match="no fill-in-the-middle tokens"):
        _ = load_tokenizer(hugging_face(tmp_path, {"</s>": True})).fim


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_shows_half_a_character(tokenizer, text):
    stream = DecodeStream(tokenizer)
    shown = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(shown) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in shown)


def test_stream_flushes_what_never_closed():
    stream = DecodeStream(bytes_tokenizer())
    assert [stream.push(byte) for byte in "a🙂".encode()[:3]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
