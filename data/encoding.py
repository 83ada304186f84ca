"""Documents to token ids, each by itself, before packing: plain, infilling, copying, or chat."""

import functools
import sys
from collections.abc import Iterator

import numpy as np

from data.chat import encode_chat
from data.chat_omissions import Omitted, refuse_to_learn
from data.config import DataConfig
from data.copies import copy_exercises
from data.documents import BadRecord, Document
from data.fim import fim_tokens
from data.marks import INFILLED, PLAIN
from data.tokenizer import Tokenizer
from errors import UserError

# A document is made into fill-in-the-middle documents of between this share of a row and a whole
# row: a model can only learn to infill what it sees at once.
MIN_FIM_SHARE = 0.25

# Tokens that a fill-in-the-middle document has beyond those of its text: three sentinels, [eos],
# and the two more that cuts inside tokens may add.
FIM_EXTRA_TOKENS = 6


class DocumentEncoder:
    """Encodes documents to pretrain on, each as one sequence of ids or as several."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        """Raises UserError if the config asks for infilling and the tokenizer has no sentinels."""
        self._config, self._tokenizer = config, tokenizer
        if config.fim_rate > 0:
            _ = tokenizer.fim

    def __call__(
        self, element: tuple[str, Document], rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Encodes one document.

        Args:
          element: (kind of its source, document).
          rng: decides whether the document becomes copying exercises, infilling or neither, and how
            it is cut.

        Returns:
          One {"tokens": int32 [n]} for each sequence; with packing "fit" none is longer than a row.
        """
        kind, document = element
        config = self._config
        ids = self._encode_body(document)
        if config.copy_rate > 0 and rng.random() < config.copy_rate:
            marked = [(0, ids) for ids in copy_exercises(ids, rng, config.seq_len)]
        elif not isinstance(document.body, str) or kind not in config.fim_sources:
            marked = [(0, self._with_ends(ids, document))]
        elif rng.random() < config.fim_rate:
            marked = self._encode_infilling(document.body, len(ids), rng)
        else:
            marked = [(PLAIN, self._with_ends(ids, document))]
        max_length = config.seq_len if config.packing == "fit" else None
        return [
            {"tokens": np.asarray(chunk, np.int32) | mark}
            for mark, sequence in marked
            for chunk in _chunks(sequence, max_length)
        ]

    def _encode_body(self, document: Document) -> list[int]:
        if isinstance(document.body, str):
            return self._tokenizer.encode(document.body)
        template = self._config.chat_template
        try:
            return encode_chat(document.body, self._tokenizer, template, document.tools)[0]
        except UserError as error:
            raise BadRecord(f"{document.name}: {error}") from error

    def _with_ends(self, ids: list[int], document: Document) -> list[int]:
        """Adds [bos] and [eos] where a text begins and ends, unless it is cut there.

        A conversation has what its template writes.
        """
        if not isinstance(document.body, str):
            return ids
        bos, eos = self._tokenizer.bos, self._tokenizer.eos
        opening = [bos] if document.begins and bos is not None else []
        return opening + ids + ([eos] if document.ends else [])

    def _encode_infilling(
        self, text: str, num_tokens: int, rng: np.random.Generator
    ) -> list[tuple[int, list[int]]]:
        """Makes a text one fill-in-the-middle document or several, as `data.fim_level` says.

        Returns:
          (mark, ids) of each: what stays plain is marked so.
        """
        config, tokenizer = self._config, self._tokenizer
        if config.fim_level == "document":
            return [(INFILLED, fim_tokens(text, tokenizer, rng, spm=config.fim_spm))]
        max_tokens = config.seq_len - FIM_EXTRA_TOKENS
        sequences = []
        start = 0
        while start < len(text):
            share = rng.uniform(MIN_FIM_SHARE, 1)
            length = int(max_tokens * share * len(text) / max(num_tokens, 1))
            piece = text[start : start + max(length, 1)]
            ids = fim_tokens(piece, tokenizer, rng, spm=config.fim_spm)
            # A piece with more tokens a character than the rest of the text may not fit in a row.
            while config.fim_level == "context" and len(ids) > config.seq_len and len(piece) > 1:
                piece = piece[: max(1, len(piece) * max_tokens // (len(ids) + 1))]
                ids = fim_tokens(piece, tokenizer, rng, spm=config.fim_spm)
            start += len(piece)
            fits = len(ids) <= config.seq_len
            sequences.append((INFILLED, ids) if fits else (PLAIN, tokenizer.encode(piece)))
        return sequences


class IncompleteTurns:
    """What becomes of turns of which a template leaves something out: `data.incomplete_turns`."""

    def __init__(self, config: DataConfig):
        self._masks, self._count = config.incomplete_turns == "mask", 0

    def of(self, document: Document) -> Omitted:
        """Returns what takes the lines about a document: it counts them, or refuses the first."""
        return functools.partial(self._masked, document.name) if self._masks else refuse_to_learn

    def _masked(self, name: str, omitted: str) -> None:
        """Counts a turn that is not learnt; says so of the 1st, the 10th, the 100th, ..."""
        self._count += 1
        if str(self._count).rstrip("0") == "1":
            turns = "turns are" if self._count > 1 else "turn is"
            print(f"{self._count:,} {turns} not learnt; {name}: {omitted}", file=sys.stderr)


class ConversationEncoder:
    """Encodes conversations to fine-tune on, with the weight of each token as a target."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._incomplete = IncompleteTurns(config)

    def __call__(
        self, element: tuple[str, Document], rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Encodes one conversation, cut at the end of a row; nothing about it is random.

        Args:
          element: (kind of its source, document).
          rng: not used; a `DocumentEncoder` takes it.

        Returns:
          A list of one {"tokens": int32 [n], "weights": float32 [n]}.

        Raises:
          UserError: the document is a text, or its template cannot write it.
        """
        _, document = element
        if isinstance(document.body, str):
            raise UserError(
                f"{document.name}: a text, where chat needs a list of messages; name the field "
                "that has them in data.sources"
            )
        template, omitted = self._config.chat_template, self._incomplete.of(document)
        try:
            ids, weights = encode_chat(
                document.body, self._tokenizer, template, document.tools, omitted
            )
        except UserError as error:
            raise BadRecord(f"{document.name}: {error}") from error
        row = slice(self._config.seq_len)
        return [
            {
                "tokens": np.asarray(ids[row], np.int32),
                "weights": np.asarray(weights[row], np.float32),
            }
        ]


def _chunks(ids: list[int], max_length: int | None) -> Iterator[list[int]]:
    """Cuts ids every `max_length`, or not at all; no ids give no chunk."""
    size = max_length or len(ids) or 1
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
