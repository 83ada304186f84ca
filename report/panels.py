"""The sections of a report and their charts, each made from what a run left behind.

A chart whose data are missing is left out, and so is a section without charts.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from report.curves import (
    EXPERT_LOAD_MAX,
    FINETUNE_LOSS,
    INDEXER,
    LOSS,
    OPTIMIZATION,
    PAIRS,
    REINFORCE,
    REWARD,
    VALIDATION,
    Curve,
    Panel,
    curves_panel,
    overlaid_panel,
    phases_with,
)
from report.held_out import held_out_panels, training_panels
from report.lenient import mapping, matrix, number
from report.results import PhaseMetrics, Run, Summary, text_phases
from report.svg import PALETTE, Look, Series, heat_map, interval_chart, line_chart
from report.table import SAVINGS

# What the pages of several runs show: of the phases that learn from text, and of all.
OF_TEXT = (LOSS, VALIDATION, EXPERT_LOAD_MAX)
OF_ALL = (*INDEXER, REWARD, *REINFORCE, *OPTIMIZATION)


class Section(NamedTuple):
    """A titled group of panels."""

    title: str
    panels: list[Panel]


def sections(run: Run) -> list[Section]:
    """Returns the sections of the page of one run, in order."""
    reinforce = phases_with(run.phases, "reward")
    text = text_phases(run.phases)
    finetune = {name: lines for name, lines in run.phases.items() if name == "finetune"}
    experts = text or finetune or reinforce
    found = {
        "Learning from text": [
            curves_panel(text, LOSS),
            curves_panel(finetune, FINETUNE_LOSS),
            infilling(run.summary),
        ],
        "Learning from pairs": [curves_panel(finetune, chart) for chart in PAIRS],
        "Sparse attention": [curves_panel(run.phases, chart) for chart in INDEXER],
        "Experts": [expert_load(experts), curves_panel(experts, EXPERT_LOAD_MAX)],
        "Learning from rewards": [
            pass_at_k(run.summary),
            rewards(reinforce),
            *(curves_panel(reinforce, chart) for chart in REINFORCE),
        ],
        "Held-out problems": held_out_panels(run.measured),
        "Problems that it trains on": training_panels(run.measured),
        "How the training ran": [curves_panel(run.phases, chart) for chart in OPTIMIZATION],
    }
    shown = [
        Section(title, [panel for panel in panels if panel]) for title, panels in found.items()
    ]
    return [section for section in shown if section.panels]


def overlaid_sections(runs: Sequence[Run], colors: Sequence[str]) -> list[Section]:
    """Returns the one section of a page of several runs: a curve for each run in each chart."""
    text = [text_phases(run.phases) for run in runs]
    every = [run.phases for run in runs]
    names = [run.name for run in runs]
    panels = [
        overlaid_panel(names, text if chart in OF_TEXT else every, colors, chart)
        for chart in (*OF_TEXT, *OF_ALL)
    ]
    shown = [panel for panel in panels if panel]
    return [Section("Curves", shown)] if shown else []


def rewards(phases: PhaseMetrics) -> Panel | None:
    """Draws the total reward, and each reward by its name."""
    metrics = {name for lines in phases.values() for line in lines for name in line}
    found = (re.fullmatch(r"rewards/(.+)/mean", name) for name in metrics)
    named = sorted((match[1], match[0]) for match in found if match)
    curves = [
        Curve(metric, name, PALETTE[place % len(PALETTE)])
        for place, (name, metric) in enumerate(named, 1)
    ]
    return curves_panel(phases, REWARD._replace(curves=(*REWARD.curves, *curves)))


def infilling(summary: Summary) -> Panel | None:
    """Draws what the suffix saves of each source's held-out middles, over each baseline."""
    rows = []
    for source, losses in mapping(mapping(summary.get("pretrain")).get("infilling")).items():
        for name, baseline in SAVINGS.items():
            saved = mapping(mapping(losses).get(name))
            values = [number(saved.get(key)) for key in ("mean", "low", "high")]
            if None not in values:
                rows.append((f"{source.partition('?')[0]}, {baseline}", *values))
    if not rows:
        return None
    caption = (
        "How much easier a gap in unseen text is to fill when what follows it is shown; bars are "
        "95 % intervals, and one right of 0 shows that it is used"
    )
    svg = interval_chart(rows, f"Infilling. {caption}", "nats per token that the suffix saves")
    return Panel("Filling gaps", svg, caption)


def expert_load(phases: PhaseMetrics) -> Panel | None:
    """Draws the last load of each expert of each layer."""
    loads = [
        (phase, load)
        for phase, lines in phases.items()
        for line in lines
        if (load := matrix(line.get("expert_load"))) is not None
    ]
    if not loads:
        return None
    phase, load_LE = loads[-1]
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    load_LE = load_LE / np.where(mean_L1 > 0, mean_L1, 1.0)
    caption = (
        f"Tokens that each expert of each layer gets, over an even share, at the end of {phase}: "
        "orange more, blue fewer"
    )
    return Panel("Load of the experts", heat_map(load_LE, f"Load. {caption}"), caption)


def pass_at_k(summary: Summary) -> Panel | None:
    """Draws pass@k before and after reinforcement learning."""
    numbers = mapping(summary.get("reinforce"))
    series, ks = [], set()
    for when, color in (("before", "muted"), ("after", "blue")):
        found = numbers.get(f"pass_at_k_{when}")
        rows = [
            [number(mapping(row).get(name)) for name in ("k", "mean", "low", "high")]
            for row in (found if isinstance(found, list) else [])
        ]
        rows = [row for row in rows if None not in row and (row[0] or 0) >= 1]
        if rows:
            k, mean, low, high = np.array(rows, float).T
            ks |= {float(one) for one in k}
            series.append(Series(when, color, np.log2(k), mean, mean, band=(low, high)))
    if not series:
        return None
    caption = (
        "Share of held-out problems that one of k completions solves; bands are 95 % intervals"
    )
    look = Look(
        xlabel="k",
        from_zero=True,
        percent=True,
        xticks={float(np.log2(k)): f"{k:g}" for k in sorted(ks)},
    )
    svg = line_chart(series, look, f"pass@k. {caption}")
    legend = tuple((one.name, one.color) for one in series) if len(series) > 1 else ()
    return Panel("pass@k", svg, caption, legend)
