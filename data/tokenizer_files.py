"""Loads a Hugging Face tokenizer.json, with roles, stops and chat template from its folder."""

import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from data.chat_template import TEMPLATE_FILE, find_chat_template
from data.special_tokens import is_control_token
from data.tiktoken_files import RANKS_FILE, tokenizer_json
from data.tokenizer import Tokenizer
from errors import UserError
from files import read_json

# All files that `Tokenizer.save` may write and `load_tokenizer` reads of what it wrote.
TOKENIZER_FILES = (
    "tokenizer.json",
    TEMPLATE_FILE,
    "tokenizer_config.json",
    "generation_config.json",
)

LARGEST_ID = 10_000_000  # the largest vocabularies have a few hundred thousand entries


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer with all that the files beside it say.

    The files are those of a Hugging Face checkpoint: tokenizer_config.json and
    special_tokens_map.json say which tokens begin and end a document, generation_config.json or
    config.json what else ends one, chat_template.jinja or tokenizer_config.json how to chat.

    Args:
      path: a tokenizer.json, or the directory that it is in. Where there is none, the ranks in a
        tiktoken.model are read (data/tiktoken_files.py).

    Raises:
      UserError: there is no such file, it is not a tokenizer, or a file beside it is broken.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file() and path.with_name(RANKS_FILE).is_file():
        path = path.with_name(RANKS_FILE)
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    config = _read_optional(path.with_name("tokenizer_config.json"))
    roles = _special_token_roles(config, path.parent)
    return Tokenizer(
        _load_backend(path, roles.values()),
        str(path),
        roles,
        _stops(path.parent),
        find_chat_template(path.parent, config, roles),
    )


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory has a tokenizer that `load_tokenizer` reads."""
    return any((directory / name).exists() for name in ("tokenizer.json", RANKS_FILE))


def _load_backend(path: Path, named: Collection[str]) -> tokenizers.Tokenizer:
    """Loads the file and flags every control token, and those `named`, as special."""
    try:
        ranks = path.name == RANKS_FILE
        text = tokenizer_json(path) if ranks else path.read_text(encoding="utf-8")
        if '"Precompiled"' in text:
            _check_apart(path)
        saved = json.loads(text)
        for token in saved["added_tokens"]:
            token["special"] = token["special"] or is_control_token(token["content"], named)
        backend = tokenizers.Tokenizer.from_str(json.dumps(saved))
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics, which are none
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not a Hugging Face tokenizer.json ({reason})") from error
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if largest > LARGEST_ID:
        raise UserError(f"{path}: id {largest}: a vocabulary has at most {LARGEST_ID:,} entries")
    backend.no_padding()
    backend.no_truncation()
    # A token with a role may be in the vocabulary only. As a special one it must be matched in
    # text before the text is cut into other tokens.
    added = {token["content"] for token in saved["added_tokens"]}
    backend.add_special_tokens(
        [
            AddedToken(text, special=True)
            for text in named
            if text not in added and backend.token_to_id(text) is not None
        ]
    )
    return backend


def _check_apart(path: Path) -> None:
    """Raises UserError if a tokenizer ends the process that loads it.

    That can happen where its normaliser is compiled, as some families' are: the library aborts.
    """
    code = "import sys, tokenizers; tokenizers.Tokenizer.from_file(sys.argv[1]).encode('a é 你 ﬁ')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: takes more than two minutes to load") from None
    if done.returncode:
        raise UserError(f"{path}: not a Hugging Face tokenizer.json (its normalizer is damaged)")


def _special_token_roles(config: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Returns the texts of the tokens with a role, by role: {"bos_token": "<s>"}.

    The older special_tokens_map.json is read where the config does not list the added tokens.
    """
    tokens = (
        config
        if "added_tokens_decoder" in config
        else {**config, **_read_optional(directory / "special_tokens_map.json")}
    )
    texts = {
        role: token.get("content") if isinstance(token, dict) else token
        for role, token in tokens.items()
        if role.endswith("_token")
    }
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _stops(directory: Path) -> list[int]:
    """Returns the ids that end a text by generation_config.json, or else by config.json."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        stops = _read_optional(path).get("eos_token_id")
        if stops is not None:
            stops = stops if isinstance(stops, list) else [stops]
            if not all(type(stop) is int and stop >= 0 for stop in stops):
                raise UserError(f"{path}: eos_token_id = {stops}: must be an id, or a list of ids")
            return stops
    return []


def _read_optional(path: Path) -> dict[str, Any]:
    """Reads a JSON object; it is empty if there is no such file."""
    return read_json(path) if path.is_file() else {}
