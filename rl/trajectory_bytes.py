"""Trajectories as bytes, with all that is recorded of them: for a checkpoint.

For a person to look at there is rl/trajectory_file.py. Spans are left out, as they are found in the
ids again.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from rl.coding import CodedSets
from rl.request import PER_TOKEN
from rl.trajectory import Trajectory

SETS = ("selected_TL", "support_T")
SET_FIELDS = [each.name for each in dataclasses.fields(CodedSets)]


def to_bytes(trajectories: Sequence[Trajectory]) -> bytes:
    """Returns the bytes of N trajectories, of one model."""
    arrays = {
        "length": np.asarray([len(each.tokens_T) for each in trajectories], np.int64),
        "group": np.asarray([each.group for each in trajectories], np.int64),
        "sample": np.asarray([each.sample for each in trajectories], np.int64),
        "ended": np.asarray([each.ended for each in trajectories], np.str_),
    }
    if trajectories:
        for name in PER_TOKEN:
            arrays[name] = np.concatenate([getattr(each, f"{name}_T") for each in trajectories])
    routes = [each.routes_TLK for each in trajectories]
    arrays["has_routes_TLK"] = np.asarray([each is not None for each in routes], bool)
    if recorded := [each for each in routes if each is not None]:
        arrays["routes_TLK"] = np.concatenate(recorded)
    for name in SETS:
        sets = [getattr(each, name) for each in trajectories]
        arrays[f"has_{name}"] = np.asarray([each is not None for each in sets], bool)
        if recorded := [each for each in sets if each is not None]:
            joined = CodedSets.joined(recorded)
            arrays |= {
                f"{name}.{field}": np.asarray(getattr(joined, field)) for field in SET_FIELDS
            }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def from_bytes(written: bytes) -> list[Trajectory]:
    """Reads what `to_bytes` wrote.

    Raises KeyError or ValueError for other bytes.
    """
    with np.load(io.BytesIO(written), allow_pickle=False) as file:
        arrays = dict(file)
    ends_N = np.cumsum(arrays["length"])
    starts_N = ends_N - arrays["length"]
    recorded = {name: _recorded(arrays, name) for name in ("routes_TLK", *SETS)}
    return [
        Trajectory(
            **{f"{name}_T": arrays[name][start:end] for name in PER_TOKEN},
            ended=str(arrays["ended"][n]),
            group=int(arrays["group"][n]),
            sample=int(arrays["sample"][n]),
            **{name: its[n] for name, its in recorded.items() if n in its},
        )
        for n, (start, end) in enumerate(zip(starts_N, ends_N, strict=True))
    ]


def _recorded(arrays: dict[str, np.ndarray], name: str) -> dict[int, Any]:
    """Returns a record of those trajectories that have it, by their places."""
    having = np.flatnonzero(arrays[f"has_{name}"]).tolist()
    if not having:
        return {}
    ends_M = np.cumsum(arrays["length"][having])
    parts = list(map(slice, ends_M - arrays["length"][having], ends_M))
    if name not in SETS:
        return dict(zip(having, map(arrays[name].__getitem__, parts), strict=True))
    fields: dict[str, Any] = {field: arrays[f"{name}.{field}"] for field in SET_FIELDS}
    fields["width"] = int(fields["width"])
    return dict(zip(having, CodedSets(**fields).cut(parts), strict=True))
