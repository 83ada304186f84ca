"""Pairs, from records of each form to rows in which both conversations of a pair stand."""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data.config import TokenizerConfig
from data.documents import BadRecord, Document
from data.pair_encoding import PairEncoder
from data.pipeline import batches
from data.sources import open_source
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer, make_tokenizer
from errors import UserError
from tests.data.reading import assert_same, segments_of, take

TOKENIZER = bytes_tokenizer()
USER, HELPER, EOS = (
    TOKENIZER.encode_rendered(text)[0] for text in ("<|user|>", "<|assistant|>", "<|eos|>")
)


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def records(form: str, count: int = 5) -> list[dict]:
    """The same pairs in each form: question "qN", answers "N" and "NN" or longer."""
    found = []
    for number in range(count):
        prompt, good, bad = f"q{number}", f"{number}", f"{number}" * (2 + number)
        asked = [said("user", prompt)]
        found.append(
            {
                "whole": {
                    "chosen": [*asked, said("assistant", good)],
                    "rejected": [*asked, said("assistant", bad)],
                },
                "messages": {
                    "prompt": asked,
                    "chosen": [said("assistant", good)],
                    "rejected": [said("assistant", bad)],
                },
                "text_before_messages": {
                    "prompt": prompt,
                    "chosen": [said("assistant", good)],
                    "rejected": [said("assistant", bad)],
                },
                "prompt_twice": {
                    "prompt": prompt,
                    "chosen": [*asked, said("assistant", good)],
                    "rejected": [*asked, said("assistant", bad)],
                },
                "texts": {"prompt": prompt, "chosen": good, "rejected": bad},
            }[form]
        )
    return found


FORMS = ("whole", "messages", "text_before_messages", "prompt_twice", "texts")


def written(kind: str, lines: list[dict], folder: Path) -> str:
    """The source string of records in a file of a kind."""
    path = folder / f"pairs.{kind}"
    encoded = [json.dumps(line).encode() for line in lines]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    elif kind == "arrayrecord":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in encoded:
            writer.write(line)
        writer.close()
    else:
        content = b"\n".join(encoded)
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return f"{kind.partition('.')[0]}:{path}#chosen,rejected"


def conversation(number: int, answer: str) -> list[int]:
    return [USER, *f"q{number}".encode(), HELPER, *answer.encode(), EOS]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "arrayrecord"])
def test_a_pair_is_two_neighbouring_segments_of_a_row(config, tmp_path, kind, form):
    """Whatever the file and the form of its records: tokens, positions, segments and weights."""
    source = written(kind, records(form), tmp_path)
    settings = config(sources=(source,), validation=0.0, seq_len=40, batch_size=2)
    dataset = batches(settings, TOKENIZER, split="train", seed=0, chat=True, repeat=False)
    found = take(dataset, 9)
    seen = set()
    for batch in found:
        for tokens, positions, segments, weights in zip(
            *(batch[name] for name in ("tokens", "positions", "segments", "weights")), strict=True
        ):
            assert segments.max() % 2 == 0, "no pair is in two rows"
            assert (np.diff(segments[segments > 0]) >= 0).all()
            assert not weights[segments == 0].any() and not positions[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                ids, number = tokens[inside].tolist(), int(bytes(tokens[inside][2:3].tolist()))
                answer = f"{number}" * (1 if segment % 2 else 2 + number)
                assert ids == conversation(number, answer)
                assert positions[inside].tolist() == list(range(len(ids)))
                sign = 1 if segment % 2 else -1
                assert weights[inside].tolist() == [0] * 4 + [sign] * (len(answer) + 1)
                seen.add((number, segment % 2))
    assert seen == {(number, odd) for number in range(5) for odd in (0, 1)}
    assert len(segments_of(found[0])) > 4, "several pairs share a row"


def test_what_both_begin_with_is_no_target(config):
    """An earlier answer that both have in common is context; one in which they differ is not."""
    opening = [said("user", "a"), said("assistant", "b")]
    last = [[*opening, said("user", "c"), said("assistant", text)] for text in ("d", "ef")]
    first = [[said("user", "a"), said("assistant", t), *last[0][2:]] for t in ("b", "x")]
    for (chosen, rejected), targets in ((last, ("d", "ef")), (first, ("bd", "xd"))):
        (found,) = encoded(config, {"chosen": chosen, "rejected": rejected})
        tokens, weights = found["tokens"] & 0xFFFF, found["weights"]
        for sign, text in zip((1, -1), targets, strict=True):
            learnt = [token for token in tokens[weights == sign].tolist() if token != EOS]
            assert bytes(learnt).decode() == text


@pytest.mark.parametrize("template", ["chatml", "r1"])
def test_the_template_of_a_checkpoint_says_what_its_model_writes(config, checkpoint, template):
    eos = {"chatml": "<|im_end|>", "r1": "<｜end▁of▁sentence｜>"}[template]
    tokenizer = load_tokenizer(checkpoint(template, {"eos_token": eos}))
    opening = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    record = {name: [*opening, said("assistant", name)] for name in ("chosen", "rejected")}
    encoder = PairEncoder(config(chat_template="checkpoint", seq_len=200), tokenizer)
    (found,) = encoder(("jsonl", document_of(record)), np.random.default_rng(0))
    tokens, weights = found["tokens"] & 0xFFFF, found["weights"]
    for sign, name in ((1, "chosen"), (-1, "rejected")):
        text = tokenizer.decode(tokens[weights == sign], skip_special_tokens=False)
        assert text.removeprefix("<think>\n\n</think>\n\n") == name + eos


def document_of(record: dict) -> Document:
    with tempfile.TemporaryDirectory() as folder:
        return open_source(written("jsonl", [record], Path(folder)), 4)[0]


def encoded(config, record: dict, **changes) -> list[dict]:
    encoder = PairEncoder(config(**{"seq_len": 64} | changes), TOKENIZER)
    return encoder(("jsonl", document_of(record)), np.random.default_rng(0))


ASKED = [said("user", "q")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, '"chosen" and "rejected" are the same'),
        ({"chosen": "a", "rejected": "b"}, 'no field "prompt" that it answers'),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: has nothing to learn"),
        (
            {"chosen": [*ASKED, said("assistant", "a")], "rejected": ASKED},
            'field "rejected" has no message behind those that both begin with',
        ),
        ({"prompt": "q", "chosen": "a", "rejected": []}, r'"rejected" is \[\], neither text nor'),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, '"rejected" is 3, neither text nor'),
        ({"prompt": "q", "chosen": "a"}, r'1: no field "rejected" \(has: "prompt", "chosen"\)'),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, '"prompt" is 1, neither text nor'),
        (
            {"chosen": [*ASKED, said("assistant", "a")], "rejected": [*ASKED, said("user", "b")]},
            'rejected: message 2 of 2 has role "user"',
        ),
        (
            {"prompt": "q", "chosen": "a" * 40, "rejected": "b" * 20},
            r"jsonl:1: a pair of 44 and 24 tokens, .* in a row of data.seq_len = 64",
        ),
    ],
)
def test_what_is_no_pair_is_one_line(config, record, message):
    with pytest.raises(BadRecord, match=message):
        encoded(config, record)


def test_a_bad_pair_stops_a_run_or_is_counted(config, tmp_path):
    lines = records("texts")
    lines[2]["rejected"] = lines[2]["chosen"]
    lines[3]["rejected"] = "x" * 99
    source = written("jsonl", lines, tmp_path)
    stops = config(sources=(source,), validation=0.0)
    with pytest.raises(BadRecord, match=r'data.bad_records = "skip" goes on without it'):
        take(batches(stops, TOKENIZER, split="train", seed=0, chat=True, repeat=False), 9)
    skips = config(sources=(source,), validation=0.0, bad_records="skip")
    stream = iter(batches(skips, TOKENIZER, split="train", seed=0, chat=True, repeat=False))
    found = list(stream)
    assert len(segments_of(found[0])) == 6 and stream.counts.skipped == 2


def test_the_cursor_goes_on_in_the_midst_of_pairs(config, tmp_path):
    source = written("jsonl", records("texts", 9), tmp_path)
    settings = config(sources=(source,), validation=0.0, seq_len=32, batch_size=2)
    dataset = batches(settings, TOKENIZER, split="train", seed=3, chat=True)
    whole = take(dataset, 8)
    stream = iter(dataset)
    assert_same([next(stream) for _ in range(3)], whole[:3])
    state = json.loads(json.dumps(stream.get_state()))
    other = iter(dataset)
    other.set_state(state)
    assert_same([next(other) for _ in range(5)], whole[3:])


def test_pairs_are_for_fine_tuning_and_for_no_mixture(config, tmp_path):
    source = written("jsonl", records("texts"), tmp_path)
    with pytest.raises(UserError, match=r"pairs, which launch.finetune learns from"):
        batches(config(sources=(source,)), TOKENIZER, split="train", seed=0)
    mixed = config(sources=(source, source.partition(",")[0]), mixture=(1.0, 1.0))
    with pytest.raises(UserError, match=r'chosen" has no pairs, and another source has'):
        batches(mixed, TOKENIZER, split="train", seed=0, chat=True)
    for fields in ("chosen,", "a,b,c", "chosen,chosen"):
        with pytest.raises(UserError, match=r"#CHOSEN,REJECTED for pairs"):
            open_source(source.replace("chosen,rejected", fields), 4)


def test_a_vocabulary_is_learnt_from_pairs(config, tmp_path):
    settings = config(sources=(written("jsonl", records("whole"), tmp_path),), validation=0.0)
    assert make_tokenizer(TokenizerConfig("bpe", "", 300), settings).vocab_size >= 268
