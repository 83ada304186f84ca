"""launch.evaluate on the problems to train on, and launch.reinforce by what it found of them."""

import json
import shutil
from pathlib import Path

import chex
import pytest

from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.reporting import write_report
from experiment.schema import Config
from experiment.two_runs import compare
from launch import evaluate, reinforce
from rl.problems import problems_to_train
from rl.rewards import get_reward
from tests.launch.documented_metrics import JUDGED, check_documented
from tests.launch.test_evaluate_problems import on_one_device
from tests.launch.test_reinforce import lines, run_of
from tests.launch.test_training_commands import final_variables, stopped_at

pytestmark = pytest.mark.command

# Random bytes are never a right answer; this is right now and then, of some problems more often,
# and of a third of them alone where the thought was cut.
REWARD = """
def often(text, problem):
    number = int(problem.answer)
    thought = "time is up" not in text
    return float(sum(text.encode()) % 12 < number and (thought or number % 3 == 0))
"""
CHANGES = {
    "reinforce__task": "task:jsonl:train.jsonl#question,answer?validation=test.jsonl",
    "reinforce__prompts_per_step": 4,
    "reinforce__group_size": 2,
    "evaluate__reward": "own.py:often",
    "evaluate__problems": 1_000_000,
    "evaluate__samples": 8,
    "evaluate__bootstrap": 20,
    "evaluate__text_batches": 0,
    "evaluate__infill_documents": 0,
    "evaluate__thinking_answer_tokens": 6,
    "sampling__temperature": 1.2,
    "sampling__slots": 32,  # so that all evaluations have the same programs
}
HOT = {"evaluate__split": "train", "evaluate__thinking": (3, 1)}
BY_IT = {
    "reinforce__pass_rates_from": "hot",
    "reinforce__min_pass_rate": 0.1,
    "reinforce__max_pass_rate": 0.9,
    "reinforce__guessed": "left_out",
    "reinforce__order": "unsolved",
    "reinforce__retire_at": 0.8,
}


def of(**changes) -> Config:
    return run_of("often", **CHANGES | {"init_from": "start"} | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a run "start", "hot", its evaluation on twelve problems to train on, and
    "cold", one on four that are held out.
    """
    directory = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        on_one_device(patch)
        Path("own.py").write_text(REWARD)
        get_reward.cache_clear()
        for name, first, count in (("train", 0, 12), ("test", 20, 4)):
            problems = [
                {"question": f"{n}?", "answer": str(n)} for n in range(first, first + count)
            ]
            Path(f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
        assert reinforce.run(of(init_from="", train__steps=1), Path("start"))
        evaluate.run(of(**HOT), Path("hot"))
        evaluate.run(of(), Path("cold"))
    return directory


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    on_one_device(monkeypatch)


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_what_is_measured_is_what_a_run_trains_on(capsys):
    """With its ids, and the evaluation says so wherever its figures are."""
    config = of(**HOT)
    found = read("hot/problems.jsonl")
    tokenizer = load_tokenizer(Path("hot/tokenizer.json"))
    task, template = config.reinforce.task, config.data.chat_template
    trained = problems_to_train(task, config.sampling, tokenizer, template, config.seed).problems
    assert [line["id"] for line in found] == [problem.id for problem in trained]
    assert {line["split"] for line in found} == {"train"} and len(found) == 12
    assert len({line["solved"] for line in found}) > 2, "some are harder than others"
    assert json.loads(Path("hot/evaluation.json").read_text())["split"] == "train"
    assert json.loads(Path("cold/evaluation.json").read_text())["split"] == "validation"
    assert {line["id"] for line in read("cold/problems.jsonl")}.isdisjoint(
        line["id"] for line in found
    )


def test_a_measurement_is_told_from_held_out_figures(capsys):
    few = of(**HOT | {"evaluate__problems": 4, "evaluate__thinking": ()})
    evaluate.run(few, Path("few"))
    assert "4 training problems, 8 completions of each" in capsys.readouterr().out
    assert [line["id"] for line in read("few/problems.jsonl")] == [
        line["id"] for line in read("hot/problems.jsonl")[:4]
    ]
    with pytest.raises(UserError, match=r"--compare=hot,cold: one has training problems and the"):
        compare(Path("hot"), Path("cold"), Path("both"))
    assert compare(Path("hot"), Path("hot"), Path("both"))["a"]["split"] == "train"
    page = write_report(Path("hot")).read_text()
    assert "12 problems that it trains on × 8 samples" in page and "Held-out problems" not in page
    assert "held-out problems" not in page and "it has never seen" not in page
    assert "4 held-out problems × 8 samples" in write_report(Path("cold")).read_text()


def test_a_run_leaves_out_what_was_measured_so_and_goes_on_without_the_evaluation(
    monkeypatch, capsys
):
    """To the bit: it keeps what it has read of the evaluation, which is gone by then."""
    found = read("hot/problems.jsonl")
    guesses = {}
    for line in read("hot/thinking.jsonl"):
        if line["thinking"] == 1:
            guesses.setdefault(line["id"], []).append(line["reward"])
    kept = {
        line["id"]
        for line in found
        if 0.1 <= line["solved"] / 8 <= 0.9 and max(guesses[line["id"]]) < 1
    }
    assert 3 < len(kept) < 12
    config = of(**BY_IT)
    capsys.readouterr()
    assert reinforce.run(config, Path("whole"))
    said = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("pass rates")
    )
    assert said.startswith("pass rates  12 of 12 problems in hot; left out ")
    assert said.endswith(f"; {len(kept)} to train on")
    assert "guessed in 8 attempts, thinking 1 token" in said
    check_documented("whole", "order", JUDGED)
    first = lines("whole")[0]
    assert first["curriculum/tried"] == len(kept), "measured before the first step"
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        assert not reinforce.run(config, Path("parts"))
    shutil.move("hot", "gone")
    try:
        assert reinforce.run(config, Path("parts"))
    finally:
        shutil.move("gone", "hot")
    assert lines("parts") == lines("whole")
    chex.assert_trees_all_equal(
        final_variables(config, Path("parts")), final_variables(config, Path("whole"))
    )
    shown = {line["prompt"] for line in read("whole/traces.jsonl")}
    assert shown <= {line["question"] for line in found if line["id"] in kept}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"reinforce__pass_rates_from": "none"},
            "'none': no problems.jsonl of an evaluation there",
        ),
        (
            {"reinforce__pass_rates_from": "cold", "reinforce__guessed": "kept"},
            "'cold': none of the 12 problems of reinforce.task = 'task:jsonl:train.jsonl#.* was "
            "tried there; .* --config.evaluate.split=train",
        ),
        (
            {"reinforce__pass_rates_from": "cold"},
            r"'cold': forces no thought, so .* --config.evaluate.thinking=\"\(1,\)\"",
        ),
        (
            {"reinforce__guess_attempts": 9},
            "'hot': has 8 completions of a problem without a tho.*9",
        ),
        ({"evaluate__success": 0.5}, "'hot': a success there is .*1.0.*, and .*0.5.* here"),
        (
            {"reinforce__min_pass_rate": 0.95, "reinforce__max_pass_rate": 0.95},
            "'hot': leaves out all 12 problems: .* with a pass rate below 0.95",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_the_workdir_free(changes, message):
    with pytest.raises(UserError, match=f"^reinforce.pass_rates_from = {message}"):
        reinforce.run(of(**BY_IT | changes), Path("refused"))
    assert not Path("refused/config.json").exists()
    assert not Path("refused/pass_rates.json").exists()


def test_an_evaluation_whose_thoughts_are_gone_is_one_line(tmp_path):
    shutil.copytree("hot", tmp_path / "hot")
    (tmp_path / "hot" / "thinking.jsonl").unlink()
    there = str(tmp_path / "hot")
    with pytest.raises(UserError, match=r"no thinking.jsonl of an evaluation"):
        reinforce.run(of(**BY_IT | {"reinforce__pass_rates_from": there}), Path("refused"))
    (tmp_path / "hot" / "thinking.jsonl").write_text('{"thinking": 1, "id": "x"}\n')
    with pytest.raises(UserError, match=r"thinking.jsonl, line 1: no completion"):
        reinforce.run(of(**BY_IT | {"reinforce__pass_rates_from": there}), Path("refused"))


def test_a_run_evaluates_held_out_problems():
    with pytest.raises(
        UserError, match=r"evaluate.split = 'train': train.eval_every = 1 evaluates"
    ):
        reinforce.run(of(train__eval_every=1, evaluate__split="train"), Path("refused"))
