"""Reads the schedule that the TPU's compiler makes of a Pallas kernel, without a TPU.

A TPU core runs VLIW bundles: a bundle is one instruction word, and takes one cycle unless it
stalls. A schedule says how many bundles each block of code has, how busy the matrix units are in
it, and how many registers it spills. It is static: waits for memory are not in it, and nothing is
measured.

    with dump_schedules() as directory:
        import jax
        ...
        jax.jit(function).lower(*arguments).compile()
        for block in code_blocks(directory, "select"):
            print(block.depth, block.bundles)

Enter before importing JAX: libtpu reads its flags once.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s*(?P<mark>[A-Z]{2})?:\s*(?P<depth>>*)\s*\{")
LOOP_BODY = "LB"  # the mark of the first bundle of a loop's body


class CodeBlock(NamedTuple):
    """A straight run of VLIW bundles between two jump targets."""

    depth: int  # loops around it; 1 is the kernel's grid
    loop: bool  # whether a loop's body begins with it
    bundles: int
    mxu: float  # share of the matrix units' slots that are used
    spills: int  # register spill stores and fill loads


@contextmanager
def dump_schedules() -> Iterator[Path]:
    """Makes the compiler write its schedules into a directory, which is deleted at the end.

    It overwrites LIBTPU_INIT_ARGS and leaves it set.
    """
    with tempfile.TemporaryDirectory() as directory:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        yield Path(directory)


def code_blocks(directory: Path, name: str, *, jumps: bool = False) -> list[CodeBlock]:
    """Returns the code blocks of a kernel, in the order of its code.

    Args:
      directory: the directory that `dump_schedules` gave.
      name: the name of the kernel.
      jumps: whether a block also ends at every jump. Otherwise it ends only where the compiler
        marks a bundle, such as the first of a loop's body.

    Raises FileNotFoundError if there is no compiled kernel of this name.
    """
    usage, capacity = _usage(directory, name)
    bundles, after_jumps = [], set()  # matches of BUNDLE, and indices into them
    for line in _text(directory, name, "final_bundles.txt"):
        bundles += filter(None, [BUNDLE.match(line)])
        if jumps and "sbr.rel" in line:
            after_jumps.add(len(bundles))
    starts = [
        index
        for index, match in enumerate(bundles)
        if index == 0 or match["mark"] is not None or index in after_jumps
    ]
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(bundles)], strict=True):
        used = usage[start:end]
        blocks.append(
            CodeBlock(
                depth=len(bundles[start]["depth"]),
                loop=bundles[start]["mark"] == LOOP_BODY,
                bundles=len(used),
                mxu=sum(units["MXU"] for units in used) / (capacity["MXU"] * len(used)),
                spills=sum(units["VLOAD:FILL"] + units["VSTORE:SPILL"] for units in used),
            )
        )
    return blocks


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
