"""Draws charts as inline SVG in the colours of the page, light or dark.

Values show under the pointer: what page.html's script needs for that stands in `data-hover` of a
chart, and in `data-tip` of a single shape.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from report.axes import Axis, axis_over
from report.escape import escape

# Name -> (light, dark); a chart names a colour, the page says what it is.
COLORS = {
    "ink": ("#24282e", "#e8e6e1"),
    "muted": ("#6c727a", "#9da1a8"),
    "grid": ("#e6e3dc", "#30343a"),
    "surface": ("#fffffe", "#1d2024"),
    "blue": ("#2f6fb2", "#74ade8"),
    "orange": ("#c86f28", "#e9a463"),
    "green": ("#35856a", "#6fc7a4"),
    "purple": ("#7b5ba7", "#b79bdd"),
    "red": ("#b8434e", "#ec8f96"),
    "teal": ("#1f8a9c", "#6cc9d8"),
    "olive": ("#7d7a2a", "#c3bf66"),
    "pink": ("#b0528f", "#e39ac9"),
}
PALETTE = ("blue", "orange", "green", "purple", "red", "teal", "olive", "pink")

WIDTH, HEIGHT = 360, 216  # in units of about a pixel where three charts stand in a row
LETTER = 7.4  # about the width of a letter of the labels, at most


class Series(NamedTuple):
    """A curve.

    Attributes:
      x, y: the points of the curve, [N].
      measured: the values that y is a running mean of, [N]; y itself where nothing is smoothed.
      band: (low, high) about y, each [N].
      faint: (x, y) of a faint curve behind.
    """

    name: str
    color: str
    x: np.ndarray
    y: np.ndarray
    measured: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    faint: tuple[np.ndarray, np.ndarray] | None = None


class Look(NamedTuple):
    """How a chart of curves looks."""

    xlabel: str = "step"
    ylabel: str = ""
    log: bool = False
    from_zero: bool = False
    percent: bool = False
    level: float | None = None  # of a dashed line across, such as what is even
    xticks: dict[float, str] | None = None  # x -> label, in place of round numbers


def line_chart(
    series: Sequence[Series], look: Look, label: str, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """Returns a chart of curves.

    Args:
      label: what it shows, for a reader who cannot see it.
      marks: (x, name) of each phase, at whose beginning stands a thin line with its name.
    """
    values = _all_values(series, look)
    ticks_at = axis_over(values, 0, 1, from_zero=look.from_zero, log=look.log)
    names = [_tick(tick, look.percent) for tick in ticks_at.ticks()]
    left = 8 + LETTER * max(map(len, names), default=1) + (14 if look.ylabel else 0)
    steps = np.concatenate([one.x for one in series])
    low = float(steps.min()) if look.xticks else min(0.0, float(steps.min()))
    room = 0.0 if steps.max() > low else 1.0
    x_axis = Axis(low - room, float(steps.max()) + room, left, WIDTH - 12)
    marks = marks if len(marks) > 1 else ()
    rows = _mark_rows(marks, x_axis)
    top = 10 + 12 * (max(rows) + 1 if rows else 0)
    y_axis = ticks_at._replace(start=HEIGHT - 38, end=float(top))

    parts = [_y_ticks(y_axis, look), _x_ticks(x_axis, look)]
    for (x, name), row in zip(marks, rows, strict=True):
        at = float(x_axis.pixels(np.array(x)))
        parts.append(f'<path class="grid" d="M{at:.1f} {top}V{HEIGHT - 38}"/>')
        parts.append(_text(at, top - 4 - 12 * row, name, "start", "mark"))
    if look.level is not None:
        at = float(y_axis.pixels(np.array(look.level)))
        parts.append(f'<path class="level" d="M{left:.1f} {at:.1f}H{WIDTH - 12}"/>')
    parts += [_curve(one, x_axis, y_axis) for one in series]
    hover = {
        "x": [x_axis.low, x_axis.high, x_axis.start, x_axis.end],
        "y": [y_axis.low, y_axis.high, y_axis.start, y_axis.end, int(y_axis.log)],
        "step": look.xlabel,
        "names": {f"{x:g}": name for x, name in (look.xticks or {}).items()},
        "percent": int(look.percent),
        "phases": [[x, name] for x, name in marks],
        "series": [
            {"name": one.name, "color": one.color, "points": _points(one)} for one in series
        ],
    }
    return _svg("".join(parts), label, HEIGHT, hover)


def _all_values(series: Sequence[Series], look: Look) -> np.ndarray:
    """Returns all that the vertical axis must have room for."""
    curves = [curve for one in series for curve in (one.y, *(one.band or ()))]
    curves += [one.faint[1] for one in series if one.faint]
    return np.concatenate(curves + ([] if look.level is None else [np.array([look.level])]))


def interval_chart(rows: Sequence[tuple[str, float, float, float]], label: str, xlabel: str) -> str:
    """Returns a chart with a row for each (name, mean, low, high): a bar, and a dot at the mean."""
    values = np.array([[low, mean, high, 0.0] for _, mean, low, high in rows])
    axis = axis_over(values, 12, WIDTH - 12)
    bottom = 16 + 38 * len(rows)
    zero = float(axis.pixels(np.array(0.0)))
    parts = [f'<path class="level" d="M{zero:.1f} 6V{bottom}"/>']
    for row, (name, mean, low, high) in enumerate(rows):
        y = 36 + 38 * row
        at, left, right = axis.pixels(np.array([mean, low, high]))
        tip = escape(f"{name}: {mean:.3f} ({low:.3f} to {high:.3f})")
        shown = name if len(name) < 52 else f"{name[:50]}…"
        parts.append(
            f'<g style="--tone:var(--blue)" data-tip="{tip}">'
            + _text(12, y - 11, shown, "start", "name")
            + f'<path class="bar" d="M{left:.1f} {y}H{right:.1f}"/>'
            + f'<circle class="dot" cx="{at:.1f}" cy="{y}" r="3.5"/>'
            + _text(WIDTH - 12, y - 11, f"{mean:.3f}", "end", "name")
            + "</g>"
        )
    parts.append(_x_ticks(axis, Look(xlabel=xlabel), bottom))
    return _svg("".join(parts), label, bottom + 38)


def heat_map(values: np.ndarray, label: str) -> str:
    """Returns cells of load over the mean load, [rows, columns] of layers and experts.

    They are orange above 1 and blue below, the stronger the farther, without colour at 1. Runs of
    cells of one strength are one stroke, so that 15,000 cells stay small.
    """
    rows, columns = values.shape
    left, top = 30, 6
    width = (WIDTH - left - 12) / columns
    height = max(3.0, min(width, 24.0, 600 / rows))
    strokes: dict[tuple[str, int], list[str]] = {}
    for row in range(rows):
        column = 0
        while column < columns:
            level = _level(values[row, column])
            end = column + 1
            while end < columns and _level(values[row, end]) == level:
                end += 1
            if level[1]:
                strokes.setdefault(level, []).append(f"M{column} {row + 0.5:g}h{end - column}")
            column = end
    cells = "".join(
        f'<path d="{"".join(path)}" style="stroke:var(--{color});stroke-opacity:{tenths / 10}"/>'
        for (color, tenths), path in sorted(strokes.items())
    )
    frame = (
        f'<g transform="translate({left} {top}) scale({width:.4f} {height:.4f})" '
        f'class="cells">{cells}</g>'
    )
    bottom = top + rows * height
    edge = f'<path class="axis" d="M{left} {top}V{bottom:.1f}H{WIDTH - 12}"/>'
    labels = [
        _text(left + (column + 0.5) * width, bottom + 14, str(column), "middle", "tick")
        for column in range(0, columns, -(-columns // 12))
    ]
    every = -(-rows // max(1, int(bottom / 16)))
    labels += [
        _text(left - 5, top + (row + 0.5) * height + 4, str(row), "end", "tick")
        for row in range(0, rows, every)
    ]
    labels.append(_text((left + WIDTH) / 2, bottom + 30, "expert", "middle", "tick"))
    if values.size <= 144:
        labels += [
            _text(
                left + (c + 0.5) * width,
                top + (r + 0.5) * height + 4,
                f"{value:.1f}",
                "middle",
                "cell",
            )
            for (r, c), value in np.ndenumerate(values)
        ]
    rounded = [[_rounded(value, 3) for value in row] for row in values.tolist()]
    hover = {"cells": rounded, "at": [left, top, width, height]}
    return _svg(frame + edge + "".join(labels), label, bottom + 36, hover)


def _level(value: float) -> tuple[str, int]:
    """Returns the colour of a cell and its strength in tenths."""
    if not math.isfinite(value):
        return "muted", 2
    return "orange" if value > 1 else "blue", round(10 * min(abs(value - 1), 1.0))


def _svg(body: str, label: str, height: float, hover: dict | None = None) -> str:
    data = ""
    if hover:
        text = json.dumps(hover, separators=(",", ":"))
        # Most of it is double quotes, so that the attribute stands in single ones.
        for character, entity in (("&", "&amp;"), ("'", "&#39;"), ("<", "&lt;")):
            text = text.replace(character, entity)
        data = f" data-hover='{text}'"
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:g}" aria-label="{escape(label)}"{data}>'
        f"{body}</svg>"
    )


def _curve(one: Series, x_axis: Axis, y_axis: Axis) -> str:
    """Draws the band, the faint curve and the curve of a series; a lone point is a dot."""
    parts = []
    if one.band:
        low, high = one.band
        there = _path(x_axis.pixels(one.x), y_axis.pixels(high))
        back = _path(x_axis.pixels(one.x)[::-1], y_axis.pixels(low)[::-1])
        parts.append(f'<path class="band" d="{there}L{back[1:]}Z"/>')
    if one.faint:
        x, y = one.faint
        parts.append(f'<path class="faint" d="{_path(x_axis.pixels(x), y_axis.pixels(y))}"/>')
    xs, ys = x_axis.pixels(one.x), y_axis.pixels(one.y)
    parts.append(f'<path class="line" d="{_path(xs, ys)}"/>')
    if len(xs) <= 12:
        parts += [
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
            for x, y in zip(xs, ys, strict=True)
        ]
    return f'<g style="--tone:var(--{one.color})">{"".join(parts)}</g>'


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _points(one: Series) -> list[list[float]]:
    """Returns [x, y] of each point, with the measured value where y is a mean."""
    points = []
    for x, y, measured in zip(one.x.tolist(), one.y.tolist(), one.measured.tolist(), strict=True):
        point = [_rounded(x, 10), _rounded(y, 4)]
        points.append(point if measured == y else [*point, _rounded(measured, 4)])
    return points


def _rounded(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _y_ticks(axis: Axis, look: Look) -> str:
    parts = []
    ticks = axis.ticks()
    at = axis.pixels(np.array(ticks))
    left = 8 + LETTER * max((len(_tick(tick, look.percent)) for tick in ticks), default=1)
    left += 14 if look.ylabel else 0
    for tick, y in zip(ticks, at, strict=True):
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - 12}"/>')
        parts.append(_text(left - 5, y + 4, _tick(tick, look.percent), "end", "tick"))
    if look.ylabel:
        middle = (axis.start + axis.end) / 2
        parts.append(
            f'<text class="tick" text-anchor="middle" '
            f'transform="translate(11 {middle:.1f}) rotate(-90)">{escape(look.ylabel)}</text>'
        )
    return "".join(parts)


def _x_ticks(axis: Axis, look: Look, bottom: float = HEIGHT - 38) -> str:
    parts = [f'<path class="axis" d="M{axis.start:.1f} {bottom}H{axis.end:.1f}"/>']
    whole = look.xlabel == "step"
    found = [tick for tick in axis.ticks() if tick.is_integer() or not whole]
    ticks = look.xticks or {tick: _tick(tick) for tick in found}
    for tick, name in ticks.items():
        x = float(axis.pixels(np.array(tick)))
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v3"/>')
        parts.append(_text(x, bottom + 15, name, "middle", "tick"))
    parts.append(_text((axis.start + axis.end) / 2, bottom + 31, look.xlabel, "middle", "tick"))
    return "".join(parts)


def _mark_rows(marks: Sequence[tuple[float, str]], axis: Axis) -> list[int]:
    """Returns the row of each name above the chart: the lowest where no other is in its way."""
    rows, ends = [], []  # the end of the last name on each row, in pixels
    for x, name in marks:
        at = float(axis.pixels(np.array(x)))
        row = next((row for row, end in enumerate(ends) if end < at), len(ends))
        ends[row : row + 1] = [at + LETTER * (len(name) + 1)]
        rows.append(row)
    return rows


def _tick(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.6g}%"
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}"


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
