"""The search for the k-th best score of a row by counting, inside a kernel: exact, without a sort.

    count |*                        One pass over the scores counts how many are at or above a
          |  ` .                    bound. `low` has topk of them or more, `high` has fewer; the
     topk |- - - -` . - - - - -     next bound lies between the two, where a line through the
          |        |   ` .          logarithms of both counts meets topk (regula falsi; in its
          |        |       ` *      Illinois variant, which counts a side that stays twice half).
          +--low---bound---high-->  Then the bound becomes `low` or `high`.

The first bound is the quantile of a normal distribution. A dozen passes find the threshold, where
settling a float bit by bit takes 32. The search ends whatever the scores are: after GUESSES bounds
it halves the bits between `low` and `high`.

Every array is [R, 1], a number for each of R rows that are searched side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels.tiles import F32

GUESSES = 24  # bounds that the line proposes, before bits are halved
ZERO_STEP = 3  # from this step on a row is asked whether its threshold is a relu's zero
# The bits of the least normal float above zero: a TPU flushes smaller ones to zero.
TINY = 0x00800000


class Threshold(NamedTuple):
    """The threshold of each row, as `find_threshold` finds it.

    Attributes:
      level: float32, a bound with exactly topk scores at or above it; where scores tie at the k-th
        best, that score.
      at_level: how many scores are at or above it: more than topk only where scores tie at it.
      above: how many scores are above it, where scores tie at it.
    """

    level: Array
    at_level: Array
    above: Array


class _Bracket(NamedTuple):
    """The state of the search. Counts are int32; bounds are `ordered_int`s of float32."""

    step: Array  # a scalar
    low: Array  # the largest bound known to have topk scores or more
    high: Array  # the least bound known to have fewer
    at_low: Array  # the scores at or above `low`
    at_high: Array
    low_log: Array  # float32, log(at_low / topk), half of it where `low` stayed twice
    high_log: Array
    side: Array  # which bound moved last: 1 for `low`, -1 for `high`
    done: Array


def find_threshold(
    count_at_least: Callable[[Array], Array],
    num_allowed: Array,
    done: Array,
    low: Array,
    high: Array,
    guess: Array,
    topk: int,
) -> Threshold:
    """Finds a bound for each row with exactly `topk` scores at or above it.

    Where scores tie at the k-th best there is none: then the search ends when no float lies between
    a bound that has more and one that has fewer, and finds the former.

    Args:
      count_at_least: float32 levels [R, 1] -> how many scores of each row are at or above, int32.
      num_allowed: how many scores each row has.
      done: bool, the rows that need no search: those with at most topk scores.
      low, high: the least and the largest score of each row.
      guess: the first bound to try, see `normal_quantile`.
      topk: how many scores are wanted.
    """
    zero = jnp.zeros_like(num_allowed)
    start = _Bracket(
        step=jnp.int32(0),
        low=ordered_int(low),
        high=ordered_int(high) + 1,
        at_low=num_allowed,
        at_high=zero,
        low_log=_log_share(num_allowed, topk),
        high_log=_log_share(zero, topk),
        side=zero,
        done=done.astype(jnp.int32),
    )

    def move(bracket: _Bracket) -> _Bracket:
        bound = _propose(bracket, guess)
        return _accept(bracket, bound, count_at_least(from_ordered_int(bound)), topk)

    end = lax.while_loop(lambda bracket: jnp.min(bracket.done) == 0, move, start)
    return Threshold(from_ordered_int(end.low), end.at_low, end.at_high)


def _log_share(count: Array, topk: int) -> Array:
    """Returns log(count / topk), nearly a line in the bound, since tails are nearly exponential."""
    return jnp.log(jnp.maximum(count.astype(F32), 0.5) / topk)


def _propose(bracket: _Bracket, guess: Array) -> Array:
    """Chooses the next bound of each row.

    Scores are sums of rectified products, so many can be exactly zero. Two bounds, the least normal
    float and zero itself, settle whether the threshold is that tie.
    """
    low, high = from_ordered_int(bracket.low), from_ordered_int(bracket.high)
    bound = ordered_int(
        jnp.where(
            bracket.step == 0,
            guess,
            low + (high - low) * (bracket.low_log / (bracket.low_log - bracket.high_log)),
        )
    )
    middle = (bracket.low >> 1) + (bracket.high >> 1) + (bracket.low & bracket.high & 1)
    bound = jnp.where(
        (bound <= bracket.low) | (bound >= bracket.high) | (bracket.step >= GUESSES), middle, bound
    )
    bound = jnp.where(
        (bracket.step >= ZERO_STEP) & (bracket.low <= 0) & (bracket.high > TINY), TINY, bound
    )
    return jnp.where((bracket.low < 0) & (bracket.high == TINY), 0, bound)


def _accept(bracket: _Bracket, bound: Array, count: Array, topk: int) -> _Bracket:
    """Makes a bound with `count` scores at or above it the new `low` or `high` of each row."""
    up, down = (bracket.done == 0) & (count >= topk), (bracket.done == 0) & (count < topk)
    low, high = jnp.where(up, bound, bracket.low), jnp.where(down, bound, bracket.high)
    at_low = jnp.where(up, count, bracket.at_low)
    settled = (at_low == topk) | (high - 1 <= low) | ((low == 0) & (high == TINY))
    return _Bracket(
        step=bracket.step + 1,
        low=low,
        high=high,
        at_low=at_low,
        at_high=jnp.where(down, count, bracket.at_high),
        # Illinois: a side that stays twice counts half, or else the other one would crawl.
        low_log=jnp.where(
            up,
            _log_share(count, topk),
            jnp.where(down & (bracket.side < 0), 0.5 * bracket.low_log, bracket.low_log),
        ),
        high_log=jnp.where(
            down,
            _log_share(count, topk),
            jnp.where(up & (bracket.side > 0), 0.5 * bracket.high_log, bracket.high_log),
        ),
        side=jnp.where(up, 1, jnp.where(down, -1, bracket.side)),
        done=jnp.where(settled, 1, bracket.done),
    )


def nth_position(count_before: Callable[[Array], Array], n: Array, bits: int) -> Array:
    """Finds the position of the n-th key of some kind, such as the tied ones, bit by bit.

    Args:
      count_before: positions [R, 1] -> how many such keys stand before, int32.
      n: int32, which key, counted from 1.
      bits: how many bits a position has, see `position_bits`.
    """

    def settle(step, found):
        bound = found + (jnp.int32(1) << (bits - 1 - step))
        return jnp.where(count_before(bound) < n, bound, found)

    return lax.fori_loop(0, bits, settle, jnp.zeros_like(n))


def position_bits(keys: int) -> int:
    """Returns how many bits the last position in a row of so many keys has."""
    return (keys - 1).bit_length()


def normal_quantile(total: Array, squares: Array, count: Array, topk: int) -> Array:
    """Estimates the k-th best of normally distributed scores from their moments.

    The quantile is approximated by the rational function of Abramowitz and Stegun, 26.2.23:

        z = t - (c0 + c1 t + c2 t^2) / (1 + d1 t + d2 t^2 + d3 t^3),    t = sqrt(-2 log(share))

    with share = topk / count, and by its mirror image where share is above a half.

    Args:
      total: the sum of each row's scores.
      squares: the sum of their squares.
      count: how many there are.
      topk: how many scores are wanted above the quantile.

    Returns: float32 levels, mean + z * standard deviation.
    """
    n = jnp.maximum(count, 1).astype(F32)
    mean = total / n
    variance = squares / n - mean * mean
    share = topk / n
    t = jnp.sqrt(-2 * jnp.log(jnp.clip(jnp.minimum(share, 1 - share), 1e-9, 0.5)))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (
        1 + t * (1.432788 + t * (0.189269 + t * 0.001308))
    )
    return mean + jnp.sqrt(jnp.maximum(variance, 0.0)) * jnp.where(share < 0.5, z, -z)


def ordered_int(x: Array) -> Array:
    """Maps float32 to int32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def from_ordered_int(bits: Array) -> Array:
    """Maps an `ordered_int` back to its float32."""
    return lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), F32)
