"""Fits how a held-out pass rate rises with the compute of reinforcement (arXiv 2510.13786).

    python -m launch.fit_scaling --workdir=runs/rl
    python -m launch.fit_scaling --workdir=runs/a --workdir=runs/b --x=flops --skip=2
    python -m launch.fit_scaling --workdir=runs/seed0 --workdir=runs/seed1 --pool

The sigmoid is R0 + (A - R0) / (1 + (C_mid / C)^B): its ceiling A, exponent B and half-way compute
C_mid, with 95 % intervals of a bootstrap over residuals, or with --pool over runs and then
residuals; beside it a power law, and how well the first half of the points foretells the second.
A run has points where it was evaluated in between (--config.train.eval_every=N).

Writes scaling.json and scaling.svg to the first workdir, or to --out; launch.report shows them.
"""

from pathlib import Path

from errors import UserError
from experiment.command_line import command
from experiment.flags import Flag
from experiment.scaling_runs import COMPUTE, fit_runs, print_scaling

FLAGS = {
    "workdir": Flag((), "of a run of launch.reinforce"),
    "x": Flag("tokens", "what compute is measured in", tuple(COMPUTE)),
    "metric": Flag("validation_pass_at_1", "of metrics.jsonl, what rises with compute"),
    "skip": Flag(0, "points at the beginning of each run that are left out"),
    "pool": Flag(False, "the runs are seeds of one recipe, with one curve"),
    "bootstrap": Flag(1_000, "resamples"),
    "out": Flag("", "a directory to write to, in place of the first workdir"),
}


def run(
    workdir: tuple[str, ...], x: str, metric: str, skip: int, pool: bool, bootstrap: int, out: str
) -> dict:
    """Returns what scaling.json has, and prints it."""
    names = list(dict.fromkeys(name for name in workdir if name))
    if not names:
        raise UserError("--workdir is missing: name the directory of a run, such as runs/rl")
    if skip < 0:
        raise UserError(f"--skip={skip}: must not be negative")
    if bootstrap < 1:
        raise UserError(f"--bootstrap={bootstrap}: must be positive")
    result = fit_runs(
        list(map(Path, names)),
        Path(out or names[0]),
        x=x,
        metric=metric,
        skip=skip,
        pool=pool,
        resamples=bootstrap,
    )
    print_scaling(result)
    return result


if __name__ == "__main__":
    command(run, config="none", workdir=False, flags=FLAGS)
