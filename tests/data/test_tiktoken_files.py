"""Tokenizers that come as tiktoken's ranks, as Kimi-K2's and Moonlight's do.

The literal ids are what tiktoken 0.14 gave with the same ranks and pattern.
"""

import base64
import json

import pytest

from data.tokenizer_files import has_tokenizer, load_tokenizer
from errors import UserError

WORDS = ["th", "the", "he", " the", "in", "ing", "ee", "eee", "你".encode()[:2].decode("latin-1")]
PATTERN = [r"[\p{Han}]+", r" ?[\p{L}&&[^\p{Han}]]+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+", r"\s+"]
SPECIAL = {"275": "[BOS]", "276": "[EOS]", "280": "<|im_end|>"}
TEXTS = ["the thing theee eeee heeee", "你好 12345 the[EOS]", "  in\n\nthing, 你 a"]
IDS = [
    [257, 32, 256, 261, 259, 262, 32, 262, 262, 32, 258, 263],
    [264, 160, 229, 165, 189, 32, 49, 50, 51, 52, 53, 259, 91, 69, 79, 83, 93],
    [32, 32, 260, 10, 10, 256, 261, 44, 32, 264, 160, 32, 97],
]


def ranks_of(words: list[str]) -> list[bytes]:
    """The 256 bytes, then the words; the last stands for the first two bytes of a character."""
    return [bytes([value]) for value in range(256)] + [word.encode("latin-1") for word in words]


@pytest.fixture
def kimi(tmp_path):
    """A directory as Kimi-K2's."""
    lines = [
        f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks_of(WORDS))
    ]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (tmp_path / "tokenization_kimi.py").write_text(
        "import no_such_module\nclass T:\n    pat_str = '|'.join(" + repr(PATTERN) + ")\n"
    )
    config = {
        "added_tokens_decoder": {
            index: {"content": text, "special": True} for index, text in SPECIAL.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 280}))
    return tmp_path


def test_ids_are_those_of_tiktoken(kimi):
    tokenizer = load_tokenizer(kimi)
    assert [tokenizer.encode(text) for text in TEXTS] == IDS
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_ids_of_the_config(kimi, tmp_path):
    """With gaps between them, and none for those that nobody names."""
    assert has_tokenizer(kimi)
    tokenizer = load_tokenizer(kimi / "tokenizer.json")  # which is not there
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (275, 276, (276, 280))
    assert tokenizer.vocab_size == 281 and tokenizer.encode_rendered("a<|im_end|>") == [97, 280]
    assert 280 not in tokenizer.encode("<|im_end|>") and tokenizer.chat_template is not None
    tokenizer.save(tmp_path / "workdir" / "tokenizer.json")
    saved = load_tokenizer(tmp_path / "workdir")
    assert [saved.encode_rendered(text) for text in TEXTS] == [
        tokenizer.encode_rendered(text) for text in TEXTS
    ]
    assert (saved.vocab_size, saved.stops) == (281, (276, 280))


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("tiktoken.model", "YQ== 0\nYg==", 'tiktoken.model:2: must be "BASE64 RANK"'),
        ("tiktoken.model", "YQ== 0\n???? 1", 'tiktoken.model:2: must be "BASE64 RANK"'),
        ("tiktoken.model", "YQ== 0", "tiktoken.model: lacks some of the 256 bytes"),
        ("tokenization_kimi.py", "pat_str = make()", "no Python file beside it has the pat_str"),
        ("tokenization_kimi.py", "pat_str = (", "no Python file beside it has the pat_str"),
        ("tokenization_kimi.py", "pat_str = '((('", "not a Hugging Face tokenizer.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {}}}', "must have a token for"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"3": {"content": "[EOS]"}}}',
            "[EOS] has the id of one of its entries",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_one_line(kimi, file, content, words):
    (kimi / file).write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(kimi)
    assert words in str(error.value) and "\n" not in str(error.value)
