"""Charts of metrics over steps, the phases of a run end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from report import figures
from report.figures import BLUE, GREEN, MUTED, ORANGE
from report.results import PhaseMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = (4.6, 2.6), (3.1, 2.1)  # inches: text comes out alike in both, two or three in a row


class Panel(NamedTuple):
    """A chart of the page, or what is missing for it."""

    title: str
    svg: str  # "" where data are missing
    caption: str  # one line: how to read it, or what is missing


class Curve(NamedTuple):
    """One metric of a chart."""

    metric: str
    label: str
    color: str


class Chart(NamedTuple):
    """Curves over steps. The first is what it is about: without it the panel is left out."""

    title: str
    caption: str
    curves: tuple[Curve, ...]
    unit: str = ""
    log: bool = False
    wide: bool = False  # for two in a row of the page; else for three


INDEXER_KL = Chart(
    "Indexer divergence",
    "KL from the attention the model pays to the indexer's scores; 0 is a perfect guess",
    (Curve("indexer_kl", "", BLUE),),
    unit="nats",
    wide=True,
)
INDEXER_RECALL = Chart(
    "Attention kept",
    "Share of the true attention mass on the keys that are kept",
    (
        Curve("indexer_recall", "chosen by the indexer", BLUE),
        Curve("indexer_recall_random", "as many at random", MUTED),
    ),
    wide=True,
)
REINFORCE = (
    Chart(
        "Reward",
        "Mean over the completions of a step",
        (
            Curve("reward", "total", BLUE),
            Curve("answer_reward", "answer", GREEN),
            Curve("format_reward", "format", ORANGE),
        ),
    ),
    Chart(
        "Completion length",
        "Mean, in tokens",
        (Curve("completion_length", "", BLUE),),
        unit="tokens",
    ),
    Chart(
        "Entropy",
        "Of the policy at each token it wrote; near 0 it no longer explores",
        (Curve("entropy", "", BLUE),),
        unit="nats",
    ),
    Chart(
        "Sampler and trainer apart",
        "Difference of their log-probabilities of a sampled token; what is above rounding biases "
        "the ratio",
        (Curve("logprob_gap_max", "largest", ORANGE), Curve("logprob_gap_mean", "mean", BLUE)),
        unit="nats",
        log=True,
    ),
    Chart(
        "Clipped tokens",
        "Share of tokens whose ratio the surrogate clips",
        (Curve("clip_fraction", "", BLUE),),
    ),
    Chart(
        "Groups without a signal",
        "Groups whose completions all have the same reward: no advantage, no gradient",
        (Curve("zero_variance_groups", "", BLUE),),
    ),
)


def curves_panel(phases: PhaseMetrics, chart: Chart) -> Panel:
    """Draws the curves of a chart that the phases have."""
    drawn = [(curve, *points(phases, curve.metric)) for curve in chart.curves]
    if not len(drawn[0][1]):
        return Panel(chart.title, "", f"no {chart.curves[0].metric} in metrics.jsonl")
    drawn = [(curve, x, y) for curve, x, y in drawn if len(x)]
    least = min(y.min() for _, _, y in drawn)

    def draw(axes: Axes) -> None:
        """Draws the curves over the steps, with marks where phases begin."""
        for curve, x, y in drawn:
            label = curve.label if len(drawn) > 1 else None
            figures.line(axes, x, y, curve.color, label, starts(phases))
        figures.phase_marks(axes, marks(phases, drawn[0][0].metric))
        axes.set(xlabel="step", ylabel=chart.unit)
        if chart.log and least > 0:
            axes.set_yscale("log")
            axes.minorticks_off()
        elif chart.log or least >= 0:
            axes.set_ylim(bottom=0)

    return drawn_panel(chart.title, draw, WIDE if chart.wide else NARROW, chart.caption)


def drawn_panel(
    title: str, draw: Callable[[Axes], None], size: tuple[float, float], caption: str
) -> Panel:
    """Draws a panel of a size in inches (width, height)."""
    return Panel(title, figures.svg(draw, *size, f"{title}. {caption}"), caption)


def points(phases: PhaseMetrics, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the finite values of a metric, the phases end to end."""
    found = [
        (start + line["step"], line[metric])
        for start, lines in zip(starts(phases), phases.values(), strict=True)
        for line in lines
        if isinstance(line.get(metric), int | float) and np.isfinite(line[metric])
    ]
    x, y = np.array(found, float).reshape(-1, 2).T
    return x, y


def starts(phases: PhaseMetrics) -> list[float]:
    """Returns the step at which each phase begins when they are put end to end."""
    lengths = [max(line["step"] for line in lines) for lines in phases.values()]
    return [float(start) for start in np.cumsum([0, *lengths])[:-1]]


def marks(phases: PhaseMetrics, metric: str) -> list[tuple[float, str]]:
    """Returns (start, name) of each phase that has a metric."""
    having = phases_with(phases, metric)
    named = zip(starts(phases), phases, strict=True)
    return [(start, phase) for start, phase in named if phase in having]


def phases_with(phases: PhaseMetrics, metric: str) -> PhaseMetrics:
    """Returns the phases that have a metric in any line."""
    return {
        phase: lines for phase, lines in phases.items() if any(metric in line for line in lines)
    }
