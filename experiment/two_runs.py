"""Compares two evaluated runs on the same problems, and what one writes under the other's model."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from errors import UserError
from experiment.evaluated import evaluated_model, read_outcomes, read_written
from experiment.open_model import OpenModel, open_model
from files import write_json
from rl.config import EvaluateConfig
from rl.difficulty import Group, by_own_difficulty, by_pass_rate
from rl.evaluate import Interval, bootstrap, pass_at_k
from rl.generate import completion_text, opening
from rl.paired import crossing, paired_bootstrap, powers_of_two, sampling_efficiency_gap
from rl.perplexity import (
    Written,
    distribution,
    first_of_each,
    log_by_problem,
    perplexities,
    rank_among,
)
from rl.problem_outcomes import Outcome, as_object
from rl.scoring import Scorer
from rl.voting import cons_at_k

COMPARISON, PERPLEXITY = "comparison.json", "perplexity.json"
PAPERS_K = 256  # of the sampling-efficiency gap in arXiv 2504.13837


def compare(a: Path, b: Path, directory: Path) -> dict[str, Any]:
    """Compares evaluated runs a and b, b minus a, and writes comparison.json to a directory.

    a stands for the base and b for what was trained from it, where the sampling-efficiency gap
    asks. Each run counts with its first temperature.

    Raises:
      UserError: a run is not evaluated, or they were evaluated on other problems.
    """
    first, second = same_problems(a, read_outcomes(a), b, read_outcomes(b))
    result = {"a": _described(a, first), "b": _described(b, second)}
    result |= {"problems": len(first)} | comparison(first, second, EvaluateConfig())
    if jax.process_index() == 0:
        write_json(directory / COMPARISON, result)
    return result


def same_problems(
    a: Path, of_a: Sequence[Outcome], b: Path, of_b: Sequence[Outcome]
) -> tuple[list[Outcome], list[Outcome]]:
    """Returns both runs' outcomes in one order. Raises UserError where the problems are others."""
    there, here = _by_id(of_b), _by_id(of_a)
    splits = [some[0].split for some in (of_a, of_b)]
    if splits[0] != splits[1]:
        raise UserError(
            f"--compare={a},{b}: one has training problems and the other held-out ones "
            f"({splits[0]}, {splits[1]}); evaluate both with the same evaluate.split"
        )
    alone = [key for key in here if key not in there]
    if alone or len(here) != len(there):
        missing = len(alone) or len(there) - len(here)
        which = f"{a} and not of {b}" if alone else f"{b} and not of {a}"
        raise UserError(
            f"--compare={a},{b}: {missing:,} problems are of {which}; evaluate both with the same "
            "reinforce.task and evaluate.problems"
        )
    return list(here.values()), [there[key] for key in here]


def _by_id(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], Outcome]:
    """Returns outcomes by their problem's id, and how often it was there before."""
    seen, found = Counter(), {}
    for outcome in outcomes:
        found[outcome.id, seen[outcome.id]] = outcome
        seen[outcome.id] += 1
    return found


def _described(workdir: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "workdir": str(workdir),
        "split": outcomes[0].split,
        "temperature": outcomes[0].temperature,
        "samples": len(outcomes[0].correct),
    }


def comparison(
    a: Sequence[Outcome], b: Sequence[Outcome], evaluate: EvaluateConfig
) -> dict[str, Any]:
    """Returns differences b - a at each k, where curves cross, and the gap of b to its base a."""
    resamples, ties = evaluate.bootstrap, evaluate.consensus_ties
    (n_a, a_P), (n_b, b_P) = map(_counts, (a, b))
    ks = powers_of_two(min(n_a, n_b))
    differences = []
    for k in ks:
        solved = pass_at_k(n_a, a_P, k), pass_at_k(n_b, b_P, k)
        voted = _votes(a, k, ties), _votes(b, k, ties)
        for measure, (of_a, of_b) in (("pass", solved), ("cons", voted)):
            differences.append({"measure": measure, "k": k} | _difference(of_a, of_b, resamples))
    mean_a, mean_b = (np.array([np.mean(each.rewards) for each in some]) for some in (a, b))
    crosses = crossing(n_a, a_P, n_b, b_P, resamples, seed=0)
    k = min(PAPERS_K, n_a)
    gap = sampling_efficiency_gap(n_a, a_P, n_b, b_P, k, resamples, seed=0)
    found = {
        "differences": differences,
        "mean_at_n": _difference(mean_a, mean_b, resamples),
        "crossing": {name: _finite(value) for name, value in crosses._asdict().items()},
        "sampling_efficiency_gap": {"k": k, "is": f"pass@{k}(a) - pass@1(b)"} | as_object(gap),
        "by_difficulty": _by_group(
            by_own_difficulty([each.difficulty for each in a]),
            a_P / n_a,
            b_P / n_b,
            resamples,
        ),
        "by_pass_rate": [],
    }
    if n_a > 1:
        # Half of a's completions say how hard a problem is, and the others are compared.
        half = n_a // 2
        hard_P, own_P = (
            np.array([np.mean(each.correct[part]) for each in a])
            for part in (slice(half), slice(half, None))
        )
        found["by_pass_rate"] = _by_group(by_pass_rate(hard_P), own_P, b_P / n_b, resamples)
    return found


def _counts(outcomes: Sequence[Outcome]) -> tuple[int, np.ndarray]:
    """Returns how many completions each problem has, and how many of them are correct."""
    return len(outcomes[0].correct), np.array([sum(each.correct) for each in outcomes])


def _votes(outcomes: Sequence[Outcome], k: int, ties: str) -> np.ndarray:
    return np.array(
        [cons_at_k(np.array(e.classes), np.array(e.correct), k, ties) for e in outcomes]
    )


def _difference(a_P: np.ndarray, b_P: np.ndarray, resamples: int) -> dict[str, float]:
    means = {"a": float(np.mean(a_P)), "b": float(np.mean(b_P))}
    return means | as_object(paired_bootstrap(a_P, b_P, resamples, seed=0))


def _by_group(
    groups: Sequence[Group], a_P: np.ndarray, b_P: np.ndarray, resamples: int
) -> list[dict[str, Any]]:
    return [
        {"difficulty": group.name, "problems": len(group.places)}
        | _difference(a_P[group.places], b_P[group.places], resamples)
        for group in groups
    ]


def _finite(value: Any) -> Any:
    """Returns a value as JSON has it: null for a place that is nowhere up to the largest k."""
    return None if isinstance(value, float) and math.isinf(value) else value


def perplexity_under(
    workdir: Path, origin: str, most: int, resamples: int = EvaluateConfig().bootstrap
) -> dict[str, Any]:
    """Measures completions of an evaluated run b under the model of a run a, and writes the result.

    Beside them stand a's own completions of the same problems, where it is evaluated. Writes
    perplexity.json to b's workdir. Perplexities are over the whole vocabulary at temperature 1,
    whatever the completions were sampled at.

    Args:
      workdir: of b.
      origin: the workdir of a, of an evaluation of a, or hf:DIR.
      most: completions of a problem that are measured, the first ones.

    Raises:
      UserError: b is not evaluated, there is no such model, or its ids are not b's.
    """
    outcomes = read_outcomes(workdir)
    of_b = first_of_each(read_written(workdir, outcomes), most)
    theirs = Path(origin)
    of_a: list[Written] = []
    if (theirs / "problems.jsonl").exists():
        ids = {each.id for each in outcomes}
        own = [each for each in read_outcomes(theirs) if each.id in ids]
        of_a = first_of_each(read_written(theirs, own), most) if own else []
    model = open_model(evaluated_model(origin))
    check_same_ids(model, of_b, workdir, origin)
    selects = model.setup.model.indexer.n_heads > 0
    sparse = selects and model.config.sampling.attention == "sparse"
    setup = model.setup
    scorer = Scorer(setup.model, setup.mesh, model.variables, "sparse" if sparse else "dense")
    b_N = perplexities(scorer, of_b)
    result: dict[str, Any] = {"model": origin, "of_b": distribution(of_b, b_N, resamples)}
    result["of_b"] |= {"workdir": str(workdir), "temperature": outcomes[0].temperature}
    result["of_b"]["split"] = outcomes[0].split
    if of_a:
        a_N = perplexities(scorer, of_a)
        a, b = log_by_problem(of_a, a_N), log_by_problem(of_b, b_N)
        apart = np.array([b[problem] - a[problem] for problem in b if problem in a])
        difference: Interval = bootstrap(apart, resamples, seed=0)
        result["of_a"] = distribution(of_a, a_N, resamples)
        result |= {
            "log_perplexity_b_minus_a": as_object(difference),
            "b_is_likelier": rank_among(b_N, a_N),
        }
    if jax.process_index() == 0:
        write_json(workdir / PERPLEXITY, result)
    return result


def check_same_ids(
    model: OpenModel, written: Sequence[Written], workdir: Path, origin: str
) -> None:
    """Raises UserError unless the ids of completions say to a model what they said to their own."""
    tokenizer, template = model.setup.tokenizer, model.config.data.chat_template
    begins = opening(tokenizer, template)
    size = model.setup.model.vocab_size
    for one in written:
        ids = [token for token in one.tokens if token not in tokenizer.stops]
        fits = max([*one.prompt, *one.tokens]) < size
        if not fits or not one.text.endswith(completion_text(ids, tokenizer).removeprefix(begins)):
            raise UserError(
                f"--perplexity_under={origin}: its tokenizer reads the ids of {workdir} as another "
                "text; both must have the same tokenizer"
            )


def print_comparison(result: Mapping[str, Any]) -> None:
    """Prints the figures of comparison.json, a line each, with 95 % intervals."""
    for name in ("a", "b"):
        one = result[name]
        sampled = f"{one['samples']:,} completions at temperature {one['temperature']:g}"
        print(f"{name} = {one['workdir']}: {sampled}")
    which = "training" if result["a"]["split"] == "train" else "held-out"
    print(f"{result['problems']:,} {which} problems; b - a, paired by problem")
    for row in result["differences"]:
        print(f"{row['measure']}@{row['k']:<4} {_paired(row)}")
    print(f"mean@n    {_paired(result['mean_at_n'])}")
    for name in ("by_difficulty", "by_pass_rate"):
        of = {"by_difficulty": "difficulty", "by_pass_rate": "solved by a"}[name]
        for row in result[name]:
            print(f"{of} {row['difficulty']} ({row['problems']:,} problems): {_paired(row)}")
    print(crossing_words(result["crossing"]))
    gap = result["sampling_efficiency_gap"]
    words = f"{gap['mean']:.3f}  ({gap['low']:.3f} to {gap['high']:.3f})"
    print(f"sampling-efficiency gap, {gap['is']}: {words}; the smaller the better")


def crossing_words(found: Mapping[str, Any]) -> str:
    """Says where curves of pass@k cross."""
    if not found["above"]:
        return "curves of pass@k: both solve the same at k = 1"
    other = "a" if found["above"] == "b" else "b"
    if found["k"] is None:
        place = f"is above up to k = {found['largest']}"
    else:
        place = f"is above until k = {found['k']:.1f}, and then {other}"
    low, high = (
        f"{found[name]:.1f}" if found[name] is not None else f"beyond {found['largest']}"
        for name in ("low", "high")
    )
    share = f"{found['share']:.0%} of resamples cross"
    return f"curves of pass@k: {found['above']} {place} ({low} to {high}; {share})"


def print_perplexity(result: Mapping[str, Any]) -> None:
    """Prints the figures of perplexity.json."""
    for name, what in (("of_a", "its own completions"), ("of_b", "those of the other run")):
        found = result.get(name)
        if found is None:
            print(f"no completions of {result['model']} itself: launch.evaluate makes them")
            continue
        quantiles = ", ".join(f"{q}: {value:.3f}" for q, value in found["quantiles"].items())
        count = f"{found['completions']:,} of {found['problems']:,} problems"
        print(f"perplexity under {result['model']} of {what} ({count}), quantiles {quantiles}")
    if "of_a" in result:
        apart = result["log_perplexity_b_minus_a"]
        words = f"{apart['mean']:.4f}  ({apart['low']:.4f} to {apart['high']:.4f})"
        print(f"mean logarithm, the other run's minus its own: {words} nats a token")
        print(f"likelier than its own: {result['b_is_likelier']:.1%} of the time (50% if alike)")


def _paired(row: Mapping[str, float]) -> str:
    interval = f"{row['mean']:+.3f}  ({row['low']:+.3f} to {row['high']:+.3f})"
    return f"{row['a']:.3f} -> {row['b']:.3f}  {interval}"
