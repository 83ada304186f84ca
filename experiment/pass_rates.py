"""Reads what an evaluation of training problems found of each, and keeps it in a run's workdir.

A run that goes on has what it began with, whatever has become of the evaluation.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from errors import UserError
from experiment.evaluated import EVALUATION, PROBLEMS, THINKING, read_lines, read_outcomes
from experiment.workdir import PASS_RATES
from files import read_json, write_text
from rl.config import EvaluateConfig, ReinforceConfig
from rl.pass_rates import PassRates, Tries, digest


def known_pass_rates(
    workdir: Path, reinforce: ReinforceConfig, evaluate: EvaluateConfig
) -> PassRates | None:
    """Returns what `reinforce.pass_rates_from` says, None where it names nothing.

    At its first start a run reads the evaluation there and writes pass_rates.json to its workdir;
    when it goes on it reads that.

    Args:
      workdir: of the run.
      evaluate: what the run takes for a success, which must be what the evaluation did.

    Raises:
      UserError: there is no such evaluation, it is damaged or counts other successes, or it has not
        measured what is to be left out.
    """
    origin, own = reinforce.pass_rates_from, workdir / PASS_RATES
    if not origin:
        return None
    if own.exists():
        try:
            return PassRates.from_json(read_json(own))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{own}: no tries of problems ({error}); remove it") from error
    try:
        found = _read(Path(origin), origin, reinforce, evaluate)
    except UserError as error:
        raise UserError(f"reinforce.pass_rates_from = {origin!r}: {error}") from error
    if jax.process_index() == 0:
        write_text(own, json.dumps(found.as_json()) + "\n")
    return found


def _read(
    place: Path, origin: str, reinforce: ReinforceConfig, evaluate: EvaluateConfig
) -> PassRates:
    """Returns what the evaluation in a workdir found. Raises UserError."""
    if not (place / PROBLEMS).exists():
        raise UserError(
            f"no {PROBLEMS} of an evaluation there; make it by launch.evaluate with "
            "--config.evaluate.split=train"
        )
    outcomes = read_outcomes(place)
    evaluation = read_json(place / EVALUATION)
    success = evaluation.get("success")
    ours = {"reward": evaluate.reward, "least": evaluate.success}
    if success != ours:
        raise UserError(
            f"a success there is {success}, and {ours} here; evaluate it with the evaluate.reward "
            "and evaluate.success of this run"
        )
    guessed, thought = {}, 0
    if reinforce.guessed == "left_out":
        thought, guessed = _guessed(place, evaluation, reinforce.guess_attempts, evaluate.success)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for each in outcomes:
        found = counts[each.id, digest(each.question)]
        found[0] += len(each.correct)
        found[1] += sum(each.correct)
    tries = {key: Tries(n, c, guessed.get(key)) for key, (n, c) in counts.items()}
    return PassRates(origin, tries, thought)


def _guessed(
    place: Path, evaluation: dict[str, Any], attempts: int, success: float
) -> tuple[int, dict[tuple[str, str], bool]]:
    """Returns the least length of thought, and whether first attempts with it solved a problem."""
    try:
        least = min(row["thinking"] for row in evaluation["thinking"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "forces no thought, so that nothing says what reinforce.guessed = 'left_out' leaves "
            'out; evaluate it with --config.evaluate.thinking="(1,)"'
        ) from error
    paid: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number, line in read_lines(place, THINKING):
        try:
            if line["thinking"] == least:
                paid[line["id"], digest(line["prompt"])].append(float(line["reward"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{place / THINKING}, line {number}: no completion ({error})"
            ) from error
    fewest = min(map(len, paid.values()), default=0)
    if fewest < attempts:
        raise UserError(
            f"has {fewest} completions of a problem without a thought, fewer than "
            f"reinforce.guess_attempts = {attempts}; evaluate it with "
            f"--config.evaluate.samples={attempts}"
        )
    return least, {key: max(earned[:attempts]) >= success for key, earned in paid.items()}
