"""One set of programs for all engines of a configuration, whose host parts alone differ."""

import functools

import pytest

from rl.programs import Programs

programs_of = functools.cache(Programs)


@pytest.fixture(autouse=True, scope="session")
def shared_programs():
    """Engines that differ in nothing that is compiled share their programs.

    Tracing and compiling them takes seconds, and tests make an engine for each number of steps, for
    each run of a command, and for each of its evaluations.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.engine.Programs", programs_of)
        yield
