"""Reads what launch.evaluate left in a workdir: its figures, its problems and its completions."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints.locations import hf_directory, run_directory
from errors import UserError
from files import read_json
from rl.perplexity import Written
from rl.problem_outcomes import Outcome

PROBLEMS, SAMPLES, EVALUATION = "problems.jsonl", "samples.jsonl", "evaluation.json"
THINKING = "thinking.jsonl"


def read_outcomes(workdir: Path) -> list[Outcome]:
    """Returns what became of each problem of an evaluated run, at its first temperature.

    Raises:
      UserError: the run has no evaluation of problems, or one made before there were such files;
        says how to make it.
    """
    outcomes = []
    for number, record in read_lines(workdir, PROBLEMS):
        try:
            outcomes.append(Outcome.from_record(record))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{workdir / PROBLEMS}, line {number}: no problem ({error})") from error
    return [each for each in outcomes if each.temperature == outcomes[0].temperature]


def read_written(workdir: Path, outcomes: list[Outcome]) -> list[Written]:
    """Returns the completions of these problems as ids, in order.

    Raises UserError where there are none, they were kept as text alone, or a phrase was put into
    one, which it did not sample.
    """
    prompts = {each.id: each.prompt_tokens for each in outcomes}
    temperature, written = outcomes[0].temperature, []
    for _, record in read_lines(workdir, SAMPLES):
        if record.get("interrupted"):
            raise UserError(
                f"{workdir / SAMPLES}: thoughts were cut by a phrase that nothing sampled; "
                "evaluate with --config.sampling.thinking=0"
            )
        try:
            if record["id"] in prompts and record["temperature"] == temperature:
                prompt = prompts[record["id"]]
                ids = list(map(int, record["tokens"]))
                written.append(Written(record["id"], prompt, ids, record["completion"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{workdir / SAMPLES}: its completions have no ids; {_how_to_make(workdir)}"
            ) from error
    return written


def evaluated_model(origin: str) -> str:
    """Returns the model of a run, or that which an evaluation in a workdir of its own was of.

    Raises UserError where there is neither.
    """
    directory = run_directory(origin)
    if hf_directory(origin) is not None or (directory / "checkpoints").exists():
        return origin
    if (directory / EVALUATION).exists():
        model = read_json(directory / EVALUATION).get("model")
        if isinstance(model, str) and model:
            return model
    raise UserError(
        f"{origin}: neither the workdir of a run, with checkpoints, nor that of an evaluation"
    )


def read_lines(workdir: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each line of a file of an evaluation with its number; raises UserError without any."""
    path = workdir / name
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not any(map(str.strip, lines)):
        raise UserError(f"{workdir}: no {name} of an evaluation; {_how_to_make(workdir)}")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: cannot be read as JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: must be a JSON object")
        yield number, record


def _how_to_make(workdir: Path) -> str:
    return f"make it by python -m launch.evaluate --workdir={shlex.quote(str(workdir))}"
