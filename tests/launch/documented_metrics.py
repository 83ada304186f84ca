"""The table of docs/metrics.md, and whether a run has written what it says."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
PLACEHOLDERS = {"NAME": r"[^/]+", "LAYER": r"\d+", "N": r"\d+", "K": r"\d+"}
# What every run of the tests' tiny model in stage "dense" has beside the rows without a condition.
TINY = frozenset({"experts", "experts compared", "canary"})
JUDGED = "evaluate.reward among the rewards"
CONDITIONS = TINY | {
    *("drafts", "zero_variance", "parts", "order", "kl in the loss", "entropy", "reference"),
    *("sparse", "lag", "keys compared", "critic", "greedy", "scored", "evaluation"),
    *("split", "thinking", JUDGED),
}


def rows(text: str) -> list[list[str]]:
    """Returns the cells of the rows about a metric, the first its name alone."""
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert all(len(row) == 6 for row in cells)
    names = [row[0].strip("`") for row in cells]
    assert len(set(names)) == len(names)
    return [[name, *row[1:]] for name, row in zip(names, cells, strict=True)]


def table() -> dict[str, str]:
    """Returns each metric of reinforcement -> when it is written."""
    return {row[0]: row[5] for row in rows(PAGE.read_text().partition("## Pretraining")[0])}


def pair_metrics(*conditions: str) -> set[str]:
    """Returns the metrics of a run on pairs that has held-out ones, by the page.

    Args:
      conditions: of its last column that hold, beside those of the tests' tiny model.
    """
    found = set()
    text = PAGE.read_text().partition("## Pairs")[2].partition("\n## ")[0]
    for name, _, _, _, held_out, when in rows(text):
        if holds(when, TINY.union(conditions)):
            found |= {name, f"validation_{name}"} if held_out == "yes" else {name}
    return found


def holds(when: str, conditions: frozenset[str]) -> bool:
    """Returns whether "a or b", "a and b" or "a" does."""
    if " and " in when:
        return all(each in conditions for each in when.split(" and "))
    return not when or any(each in conditions for each in when.split(" or "))


def written_by(workdir: str | Path) -> set[str]:
    lines = Path(workdir, "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)} - {"step", "stage", "time"}


def check_documented(workdir: str | Path, *more: str, without: tuple[str, ...] = ()) -> None:
    """A run has written the metrics of the table, and no others.

    Args:
      more, without: conditions of the table, beside those of TINY.
    """
    conditions = TINY.union(more).difference(without)
    patterns = {
        name: re.sub("|".join(PLACEHOLDERS), lambda match: PLACEHOLDERS[match[0]], name)
        for name, when in table().items()
        if holds(when, conditions)
    }
    written = written_by(workdir)
    fitting = {
        name: {each for each in written if re.fullmatch(pattern, each)}
        for name, pattern in patterns.items()
    }
    assert not written - set().union(*fitting.values()), "not in docs/metrics.md"
    assert not [name for name, found in fitting.items() if not found], "not written"
