"""Reads the schedule that the TPU's compiler makes of a Pallas kernel, without a TPU.

A schedule says how many bundles each stretch of code has (one bundle is one cycle where nothing
stalls), how busy the matrix units are in it, and what is spilled. It is static: waits for memory
are not in it, and nothing is measured.

    with dumped() as directory:          before JAX is imported: the compiler reads its options once
        ... compile ...
    for part in stretches(directory, "select"): ...
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s*(?P<mark>[A-Z]{2})?:\s*(?P<depth>>*)\s*\{")
LOOP_BODY = "LB"  # the mark of a bundle with which a loop's body begins


class Stretch(NamedTuple):
    """Code between two places that are jumped to."""

    depth: int  # loops around it; 1 is the kernel's grid
    loop: bool  # it begins with a loop's body
    bundles: int
    mxu: float  # share of the matrix units' slots that are used
    spills: int  # stores and loads of registers that did not suffice


@contextmanager
def dumped() -> Iterator[Path]:
    """Makes the compiler write its schedules into a directory, which is deleted at the end."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        yield Path(directory)


def stretches(directory: Path, name: str, *, jumps: bool = False) -> list[Stretch]:
    """Returns the stretches of a kernel, in the order of its code.

    Args:
      directory: where the schedules are, see `dumped`.
      name: the kernel's.
      jumps: whether a stretch ends at every jump, too, and not only where something jumps to or
        comes from a loop.

    Raises FileNotFoundError if there is no compiled kernel of this name.
    """
    usage, capacity = _usage(directory, name)
    marks, behind_jumps = [], set()  # of the bundles
    for line in _text(directory, name, "final_bundles.txt"):
        marks += filter(None, [BUNDLE.match(line)])
        if jumps and "sbr.rel" in line:
            behind_jumps.add(len(marks))
    starts = [
        at
        for at, match in enumerate(marks)
        if at == 0 or match["mark"] is not None or at in behind_jumps
    ]
    found = []
    for start, end in zip(starts, [*starts[1:], len(marks)], strict=True):
        part = usage[start:end]
        found.append(
            Stretch(
                depth=len(marks[start]["depth"]),
                loop=marks[start]["mark"] == LOOP_BODY,
                bundles=len(part),
                mxu=sum(units["MXU"] for units in part) / (capacity["MXU"] * len(part)),
                spills=sum(units["VLOAD:FILL"] + units["VSTORE:SPILL"] for units in part),
            )
        )
    return found


def _usage(directory: Path, name: str) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Reads how many slots of each unit every bundle uses, and how many there are."""
    table = _text(directory, name, "final_hlo-static-per-bundle-utilization.txt")
    units = [unit.strip() for unit in table[1].split(",")]
    rows = [line.split() for line in table[table.index("== UTILIZATION:") + 1 :] if line.strip()]
    capacity, *usage = (
        dict(zip(units, map(int, row), strict=True)) for row in (table[2].split(), *rows)
    )
    return usage, capacity


def _text(directory: Path, name: str, ending: str) -> list[str]:
    """Reads the lines of the last file of a kernel with this ending."""
    files = sorted(
        file
        for file in directory.glob(f"*{ending}")
        if re.search(rf"-(\w*_)?{name}_*(\.\d+)?-\d+-{ending}$", file.name)
    )
    if not files:
        raise FileNotFoundError(f"no schedule of a kernel {name} in {directory}: was it compiled?")
    return files[-1].read_text().splitlines()
