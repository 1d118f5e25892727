"""How sure a mean over seeds is, and how it is printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, in the unit of the values; `nan` ends where there is none."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """False for a single seed: there is a mean, but nothing to say how far it would move."""
        return not math.isnan(self.low)

    @property
    def spans_zero(self) -> bool:
        """True where zero cannot be ruled out; an unknown interval rules out nothing."""
        return not self.known or self.low <= 0.0 <= self.high


def seed_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Mean over seeds with its two-sided Student t interval (Student 1908): mean +- t(n-1) * sd / sqrt(n).

    `values`: (n,) floats, one a seed, any unit. One seed gives `low = high = nan` (write it as null in JSON). Ends are
    not clipped to the range of a rate: with few seeds they may lie outside [0, 1], which says how little is known.
    The interval covers the seeds alone, not the draw of test images or of generators.

    Raises ValueError for no values, for values that are not finite, and for a level outside (0, 1).
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"expected one value a seed in a 1-D array, found shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError(f"expected finite values, found {sample.tolist()}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, math.nan, math.nan)
    # By hand rather than stats.t.interval, which gives nan for seeds that agree to the digit.
    half = float(stats.t.ppf((1.0 + level) / 2.0, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size))
    return Interval(mean, mean - half, mean + half)


def share_interval(count: int, of: int, level: float = 0.95) -> Interval:
    """A share with its interval after Wilson (1927), which stays in [0, 1] and says something for 0 of n too.

    Raises ValueError unless 0 <= count <= of and of > 0.
    """
    ends = stats.binomtest(count, of).proportion_ci(level, method="wilson")
    return Interval(count / of, float(ends.low), float(ends.high))


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, level: float = 0.95
) -> Interval:
    """Mean of `a - b` over seeds with the paired Student t interval: what the seeds share cancels out.

    `a`, `b`: (n,) floats of the same seeds in the same order. Raises ValueError for unequal lengths, and as
    `seed_interval` does.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"expected the same seeds in both, found shapes {first.shape} and {second.shape}")
    return seed_interval(first - second, level)


def iqm(values: np.ndarray) -> float:
    """Interquartile mean (Agarwal et al. 2021): the mean without the lowest and the highest quarter; any shape."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"expected finite values, found {sample.tolist()}")
    ordered = np.sort(sample, axis=None)  # what stats.trim_mean does, ten times as fast: a bootstrap calls it often
    cut = sample.size // 4
    return float(ordered[cut : sample.size - cut].mean())


def stratified_bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = iqm,
    level: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
) -> Interval:
    """A statistic of (seeds, tasks) values with its percentile interval: seeds are drawn anew within each task.

    As Agarwal et al. (2021) do; it takes the tasks (here generators) as given. Where the tasks of a seed share one
    training, as here, drawing them apart makes the interval too narrow: read it beside the paired t interval.

    Raises ValueError for other shapes and for values that are not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"expected finite values of shape (seeds, tasks), found {table.shape}")
    if len(table) == 1:
        return Interval(float(statistic(table)), math.nan, math.nan)
    chosen = np.random.default_rng(seed).integers(0, len(table), (draws, *table.shape))
    found = [statistic(np.take_along_axis(table, rows, axis=0)) for rows in chosen]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(table)), float(low), float(high))


def rounded_text(value: float, digits: int = 1, sign: bool = False) -> str:
    """`value` with `digits` decimals, as every report and figure prints per cent, points and degrees.

    Rounded first to 4 decimals (a fraction's 6, which metrics.json keeps), so that equal numbers print alike however
    they were summed; then half away from zero, as by hand: 69.55 -> "69.6". A minus is U+2212, and what prints as zero
    has none. With `sign` every number has one, also what prints as zero: an interval up to "−0.0" lies below zero.
    Raises ValueError for a value that is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number to print, found {value}")
    exact = Decimal(repr(round(float(value), 4)))
    shown = exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    text = f"{abs(shown):f}"
    return f"−{text}" if shown < 0 or (sign and exact < 0) else f"+{text}" if sign else text


def percent_text(fraction: float, digits: int = 1, sign: bool = False) -> str:
    """A fraction in per cent without the sign "%", as `rounded_text` prints it: 0.6955 -> "69.6"."""
    return rounded_text(100.0 * fraction, digits, sign)


def interval_text(interval: Interval, sign: bool = True) -> str:
    """Mean and ends, "1.2 [0.3, 2.1]", each as `rounded_text` prints it; the mean alone where there are no ends."""
    if not interval.known:
        return rounded_text(interval.mean, sign=sign)
    mean, low, high = (rounded_text(value, sign=sign) for value in interval)
    return f"{mean} [{low}, {high}]"
