"""What a model wrote, as parts of a page: completions before and after, by step, and in gaps."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from report.escape import escape
from report.lenient import mapping, number
from report.results import HELD_OUT, Sample

SHOWN_PROBLEMS = 6  # whose completions are shown
SHOWN_STEPS = 6  # of training, whose completions are shown
SHOWN_GAPS = 4
LONGEST = 6_000  # characters of a text
LEGEND = '<span class="think">Thought</span> and <span class="answer">answer</span> are coloured.'
# What a part of a completion is -> its class on the page, and what the legend says.
PARTS = {
    "model": ("model", "written by the model"),
    "thought": ("think", "thought"),
    "answer": ("answer", "answer"),
    "tool_call": ("call", "call of a tool"),
    "tool": ("tool", "read from a tool"),
    "injected": ("injected", "put into its mouth"),
}


def samples_html(samples: Mapping[str, Sequence[Sample]], which: str = HELD_OUT) -> str:
    """Shows the completions of the first problems, which nobody picked, side by side.

    Args:
      which: problems they are, in words.
      samples: "before", "after" or "" -> the first completion of each problem.
    """
    by_prompt = {
        when: {sample["prompt"]: sample for sample in lines}
        for when, lines in samples.items()
        if lines
    }
    if not by_prompt:
        return ""
    prompts = list(next(iter(by_prompt.values())))
    if len(by_prompt) > 1:
        everywhere = [p for p in prompts if all(p in found for found in by_prompt.values())]
        prompts = everywhere or prompts
    shown = [
        {when: found[prompt] for when, found in by_prompt.items() if prompt in found}
        for prompt in prompts[:SHOWN_PROBLEMS]
    ]
    first = (
        f"The first {len(shown)} of the {which}" if len(shown) > 1 else f"The first of the {which}"
    )
    note = f'<p class="note">{first}, not chosen. {LEGEND}</p>'
    return f"<section><h2>What it writes</h2>{note}{''.join(map(_problem_html, shown))}</section>"


def traces_html(traces: Sequence[Sample]) -> str:
    """Shows what was written for the first problem of some steps of training."""
    by_step: dict[float, list[Sample]] = {}
    for trace in traces:
        by_step.setdefault(trace["step"], []).append(trace)
    if not by_step:
        return ""
    steps = sorted(by_step)
    places = np.unique(np.linspace(0, len(steps) - 1, SHOWN_STEPS).round().astype(int))
    articles, shown = [], []
    for step in (steps[place] for place in places):
        first = by_step[step][0]
        same = [trace for trace in by_step[step] if trace["prompt"] == first["prompt"]]
        shown += same[:2]
        sides = "".join(_completion_html("", sample) for sample in same[:2])
        articles.append(_article_html(first, sides, f"step {step:,g}"))
    what = "Completions that it learned from, of the first problem of a step."
    note = f'<p class="note">{what} {_legend(shown)}</p>'
    return f"<section><h2>What it wrote as it learned</h2>{note}{''.join(articles)}</section>"


def infills_html(infills: Sequence[Sample]) -> str:
    """Shows gaps of held-out documents: what the model writes there, and what stood there."""
    articles = []
    for infill in infills[:SHOWN_GAPS]:
        written = infill.get("completion")
        if not isinstance(written, str):
            continue
        source = escape(_cut(str(infill.get("source", ""))))
        sides = "".join(
            f'<div><h4>{title}</h4><pre class="completion"><span class="around">'
            f'{escape(_cut(infill["prefix"], end=True))}</span><span class="filled">'
            f'{escape(_cut(middle))}</span><span class="around">{escape(_cut(infill["suffix"]))}'
            "</span></pre></div>"
            for title, middle in (
                ("what it writes", written),
                ("what stood there", infill["middle"]),
            )
        )
        header = f'<header><span class="wanted">{source}</span></header>'
        articles.append(
            f'<article class="sample">{header}<div class="sides">{sides}</div></article>'
        )
    if not articles:
        return ""
    note = (
        '<p class="note">Gaps in texts that it was not trained on, the first ones and not chosen. '
        'It reads what is grey, on both sides, and writes what is <span class="filled">green'
        "</span>.</p>"
    )
    return f"<section><h2>How it fills a gap</h2>{note}{''.join(articles)}</section>"


def _problem_html(samples: Mapping[str, Sample]) -> str:
    """Shows one problem and the completion of each time, "before" and "after"."""
    sides = "".join(_completion_html(when, sample) for when, sample in samples.items())
    return _article_html(next(iter(samples.values())), sides)


def _article_html(sample: Sample, sides: str, label: str = "") -> str:
    answer = sample.get("answer")
    wanted = " · ".join(
        ([label] if label else [])
        + ([f"answer: {_cut(str(answer))}"] if answer is not None else [])
    )
    return (
        f'<article class="sample"><header><pre>{_highlight(sample["prompt"])}</pre>'
        f'<span class="wanted">{escape(wanted)}</span></header>'
        f'<div class="sides">{sides}</div></article>'
    )


def _completion_html(when: str, sample: Sample) -> str:
    reward = number(sample.get("reward"))
    tone = "" if reward is None else "good" if reward >= 1 else "bad"
    badge = "" if reward is None else f'<span class="reward {tone}">reward {reward:.2g}</span>'
    written = _parts_html(parts) if (parts := _parts(sample)) else _highlight(sample["completion"])
    completion = f'<pre class="completion">{written}</pre>'
    title = f"<h4>{when}{badge}</h4>" if when or badge else ""
    return f"<div>{title}{completion}</div>"


def _parts(sample: Sample) -> list[tuple[str, str]]:
    """Returns (what it is, text) of the parts of a completion; [] where none are recorded."""
    parts = sample.get("parts")
    found = [mapping(part) for part in parts] if isinstance(parts, list) else []
    pairs = [(part.get("part"), part.get("text")) for part in found]
    return [(str(part), text) for part, text in pairs if part != "prompt" and isinstance(text, str)]


def _parts_html(parts: Sequence[tuple[str, str]]) -> str:
    """Shows the parts of a completion, each in the colour of what it is."""
    shown, left = [], LONGEST
    for part, text in parts:
        css, _ = PARTS.get(part, ("model", ""))
        written = _faint_markers(_cut(text, most=left))
        shown.append(f'<span class="{css}" title="{escape(part)}">{written}</span>')
        left -= len(text)
        if left < 0:
            break
    return "".join(shown)


def _legend(samples: Sequence[Sample]) -> str:
    """Says what the colours of the parts of completions mean, of those that occur."""
    found = {part for sample in samples for part, _ in _parts(sample)}
    if not found:
        return LEGEND
    words = [
        f'<span class="{css}">{text}</span>' for part, (css, text) in PARTS.items() if part in found
    ]
    return f"Parts: {', '.join(words)}."


def _faint_markers(text: str) -> str:
    """Escapes a text, with the markers of turns faint."""
    marker = r"&lt;\|\w+\|&gt;"
    return re.sub(marker, lambda found: f'<span class="marker">{found[0]}</span>', escape(text))


def _highlight(text: str) -> str:
    """Escapes a text, colours each block by its tag, and makes the markers of turns faint.

    A block that is not closed goes to the end.
    """
    blocks = r"&lt;(think|answer)&gt;.*?(?:&lt;/\1&gt;|\Z)"
    return re.sub(
        blocks,
        lambda found: f'<span class="{found[1]}">{found[0]}</span>',
        _faint_markers(_cut(text)),
        flags=re.DOTALL,
    )


def _cut(text: str, end: bool = False, most: int = LONGEST) -> str:
    """Returns a text without what is beyond the most that is shown; with `end`, its end."""
    if len(text) <= most:
        return text
    return f"… {text[-most:]}" if end else f"{text[:most]} …"
