"""The one exception that speaks to the person at the keyboard, and the checks that raise it."""

from collections.abc import Collection
from typing import Any


class UserError(Exception):
    """A mistake of the person at the keyboard: one line that says what, where and what to do.

    The commands print it and exit with code 2. Every other exception is a bug of ours and keeps
    its traceback.
    """


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
            raise UserError(f"{self._path}.{name} = {getattr(self._section, name)!r}: {rule}")

    def positive(self, *names: str) -> None:
        """Raises UserError unless each of these fields is above 0."""
        for name in names:
            self.that(getattr(self._section, name) > 0, name, "must be positive")

    def not_negative(self, *names: str) -> None:
        """Raises UserError unless each of these fields is at least 0."""
        for name in names:
            self.that(getattr(self._section, name) >= 0, name, "must not be negative")

    def one_of(self, name: str, allowed: Collection[str]) -> None:
        """Raises UserError unless the field has one of the allowed values."""
        rule = f"must be one of {', '.join(allowed)}"
        self.that(getattr(self._section, name) in allowed, name, rule)
