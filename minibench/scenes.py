"""A scene is a pure function of (seed, split, index): five attributes a caption can name, and nuisance it cannot.

One shaded object with a shadow on a textured background, drawn at 128 px and box-filtered to 64 px, in linear light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels of a finished image
OVERSAMPLING = 2

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("plain", "striped", "checked", "dotted", "brick", "cloudy")
POSITIONS = ("left", "right", "top", "bottom", "centre")
SIZES = ("small", "large")
VOCABULARY: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "position": POSITIONS,
    "size": SIZES,
}
# The place of a name in SPLITS and STREAMS enters its random numbers: new ones go to the end.
SPLITS = ("clip", "clip-val", "generators", "generators-val", "train", "val", "test", "val_unbiased")
STREAMS = ("scene", "camera", "jpeg", "caption", "label", "generator", "augment")
FAMILY = 16  # scenes of the test split in a row that share attributes and caption: one for each maker, and to spare

Floats = NDArray[np.floating[Any]]

_SRGB = {
    "red": (205, 45, 40),
    "orange": (235, 130, 30),
    "yellow": (232, 210, 50),
    "green": (60, 160, 70),
    "cyan": (50, 190, 200),
    "blue": (50, 80, 205),
    "purple": (130, 60, 170),
    "pink": (240, 135, 185),
}
_PLACE = {"left": (-0.42, 0.0), "right": (0.42, 0.0), "top": (0.0, -0.42), "bottom": (0.0, 0.42), "centre": (0.0, 0.0)}
_RADIUS = {"small": 0.27, "large": 0.46}  # of half the image


class Attributes(NamedTuple):
    """What a caption can say about a scene: one value of each entry of `VOCABULARY`, in its order."""

    shape: str
    colour: str
    background: str
    position: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Attributes and continuous nuisance of one scene; lengths are fractions of half the image, angles radians."""

    id: str
    attributes: Attributes
    x: float
    y: float
    radius: float
    rotation: float
    light: float
    ambient: float
    colour: tuple[float, ...]  # three, linear light
    base: tuple[float, ...]  # three, of the background, linear light
    contrast: float
    frequency: float
    texture_angle: float
    phase: tuple[float, float]
    texture_seed: int


def stream(seed: int, split: str, index: int, name: str) -> np.random.Generator:
    """The random stream `name` of one scene: every (seed, split, index, name) has its own, whatever else is drawn."""
    if split not in SPLITS:
        raise ValueError(f"split should be one of {SPLITS}. Found {split!r}.")
    entropy = [seed, SPLITS.index(split), index]
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(STREAMS.index(name),)))


def elder(split: str, index: int) -> int:
    """The scene whose attributes and caption scene `index` takes: its own, but in a test split the family's first.

    So photographs and every generator's fakes tell of the same things in the same words, and what captions say is
    worth exactly nothing there.
    """
    return index - index % FAMILY if split == "test" else index


def to_linear(srgb: Floats) -> Floats:
    """sRGB in [0, 1] -> linear light, by the plain power 2.2 that the camera's gamma undoes."""
    return np.power(srgb, 2.2, dtype=np.float32)


def _attributes(rng: np.random.Generator) -> Attributes:
    return Attributes(**{name: str(values[rng.integers(len(values))]) for name, values in VOCABULARY.items()})


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of (seed, split, index): attributes uniform and independent, nuisance independent of them.

    Within a family of a test split (`elder`) attributes are the same, nuisance is each scene's own.
    """
    rng = stream(seed, split, index, "scene")
    attributes = _attributes(rng)
    if (first := elder(split, index)) != index:
        attributes = _attributes(stream(seed, split, first, "scene"))
    px, py = _PLACE[attributes.position]
    srgb = np.asarray(_SRGB[attributes.colour], np.float32) / 255
    srgb = np.clip(srgb * rng.uniform(0.92, 1.06) + rng.uniform(-0.03, 0.03, 3), 0, 1).astype(np.float32)
    grey = rng.uniform(0.35, 0.75)
    base = np.clip(grey + rng.uniform(-0.06, 0.06, 3), 0, 1).astype(np.float32)
    colour, base = to_linear(srgb), to_linear(base)
    return Scene(
        id=f"{seed}-{split}-{index:06d}",
        attributes=attributes,
        x=px + rng.uniform(-0.07, 0.07),
        y=py + rng.uniform(-0.07, 0.07),
        radius=_RADIUS[attributes.size] * rng.uniform(0.92, 1.1),
        rotation=rng.uniform(-0.3, 0.3),
        light=rng.uniform(0, 2 * np.pi),
        ambient=rng.uniform(0.85, 1.1),
        colour=tuple(colour.tolist()),
        base=tuple(base.tolist()),
        contrast=rng.uniform(0.35, 0.6),
        frequency=rng.uniform(0.85, 1.2),
        texture_angle=rng.uniform(-0.35, 0.35),
        phase=(rng.uniform(0, 1), rng.uniform(0, 1)),
        texture_seed=int(rng.integers(2**31)),
    )


def _star(p: Floats, q: Floats) -> Floats:
    step, inner = np.pi / 5, 0.45
    angle = np.abs((np.arctan2(p, -q) + step) % (2 * step) - step)
    length = np.hypot(p, q)
    # Distance to the edge from the tip (1, 0) to the notch at (inner, step).
    nx, ny = inner * np.sin(step), 1 - inner * np.cos(step)
    return (nx * (length * np.cos(angle) - 1) + ny * length * np.sin(angle)) / np.hypot(nx, ny)


def _triangle(p: Floats, q: Floats) -> Floats:
    return np.maximum(q - 0.55, np.abs(p) * 0.866 - q * 0.5 - 0.5)


def _cross(p: Floats, q: Floats) -> Floats:
    p, q = np.abs(p), np.abs(q)
    return np.minimum(np.maximum(p - 0.95, q - 0.3), np.maximum(p - 0.3, q - 0.95))


def _heart(p: Floats, q: Floats) -> Floats:
    return np.sqrt(p**2 + (1.15 * -q + 0.25 - 0.75 * np.sqrt(np.abs(p))) ** 2) * 0.95 - 0.8


# Signed distance (about) to each outline, negative inside; the object fits the unit disc, q points down.
_OUTLINES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": lambda p, q: np.hypot(p, q) - 0.9,
    "square": lambda p, q: np.maximum(np.abs(p), np.abs(q)) - 0.76,
    "triangle": _triangle,
    "star": _star,
    "ring": lambda p, q: np.abs(np.hypot(p, q) - 0.72) - 0.23,
    "cross": _cross,
    "crescent": lambda p, q: np.maximum(np.hypot(p, q) - 0.95, 0.72 - np.hypot(p - 0.48, q)),
    "heart": _heart,
}


def _texture(s: Scene, x: Floats, y: Floats) -> Floats:
    """Weight in [0, 1] of the background's second tone at every point."""
    kind = s.attributes.background
    u = (np.cos(s.texture_angle) * x + np.sin(s.texture_angle) * y) * s.frequency
    v = (-np.sin(s.texture_angle) * x + np.cos(s.texture_angle) * y) * s.frequency
    a, b = s.phase
    if kind == "plain":
        return np.zeros_like(x)
    if kind == "striped":
        return np.clip(0.5 + 3 * np.sin(2 * np.pi * (3.2 * u + a)), 0, 1)
    if kind == "checked":
        return np.clip(0.5 + 4 * np.sin(2 * np.pi * (1.7 * u + a)) * np.sin(2 * np.pi * (1.7 * v + b)), 0, 1)
    if kind == "dotted":
        du, dv = (3 * u + a) % 1 - 0.5, (3 * v + b) % 1 - 0.5
        return np.clip((0.28 - np.hypot(du, dv)) * 12 + 0.5, 0, 1)
    if kind == "brick":
        row = 4 * v + b
        column = 2 * u + a + 0.5 * (np.floor(row) % 2)
        edge = np.minimum(np.minimum(row % 1, 1 - row % 1) / 4, np.minimum(column % 1, 1 - column % 1) / 2)
        return np.clip(1.5 - edge * 40, 0, 1)
    rng = np.random.default_rng(s.texture_seed)
    cloud = np.zeros_like(x)
    for _ in range(6):
        angle, wave, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.6), rng.uniform(0, 2 * np.pi)
        cloud += np.sin(2 * np.pi * wave * (np.cos(angle) * x + np.sin(angle) * y) + phase).astype(np.float32)
    return np.clip(0.5 + 0.28 * cloud, 0, 1)


def mask(s: Scene, size: int = SIZE, grow: float = 0.0, soft: float = 1.0) -> Floats:
    """How much of each pixel the object covers: (size, size) float32 in [0, 1].

    `grow` widens the outline by that fraction of half the image, `soft` is the width of its edge in pixels.
    """
    x, y = _grid(size)
    return _cover(s, x, y, grow, soft * 2 / size)


def _grid(size: int, margin: int = 0) -> tuple[Floats, Floats]:
    axis = ((np.arange(-margin, size + margin, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _cover(s: Scene, x: Floats, y: Floats, grow: float, edge: float) -> Floats:
    c, n = np.cos(s.rotation), np.sin(s.rotation)
    dx, dy = (x - s.x) / s.radius, (y - s.y) / s.radius
    distance = _OUTLINES[s.attributes.shape](c * dx + n * dy, -n * dx + c * dy) * s.radius - grow
    return np.clip(0.5 - distance / edge, 0, 1).astype(np.float32)


def render(s: Scene, margin: int = 0) -> Floats:
    """The scene's linear light, box-filtered: (S, S, 3) float32 in [0, 1], S = 64 + 2 margin pixels."""
    size = SIZE * OVERSAMPLING
    x, y = _grid(size, margin * OVERSAMPLING)
    tone = _texture(s, x, y)[..., None]
    lx, ly = float(np.cos(s.light)), float(np.sin(s.light))
    base = np.asarray(s.base, np.float32)
    ground = base * (1 - s.contrast * tone) * (1 + 0.12 * (lx * x + ly * y))[..., None]
    shadow = _cover(s, x + 0.09 * lx, y + 0.09 * ly, 0.0, 0.14)[..., None]
    ground = ground * (1 - 0.5 * shadow)

    dx, dy = (x - s.x) / s.radius, (y - s.y) / s.radius
    lit = 0.92 + 0.28 * (lx * dx + ly * dy)
    gloss = 0.25 * np.exp(-((dx - 0.4 * lx) ** 2 + (dy - 0.4 * ly) ** 2) / 0.06)
    body = np.asarray(s.colour, np.float32) * lit[..., None] + gloss[..., None]
    cover = _cover(s, x, y, 0.0, 2 / size)[..., None]
    image = np.clip(s.ambient * (cover * body + (1 - cover) * ground), 0, 1)
    side = SIZE + 2 * margin
    image = image.reshape(side, OVERSAMPLING, side, OVERSAMPLING, 3).mean((1, 3))
    return image.astype(np.float32)
