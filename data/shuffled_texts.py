"""Texts of documents as they are, for evaluations that cut and encode them themselves."""

from collections.abc import Iterator, Sequence

import numpy as np

from data.config import DataConfig
from data.documents import BadRecord, Document, ReadableDocuments, Split, select_split
from data.sources import open_source
from errors import UserError


class ShuffledTexts(Sequence[tuple[str, str]]):
    """Names and texts of documents, in an order that mixes them but is always the same.

    A text is read when it is asked for. Iteration leaves out bad records that are skipped.
    """

    def __init__(self, documents: ReadableDocuments, max_bytes: int):
        """Takes documents whose bodies are texts, each to be cut after `max_bytes` bytes."""
        self._documents, self._max_bytes = documents, max_bytes
        self._order = np.random.default_rng(0).permutation(len(documents))

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> tuple[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = self._documents[int(self._order[index])]
        if isinstance(document, BadRecord):
            raise document
        return self._text_of(document)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        found = (self._documents[int(index)] for index in self._order)
        return (self._text_of(one) for one in found if isinstance(one, Document))

    def _text_of(self, document: Document) -> tuple[str, str]:
        assert isinstance(document.body, str)
        return document.name, document.body.encode()[: self._max_bytes].decode(errors="ignore")


def infill_documents(
    config: DataConfig, split: Split, chunk_bytes: int | None = None
) -> dict[str, ShuffledTexts]:
    """Returns names and texts of one split for each source that infilling applies to.

    The first few texts of a source are a fair sample of it. Sources of conversations are left out.

    Args:
      config: the sources, and `fim_sources` to tell to which of them infilling applies.
      split: the split to take documents from.
      chunk_bytes: longer files are cut into chunks of about this many bytes at the ends of lines,
        and no text has more than twice as many. By default as many as a row has tokens: a token has
        at least one byte (about two in code, with a vocabulary of 512), so that nearly all texts
        fit in a row.

    Raises:
      UserError: infilling applies to no source.
    """
    texts = _texts_by_source(config, split, chunk_bytes or config.seq_len)
    if not texts:
        raise UserError(
            f"data.sources = {config.sources}: none has text to infill "
            f"(data.fim_sources = {config.fim_sources})"
        )
    return texts


def infillable_sources(config: DataConfig) -> list[str]:
    """Returns the sources that infilling applies to and that hold texts, no conversations."""
    return list(_texts_by_source(config, "validation", config.seq_len))


def _texts_by_source(
    config: DataConfig, split: Split, chunk_bytes: int
) -> dict[str, ShuffledTexts]:
    sources = {spec: open_source(spec, chunk_bytes) for spec in config.sources}
    documents = {
        spec: ReadableDocuments(
            select_split(source, split, config.validation), skips=config.skips_bad_records
        )
        for spec, source in sources.items()
        if source.kind in config.fim_sources
    }
    return {
        spec: ShuffledTexts(readable, 2 * chunk_bytes)
        for spec, readable in documents.items()
        if _are_texts(readable)
    }


def _are_texts(documents: ReadableDocuments) -> bool:
    """Returns whether the first document that can be read is a text."""
    first = next((found for found in documents if isinstance(found, Document)), None)
    return first is not None and isinstance(first.body, str)
