"""The schedule the TPU's compiler makes of a Pallas kernel, without a TPU: how many bundles each
stretch of its code has (one is one cycle where nothing stalls), how busy the matrix units are in
it, what is spilled. Static: waits for memory are not in it, and nothing is measured.

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


class Stretch(NamedTuple):
    """Code between two places that are jumped to."""

    depth: int  # loops around it; 1 is the kernel's grid
    loop: bool  # it begins with a loop's body
    bundles: int
    mxu: float  # share of the matrix units' slots that are used
    spills: int  # stores and loads of registers that did not suffice


@contextmanager
def dumped() -> Iterator[Path]:
    """Sets the options with which the compiler writes its schedules, and a directory for them that
    is deleted at the end.
    """
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        yield Path(directory)


def stretches(directory: Path, name: str, *, jumps: bool = False) -> list[Stretch]:
    """Of the kernel of this name, in the order of its code; with `jumps` they end at every jump,
    too, and not only where something jumps to or comes from a loop. Raises FileNotFoundError if
    none was compiled.
    """
    bundles = _one(directory, name, "final_bundles.txt").read_text().splitlines()
    table = (
        _one(directory, name, "final_hlo-static-per-bundle-utilization.txt")
        .read_text()
        .splitlines()
    )
    heading = table.index("== UTILIZATION:")
    units = [unit.strip() for unit in table[1].split(",")]
    capacity = dict(zip(units, map(int, table[2].split()), strict=True))
    used = [
        dict(zip(units, map(int, line.split()), strict=True))
        for line in table[heading + 1 :]
        if line.strip()
    ]
    found, begun = [], 0
    marks, behind = [], set()  # of the bundles; those behind a jump
    for line in bundles:
        marks += filter(None, [BUNDLE.match(line)])
        behind |= {len(marks)} if jumps and "sbr.rel" in line else set()
    for at, match in enumerate(marks + [None]):
        if at == 0 or (match is not None and match["mark"] is None and at not in behind):
            continue
        part = used[begun:at]
        spills = sum(line["VLOAD:FILL"] + line["VSTORE:SPILL"] for line in part)
        mxu = sum(line["MXU"] for line in part) / (capacity["MXU"] * len(part))
        found.append(
            Stretch(
                len(marks[begun]["depth"]), marks[begun]["mark"] == "LB", len(part), mxu, spills
            )
        )
        begun = at
    return found


def _one(directory: Path, name: str, ending: str) -> Path:
    files = sorted(
        file
        for file in directory.glob(f"*{ending}")
        if re.search(rf"-(\w*_)?{name}_*(\.\d+)?-\d+-{ending}$", file.name)
    )
    if not files:
        raise FileNotFoundError(f"no schedule of a kernel {name} in {directory}: was it compiled?")
    return files[-1]
