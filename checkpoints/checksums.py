"""Checksums of the files of a checkpoint: written when it is saved, compared before it is read.

They speak of files and not of arrays, so that one way covers every format, and also the records
beside the arrays and the place in the data. Nothing that is damaged reaches the libraries that
parse it.
"""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoints.disk_errors import reason_of
from files import write_text

# A file of this name in a checkpoint has, by path, the CRC-32 and the size of each other file. A
# file that is not in it was written later (Orbax's commit_success.txt), and has nothing to read.
CHECKSUMS = "checksums.json"
# Orbax writes the time into it after the files are summed.
CHANGES = "_CHECKPOINT_METADATA"
# Files are read in blocks, so that memory does not grow with them, some files at a time.
BLOCK_BYTES, THREADS = 2**22, 4


def write_checksums(checkpoint: Path) -> None:
    """Writes the checksums of all files of a checkpoint. Raises UserError or OSError if it cannot.

    The files have just been written, so that reading them again rarely reaches the disk.
    """
    names = sorted(_files_of(checkpoint))
    with ThreadPoolExecutor(THREADS) as threads:
        sums = threads.map(lambda name: _sum_of(checkpoint / name), names)
        found = dict(zip(names, sums, strict=True))
    write_text(checkpoint / CHECKSUMS, json.dumps(found, indent=0) + "\n", durable=True)


def has_checksums(checkpoint: Path) -> bool:
    """Returns whether a checkpoint has checksums; those of earlier versions have none."""
    return (checkpoint / CHECKSUMS).exists()


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Returns what is wrong with a checkpoint, or None if it is whole or has no checksums.

    Args:
      checkpoint: its directory.
      share: of the `shares` that the files are divided into, the one that is compared.
    """
    if not has_checksums(checkpoint):
        return None
    try:
        written = dict(json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")))
        wanted = {str(name): (int(crc), int(size)) for name, (crc, size) in written.items()}
    except (OSError, ValueError, TypeError, ArithmeticError, RecursionError):
        return f"{CHECKSUMS} cannot be read"
    mine = sorted(wanted.items())[share::shares]
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda item: _damage_of(checkpoint / item[0], *item[1]), mine)
        return next(
            (f"{name}: {what}" for (name, _), what in zip(mine, found, strict=True) if what), None
        )


def _damage_of(file: Path, crc: int, size: int) -> str | None:
    try:
        if (there := file.stat().st_size) != size:
            return f"has {there:,} bytes in place of {size:,}"
        return None if _sum_of(file) == (crc, size) else "has other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as failure:  # a path with a NUL is a ValueError
        return f"cannot be read: {reason_of(failure) or failure}"


def _files_of(checkpoint: Path) -> Iterator[str]:
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name not in (CHECKSUMS, CHANGES):
            yield path.relative_to(checkpoint).as_posix()


def _sum_of(file: Path) -> tuple[int, int]:
    """Returns CRC-32 and size."""
    crc = size = 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return crc, size
