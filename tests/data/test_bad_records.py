"""Records that are no documents: the error names file and line, or they are skipped and counted."""

import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data.bad_records import FIRST
from data.config import TokenizerConfig
from data.documents import BadRecord
from data.pipeline import batches
from data.shuffled_texts import infill_documents
from data.sources import open_source
from data.tokenizer_training import bytes_tokenizer, make_tokenizer
from errors import UserError
from tests.data.reading import assert_same, segments_of

TOKENIZER = bytes_tokenizer()

BAD = {
    "no object": b"[1]",
    "no JSON": b"{'text': 1}",
    "cut short": b'{"text": "abc',
    "no field": b'{"other": "abc"}',
    "null": b'{"text": null}',
    "number": b'{"text": 5}',
    "empty list": b'{"text": []}',
    "no messages": b'{"text": [{"from": "user"}]}',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "a surrogate's bytes": b'{"text": "\xed\xa0\xbd"}',
    "deep": b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a long number": b'{"text": ' + b"9" * 5_000 + b"}",
    "bytes": bytes(range(128, 160)),
}


def good_lines(count):
    """Returns records that can be told apart, long and short."""
    return [
        json.dumps({"text": f"good {n} " + "abc " * (n * 7 % 50)}).encode() for n in range(count)
    ]


@pytest.fixture
def corpus_with(tmp_path, config):
    """A function that writes good records with bad ones between them, and returns their config."""

    def make(bad, **changes):
        lines = good_lines(40)
        for place, line in enumerate(bad):
            lines.insert(5 * place + 3, line)
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        source = f"jsonl:{tmp_path}/a.jsonl#text"
        return config(
            **{
                "sources": (source,),
                "validation": 0.0,
                "fim_sources": ("jsonl",),
                "bad_records": "skip",
                **changes,
            }
        )

    return make


def texts_of(found):
    """Returns the texts that were packed whole."""
    return sorted(TOKENIZER.decode(ids) for batch in found for ids in segments_of(batch))


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_whatever_a_record_is_the_error_names_file_and_line(tmp_path, corpus_with, line):
    settings = corpus_with([line], bad_records="stop")
    with pytest.raises(BadRecord, match=r"a\.jsonl:4: ") as error:
        source = open_source(settings.sources[0], 1000)
        [source[index] for index in range(len(source))]
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(
        UserError, match=r'a\.jsonl:4: .*data\.bad_records = "skip" goes on'
    ) as error:
        list(itertools.islice(batches(settings, TOKENIZER, split="train", seed=0), 40))


@pytest.mark.parametrize("kind", ["jsonl", "arrayrecord"])
def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path, kind):
    messages = [{"role": "user", "content": "a\ud83d", "\udfff": ["x\ud83d\ude00"]}]
    record = {"text": "\ud83d!", "whole": "\ud83d\ude00", "m": messages, "tools": [{"\udc00": 1}]}
    line = json.dumps(record).encode()
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(line)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(line)
        writer.close()
    text, whole, chat = (
        open_source(f"{kind}:{path}#{field}", 1000)[0] for field in ("text", "whole", "m")
    )
    assert (text.body, text.replaced) == ("\ufffd!", 1)
    assert (whole.body, whole.replaced) == ("😀", 0)
    assert chat.body == [{"role": "user", "content": "a\ufffd", "\ufffd": ["x😀"]}]
    assert (chat.tools, chat.replaced) == ([{"\ufffd": 1}], 3)


def test_replaced_characters_are_counted(corpus_with):
    settings = corpus_with([b'{"text": "\\ud83d\\ud83d"}', b'{"text": "\\udc00"}'], packing="fit")
    stream = iter(batches(settings, TOKENIZER, split="train", seed=0, repeat=False))
    found = list(stream)
    assert (stream.counts.replaced, stream.counts.skipped) == (3, 0)
    assert stream.metrics()["replaced_characters"] == 3
    assert any("\ufffd\ufffd" in text for text in texts_of(found))


@pytest.mark.parametrize("packing", ["split", "fit"])
def test_what_is_skipped_leaves_no_token_and_is_counted(corpus_with, packing):
    settings = corpus_with(list(BAD.values())[:7], packing=packing, seq_len=512)
    stream = iter(batches(settings, TOKENIZER, split="train", seed=0, repeat=False))
    found = list(stream)
    expected = sorted(json.loads(line)["text"] for line in good_lines(40))
    if packing == "fit":
        assert texts_of(found) == expected
    assert stream.counts.skipped == stream.metrics()["bad_records"] == 7
    assert len(stream.counts.first) == FIRST
    assert all("a.jsonl:" in line for line in stream.counts.first)


def test_news_are_told_once(corpus_with):
    settings = corpus_with(list(BAD.values())[:7])
    stream = iter(batches(settings, TOKENIZER, split="train", seed=0))
    told = [line for _ in range(60) for line in (next(stream), *stream.news())[1:]]
    assert tuple(told) == stream.counts.first and len(told) == FIRST


@pytest.mark.parametrize("packing", ["split", "fit"])
@pytest.mark.parametrize("stop", [1, 4, 11, 30])
def test_batches_and_counts_resume_exactly(corpus_with, packing, stop):
    bad = [*list(BAD.values())[:5], b'{"text": "\\ud83d"}']
    settings = corpus_with(bad, packing=packing, fim_rate=0.5)
    dataset = batches(settings, TOKENIZER, split="train", seed=1)
    stream = iter(dataset)
    for _ in range(stop):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected, counts = [], []
    for _ in range(10):
        expected.append(next(stream))
        counts.append((stream.counts, stream.fim_share))
    resumed = iter(dataset)
    resumed.set_state(state)
    for batch, one in zip(expected, counts, strict=True):
        assert_same([next(resumed)], [batch])
        assert (resumed.counts, resumed.fim_share) == one
    assert counts[-1][0].skipped > 0


def test_a_cursor_without_bad_records_has_no_counts(corpus_with):
    """It is that of a run that stops at bad records, so the option may change between runs."""
    states = []
    for policy in ("stop", "skip"):
        settings = corpus_with([], bad_records=policy)
        stream = iter(batches(settings, TOKENIZER, split="train", seed=0))
        next(stream)
        states.append(stream.get_state())
    assert states[0] == states[1] and "counts" not in json.dumps(states[0])


def test_a_run_that_stopped_goes_on_when_it_skips(corpus_with):
    """From the place of the last batch before the error, with what skipping would have brought."""
    stopping, skipping = (
        batches(corpus_with([BAD["null"]], bad_records=policy), TOKENIZER, split="train", seed=0)
        for policy in ("stop", "skip")
    )
    stream, taken = iter(stopping), 0
    with pytest.raises(BadRecord):
        for taken, _ in enumerate(stream, 1):  # noqa: B007
            pass
    resumed = iter(skipping)
    resumed.set_state(stream.get_state())
    whole = itertools.islice(iter(skipping), taken, taken + 10)
    assert_same(list(itertools.islice(resumed, 10)), list(whole))


@pytest.mark.parametrize("chat", [False, True])
def test_nothing_but_bad_records_ends_with_an_error(tmp_path, config, chat):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BAD.values()))
    settings = config(
        sources=(f"jsonl:{tmp_path}/a.jsonl#text", f"jsonl:{tmp_path}/a.jsonl#other"),
        mixture=(1.0, 20.0),
        validation=0.0,
        bad_records="skip",
    )
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([BAD["null"], BAD["no JSON"]]))
    with pytest.raises(
        UserError, match=r"no document gives a token; the first bad record: .*:\d: "
    ):
        next(iter(batches(settings, TOKENIZER, split="train", seed=0, chat=chat)))


def test_documents_without_a_token_end_with_an_error(tmp_path, config):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 5)
    settings = config(
        sources=(f"jsonl:{tmp_path}/a.jsonl#text",),
        validation=0.0,
        fim_rate=1.0,
        fim_sources=("jsonl",),
    )
    with pytest.raises(UserError, match="no document gives a token"):
        next(iter(batches(settings, TOKENIZER, split="train", seed=0)))


def test_tokenizers_and_infilling_skip_too(corpus_with):
    bad = list(BAD.values())
    settings = corpus_with(bad)
    texts = infill_documents(settings, "train")[settings.sources[0]]
    assert len(list(texts)) == 40 and len(texts) == 40 + len(bad)
    make_tokenizer(TokenizerConfig(), settings)
    with pytest.raises(BadRecord):
        make_tokenizer(TokenizerConfig(), corpus_with(bad, bad_records="stop"))


def test_conversations_that_a_template_refuses_are_skipped(tmp_path, config):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records = [{"m": turns}] * 9 + [{"m": turns[::-1]}, {"m": turns[:1]}, {"m": "a text"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = config(sources=(f"jsonl:{tmp_path}/a.jsonl#m",), validation=0.0, bad_records="skip")
    stream = iter(batches(settings, TOKENIZER, split="train", seed=0, chat=True))
    next(stream)
    assert stream.counts.skipped >= 3


@pytest.mark.parametrize("unit", ["ms", "us"])
def test_a_date_that_python_cannot_write_names_file_and_row(tmp_path, unit):
    """It may be the column itself, or a part of a conversation."""
    at = pyarrow.array([0, 2**62], pyarrow.timestamp(unit))
    messages = pyarrow.ListArray.from_arrays(
        [0, 1, 2],
        pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 2), at], ["role", "at"]),
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"t": at, "m": messages}), path)
    for field in ("t", "m"):
        source = open_source(f"parquet:{path}#{field}", 1000)
        with pytest.raises(BadRecord, match=r"a\.parquet:2: cannot be read \("):
            source[1]
    assert [turn["role"] for turn in source[0].body if isinstance(turn, dict)] == ["user"]
    with pytest.raises(BadRecord, match=r"a\.parquet:1: .*neither text nor a list of messages"):
        open_source(f"parquet:{path}#t", 1000)[0]
