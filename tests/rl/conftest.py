"""What the tests here share."""

from tests.programs import shared_programs  # noqa: F401
