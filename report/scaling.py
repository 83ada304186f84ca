"""Draws the fit of a pass rate against compute, as scaling.json has it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from report.curves import Panel
from report.lenient import mapping, matrix, number
from report.svg import PALETTE, Look, Series, line_chart

CAPTION = (
    "Held-out values as measured (thin), the sigmoid that fits them with its 95 % band, and a "
    "power law (grey): where they part, a longer run would tell"
)


def scaling_panels(scaling: Mapping[str, Any]) -> list[Panel]:
    """Returns the chart of the fits, [] where there is nothing that can be drawn."""
    found = scaling.get("fits")
    fits = [mapping(fit) for fit in (found if isinstance(found, list) else [])]
    runs = scaling.get("runs")
    measured = [
        points
        for run in (runs if isinstance(runs, list) else [])
        if (points := _positive(mapping(run).get("points"), 2)) is not None
    ]
    series: list[Series] = []
    for place, fit in enumerate(fits):
        curve, power = _positive(fit.get("curve"), 4), _positive(fit.get("power_law"), 2)
        if curve is None:
            continue
        x, mean, low, high = np.log10(curve[:, 0]), *curve.T[1:]
        own = measured[place : place + 1] if len(fits) > 1 else measured[:1]
        faint = (np.log10(own[0][:, 0]), own[0][:, 1]) if own else None
        name, color = str(fit.get("run")), PALETTE[place % len(PALETTE)]
        series.append(Series(name, color, x, mean, mean, (low, high), faint))
        if power is not None and len(fits) == 1:
            y = power[:, 1]
            series.append(Series("power law", "muted", np.log10(power[:, 0]), y, y))
    if not series:
        return []
    metric = str(scaling.get("metric"))
    share = "pass_at" in metric
    look = Look(xlabel=str(scaling.get("x")), percent=share, xticks=_ticks(series), from_zero=share)
    svg = line_chart(series, look, f"{metric} against compute. {CAPTION}")
    words = "; ".join(filter(None, map(_words, fits)))
    legend = tuple((one.name, one.color) for one in series)
    return [Panel("Pass rate against compute", svg, f"{CAPTION}. {words}", legend)]


def _words(fit: Mapping[str, Any]) -> str:
    """Says the ceiling, exponent and middle of a fit; "" where they are missing."""
    parts = []
    for name in ("A", "B", "C_mid"):
        values = [number(mapping(fit.get(name)).get(key)) for key in ("mean", "low", "high")]
        if None in values:
            return ""
        mean, low, high = values
        parts.append(f"{name} {mean:.3g} ({low:.3g} to {high:.3g})")
    return ", ".join(parts)


def _positive(value: Any, columns: int) -> np.ndarray | None:
    """Returns points whose compute is positive, None where they are no such points."""
    points = matrix(value)
    if points is None or points.shape[1] != columns or (points[:, 0] <= 0).any():
        return None
    return points


def _ticks(series: list[Series]) -> dict[float, str]:
    """Returns logarithm -> label of up to about six round values of compute."""
    x = np.concatenate([one.x for one in series])
    low, high = float(x.min()), float(x.max())
    factors = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    marks = [power + math.log10(factor) for power in powers for factor in factors]
    return {mark: _label(10**mark) for mark in marks if low - 1e-9 <= mark <= high + 1e-9}


def _label(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1_000 * size * (1 + 1e-9):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
