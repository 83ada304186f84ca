"""Trajectories as JSONL, for a person to look at and to read again: one JSON object a line.

    {"tokens": [...], "roles": ["prompt", ..., "model"], "logprobs": [...], "log_kept": [...],
     "versions": [...], "ended": "stop", "group": 0, "sample": 3, "spans": {"answer": [[9, 12]]}}

Each list has an item a token, of what `Trajectory` says. A number is written with the digits that
give the same float32 again. What the layers chose (routes, selections) is left out: it is many
times larger, and of use to a trainer alone.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from files import write_text
from rl.trajectory import Role, Trajectory

FIELDS = (
    "tokens", "roles", "logprobs", "log_kept", "versions", "ended", "group", "sample", "spans"
)  # fmt: skip
_ROLES = {role.name.lower(): role for role in Role}
_TYPES = {"logprobs": np.float32, "log_kept": np.float32, "versions": np.int32}


def as_record(trajectory: Trajectory) -> dict[str, Any]:
    """Returns a trajectory as the object of a line."""
    return {
        "tokens": trajectory.tokens_T.tolist(),
        "roles": [Role(role).name.lower() for role in trajectory.roles_T],
        "logprobs": _short(trajectory.logprobs_T),
        "log_kept": _short(trajectory.log_kept_T),
        "versions": trajectory.versions_T.tolist(),
        "ended": trajectory.ended,
        "group": trajectory.group,
        "sample": trajectory.sample,
        "spans": {name: list(map(list, spans)) for name, spans in trajectory.spans.items()},
    }


def from_record(record: dict[str, Any]) -> Trajectory:
    """Returns the trajectory of a line's object; whatever else is in it is not read.

    Raises KeyError, TypeError or ValueError for an object that is none.
    """
    tokens_T = np.asarray(record["tokens"], np.int32)
    roles_T = np.asarray([_ROLES[name] for name in record["roles"]], np.int8)
    others = {f"{name}_T": np.asarray(record[name], kind) for name, kind in _TYPES.items()}
    if tokens_T.ndim != 1 or any(
        x_T.shape != tokens_T.shape for x_T in (roles_T, *others.values())
    ):
        raise ValueError("its lists are not of one length")
    spans = {
        name: tuple((int(start), int(end)) for start, end in spans)
        for name, spans in record["spans"].items()
    }
    return Trajectory(
        tokens_T=tokens_T,
        roles_T=roles_T,
        logprobs_T=others["logprobs_T"],
        log_kept_T=others["log_kept_T"],
        versions_T=others["versions_T"],
        ended=record["ended"],
        group=record["group"],
        sample=record["sample"],
        spans=spans,
    )


def write_trajectories(
    path: Path, trajectories: Iterable[Trajectory], more: Iterable[dict[str, Any]] | None = None
) -> None:
    """Writes a file of trajectories, whole or not at all.

    Args:
      more: for each trajectory what else its line shall say, such as {"reward": 1.0}.

    Raises:
      UserError: the operating system refuses to write there.
    """
    records = map(as_record, trajectories)
    if more is not None:
        records = (each | record for each, record in zip(more, records, strict=True))
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_trajectories(path: Path) -> Iterator[tuple[Trajectory, dict[str, Any]]]:
    """Yields each trajectory of a file, and whatever else its line says.

    Raises UserError for a file that cannot be read, or a line that is no trajectory.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            trajectory = from_record(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: no trajectory ({reason})") from error
        yield trajectory, {name: x for name, x in record.items() if name not in FIELDS}


def _short(x_T: np.ndarray) -> list[float]:
    """Returns float32 numbers as those of the fewest digits that are the same in float32."""
    return [float(str(x)) for x in x_T.astype(np.float32)]
