"""Fits how a held-out pass rate rises with compute: a sigmoid, and a power law beside it.

    sigmoid (ScaleRL, arXiv 2510.13786):  R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)
    power law:                            R(C) = A - (A - R0) (C / C_first)^-B

Both go from a start R0 to a ceiling A by a share s(C) of the way, R = R0 (1 - s) + A s. Given the
shape, which is B and C_mid, the best R0 and A are a linear least squares with bounds, solved in
closed form; so only the shape is searched, on a grid that is then made finer about the best. A and
B trade off against one another: where the data end before the curve bends, A is what its interval
says and no more.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rl.evaluate import Interval

PARAMETERS = 4  # of the sigmoid
LEAST_POINTS = PARAMETERS + 2
LEAST_SHARE = 0.5  # of the variance that a fit explains; below it there is no rise to speak of
ROUNDS, SHRINK = 14, 0.6  # in which the grid is made finer, each by this factor
Bounds = tuple[float, float]
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (logarithms of B, C_mid; log C) -> s


class Form(NamedTuple):
    """A family of curves.

    Attributes:
      share: (logs [..., 1, D], log C [N]) -> s [..., N], the share of the way to the ceiling.
      least, most: logarithms of the first and last shape of the grid, [D], given log C [N].
      counts: points of the grid in each dimension.
    """

    share: Shape
    least: Callable[[np.ndarray], np.ndarray]
    most: Callable[[np.ndarray], np.ndarray]
    counts: tuple[int, ...]


class Curves(NamedTuple):
    """R curves of one form, one for each of R sets of points.

    Attributes:
      start_R, ceiling_R: R0 and A.
      logs_RD: logarithms of B, and of the sigmoid's C_mid.
      error_R: sums of the squared residuals, weighted.
    """

    start_R: np.ndarray
    ceiling_R: np.ndarray
    logs_RD: np.ndarray
    error_R: np.ndarray


class Fit(NamedTuple):
    """The sigmoid of a curve, with bootstrap intervals.

    Attributes:
      start, ceiling, exponent, middle: R0, A, B and C_mid.
      explained: the share of the variance of the pass rates that it explains.
      points: how many were fitted.
      fits_of_resamples: the same parameters of each resample.
    """

    start: Interval
    ceiling: Interval
    exponent: Interval
    middle: Interval
    explained: float
    points: int
    fits_of_resamples: Curves


def _sigmoid(logs: np.ndarray, log_C: np.ndarray) -> np.ndarray:
    steepness = np.exp(logs[..., 0])
    return 1 / (1 + np.exp(np.clip(steepness * (logs[..., 1] - log_C), -700, 700)))


def _power_law(logs: np.ndarray, log_C: np.ndarray) -> np.ndarray:
    return 1 - np.exp(-np.exp(logs[..., 0]) * (log_C - log_C.min()))


SIGMOID = Form(
    _sigmoid,
    lambda log_C: np.array([math.log(0.2), log_C.min() - math.log(8)]),
    lambda log_C: np.array([math.log(12), log_C.max() + math.log(64)]),
    (30, 60),
)
POWER_LAW = Form(
    _power_law,
    lambda log_C: np.array([math.log(0.01)]),
    lambda log_C: np.array([math.log(12)]),
    (80,),
)


def fit_curves(
    form: Form, C_N: np.ndarray, R_RN: np.ndarray, bounds: Bounds, weight_RN: np.ndarray
) -> Curves:
    """Fits a rising curve to each row of pass rates, by weighted least squares.

    Args:
      C_N: compute of each point, positive.
      R_RN: pass rates.
      bounds: least and most of R0 and A; R0 is at most A.
      weight_RN: how often each point counts.
    """
    log_C, rows = np.log(C_N), np.arange(len(R_RN))
    axes = [
        np.linspace(low, high, count)
        for low, high, count in zip(form.least(log_C), form.most(log_C), form.counts, strict=True)
    ]
    grid_GD = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    step_D = np.array([axis[1] - axis[0] for axis in axes])
    start_RG, ceiling_RG, error_RG = _blend(
        form.share(grid_GD[:, None], log_C)[None], R_RN, bounds, weight_RN
    )
    best_R = np.argmin(error_RG, axis=1)
    logs_RD = grid_GD[best_R]
    found = start_RG[rows, best_R], ceiling_RG[rows, best_R], error_RG[rows, best_R]
    near = np.array(np.meshgrid(*[np.arange(-2, 3)] * len(axes), indexing="ij"))
    near_LD = near.reshape(len(axes), -1).T / 2
    for _ in range(ROUNDS):
        logs_RLD = np.clip(logs_RD[:, None] + near_LD * step_D, grid_GD[0], grid_GD[-1])
        tried = _blend(form.share(logs_RLD[:, :, None], log_C), R_RN, bounds, weight_RN)
        best_R = np.argmin(tried[2], axis=1)
        logs_RD = logs_RLD[rows, best_R]
        found = tuple(each[rows, best_R] for each in tried)
        step_D = step_D * SHRINK
    return Curves(found[0], found[1], logs_RD, found[2])


def _blend(
    share: np.ndarray, R_RN: np.ndarray, bounds: Bounds, weight_RN: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the best R0 and A of each share of the way, and the squared error, [R, G] each.

    Args:
      share: [R, G, N], or [1, G, N] where all rows try the same.
    """
    low, high = bounds
    rest = 1 - share
    same = len(share) == 1

    def total(x: np.ndarray, y_RN: np.ndarray) -> np.ndarray:
        return y_RN @ x[0].T if same else np.einsum("rgn,rn->rg", x, y_RN)

    aa, ab, bb = (total(x, weight_RN) for x in (rest * rest, rest * share, share * share))
    ya, yb = (total(x, weight_RN * R_RN) for x in (rest, share))
    yy = np.sum(weight_RN * R_RN**2, axis=1)[:, None]
    mean = np.sum(weight_RN * R_RN, axis=1) / np.sum(weight_RN, axis=1)
    flat = np.broadcast_to(np.clip(mean, low, high)[:, None], aa.shape)
    determinant = np.maximum(aa * bb - ab * ab, 1e-300)
    best = None
    # The best of all where it is allowed, and of each edge of what is.
    with np.errstate(over="ignore", invalid="ignore"):
        free = (bb * ya - ab * yb) / determinant, (aa * yb - ab * ya) / determinant
        allowed = (free[0] >= low) & (free[0] <= free[1]) & (free[1] <= high)
        candidates = [(*free, allowed), (flat, flat, True)]
        if math.isfinite(low):
            ceiling = np.clip((yb - low * ab) / np.maximum(bb, 1e-300), low, high)
            candidates.append((np.full_like(aa, low), ceiling, True))
        if math.isfinite(high):
            start = np.clip((ya - high * ab) / np.maximum(aa, 1e-300), low, high)
            candidates.append((start, np.full_like(aa, high), True))
        for start, ceiling, usable in candidates:
            error = yy - 2 * (start * ya + ceiling * yb)
            error = error + start**2 * aa + 2 * start * ceiling * ab + ceiling**2 * bb
            error = np.where(usable, error, np.inf)
            best = (
                (start, ceiling, error) if best is None else _lower(best, (start, ceiling, error))
            )
    assert best is not None
    return best


def _lower(one: tuple, other: tuple) -> tuple:
    return tuple(np.where(other[2] < one[2], b, a) for a, b in zip(one, other, strict=True))


def predicted(form: Form, curves: Curves, first: np.ndarray, C: np.ndarray) -> np.ndarray:
    """Returns the pass rates [R, N] of curves at other compute.

    Args:
      first: the compute that the curves were fitted on, from whose least a power law begins.
    """
    log_C = np.log(C)
    if form is POWER_LAW:
        base = np.log(first.min())
        share = 1 - np.exp(-np.exp(curves.logs_RD[:, :1]) * (log_C - base))
    else:
        share = form.share(curves.logs_RD[:, None], log_C)
    return curves.start_R[:, None] * (1 - share) + curves.ceiling_R[:, None] * share


def fit_sigmoid(
    runs: Sequence[tuple[np.ndarray, np.ndarray]],
    bounds: Bounds,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Fit:
    """Fits one sigmoid to the points of one or several runs, with bootstrap intervals.

    Of one run its residuals are drawn anew, with replacement, widened by sqrt(N / (N - 4)) for the
    four parameters; of several runs of one recipe the runs are drawn first. What is held fixed
    does not move: the interval does not say how other problems would score, and of one run not how
    another seed would.

    Args:
      runs: (compute, pass rates) of each run.
      bounds: least and most that a pass rate may be.
      resamples: how often points are drawn anew.

    Raises:
      ValueError: there are too few points, or the pass rates do not rise.
    """
    C_N, R_N = (np.concatenate(parts).astype(float) for parts in zip(*runs, strict=True))
    run_N = np.repeat(np.arange(len(runs)), [len(C) for C, _ in runs])
    if len(np.unique(C_N)) < LEAST_POINTS:
        raise ValueError(f"{len(np.unique(C_N))} points, and a sigmoid needs {LEAST_POINTS}")
    whole = fit_curves(SIGMOID, C_N, R_N[None], bounds, np.ones((1, len(C_N))))
    curve_N = predicted(SIGMOID, whole, C_N, C_N)[0]
    varies = float(np.sum((R_N - R_N.mean()) ** 2))
    explained = 1 - float(np.sum((R_N - curve_N) ** 2)) / varies if varies > 1e-12 else 0.0
    if explained < LEAST_SHARE or whole.ceiling_R[0] - whole.start_R[0] < 1e-9:
        raise ValueError(
            f"the curve does not rise: a sigmoid explains {100 * explained:.0f} % of it"
        )
    residual_N = (R_N - curve_N) * math.sqrt(len(C_N) / (len(C_N) - PARAMETERS))
    rng = np.random.default_rng(seed)
    weight_RN = np.ones((resamples, len(C_N)))
    if len(runs) > 1:
        draws = rng.integers(len(runs), size=(resamples, len(runs)))
        times = np.stack([np.bincount(draw, minlength=len(runs)) for draw in draws])
        weight_RN = times[:, run_N].astype(float)
    R_RN = np.empty_like(weight_RN)
    for run in range(len(runs)):
        own = np.flatnonzero(run_N == run)
        R_RN[:, own] = curve_N[own] + residual_N[rng.choice(own, size=(resamples, len(own)))]
    several = fit_curves(SIGMOID, C_N, R_RN, bounds, weight_RN)

    def interval(value: np.ndarray, drawn: np.ndarray) -> Interval:
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(value[0]), float(low), float(high))

    return Fit(
        interval(whole.start_R, several.start_R),
        interval(whole.ceiling_R, several.ceiling_R),
        interval(np.exp(whole.logs_RD[:, 0]), np.exp(several.logs_RD[:, 0])),
        interval(np.exp(whole.logs_RD[:, 1]), np.exp(several.logs_RD[:, 1])),
        explained,
        len(C_N),
        several,
    )


def prediction_errors(C_N: np.ndarray, R_N: np.ndarray, bounds: Bounds) -> dict[str, float]:
    """Returns how well the first half of a run's points foretells the second, by each form.

    Args:
      C_N, R_N: in the order of compute, at least 2 * LEAST_POINTS of them.

    Returns:
      The root of the mean squared error on the second half: of "sigmoid", of "power_law", and of
      "constant", which is the mean of the last third of the first half carried on.
    """
    half = len(C_N) // 2
    errors = {}
    for name, form in (("sigmoid", SIGMOID), ("power_law", POWER_LAW)):
        fitted = fit_curves(form, C_N[:half], R_N[None, :half], bounds, np.ones((1, half)))
        there = predicted(form, fitted, C_N[:half], C_N[half:])[0]
        errors[name] = float(np.sqrt(np.mean((there - R_N[half:]) ** 2)))
    carried = R_N[half - max(half // 3, 1) : half].mean()
    errors["constant"] = float(np.sqrt(np.mean((carried - R_N[half:]) ** 2)))
    return errors
