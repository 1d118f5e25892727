"""Calibration: from a detector's logit to the share of fakes among images that score like it.

The map is of one of two kinds, and the kind that does better on validation images which it was not fitted on is kept:
temperature scaling divides logits by one number (Guo et al. 2017); isotonic regression finds the monotone curve through
the labels (Zadrozny and Elkan 2002). What either says holds for images like those it was fitted on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from scipy.special import expit

from dgs.stats import Scored, expected_calibration_error, rounded

FOLDS = 5
LOG_TEMPERATURE = 5.0  # the temperature lies between exp(-5) and exp(5)
Share = Annotated[float, Field(ge=0, le=1)]


class CalibrationMap(BaseModel):
    """A map from logits to probabilities, as dgs.json has it.

    temperature: that logits are divided by. logits, probabilities: of an isotonic map, corners of the curve; beyond the
    outer ones it stays what it is there. Empty, and 1, for the other kind. reliability: `reliability`.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    kind: Literal["temperature", "isotonic"]
    temperature: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    logits: list[FiniteFloat] = []
    probabilities: list[Share] = []
    reliability: dict[str, float | None] = {}

    @model_validator(mode="after")
    def _corners(self) -> CalibrationMap:
        rises = all((np.diff(of) >= 0).all() for of in (self.logits, self.probabilities))
        if len(self.logits) != len(self.probabilities) or not rises or (self.kind == "isotonic") != bool(self.logits):
            raise ValueError("expected as many rising logits as rising probabilities, for an isotonic map alone")
        return self

    def __call__(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities of (N,) logits, float64 in 0..1; a larger logit never has a smaller one."""
        given = np.asarray(logits, dtype=np.float64)
        if self.kind == "temperature":
            return expit(given / self.temperature)
        return np.interp(given, self.logits, self.probabilities)


def _temperature(images: Scored) -> CalibrationMap:
    """The temperature with the least log loss."""
    from scipy.optimize import minimize_scalar  # here, since `dgs score` starts without what fits maps

    signed = np.where(images.truth == 1, -images.logits, images.logits)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, signed * np.exp(-log_temperature)).mean())

    found = minimize_scalar(loss, bounds=(-LOG_TEMPERATURE, LOG_TEMPERATURE), method="bounded")
    return CalibrationMap(kind="temperature", temperature=float(np.exp(found.x)))


def _isotonic(images: Scored) -> CalibrationMap:
    """The monotone curve with the least squared error; no image is sure: of n, one more or less stays open."""
    from sklearn.isotonic import IsotonicRegression

    sure = 1 / (len(images.truth) + 2)
    curve = IsotonicRegression(y_min=sure, y_max=1 - sure, out_of_bounds="clip").fit(images.logits, images.truth)
    return CalibrationMap(
        kind="isotonic", logits=curve.X_thresholds_.tolist(), probabilities=curve.y_thresholds_.tolist()
    )


KINDS = {"temperature": _temperature, "isotonic": _isotonic}  # the simpler first: of equal ones it is kept


def reliability(truth: NDArray[np.int64], before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, Any]:
    """How far off probabilities of (N,) images are, before and after a map, fractions in JSON types.

    ece: `expected_calibration_error`. brier: mean squared distance to the label. A map's own images flatter it: `after`
    should come from folds without the image.
    """
    found: dict[str, Any] = {"images": len(truth)}
    for name, given in (("before", before), ("after", after)):
        found[f"ece_{name}"] = rounded(expected_calibration_error(truth, given))
        found[f"brier_{name}"] = rounded(float(np.mean((given - truth) ** 2)))
    return found


def fit_map(images: Scored) -> CalibrationMap | None:
    """The map of the kind with the smaller Brier score, each image's by a map of the other folds; fitted on all.

    None with fewer images of a label than `FOLDS`.
    """
    from sklearn.model_selection import StratifiedKFold

    if min(len(images.reals), len(images.fakes)) < FOLDS:
        return None
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(images.logits, images.truth))

    def cross_fitted(kind: str) -> NDArray[np.float64]:
        found = np.empty(len(images.truth))
        for learn, rest in folds:
            found[rest] = KINDS[kind](Scored(images.truth[learn], images.logits[learn]))(images.logits[rest])
        return found

    by_kind = {kind: cross_fitted(kind) for kind in KINDS}
    best = min(by_kind, key=lambda kind: float(np.mean((by_kind[kind] - images.truth) ** 2)))
    told = reliability(images.truth, expit(images.logits), by_kind[best])
    return KINDS[best](images).model_copy(update={"reliability": told})
