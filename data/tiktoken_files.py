"""A tokenizer.json made of tiktoken's ranks, as Kimi-K2 and Moonlight come.

Such a checkpoint has three files: tiktoken.model (a line "BASE64 RANK" for each entry), the pattern
that cuts texts into words as `pat_str` in a Python file, which is read and never run, and the
special tokens as "added_tokens_decoder" in tokenizer_config.json.
"""

import ast
import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.byte_level import bytes_to_unicode
from errors import UserError
from files import read_json

RANKS_FILE = "tiktoken.model"


def tokenizer_json(path: Path) -> str:
    """Returns the tokenizer.json that encodes as tiktoken does with these ranks.

    Args:
      path: a tiktoken.model, with the other two files beside it.

    Raises:
      UserError: a file is missing or not what it should be.
    """
    ranks, pattern = _ranks(path), _pattern(path.parent)
    if pattern is None:
        raise UserError(
            f"{path}: no Python file beside it has the pat_str that cuts texts into words; copy the"
            " checkpoint's tokenization_*.py there, or a tokenizer.json"
        )
    special = _special_tokens(path.with_name("tokenizer_config.json"))
    letters = list(bytes_to_unicode())
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {written[token]: rank for token, rank in ranks.items()}
    if clash := [token["content"] for token in special if token["id"] in vocab.values()]:
        raise UserError(f"{path}: {clash[0]} has the id of one of its entries")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    as_bytes["use_regex"] = False
    return json.dumps({
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, as_bytes],
        },
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            # Special tokens stand in the vocabulary too: only there may ids have gaps.
            "vocab": vocab | {token["content"]: token["id"] for token in special},
            "merges": [[written[left], written[right]] for left, right in _merges(ranks)],
            "ignore_merges": True,  # a word that is an entry is that entry
        },
    })  # fmt: skip


def _ranks(path: Path) -> dict[bytes, int]:
    """Returns the rank of each entry, in order. Raises UserError for a line that is none."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f'{path}:{number}: must be "BASE64 RANK"') from None
    if {bytes([value]) for value in range(256)} - ranks.keys():
        raise UserError(f"{path}: lacks some of the 256 bytes")
    if len(set(ranks.values())) < len(ranks):
        raise UserError(f"{path}: two entries have the same rank")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yields every pair of entries that makes another one, in the order of what they make.

    tiktoken merges whichever neighbours make the entry of the lowest rank.
    """
    for token in ranks:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _special_tokens(path: Path) -> list[dict[str, Any]]:
    """Returns the added tokens as a tokenizer.json has them."""
    listed = read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    try:
        return [
            plain | {"id": int(index), "content": str(token["content"]), "special": True}
            for index, token in sorted(listed.items(), key=lambda item: int(item[0]))
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f'{path}: "added_tokens_decoder": must have a token for each id') from None


def _pattern(directory: Path) -> str | None:
    """Returns the value that a Python file gives to `pat_str`, or None if none does.

    It is a text, or a list of texts joined by another.
    """
    for file in sorted(directory.glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [getattr(target, "id", getattr(target, "attr", "")) for target in targets]
            if isinstance(node, ast.Assign) and "pat_str" in names:
                return _text(node.value)
    return None


def _text(node: ast.expr) -> str | None:
    """Returns the text that an expression writes down, or None if it is something else."""
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            separator, parts = ast.literal_eval(node.func.value), ast.literal_eval(node.args[0])
            return separator.join(parts) if node.func.attr == "join" else None
        value = ast.literal_eval(node)
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return value if isinstance(value, str) else None
