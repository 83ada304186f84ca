"""The one exception that speaks to the person at the keyboard, and the checks that raise it."""

from collections.abc import Collection
from typing import Any

# Characters of a value, and of a whole message, that a person is shown. A path of the longest name
# and an explanation fit in a message.
VALUE_CHARACTERS = 120
MESSAGE_CHARACTERS = 1_000


class UserError(Exception):
    """A mistake of the person at the keyboard: one line that says what, where and what to do.

    The commands print it and exit with code 2. Every other exception is a bug of ours and keeps
    its traceback. A message that a value makes too long loses its middle: it begins with where and
    ends with what to do. Lines of a library's message are joined, and what UTF-8 cannot write,
    such as a byte of a file's name, is escaped.
    """

    def __init__(self, message: str):
        written = message.encode("utf-8", "backslashreplace").decode("utf-8")
        line = " ".join(part.strip() for part in written.splitlines())
        super().__init__(shortened(line.strip(), MESSAGE_CHARACTERS))


def shortened(text: str, limit: int = VALUE_CHARACTERS) -> str:
    """Returns `text`, with as much of its middle left out as exceeds `limit` characters."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    head = limit - tail
    left_out = f" ...{len(text) - limit:,} characters... "
    return text[:head] + left_out + text[len(text) - tail :]


class FieldChecks:
    """Checks the fields of one section of a config, and names field, value and rule in its error.

    check = FieldChecks(self, "model.moe")
    check.positive("num_experts", "intermediate_size")
    check.that(self.topk_group <= self.n_group, "topk_group", "must be at most n_group")
    """

    def __init__(self, section: Any, path: str):
        """`path` is the dotted name of the section, as a person writes it."""
        self._section, self._path = section, path

    def that(self, holds: bool, name: str, rule: str) -> None:
        """Raises UserError unless `holds`."""
        if not holds:
            value = shortened(repr(getattr(self._section, name)))
            raise UserError(f"{self._path}.{name} = {value}: {rule}")

    def positive(self, *names: str) -> None:
        """Raises UserError unless each of these fields is above 0."""
        for name in names:
            self.that(getattr(self._section, name) > 0, name, "must be positive")

    def at_most(self, limit: int, *names: str) -> None:
        """Raises UserError unless each of these fields is at most `limit`."""
        for name in names:
            self.that(getattr(self._section, name) <= limit, name, f"must be at most {limit:,}")

    def not_negative(self, *names: str) -> None:
        """Raises UserError unless each of these fields is at least 0."""
        for name in names:
            self.that(getattr(self._section, name) >= 0, name, "must not be negative")

    def one_of(self, name: str, allowed: Collection[str]) -> None:
        """Raises UserError unless the field has one of the allowed values."""
        rule = f"must be one of {', '.join(allowed)}"
        self.that(getattr(self._section, name) in allowed, name, rule)
