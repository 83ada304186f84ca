"""Fits held-out pass rates of runs against their compute, and writes the figures and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer_files import load_tokenizer
from errors import UserError
from experiment.schema import parse
from experiment.setup import with_vocab_size
from experiment.workdir import recorded_config
from files import write_json, write_text
from report.scaling import scaling_panels
from report.standalone import standalone
from rl.problem_outcomes import as_object
from rl.scaling import (
    LEAST_POINTS,
    POWER_LAW,
    SIGMOID,
    Fit,
    fit_curves,
    fit_sigmoid,
    predicted,
    prediction_errors,
)
from train.metrics import read_metrics
from train.state import count_parameters

SCALING, PICTURE = "scaling.json", "scaling.svg"
# What compute is measured in -> what the axis says.
COMPUTE = {"tokens": "generated tokens", "steps": "steps", "flops": "FLOPs, estimated"}
RATES = "pass_at"  # a metric with this in its name is a share, between 0 and 1
CURVE_POINTS = 60


class Points(NamedTuple):
    """Held-out values of a run against its compute, and those left out from the beginning."""

    C_N: np.ndarray
    R_N: np.ndarray
    left_out: list[list[float]]


def fit_runs(
    workdirs: Sequence[Path],
    directory: Path,
    *,
    x: str,
    metric: str,
    skip: int,
    pool: bool,
    resamples: int,
) -> dict[str, Any]:
    """Fits each run, or with `pool` all as one, and writes scaling.json and scaling.svg.

    Args:
      workdirs: of runs of launch.reinforce.
      directory: where the files are written.
      x: what compute is measured in, a name of COMPUTE.
      metric: of metrics.jsonl, such as "validation_pass_at_1".
      skip: how many of the first points of each run are left out.
      pool: whether the runs are seeds of one recipe, with one curve.
      resamples: of the bootstrap.

    Raises:
      UserError: a run has no such metric, too few points, or does not rise.
    """
    points = {str(workdir): read_points(workdir, x, metric, skip) for workdir in workdirs}
    groups = {"all": list(points.values())} if pool else {name: [p] for name, p in points.items()}
    bounds = (0.0, 1.0) if RATES in metric else (-math.inf, math.inf)
    fits = []
    for name, some in groups.items():
        try:
            found = fit_sigmoid([(p.C_N, p.R_N) for p in some], bounds, resamples, seed=0)
        except ValueError as error:
            whose = ", ".join(points) if pool else name
            raise UserError(f"{whose}: {metric} against {x}: {error}") from error
        fits.append({"run": name} | _as_json(found, some, bounds))
    result = {
        "x": COMPUTE[x],
        "metric": metric,
        "skip": skip,
        "bootstrap": "runs, then residuals" if pool and len(workdirs) > 1 else "residuals",
        "runs": [
            {
                "workdir": name,
                "points": np.stack([p.C_N, p.R_N], axis=1).tolist(),
                "left_out": p.left_out,
                "prediction": _prediction(p, bounds),
            }
            for name, p in points.items()
        ],
        "fits": fits,
    }
    write_json(directory / SCALING, result)
    panels = scaling_panels(result)
    write_text(directory / PICTURE, standalone(panels[0]))
    return result


def read_points(workdir: Path, x: str, metric: str, skip: int) -> Points:
    """Returns the held-out values of a run of launch.reinforce, in the order of its steps.

    Raises UserError where there are none, with what makes them.
    """
    if not (workdir / "metrics.jsonl").exists():
        raise UserError(f"{workdir}: no metrics.jsonl, so not the workdir of a run")
    lines = read_metrics(workdir / "metrics.jsonl")
    found = {
        int(line["step"]): float(line[metric])
        for line in lines
        if isinstance(line.get(metric), int | float) and math.isfinite(line[metric])
    }
    if not found:
        there = sorted({name for line in lines for name in line if name.startswith("validation_")})
        hint = f"has {', '.join(there)}" if there else (
            "launch.reinforce measures it every --config.train.eval_every=N steps"
        )  # fmt: skip
        raise UserError(f"{workdir}: no {metric} in metrics.jsonl ({hint})")
    steps = np.array(sorted(found))
    C_N = steps.astype(float) if x == "steps" else generated_tokens(workdir, lines, steps)
    if x == "flops":
        C_N = C_N * flops_per_token(workdir)
    R_N = np.array([found[step] for step in steps.tolist()])
    left_out = np.stack([C_N[:skip], R_N[:skip]], axis=1).tolist()
    return Points(C_N[skip:], R_N[skip:], left_out)


def generated_tokens(
    workdir: Path, lines: Sequence[Mapping[str, Any]], steps: np.ndarray
) -> np.ndarray:
    """Returns how many tokens a run had sampled to learn from by each step.

    Steps that were not logged count as those between which they lie.
    """
    logged = {
        int(line["step"]): float(line["tokens"])
        for line in lines
        if "reward" in line and isinstance(line.get("tokens"), int | float)
    }
    if not logged:
        raise UserError(f"{workdir}: metrics.jsonl has no tokens of a step; use --x=steps")
    every = np.arange(1, steps.max() + 1)
    tokens = np.interp(every, sorted(logged), [logged[step] for step in sorted(logged)])
    return np.cumsum(tokens)[steps - 1]


def flops_per_token(workdir: Path) -> float:
    """Returns an estimate of the FLOPs of a generated token, learning from it included.

    Two for each active parameter to sample it, and six in each epoch to learn from it (the rule of
    2 N and 6 N, arXiv 2001.08361); attention over the context, prompts and the scores of a
    reference are left out.
    """
    config = parse(recorded_config(workdir))
    model = with_vocab_size(config.model, load_tokenizer(workdir / "tokenizer.json"))
    _, active = count_parameters(model)
    return float(active * (2 + 6 * config.reinforce.epochs))


def _as_json(found: Fit, some: Sequence[Points], bounds: tuple[float, float]) -> dict[str, Any]:
    """Returns a fit as scaling.json has it, with its curve, its band and the power law's curve."""
    C_N, R_N = (np.concatenate([p[place] for p in some]) for place in (0, 1))
    x = np.geomspace(C_N.min(), C_N.max(), CURVE_POINTS)
    of_all = np.ones((1, len(C_N)))
    curve, power = (
        predicted(form, fit_curves(form, C_N, R_N[None], bounds, of_all), C_N, x)[0]
        for form in (SIGMOID, POWER_LAW)
    )
    band = np.quantile(predicted(SIGMOID, found.fits_of_resamples, C_N, x), [0.025, 0.975], axis=0)
    return {
        "A": as_object(found.ceiling),
        "B": as_object(found.exponent),
        "C_mid": as_object(found.middle),
        "R0": as_object(found.start),
        "explained": found.explained,
        "points": found.points,
        "curve": np.stack([x, curve, *band], axis=1).tolist(),
        "power_law": np.stack([x, power], axis=1).tolist(),
    }


def _prediction(p: Points, bounds: tuple[float, float]) -> dict[str, float] | None:
    """Returns the errors of a prediction of the second half, None where the first is too short."""
    if len(p.C_N) < 2 * LEAST_POINTS:
        return None
    return prediction_errors(p.C_N, p.R_N, bounds)


def print_scaling(result: Mapping[str, Any]) -> None:
    """Prints the figures of scaling.json."""
    print(f"{result['metric']} against {result['x']}; 95 % intervals over {result['bootstrap']}")
    for fit in result["fits"]:
        share = f"{fit['explained']:.1%} of their variance explained"
        print(f"{fit['run']}: {fit['points']} points, {share}")
        for name in ("A", "B", "C_mid", "R0"):
            one = fit[name]
            print(f"  {name:<6}{one['mean']:.4g}  ({one['low']:.4g} to {one['high']:.4g})")
    for run in result["runs"]:
        errors = run["prediction"]
        if errors is None:
            print(f"{run['workdir']}: fewer than {2 * LEAST_POINTS} points: nothing is foretold")
            continue
        words = ", ".join(f"{name.replace('_', ' ')} {e:.4f}" for name, e in errors.items())
        print(f"{run['workdir']}: second half from the first, root mean squared error: {words}")
