"""Texts of one split, as evaluations of infilling read them."""

import pytest

from data.shuffled_texts import infill_documents
from errors import UserError


def test_the_splits_share_no_text(config):
    validation, train = (infill_documents(config(), split) for split in ("validation", "train"))
    assert validation.keys() == train.keys() == set(config().sources)
    for source, texts in validation.items():
        assert len(texts) == len(list(texts)) > 0
        assert all(len(text.encode()) < 2 * 64 for _, text in texts)
        assert not {name for name, _ in texts} & {name for name, _ in train[source]}


def test_a_corpus_without_text_is_refused(config):
    with pytest.raises(UserError, match="none has text to infill"):
        infill_documents(config(fim_sources=()), "train")


def test_conversations_are_not_infilled(config):
    changes = {
        "sources": ("task:arithmetic?count=50", "task:arithmetic?count=50&style=chat"),
        "mixture": (1.0, 1.0),
        "fim_sources": ("task",),
    }
    assert list(infill_documents(config(**changes), "validation")) == ["task:arithmetic?count=50"]
