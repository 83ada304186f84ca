"""The sections of a report and their charts, each made from what a run left behind.

A chart whose data are missing is a line that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from report import figures
from report.curves import (
    INDEXER_KL,
    INDEXER_RECALL,
    REINFORCE,
    WIDE,
    Panel,
    curves_panel,
    drawn_panel,
    marks,
    phases_with,
    points,
    starts,
)
from report.figures import BLUE, MUTED, ORANGE, PURPLE
from report.results import PhaseMetrics, Summary
from report.table import SAVINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Section(NamedTuple):
    """A titled group of panels."""

    title: str
    columns: int  # panels side by side on a wide screen
    panels: list[Panel]


def sections(phases: PhaseMetrics, summary: Summary) -> list[Section]:
    """Returns the sections of the page, in order."""
    reinforce = phases_with(phases, "reward")
    pretrain = {name: lines for name, lines in phases.items() if name not in reinforce}
    finetune = {name: pretrain.pop(name) for name in list(pretrain) if name == "finetune"}
    indexer = phases_with(pretrain, "indexer_kl")
    indexer_charts = [curves_panel(indexer, chart) for chart in (INDEXER_KL, INDEXER_RECALL)]
    return [
        Section("Pretraining", 2, [loss(pretrain, "Loss"), infilling(summary)]),
        Section("Sparse attention", 2, indexer_charts),
        Section("Experts", 2, [expert_load(pretrain), expert_load_max(pretrain)]),
        Section("After pretraining", 2, [loss(finetune, "Fine-tuning loss"), pass_at_k(summary)]),
        Section(
            "Reinforcement learning", 3, [curves_panel(reinforce, chart) for chart in REINFORCE]
        ),
    ]


def loss(phases: PhaseMetrics, title: str) -> Panel:
    """Draws the training loss, and the validation loss where it is measured."""
    x, train = points(phases, "lm")
    if not len(x):
        return Panel(title, "", "no lm in metrics.jsonl: this phase did not run here")
    validation_x, validation = points(phases, "validation_lm")

    def draw(axes: Axes) -> None:
        figures.line(axes, x, train, BLUE, "training", starts(phases))
        if len(validation_x):
            style: dict[str, Any] = {"marker": "o", "markersize": 2.5}
            axes.plot(validation_x, validation, color=ORANGE, label="validation", **style)
        figures.phase_marks(axes, marks(phases, "lm"))
        axes.set(xlabel="step", ylabel="nats per token")

    last = (
        f"validation ends at {validation[-1]:.2f}"
        if len(validation_x)
        else f"training ends at {train[-1]:.2f}"
    )
    caption = f"Next-token loss; {last} nats per token, the first step had {train[0]:.2f}"
    return drawn_panel(title, draw, WIDE, caption)


def infilling(summary: Summary) -> Panel:
    """Draws what the suffix saves of each source's held-out middles, over each baseline."""
    sources = (summary.get("pretrain") or {}).get("infilling") or {}
    rows = [
        (f"{source.partition('?')[0]}, {baseline}", losses[name])
        for source, losses in sources.items()
        for name, baseline in SAVINGS.items()
    ]
    if not rows:
        return Panel("Infilling", "", "no infilling in summary.json")

    def draw(axes: Axes) -> None:
        """Draws a bar from low to high, and a dot for the mean, in each row."""
        for row, (_, saved) in enumerate(rows):
            interval = (saved["low"], saved["high"])
            axes.plot(interval, (row, row), color=BLUE, linewidth=3, alpha=0.4)
            axes.plot(saved["mean"], row, marker="o", color=BLUE)
            axes.annotate(
                f"{saved['mean']:.3f}",
                (saved["mean"], row),
                (0, 7),
                textcoords="offset points",
                ha="center",
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set(xlabel="nats per token that the suffix saves", ylim=(-0.6, len(rows) - 0.3))
        axes.invert_yaxis()

    caption = (
        "Held-out middles, with 95 % intervals. The suffix of a source is read only if both of its "
        "rows lie right of 0"
    )
    return drawn_panel("Infilling", draw, WIDE, caption)


def expert_load(phases: PhaseMetrics) -> Panel:
    """Draws the last load of each expert of each layer."""
    title = "Load of the experts"
    loads = [
        (phase, np.array(line["expert_load"], float))
        for phase, lines in phases.items()
        for line in lines
        if "expert_load" in line
    ]
    if not loads or loads[-1][1].ndim != 2:
        return Panel(title, "", "no expert_load in metrics.jsonl")
    phase, load_LE = loads[-1]
    load_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    caption = f"Tokens an expert gets over an even share, at the end of {phase}; 1.0 is even"
    return drawn_panel(title, lambda axes: figures.heat_map(axes, load_LE), WIDE, caption)


def expert_load_max(phases: PhaseMetrics) -> Panel:
    """Draws the largest load of any expert over the steps."""
    title = "Busiest expert"
    x, load = points(phases, "expert_load_max")
    if not len(x):
        return Panel(title, "", "no expert_load_max in metrics.jsonl")

    def draw(axes: Axes) -> None:
        figures.line(axes, x, load, PURPLE, starts=starts(phases))
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        figures.phase_marks(axes, marks(phases, "expert_load_max"))
        axes.set(xlabel="step", ylabel="load over even share", ylim=(min(0.9, load.min()), None))

    caption = (
        f"Over experts and layers, the largest load; {load[0]:.1f} at first, {load[-1]:.2f} at the "
        "end, 1 is even"
    )
    return drawn_panel(title, draw, WIDE, caption)


def pass_at_k(summary: Summary) -> Panel:
    """Draws pass@k before and after reinforcement learning."""
    numbers = summary.get("reinforce") or {}
    lines = [
        (numbers.get(f"pass_at_k_{when}") or [], when, color)
        for when, color in (("before", MUTED), ("after", BLUE))
    ]
    every = [point for line, _, _ in lines for point in line]
    if not every:
        missing = "no reinforce.pass_at_k_before and pass_at_k_after in summary.json"
        return Panel("pass@k", "", missing)

    def draw(axes: Axes) -> None:
        """Draws the means over k, each in the band of its interval."""
        for line, when, color in lines:
            if line:
                k, mean, low, high = (
                    np.array([point[name] for point in line], float)
                    for name in ("k", "mean", "low", "high")
                )
                axes.fill_between(k, low, high, color=color, alpha=0.16, linewidth=0)
                axes.plot(k, mean, color=color, marker="o", markersize=3, label=when)
        ks = sorted({point["k"] for point in every})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set(xlabel="k", ylabel="share of problems solved")
        axes.set_ylim(0, max(0.1, 1.05 * max(point["high"] for point in every)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    caption = (
        "Chance that one of k completions solves a held-out problem, before and after "
        "reinforcement; bands: 95 % bootstrap over problems"
    )
    return drawn_panel("pass@k", draw, WIDE, caption)
