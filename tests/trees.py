"""The paper's suites as published, at reduced size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from conftest import structured_image

from dgs.data.suites import SUITES, UNIVERSAL_FAKE_DETECT, Suite


def put(folder: Path, seeds: Iterable[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        structured_image(seed, 16, 12).save(folder / f"{seed:05d}.png")


def grow(folder: Path, suite: Suite, real: int = 1, fake: int = 1, classes: tuple[str, ...] = ("car", "cat")) -> Path:
    """A suite as published, at reduced size; where it has class folders, every class has that many images."""
    seed = 1000 * (1 + SUITES.index(suite))
    for generator in suite.generators:
        for level in classes if generator.classes else ("",):
            for label, count in (("0_real", real), ("1_fake", fake)):
                put(folder / generator.folder / level / label, range(seed, seed + count))
                seed += count
    return folder


def grow_with_pools(folder: Path, real: int = 2, fake: int = 1) -> Path:
    """UniversalFakeDetect as first published: fakes alone, and photographs in two folders of their own."""
    for number, generator in enumerate(UNIVERSAL_FAKE_DETECT.generators):
        put(folder / generator.folder / "1_fake", range(100 * number, 100 * number + fake))
    put(folder / "laion/0_real", range(900, 900 + real))
    put(folder / "imagenet/0_real", range(800, 800 + real + 1))
    return folder
