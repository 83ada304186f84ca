"""One face for every tokenizer: trained here, raw bytes, or a Hugging Face tokenizer.json.

Text never makes a special id: a document that contains the characters "<|eos|>" is encoded as those
characters. Special ids are asked for by name, except in what a chat template wrote, where they
stand as text (`encode_marked`).
"""

import functools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data.chat_template import TEMPLATE_FILE, ChatTemplate, find_chat_template
from errors import UserError

# What a tokenizer is on disk: all that `Tokenizer.save` may write and `load_tokenizer` reads of it.
TOKENIZER_FILES = (
    "tokenizer.json",
    TEMPLATE_FILE,
    "tokenizer_config.json",
    "generation_config.json",
)

SPECIAL_TOKENS = (
    "<|pad|>", "<|bos|>", "<|eos|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
    "<|user|>", "<|assistant|>", "<think>", "</think>", "<answer>", "</answer>",
)  # fmt: skip

# Parts of the text a model writes, so `decode` keeps them.
COMPLETION_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Spellings by family, most telling first. In DeepSeek's the document is begin, prefix, hole,
# suffix, end, middle (arXiv 2412.19437, section 4.1).
FIM_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
BOS_SPELLINGS = ("<|bos|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>")
EOS_SPELLINGS = (
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<eos>",
    "</s>",
)
PAD_SPELLINGS = ("<|pad|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]")

# Some files do not flag their control tokens as special ("<｜fim▁hole｜>" in DeepSeek's, "<think>" in
# Qwen's); these spellings give them away.
_CONTROL = re.compile(r"<[|｜].*[|｜]>")
_KNOWN = {
    *SPECIAL_TOKENS,
    *BOS_SPELLINGS,
    *EOS_SPELLINGS,
    *PAD_SPELLINGS,
    *(token for spelling in FIM_SPELLINGS for token in spelling),
}


class FimTokens(NamedTuple):
    """The ids that open the prefix, the suffix and the middle of a fill-in-the-middle document."""

    prefix: int
    suffix: int
    middle: int


class Tokenizer:
    """Text to ids and back.

    Attributes:
      name: which tokenizer it is, for errors.
      vocab: number of ids, special ones included; every id is below it.
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
        """`special_tokens` maps "bos_token", "eos_token", "pad_token" and others to token texts and
        goes before the usual spellings.
        """
        backend.encode_special_tokens = (
            True  # "<|eos|>" in a text is seven characters, not the end of the document
        )
        named = special_tokens or {}
        self._backend = backend
        self._named = named
        self.name = name
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._dropped = frozenset(
            index for text, index in self._special.items() if text not in COMPLETION_TAGS
        )
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos: int | None = self._role(named.get("bos_token"), BOS_SPELLINGS)
        eos = self._role(named.get("eos_token"), EOS_SPELLINGS)
        if eos is None:
            raise UserError(
                f"{name}: no token that ends a document (looked for {', '.join(EOS_SPELLINGS)})"
            )
        self.eos: int = eos
        pad = self._role(named.get("pad_token"), PAD_SPELLINGS)
        self.pad: int = eos if pad is None else pad
        self.stops: tuple[int, ...] = tuple(dict.fromkeys((eos, *stops)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Never special ones, whatever the text says."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on as many threads as the machine has."""
        return [
            encoding.ids
            for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text in which special tokens count, as a chat template writes it: "<|eos|>" is
        the end of a turn.
        """
        return self._marked.encode(text, add_special_tokens=False).ids

    def encode_rendered_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_marked`, and for each id the characters start .. end - 1 that it is for; ids that
        share a character each have it.
        """
        encoding = self._marked.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. Special tokens are dropped, except the tags of a completion (<think>,
        <answer>), or all written out. Broken UTF-8 becomes U+FFFD.
        """
        kept = [int(index) for index in ids if not (skip_special_tokens and int(index) in self._dropped)]
        return self._backend.decode(kept, skip_special_tokens=False)

    def is_special(self, index: int) -> bool:
        """Whether an id is that of a special token."""
        return index in self._special_ids

    def special_token_id(self, text: str) -> int | None:
        """Id of a special token by its text, or None."""
        return self._special.get(text)

    @property
    def fim(self) -> FimTokens:
        """Fill-in-the-middle sentinels. Raises UserError if the tokenizer has none."""
        for spelling in FIM_SPELLINGS:
            if all(text in self._special for text in spelling):
                return FimTokens(*(self._special[text] for text in spelling))
        raise UserError(
            f"{self.name}: no fill-in-the-middle tokens (such as {' '.join(FIM_SPELLINGS[0])}); set data.fim_rate = 0 or take another tokenizer"
        )

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json that `load_tokenizer` and Hugging Face read.

        A checkpoint's tokenizer has its chat template, the roles of its tokens and its stops
        written beside it, in the files that they came from. Each file
        appears whole, `path` last: where that is, all are.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.chat_template is not None:
            _write(path.with_name(TEMPLATE_FILE), self.chat_template.source)
        if self._named:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._named}
            _write(
                path.with_name("tokenizer_config.json"),
                json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            )
        if len(self.stops) > 1:
            _write(
                path.with_name("generation_config.json"),
                json.dumps({"eos_token_id": self.stops}) + "\n",
            )
        _write(path, self._backend.to_str(pretty=True))

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """A backend of its own for text with special tokens: the switch between the two is the
        backend's, and threads would throw it under each other.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = (
            None  # adds no token here, but some trim the spaces of a token off its offsets
        )
        return backend

    def _role(self, named: str | None, spellings: Sequence[str]) -> int | None:
        for text in ((named,) if named else ()) + tuple(spellings):
            if text in self._special:
                return self._special[text]
        return None


class DecodeStream:
    """Decodes ids one by one, for a reader who watches them come. Never shows half a UTF-8
    character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[
            int
            # what is not yet shown, behind what was shown last: some decoders look at the token before
        ] = []
        self._shown = 0  # of self._ids

    def push(self, index: int) -> str:
        """The text that this id completes; "" while a character is still open."""
        self._ids.append(index)
        before, after = self._texts()
        if after.endswith("\ufffd"):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end; a character that never closed becomes U+FFFD."""
        before, after = self._texts()
        self._ids, self._shown = [], 0
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._ids[: self._shown]), self._tokenizer.decode(self._ids)


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with digits split one by one, so that arithmetic can be learnt digit by digit.
    The same texts give the same tokenizer.

    Args:
      texts: what to learn merges from; a few megabytes are enough for a small vocabulary.
      vocab: entries, the 256 bytes and the special tokens included. Fewer if the texts have no more
        pairs to merge.
    """
    if vocab < 256 + len(SPECIAL_TOKENS):
        raise UserError(
            f"tokenizer.vocab_size = {vocab}: must be at least {256 + len(SPECIAL_TOKENS)} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    backend = _byte_level(models.BPE())
    specials = [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return Tokenizer(backend, "bpe")


def bytes_tokenizer() -> Tokenizer:
    """One id a byte, its value; the special tokens follow from 256."""
    backend = _byte_level(
        models.BPE(vocab={char: value for value, char in enumerate(_byte_chars())}, merges=[])
    )
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    return Tokenizer(backend, "bytes")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Any Hugging Face tokenizer.json, or the directory it is in, with what the files beside it
    say: tokenizer_config.json and special_tokens_map.json which tokens begin and end a document,
    generation_config.json or config.json what else ends one, chat_template.jinja or
    tokenizer_config.json how to chat.

    Raises UserError if there is no such file, it is not a tokenizer, or a file beside it is broken.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    config = _read_object(path.with_name("tokenizer_config.json"))
    named = _special_tokens(config, path.parent)
    known = {*_KNOWN, *named.values()}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        for token in saved["added_tokens"]:
            token["special"] = (
                token["special"]
                or token["content"] in known
                or _CONTROL.fullmatch(token["content"]) is not None
            )
        backend = tokenizers.Tokenizer.from_str(json.dumps(saved))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    added = {token["content"] for token in saved["added_tokens"]}
    # Some name a token that is in the vocabulary only; special as it is, it must be found in text
    # before that is cut into others.
    backend.add_special_tokens(
        [
            AddedToken(text, special=True)
            for text in named.values()
            if text not in added and backend.token_to_id(text) is not None
        ]
    )
    return Tokenizer(
        backend,
        str(path),
        named,
        _stops(path.parent),
        find_chat_template(path.parent, config, named),
    )


def _special_tokens(config: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Texts of the tokens that have a name, such as "bos_token". The older special_tokens_map.json
    counts where the config does not list the added tokens.
    """
    tokens = (
        config
        if "added_tokens_decoder" in config
        else {**config, **_read_object(directory / "special_tokens_map.json")}
    )
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in tokens.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _stops(directory: Path) -> list[int]:
    """The ids that end a text by generation_config.json, or else by config.json."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        stops = _read_object(path).get("eos_token_id")
        if stops is not None:
            stops = stops if isinstance(stops, list) else [stops]
            if not all(type(stop) is int and stop >= 0 for stop in stops):
                raise UserError(f"{path}: eos_token_id = {stops}: must be an id, or a list of ids")
            return stops
    return []


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON {type(found).__name__}, not an object")
    return found


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_chars() -> Iterator[str]:
    """The character byte-level BPE writes for each byte 0..255: itself where it is printable
    Latin-1, else the next one from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(0x100, 0x200))
    for value in range(256):
        yield chr(value if value in printable else next(stand_in))
