"""Which scene becomes which image: the shortcut dial P(fake | background) and the membership of every image.

Coupled design: a training scene draws one u ~ U(0, 1) and is fake at rho when u < P(fake | its background, rho), so the
sets of all rho share scenes, and only images some set uses are made (about 1.4 a scene).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgs.minibench import generators, scenes

RHOS = (0.5, 0.75, 0.9)
SHORTCUT = ("striped", "dotted", "cloudy")  # the backgrounds that go with "fake" when rho > 0.5
REAL = "real"


@dataclass(frozen=True)
class Sizes:
    """Scenes of the training and validation splits; real images, and fakes of every generator, of the test split."""

    train: int = 3_000
    val: int = 500
    test: int = 400


@dataclass(frozen=True)
class Row:
    """One image to make: scene `index` of `split`, its maker, and the names of the sets it belongs to."""

    split: str
    index: int
    generator: str
    sets: frozenset[str]


def fake_probability(background: str, rho: float) -> float:
    """P(fake | background) = rho for the shortcut group, 1 - rho for the rest."""
    return rho if background in SHORTCUT else 1 - rho


def column(rho: float) -> str:
    """The name of the set of a rho: 0.5 -> "rho_0.50"."""
    return f"rho_{rho:.2f}"


def biased(seed: int, split: str, count: int, rhos: Sequence[float], unbiased: bool = False) -> list[Row]:
    """The images of a training or validation split; its fakes alternate between the seen generators by scene."""
    rows = []
    for index in range(count):
        background = scenes.scene(seed, split, index).attributes.background
        u = scenes.stream(seed, split, index, "label").random()
        wanted = {column(rho): u < fake_probability(background, rho) for rho in rhos}
        if unbiased:
            wanted["unbiased"] = u < 0.5
        for fake in (False, True):
            sets = frozenset(name for name, label in wanted.items() if label == fake)
            if sets:
                maker = generators.SEEN[index % len(generators.SEEN)] if fake else REAL
                rows.append(Row(split, index, maker, sets))
    return rows


def test(count: int) -> list[Row]:
    """`count` reals, shared by all generators, and `count` fakes of each, every one of a scene of its own."""
    makers = (REAL, *generators.NAMES)
    return [Row("test", k * count + i, maker, frozenset()) for k, maker in enumerate(makers) for i in range(count)]


def rows(seed: int, sizes: Sizes, rhos: Sequence[float]) -> dict[str, list[Row]]:
    """All images of a benchmark, by split."""
    return {
        "train": biased(seed, "train", sizes.train, rhos),
        "val": biased(seed, "val", sizes.val, rhos, unbiased=True),
        "test": test(sizes.test),
    }
