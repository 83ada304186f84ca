"""Failures of the disk become one line of error, whichever library reports them."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from errors import UserError


@contextmanager
def disk_errors(describe: Callable[[str], str]) -> Iterator[None]:
    """Turns a failure of the disk in its body into a UserError.

    Args:
      describe: returns the line, given the words of the operating system. It may clean up.
    """
    try:
        yield
    except (OSError, ValueError) as failure:
        reason = reason_of(failure)
        if reason is None:
            raise
        raise UserError(describe(reason)) from failure


def reason_of(failure: Exception) -> str | None:
    """Returns the words of the operating system for an error of the disk, or None for other errors.

    Python reports such an error as an OSError, tensorstore as a ValueError.
    """
    if isinstance(failure, OSError):
        return failure.strerror or str(failure)
    code = re.search(r"os_error_code='(\d+)'", str(failure))
    return os.strerror(int(code.group(1))) if code else None
