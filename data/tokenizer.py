"""One interface to every tokenizer: trained here, raw bytes, or a Hugging Face tokenizer.json.

Text never makes a special id: a document that contains the characters "<|eos|>" is encoded as those
characters. Special ids are asked for by name, except in what a chat template rendered, where they
appear as text (`Tokenizer.encode_rendered`).
"""

import contextlib
import copy
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from data.chat_template import TEMPLATE_FILE, ChatTemplate
from data.special_tokens import (
    BOS_SPELLINGS,
    COMPLETION_TAGS,
    EOS_SPELLINGS,
    FIM_SPELLINGS,
    PAD_SPELLINGS,
)
from errors import UserError
from files import write_text


class FimTokens(NamedTuple):
    """The ids that open the prefix, the suffix and the middle of a fill-in-the-middle document."""

    prefix: int
    suffix: int
    middle: int


class Encoding(NamedTuple):
    """A text with its ids.

    Attributes:
      text: the text.
      ids: its ids.
      offsets: for each id the characters start .. end - 1 of `text` that it stands for; ids that
        share a character each have it.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    Attributes:
      name: file or kind of the tokenizer, for errors.
      vocab_size: number of ids, special ones included; every id is below it.
      bos: id that begins a document, or None if the tokenizer has none.
      eos: id that ends a document or a turn.
      pad: id that fills the rest of a row; `eos` if the tokenizer has none of its own.
      stops: ids at which sampling ends: `eos`, and the others that the checkpoint names.
      chat_template: the checkpoint's own, or None if it has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str,
        special_tokens: Mapping[str, str] | None = None,
        stops: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
    ):
        """Wraps a tokenizer of the `tokenizers` library.

        Args:
          backend: has every special token flagged as special.
          name: file or kind of the tokenizer, for errors.
          special_tokens: texts of the tokens for the roles "bos_token", "eos_token", "pad_token"
            and others. They take precedence over the usual spellings.
          stops: ids at which sampling ends, besides that of the end of a document.
          chat_template: the checkpoint's own.

        Raises:
          UserError: no token ends a document.
        """
        # "<|eos|>" in a text is seven characters, not the end of the document.
        backend.encode_special_tokens = True
        roles = special_tokens or {}
        self._backend = backend
        self._roles = roles
        self.name = name
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._skipped_ids = frozenset(
            index for text, index in self._special.items() if text not in COMPLETION_TAGS
        )
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos: int | None = self._find(roles.get("bos_token"), BOS_SPELLINGS)
        eos = self._find(roles.get("eos_token"), EOS_SPELLINGS)
        if eos is None:
            raise UserError(
                f"{name}: no token that ends a document (looked for {', '.join(EOS_SPELLINGS)})"
            )
        self.eos: int = eos
        pad = self._find(roles.get("pad_token"), PAD_SPELLINGS)
        self.pad: int = eos if pad is None else pad
        self.stops: tuple[int, ...] = tuple(dict.fromkeys((eos, *stops)))

    def with_template_options(self, options: Mapping[str, Any]) -> "Tokenizer":
        """Returns this tokenizer with switches of its chat template, such as enable_thinking.

        Raises UserError if it has no chat template, or one that does not read them.
        """
        if not options:
            return self
        if self.chat_template is None:
            raise UserError(
                f"{self.name}: no chat template, so no data.chat_template_options ({list(options)})"
            )
        changed = copy.copy(self)
        changed.chat_template = self.chat_template.with_options(options)
        return changed

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, none of them special whatever the text contains."""
        with self._panics():
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text as `encode` does, on as many threads as the machine has."""
        with self._panics():
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the ids of a text in which special tokens count.

        A chat template renders such texts: "<|eos|>" in one is the end of a turn.
        """
        with self._panics():
            return self._rendered_backend.encode(text, add_special_tokens=False).ids

    def encode_rendered_with_offsets(self, text: str) -> Encoding:
        """Encodes a text as `encode_rendered` does, with the characters that each id stands for."""
        with self._panics():
            encoding = self._rendered_backend.encode(text, add_special_tokens=False)
        return Encoding(text, encoding.ids, encoding.offsets)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids, in which U+FFFD stands for broken UTF-8.

        Args:
          ids: the ids.
          skip_special_tokens: leaves special tokens out, except the tags of a completion (<think>,
            <answer>); otherwise all are written.
        """
        skipped = self._skipped_ids if skip_special_tokens else frozenset()
        kept = [int(index) for index in ids if int(index) not in skipped]
        with self._panics():
            return self._backend.decode(kept, skip_special_tokens=False)

    def is_special(self, token_id: int) -> bool:
        """Returns whether an id is that of a special token."""
        return token_id in self._special_ids

    def special_token_id(self, text: str) -> int | None:
        """Returns the id of a special token, or None if the tokenizer has no such token."""
        return self._special.get(text)

    @property
    def fim(self) -> FimTokens:
        """The fill-in-the-middle sentinels. Raises UserError if the tokenizer has none."""
        if spelling := self._fim_spelling:
            return FimTokens(*(self._special[text] for text in spelling))
        raise UserError(
            f"{self.name}: no fill-in-the-middle tokens (such as {' '.join(FIM_SPELLINGS[0])}); "
            "set data.fim_rate = 0 or take another tokenizer"
        )

    @property
    def has_fim(self) -> bool:
        """Whether there are fill-in-the-middle sentinels."""
        return self._fim_spelling is not None

    @property
    def _fim_spelling(self) -> tuple[str, ...] | None:
        whole = (words for words in FIM_SPELLINGS if all(text in self._special for text in words))
        return next(whole, None)

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json that `load_tokenizer` and Hugging Face read.

        The roles of its tokens, its stops and its chat template are written beside it, in the files
        in which a checkpoint has them. Each file appears whole, and `path` last: where it is, all
        are.
        """
        path = Path(path)
        if self.chat_template is not None:
            write_text(path.with_name(TEMPLATE_FILE), self.chat_template.source)
        # Without this file transformers takes the class of the model's family, which may add
        # tokens of its own.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {"clean_up_tokenization_spaces": False, **self.special_tokens}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_text(path.with_name("tokenizer_config.json"), text)
        if len(self.stops) > 1:
            text = json.dumps({"eos_token_id": self.stops}) + "\n"
            write_text(path.with_name("generation_config.json"), text)
        write_text(path, self._backend.to_str(pretty=True))

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the tokens with a role, by role: {"eos_token": "<|eos|>"}.

        They are those that a checkpoint names, or else those found by their spelling.
        """
        found = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        texts = {index: text for text, index in self._special.items()}
        return dict(self._roles) or {
            role: texts[index] for role, index in found.items() if index is not None
        }

    @property
    def token_ids(self) -> dict[str, int | list[int] | None]:
        """The ids that a config.json names: {"eos_token_id": 2}, a list of several stops."""
        stops = list(self.stops)
        return {
            "bos_token_id": self.bos,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            "pad_token_id": self.pad,
        }

    @functools.cached_property
    def _rendered_backend(self) -> tokenizers.Tokenizer:
        """A separate backend for text with special tokens.

        Whether special tokens count is a switch of the backend, and threads that shared one would
        flip it for each other.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        # It adds no token here, but some of them trim the spaces of a token off its offsets.
        backend.post_processor = None
        return backend

    @contextlib.contextmanager
    def _panics(self) -> Iterator[None]:
        """Turns what the library throws at a text into UserError.

        Its panics, as of a regular expression that takes too long, are no Exceptions.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.name}: the tokenizer fails at a text ({reason})") from error

    def _find(self, named: str | None, spellings: Sequence[str]) -> int | None:
        """Returns the id of the first of the spellings, `named` before all, that is special."""
        for text in ((named,) if named else ()) + tuple(spellings):
            if text in self._special:
                return self._special[text]
        return None
