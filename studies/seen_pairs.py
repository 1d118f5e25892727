"""Do orders of methods hold for other generators in training? Six random pairs of the nine, each seen in its turn.

`python -m studies.seen_pairs` makes training and test images of each pair (build/pairs/), trains, tests, and writes
results/study/seen_pairs.csv. The pair is the unit: its methods share images, pairs share none but recipes.
"""

from __future__ import annotations

import os
from itertools import combinations

import numpy as np

from dgs.workspace import find_root
from minibench import generators
from minibench.build import build
from studies.sweep import Arm, command

SEED, COUNT, RHO = 20261130, 6, 0.9
METHODS = ("probe", "lora", "dgs", "poe_distillation", "content_poe_distillation", "pixel_cnn")
ALL = [pair for pair in combinations(generators.NAMES, 2) if pair != generators.SEEN]
PAIRS = [ALL[i] for i in sorted(np.random.default_rng(SEED).permutation(len(ALL))[:COUNT])]


def images(pair: tuple[str, str]) -> str:
    """The folder of a pair's images, relative to the repository; made where it is not there."""
    folder = f"build/pairs/{'-'.join(pair)}"
    if not (find_root() / folder).exists():
        seed = SEED + PAIRS.index(pair)
        build(find_root() / folder, seed, RHO, seen=pair, workers=os.cpu_count() or 1)
    return folder


def arms() -> list[Arm]:
    """Every method on every pair."""
    return [Arm(method, {"data.root": images(pair), "data.rho": RHO}) for pair in PAIRS for method in METHODS]


if __name__ == "__main__":
    command("seen_pairs", arms, seeds=(0, 1))
