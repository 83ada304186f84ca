"""launch.evaluate on problems: several temperatures, forced thoughts, two runs, perplexity."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from errors import UserError
from experiment import scaling_runs, setup
from experiment.evaluated import read_outcomes, read_written
from experiment.inputs import model_config
from experiment.schema import Config, parse
from experiment.two_runs import compare, crossing_words, same_problems
from launch import evaluate, reinforce
from model.sharding import make_mesh
from rl.rewards import get_reward
from tests.launch.test_training_commands import tiny

pytestmark = pytest.mark.command

# Random bytes are never a right answer: a reward that some completions earn and some do not.
REWARD = "def even(text, problem):\n    return float(len(text.encode()) % 2 == 0)\n"
CHANGES = {
    "model__num_nextn_predict_layers": 0,
    "train__stage": "dense",
    "train__steps": 3,
    "train__eval_batches": 0,
    "train__eval_every": 1,
    "train__learning_rate": 1e-2,
    "sampling__attention": "dense",
    "reinforce__rewards": {"own.py:even": 1.0},
    "evaluate__reward": "own.py:even",
    "evaluate__problems": 6,
    "evaluate__samples": 4,
    "evaluate__bootstrap": 50,
    "evaluate__infill_documents": 0,
}


def run_of(**changes) -> Config:
    return tiny(**CHANGES | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a run "rl", evaluated at two temperatures and with forced thoughts, and with
    an evaluation "one" of the same at one temperature.
    """
    directory = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        on_one_device(patch)
        Path("own.py").write_text(REWARD)
        get_reward.cache_clear()
        assert reinforce.run(run_of(), Path("rl"))
        grid = {"evaluate__temperatures": (1.0, 0.0), "evaluate__thinking": (3, 6)}
        evaluate.run(run_of(**grid), Path("rl"))
        again = dataclasses.replace(run_of(), init_from="rl")
        evaluate.run(again, Path("one"))
    return directory


def on_one_device(patch) -> None:
    """One compiles in half the time of eight."""
    patch.setattr(setup, "make_mesh", lambda mesh, _=None: make_mesh(mesh, jax.devices()[:1]))
    patch.setattr("experiment.open_model.make_mesh", lambda m: make_mesh(m, jax.devices()[:1]))


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    on_one_device(monkeypatch)


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def found_in(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_each_temperature_has_its_figures_and_the_first_stands_by_itself():
    """Greedy completions of a problem are one: their pass@k is flat, and their vote is that one."""
    found, one = found_in("rl/evaluation.json"), found_in("one/evaluation.json")
    warm, greedy = found["temperatures"]
    assert [grid["temperature"] for grid in (warm, greedy)] == [1.0, 0.0]
    for name in ("pass_at_k", "cons_at_k", "mean_at_n", "completion_length"):
        assert found[name] == warm[name] == one[name]
    assert len({row["mean"] for row in greedy["pass_at_k"]}) == 1
    assert [row["k"] for row in found["cons_at_k"]] == [1, 2, 4]
    assert found["temperature"] == 1.0 and found["model"] == "rl" and one["model"] == "rl"
    assert "temperatures" not in one


def test_the_table_of_problems_agrees_with_the_samples():
    problems, samples = lines("rl/problems.jsonl"), lines("rl/samples.jsonl")
    assert len(problems) == 2 * 6 and len(samples) == 2 * 6 * 4
    for problem in problems:
        own = [
            sample
            for sample in samples
            if (sample["id"], sample["temperature"]) == (problem["id"], problem["temperature"])
        ]
        assert problem["solved"] == sum(sample["reward"] >= 1 for sample in own)
        assert problem["correct"] == [int(sample["reward"] >= 1) for sample in own]
        assert problem["rewards"] == [sample["reward"] for sample in own]
        assert problem["lengths"] == [len(sample["tokens"]) for sample in own]
        assert problem["pass_rate"] == problem["solved"] / 4
    rate = found_in("rl/evaluation.json")["pass_at_k"][0]["mean"]
    assert 0 < rate < 1
    assert rate == pytest.approx(np.mean([p["pass_rate"] for p in problems[:6]]))


def test_thoughts_are_forced_to_each_length():
    short, long = found_in("rl/evaluation.json")["thinking"]
    assert (short["thinking"], long["thinking"]) == (3, 6)
    assert short["thinking_tokens"] <= 3 < long["thinking_tokens"] <= 6
    assert len(lines("rl/thinking.jsonl")) == 2 * 6 * 4


def test_a_run_is_no_better_than_itself():
    found = compare(Path("rl"), Path("one"), Path("both"))
    assert found == found_in("both/comparison.json")
    assert {row["mean"] for row in found["differences"]} == {0.0}
    assert found["crossing"]["above"] == "" and found["problems"] == 6
    passes = found_in("rl/evaluation.json")["pass_at_k"]
    gap = found["sampling_efficiency_gap"]
    assert gap["k"] == 4 and gap["is"] == "pass@4(a) - pass@1(b)"
    assert gap["mean"] == pytest.approx(passes[-1]["mean"] - passes[0]["mean"]) and gap["mean"] > 0


def test_the_command_compares_without_a_config(monkeypatch, capsys):
    shutil.rmtree("both", ignore_errors=True)
    words = ["evaluate", "--compare=rl,one", "--workdir=both"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    said = capsys.readouterr().out
    assert "sampling-efficiency gap, pass@4(a) - pass@1(b)" in said and "pass@1" in said
    assert Path("both/comparison.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("rl", "--compare=rl: must name two evaluated workdirs"),
        ("rl,none", "none: no problems.jsonl of an evaluation; make it by python -m launch.eval"),
    ],
)
def test_what_cannot_be_compared_is_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--compare={words}"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_other_problems_are_one_line():
    outcomes = read_outcomes(Path("rl"))
    assert len(outcomes) == 6, "of the first temperature alone"
    with pytest.raises(UserError, match="--compare=a,b: 2 problems are of a and not of b"):
        same_problems(Path("a"), outcomes, Path("b"), outcomes[2:])
    with pytest.raises(UserError, match="--compare=a,b: 1 problems are of b and not of a"):
        same_problems(Path("a"), outcomes[1:], Path("b"), outcomes)
    shuffled = outcomes[::-1]
    first, second = same_problems(Path("a"), outcomes, Path("b"), shuffled)
    assert [each.id for each in first] == [each.id for each in second]


def test_what_a_run_wrote_is_as_likely_as_its_own_where_it_is_its_own():
    """An evaluation in a workdir of its own, under the model that it names: its own completions."""
    found = evaluate.run_perplexity(Path("rl"), "one")
    assert found == found_in("rl/perplexity.json")
    assert found["of_a"]["quantiles"] == found["of_b"]["quantiles"]
    assert found["b_is_likelier"] == pytest.approx(0.5)
    assert found["log_perplexity_b_minus_a"]["mean"] == 0
    # A model of random weights on 260 bytes and marks: near the logarithm of their number.
    assert 3 < found["of_b"]["log_perplexity"]["mean"] < 8
    assert found["of_b"]["completions"] == 6 * 4
    assert len(read_written(Path("rl"), read_outcomes(Path("rl")))) == 6 * 4


def test_a_number_of_completions_is_at_least_one():
    with pytest.raises(UserError, match="--perplexity_samples=0: must be at least 1"):
        evaluate.run_perplexity(Path("rl"), "one", 0)


def test_ids_of_another_tokenizer_are_refused(place, tmp_path):
    shutil.copytree(place / "rl", tmp_path / "rl", ignore=shutil.ignore_patterns("checkpoints"))
    changed = [line | {"completion": "x" + line["completion"][:-1] + "y"}
               for line in lines("rl/samples.jsonl")]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in changed)
    (tmp_path / "rl" / "samples.jsonl").write_text(text)
    with pytest.raises(UserError, match="--perplexity_under=rl: its tokenizer reads the ids of"):
        evaluate.run_perplexity(tmp_path / "rl", "rl")


def test_samples_without_ids_say_how_to_make_them(place, tmp_path):
    old = [{k: v for k, v in line.items() if k != "tokens"} for line in lines("rl/samples.jsonl")]
    shutil.copy(place / "rl" / "problems.jsonl", tmp_path)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.raises(UserError, match="its completions have no ids; make it by"):
        evaluate.run_perplexity(tmp_path, "rl")


def test_what_was_put_into_a_mouth_has_no_perplexity(place, tmp_path):
    cut = [line | {"interrupted": n == 3} for n, line in enumerate(lines("rl/samples.jsonl"))]
    shutil.copy(place / "rl" / "problems.jsonl", tmp_path)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cut))
    with pytest.raises(UserError, match=r"evaluate with --config.sampling.thinking=0"):
        evaluate.run_perplexity(tmp_path, "rl")


def test_compute_is_counted_in_tokens_and_flops():
    """Two FLOPs a parameter to sample a token, six to learn from it."""
    steps = np.array([1, 3])
    metrics = lines("rl/metrics.jsonl")
    of_step = [line["tokens"] for line in metrics if "tokens" in line]
    tokens = scaling_runs.generated_tokens(Path("rl"), metrics, steps)
    assert tokens.tolist() == [of_step[0], sum(of_step)]
    parameters = found_in("rl/run.json")["starts"][-1]["parameters"]
    per_token = scaling_runs.flops_per_token(Path("rl"))
    assert per_token % 8 == 0 and per_token / 8 <= parameters, "of the active ones"
    found = scaling_runs.read_points(Path("rl"), "flops", "validation_pass_at_1", skip=1)
    assert len(found.C_N) == 2 and len(found.left_out) == 1
    assert found.C_N[-1] == pytest.approx(per_token * sum(of_step))


def test_temperatures_are_written_as_a_person_writes_them():
    words = ["--config.evaluate.temperatures=(0.6, 1)", "--config.evaluate.thinking=(8,)"]
    config = parse(model_config("rl", words))
    assert config.evaluate.temperatures == (0.6, 1.0) and config.evaluate.thinking == (8,)


@pytest.mark.parametrize(
    "found, words",
    [
        ({"above": "", "k": 1.0}, "both solve the same at k = 1"),
        (
            {"above": "b", "k": 3.25, "low": 2.0, "high": None},
            "b is above until k = 3.2",
        ),
        ({"above": "a", "k": None, "low": 8.0, "high": None}, "a is above up to k = 16"),
    ],
)
def test_a_crossing_is_said(found, words):
    assert words in crossing_words(found | {"share": 0.5, "largest": 16})
