"""What the tests here share."""

from tests.programs import runs_share_programs, shared_programs  # noqa: F401
