"""Which scene becomes which image: the shortcut dial P(fake | caption group) and the membership of every image.

Coupled design: a training scene draws one u ~ U(0, 1) and is fake in a set when u < P(fake | what its caption says), so
all sets share scenes, and only images that some set uses are made (about 1.6 a scene).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgs.data.manifest import training_set
from minibench import generators, scenes

RHOS = (0.5, 0.75, 0.9)
REAL = "real"


@dataclass(frozen=True)
class Shortcut:
    """What goes with "fake" when rho > 0.5: half of an attribute's values."""

    attribute: str
    fake: tuple[str, ...]

    @property
    def real(self) -> tuple[str, ...]:
        """The other half."""
        return tuple(value for value in scenes.VOCABULARY[self.attribute] if value not in self.fake)


# The background fills most of an image and is seen in texture; the object's shape is local and seen in outline.
SHORTCUTS = {
    "background": Shortcut("background", ("striped", "dotted", "cloudy")),
    "object": Shortcut("shape", ("circle", "star", "ring", "heart")),
}


@dataclass(frozen=True)
class Sizes:
    """Scenes of the training and validation splits; real images, and fakes of every generator, of the test split."""

    train: int = 5_000
    val: int = 500
    val_unbiased: int = 500
    test: int = 400


@dataclass(frozen=True)
class Row:
    """One image to make: scene `index` of `split`, its maker, and the names of the sets it belongs to."""

    split: str
    index: int
    generator: str
    sets: frozenset[str]


def fake_probability(attributes: scenes.Attributes, rho: float, shortcut: str) -> float:
    """P(fake | attributes): rho for the shortcut's group, 1 - rho for the rest."""
    chosen = SHORTCUTS[shortcut]
    return rho if getattr(attributes, chosen.attribute) in chosen.fake else 1 - rho


def _fake(index: int, seen: Sequence[str]) -> str:
    return seen[index % len(seen)]


def biased(
    seed: int, split: str, count: int, rhos: Sequence[float], seen: Sequence[str] = generators.SEEN
) -> list[Row]:
    """The images of a training or validation split; its fakes alternate between the seen generators by scene."""
    rows = []
    for index in range(count):
        attributes = scenes.scene(seed, split, index).attributes
        u = scenes.stream(seed, split, index, "label").random()
        wanted = {
            training_set(rho, name): bool(u < fake_probability(attributes, rho, name))
            for rho in rhos
            for name in SHORTCUTS
        }
        for fake in (False, True):
            if sets := frozenset(name for name, label in wanted.items() if label == fake):
                rows.append(Row(split, index, _fake(index, seen) if fake else REAL, sets))
    return rows


def unbiased(seed: int, split: str, count: int, seen: Sequence[str] = generators.SEEN) -> list[Row]:
    """A split without a shortcut: one image a scene, fake or real by a fair coin, fakes by the seen generators."""
    coins = [scenes.stream(seed, split, index, "label").random() < 0.5 for index in range(count)]
    makers = [_fake(index, seen) if fake else REAL for index, fake in enumerate(coins)]
    return [Row(split, index, maker, frozenset()) for index, maker in enumerate(makers)]


def test(count: int) -> list[Row]:
    """`count` reals, shared by all generators, and `count` fakes of each, every one of a scene of its own.

    Image i of every maker is of family i (`scenes.elder`): all makers show the same things under the same captions.
    """
    makers = (REAL, *generators.NAMES)
    assert len(makers) <= scenes.FAMILY
    return [
        Row("test", i * scenes.FAMILY + k, maker, frozenset()) for k, maker in enumerate(makers) for i in range(count)
    ]


def rows(seed: int, sizes: Sizes, rhos: Sequence[float], seen: Sequence[str] = generators.SEEN) -> dict[str, list[Row]]:
    """All images of a benchmark, by split; `seen`: the generators of training and validation fakes."""
    return {
        "train": biased(seed, "train", sizes.train, rhos, seen),
        "val": biased(seed, "val", sizes.val, rhos, seen),
        "val_unbiased": unbiased(seed, "val_unbiased", sizes.val_unbiased, seen),
        "test": test(sizes.test),
    }
