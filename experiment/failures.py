"""What goes wrong in a command's surroundings, in one line: disks, devices, memory, processes."""

import errno
import os
import re
import traceback

from errors import shortened

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAY_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_NAME = (errno.ENAMETOOLONG,)
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def line_of(error: BaseException) -> str | None:
    """Returns the line for an error of the surroundings, or None where it is a bug of ours.

    Libraries wrap what they were told by the system in errors of their own, so that the chain of
    causes is searched, and words too.
    """
    found: BaseException | None = error
    while found is not None:
        for line in (_disk(found), _memory(found), _backend(found)):
            if line:
                return line
        found = found.__cause__ or found.__context__
    return None


def is_lost_process(error: BaseException) -> bool:
    """Returns whether these are the words of an operation of which another process is gone."""
    words = ("Gloo", "NCCL", "closed by peer", "heartbeat", "coordination service")
    return any(word in str(error) for word in words)


def _disk(error: BaseException) -> str | None:
    """Tensorstore, beneath Orbax, reports a full disk as a ValueError."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"{error.filename or 'writing'}: {error.strerror}; free some space and give the same "
            "command again"
        )
    if isinstance(error, OSError) and error.errno in (*MAY_NOT_WRITE, *NO_NAME) and error.filename:
        return f"{shortened(str(error.filename))}: {error.strerror}"
    for number in DISK_FULL:
        if os.strerror(number) in str(error):
            return f"{os.strerror(number)}; free some space and give the same command again"
    return None


def _memory(error: BaseException) -> str | None:
    words = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in words:
        return None
    much = "of a device"
    if found := re.search(r"allocat\w* (\d+) bytes", words):
        much = f"for {_size(int(found[1]))} at once"
    elif found := re.search(r"Used (\S+) of (\S+)", words):
        much = f"of a device: {found[1]} needed, {found[2]} there"
    elif found := re.search(r"Unable to allocate ([\d.]+ \w+)", words):
        much = f"of this host: for {found[1]} at once"
    return (
        f"not enough memory {much}; raise train.microbatches, set model.remat = 'full', or lower "
        "data.seq_len or data.batch_size (sampling: its max_new_tokens, or the number of samples)"
    )


def _backend(error: BaseException) -> str | None:
    asked = os.environ.get("JAX_PLATFORMS", "")
    if isinstance(error, AssertionError) and error.__traceback__ and asked:
        frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
        if frame.f_code.co_filename.endswith("xla_bridge.py"):  # it has no name for "cuda"
            return f"JAX_PLATFORMS={asked}: no such device here; unset it to take what there is"
    found = re.search(r"Unable to initialize backend '(\w+)': *(.*)", str(error), re.DOTALL)
    if not found:
        return None
    why = " ".join(found[2].split())[:200]
    return (
        f"JAX_PLATFORMS={asked}: no device of kind {found[1]} here ({why}); unset it to take what "
        "there is"
    )


def _size(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.4g} {UNITS[unit]}"
