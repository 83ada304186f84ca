"""From a config to batches: source -> split -> shuffle -> mix -> tokens, FIM, copies -> packing ->
batches, as one grain dataset whose cursor can be saved.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from data.chat import encode_chat
from data.config import DataConfig, TokenizerConfig
from data.copies import copy_exercises
from data.documents import Document, Split, Subset, select_split, uniform_hash
from data.fim import fim_tokens
from data.packing import fit_rows, split_rows, to_batch
from data.prefetch import Prefetch
from data.sources import open_source
from data.tasks.source import draw_problems
from data.tokenizer import Tokenizer, bytes_tokenizer, load_tokenizer, train_bpe
from errors import UserError

__all__ = ["batches", "infill_documents", "make_tokenizer", "draw_problems"]

# A text file longer than this many bytes a token of a row is cut: 8 rows at 2 bytes a token, which
# is what a vocabulary of 512 gives on code. So a batch mixes many files, and one long file does not
# make several batches all alike.
PIECE_BYTES_PER_TOKEN = 16

# Enough to learn a small vocabulary from; more would only take longer.
TOKENIZER_BYTES = 3_000_000

# A document is made into fill-in-the-middle ones of between a quarter of a row and a whole row: a
# model can only learn to infill what it sees at once.
SHORTEST_FIM_ROW = 0.25

PREFETCH_BATCHES = 4


def make_tokenizer(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """The tokenizer that the config describes; kind "bpe" learns it from the training split of the
    sources, the same from each.

    Raises UserError if its file is missing or broken.
    """
    if config.kind == "file":
        return load_tokenizer(config.path)
    if config.kind == "bytes":
        return bytes_tokenizer()
    return train_bpe(_sample(data, TOKENIZER_BYTES), config.vocab_size)


class ShuffledTexts(Sequence[tuple[str, str]]):
    """Names and texts of documents, read when they are asked for, in an order that mixes them but
    is always the same.
    """

    def __init__(self, part: Subset, longest: int):
        self._part, self._longest = part, longest
        self._order = np.random.default_rng(0).permutation(len(part))

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> tuple[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = self._part[int(self._order[index])]
        return document.name, document.body.encode()[: 2 * self._longest].decode(errors="ignore")


def infill_documents(config: DataConfig, split: Split, longest: int | None = None) -> dict[str, ShuffledTexts]:
    """Names and texts of one split, for infilling, of each source that FIM applies to; the first
    few of one are a fair sample. Conversations are none.

    Args:
      longest: bytes; longer files are cut into pieces of about this many, at the ends of lines, and
        no text has more than twice as many. By default as many
        as a row has tokens: a token has at least one byte (about two in code, with a vocabulary of
          512), so nearly all texts fit in a row.

    Raises UserError if there is no such source.
    """
    longest = longest or config.seq_len
    opened = {spec: open_source(spec, longest) for spec in config.sources}
    parts = {
        spec: select_split(source, split, config.validation)
        for spec, source in opened.items()
        if source.kind in config.fim_sources
    }
    found = {
        spec: ShuffledTexts(part, longest) for spec, part in parts.items() if isinstance(part[0].body, str)
    }
    if not found:
        raise UserError(
            f"data.sources = {config.sources}: none has text to infill (data.fim_sources = {config.fim_sources})"
        )
    return found


def batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: Split,
    seed: int,
    chat: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
) -> grain.IterDataset:
    """Batches of this process: dicts of arrays [batch / process_count, sequence], see
    data/packing.py.

    Every epoch of a source is shuffled anew. The iterator's `get_state` is plain JSON, and
    `set_state` resumes with exactly the batches that would have come. Processes share no document.
    Chat packs whole conversations ("fit"), never attends across them, and cuts one that is longer
    than a row at the row's end.

    Args:
      repeat: without it, one epoch (of the source that ends first, if there are several); the last
        batch is filled up with rows of padding.

    Raises UserError if the batch does not divide by the processes, a source is wrong, or has too
    few documents.
    """
    if config.batch_size % process_count:
        raise UserError(
            f"data.batch_size = {config.batch_size}: must be divisible by the {process_count} processes"
        )
    rows = config.batch_size // process_count
    mixed = _mixed(config, split, seed, chat, process_index, process_count, repeat)
    write = _ChatWriter(config, tokenizer) if chat else _Writer(config, tokenizer)
    # Each process draws its own numbers: an index means another document to each. No threads here:
    # they would only wait for each other, since writing ids is Python. The prefetch thread at the
    # end keeps the training loop from waiting.
    written = mixed.random_map(write, seed=_seed(seed, f"write/{process_index}")).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    pieces = grain.experimental.FlatMapIterDataset(written, _Flatten())
    if chat or config.packing == "fit":
        packed = fit_rows(pieces, config.seq_len, rows, _seed(seed, "pack"), weighted=chat)
    else:
        packed = split_rows(pieces, config.seq_len)
    crossing = config.cross_document_attention and not chat
    stacked = packed.batch(
        rows, batch_fn=lambda values: grain.experimental.batch_and_pad(values, batch_size=rows)
    )
    ready = stacked.map(
        lambda packed: to_batch(packed, tokenizer.pad, cross_document_attention=crossing)
    )
    return Prefetch(ready, PREFETCH_BATCHES)


def _mixed(
    config: DataConfig,
    split: Split,
    seed: int,
    chat: bool,
    process_index: int,
    process_count: int,
    repeat: bool,
) -> grain.MapDataset:
    """This process's (kind, document) pairs, shuffled and mixed; without an end if `repeat`."""
    parts = []
    for number, spec in enumerate(config.sources):
        found = select_split(_open(config, spec, chat=chat), split, config.validation)
        if len(found) < process_count:
            raise UserError(
                f'data.sources: "{spec}" has {len(found)} documents for {split}, fewer than the {process_count} processes'
            )
        part = grain.MapDataset.source(found)[process_index::process_count].shuffle(
            seed=_seed(seed, f"shuffle/{number}")
        )
        part = part.map(lambda document, kind=found.source.kind: (kind, document))
        parts.append(part.repeat() if repeat else part)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=config.mixture)


class _Writer:
    """A document as ids, or as several if it is made into fill-in-the-middle or copying exercises;
    decided document by document, before packing.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        if config.fim_rate > 0:
            _ = tokenizer.fim  # raises now rather than in the middle of a run

    def __call__(
        self, element: tuple[str, Document], rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        kind, document = element
        config, tokenizer = self._config, self._tokenizer
        conversation = not isinstance(document.body, str)
        ids = (
            encode_chat(document.body, tokenizer, config.chat_template, document.tools)[0]
            if conversation
            else tokenizer.encode(document.body)
        )
        if config.copy_rate > 0 and rng.random() < config.copy_rate:
            written = copy_exercises(ids, rng, config.seq_len)
        elif conversation:
            written = [ids]
        elif kind in config.fim_sources and rng.random() < config.fim_rate:
            written = self._infilling(document.body, len(ids), rng)
        else:
            bos = [tokenizer.bos] if document.begins and tokenizer.bos is not None else []
            written = [bos + ids + ([tokenizer.eos] if document.ends else [])]
        longest = config.seq_len if config.packing == "fit" else None
        return [
            {"tokens": np.asarray(piece, np.int32)}
            for ids in written
            for piece in _cut(ids, longest)
        ]

    def _infilling(self, text: str, tokens: int, rng: np.random.Generator) -> list[list[int]]:
        """Pieces of the text, each a fill-in-the-middle document that fits in a row
        ("context-level" FIM in arXiv 2207.14255).
        """
        longest = (
            self._config.seq_len - 6
        )  # three sentinels, [eos], and what two cuts inside tokens may add
        written = []
        start = 0
        while start < len(text):
            length = int(longest * rng.uniform(SHORTEST_FIM_ROW, 1) * len(text) / tokens)
            piece = text[start : start + max(length, 1)]
            start += len(piece)
            ids = fim_tokens(piece, self._tokenizer, rng, spm=self._config.fim_spm)
            # A piece with more tokens a character than the rest of the document may not fit: it
            # stays as it is.
            written.append(
                ids if len(ids) <= self._config.seq_len else self._tokenizer.encode(piece)
            )
        return written


class _ChatWriter:
    """A conversation as ids and weights."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer

    def __call__(
        self, element: tuple[str, Document], rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        _, document = element
        if isinstance(document.body, str):
            raise UserError(
                f"{document.name}: a text, where chat needs a list of messages; name the field that has them in data.sources"
            )
        try:
            ids, weights = encode_chat(
                document.body, self._tokenizer, self._config.chat_template, document.tools
            )
        except UserError as error:
            raise UserError(f"{document.name}: {error}") from error
        longest = self._config.seq_len
        return [
            {
                "tokens": np.asarray(ids[:longest], np.int32),
                "weights": np.asarray(weights[:longest], np.float32),
            }
        ]


class _Flatten(grain.experimental.FlatMapTransform):
    max_fan_out = 1  # of no consequence to an IterDataset

    def flat_map(self, element: list) -> Sequence:
        return element


def _cut(ids: list[int], longest: int | None) -> Iterator[list[int]]:
    for start in range(0, len(ids), longest or len(ids) or 1):
        yield ids[start : start + (longest or len(ids))]


def _open(config: DataConfig, spec: str, *, chat: bool = False):
    return open_source(spec, PIECE_BYTES_PER_TOKEN * config.seq_len, chat=chat)


def _sample(config: DataConfig, size: int) -> Iterator[str]:
    """About `size` bytes of training text, the same share of each source, from all over it."""
    for spec in config.sources:
        found: Subset = select_split(_open(config, spec), "train", config.validation)
        left = size // len(config.sources)
        for index in np.random.default_rng(0).permutation(len(found)):
            body = found[index].body
            text = (
                body
                if isinstance(body, str)
                else "\n".join(
                    content
                    for message in body
                    if isinstance(content := message.get("content"), str)
                )
            )
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _seed(seed: int, purpose: str) -> int:
    """An independent seed for each purpose, below 2**32 as grain wants it."""
    return int(uniform_hash(f"{seed}/{purpose}") * 2**32)
