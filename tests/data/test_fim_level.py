"""What is infilled, `data.fim_level`, and the share of a batch that is, `fim_share`."""

import json

import numpy as np
import pytest

from data.documents import Document
from data.encoding import DocumentEncoder
from data.marks import INFILLED, PLAIN, unmarked
from data.pipeline import batches
from data.tokenizer_training import bytes_tokenizer, train_bpe
from tests.data.reading import recover, segments_of, take

# Texts whose parts have very different numbers of tokens a character: an average misleads.
TEXTS = [
    "a" * 300 + "🙂" * 150,
    "🙂" * 90 + "plain words " * 60,
    "x",
    "你",
    "short text",
    "é" * 57,
    "".join(f"{n} {'🙂' if n % 5 else 'abcdefgh'}\n" for n in range(200)),
]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return bytes_tokenizer() if request.param == "bytes" else train_bpe(["plain words " * 9], 290)


def encoded(config, tokenizer, text, seed):
    """Returns (infilled or not, ids) of each sequence of a text."""
    encode = DocumentEncoder(config, tokenizer)
    found = encode(("text", Document("a", text)), np.random.default_rng(seed))
    marks = [np.unique(one["tokens"] & (INFILLED | PLAIN)) for one in found]
    assert all(len(mark) == 1 and mark[0] for mark in marks)
    return [
        (mark[0] == INFILLED, unmarked(one["tokens"]).tolist())
        for mark, one in zip(marks, found, strict=True)
    ]


@pytest.mark.parametrize("packing", ["split", "fit"])
@pytest.mark.parametrize("seq_len", [16, 64, 256])
@pytest.mark.parametrize("text", TEXTS)
def test_every_piece_is_infilled_and_fits(config, tokenizer, text, seq_len, packing):
    """With rate 1 and level "context" nothing stays plain, and nothing is lost."""
    settings = config(fim_rate=1.0, fim_level="context", packing=packing, seq_len=seq_len)
    for seed in range(10):
        pieces = encoded(settings, tokenizer, text, seed)
        assert all(infilled and len(ids) <= seq_len for infilled, ids in pieces)
        assert "".join(recover(ids, tokenizer) for _, ids in pieces) == text


def test_a_character_that_is_longer_than_a_row_stays_plain(config):
    settings = config(fim_rate=1.0, fim_level="context", packing="fit", seq_len=8)
    pieces = encoded(settings, bytes_tokenizer(), "🙂", 0)  # 4 bytes, 3 sentinels and [eos] fit
    assert pieces[0][0] and len(pieces[0][1]) == 8
    tall = encoded(settings, bytes_tokenizer(), "🙂" * 3, 0)
    assert all(infilled for infilled, _ in tall) and len(tall) == 3


@pytest.mark.parametrize("text", TEXTS)
def test_a_document_is_infilled_before_it_is_cut(config, tokenizer, text):
    """Joined again, the rows of a document are one fill-in-the-middle document."""
    for packing, longest in (("split", 10**9), ("fit", 64)):
        settings = config(fim_rate=1.0, fim_level="document", packing=packing)
        rows = encoded(settings, tokenizer, text, 1)
        assert all(infilled and len(ids) <= longest for infilled, ids in rows)
        assert recover([index for _, ids in rows for index in ids], tokenizer) == text


def test_by_default_what_grows_beyond_a_row_stays_plain(config):
    settings = config(fim_rate=1.0, packing="fit")
    pieces = [
        piece
        for seed in range(10)
        for piece in encoded(settings, bytes_tokenizer(), TEXTS[0], seed)
    ]
    assert 0 < sum(infilled for infilled, _ in pieces) < len(pieces)


@pytest.mark.parametrize("level", ["context", "context_or_plain", "document"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_share_is_that_of_the_batch(config, level, rate):
    """Counted by hand where every piece is a segment: those that begin with [pre] are infilled."""
    tokenizer = bytes_tokenizer()
    settings = config(fim_rate=rate, fim_level=level, packing="fit", seq_len=512)
    stream = iter(batches(settings, tokenizer, split="train", seed=0))
    shares = []
    for _ in range(30):
        segments = segments_of(next(stream))
        infilled = sum(len(ids) for ids in segments if ids[0] == tokenizer.fim.prefix)
        shares.append((infilled / sum(map(len, segments)), stream.fim_share))
    by_hand, found = np.array(shares).T
    if level != "document":  # whose rows begin anywhere
        np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    # Nine files are few: the mean of 0.5 is known to 0.3.
    low, high = {0.0: (0, 0), 0.5: (0.2, 0.8), 1.0: (0.9, 1)}[rate]
    assert low <= found.mean() <= high
    assert stream.metrics()["fim_share"] == np.float32(found[-1])
    if rate == 1.0 and level != "context_or_plain":
        assert (found == 1).all()


@pytest.mark.parametrize(
    "field, chat, kind", [("m", False, "jsonl"), ("m", True, "jsonl"), ("t", False, "text")]
)
def test_where_infilling_does_not_apply_there_is_no_share(config, tmp_path, field, chat, kind):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": turns, "t": "only text"}))
    settings = config(
        sources=(f"jsonl:{tmp_path}/a.jsonl#{field}",),
        validation=0.0,
        fim_rate=1.0,
        fim_sources=(kind,),
    )
    stream = iter(batches(settings, bytes_tokenizer(), split="train", seed=0, chat=chat))
    next(stream)
    assert stream.fim_share is None and "fim_share" not in stream.metrics()


def test_exercises_of_copying_are_no_text(config):
    settings = config(fim_rate=1.0, copy_rate=0.5, fim_level="context")
    stream = iter(batches(settings, bytes_tokenizer(), split="train", seed=0))
    found = take(stream, 20)
    assert stream.fim_share in (1.0, None)
    assert max(batch["tokens"].max() for batch in found) < bytes_tokenizer().vocab_size
