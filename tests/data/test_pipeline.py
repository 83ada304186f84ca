"""Batches: what is in them, in which order, and that they resume exactly."""

import collections
import itertools
import json

import numpy as np
import pytest

from data.pipeline import batches
from data.shuffled_texts import infill_documents
from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from tests.data.reading import assert_same, recover, segments_of, take

TOKENIZER = bytes_tokenizer()


def file_names(settings, split) -> set[str]:
    """Returns the names of the files in a split."""
    documents = itertools.chain(*infill_documents(settings, split).values())
    return {name.partition("[")[0] for name, _ in documents}


def lines_of(found) -> collections.Counter:
    """Counts the whole lines of text in batches; they are recognised wherever they are packed."""
    return collections.Counter(
        line
        for batch in found
        for ids in segments_of(batch)
        for line in TOKENIZER.decode(ids).split("\n")[1:-1]
    )


@pytest.mark.parametrize("crossing", [False, True])
def test_a_batch_weighs_its_tokens_alike(config, crossing):
    for batch in take(
        batches(config(cross_document_attention=crossing), TOKENIZER, split="train", seed=0), 5
    ):
        assert all(array.shape == (4, 64) for array in batch.values())
        np.testing.assert_array_equal(batch["weights"], batch["segments"] > 0)
        if crossing:
            np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(64), (4, 1)))


def test_one_epoch_is_the_training_split(config, corpus):
    """Without FIM, batches have the training files, byte for byte, with bos and eos once a file."""
    settings = config()
    found = take(batches(settings, TOKENIZER, split="train", seed=0, repeat=False), 10_000)
    ids = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in found])
    files = [(corpus / name).read_bytes() for name in file_names(settings, "train")]
    assert collections.Counter(ids[ids < 256].tolist()) == collections.Counter(b"".join(files))
    assert (ids == TOKENIZER.bos).sum() == (ids == TOKENIZER.eos).sum() == len(files)
    # The last one too, which is filled with rows of padding.
    assert {batch["tokens"].shape for batch in found} == {(4, 64)}


def test_training_and_validation_share_nothing(config):
    lines = [
        lines_of(take(batches(config(), TOKENIZER, split=split, seed=0, repeat=False), 10_000))
        for split in ("train", "validation")
    ]
    assert lines[0] and lines[1] and not lines[0].keys() & lines[1].keys()


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_the_seed_decides_every_batch(config, fim_rate):
    first, again, other = (
        take(batches(config(fim_rate=fim_rate), TOKENIZER, split="train", seed=seed), 5)
        for seed in (0, 0, 1)
    )
    assert_same(first, again)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_every_epoch_has_its_own_order(config):
    settings = config(seq_len=512)  # no file is cut, and each begins with bos
    ids = np.concatenate(
        [
            batch["tokens"].ravel()
            for batch in take(batches(settings, TOKENIZER, split="train", seed=0), 60)
        ]
    )
    starts = [TOKENIZER.decode(ids[at + 1 : at + 8]) for at in np.nonzero(ids == TOKENIZER.bos)[0]]
    count = len(file_names(settings, "train"))
    first, second = starts[:count], starts[count : 2 * count]
    assert sorted(first) == sorted(second) and len(set(first)) == count
    assert first != second


RESUMED = [
    {"packing": "split"},
    {"packing": "split", "fim_rate": 0.7},
    {"packing": "fit", "fim_rate": 0.7},
    {
        "packing": "split",
        "fim_rate": 0.5,
        "sources": ("text", "task:arithmetic?count=100"),
        "mixture": (1.0, 3.0),
    },
    {"packing": "fit", "chat": True, "sources": ("task:arithmetic?count=100",), "seq_len": 128},
]


@pytest.mark.parametrize("changes", RESUMED, ids=str)
@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_resumes_with_exactly_the_same_stream(config, changes, stop):
    """The state is saved across epochs and in the middle of a document and of the packer's rows.

    The prefetch thread is ahead of it then, and it goes through JSON.
    """
    changes = dict(changes)
    chat = changes.pop("chat", False)
    settings = config()
    changes["sources"] = tuple(
        settings.sources[0] if spec == "text" else spec
        for spec in changes.get("sources", ("text",))
    )
    dataset = batches(config(**changes), TOKENIZER, split="train", seed=3, chat=chat)
    iterator = iter(dataset)
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, 8))
    resumed = iter(dataset)
    next(resumed)  # set_state must also drop the batches that a used iterator has prepared
    resumed.set_state(state)
    assert_same(list(itertools.islice(resumed, 8)), expected)


def test_processes_share_no_document_and_miss_none(config):
    def epoch(index, count):
        options = {"process_index": index, "process_count": count, "repeat": False}
        found = take(
            batches(config(seq_len=512), TOKENIZER, split="train", seed=0, **options), 10_000
        )
        assert all(batch["tokens"].shape == (4 // count, 512) for batch in found)
        return lines_of(found)

    first, second, whole = epoch(0, 2), epoch(1, 2), epoch(0, 1)
    assert first and second and not first.keys() & second.keys()
    # About 2 lines of 13 are broken by the end of a row and not recognised, others of one stream
    # than of two.
    assert len((first | second).keys() & whole.keys()) > 0.6 * len(whole)


def test_fim_documents_are_whole_and_of_both_kinds(config, corpus):
    """With rate 1, every segment is one FIM document that fits in a row, and all are the files."""
    settings = config(fim_rate=1.0, packing="fit", seq_len=128)
    found = [
        ids
        for batch in take(batches(settings, TOKENIZER, split="train", seed=0, repeat=False), 10_000)
        for ids in segments_of(batch)
    ]
    texts = [recover(ids, TOKENIZER) for ids in found if ids[0] == TOKENIZER.fim.prefix]
    assert len(texts) > 0.9 * len(found)  # a chunk that grows beyond the row stays plain
    spm = sum(ids[1] == TOKENIZER.fim.suffix for ids in found)
    assert 0.3 < spm / len(found) < 0.75
    plain = [TOKENIZER.decode(ids) for ids in found if ids[0] != TOKENIZER.fim.prefix]
    names = file_names(settings, "train")
    files = "".join((corpus / name).read_text(encoding="utf-8") for name in names)
    assert collections.Counter("".join(texts + plain)) == collections.Counter(files)


def test_a_fim_document_is_never_cut(config, tmp_path):
    """Chunks of a document with more tokens than its average outgrow the row, and stay plain.

    Its first half is ASCII and its second half emoji, so that the average misleads.
    """
    for number in range(4):
        (tmp_path / f"{number}.mix").write_text("a" * 300 + "🙂" * 150, encoding="utf-8")
    settings = config(
        sources=(f"text:{tmp_path}/*.mix",), validation=0.0, fim_rate=1.0, packing="fit"
    )
    found = [
        ids
        for batch in take(batches(settings, TOKENIZER, split="train", seed=0), 30)
        for ids in segments_of(batch)
    ]
    infilling = [ids for ids in found if np.isin(ids, [*TOKENIZER.fim, TOKENIZER.eos]).any()]
    texts = [recover(ids, TOKENIZER) for ids in infilling]
    assert any("a" in text for text in texts) and any("🙂" in text for text in texts)
    assert len(infilling) < len(found)


def test_fim_applies_to_its_sources_only(config):
    sources = ("task:arithmetic?count=200",)
    settings = config(sources=sources, fim_rate=1.0, packing="fit", seq_len=256)
    for batch in take(batches(settings, TOKENIZER, split="train", seed=0), 3):
        assert not np.isin(batch["tokens"], TOKENIZER.fim).any()
        assert all(
            TOKENIZER.decode(ids).startswith("Question: ") and ids[-1] == TOKENIZER.eos
            for ids in segments_of(batch)
        )


def test_mixture_is_the_share_of_documents(config):
    settings = config(
        sources=("task:arithmetic?count=200", "task:arithmetic?count=100&style=chat"),
        mixture=(1.0, 3.0),
        packing="fit",
        seq_len=256,
    )
    found = [
        TOKENIZER.decode(ids)
        for batch in take(batches(settings, TOKENIZER, split="train", seed=0), 100)
        for ids in segments_of(batch)
    ]
    share = sum(text.startswith("Question: ") for text in found) / len(found)
    assert abs(share - 0.25) < 0.02  # every fourth document, exactly; a few are still in the packer


def test_chat_weighs_the_assistant_only_and_never_crosses(config):
    settings = config(
        sources=("task:arithmetic?count=200",), seq_len=160, cross_document_attention=True
    )
    for batch in take(batches(settings, TOKENIZER, split="train", seed=0, chat=True), 4):
        for tokens, segments, weights in zip(
            batch["tokens"], batch["segments"], batch["weights"], strict=True
        ):
            assert segments.max() >= 1
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                text = TOKENIZER.decode(tokens[inside], skip_special_tokens=False)
                prompt, _, answer = text.partition("<|assistant|>")
                assert prompt.startswith("<|user|>") and answer.endswith("</answer><|eos|>")
                targets = tokens[inside & (weights == 1)]
                assert TOKENIZER.decode(targets, skip_special_tokens=False) == answer
            padding = segments == 0
            assert (weights[padding] == 0).all() and (tokens[padding] == TOKENIZER.pad).all()


def test_a_conversation_longer_than_a_row_is_cut(config):
    settings = config(sources=("task:arithmetic?count=200",), seq_len=32)
    batch = take(batches(settings, TOKENIZER, split="train", seed=0, chat=True), 1)[0]
    assert (batch["segments"] == 1).all()


def test_conversations_in_pretraining_count_in_full(config, tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chat.jsonl").write_text(30 * (json.dumps({"m": messages}) + "\n"))
    settings = config(sources=(f"jsonl:{tmp_path}/chat.jsonl#m",))
    batch = take(batches(settings, TOKENIZER, split="train", seed=0), 1)[0]
    assert (batch["weights"] == 1).all()
    assert (batch["tokens"] == TOKENIZER.special_token_id("<|assistant|>")).any()


def test_errors_name_the_field_or_the_document(config, tmp_path):
    def message(**options):
        settings = config(**options.pop("changes", {}))
        with pytest.raises(UserError) as error:
            take(batches(settings, TOKENIZER, **{"split": "train", "seed": 0, **options}), 1)
        return str(error.value)

    assert "data.batch_size = 4: must be divisible by the 3 processes" in message(process_count=3)
    assert "fewer than the 4 processes" in message(
        process_count=4, changes={"sources": ("task:arithmetic?count=4",)}
    )
    assert "a text, where chat needs a list of messages" in message(chat=True)
    assert "leaves none for validation" in message(split="validation", changes={"validation": 0.0})
    (tmp_path / "chat.jsonl").write_text(json.dumps({"m": [{"role": "assistant", "content": "a"}]}))
    wrong_turn = {"sources": (f"jsonl:{tmp_path}/chat.jsonl#m",), "validation": 0.0}
    assert message(chat=True, changes=wrong_turn).startswith(
        'chat.jsonl:1: message 1 of 1 has role "assistant" where "user" is due'
    )


def test_infilling_needs_a_tokenizer_with_sentinels(config, tmp_path):
    """The error comes before the first batch, not in the middle of a run."""
    TOKENIZER.save(tmp_path / "tokenizer.json")
    saved = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(saved.replace("<|fim_middle|>", "<|nothing|>"))
    without = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no fill-in-the-middle tokens"):
        batches(config(fim_rate=0.5), without, split="train", seed=0)
