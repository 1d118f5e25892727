"""Do orders of methods hold for other generators in training? Six random pairs of the nine, each seen in its turn.

`python -m studies.seen_pairs` makes training and test images of each pair (build/pairs/), trains, tests, and writes
results/study/seen_pairs.csv. The pair is the unit: its methods share images, and pairs share neither scenes nor noise,
with each other or with the fresh images; but the generators' networks and CLIP are the same, and settings are those
that were searched on the benchmark's pair.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dgs.atomic import alone
from dgs.workspace import find_root
from minibench import generators
from minibench.build import build
from studies.sweep import Arm, command

SEED, COUNT, RHO = 20261130, 6, 0.9
METHODS = ("probe", "lora", "dgs", "poe_distillation", "content_poe_distillation", "pixel_cnn")
ALL = [pair for pair in combinations(generators.NAMES, 2) if pair != generators.SEEN]


def draw(seed: int = SEED) -> list[tuple[str, str]]:
    """`COUNT` random pairs in which no generator is more than twice, so that no single one decides."""
    rng = np.random.default_rng(seed)
    while True:
        found = [ALL[i] for i in sorted(rng.choice(len(ALL), COUNT, replace=False))]
        if max(Counter(name for pair in found for name in pair).values()) <= 2:
            return found


PAIRS = draw()


def folder(pair: tuple[str, str]) -> str:
    """Of a pair's images, relative to the repository."""
    return f"build/pairs/{'-'.join(pair)}"


def make_images(chosen: Sequence[Arm]) -> None:
    """Build the benchmarks of the chosen arms' pairs, where they are not there."""
    wanted = {arm.settings["data.root"] for arm in chosen}
    for number, pair in enumerate(PAIRS):
        place = find_root() / folder(pair)
        if folder(pair) in wanted:
            with alone(place.with_suffix(".lock"), f"making {folder(pair)}"):
                if not place.exists():
                    # SEED itself made the fresh images, with which no pair is to share any
                    build(place, SEED + (number or COUNT), RHO, seen=pair, workers=os.cpu_count() or 1)


def arms() -> list[Arm]:
    """Every method on every pair."""
    return [Arm(method, {"data.root": folder(pair), "data.rho": RHO}) for pair in PAIRS for method in METHODS]


if __name__ == "__main__":
    command("seen_pairs", arms, seeds=(0, 1), first=make_images)
