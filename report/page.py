"""Puts a page together: what was trained, numbers, charts, and what the model wrote.

A page is one file that needs no network. What did not run is not on it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from errors import shortened
from report.comparison import Comparison
from report.curves import Panel
from report.escape import escape, plain
from report.lenient import mapping, number
from report.panels import Section, overlaid_sections, sections
from report.results import Origin, Run, Summary, problems_of
from report.stages import Stage, stages_of
from report.story import duration, recorded, story
from report.svg import COLORS, PALETTE
from report.table import as_line, clock, number_groups
from report.texts import infills_html, samples_html, traces_html

TEMPLATE = Path(__file__).parent / "page.html"
SHOWN_CHANGES = 8  # fields of the config; where more differ from the defaults, they are folded


def run_page(run: Run) -> str:
    """Returns the page of one run."""
    lead, *more = story(run)
    sentences = f'<p class="lead">{escape(lead)}</p>' + "".join(f"<p>{escape(s)}</p>" for s in more)
    body = [
        f'<h1>{escape(run.name)}</h1><div class="story">{sentences}</div>',
        _origin_html(run),
        _stages_html(stages_of(run)),
        _numbers_html(run.summary),
        *map(_section_html, sections(run)),
        infills_html(run.infills),
        samples_html(run.samples, problems_of(mapping(run.measured.get("evaluation")))),
        traces_html(run.traces),
        _notes_html(run.notes),
    ]
    return _page(run.name, body)


def runs_page(comparison: Comparison) -> str:
    """Returns the page of several runs: one table, and charts with a curve for each."""
    runs = comparison.runs
    hues = {} if len(runs) <= len(PALETTE) else run_colors(len(runs))
    colors = list(hues) or PALETTE[: len(runs)]
    lead = comparison.question or f"{len(runs)} runs side by side."
    rows = [
        [f'<span class="swatch" style="--tone:var(--{color})"></span>{escape(label)}', *cells]
        for label, color, cells in zip(
            comparison.labels or [run.name for run in runs],
            colors,
            [map(escape, row) for row in comparison.rows],
            strict=True,
        )
    ]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    body = [
        f'<h1>{escape(comparison.title)}</h1><div class="story">'
        f'<p class="lead">{escape(lead)}</p></div>',
        f'<section class="card">{_table_html(["run", *comparison.columns], rows, [0])}</section>',
        *map(_section_html, overlaid_sections(runs, colors)),
        _notes_html([*comparison.notes, *notes]),
    ]
    return _page(comparison.title, body, hues)


def run_colors(count: int) -> dict[str, tuple[str, str]]:
    """Returns name -> (light, dark) of a colour for each of many runs, from red to violet."""
    hues = [round(300 * place / max(count - 1, 1)) for place in range(count)]
    return {
        f"run{place}": (f"hsl({hue} 62% 42%)", f"hsl({hue} 62% 68%)")
        for place, hue in enumerate(hues)
    }


def _page(
    title: str, body: Sequence[str], more_colors: Mapping[str, tuple[str, str]] | None = None
) -> str:
    colors = COLORS | dict(more_colors or {})
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        light="".join(f"--{name}:{light};" for name, (light, _) in colors.items()),
        dark="".join(f"--{name}:{dark};" for name, (_, dark) in colors.items()),
        body="\n".join(part for part in body if part),
    )
    return plain(page)


def _origin_html(run: Run) -> str:
    """Returns what made a run: seed, commit, commands, and what differs from configs/base.py."""
    origins = run.origins
    starts = [start for origin in origins.values() for start in origin.starts]
    facts: list[tuple[str, str]] = []

    def add(name: str, values: Sequence[Any], code: bool = False) -> None:
        """Adds a fact with its values, each once, if there are any."""
        said = [shortened(str(value), 2_000) for value in values if value not in (None, "")]
        found = dict.fromkeys(map(escape, said))
        shown = [f"<code>{value}</code>" if code else value for value in found]
        if shown:
            facts.append((name, "<br>".join(shown)))

    summary_seed = run.summary.get("seed")
    add("seed", [o.seed for o in origins.values()] or [summary_seed])
    add("commit", [start.get("commit") for start in starts], code=True)
    commands = [start.get("command") for start in starts]
    add("command", commands or [f"launch.{o.command}" for o in origins.values()], code=True)
    first = next(iter(origins.values()), Origin())
    add("started from", [first.init_from], code=True)
    add("trained on", [one for o in origins.values() for one in o.sources], code=True)
    seconds = number(run.summary.get("seconds"))
    add("time", [] if seconds is None else [clock(seconds)])
    for name in ("devices", "versions"):
        add(name, [as_line(recorded(run, name) or run.summary.get(name))])
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    changes = _changes_html(origins)
    if not facts and not changes:
        return ""
    return f'<section class="card"><dl class="facts">{listed}</dl>{changes}</section>'


def _changes_html(origins: Mapping[str, Origin]) -> str:
    """Returns the config fields that differ from configs/base.py; those of all phases first."""
    if not origins:
        return ""
    every = [origin.changes for origin in origins.values()]
    shared = {
        name: value
        for name, value in every[0].items()
        if all(name in changes and changes[name] == value for changes in every)
    }
    rows = [["", escape(name), _value(value)] for name, value in shared.items()]
    for phase, origin in origins.items():
        rows += [
            [escape(phase), escape(name), _value(value)]
            for name, value in origin.changes.items()
            if name not in shared
        ]
    if not rows:
        return '<p class="note">The config is configs/base.py as it is.</p>'
    if len(origins) == 1:
        header, rows = ["field", "value"], [row[1:] for row in rows]
    else:
        header = ["phase", "field", "value"]
        rows = [[row[0] or "all", *row[1:]] for row in rows]
    opened = " open" if len(rows) <= SHOWN_CHANGES else ""
    title = f"{len(rows)} config fields differ from configs/base.py"
    title = title.replace("fields differ", "field differs") if len(rows) == 1 else title
    words = range(len(header))
    return (
        f"<details{opened}><summary>{title}</summary>{_table_html(header, rows, words)}</details>"
    )


def _value(value: Any) -> str:
    return f"<code>{escape(shortened(str(value), 300))}</code>"


def _stages_html(stages: Sequence[Stage]) -> str:
    """Returns a table of the phases, with the columns that any of them has."""
    columns = {
        "phase": [escape(stage.name) for stage in stages],
        "it learned": [escape(stage.learns) for stage in stages],
        "steps": [_steps(stage) for stage in stages],
        "tokens": [f"{s.tokens:,.0f}" if s.tokens is not None else "" for s in stages],
        "time": [duration(s.seconds) if s.seconds is not None else "" for s in stages],
        "tokens/s": [f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else "" for s in stages],
        "memory": [f"{s.memory_gib:.1f} GiB" if s.memory_gib is not None else "" for s in stages],
        "loss, first → last": [f"{s.first} → {s.last}" if s.first else "" for s in stages],
        "validation": [escape(stage.validation) for stage in stages],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    if not stages:
        return ""
    rows = list(map(list, zip(*shown.values(), strict=True)))
    words = [place for place, name in enumerate(shown) if name == "it learned"]
    table = _table_html(list(shown), rows, words)
    return f'<section><h2>Phases</h2><div class="card">{table}</div></section>'


def _steps(stage: Stage) -> str:
    unfinished = stage.steps < stage.of_steps
    return f"{stage.steps:,} of {stage.of_steps:,}" if unfinished else f"{stage.steps:,}"


def _table_html(
    header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()
) -> str:
    """Returns a table of cells that are HTML; on a narrow screen it scrolls.

    Args:
      words: the columns that are set like text.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="words"' if place in words else "" for place in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = cells("th", [escape(name) for name in header])
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _numbers_html(summary: Summary) -> str:
    """Returns the section of numbers, one table for each group of summary.json."""
    tables = []
    for title, rows in number_groups(summary):
        if title == "Run":  # stands on top
            continue
        lines = "".join(
            f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in rows
        )
        if lines:
            tables.append(f'<table class="card"><caption>{title}</caption>{lines}</table>')
    return f'<section class="numbers">{"".join(tables)}</section>' if tables else ""


def _section_html(section: Section) -> str:
    figures = "".join(map(_figure_html, section.panels))
    return f'<section><h2>{section.title}</h2><div class="panels">{figures}</div></section>'


def _figure_html(panel: Panel) -> str:
    title, caption = escape(panel.title), escape(panel.caption)
    names = "".join(
        f'<span><span class="swatch" style="--tone:var(--{color})"></span>{escape(name)}</span>'
        for name, color in panel.legend
    )
    legend = f'<div class="legend">{names}</div>' if names else ""
    return f"<figure><h3>{title}</h3>{legend}{panel.svg}<figcaption>{caption}</figcaption></figure>"


def _notes_html(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    lines = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"<section><h2>Left out</h2>{lines}</section>"
