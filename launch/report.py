"""What a run came to, on one page: numbers, curves, and what the model wrote before and after.

    python -m launch.report --workdir=runs/quickstart
    python -m launch.report --workdir=runs/pretrain

Writes WORKDIR/report.html, one file that needs no network. Reads what it finds:
WORKDIR/summary.json, metrics.jsonl in WORKDIR and in its stages' directories (copying, pretrain,
warmup, sparse, finetune, reinforce), and {before,after}/samples.jsonl. What is missing is said in a
line and left out.
"""

import html
import json
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table

from errors import UserError
from experiment.command_line import command
from report.figures import COLORS
from report.panels import SAVINGS, Panel, Runs, Section, Summary, sections
from train.metrics import read_metrics

STAGES = (
    "copying",
    "pretrain",
    "warmup",
    "sparse",
    "finetune",
    "reinforce",
)  # in the order they run
SAVINGS_SHOWN = "{:.3f} of left to right, {:.3f} of withheld"
TRACES = 6  # problems whose completions are shown

Row = tuple[str, str]  # what, how much


def run(workdir: Path) -> None:
    print_table(read_summary(workdir))
    print(f"wrote {write_report(workdir)}")


def write_report(workdir: Path) -> Path:
    """Writes workdir/report.html and returns its path.

    Raises:
      UserError: there is nothing to report, or a file that is no JSON.
    """
    runs, summary = read_runs(workdir), read_summary(workdir)
    traces = {when: _read_samples(workdir / when / "samples.jsonl") for when in ("before", "after")}
    if not runs and not summary and not any(traces.values()):
        raise UserError(
            f"{workdir}: nothing to report there (no summary.json, metrics.jsonl or samples.jsonl)"
        )
    body = [_numbers(summary), *map(_section, sections(runs, summary)), _traces(traces)]
    template = Template((Path(__file__).parent / "report_page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=html.escape(workdir.resolve().name),
        light="".join(f"--{name}:{light};" for name, (light, _) in COLORS.items()),
        dark="".join(f"--{name}:{dark};" for name, (_, dark) in COLORS.items()),
        body="\n".join(body),
    )
    path, unfinished = workdir / "report.html", workdir / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def print_table(summary: Summary, console: Console | None = None) -> None:
    """The numbers of summary.json on the terminal; nothing if there are none."""
    groups = number_groups(summary)
    if not groups:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for index, (title, rows) in enumerate(groups):
        if index:
            table.add_row()
        table.add_row(f"[bold]{title}")
        for name, value in rows:
            table.add_row(f"  {name}", value)
    (console or Console()).print(table)


def read_runs(workdir: Path) -> Runs:
    """The metrics of a workdir: a stage's own, or one that has a directory for each of its
    stages.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for directory in (workdir, *(workdir / stage for stage in STAGES)):
        if (directory / "metrics.jsonl").is_file():
            for line in read_metrics(directory / "metrics.jsonl"):
                runs.setdefault(
                    line["stage"] if directory == workdir else directory.name, []
                ).append(line)
    return runs


def read_summary(workdir: Path) -> Summary:
    """The numbers of a workdir, {} if it has none. Raises UserError if they are no JSON."""
    path = workdir / "summary.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as failure:
        raise UserError(f"{path}: not a JSON object ({failure})") from failure


def number_groups(summary: Summary) -> list[tuple[str, list[Row]]]:
    """The numbers as a person reads them, [(title, rows)]; without those that are missing."""
    pretrain, indexer, reinforce = (
        summary.get(name) or {} for name in ("pretrain", "indexer", "reinforce")
    )
    seconds = summary.get("seconds")
    groups = [
        (
            "Pretraining",
            [
                _row(
                    "loss, first → last",
                    "{:.2f} → {:.2f} nats/token",
                    pretrain,
                    "loss_first",
                    "loss_last",
                ),
                _row("tokens", "{:,}", pretrain, "tokens"),
                _row("speed", "{:,.0f} tokens/s", pretrain, "tokens_per_s"),
                _row(
                    "loss of a held-out middle",
                    "{:.3f} with the suffix, {:.3f} without",
                    pretrain,
                    "middle_loss_with_suffix",
                    "middle_loss_without_suffix",
                ),
                *(
                    _row(
                        f"suffix saves, {source.partition('?')[0]}",
                        SAVINGS_SHOWN,
                        {name: losses[name]["mean"] for name in SAVINGS},
                        *SAVINGS,
                    )
                    for source, losses in (pretrain.get("infilling") or {}).items()
                ),
            ],
        ),
        (
            "Sparse attention",
            [
                _row(
                    "attention mass kept",
                    "{:.0%} (at random {:.0%})",
                    indexer,
                    "recall",
                    "recall_random",
                ),
                _row("keys per query", "{} of {}", indexer, "topk", "context"),
            ],
        ),
        (
            "Reinforcement learning",
            [
                _row("algorithm", "{}", reinforce, "algorithm"),
                _row(
                    "pass@1, before → after",
                    "{:.1%} → {:.1%}",
                    reinforce,
                    "pass@1_before",
                    "pass@1_after",
                ),
                _row(
                    "pass@8, before → after",
                    "{:.1%} → {:.1%}",
                    reinforce,
                    "pass@8_before",
                    "pass@8_after",
                ),
                _row(
                    "measured on",
                    "{} held-out problems × {} samples",
                    reinforce,
                    "problems",
                    "samples",
                ),
            ],
        ),
        (
            "Run",
            [
                _row("time", "{}", {"time": seconds and timedelta(seconds=round(seconds))}, "time"),
                *(
                    _row(name, "{}", {name: _listed(summary.get(name))}, name)
                    for name in ("devices", "versions")
                ),
            ],
        ),
    ]
    shown = [(title, [row for row in rows if row]) for title, rows in groups]
    return [(title, rows) for title, rows in shown if rows]


def _row(name: str, form: str, numbers: Mapping[str, Any], *keys: str) -> Row | None:
    values = [numbers.get(key) for key in keys]
    return None if None in values else (name, form.format(*values))


def _listed(value: Any) -> str | None:
    """A value, a list or a table of versions, on one line."""
    if isinstance(value, Mapping):
        value = [f"{name} {version}" for name, version in value.items()]
    return value and (", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """The first completion of each problem, in order; [] without the file."""
    if not path.is_file():
        return []
    first: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            first.setdefault(sample["prompt"], sample | {"completion": str(sample["completion"])})
        except (ValueError, TypeError, KeyError) as failure:
            raise UserError(
                f'{path}:{number}: not a sample; a line has "prompt", "completion", "reward" and "answer"'
            ) from failure
    return list(first.values())


def _numbers(summary: Summary) -> str:
    groups = number_groups(summary)
    if not groups:
        return _missing("Numbers", "no summary.json")
    tables = []
    for title, rows in groups:
        lines = "".join(
            f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows
        )
        tables.append(f"<table><caption>{title}</caption>{lines}</table>")
    return f'<section class="numbers">{"".join(tables)}</section>'


def _section(section: Section) -> str:
    charts = [panel for panel in section.panels if panel.svg]
    notes = "".join(
        _missing(panel.title, panel.caption) for panel in section.panels if not panel.svg
    )
    figures = "".join(map(_figure, charts))
    grid = f'<div class="panels of-{section.columns}">{figures}</div>' if charts else ""
    return f"<section><h2>{section.title}</h2>{grid}{notes}</section>"


def _figure(panel: Panel) -> str:
    return f"<figure><h3>{html.escape(panel.title)}</h3>{panel.svg}<figcaption>{html.escape(panel.caption)}</figcaption></figure>"


def _missing(title: str, note: str) -> str:
    return f'<p class="missing"><b>{html.escape(title)}</b> {html.escape(note)}</p>'


def _traces(samples: Mapping[str, list[dict[str, Any]]]) -> str:
    """The first problems of the held-out ones, not chosen: what was written for each, before beside
    after.
    """
    title = "<h2>What it writes</h2>"
    found = {
        when: {sample["prompt"]: sample for sample in lines}
        for when, lines in samples.items()
        if lines
    }
    if not found:
        return f"<section>{title}{_missing('Samples', 'no before/samples.jsonl and after/samples.jsonl')}</section>"
    prompts = list(next(iter(found.values())))
    if len(found) == 2:
        prompts = [prompt for prompt in prompts if prompt in found["after"]] or prompts
    cards = []
    for prompt in prompts[:TRACES]:
        sides = "".join(
            _trace(when, found[when][prompt]) for when in found if prompt in found[when]
        )
        answer = next(iter(found.values()))[prompt].get("answer")
        wanted = (
            ""
            if answer is None
            else f'<span class="wanted">answer: {html.escape(str(answer))}</span>'
        )
        cards.append(
            f'<article class="trace"><header><pre>{_coloured(prompt)}</pre>{wanted}</header><div class="sides">{sides}</div></article>'
        )
    legend = (
        '<span class="think">Thought</span> and <span class="answer">answer</span> are coloured.'
    )
    note = f'<p class="note">The first {len(cards)} problems, not chosen. {legend}</p>'
    return f"<section>{title}{note}{''.join(cards)}</section>"


def _trace(when: str, sample: Mapping[str, Any]) -> str:
    reward = sample.get("reward")
    badge = (
        ""
        if reward is None
        else f'<span class="reward {"good" if reward >= 1 else "bad"}">reward {reward:.2g}</span>'
    )
    return f'<div><h4>{when}{badge}</h4><pre class="completion">{_coloured(sample["completion"])}</pre></div>'


def _coloured(text: str) -> str:
    """Escaped, with each block in the colour of its tag (a block that is not closed goes to the
    end), and the markers of turns faint.
    """
    blocks = r"&lt;(think|answer)&gt;.*?(?:&lt;/\1&gt;|\Z)"
    text = re.sub(
        blocks,
        lambda found: f'<span class="{found[1]}">{found[0]}</span>',
        html.escape(text),
        flags=re.DOTALL,
    )
    return re.sub(r"&lt;\|\w+\|&gt;", lambda found: f'<span class="marker">{found[0]}</span>', text)


if __name__ == "__main__":
    command(run, config="none")
