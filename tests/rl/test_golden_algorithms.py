"""The table against what public implementations computed (tests/golden/algorithms).

Every recorded result that the table can express, with its gradient.
"""

import collections
import re
from pathlib import Path

import pytest

from rl.algorithms.table import ROWS
from tests.rl import golden_more as more
from tests.rl import golden_others as others
from tests.rl.golden_compare import compared
from tests.rl.golden_specs import Case, Ours, cases
from tests.rl.golden_trl import trl
from tests.rl.golden_values import found
from tests.rl.golden_verl import verl

LIBRARIES = {
    "verl": verl,
    "trl": trl,
    "openrlhf": others.openrlhf,
    "slime": others.slime,
    "areal": others.areal,
    "prime_rl": others.prime_rl,
    "skyrl": more.skyrl,
    "nemo_rl": more.nemo_rl,
    "gmpo": more.gmpo,
    "gtpo": more.gtpo,
    "r1_zero": more.r1_zero,
}
# Of each library how many cases are expressed, and how many are not.
COUNTS = {
    "verl": (566, 43),
    "trl": (322, 48),
    "openrlhf": (59, 8),
    "slime": (72, 6),
    "areal": (49, 3),
    "prime_rl": (17, 2),
    "skyrl": (39, 2),
    "nemo_rl": (38, 1),
    "gmpo": (6, 4),
    "gtpo": (6, 0),
    "r1_zero": (14, 0),
}
# The share of recorded losses that must be expressed.
LOSSES = {"verl": 0.97, "trl": 0.97}


def of_kinds(library: str) -> dict[str, list[tuple[Case, Ours]]]:
    """The cases of a library that the table expresses, by their kind."""
    found = collections.defaultdict(list)
    for case in cases()[library]:
        ours = LIBRARIES[library](case)
        if isinstance(ours, Ours):
            found[case["kind"]].append((case, ours))
    return dict(found)


PARTS = 8  # of the losses, so that processes may share them
TOLD = [
    pytest.param(library, kind, part, id=f"{library}-{kind}-{part}")
    for library in LIBRARIES
    for kind in of_kinds(library)
    for part in range(PARTS if kind == "loss" and library in LOSSES else 1)
]


@pytest.mark.golden
@pytest.mark.parametrize("library, kind, part", TOLD)
def test_equal_to_what_a_library_computed(library, kind, part):
    known = of_kinds(library)[kind]
    if kind == "loss" and library in LOSSES:
        known = known[part::PARTS]
    beyond = {}
    for case, ours in known:
        _, named = compared(case, ours, found(case, ours))
        if named:
            beyond[case["id"]] = ours.spec, named
    assert not beyond


def test_no_case_is_dropped():
    """What is expressed, and what is not and why, of each library."""
    expressed = {
        library: sum(isinstance(ours(case), Ours) for case in cases()[library])
        for library, ours in LIBRARIES.items()
    }
    counts = {name: (n, len(cases()[name]) - n) for name, n in expressed.items()}
    assert counts == COUNTS
    for library, share in LOSSES.items():
        losses = [case for case in cases()[library] if case["kind"] == "loss"]
        known = sum(isinstance(LIBRARIES[library](case), Ours) for case in losses)
        assert known >= share * len(losses)


def test_the_page_has_every_row_and_count():
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert set(ROWS) <= named
    counted = {"verl": "verl", "trl": "TRL", "openrlhf": "OpenRLHF", "slime": "slime"}
    counted |= {"areal": "AReaL", "prime_rl": "prime-rl", "skyrl": "SkyRL", "nemo_rl": "NeMo RL"}
    for library, name in counted.items():
        assert f"| {name} | {COUNTS[library][0]} | {COUNTS[library][1]} |" in page
