"""Reads the files of a run whatever is in them: what is no record is left out, and noted."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from errors import shortened

# Beyond this a number is no measurement, and sums of its like overflow.
LARGEST = 1e30
NAMED = 3  # places of a file that a note names


def number(value: Any) -> float | None:
    """Returns a finite number as a float, None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and abs(value) <= LARGEST else None


def matrix(value: Any) -> np.ndarray | None:
    """Returns equally long lists of finite numbers as an array [N, M], None for all else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        return None
    rows = [[number(item) for item in row] for row in value]
    if not rows[0] or len({len(row) for row in rows}) > 1 or any(None in row for row in rows):
        return None
    return np.array(rows, float)


def mapping(value: Any) -> Mapping[str, Any]:
    """Returns a mapping as it is, an empty one for all else."""
    return value if isinstance(value, Mapping) else {}


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Returns the JSON object of a file, {} without one; a note says if it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as failure:
        notes.append(f"{shown(path)}: cannot be read: {failure.strerror}")
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{shown(path)}: left out, as it is no JSON object")
        return {}
    return found


def read_records(
    path: Path, valid: Callable[[dict[str, Any]], bool], what: str, notes: list[str]
) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file, [] without one.

    A line that is no JSON object, is cut short or is not `valid` is left out; a note counts them
    and names the first few.

    Args:
      what: what a line is, in words, such as "line of metrics".
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as failure:
        notes.append(f"{shown(path)}: cannot be read: {failure.strerror}")
        return []
    records, bad = [], []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and valid(record):
            records.append(record)
        else:
            bad.append(place)
    if bad:
        places = ", ".join(map(str, bad[:NAMED])) + (", ..." if len(bad) > NAMED else "")
        lines_are = f"line {places} is" if len(bad) == 1 else f"{len(bad)} lines ({places}) are"
        notes.append(f"{shown(path)}: {lines_are} left out: no {what}, or cut short")
    return records


def shown(path: Path) -> str:
    """Returns a path as notes have it."""
    return shortened(os.fsdecode(path))
