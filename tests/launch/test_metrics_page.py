"""docs/metrics.md: its conditions, and its names. Tests of runs check what they have written."""

import re

from tests.launch.documented_metrics import CONDITIONS, table


def test_the_conditions_of_the_page_are_those_that_runs_are_checked_by():
    assert {each for when in table().values() for each in re.split(" or | and ", when)} == (
        CONDITIONS | {""}
    )


def test_no_metric_is_a_directory_of_another():
    """Stores that keep a file for each metric could not write both."""
    names = set(table())
    for name in names:
        parents = [name[: match.start()] for match in re.finditer("/", name)]
        assert not names.intersection(parents), name
