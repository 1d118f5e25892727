"""Templated captions with varied wording, and zero-shot prompts, for any subset of a scene's attributes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from minibench.scenes import VOCABULARY, Attributes

MEDIA = ("clean", "blurry", "noisy", "pixelated", "compressed", "sharpened")
ATTRIBUTES = (*VOCABULARY, "medium")

# The first word of each list is the value's own name.
_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "crescent": ("crescent", "moon"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "striped": ("striped", "lined"),
    "checked": ("checked", "chequered"),
    "dotted": ("dotted", "spotted"),
    "cloudy": ("cloudy", "misty"),
    "plain": ("plain", "smooth"),
    "blurry": ("blurry", "blurred"),
    "compressed": ("compressed", "heavily compressed"),
    "clean": ("clean", "clear"),
}
_PLACES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the upper edge"),
    "bottom": ("at the bottom", "near the lower edge"),
    "centre": ("in the centre", "in the middle"),
}
_GROUNDS = ("on a {} background", "in front of a {} wall", "with a {} backdrop")
_THINGS = ("object", "thing")
_KINDS = ("photo", "picture", "image")


def words(value: str) -> tuple[str, ...]:
    """Every wording of an attribute's value; the first is its name, except for a position."""
    return _PLACES.get(value) or _WORDS.get(value, (value,))


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(
    attributes: Attributes,
    rng: np.random.Generator,
    told: Collection[str] = tuple(VOCABULARY),
    medium: str | None = None,
) -> str:
    """A caption telling the attributes in `told` (and the medium, if given), its wording drawn from `rng`.

    >>> attributes = Attributes("star", "red", "plain", "left", "small")
    >>> caption(attributes, np.random.default_rng(3), told=["shape", "colour"], medium="noisy")
    'a noisy image of a red star'
    """

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    thing = [pick(words(getattr(attributes, name))) for name in ("size", "colour") if name in told]
    thing.append(pick(words(attributes.shape)) if "shape" in told else pick(_THINGS))
    parts = [_article(" ".join(thing))]
    ground = pick(_GROUNDS).format(pick(words(attributes.background))) if "background" in told else ""
    place = pick(words(attributes.position)) if "position" in told else ""
    around = [phrase for phrase in (ground, place) if phrase]
    if len(around) == 2 and rng.random() < 0.5:
        around.reverse()
    if around:
        parts.append(" ".join(around))
    kind = pick(_KINDS)
    if medium is not None:
        return f"{_article(pick(words(medium)))} {kind} of {' '.join(parts)}"
    if rng.random() < 0.5:
        return f"{_article(kind)} of {' '.join(parts)}"
    return " ".join(parts)


def prompts(attribute: str) -> dict[str, list[str]]:
    """{value: zero-shot prompts} of an attribute of `VOCABULARY`, or of "medium"."""
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute should be one of {ATTRIBUTES}. Found {attribute!r}.")
    templates = {
        "shape": ("{a} {w}", "a photo of {a} {w}", "a picture of {a} {w}"),
        "colour": ("{a} {w} object", "a photo of {a} {w} object", "a picture of {a} {w} thing"),
        "size": ("{a} {w} object", "a photo of {a} {w} object", "a picture of {a} {w} thing"),
        "background": tuple(f"a photo of an object {g}" for g in _GROUNDS),
        "position": ("an object {w}", "a photo of an object {w}", "a picture of a thing {w}"),
        "medium": tuple(f"{{a}} {{w}} {kind} of an object" for kind in _KINDS),
    }[attribute]
    values = MEDIA if attribute == "medium" else VOCABULARY[attribute]
    return {
        value: [
            template.replace("{a} {w}", _article(word)).replace("{w}", word).replace("{}", word)
            for template in templates
            for word in words(value)
        ]
        for value in values
    }
