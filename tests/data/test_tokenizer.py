"""Text to ids and back, with the tokenizers made here."""

import pytest

from data.decode_stream import DecodeStream
from data.special_tokens import SPECIAL_TOKENS
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer, train_bpe

TEXTS = [
    "the cat sat on the mat, 123 + 456 = 579\n" * 20,
    "naïve café 你好 🙂👩‍👩‍👧 \x00\t\r\n  end",
    "",
]


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request) -> Tokenizer:
    return train_bpe(TEXTS, 300) if request.param == "bpe" else bytes_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_text_cannot_forge_special_tokens(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text)
    assert not {tokenizer.special_token_id(special) for special in SPECIAL_TOKENS} & set(ids)
    assert tokenizer.decode(ids) == text


def test_decoding_skips_special_tokens_but_keeps_tags(tokenizer):
    ids = [
        tokenizer.bos,
        tokenizer.special_token_id("<think>"),
        *tokenizer.encode("x"),
        tokenizer.special_token_id("</think>"),
        tokenizer.eos,
        tokenizer.pad,
    ]
    assert tokenizer.decode(ids) == "<think>x</think>"
    whole = "<|bos|><think>x</think><|eos|><|pad|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "deep")
    # Nothing half-written is beside it.
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (loaded.vocab_size, loaded.bos, loaded.eos, loaded.pad, loaded.fim) == (
        tokenizer.vocab_size,
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
        tokenizer.fim,
    )
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_shows_half_a_character(tokenizer, text):
    stream = DecodeStream(tokenizer)
    shown = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(shown) + stream.flush() == text
    assert not any("\ufffd" in part for part in shown)


def test_a_stream_flushes_a_character_that_never_closed():
    stream = DecodeStream(bytes_tokenizer())
    assert [stream.push(byte) for byte in "a🙂".encode()[:3]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
