"""Conditions that images are tested under: "native", "png", or a kind of change with its strength: "jpeg:75"."""

from __future__ import annotations

from dataclasses import dataclass

from dgs.errors import did_you_mean

NATIVE = "native"  # as stored; always scored
PNG = "png"  # decoded once, stored without loss
# Kind: what its strength is, an example, the strength that changes nothing, the largest allowed.
_STRENGTHS: dict[str, tuple[str, str, float, float]] = {
    "jpeg": ("a quality", "jpeg:75", 101, 100),
    "blur": ("a standard deviation in px", "blur:1", 0, 100),
    "resize": ("a factor", "resize:0.5", 1, 16),
    "noise": ("a standard deviation in 8-bit levels", "noise:4", 0, 255),
}
KINDS = tuple(_STRENGTHS)


@dataclass(frozen=True)
class Condition:
    """One change: its kind ("jpeg", "blur", "resize", "noise", "png") and strength (NaN-free; 0 for png)."""

    kind: str
    strength: float = 0.0

    @property
    def name(self) -> str:
        """As in params.yaml and detection.csv; equal conditions have equal names."""
        return self.kind if self.kind == PNG else f"{self.kind}:{self.strength:g}"

    @property
    def severity(self) -> float:
        """Larger is harsher, among conditions of one kind; what is finer than native is below 0."""
        return unchanged(self.kind) - self.strength if self.kind in ("jpeg", "resize") else self.strength


def unchanged(kind: str) -> float:
    """The strength at which a kind of change would leave an image alone: blur 0, noise 0, resize 1, jpeg above 100."""
    return _STRENGTHS[kind][2]


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
    if kind not in _STRENGTHS:
        examples = ", ".join([*(example for _, example, _, _ in _STRENGTHS.values()), PNG])
        raise ValueError(f"unknown condition.{did_you_mean(kind, [*KINDS, PNG])} Expected such as {examples}")
    meaning, example, idle, most = _STRENGTHS[kind]
    try:
        strength = float(number)
    except ValueError:
        strength = -1.0
    if not 0 < strength <= most or strength == idle or (kind == "jpeg" and strength != round(strength)):
        span = "a whole number from 1 to 100" if kind == "jpeg" else f"above 0, at most {most:g}"
        other = " and not 1" if kind == "resize" else ""
        raise ValueError(f"expected {meaning} after '{kind}:', {span}{other}, such as {example}")
    return Condition(kind, strength)
