"""The calibration map: what it fits, which kind is kept, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import settings
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from dgs.calibration import FOLDS, KINDS, CalibrationMap, fit_map, reliability
from dgs.model.checkpoint import read_info, save_checkpoint
from dgs.model.pixel_cnn import PixelCNN
from dgs.stats import Scored, expected_calibration_error


def drawn(probability: NDArray[np.float64], logits: NDArray[np.float64], seed: int = 0) -> Scored:
    """Images that are fake with the probability given."""
    return Scored.of((np.random.default_rng(seed).random(len(logits)) < probability).astype(np.int64), logits)


def overconfident(count: int = 4000, factor: float = 4.0) -> Scored:
    """A detector whose logits are `factor` times what they should be."""
    true = np.random.default_rng(1).normal(0, 1.5, count)
    return drawn(expit(true), factor * true)


def crooked(count: int = 4000) -> Scored:
    """What no factor mends: a score that is right above 0 and says nothing below."""
    logits = np.random.default_rng(2).uniform(-4, 4, count)
    return drawn(np.where(logits > 0, 0.95, 0.4), logits)


class TestFit:
    def test_temperature_is_what_logits_are_too_large_by(self) -> None:
        fitted = KINDS["temperature"](overconfident())
        assert fitted.temperature == pytest.approx(4.0, rel=0.08)
        unscaled = LogisticRegression(C=1e9, fit_intercept=False)  # the same loss, by other code
        images = overconfident()
        slope = unscaled.fit(images.logits[:, None], images.truth).coef_[0, 0]
        assert fitted.temperature == pytest.approx(1 / slope, rel=1e-3)

    @pytest.mark.parametrize(("images", "kind"), [(overconfident(), "temperature"), (crooked(), "isotonic")])
    def test_the_kind_that_does_better_on_other_images_is_kept_and_mends_the_error(
        self, images: Scored, kind: str
    ) -> None:
        fitted = fit_map(images)
        assert fitted is not None and fitted.kind == kind
        told = fitted.reliability
        assert told["images"] == 4000
        assert (told["ece_before"] or 0) > 0.1 and (told["ece_after"] or 1) < 0.04
        assert (told["brier_after"] or 1) < (told["brier_before"] or 0)
        fresh = overconfident(6000) if kind == "temperature" else crooked(6000)
        assert expected_calibration_error(fresh.truth, fitted(fresh.logits)) < 0.03

    def test_reliability_is_of_folds_without_the_image(self) -> None:
        """On noise an isotonic curve fits its own images better than any map fits others."""
        images = drawn(np.full(60, 0.5), np.random.default_rng(3).normal(size=60))
        own = reliability(images.truth, expit(images.logits), KINDS["isotonic"](images)(images.logits))
        fitted = fit_map(images)
        assert fitted is not None and own["brier_after"] < (fitted.reliability["brier_after"] or 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_order_stays_and_nothing_is_certain(self, kind: str) -> None:
        images = Scored.of(np.array([0] * 10 + [1] * 10), np.arange(20) - 9.5)  # perfectly apart
        given = KINDS[kind](images)(np.linspace(-30, 30, 400))
        assert (np.diff(given) >= 0).all() and given.min() >= 0 and given.max() <= 1
        if kind == "isotonic":
            assert given.min() == pytest.approx(1 / 22) and given.max() == pytest.approx(21 / 22)

    def test_too_few_images_have_no_map(self) -> None:
        labels = np.array([0] * 20 + [1] * (FOLDS - 1))
        assert fit_map(Scored.of(labels, np.arange(24.0))) is None
        assert fit_map(Scored.of(np.append(labels, 1), np.arange(25.0))) is not None

    def test_the_same_images_give_the_same_map(self) -> None:
        assert fit_map(crooked()) == fit_map(crooked())


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "temperature", "temperature": 0.0},
        {"kind": "temperature", "temperature": float("inf")},
        {"kind": "isotonic"},
        {"kind": "isotonic", "logits": [0.0, 1.0], "probabilities": [0.5]},
        {"kind": "isotonic", "logits": [1.0, 0.0], "probabilities": [0.1, 0.5]},
        {"kind": "isotonic", "logits": [0.0, 1.0], "probabilities": [0.6, 0.5]},
        {"kind": "isotonic", "logits": [0.0, 1.0], "probabilities": [0.5, 1.5]},
        {"kind": "spline"},
    ],
)
def test_a_map_that_is_none_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CalibrationMap.model_validate(content)


@pytest.mark.parametrize("images", [overconfident(300), crooked(300)])
def test_a_checkpoint_keeps_the_map_and_the_logits_it_was_fitted_on(tmp_path: Path, images: Scored) -> None:
    images = Scored(images.truth, images.logits.astype(np.float32).astype(np.float64))
    save_checkpoint(tmp_path / "c", PixelCNN.new(0), settings(Path("none")), "pixel_cnn", 0, {}, "d", validation=images)
    kept = read_info(tmp_path / "c")
    assert CalibrationMap.model_validate(kept["calibration_map"]) == fit_map(images)
    for name, logits in (("real", images.reals), ("fake", images.fakes)):
        assert np.array_equal(np.array(kept["validation_logits"][name], np.float32), np.sort(logits).astype(np.float32))
