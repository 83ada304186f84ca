"""The charts of a report, each made from what a run left behind; one whose data are missing is a
line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from report import figures
from report.figures import BLUE, GREEN, MUTED, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[
    str, list[dict[str, Any]]
]  # stage -> the lines of its metrics.jsonl, stages in the order they ran
Summary = Mapping[str, Any]


SAVINGS = {
    "suffix_saves_over_without_suffix": "of left to right",
    "suffix_saves_over_empty_suffix": "of the same format, withheld",
}
WIDE, NARROW = (4.6, 2.6), (3.1, 2.1)  # inches: text comes out alike in both, two or three in a row


class Panel(NamedTuple):
    title: str
    svg: str  # "" where data are missing
    caption: str  # one line: how to read it, or what is missing


class Section(NamedTuple):
    title: str
    columns: int  # panels side by side on a wide screen
    panels: list[Panel]


def sections(runs: Runs, summary: Summary) -> list[Section]:
    reinforce = {
        stage: lines for stage, lines in runs.items() if any("reward" in line for line in lines)
    }
    language = {stage: lines for stage, lines in runs.items() if stage not in reinforce}
    tuned = {stage: language.pop(stage) for stage in list(language) if stage == "finetune"}
    return [
        Section("Pretraining", 2, [loss(language, "Loss"), infilling(summary)]),
        Section(
            "Sparse attention",
            2,
            [
                curves(_having(language, "indexer_kl"), chart)
                for chart in (INDEXER_KL, INDEXER_RECALL)
            ],
        ),
        Section("Experts", 2, [expert_load(language), expert_load_max(language)]),
        Section("After pretraining", 2, [loss(tuned, "Fine-tuning loss"), pass_at_k(summary)]),
        Section("Reinforcement learning", 3, [curves(reinforce, chart) for chart in REINFORCE]),
    ]


class Curve(NamedTuple):
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
        "Difference of their log-probabilities of a sampled token; what is above rounding biases the ratio",
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


def curves(runs: Runs, chart: Chart) -> Panel:
    drawn = [(curve, *joined(runs, curve.metric)) for curve in chart.curves]
    if not len(drawn[0][1]):
        return Panel(chart.title, "", f"no {chart.curves[0].metric} in metrics.jsonl")
    drawn = [(curve, x, y) for curve, x, y in drawn if len(x)]

    def draw(axes: Axes) -> None:
        for curve, x, y in drawn:
            figures.line(
                axes, x, y, curve.color, curve.label if len(drawn) > 1 else None, starts(runs)
            )
        figures.stage_marks(axes, marks(runs, drawn[0][0].metric))
        axes.set(xlabel="step", ylabel=chart.unit)
        if chart.log and min(y.min() for _, _, y in drawn) > 0:
            axes.set_yscale("log")
            axes.minorticks_off()
        elif chart.log or min(y.min() for _, _, y in drawn) >= 0:
            axes.set_ylim(bottom=0)

    return _panel(chart.title, draw, *(WIDE if chart.wide else NARROW), chart.caption)


def loss(runs: Runs, title: str) -> Panel:
    x, train = joined(runs, "lm")
    if not len(x):
        return Panel(title, "", "no lm in metrics.jsonl: this stage did not run here")
    held_out_x, held_out = joined(runs, "validation_lm")

    def draw(axes: Axes) -> None:
        figures.line(axes, x, train, BLUE, "training", starts(runs))
        if len(held_out_x):
            axes.plot(
                held_out_x, held_out, color=ORANGE, label="validation", marker="o", markersize=2.5
            )
        figures.stage_marks(axes, marks(runs, "lm"))
        axes.set(xlabel="step", ylabel="nats per token")

    last = (
        f"validation ends at {held_out[-1]:.2f}"
        if len(held_out_x)
        else f"training ends at {train[-1]:.2f}"
    )
    return _panel(
        title,
        draw,
        *WIDE,
        f"Next-token loss; {last} nats per token, the first step had {train[0]:.2f}",
    )


def infilling(summary: Summary) -> Panel:
    numbers = summary.get("pretrain") or {}
    found = numbers.get("infilling") or {}
    rows = [
        (f"{source.partition('?')[0]}, {over}", losses[name])
        for source, losses in found.items()
        for name, over in SAVINGS.items()
    ]
    if not rows:
        return Panel("Infilling", "", "no infilling in summary.json")

    def draw(axes: Axes) -> None:
        for place, (_, saved) in enumerate(rows):
            axes.plot(
                (saved["low"], saved["high"]), (place, place), color=BLUE, linewidth=3, alpha=0.4
            )
            axes.plot(saved["mean"], place, marker="o", color=BLUE)
            axes.annotate(
                f"{saved['mean']:.3f}",
                (saved["mean"], place),
                (0, 7),
                textcoords="offset points",
                ha="center",
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(rows)), [over for over, _ in rows])
        axes.set(xlabel="nats per token that the suffix saves", ylim=(-0.6, len(rows) - 0.3))
        axes.invert_yaxis()

    return _panel(
        "Infilling",
        draw,
        *WIDE,
        "Held-out middles, with 95 % intervals. The suffix of a source is read only if both of its rows lie right of 0",
    )


def expert_load(runs: Runs) -> Panel:
    title = "Load of the experts"
    loads = [
        (stage, np.array(line["expert_load"], float))
        for stage, lines in runs.items()
        for line in lines
        if "expert_load" in line
    ]
    if not loads or loads[-1][1].ndim != 2:
        return Panel(title, "", "no expert_load in metrics.jsonl")
    stage, load = loads[-1]
    load = load / load.mean(axis=1, keepdims=True)
    return _panel(
        title,
        lambda axes: figures.heat_map(axes, load),
        *WIDE,
        f"Tokens an expert gets over an even share, at the end of {stage}; 1.0 is even",
    )


def expert_load_max(runs: Runs) -> Panel:
    title = "Busiest expert"
    x, load = joined(runs, "expert_load_max")
    if not len(x):
        return Panel(title, "", "no expert_load_max in metrics.jsonl")

    def draw(axes: Axes) -> None:
        figures.line(axes, x, load, PURPLE, starts=starts(runs))
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        figures.stage_marks(axes, marks(runs, "expert_load_max"))
        axes.set(xlabel="step", ylabel="load over even share", ylim=(min(0.9, load.min()), None))

    return _panel(
        title,
        draw,
        *WIDE,
        f"Over experts and layers, the largest load; {load[0]:.1f} at first, {load[-1]:.2f} at the end, 1 is even",
    )


def pass_at_k(summary: Summary) -> Panel:
    numbers = summary.get("reinforce") or {}
    lines = [
        (numbers.get(f"pass_at_k_{when}") or [], when, color)
        for when, color in (("before", MUTED), ("after", BLUE))
    ]
    if not any(points for points, _, _ in lines):
        return Panel(
            "pass@k", "", "no reinforce.pass_at_k_before and pass_at_k_after in summary.json"
        )

    def draw(axes: Axes) -> None:
        for points, when, color in lines:
            if points:
                k, mean, low, high = (
                    np.array([point[name] for point in points], float)
                    for name in ("k", "mean", "low", "high")
                )
                axes.fill_between(k, low, high, color=color, alpha=0.16, linewidth=0)
                axes.plot(k, mean, color=color, marker="o", markersize=3, label=when)
        ks = sorted({point["k"] for points, _, _ in lines for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set(xlabel="k", ylabel="share of problems solved")
        axes.set_ylim(
            0, max(0.1, 1.05 * max(point["high"] for points, _, _ in lines for point in points))
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    caption = "Chance that one of k completions solves a held-out problem, before and after reinforcement; bands: 95 % bootstrap over problems"
    return _panel("pass@k", draw, *WIDE, caption)


def joined(runs: Runs, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a metric, the stages end to end."""
    points = [
        (start + line["step"], line[metric])
        for start, lines in zip(starts(runs), runs.values(), strict=True)
        for line in lines
        if isinstance(line.get(metric), int | float) and np.isfinite(line[metric])
    ]
    x, y = np.array(points, float).reshape(-1, 2).T
    return x, y


def starts(runs: Runs) -> list[float]:
    """Where each stage begins, when they are put end to end."""
    lengths = [max(line["step"] for line in lines) for lines in runs.values()]
    return [float(start) for start in np.cumsum([0, *lengths])[:-1]]


def marks(runs: Runs, metric: str) -> list[tuple[float, str]]:
    """Where the stages that have a metric begin, and their names."""
    having = _having(runs, metric)
    return [
        (start, stage) for start, stage in zip(starts(runs), runs, strict=True) if stage in having
    ]


def _having(runs: Runs, metric: str) -> Runs:
    return {stage: lines for stage, lines in runs.items() if any(metric in line for line in lines)}


def _panel(
    title: str, draw: Callable[[Axes], None], width: float, height: float, caption: str
) -> Panel:
    return Panel(title, figures.svg(draw, width, height, f"{title}. {caption}"), caption)
