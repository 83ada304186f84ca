"""Pairs of conversations (data/pairs.py) to token ids, one sequence each, before packing.

A pair is one sequence to the packers, so that it is never in two rows: the chosen conversation,
then the rejected one, whose tokens are marked and whose targets have weight -1. No loss is meant by
that: it says which are which. Targets are what the assistant writes behind the messages that both
begin with; those are none, even where the assistant wrote them.
"""

import numpy as np

from data.chat import encode_chat
from data.config import DataConfig
from data.documents import BadRecord, Document, Messages
from data.encoding import IncompleteTurns
from data.marks import REJECTED
from data.pairs import shared_messages
from data.tokenizer import Tokenizer
from errors import UserError


class PairEncoder:
    """Encodes pairs, each as one sequence: the chosen conversation, then the rejected one."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._incomplete = IncompleteTurns(config)

    def __call__(
        self, element: tuple[str, Document], rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Encodes one pair, whole; nothing about it is random.

        Args:
          element: (kind of its source, document).
          rng: not used; a `DocumentEncoder` takes it.

        Returns:
          A list of one {"tokens": int32 [n], "weights": float32 [n]}: the tokens of the rejected
          conversation are marked, and targets weigh 1 in the chosen one, -1 in the rejected one.

        Raises:
          BadRecord: the template cannot write the pair, one of the two says nothing, or both are
            too long for one row.
        """
        _, document = element
        rejected = document.rejected
        assert isinstance(document.body, list) and rejected is not None, "its source has pairs"
        context = shared_messages(document.body, rejected)
        one, weights = self._encode(document.body, "chosen", context, document)
        other, other_weights = self._encode(rejected, "rejected", context, document)
        if len(one) + len(other) > self._config.seq_len:
            raise BadRecord(
                f"{document.name}: a pair of {len(one)} and {len(other)} tokens, which must fit "
                f"together in a row of data.seq_len = {self._config.seq_len}"
            )
        return [
            {
                "tokens": np.concatenate([one, other | REJECTED]),
                "weights": np.concatenate([weights, 0 - other_weights]),
            }
        ]

    def _encode(
        self, messages: Messages, which: str, context: int, document: Document
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and weights of one of the two."""
        template, omitted = self._config.chat_template, self._incomplete.of(document)
        try:
            found = encode_chat(
                messages, self._tokenizer, template, document.tools, omitted, context
            )
        except UserError as error:
            raise BadRecord(f"{document.name}: {which}: {error}") from error
        ids, weights = np.asarray(found[0], np.int32), np.asarray(found[1], np.float32)
        # Nothing predicts the first token of a conversation.
        targets = ids[1:][weights[1:] > 0]
        if all(self._tokenizer.is_special(token) for token in targets.tolist()):
            raise BadRecord(
                f"{document.name}: {which}: has nothing to learn behind the messages that both "
                "begin with"
            )
        return ids, weights
