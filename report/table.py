"""The numbers of a run as a person reads them, in tables of a page and on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from report.escape import plain
from report.lenient import mapping, number
from report.results import HELD_OUT, TRAINING, Summary

Row = tuple[str, str]  # name, value

# What the suffix saves of a source's held-out middles -> over which baseline.
SAVINGS = {
    "suffix_saves_over_without_suffix": "of left to right",
    "suffix_saves_over_empty_suffix": "of the same format, withheld",
}


def print_table(summary: Summary, console: Console | None = None) -> None:
    """Prints the numbers of summary.json on the terminal; nothing if there are none."""
    groups = number_groups(summary)
    if not groups:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for index, (title, rows) in enumerate(groups):
        if index:
            table.add_row()
        table.add_row(f"[bold]{title}")
        for name, value in rows:
            table.add_row(f"  {escape(plain(name))}", escape(plain(value)))
    (console or Console()).print(table)


def number_groups(summary: Summary) -> list[tuple[str, list[Row]]]:
    """Returns the numbers as a person reads them, [(title, rows)], without the missing ones."""
    groups = {
        "Pretraining": _pretraining(mapping(summary.get("pretrain"))),
        "Sparse attention": _sparse_attention(mapping(summary.get("indexer"))),
        "Reinforcement learning": _reinforcement(mapping(summary.get("reinforce")), HELD_OUT),
        "Problems that it trains on": _reinforcement(
            mapping(summary.get("training_problems")), TRAINING
        ),
        "Run": _run(summary),
    }
    shown = [(title, [row for row in rows if row]) for title, rows in groups.items()]
    return [(title, rows) for title, rows in shown if rows]


def _pretraining(numbers: Mapping[str, Any]) -> list[Row | None]:
    """Returns the rows of pretraining: losses, tokens, speed and what the suffix saves."""
    savings = [
        _row(
            f"suffix saves, {source.partition('?')[0]}",
            "{:.3f} of left to right, {:.3f} of withheld",
            {name: mapping(mapping(losses).get(name)).get("mean") for name in SAVINGS},
            *SAVINGS,
        )
        for source, losses in mapping(numbers.get("infilling")).items()
    ]
    return [
        _row(
            "loss, first → last",
            "{:.2f} → {:.2f} nats/token",
            numbers,
            "loss_first",
            "loss_last",
        ),
        _row("validation loss", "{:.2f} nats/token", numbers, "validation_lm"),
        _row("tokens", "{:,}", numbers, "tokens"),
        _row("speed", "{:,.0f} tokens/s", numbers, "tokens_per_s"),
        _row(
            "loss of a held-out middle",
            "{:.3f} with the suffix, {:.3f} without",
            numbers,
            "middle_loss_with_suffix",
            "middle_loss_without_suffix",
        ),
        *savings,
    ]


def _sparse_attention(numbers: Mapping[str, Any]) -> list[Row | None]:
    recall = ("recall", "recall_random")
    return [
        _row("attention mass kept", "{:.0%} (at random {:.0%})", numbers, *recall),
        _row("keys per query", "{} of {}", numbers, "topk", "context"),
    ]


def _reinforcement(numbers: Mapping[str, Any], which: str) -> list[Row | None]:
    """Returns the rows of reinforcement learning: pass@1 and pass@8 before and after.

    Args:
      which: problems they are of, in words.
    """

    def before_and_after(metric: str) -> Row | None:
        keys = (f"{metric}_before", f"{metric}_after")
        return _row(f"{metric}, before → after", "{:.1%} → {:.1%}", numbers, *keys)

    measured = f"{{}} {which} × {{}} samples"
    algorithm = numbers.get("algorithm")
    return [
        ("algorithm", algorithm) if isinstance(algorithm, str) else None,
        before_and_after("pass@1"),
        before_and_after("pass@8"),
        _row("majority of all samples right", "{:.1%}", numbers, "cons@n"),
        _row("mean reward over all samples", "{:.3f}", numbers, "mean@n"),
        _row("reward, first → last", "{:.2f} → {:.2f}", numbers, "reward_first", "reward_last"),
        _row("measured on", measured, numbers, "problems", "samples"),
    ]


def _run(summary: Summary) -> list[Row | None]:
    seconds = number(summary.get("seconds"))
    time = None if seconds is None else ("time", clock(seconds))
    lists = {name: as_line(summary.get(name)) for name in ("devices", "versions")}
    return [time, *((name, line) for name, line in lists.items() if line)]


def _row(name: str, form: str, numbers: Mapping[str, Any], *keys: str) -> Row | None:
    """Returns a row of numbers, None unless all are there."""
    values = [numbers.get(key) for key in keys]
    if any(number(value) is None for value in values):
        return None
    return name, form.format(*values)


def clock(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds, such as "0:12:48"."""
    whole = round(seconds)
    return f"{whole // 3600:,}:{whole // 60 % 60:02}:{whole % 60:02}"


def as_line(value: Any) -> str:
    """Returns a value, a list or a mapping of versions on one line; "" for None."""
    if isinstance(value, Mapping):
        value = [f"{name} {version}" for name, version in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
