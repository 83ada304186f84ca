"""Charts of metrics over steps, the phases of a run end to end, of one run or of several."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from report.lenient import number
from report.results import PhaseMetrics
from report.svg import PALETTE, Look, Series, line_chart

SMOOTHED_FROM = 60  # points of a curve: above, a running mean stands before the measured values
POINTS = 300  # that are drawn of a curve
UNMEASURED = {("tokens_per_s", 0.0)}  # until the second step is done
ALL_POINTS = 4_000  # that are drawn in a chart of several runs


class Panel(NamedTuple):
    """A chart of the page."""

    title: str
    svg: str
    caption: str  # how to read it, in a line
    legend: tuple[tuple[str, str], ...] = ()  # (name, colour)


class Curve(NamedTuple):
    """One metric of a chart."""

    metric: str
    label: str
    color: str


class Chart(NamedTuple):
    """Curves over steps. The first is what it is about: without it the chart is left out."""

    title: str
    caption: str
    curves: tuple[Curve, ...]
    look: Look = Look()


def chart(title: str, caption: str, *curves: tuple[str, str, str], **look) -> Chart:
    """Returns a chart of (metric, label, colour), which looks as the fields of `Look` say."""
    return Chart(title, caption, tuple(Curve(*curve) for curve in curves), Look(**look))


LOSS = chart(
    "Loss",
    "How surprised the model is by the next token; lower is better. Validation is on text that it "
    "is not trained on",
    ("lm", "training", "blue"),
    ("validation_lm", "validation", "orange"),
    ylabel="nats per token",
)
FINETUNE_LOSS = LOSS._replace(
    title="Fine-tuning loss",
    caption="How surprised the model is by the answers in the conversations it is shown; lower is "
    "better",
)
PAIRS = (
    chart(
        "Pairs told apart",
        "Share of pairs whose better answer the model has come to prefer, by what the loss calls a "
        "reward; half is chance. Validation is on pairs that it is not trained on",
        ("rewards/accuracies", "training", "blue"),
        ("validation_rewards/accuracies", "validation", "orange"),
        from_zero=True,
        percent=True,
    ),
    chart(
        "Loss of a pair",
        "What is minimised of pairs; lower is better",
        ("preference_loss", "training", "blue"),
        ("validation_preference_loss", "validation", "orange"),
    ),
    chart(
        "How likely the answers are",
        "Log-probability of the better and of the worse answer, of an answer or of a token as the "
        "loss takes it; both may fall",
        ("logps/chosen", "chosen", "blue"),
        ("logps/rejected", "rejected", "orange"),
        ylabel="nats",
    ),
)
VALIDATION = chart(
    "Validation loss",
    "How surprised the model is by text that it is not trained on; lower is better",
    ("validation_lm", "validation", "blue"),
    ylabel="nats per token",
)
INDEXER = (
    chart(
        "Indexer divergence",
        "How far the indexer's guess of what attention reads is from what it reads; 0 is a perfect "
        "guess",
        ("indexer_kl", "", "blue"),
        ylabel="nats",
        from_zero=True,
    ),
    chart(
        "Attention kept",
        "Share of what full attention reads that lies on the tokens which the indexer picks",
        ("indexer_recall", "picked by the indexer", "blue"),
        ("indexer_recall_random", "as many at random", "muted"),
        from_zero=True,
        percent=True,
    ),
    chart(
        "Indexer gradient",
        "Length of the gradient of the indexer's parameters before it is clipped; 0 where they are "
        "frozen",
        ("indexer_grad_norm", "", "purple"),
        from_zero=True,
    ),
)
EXPERT_LOAD_MAX = chart(
    "Busiest expert",
    "Tokens of the busiest expert of any layer, over an even share; 1 is even",
    ("expert_load_max", "", "purple"),
    ylabel="times an even share",
    level=1.0,
)
REWARD = chart(
    "Reward",
    "What the completions of a step earn on average",
    ("reward", "total", "blue"),
    from_zero=True,
)
REINFORCE = (
    chart(
        "Held-out problems solved",
        "Share of problems it does not train on that one of k completions solves",
        *((f"validation_pass_at_{2**n}", f"pass@{2**n}", PALETTE[n]) for n in range(8)),
        from_zero=True,
        percent=True,
    ),
    chart(
        "Completion length",
        "Tokens that it writes for a problem",
        ("completions/mean_length", "mean", "blue"),
        ("completions/min_length", "shortest", "muted"),
        ("completions/max_length", "longest", "muted"),
        ylabel="tokens",
        from_zero=True,
    ),
    chart(
        "Cut short",
        "Share of completions that reach the longest length before they end",
        ("completions/clipped_ratio", "", "blue"),
        from_zero=True,
        percent=True,
    ),
    chart(
        "Entropy",
        "How undecided the model is at each token that it writes; near 0 it tries nothing new",
        ("entropy", "", "blue"),
        ylabel="nats",
        from_zero=True,
    ),
    chart(
        "Distance from the start",
        "How far the model has moved from the one that reinforcement learning began with (KL "
        "divergence)",
        ("kl", "", "blue"),
        ylabel="nats",
        from_zero=True,
    ),
    chart(
        "Sampler and trainer apart",
        "Difference of their log-probabilities of a sampled token; more than rounding would bias "
        "what is learnt",
        ("sampling/sampling_logp_difference/max", "largest", "orange"),
        ("sampling/sampling_logp_difference/mean", "mean", "blue"),
        ylabel="nats",
        log=True,
        from_zero=True,
    ),
    chart(
        "Experts alike",
        "Share of the experts that sampler or trainer, each by itself, chooses for a token that "
        "both do",
        ("sampling/routes_jaccard", "", "blue"),
        percent=True,
    ),
    chart(
        "Keys alike",
        "Share of the keys that sampler or trainer, each by itself, selects for a token that both "
        "do",
        ("sampling/selected_jaccard", "", "blue"),
        percent=True,
    ),
    chart(
        "Clipped tokens",
        "Share of tokens whose update is held back because they moved too far in one step",
        ("clip_ratio/region_mean", "all", "blue"),
        ("clip_ratio/low_mean", "made too unlikely", "orange"),
        ("clip_ratio/high_mean", "made too likely", "green"),
        from_zero=True,
        percent=True,
    ),
    chart(
        "Groups without a signal",
        "Share of problems whose completions all earn the same: nothing is learnt from them",
        ("frac_reward_zero_std", "", "blue"),
        from_zero=True,
        percent=True,
    ),
)
OPTIMIZATION = (
    chart(
        "Learning rate",
        "How large a step of the optimizer is",
        ("learning_rate", "", "blue"),
        from_zero=True,
    ),
    chart(
        "Gradient norm",
        "Length of the gradient before it is clipped; spikes are steps that pull hard",
        ("grad_norm", "", "purple"),
        log=True,
        from_zero=True,
    ),
    chart(
        "Speed",
        "Tokens a second, over the last steps; the first step compiles and is not counted",
        ("tokens_per_s", "", "green"),
        ylabel="tokens/s",
        from_zero=True,
    ),
    chart(
        "Time of a step",
        "Seconds that a step of reinforcement takes to write completions and to learn from them",
        ("timing_s/gen", "writing", "blue"),
        ("timing_s/update_actor", "learning", "orange"),
        ("timing_s/reward", "rewarding", "green"),
        ("step_time", "all of the step", "muted"),
        ylabel="seconds",
        from_zero=True,
    ),
)


def curves_panel(phases: PhaseMetrics, chart: Chart) -> Panel | None:
    """Draws the curves of a chart over the phases that have the first; None if none has it."""
    phases = phases_with(phases, chart.curves[0].metric)
    found = [(curve, *points(phases, curve.metric)) for curve in chart.curves]
    if not len(found[0][1]):
        return None
    found = [(curve, x, y) for curve, x, y in found if len(x)]
    begins = starts(phases)
    series = [
        smoothed(curve.label or chart.title, curve.color, x, y, begins) for curve, x, y in found
    ]
    label = f"{chart.title}. {chart.caption}"
    svg = line_chart(series, chart.look, label, marks(phases, chart.curves[0].metric))
    legend = tuple((curve.label, curve.color) for curve, _, _ in found) if len(found) > 1 else ()
    return Panel(chart.title, svg, chart.caption, legend)


def overlaid_panel(
    names: Sequence[str], runs: Sequence[PhaseMetrics], colors: Sequence[str], chart: Chart
) -> Panel | None:
    """Draws the first curve of a chart for each of several runs that have it.

    The phases of a run that have it stand end to end.
    """
    metric = chart.curves[0].metric
    limit = max(40, min(POINTS, ALL_POINTS // len(runs)))
    series, begins = [], []
    for name, run, color in zip(names, runs, colors, strict=True):
        phases = phases_with(run, metric)
        x, y = points(phases, metric)
        if len(x):
            one = smoothed(name, color, x, y, starts(phases), limit)
            series.append(one._replace(faint=None, measured=one.y))
            begins.append(marks(phases, metric))
    if not series:
        return None
    label = f"{chart.title} of {len(series)} runs. {chart.caption}"
    alike = begins[0] if all(one == begins[0] for one in begins) else ()
    return Panel(chart.title, line_chart(series, chart.look, label, alike), chart.caption)


def points(phases: PhaseMetrics, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the finite values of a metric, the phases end to end."""
    found = [
        (start + line["step"], value)
        for start, lines in zip(starts(phases), phases.values(), strict=True)
        for line in lines
        if (value := number(line.get(metric))) is not None and (metric, value) not in UNMEASURED
    ]
    x, y = np.array(found, float).reshape(-1, 2).T
    return x, y


def starts(phases: PhaseMetrics) -> list[float]:
    """Returns the step at which each phase begins when they are put end to end."""
    lengths = [max(line["step"] for line in lines) for lines in phases.values()]
    return [float(start) for start in np.cumsum([0.0, *lengths])[:-1]]


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


def smoothed(
    name: str,
    color: str,
    x: np.ndarray,
    y: np.ndarray,
    begins: Sequence[float] = (),
    limit: int = POINTS,
) -> Series:
    """Returns a curve of at most about `limit` points.

    Where it has many, it is a running mean, which begins anew at each of `begins`, before the
    measured values, of which the least and the largest of each stretch are drawn.
    """
    kept = np.unique(np.linspace(0, len(x) - 1, limit).round().astype(int))
    if len(x) <= SMOOTHED_FROM:
        return Series(name, color, x[kept], y[kept], y[kept])
    parts = np.split(y, np.searchsorted(x, begins, side="right"))
    mean = np.concatenate([running_mean(part, len(x) // 40) for part in parts])
    stretches = np.array_split(np.arange(len(x)), min(limit, len(x)))
    extreme = np.unique([i for s in stretches for i in (s[y[s].argmin()], s[y[s].argmax()])])
    return Series(name, color, x[kept], mean[kept], y[kept], faint=(x[extreme], y[extreme]))


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean over `reach` values to either side of each.

    Near an end it is over fewer, as many on each side, so that the mean does not lag.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    near = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return (total[index + near + 1] - total[index - near]) / (2 * near + 1)
