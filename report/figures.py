"""Draws charts for a page with matplotlib, as SVG with the page's own colours.

They follow its light or dark theme.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name -> (light, dark). In an SVG a light value becomes var(--name), so no two may be the same.
COLORS = {
    "ink": ("#24282e", "#e8e6e1"),
    "muted": ("#6c727a", "#9da1a8"),
    "grid": ("#e6e3dc", "#30343a"),
    "surface": ("#fffffe", "#1d2024"),
    "blue": ("#2f6fb2", "#74ade8"),
    "orange": ("#c86f28", "#e9a463"),
    "green": ("#35856a", "#6fc7a4"),
    "purple": ("#7b5ba7", "#b79bdd"),
}
INK, MUTED, GRID, SURFACE, BLUE, ORANGE, GREEN, PURPLE = (light for light, _ in COLORS.values())

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "athanor",  # the same data give the same bytes
    "font.size": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.1,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


def svg(draw: Callable[[Axes], None], width: float, height: float, label: str) -> str:
    """Returns one chart as an inline <svg>, as wide as its place on the page.

    Args:
      draw: fills the axes.
      width: inches; text is 8 points, so a wider chart has smaller text on the page.
      height: inches.
      label: what it shows, for a reader who cannot see it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=4)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _inline(file.getvalue(), label)


def _inline(text: str, label: str) -> str:
    """Makes a part of a page from an SVG file: without a size, with the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for attribute in ("height", "width"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    color: str,
    label: str | None = None,
    starts: Sequence[float] = (),
) -> None:
    """Draws a curve.

    Where it has many points, the measured ones are faint behind a running mean, which begins anew
    at each of `starts`.
    """
    if len(x) > 60:
        axes.plot(x, y, color=color, linewidth=0.7, alpha=0.25)
        phases = np.split(y, np.searchsorted(x, starts, side="right"))
        y = np.concatenate([running_mean(phase, len(x) // 40) for phase in phases])
    axes.plot(x, y, color=color, label=label, marker="o" if len(x) == 1 else None, markersize=3)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean over `reach` values to either side of each.

    Near an end it is over fewer, as many on each side, so that the mean does not lag.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    near = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return (total[index + near + 1] - total[index - near]) / (2 * near + 1)


def phase_marks(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
    """Draws a thin line where each phase begins, with its name above.

    The name is higher where the one before is in its way. A single phase is not marked.
    """
    if len(marks) < 2:
        return
    left, right = axes.get_xlim()
    # Points of a unit of x; the axes take some four fifths of the figure.
    points = 72 * 0.8 * cast("Figure", axes.figure).get_figwidth() / (right - left)
    ends = []  # of the last name on each row, in units of x
    for x, name in marks:
        row = next((row for row, end in enumerate(ends) if end < x), len(ends))
        # A letter of size 7 is about 4 points wide.
        ends[row : row + 1] = [x + 4.2 * len(name) / points]
        axes.axvline(x, color=GRID, linewidth=0.8, zorder=0)
        axes.annotate(
            name,
            (x, 1),
            (0, 3 + 8 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=MUTED,
            fontsize=7,
        )


def heat_map(axes: Axes, values: np.ndarray) -> None:
    """Draws cells of load over the mean load, [layers, experts].

    They are orange above 1 and blue below, the stronger the farther, without colour at 1.
    """
    from matplotlib.colors import to_rgba

    colors = np.empty((*values.shape, 4))
    for cell, value in np.ndenumerate(values):
        colors[cell] = to_rgba(ORANGE if value > 1 else BLUE, alpha=min(abs(value - 1), 1.0))
    rows, columns = values.shape
    small = values.size <= 144
    axes.pcolormesh(
        colors,
        edgecolors=SURFACE if small else "none",
        linewidth=1.0 if small else 0.0,
        rasterized=not small,
    )
    if small:
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=6.5
            )
    axes.grid(False)
    axes.invert_yaxis()
    axes.set(xlabel="expert", ylabel="layer")
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = -(-count // 16)
        axis.set_ticks(np.arange(0, count, every) + 0.5, [str(i) for i in range(0, count, every)])
        axis.set_tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
