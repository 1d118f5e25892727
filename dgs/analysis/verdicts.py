"""What `dgs score` would say of test images: calibrated probabilities, and verdicts that can be "unsure".

Each run's map, threshold and band come from its scores of validation images, as those in its checkpoint do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from dgs.analysis.metrics import RUN, native_rows, rows_by_generator
from dgs.calibration import FOLDS, fit_map, reliability
from dgs.stats import Scored, best_threshold
from dgs.verdicts import DEFAULT, band, smallest_promise

FILE = "verdicts.csv"
RATES = [
    "ece_before", "ece_after", "brier_before", "brier_after", "aurc", "false_alarm", "miss", "unsure_real",
    "unsure_fake",
]  # fmt: skip
COLUMNS = [*RUN, "generator", "seen", "n_real", "n_fake", *RATES]
COVERAGES = np.arange(1, 21) / 20


def selective_risk(images: Scored, threshold: float) -> NDArray[np.float64]:
    """Share of wrong decisions among the k images farthest from the threshold: (N,) for k = 1 to N.

    Its mean is the area under the risk-coverage curve (AURC, Geifman and El-Yaniv 2017).
    """
    surest_first = np.argsort(-np.abs(images.logits - threshold), kind="stable")
    wrong = ((images.logits > threshold) != (images.truth == 1))[surest_first]
    return np.cumsum(wrong) / np.arange(1, len(wrong) + 1)


def _runs(scores: pd.DataFrame) -> Iterator[tuple[dict[str, Any], Scored, list[tuple[str, Scored]]]]:
    """(rho, method and seed; validation images; test images by generator) of each run that has enough to choose by."""
    if "rho" not in scores.columns:
        scores = scores.assign(rho=np.nan)
    for key, run in native_rows(scores).groupby(RUN, dropna=False, sort=False):
        own = run[run["split"] == "val"]
        if own["label"].value_counts().reindex([0, 1], fill_value=0).min() < FOLDS:
            continue
        validation = Scored.of(own["label"].to_numpy(), own["logit"].to_numpy())
        tests = rows_by_generator(run[run["split"] == "test"])
        found = [(name, Scored.of(rows["label"].to_numpy(), rows["logit"].to_numpy())) for name, rows in tests]
        yield dict(zip(RUN, key, strict=True)), validation, found


def verdict_table(scores: pd.DataFrame, seen: Collection[str]) -> pd.DataFrame:
    """One row a run and generator, over native test images; runs with too few validation images have none.

    ece, brier: of sigmoid(logit), and after the calibration map. aurc: mean of `selective_risk` at the threshold chosen
    on validation images. false_alarm, miss, unsure: shares of real images called generated, of generated ones called
    real, and of either called neither, where each of the first two is promised to be at most `DEFAULT` (or what the
    validation images can vouch for).
    """
    rows = []
    for run, validation, tests in _runs(scores):
        fitted = fit_map(validation)
        assert fitted is not None, "there are enough images"
        threshold = best_threshold(validation.truth, validation.logits)
        real, fake = (max(DEFAULT, smallest_promise(len(of))) for of in (validation.reals, validation.fakes))
        edges = band(validation.reals, validation.fakes, real, fake, threshold)
        for generator, images in tests:
            told = reliability(images.truth, expit(images.logits), fitted(images.logits))
            kinds = {
                kind: np.array([edges.verdict(logit) for logit in of])
                for kind, of in (("real", images.reals), ("fake", images.fakes))
            }
            rows.append(
                {
                    **run, **told, "generator": generator, "seen": generator in seen,
                    "n_real": len(images.reals), "n_fake": len(images.fakes),
                    "aurc": float(selective_risk(images, threshold).mean()),
                    "false_alarm": float((kinds["real"] == "generated").mean()),
                    "miss": float((kinds["fake"] == "real").mean()),
                    **{f"unsure_{kind}": float((of == "unsure").mean()) for kind, of in kinds.items()},
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def risk_by_coverage(scores: pd.DataFrame, seen: Collection[str]) -> pd.DataFrame:
    """`selective_risk` at shares of images that are decided: columns method, seed, generator, seen, coverage, risk."""
    parts = []
    for run, validation, tests in _runs(scores):
        threshold = best_threshold(validation.truth, validation.logits)
        for generator, images in tests:
            risk = selective_risk(images, threshold)
            at = np.maximum(np.ceil(COVERAGES * len(risk)).astype(int), 1) - 1
            facts = {"method": run["method"], "seed": run["seed"], "generator": generator, "seen": generator in seen}
            parts.append(pd.DataFrame({"coverage": COVERAGES, "risk": risk[at]}).assign(**facts))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["method", "coverage", "risk"])
