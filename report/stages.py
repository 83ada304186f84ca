"""What each phase of a run did, how long it took, and what came of it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from report.lenient import mapping, number
from report.results import Origin, Run

# What a model learns in a phase, as "it learned ..." goes on, and the same in a table.
LEARNS = {
    "pretrain": "to predict text",
    "warmup": "to guess which parts of a text matter",
    "sparse": "to read only the parts that matter",
    "finetune": "to answer as in examples",
    "reinforce": "to solve problems by trial and reward",
}


class Stage(NamedTuple):
    """A phase of a run; what is not known is None or ""."""

    name: str
    learns: str
    steps: int
    of_steps: int  # that its config asks for, 0 where that is not known
    tokens: float | None
    seconds: float | None
    tokens_per_s: float | None
    memory_gib: float | None
    first: str  # loss or reward at first and at last
    last: str
    validation: str  # loss of text, or share of problems solved, at the end


def stages_of(run: Run) -> list[Stage]:
    """Returns the phases of a run in the order in which they ran."""
    return [
        _stage(phase, lines, run.origins.get(phase, Origin()), mapping(run.summary.get(phase)))
        for phase, lines in run.phases.items()
    ]


def _stage(
    phase: str,
    lines: Sequence[Mapping[str, Any]],
    origin: Origin,
    summary: Mapping[str, Any],
) -> Stage:
    kind = phase
    if phase == "pretrain" and origin.stage in ("warmup", "sparse"):
        kind = origin.stage
    loss = _values(lines, "lm") or _values(lines, "loss")
    reward = _values(lines, "reward")
    first = last = validation = ""
    if reward:
        tenth = max(len(reward) // 10, 1)
        first, last = (
            f"reward {sum(some) / tenth:.2f}" for some in (reward[:tenth], reward[-tenth:])
        )
    elif loss:
        first, last = f"{loss[0]:.2f}", f"{loss[-1]:.2f}"
    if held_out := _values(lines, "validation_lm"):
        validation = f"{held_out[-1]:.2f}"
    elif told_apart := _values(lines, "validation_rewards/accuracies"):
        validation = f"{told_apart[-1]:.0%} of pairs"
    elif solved := _values(lines, "validation_pass_at_1"):
        validation = f"{solved[-1]:.0%} solved"
    speeds = [speed for speed in _values(lines, "tokens_per_s") if speed > 0]
    return Stage(
        phase,
        LEARNS.get(kind, ""),
        int(max(line["step"] for line in lines)),
        origin.steps,
        number(summary.get("tokens")),
        _seconds(lines, origin),
        median(speeds) if speeds else None,
        number(summary.get("memory_gib")),
        first,
        last,
        validation,
    )


def _seconds(lines: Sequence[Mapping[str, Any]], origin: Origin) -> float | None:
    """Returns how long a phase ran: from each start to the last line before the next.

    Without a record of its starts it is from the first line to the last.
    """
    times = sorted(_values(lines, "time"))
    began = sorted(
        time for start in origin.starts if (time := number(start.get("time"))) is not None
    )
    if not times:
        return None
    if not began or began[0] > times[0]:
        return times[-1] - times[0] if len(times) > 1 else None
    total = 0.0
    for start, end in pairwise([*began, float("inf")]):
        total += max((time - start for time in times if start <= time < end), default=0.0)
    return total


def _values(lines: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [value for line in lines if (value := number(line.get(metric))) is not None]
