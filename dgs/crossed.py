"""Is a difference of two methods shown? An interval with seeds, generators and test images as random, and p values.

The one definition of "shown": `crossed_interval` excludes zero. An interval over seeds takes the generators and the
test images for the only ones there are, so it is too narrow for any claim beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dgs.stats import Interval

BLOCKS = 40  # of test images in a jackknife, at most
Floats = NDArray[np.float64]
Blocks = NDArray[np.int64]
# (reals (N,), fakes (M,), their blocks (N,), (M,), number of blocks): the rate of all images, then without each block.
Rate = Callable[[Floats, Floats, Blocks, Blocks, int], Floats]


class Crossed(NamedTuple):
    """A mean difference, its 95 % interval, the two-sided p value of no difference, and the degrees of freedom."""

    interval: Interval
    p: float
    df: float


def crossed_interval(cells: Floats, level: float = 0.95) -> Crossed:
    """Mean of a two-way table of differences with a t interval in which rows, columns and images are random.

    Model, for seed s and generator g: y_sg = mu + a_s + b_g + c + e_sg, all effects independent with mean 0. a:
    training again; b: another generator, and the images that it alone has; e: both together; c: what cells of different
    seeds and different generators still share, which is test images. The variance of the mean is
    (MS_a + MS_b - MS_e) / (S G) + var(c): mean squares of the two-way crossed random-effects analysis of variance
    (Searle, Casella & McCulloch 1992, ch. 4), negative components as 0, and var(c) the mean jackknife covariance
    (Efron & Stein 1981) of such pairs of cells. Degrees of freedom after Satterthwaite (1946), at least the lesser of
    S - 1 and G - 1. `python -m studies.coverage` measures how often the interval holds the truth.

    Args:
        cells: (1 + K, S, G) differences: of all images, then without each of K blocks of images (`RATES`).

    Fewer than 2 seeds, 2 generators or 2 blocks: a mean without interval or p. Raises ValueError for another shape and
    for values that are not finite.
    """
    table = np.asarray(cells, dtype=np.float64)
    if table.ndim != 3 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"expected finite values of shape (1 + blocks, seeds, generators), found {table.shape}")
    (y, left_out), (_, seeds, generators) = (table[0], table[1:]), table.shape
    mean = float(y.mean())
    if min(seeds, generators, len(left_out)) < 2:
        return Crossed(Interval(mean, math.nan, math.nan), math.nan, math.nan)
    by_seed, by_generator = y.mean(1), y.mean(0)
    rest = y - by_seed[:, None] - by_generator + mean
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (generators - 1))
    of_seeds = max(generators * float(by_seed.var(ddof=1)), of_rest)
    of_generators = max(seeds * float(by_generator.var(ddof=1)), of_rest)
    size = seeds * generators
    shared = max(0.0, _shared_variance(left_out))
    parts = np.array([of_seeds / size, of_generators / size, -of_rest / size, shared])
    freedoms = np.array([seeds - 1, generators - 1, (seeds - 1) * (generators - 1), len(left_out) - 1])
    variance = float(parts.sum())
    if variance <= 1e-24:  # every cell alike, but for rounding
        return Crossed(Interval(mean, mean, mean), float(abs(mean) < 1e-12), math.inf)
    df = max(variance**2 / float((parts**2 / freedoms).sum()), min(seeds, generators) - 1.0)
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1.0 + level) / 2.0, df)) * error
    return Crossed(Interval(mean, mean - half, mean + half), 2.0 * float(stats.t.sf(abs(mean) / error, df)), df)


def _shared_variance(left_out: Floats) -> float:
    """Mean jackknife covariance of cells that differ in both seed and generator; `left_out`: (K, S, G)."""
    blocks, seeds, generators = left_out.shape
    moved = (left_out - left_out.mean(0)) * math.sqrt((blocks - 1) / blocks)
    pairs = moved.sum((1, 2)) ** 2 - (moved.sum(2) ** 2).sum(1) - (moved.sum(1) ** 2).sum(1) + (moved**2).sum((1, 2))
    return float(pairs.sum()) / (seeds * (seeds - 1) * generators * (generators - 1))


def balanced_accuracies(reals: Floats, fakes: Floats, of_reals: Blocks, of_fakes: Blocks, blocks: int) -> Floats:
    """Balanced accuracy at logit 0 of all images, then without each block: (1 + blocks,)."""

    def shares(right: NDArray[np.bool_], of: Blocks) -> Floats:
        rights, counts = np.bincount(of, right, blocks), np.bincount(of, minlength=blocks)
        return np.append(rights.sum(), rights.sum() - rights) / np.append(len(of), len(of) - counts)

    return (shares(~(reals > 0), of_reals) + shares(fakes > 0, of_fakes)) / 2


def average_precisions(reals: Floats, fakes: Floats, of_reals: Blocks, of_fakes: Blocks, blocks: int) -> Floats:
    """Average precision of "fake" (scikit-learn's) of all images, then without each block: (1 + blocks,)."""
    values, at = np.unique(np.concatenate([reals, fakes]), return_inverse=True)
    at_reals, at_fakes = at[: len(reals)], at[len(reals) :]

    def above(at: Blocks, of: Blocks) -> NDArray[np.int64]:
        """How many images of each block score at least as high as each fake: (blocks, fakes)."""
        counts = np.bincount(of * len(values) + at, minlength=blocks * len(values)).reshape(blocks, -1)
        found: NDArray[np.int64] = counts[:, ::-1].cumsum(1)[:, ::-1][:, at_fakes]
        return found

    alarms, caught = (
        np.vstack([own.sum(0), own.sum(0) - own]) for own in (above(at_reals, of_reals), above(at_fakes, of_fakes))
    )
    is_in = np.vstack([np.ones(len(fakes), bool), of_fakes != np.arange(blocks)[:, None]])
    precision = np.divide(caught, caught + alarms, out=np.zeros(caught.shape), where=is_in)
    found: Floats = precision.sum(1) / is_in.sum(1)
    return found


RATES: dict[str, Rate] = {"balanced_acc": balanced_accuracies, "ap": average_precisions}


def sign_flip_p(values: Sequence[float] | Floats) -> float:
    """Exact two-sided p value of a mean of 0, from all signs that the values could have had (Fisher 1935).

    `values`: (n,), one a seed. With n seeds it cannot go below 2 ** (1 - n): 0.0625 for 5. NaN for fewer than 2.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return math.nan
    sums = sample[:1]  # the first sign may stay: turning all of them changes no |sum|
    for value in sample[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(sample.sum()) - 1e-12))


def holm(p: Sequence[float] | Floats) -> Floats:
    """p values adjusted for their number, which bounds the chance of any false claim (Holm 1979); NaN is no test."""
    given = np.asarray(p, dtype=np.float64)
    order = np.argsort(given)[: int(np.isfinite(given).sum())]  # NaN come last
    adjusted = np.full(given.shape, math.nan)
    steps = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
