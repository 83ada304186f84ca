"""Files made from other files, once for each state of these, for random access in little memory.

What a source reads may have no random access (compressed JSON lines, Parquet), or may need an index
that takes long to make. Both are kept in a directory: the one that ATHANOR_CACHE names; else
~/.cache/athanor (XDG_CACHE_HOME); else, where that may not be written to, one in the system's
directory of temporary files. It may be deleted at any time.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from errors import UserError
from files import replacing


def cached(source: Path, form: str, make: Callable[[Path], None]) -> Path:
    """Returns the file or directory that `make` makes of `source`, making it unless it is there.

    It is made again when the size or the time of `source` has changed, and takes the place of the
    one before. Several processes may make one at once.

    Args:
      source: the file that it is made of.
      form: what is made of it, and the version of its format.
      make: writes it to the path that it is given.

    Raises:
      UserError: the disk is full, or the like, or `make` raises it.
    """
    status = source.stat()
    place = os.fsencode(source.absolute()) + b"\0" + form.encode()
    name = hashlib.blake2b(place, digest_size=12).hexdigest()
    path = directory() / f"{name}.{status.st_size}.{status.st_mtime_ns}"
    if not path.exists():
        with replacing(path) as temporary:
            make(temporary)
        for earlier in path.parent.glob(f"{name}.*"):
            if earlier.is_dir() and earlier != path:
                shutil.rmtree(earlier, ignore_errors=True)
            elif earlier != path:
                earlier.unlink(missing_ok=True)
    return path


def directory() -> Path:
    """Returns the directory of the cache, which exists.

    Raises UserError if ATHANOR_CACHE names one that may not be written to.
    """
    wanted = os.environ.get("ATHANOR_CACHE", "")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [Path(wanted)] if wanted else [Path(base, "athanor"), _temporary()]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK | os.X_OK):
            return place
    raise UserError(f"ATHANOR_CACHE = {wanted or places[-1]}: cannot be written to; name another")


def _temporary() -> Path:
    return Path(tempfile.gettempdir(), f"athanor-{os.getuid()}")
