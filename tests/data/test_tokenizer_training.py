"""Tokenizers made here from bytes and from text."""

import itertools

from data.config import TokenizerConfig
from data.shuffled_texts import infill_documents
from data.special_tokens import SPECIAL_TOKENS
from data.tokenizer_training import bytes_tokenizer, make_tokenizer, train_bpe


def test_bytes_are_their_values():
    text = "A 你\n"
    assert bytes_tokenizer().encode(text) == list(text.encode())
    assert bytes_tokenizer().vocab_size == 256 + len(SPECIAL_TOKENS)


def test_digits_are_split_one_by_one():
    tokenizer = train_bpe(["1234 1234 1234 12 34"] * 50, 300)
    one, two, three, four = (tokenizer.encode(digit)[0] for digit in "1234")
    assert tokenizer.encode("1234") == [one, two, three, four]


def test_training_is_deterministic(tmp_path):
    texts = ["the cat sat on the mat, 123 + 456 = 579\n" * 20, "naïve café 你好 🙂 \t\r\n  end", ""]
    for name in ("a", "b"):
        train_bpe(texts, 320).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_trained_tokenizer_does_not_depend_on_chance_or_validation(config, corpus, tmp_path):
    settings = config(sources=(*config().sources, "task:arithmetic?count=50"), mixture=(1.0, 1.0))
    bpe = TokenizerConfig("bpe", "", 300)
    for name in ("a", "b"):
        make_tokenizer(bpe, settings).save(tmp_path / name)
    for name, _ in itertools.chain(*infill_documents(settings, "validation").values()):
        path = corpus / name.partition("[")[0]
        path.write_text("held out " * (path.stat().st_size // 9 + 1))
    make_tokenizer(bpe, settings).save(tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c")}) == 1


def test_each_kind_of_tokenizer_has_its_vocabulary(config, tmp_path):
    assert make_tokenizer(TokenizerConfig("bytes", "", 0), config()).vocab_size == 268
    trained = make_tokenizer(TokenizerConfig("bpe", "", 280), config())
    trained.save(tmp_path / "tokenizer.json")
    loaded = make_tokenizer(TokenizerConfig("file", str(tmp_path), 0), config())
    assert loaded.vocab_size == trained.vocab_size == 280
