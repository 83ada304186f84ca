"""Puts report.html together: numbers, charts, and what the model wrote before and after.

One file that needs no network. What is missing is left out, and a line names it.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from errors import UserError
from files import write_text
from report.figures import COLORS
from report.panels import Panel, Section, sections
from report.results import Sample, Summary, read_phases, read_samples, read_summary
from report.table import number_groups

TEMPLATE = Path(__file__).parent / "page.html"
SHOWN_PROBLEMS = 6  # whose completions are shown


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html and returns its path.

    Raises:
      UserError: there is nothing to report, a file is no JSON, or the page cannot be written.
    """
    phases, summary = read_phases(workdir), read_summary(workdir)
    samples = {when: read_samples(workdir / when / "samples.jsonl") for when in ("before", "after")}
    if not phases and not summary and not any(samples.values()):
        raise UserError(
            f"{workdir}: nothing to report there (no summary.json, metrics.jsonl or samples.jsonl)"
        )
    body = [
        _numbers_html(summary),
        *map(_section_html, sections(phases, summary)),
        _samples_html(samples),
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(workdir.resolve().name),
        light="".join(f"--{name}:{light};" for name, (light, _) in COLORS.items()),
        dark="".join(f"--{name}:{dark};" for name, (_, dark) in COLORS.items()),
        body="\n".join(body),
    )
    path = workdir / "report.html"
    write_text(path, page)
    return path


def _numbers_html(summary: Summary) -> str:
    """Returns the section of numbers, one table for each group of summary.json."""
    groups = number_groups(summary)
    if not groups:
        return _missing_html("Numbers", "no summary.json")
    tables = []
    for title, rows in groups:
        lines = "".join(
            f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows
        )
        tables.append(f"<table><caption>{title}</caption>{lines}</table>")
    return f'<section class="numbers">{"".join(tables)}</section>'


def _section_html(section: Section) -> str:
    charts = [panel for panel in section.panels if panel.svg]
    missing = "".join(
        _missing_html(panel.title, panel.caption) for panel in section.panels if not panel.svg
    )
    figures = "".join(map(_figure_html, charts))
    grid = f'<div class="panels of-{section.columns}">{figures}</div>' if charts else ""
    return f"<section><h2>{section.title}</h2>{grid}{missing}</section>"


def _figure_html(panel: Panel) -> str:
    title, caption = html.escape(panel.title), html.escape(panel.caption)
    return f"<figure><h3>{title}</h3>{panel.svg}<figcaption>{caption}</figcaption></figure>"


def _missing_html(title: str, note: str) -> str:
    return f'<p class="missing"><b>{html.escape(title)}</b> {html.escape(note)}</p>'


def _samples_html(samples: Mapping[str, Sequence[Sample]]) -> str:
    """Shows the completions of the first held-out problems, which nobody picked, side by side.

    Args:
      samples: "before" and "after" -> the first completion of each problem.
    """
    title = "<h2>What it writes</h2>"
    by_prompt = {
        when: {sample["prompt"]: sample for sample in lines}
        for when, lines in samples.items()
        if lines
    }
    if not by_prompt:
        missing = _missing_html("Samples", "no before/samples.jsonl and after/samples.jsonl")
        return f"<section>{title}{missing}</section>"
    prompts = list(next(iter(by_prompt.values())))
    if len(by_prompt) == 2:
        prompts = [prompt for prompt in prompts if prompt in by_prompt["after"]] or prompts
    shown = [
        {when: found[prompt] for when, found in by_prompt.items() if prompt in found}
        for prompt in prompts[:SHOWN_PROBLEMS]
    ]
    legend = (
        '<span class="think">Thought</span> and <span class="answer">answer</span> are coloured.'
    )
    note = f'<p class="note">The first {len(shown)} problems, not chosen. {legend}</p>'
    return f"<section>{title}{note}{''.join(map(_problem_html, shown))}</section>"


def _problem_html(samples: Mapping[str, Sample]) -> str:
    """Shows one problem and the completion of each time, "before" and "after"."""
    first = next(iter(samples.values()))
    answer = first.get("answer")
    wanted = (
        "" if answer is None else f'<span class="wanted">answer: {html.escape(str(answer))}</span>'
    )
    sides = "".join(_completion_html(when, sample) for when, sample in samples.items())
    return (
        f'<article class="sample"><header><pre>{_highlight(first["prompt"])}</pre>{wanted}'
        f'</header><div class="sides">{sides}</div></article>'
    )


def _completion_html(when: str, sample: Sample) -> str:
    reward = sample.get("reward")
    badge = (
        ""
        if reward is None
        else f'<span class="reward {"good" if reward >= 1 else "bad"}">reward {reward:.2g}</span>'
    )
    completion = f'<pre class="completion">{_highlight(sample["completion"])}</pre>'
    return f"<div><h4>{when}{badge}</h4>{completion}</div>"


def _highlight(text: str) -> str:
    """Escapes a text, colours each block by its tag, and makes the markers of turns faint.

    A block that is not closed goes to the end.
    """
    blocks = r"&lt;(think|answer)&gt;.*?(?:&lt;/\1&gt;|\Z)"
    text = re.sub(
        blocks,
        lambda found: f'<span class="{found[1]}">{found[0]}</span>',
        html.escape(text),
        flags=re.DOTALL,
    )
    return re.sub(r"&lt;\|\w+\|&gt;", lambda found: f'<span class="marker">{found[0]}</span>', text)
