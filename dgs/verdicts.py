"""Verdicts: generated, real or unsure, with a promise on how often the first two are wrong on validation images.

A promise is an exact binomial bound: a threshold on the logit such that, with 95 % confidence, at most a given share of
images like the validation images lies on its wrong side. It is a one-sided tolerance limit of the order statistics, so
that nothing is assumed of how logits are distributed (Wilks 1941).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from dgs.errors import UserError
from dgs.stats import percent_text

CONFIDENCE = 0.95
DEFAULT = 0.05  # of both promises, where none is asked for
Verdict = Literal["generated", "real", "unsure"]


def smallest_promise(count: int) -> float:
    """The smallest share of wrong verdicts that `count` validation images can vouch for, up to a tenth of a %."""
    return 1.0 if count < 1 else float(np.ceil(1000 * (1 - (1 - CONFIDENCE) ** (1 / count))) / 1000)


def wrong_allowed(count: int, share: float) -> int:
    """How many of `count` images may be wrong for at most `share` to be vouched for (Clopper-Pearson); -1: not one."""
    return int((bdtr(np.arange(count), count, share) <= 1 - CONFIDENCE).sum()) - 1


def threshold_for(logits: NDArray[np.float64], share: float) -> float | None:
    """The lowest threshold that at most `share` of images like these exceed; None: too few images to vouch for it.

    `logits`: (N,) of validation images of one label. For a limit from below give them with the sign changed.
    """
    allowed = wrong_allowed(len(logits), share)
    return None if allowed < 0 else float(np.sort(logits)[::-1][allowed])


@dataclass(frozen=True)
class Band:
    """Logits above `high` are generated, those below `low` real, those between unsure (low <= high)."""

    low: float
    high: float

    def verdict(self, logit: float) -> Verdict:
        """Of one image."""
        if logit > self.high:
            return "generated"
        return "real" if logit < self.low or self.low == self.high else "unsure"


def band(
    real: NDArray[np.float64], fake: NDArray[np.float64], false_alarm: float, miss: float, threshold: float
) -> Band:
    """The narrowest band that keeps both promises on images like the validation images.

    Where both hold at one threshold there is no band: it is `threshold`, or the nearest that keeps them.

    Args:
        real, fake: (N,) logits of validation images.
        false_alarm: at most this share of real images is called generated.
        miss: at most this share of generated images is called real.
        threshold: what verdicts without a band go by.

    Raises:
        UserError: too few validation images for a promise; it says the smallest that can be kept.
    """
    high, low = threshold_for(real, false_alarm), threshold_for(-fake, miss)
    for name, kind, found, share, images in (
        ("--max-false-alarm", "real", high, false_alarm, real),
        ("--max-miss", "generated", low, miss, fake),
    ):
        if found is None:
            raise UserError(
                f"Expected enough validation images to promise {percent_text(share)} %, found {len(images)} {kind} "
                f"ones, which can vouch for {percent_text(smallest_promise(len(images)))} % at best. Give {name} "
                f"{smallest_promise(len(images)):g} or more, or --two-way."
            )
    assert high is not None and low is not None
    if -low > high:
        one = min(max(threshold, high), float(np.nextafter(-low, -np.inf)))  # a fake at -low itself is not called real
        return Band(one, one)
    return Band(-low, high)
