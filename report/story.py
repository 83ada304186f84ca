"""What a run came to in sentences, for a reader who is new to the field."""

import math
from collections.abc import Sequence
from typing import Any

from report.lenient import mapping, number
from report.results import Run, text_phases
from report.stages import Stage, stages_of


def story(run: Run) -> list[str]:
    """Returns sentences: what was trained, how long, and what it shows; then what else it shows."""
    stages = stages_of(run)
    shows = [found for found in (_solves(run), _predicts(run), _reads(run), _fills(run)) if found]
    if not stages:
        what = "This is what a language model does on problems and text that it was not trained on"
    else:
        what = f"{_model(run)}{_learned(stages)}{_how_long(run, stages)}"
    first = f"{what}: {shows[0]}." if shows else f"{what}."
    return [first, *(f"{found[0].upper()}{found[1:]}." for found in shows[1:])]


def duration(seconds: float) -> str:
    """Returns seconds as a person says them, such as "12 min 48 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 24:
        return f"{hours // 24:,} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(value: float) -> str:
    """Returns a large number in words, such as "1.2 million"."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def recorded(run: Run, name: str) -> Any:
    """Returns what the newest start of a run records under a name, None if none does."""
    for origin in reversed(list(run.origins.values())):
        for start in reversed(origin.starts):
            if start.get(name):
                return start[name]
    return None


def _model(run: Run) -> str:
    parameters = number(recorded(run, "parameters"))
    size = f" of {count(parameters)} parameters" if parameters else ""
    first = next(iter(run.origins.values()), None)
    begins = f" that began as {_shortened(first.init_from)}" if first and first.init_from else ""
    return f"A language model{size}{begins}"


def _learned(stages: Sequence[Stage]) -> str:
    learned = list(dict.fromkeys(stage.learns for stage in stages if stage.learns))
    return f" learned {_joined(learned)}" if learned else " was trained"


def _how_long(run: Run, stages: Sequence[Stage]) -> str:
    steps = sum(stage.steps for stage in stages)
    asked = sum(stage.of_steps or stage.steps for stage in stages)
    seconds = number(run.summary.get("seconds"))
    if seconds is None:
        known = [stage.seconds for stage in stages if stage.seconds is not None]
        seconds = sum(known) if known else None
    of = f" of {asked:,}" if steps < asked else ""
    done = f"{steps:,}{of} {'step' if asked == 1 else 'steps'}"
    return f" in {done}" if seconds is None else f" in {duration(seconds)} ({done})"


def _solves(run: Run) -> str:
    """Says what rewards did: problems solved where that was measured, else the reward itself."""
    numbers = mapping(run.summary.get("reinforce"))
    before, after = number(numbers.get("pass@1_before")), number(numbers.get("pass@1_after"))
    if after is None:
        after = _pass_at_1(numbers.get("pass_at_k_after"))
    for lines in run.phases.values():
        solved = [
            value
            for line in lines
            if (value := number(line.get("validation_pass_at_1"))) is not None
        ]
        if after is None and solved:
            before, after = (solved[0] if len(solved) > 1 else None), solved[-1]
    if after is not None:
        were = f", {before:.0%} before it learned from rewards" if before is not None else ""
        return f"it solves {after:.0%} of problems that it has never seen at the first try{were}"
    for lines in run.phases.values():
        paid = [value for line in lines if (value := number(line.get("reward"))) is not None]
        if paid:
            tenth = max(len(paid) // 10, 1)
            first, last = sum(paid[:tenth]) / tenth, sum(paid[-tenth:]) / tenth
            return f"what it writes earns a reward of {last:.2f} on average, {first:.2f} at first"
    return ""


def _predicts(run: Run) -> str:
    """Says what the loss of text means: among how many tokens the model would have to guess."""
    of_text = list(text_phases(run.phases).values())
    for wanted in ("validation_lm", "lm"):
        firsts, lasts = (
            [
                value
                for lines in of_text or run.phases.values()
                for line in lines
                if (value := number(line.get(metric))) is not None
            ]
            for metric in ("lm", wanted)
        )
        if firsts and lasts:
            new = wanted != "lm"
            where = "text that it was not trained on" if new else "the text that it is trained on"
            return (
                f"at each step through {where} it is as unsure of the next token as if it chose "
                f"among {_choices(lasts[-1])} equally likely ones; at the very start, among "
                f"{_choices(firsts[0])}"
            )
    return ""


def _reads(run: Run) -> str:
    numbers = mapping(run.summary.get("indexer"))
    kept, at_random = number(numbers.get("recall")), number(numbers.get("recall_random"))
    if kept is None or at_random is None:
        return ""
    topk, context = number(numbers.get("topk")), number(numbers.get("context"))
    known = topk is not None and context is not None
    some = f"at most {topk:.0f} of {context:.0f} tokens" if known else "a part of the text"
    return (
        f"reading {some}, it keeps {kept:.0%} of what full attention would read "
        f"({at_random:.0%} if they were picked at random)"
    )


def _fills(run: Run) -> str:
    numbers = mapping(run.summary.get("pretrain"))
    shown = number(numbers.get("middle_loss_with_suffix"))
    hidden = number(numbers.get("middle_loss_without_suffix"))
    if shown is None or hidden is None:
        return ""
    saved = hidden - shown
    how = "is easier" if saved > 0 else "is no easier"
    return (
        f"a gap in unseen text {how} for it to fill when it sees what follows the gap "
        f"({saved:.3f} nats a token)"
    )


def _choices(loss: float) -> str:
    choices = math.exp(min(max(loss, 0.0), 50.0))
    return f"{choices:.1f}" if choices < 20 else count(choices)


def _pass_at_1(table: Any) -> float | None:
    """Returns the mean of the row of pass@1 in a table of pass@k; None without one."""
    rows = [mapping(row) for row in table] if isinstance(table, list) else []
    return next((number(row.get("mean")) for row in rows if row.get("k") == 1), None)


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"…{text[-58:]}"
