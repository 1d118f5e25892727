"""From a logit to what people are told, by what a checkpoint keeps: probability, calibrated probability, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from dgs.calibration import CalibrationMap
from dgs.errors import UserError
from dgs.model.checkpoint import deciding_rule
from dgs.stats import percent_text
from dgs.verdicts import DEFAULT, Band, Verdict, band, smallest_promise


@dataclass(frozen=True)
class Promise:
    """What is asked of verdicts: at most these shares of wrong ones on images like the validation images.

    None: `DEFAULT`, or the smallest that the validation images can vouch for. two_way: no verdict is "unsure".
    """

    false_alarm: float | None = None
    miss: float | None = None
    two_way: bool = False

    def __post_init__(self) -> None:
        if self.two_way and (self.false_alarm, self.miss) != (None, None):
            raise UserError("Expected --two-way or promises, found both. Leave one of them out.")
        for name, share in (("--max-false-alarm", self.false_alarm), ("--max-miss", self.miss)):
            if share is not None and not 0 < share < 1:
                raise UserError(f"Expected {name} between 0 and 1, such as 0.05 for 5 %, found {share:g}.")


@dataclass(frozen=True)
class Judge:
    """How logits are read. band: None where verdicts are two-way, at `threshold`. note: a sentence for people."""

    threshold: float
    band: Band | None
    calibration_map: CalibrationMap | None
    note: str

    def verdict(self, logit: float) -> Verdict:
        """Of one image."""
        return (self.band or Band(self.threshold, self.threshold)).verdict(logit)

    def told(self, logit: float) -> dict[str, Any]:
        """{"probability", "verdict"}, and where the checkpoint keeps what they need "calibrated" and "band".

        probability: sigmoid(logit). calibrated: by the map. band: the probabilities between which it is unsure.
        """
        found: dict[str, Any] = {"probability": float(expit(logit)), "verdict": self.verdict(logit)}
        if self.calibration_map is not None:
            found["calibrated"] = float(self.calibration_map(np.array([logit]))[0])
        if self.band is not None:
            found["band"] = [float(expit(self.band.low)), float(expit(self.band.high))]
        return found


def judge(info: dict[str, Any], folder: Path, asked: Promise) -> Judge:
    """How the checkpoint in `folder`, with this dgs.json, is read.

    Raises:
        UserError: a promise is asked for that its validation images cannot vouch for, or it keeps none of them.
    """
    rule, threshold = deciding_rule(info, folder)
    fitted = info.get("calibration_map")
    by_map = None if fitted is None else CalibrationMap.model_validate(fitted)
    if asked.two_way:
        return Judge(threshold, None, by_map, what_a_verdict_is(info, rule, threshold))
    kept = info.get("validation_logits") or {}
    real, fake = (np.array(kept.get(label, ()), np.float64) for label in ("real", "fake"))
    if not len(real) or not len(fake):
        if (asked.false_alarm, asked.miss) != (None, None):
            raise UserError(
                f"Expected {folder} to keep logits of validation images, on which promises rest, found none. Leave "
                "--max-false-alarm and --max-miss out, or train again."
            )
        return Judge(threshold, None, by_map, what_a_verdict_is(info, rule, threshold))
    false_alarm, miss = (
        max(DEFAULT, smallest_promise(len(images))) if share is None else share
        for share, images in ((asked.false_alarm, real), (asked.miss, fake))
    )
    found = band(real, fake, false_alarm, miss, threshold)
    return Judge(threshold, found, by_map, _what_a_band_is(found, real, fake, false_alarm, miss))


def _probability_of(logit: float) -> str:
    return f"{float(expit(logit)):.3f}"


def _what_a_band_is(found: Band, real: np.ndarray, fake: np.ndarray, false_alarm: float, miss: float) -> str:
    verdicts = [found.verdict(logit) for logit in (*real, *fake)]
    unsure = verdicts.count("unsure") / len(verdicts)
    between = "" if found.low == found.high else f", 'real' below {_probability_of(found.low)}, 'unsure' between"
    short = [
        f"{kind} images are {len(images)}, which vouch for {percent_text(smallest_promise(len(images)))} % at best"
        for kind, images in (("real", real), ("generated", fake))
        if smallest_promise(len(images)) > DEFAULT
    ]
    few = f" (validation images are few: {'; '.join(short)})" if short else ""
    return (
        f"'generated' above a probability of {_probability_of(found.high)}{between}. With 95 % confidence each, at "
        f"most {percent_text(false_alarm)} % of real images like its {len(real)} validation images are called "
        f"generated, and at most {percent_text(miss)} % of generated ones like its {len(fake)} real{few}; "
        f"{percent_text(unsure)} % of validation images are unsure; expect worse on images of other sources"
    )


def what_a_verdict_is(info: dict[str, Any], rule: str, threshold: float) -> str:
    """One sentence for people on two-way verdicts: what is called generated, and how often that was wrong."""
    above = f"'generated' above a probability of {_probability_of(threshold)}"
    measured = info.get("calibration", {}).get(rule)
    if measured is None:
        return f"{above}, not calibrated on any images: how often that is a false alarm is not known"
    alarm, caught = measured["false_alarm"], measured["caught"]
    there = (
        "the best threshold on its validation images, where"
        if rule == "val"
        else ("not calibrated on any images; on its validation images")
    )
    return (
        f"{above}, {there} it raised a false alarm on {percent_text(alarm['rate'])} % "
        f"[{percent_text(alarm['low'])}, {percent_text(alarm['high'])}] of {alarm['of']} real images and caught "
        f"{percent_text(caught['rate'])} % of {caught['of']} generated ones; expect worse on images of other sources"
    )
