"""A chart of the page as an SVG file of its own, in light colours.

Programs that draw SVG files know no variables of CSS, in which the page has its colours: here they
are written out.
"""

import re

from report.curves import Panel
from report.escape import escape
from report.svg import COLORS, HEIGHT, WIDTH

# What page.html says of the shapes of a chart, and of those of one colour.
STYLE = (
    "text{font:11px sans-serif;fill:var(--muted)}"
    ".grid,.level{fill:none;stroke:var(--grid)}.axis{fill:none;stroke:var(--muted)}"
    ".level{stroke:var(--muted);stroke-dasharray:3 3}"
    ".line{fill:none;stroke-width:1.8}.faint{fill:none;stroke-width:.8;opacity:.5}"
    ".bar{fill:none;stroke-width:5;opacity:.35}.band{opacity:.15}"
)
OF_COLOR = (
    ".{0} .line,.{0} .faint,.{0} .bar{{stroke:var(--{0})}}.{0} .band,.{0} .dot{{fill:var(--{0})}}"
)
LINE = 16  # of the legend, in units of the chart


def standalone(panel: Panel) -> str:
    """Returns the text of an SVG file: a panel's title, its chart and its legend."""
    rows = [
        f'<rect x="12" y="{HEIGHT + 24 + LINE * row}" width="9" height="9" '
        f'fill="var(--{color})"/>'
        f'<text x="26" y="{HEIGHT + 32 + LINE * row}">{escape(name)}</text>'
        for row, (name, color) in enumerate(panel.legend)
    ]
    height = HEIGHT + 36 + LINE * len(rows)
    style = STYLE + "".join(map(OF_COLOR.format, COLORS))
    _, _, chart = panel.svg.partition(">")
    chart = re.sub(r'style="--tone:var\(--(\w+)\)"', r'class="\1"', chart.removesuffix("</svg>"))
    written = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{2 * WIDTH}" height="{2 * height}"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="var(--surface)"/>'
        f'<text x="12" y="14">{escape(panel.title)}</text>'
        f'<g transform="translate(0 18)">{chart}</g>{"".join(rows)}</svg>\n'
    )
    return re.sub(r"var\(--(\w+)\)", lambda found: COLORS[found[1]][0], written)
