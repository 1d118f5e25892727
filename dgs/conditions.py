"""Conditions that images are tested under: "native", "png", or a kind of change with its strength: "jpeg:75"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dgs.errors import did_you_mean

NATIVE = "native"  # as stored; always scored
PNG = "png"  # decoded once, stored without loss


class Kind(NamedTuple):
    """What there is to know of a kind of change, beside its function in `data.perturbations`.

    strength: what the number after the colon is, for error sentences, with an `example` of a condition.
    unchanged: the strength that leaves an image alone. 0: a larger one is harsher, else a smaller one.
    most: the largest strength allowed; all are above 0. whole: whole numbers alone.
    axis, words: of its panel in figures, and of one condition in a sentence.
    """

    strength: str
    example: str
    unchanged: float
    most: float
    axis: str
    words: str
    whole: bool = False


KINDS = {
    "jpeg": Kind("a quality", "jpeg:75", 101, 100, "JPEG quality", "JPEG {:g}", whole=True),
    "blur": Kind("a standard deviation in px", "blur:1", 0, 100, "Blur, σ (px)", "blur of {:g} px"),
    "resize": Kind("a factor", "resize:0.5", 1, 16, "Resize and back, factor", "resizing by {:g}"),
    "noise": Kind(
        "a standard deviation in 8-bit levels", "noise:4", 0, 255, "Noise, σ (8-bit levels)", "noise of {:g} levels"
    ),
    "crop": Kind("a share of the sides", "crop:0.9", 1, 1, "Crop, share of the sides", "cropping to {:g} of the sides"),
}


@dataclass(frozen=True)
class Condition:
    """One change: its kind ("jpeg", "blur", "resize", "noise", "crop", "png") and strength (NaN-free; 0 for png)."""

    kind: str
    strength: float = 0.0

    @property
    def name(self) -> str:
        """As in params.yaml and detection.csv; equal conditions have equal names."""
        return self.kind if self.kind == PNG else f"{self.kind}:{self.strength:g}"

    @property
    def severity(self) -> float:
        """Larger is harsher, among conditions of one kind; what is finer than native is below 0."""
        idle = 0 if self.kind == PNG else KINDS[self.kind].unchanged
        return idle - self.strength if idle else self.strength

    @property
    def words(self) -> str:
        """As in a sentence: "blur of 2 px"."""
        return "PNG" if self.kind == PNG else KINDS[self.kind].words.format(self.strength)


def parse_condition(text: str) -> Condition:
    """A condition by its name.

    Raises:
        ValueError: misspelled, without a strength or with one out of range; says what is expected.
    """
    kind, colon, number = text.strip().partition(":")
    if kind == NATIVE:
        raise ValueError("leave 'native' out, it is always scored")
    if kind == PNG:
        if colon:
            raise ValueError("'png' has no strength, write it alone")
        return Condition(PNG)
    if kind not in KINDS:
        examples = ", ".join([*(known.example for known in KINDS.values()), PNG])
        raise ValueError(f"unknown condition.{did_you_mean(kind, [*KINDS, PNG])} Expected such as {examples}")
    known = KINDS[kind]
    try:
        strength = float(number)
    except ValueError:
        strength = -1.0
    if not 0 < strength <= known.most or strength == known.unchanged or (known.whole and strength != round(strength)):
        span = f"a whole number from 1 to {known.most:g}" if known.whole else f"above 0, at most {known.most:g}"
        other = f" and not {known.unchanged:g}" if known.unchanged <= known.most and known.unchanged else ""
        raise ValueError(f"expected {known.strength} after '{kind}:', {span}{other}, such as {known.example}")
    return Condition(kind, strength)
