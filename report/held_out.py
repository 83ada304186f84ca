"""Charts of problems: votes, difficulty, temperatures, thinking, and one run over another.

Each is made from what launch.evaluate wrote, and left out where that is not there. Held-out
problems, and those that a run trains on, have charts of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from report.curves import Panel
from report.lenient import mapping, number
from report.results import HELD_OUT, TRAINING, problems_of
from report.scaling import scaling_panels
from report.svg import PALETTE, Look, Series, interval_chart, line_chart

BOUNDS = ("mean", "low", "high")


def held_out_panels(measured: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """Returns the charts of what was measured; `measured` is that of `report.results.Run`."""
    return [
        *_panels_of(measured, HELD_OUT),
        *scaling_panels(mapping(measured.get("scaling"))),
    ]


def training_panels(measured: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """Returns the charts of what was measured on problems that a run trains on."""
    return _panels_of(measured, TRAINING)


def _panels_of(measured: Mapping[str, Mapping[str, Any]], which: str) -> list[Panel]:
    """Returns the charts of the files that are of these problems."""
    evaluation, comparison, perplexity = (
        found if problems_of(found) == which else {}
        for found in (mapping(measured.get(n)) for n in ("evaluation", "comparison", "perplexity"))
    )
    found = [
        votes(evaluation, which),
        temperatures(evaluation, which),
        difficulties(evaluation.get("by_difficulty"), "pass@1", "Solved by difficulty", "share"),
        thinking(evaluation),
        differences(comparison),
        difficulties(
            comparison.get("by_pass_rate"), "", "Gain by how often the base solves it", "gain"
        ),
        perplexities(perplexity),
    ]
    return [panel for panel in found if panel]


def votes(evaluation: Mapping[str, Any], which: str) -> Panel | None:
    """Draws pass@k and cons@k of one evaluation.

    Args:
      which: problems it is of, in words.
    """
    series = [
        one
        for name, table, color in (
            ("pass@k", "pass_at_k", "blue"),
            ("cons@k", "cons_at_k", "orange"),
        )
        if (one := _over_k(name, color, evaluation.get(table)))
    ]
    if len(series) < 2:
        return None
    caption = (
        f"Share of {which} that one of k completions solves (pass), and that their "
        "majority answer solves (cons); bands are 95 % intervals"
    )
    return _k_panel("One of k, and the vote of k", series, caption)


def temperatures(evaluation: Mapping[str, Any], which: str) -> Panel | None:
    """Draws pass@k at each of several temperatures, of problems that `which` says in words."""
    grids = evaluation.get("temperatures")
    series = []
    for place, grid in enumerate(map(mapping, grids if isinstance(grids, list) else [])):
        at, color = number(grid.get("temperature")), PALETTE[place % len(PALETTE)]
        one = _over_k(f"temperature {at:g}", color, grid.get("pass_at_k")) if at is not None else 0
        series += [one] if one else []
    if not series:
        return None
    caption = f"Share of {which} that one of k completions solves, by temperature"
    return _k_panel("pass@k by temperature", series, caption)


def difficulties(groups: Any, key: str, title: str, what: str) -> Panel | None:
    """Draws a mean of each group of problems with its interval.

    Args:
      key: of the interval in a group; "" where the group is it.
      what: "share" or "gain".
    """
    rows = []
    for group in map(mapping, groups if isinstance(groups, list) else []):
        values = _interval(mapping(group.get(key)) if key else group)
        count = number(group.get("problems"))
        if values and count:
            name = f"{group.get('difficulty')} ({count:,.0f} problems)"
            rows.append((name, *values))
    if not rows:
        return None
    caption = {
        "share": "Share of completions that are right, by what problems say of their difficulty; "
        "bars are 95 % intervals",
        "gain": "How much more often the second run is right than its base, by how often the base "
        "is, in completions that are not compared; bars are 95 % intervals",
    }[what]
    return Panel(title, interval_chart(rows, f"{title}. {caption}", key or "pass@1, gain"), caption)


def thinking(evaluation: Mapping[str, Any]) -> Panel | None:
    """Draws accuracy against the mean length of a thought that was forced to a budget."""
    found = evaluation.get("thinking")
    points = [
        (tokens, *values)
        for row in map(mapping, found if isinstance(found, list) else [])
        if (values := _interval(mapping(row.get("accuracy"))))
        and (tokens := number(row.get("thinking_tokens"))) is not None
    ]
    if not points:
        return None
    x, mean, low, high = np.array(sorted(points), float).T
    caption = (
        "Share of completions that are right when a thought is cut at a budget, by the tokens that "
        "it then has on average; the band is a 95 % interval"
    )
    look = Look(xlabel="tokens of thought", from_zero=True, percent=True)
    series = [Series("", "blue", x, mean, mean, band=(low, high))]
    return Panel(
        "Accuracy by length of thought", line_chart(series, look, f"Thinking. {caption}"), caption
    )


def differences(comparison: Mapping[str, Any]) -> Panel | None:
    """Draws what one run solves more than another, by k."""
    rows = comparison.get("differences")
    listed = [mapping(row) for row in (rows if isinstance(rows, list) else [])]
    series = [
        one
        for measure, color in (("pass", "blue"), ("cons", "orange"))
        if (
            one := _over_k(
                f"{measure}@k", color, [row for row in listed if row.get("measure") == measure]
            )
        )
    ]
    if not series:
        return None
    a, b = (mapping(comparison.get(name)).get("workdir") for name in ("a", "b"))
    caption = f"{b} minus {a}, on the same problems; bands are paired 95 % intervals"
    gap = mapping(comparison.get("sampling_efficiency_gap"))
    if (values := _interval(gap)) and isinstance(gap.get("is"), str):
        caption += f". Sampling-efficiency gap, {gap['is']}: {values[0]:.3f}"
        caption += f" ({values[1]:.3f} to {values[2]:.3f}), the smaller the better"
    return _k_panel("Gain over the base", series, caption, level=0.0)


def perplexities(found: Mapping[str, Any]) -> Panel | None:
    """Draws the logarithms of the perplexities of two runs' completions under one model."""
    rows = []
    for key, name in (("of_a", "its own completions"), ("of_b", "the other run's")):
        quantiles = mapping(mapping(found.get(key)).get("quantiles"))
        values = [number(quantiles.get(q)) for q in ("0.5", "0.05", "0.95")]
        positive = [value for value in values if value is not None and value > 0]
        if len(positive) == len(values):
            rows.append((name, *np.log(positive).tolist()))
    if not rows:
        return None
    caption = (
        f"How surprising completions are to {found.get('model')}: the median of the logarithm of "
        "their perplexities, and a bar from the 5th to the 95th percentile; what another run "
        "writes that lies low among the model's own was within its reach before"
    )
    svg = interval_chart(rows, f"Perplexity. {caption}", "nats a token")
    return Panel("What the base thinks of it", svg, caption)


def _k_panel(
    title: str, series: Sequence[Series], caption: str, level: float | None = None
) -> Panel:
    ticks = sorted({float(x) for one in series for x in one.x})
    every = -(-len(ticks) // 9)
    look = Look(
        xlabel="k",
        from_zero=level is None,
        percent=True,
        level=level,
        xticks={x: f"{2**x:.0f}" for x in ticks[::every]},
    )
    legend = tuple((one.name, one.color) for one in series)
    return Panel(title, line_chart(series, look, f"{title}. {caption}"), caption, legend)


def _over_k(name: str, color: str, table: Any) -> Series | None:
    """Returns a curve over the logarithm of k, None where there is no row of numbers."""
    rows = []
    for row in map(mapping, table if isinstance(table, list) else []):
        k, values = number(row.get("k")), _interval(row)
        if k is not None and k >= 1 and values:
            rows.append((k, *values))
    if not rows:
        return None
    k, mean, low, high = np.array(sorted(rows), float).T
    return Series(name, color, np.log2(k), mean, mean, band=(low, high))


def _interval(found: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Returns (mean, low, high), None where one is no number."""
    mean, low, high = (number(found.get(name)) for name in BOUNDS)
    return None if mean is None or low is None or high is None else (mean, low, high)
