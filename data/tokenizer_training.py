"""Makes the tokenizer that a config describes: trained here, raw bytes, or loaded from a file."""

from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data.byte_level import bytes_to_unicode
from data.config import DataConfig, TokenizerConfig
from data.documents import BadRecord, Document, ReadableDocuments
from data.sources import open_split
from data.special_tokens import SPECIAL_TOKENS
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer
from errors import UserError

# Bytes of text to train a tokenizer on: enough for a small vocabulary; more only takes longer.
TRAINING_BYTES = 3_000_000


def make_tokenizer(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """Makes the tokenizer that the config describes.

    Kind "bpe" is trained on the training split of `data.sources`, with the same share of text from
    each.

    Raises:
      UserError: the tokenizer's file is missing or broken, or a source is wrong.
    """
    if config.kind == "file":
        return load_tokenizer(config.path)
    if config.kind == "bytes":
        return bytes_tokenizer()
    return train_bpe(_training_texts(data, TRAINING_BYTES), config.vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; the same texts give the same one.

    Digits are split one by one, so that arithmetic can be learnt digit by digit.

    Args:
      texts: texts to learn merges from; a few megabytes are enough for a small vocabulary.
      vocab_size: number of ids, the 256 bytes and the special tokens included. There are fewer if
        the texts have no more pairs to merge.

    Raises:
      UserError: `vocab_size` has no room for the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}: must be at least {smallest} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, "bpe")


def bytes_tokenizer() -> Tokenizer:
    """Makes a tokenizer with one id a byte, its value; the special tokens follow from 256."""
    vocabulary = {char: value for value, char in enumerate(bytes_to_unicode())}
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(_special_tokens())
    return Tokenizer(backend, "bytes")


def _special_tokens() -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """Returns a tokenizer of bytes that splits numbers into single digits."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _training_texts(config: DataConfig, num_bytes: int) -> Iterator[str]:
    """Yields about `num_bytes` of training text: equal shares, from all over each source."""
    for spec in config.sources:
        documents = ReadableDocuments(
            open_split(config, spec, "train"), skips=config.skips_bad_records
        )
        remaining = num_bytes // len(config.sources)
        for index in np.random.default_rng(0).permutation(len(documents)):
            document = documents[index]
            if isinstance(document, BadRecord):
                continue
            text = _text_of(document)
            yield text
            remaining -= len(text.encode())
            if remaining <= 0:
                break


def _text_of(document: Document) -> str:
    """Returns the body of a document; of a conversation, those contents that are text."""
    if isinstance(document.body, str):
        return document.body
    contents = (message.get("content") for message in document.body)
    return "\n".join(content for content in contents if isinstance(content, str))
