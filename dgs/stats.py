"""Rates of a set of scored images, how sure a mean over seeds is, and how numbers are printed.

A logit is the detector's output before the sigmoid: an image is called generated where logit > threshold, and the
threshold 0 is sigmoid(logit) > 0.5. All rates are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from dgs.errors import UserError

BINS = 15  # of probability, equally wide, for the calibration error
DRAWS = 2_000  # of a bootstrap
DECIMALS = 6  # that files keep: far below what any test set can resolve, far above the noise of summation order


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


def effective_size(weights: np.ndarray) -> float:
    """As how many equally weighed images weighed ones count: (sum w)^2 / sum w^2 (Kish 1965). `weights`: (N,)."""
    return float(np.sum(weights) ** 2 / np.sum(np.square(weights)))


def share_interval(count: int, of: int) -> Interval:
    """A share with its 95 % interval after Wilson (1927), which stays in [0, 1] and says something for 0 of n too.

    Raises ValueError unless 0 <= count <= of and of > 0.
    """
    ends = stats.binomtest(count, of).proportion_ci(method="wilson")
    return Interval(count / of, float(ends.low), float(ends.high))


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Interval:
    """Mean of `a - b` over seeds with the paired 95 % Student t interval: what the seeds share cancels out.

    `a`, `b`: (n,) floats of the same seeds in the same order. Raises ValueError for unequal lengths, and as
    `seed_interval` does.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"expected the same seeds in both, found shapes {first.shape} and {second.shape}")
    return seed_interval(first - second)


def iqm(values: np.ndarray) -> float:
    """Interquartile mean (Agarwal et al. 2021): the mean without the lowest and the highest quarter; any shape."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"expected finite values, found {sample.tolist()}")
    ordered = np.sort(sample, axis=None)  # what stats.trim_mean does, ten times as fast: a bootstrap calls it often
    cut = sample.size // 4
    return float(ordered[cut : sample.size - cut].mean())


def stratified_bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float] = iqm) -> Interval:
    """A statistic of (seeds, tasks) values with its 95 % percentile interval: seeds are drawn anew within each task.

    As Agarwal et al. (2021) do; it takes the tasks (here generators) as given. Where the tasks of a seed share one
    training, as here, drawing them apart makes the interval too narrow: read it beside the paired t interval.

    Raises ValueError for other shapes and for values that are not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"expected finite values of shape (seeds, tasks), found {table.shape}")
    if len(table) == 1:
        return Interval(float(statistic(table)), math.nan, math.nan)
    chosen = np.random.default_rng(0).integers(0, len(table), (DRAWS, *table.shape))
    found = [statistic(np.take_along_axis(table, rows, axis=0)) for rows in chosen]
    low, high = np.quantile(found, [(1 - 0.95) / 2, (1 + 0.95) / 2])
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


def rounded(value: float) -> float | None:
    """`value` as JSON files keep it: 6 decimals, None for NaN."""
    return None if math.isnan(value) else round(float(value), DECIMALS)


@dataclass(frozen=True, eq=False)
class Scored:
    """Labels and logits of one set of images, checked: what every rate is a function of.

    truth: (N,) int64, 0 real, 1 fake, both present. logits: (N,) float64, finite.
    """

    truth: NDArray[np.int64]
    logits: NDArray[np.float64]

    @classmethod
    def of(cls, labels: np.ndarray, logits: np.ndarray, where: str = "") -> Scored:
        """Check (N,) labels and logits; `where` says in an error which images they are of.

        Raises:
            UserError: shapes differ, a label is not 0 or 1, a class is missing, or a logit is not finite.
        """
        truth, score = np.asarray(labels), np.asarray(logits, dtype=np.float64)
        if truth.ndim != 1 or truth.shape != score.shape:
            raise UserError(f"Expected one label a logit, found labels {truth.shape} and logits {score.shape}.")
        if not np.isin(truth, (0, 1)).all():
            raise UserError(f"Expected labels 0 (real) and 1 (fake), found {np.unique(truth).tolist()}.")
        if truth.size == 0 or truth.min() == truth.max():
            raise UserError(
                f"Expected real and fake images, found {int((truth == 0).sum())} real and {int((truth == 1).sum())} "
                f"fake."
            )
        bad = int((~np.isfinite(score)).sum())
        if bad:
            raise UserError(
                f"{bad} of {score.size} logits are not finite{where}: did training diverge? Try a lower learning rate."
            )
        return cls(truth.astype(np.int64), score)

    @cached_property
    def reals(self) -> NDArray[np.float64]:
        """Logits of the real images."""
        return self.logits[self.truth == 0]

    @cached_property
    def fakes(self) -> NDArray[np.float64]:
        """Logits of the fake images."""
        return self.logits[self.truth == 1]

    @cached_property
    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares of reals and of fakes that are called fake, at every threshold (scikit-learn)."""
        from sklearn.metrics import roc_curve  # here, since `dgs score` needs no metric and starts without it

        false_alarms, caught, _ = roc_curve(self.truth, self.logits, drop_intermediate=False)
        return false_alarms, caught


def real_accuracy(images: Scored, threshold: float = 0.0) -> float:
    """Share of the real images that are called real."""
    return float(np.mean(~(images.reals > threshold)))


def fake_accuracy(images: Scored, threshold: float = 0.0) -> float:
    """Share of the fake images that are called fake."""
    return float(np.mean(images.fakes > threshold))


def balanced_accuracy(images: Scored, threshold: float = 0.0) -> float:
    """Mean of the accuracies on reals and on fakes: 0.5 is chance, whatever the mix."""
    return (real_accuracy(images, threshold) + fake_accuracy(images, threshold)) / 2.0


def accuracy(images: Scored, threshold: float = 0.0) -> float:
    """Share of all images that are called what they are."""
    return float(np.mean((images.logits > threshold) == (images.truth == 1)))


def average_precision(images: Scored) -> float:
    """Average precision of "fake" (scikit-learn)."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(images.truth, images.logits))


def area_under_roc(images: Scored) -> float:
    """Area under the ROC curve: how often a fake scores above a real image, ties half (scikit-learn)."""
    from sklearn.metrics import auc

    return float(auc(*images.roc))


def caught_at(images: Scored, false_alarms: float) -> float:
    """Largest share of fakes caught at a false-alarm rate of at most `false_alarms`."""
    alarms, caught = images.roc
    return float(caught[alarms <= false_alarms].max())


def probability_bins(probability: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each of (N,) probabilities, 0 to 14."""
    return np.minimum((probability * BINS).astype(np.int64), BINS - 1)


def expected_calibration_error(truth: NDArray[np.int64], probability: NDArray[np.float64]) -> float:
    """|mean probability - share of fakes| over 15 equal bins of probability, weighted by their images; both (N,).

    Naeini et al. (2015), in its binary form.
    """
    gap = np.bincount(probability_bins(probability), weights=probability - truth, minlength=BINS)
    return float(np.abs(gap).sum() / truth.size)


def calibration_error(images: Scored) -> float:
    """`expected_calibration_error` of sigmoid(logit)."""
    return expected_calibration_error(images.truth, expit(images.logits))


def best_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """The logit threshold that maximises balanced accuracy.

    Choose by it on validation scores; on test scores it gives an upper bound (the rule "oracle"), never a choice.

    `labels`: (N,) 0/1; `logits`: (N,). All thresholds between two neighbouring scores decide alike, so the answer is
    the middle of such an interval; of several best intervals the one nearest to 0 counts. Where "everything is fake"
    or "everything is real" is best, the answer lies 1 outside the scores. Raises UserError as `Scored.of` does.
    """
    images = Scored.of(labels, logits)
    values, position = np.unique(images.logits, return_inverse=True)
    fakes = np.bincount(position, weights=images.truth, minlength=len(values)).astype(np.int64)
    reals = np.bincount(position, weights=1 - images.truth, minlength=len(values)).astype(np.int64)
    n_fake, n_real = int(fakes.sum()), int(reals.sum())
    below_fake, below_real = np.append(0, np.cumsum(fakes)), np.append(0, np.cumsum(reals))
    # 2 * n_fake * n_real * balanced accuracy, as integers: ties are exact.
    quality = (n_fake - below_fake) * n_real + below_real * n_fake
    low, high = np.append(-np.inf, values), np.append(values, np.inf)
    distance = np.where(low > 0, low, np.where(high <= 0, -high, 0.0))
    best = np.flatnonzero(quality == quality.max())
    chosen = best[np.argmin(distance[best])]
    if chosen == 0:
        return float(values[0] - 1.0)
    if chosen == len(values):
        return float(values[-1] + 1.0)
    return float((low[chosen] + high[chosen]) / 2.0)


def calibrate(labels: np.ndarray, logits: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    """Thresholds on the logit by rule ("0.5", "val"), and by rule how each does on these validation images.

    `labels`: (N,) 0/1; `logits`: (N,). The second is {rule: {"false_alarm", "caught"}} of the shares of real and of
    fake images that are called fake, each {count, of, rate, low, high} with a 95 % Wilson interval, in JSON types. For
    "val", which was chosen on the same images, they are a little too good. Raises UserError as `Scored.of` does.
    """
    images = Scored.of(labels, logits)
    thresholds = {"0.5": 0.0, "val": best_threshold(labels, logits)}
    measured = {
        rule: {"false_alarm": _share(images.reals > threshold), "caught": _share(images.fakes > threshold)}
        for rule, threshold in thresholds.items()
    }
    return thresholds, measured


def _share(chosen: NDArray[np.bool_]) -> dict[str, Any]:
    count, of = int(chosen.sum()), len(chosen)
    rate, low, high = (rounded(end) for end in share_interval(count, of))
    return {"count": count, "of": of, "rate": rate, "low": low, "high": high}
