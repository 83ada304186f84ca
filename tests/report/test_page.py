"""The report shows what ran, nothing that did not, and needs nothing but itself."""

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from errors import UserError
from experiment.reporting import write_report
from report.results import Origin, read_run
from report.story import story
from report.table import print_table
from tests.report.workdirs import SUMMARY, write_quickstart
from train.metrics import Metrics

TITLES = (
    "Loss",
    "Fine-tuning loss",
    "Filling gaps",
    "Indexer divergence",
    "Attention kept",
    "Indexer gradient",
    "Load of the experts",
    "Busiest expert",
    "pass@k",
    "Reward",
    "Completion length",
    "Entropy",
    "Sampler and trainer apart",
    "Clipped tokens",
    "Groups without a signal",
    "Learning rate",
    "Gradient norm",
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    write_quickstart(workdir)
    return workdir


@pytest.fixture(scope="module")
def page(quickstart) -> str:
    return write_report(quickstart).read_text()


class WellFormed(HTMLParser):
    """Every tag closed in order; collects what would be fetched, and the text."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.text, self.charts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "action")
            and not (value or "").startswith(("#", "data:"))
        ]
        self.fetched += [tag] * (tag in ("link", "iframe", "object"))
        self.charts += [json.loads(value or "") for name, value in attrs if name == "data-hover"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def parsed(page: str) -> WellFormed:
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    return parser


def shown(page: str) -> list[str]:
    """The titles of the charts."""
    return re.findall(r"<figure><h3>(.*?)</h3>(?:<div class=\"legend\">.*?</div>)?<svg", page)


def test_whole_report_has_every_panel(page):
    assert sorted(shown(page)) == sorted(TITLES)


def test_page_is_well_formed_and_needs_no_network(page):
    assert parsed(page).fetched == []
    assert (
        "url(" not in page
        and "@import" not in page
        and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    )
    assert len(page) < 400_000


def test_charts_follow_the_theme(page):
    """No colour of its own in any chart: all are variables, which the dark theme sets anew."""
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) == len(TITLES)
    assert [
        color
        for chart in charts
        for color in re.findall(r"(?:fill|stroke)(?::|=\")(?!var\(--)[^;\"]+|#[0-9a-f]{6}", chart)
    ] == []
    assert page.count("--blue:#") == 2  # light and dark


def test_values_under_the_pointer_are_the_measured_ones(quickstart, page):
    charts = dict(zip(shown(page), re.findall(r"<svg.*?</svg>", page, re.DOTALL), strict=True))
    (hover,) = parsed(charts["Completion length"]).charts
    measured = {
        line["step"]: line["completions/mean_length"]
        for line in map(
            json.loads, (quickstart / "reinforce/metrics.jsonl").read_text().splitlines()
        )
    }
    (series,) = hover["series"]
    assert len(series["points"]) == 100
    for step, mean, *value in series["points"]:
        assert math.isclose((value or [mean])[0], measured[step], rel_tol=1e-3)
    (hover,) = parsed(charts["Loss"]).charts
    assert hover["phases"] == [[0, "pretrain"], [300, "warmup"], [380, "sparse"]]
    (hover,) = parsed(charts["Load of the experts"]).charts
    assert len(hover["cells"]) == 5 and len(hover["cells"][0]) == 8


def test_numbers_are_there(page):
    for number in (
        "6.24 → 2.41 nats/token",
        "1,228,800",
        "91% (at random 26%)",
        "64 of 256",
        "dr_grpo",
        "21.3% → 67.1%",
        "128 held-out problems × 8",
        "0.560 of left to right, 0.510 of withheld",
    ):
        assert number in page
    assert "0:14:03" in page and "jax 0.12.0.1, flax 0.12.12" in page


def test_validation_stands_for_each_phase(quickstart, page):
    table = page.partition("<h2>Phases</h2>")[2].partition("</table>")[0]
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", table))
    assert list(rows) == ["pretrain", "warmup", "sparse", "finetune", "reinforce"]
    for phase in ("pretrain", "sparse", "finetune"):
        lines = [
            json.loads(line)
            for line in (quickstart / phase / "metrics.jsonl").read_text().splitlines()
        ]
        last = [line["validation_lm"] for line in lines if "validation_lm" in line][-1]
        assert f"<td>{last:.2f}</td>" in rows[phase]


def test_first_sentence_says_what_was_trained_how_long_and_what_it_shows(page):
    lead = page.partition('<p class="lead">')[2].partition("</p>")[0]
    assert lead.startswith("A language model learned to predict text, ")
    assert "in 14 min 3 s (750 steps): it solves 67% of problems that it has never seen" in lead
    assert "21% before it learned from rewards." in lead


def test_first_sentence_of_a_run_that_goes_on(tmp_path):
    with Metrics(tmp_path, "pretrain") as metrics:
        for step in range(1, 31):
            metrics.write(step, {"lm": 7.0 - step / 10, "loss": 7.0})
    origin = Origin(
        "pretrain",
        steps=100,
        init_from="runs/a",
        starts=[{"time": 0.0, "parameters": 1_234_567}],
    )
    run = read_run(tmp_path, lambda _: origin)
    assert story(run)[0].startswith(
        "A language model of 1.23 million parameters that began as runs/a learned to predict text "
    )
    assert story(run)[0].endswith(
        "(30 of 100 steps): at each step through the text that it is trained on it is as unsure of "
        "the next token as if it chose among 55 equally likely ones; at the very start, among 992."
    )


def test_samples_are_escaped_and_coloured(page):
    assert (
        '<span class="think">&lt;think&gt;0 + 0' in page
        and '<span class="answer">&lt;answer&gt;' in page
    )
    assert "less &lt; more?" in page and '<span class="marker">&lt;|user|&gt;</span>' in page
    assert page.count('<article class="sample">') == 6


def test_same_data_same_page(quickstart, page):
    assert write_report(quickstart).read_text() == page
    left = [path.name for path in quickstart.iterdir() if "report.html" in path.name]
    assert left == ["report.html"], "no temporary file is left"


@pytest.mark.parametrize("phase", ["pretrain", "sparse", "reinforce"])
def test_only_what_ran_is_shown(quickstart, phase):
    page = write_report(quickstart / phase).read_text()
    expected = {
        "pretrain": {"Loss", "Load of the experts", "Busiest expert"},
        "sparse": {
            "Loss",
            "Indexer divergence",
            "Attention kept",
            "Load of the experts",
            "Busiest expert",
        },
        "reinforce": {
            "Reward",
            "Completion length",
            "Entropy",
            "Sampler and trainer apart",
            "Clipped tokens",
            "Groups without a signal",
            "Indexer gradient",
            "Load of the experts",
        },
    }
    assert set(shown(page)) - {"Gradient norm", "Learning rate"} == expected[phase]
    text = " ".join(parsed(page).text)
    for absent in ("no summary.json", "metrics.jsonl", "What it writes", "seed", "None", "nan"):
        assert absent not in text
    assert ("Sparse attention" in text) == (phase != "pretrain")
    assert ("reward" in text) == (phase == "reinforce")


def test_half_a_summary(tmp_path):
    """A run that never came to RL, and one line of metrics that is all NaN."""
    summary = {
        "pretrain": {"loss_first": 6.0, "loss_last": None},
        "reinforce": {"pass_at_k_after": SUMMARY["reinforce"]["pass_at_k_after"]},
        "seconds": None,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(1, {"lm": math.nan, "expert_load_max": 1.0})
    page = write_report(tmp_path).read_text()
    assert shown(page) == ["Busiest expert", "pass@k"]
    assert "pretrain: 1 of 1 values of lm are no finite numbers and are left out" in page


def test_large_model_and_long_run_keep_the_page_small(tmp_path):
    """58 layers of 256 experts, and 20,000 steps: not a shape for each."""
    random.seed(0)
    with Metrics(tmp_path, "pretrain") as metrics:
        metrics.write(
            1, {"expert_load": [[random.random() for _ in range(256)] for _ in range(58)]}
        )
    lines = [
        json.dumps(
            {"step": step, "stage": "pretrain", "time": step, "loss": 1, "lm": random.random()}
        )
        for step in range(2, 20_000)
    ]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    page = write_report(tmp_path).read_text()
    assert {"Load of the experts", "Loss"} == set(shown(page)) and len(page) < 500_000


def test_traces_and_infills_are_shown_where_they_are_recorded(tmp_path):
    with Metrics(tmp_path, "reinforce") as metrics:
        metrics.write(1, {"reward": 0.5})
    traces = [
        {"step": step, "prompt": f"p{step}", "completion": f"<b>{step}", "reward": 1.0}
        for step in range(1, 101)
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(one) + "\n" for one in traces))
    infill = {"source": "s", "prefix": "a <", "middle": "b", "suffix": "> c", "completion": "d&"}
    (tmp_path / "infills.jsonl").write_text(json.dumps(infill) + "\n")
    page = write_report(tmp_path).read_text()
    assert re.findall(r">step (\d+)<", page) == ["1", "21", "41", "60", "80", "100"]
    assert "&lt;b&gt;100" in page and "<b>100" not in page
    assert 'a &lt;</span><span class="filled">d&amp;</span><span class="around">&gt; c' in page


def test_a_trace_shows_what_its_parts_are(tmp_path):
    """By colour, whatever is in the file; what a tool said is not the policy's, tags or no tags."""
    parts = [
        {"part": "prompt", "text": "not shown"},
        {"part": "thought", "text": "<think>a"},
        {"part": "injected", "text": "stop"},
        {"part": "tool", "text": "<answer>5</answer>"},
        {"part": 'own"s', "text": "<b>"},
        {"part": "answer"},
        7,
    ]
    trace = {"step": 1, "prompt": "p", "completion": "unused", "reward": 1.0, "parts": parts}
    (tmp_path / "traces.jsonl").write_text(json.dumps(trace) + "\n")
    page = write_report(tmp_path).read_text()
    assert (
        '<pre class="completion"><span class="think" title="thought">&lt;think&gt;a</span>'
        '<span class="injected" title="injected">stop</span>'
        '<span class="tool" title="tool">&lt;answer&gt;5&lt;/answer&gt;</span>'
        '<span class="model" title="own&quot;s">&lt;b&gt;</span></pre>'
    ) in page
    assert "not shown" not in page and "unused" not in page
    legend = re.findall(r"Parts: (.*?)</p>", page)
    assert [re.sub("<.*?>", "", words) for words in legend] == [
        "thought, read from a tool, put into its mouth."
    ]


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="nothing to report there"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no such directory"):
        write_report(tmp_path / "none")


def test_it_can_be_written_elsewhere(quickstart, tmp_path):
    assert write_report(quickstart, out=tmp_path / "x.html").read_text().startswith("<!doctype")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out=FILE"):
        write_report(quickstart, out=tmp_path / "file/x.html")


def test_table_on_the_terminal():
    out = io.StringIO()
    print_table(SUMMARY, Console(file=out, width=100))
    text = out.getvalue()
    assert "Pretraining" in text and "21.3% → 67.1%" in text and "0:14:03" in text
    out.truncate(0)
    print_table({}, Console(file=out))
    assert not out.getvalue().strip("\0")


def test_the_speed_before_the_second_step_is_not_measured(tmp_path):
    with Metrics(tmp_path, "pretrain") as metrics:
        for step, speed in ((1, 0.0), (2, 5.0), (3, 6.0)):
            metrics.write(step, {"lm": 1.0, "tokens_per_s": speed})
    page = write_report(tmp_path).read_text()
    charts = dict(zip(shown(page), parsed(page).charts, strict=True))
    assert charts["Speed"]["series"][0]["points"] == [[2, 5], [3, 6]]
