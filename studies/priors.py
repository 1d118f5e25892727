"""When is CLIP's prior worth having? Towers that learned less and less, down to a random one, and no tower.

`python -m studies.priors` pre-trains the benchmark's CLIP once more and keeps it as it was early on (build/priors/;
half an hour on one core, resumable), trains on each of these towers and on the whole one, tests on fresh images, and
writes results/study/priors.csv. Captions are embedded by the text side of the same age, so no method here reads them;
settings are those that were searched on the whole CLIP.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dgs.atomic import alone
from dgs.params import load_params
from dgs.workspace import MAIN, find_root
from minibench.clip import CONFIG, one_thread
from minibench.pretrain import Recipe, pretrain
from studies.sweep import Arm, command

CLIP, FOLDER = "model.clip", "build/priors"
EARLY = (0, 25_600, 102_400, 204_800)  # samples; 0: random weights. The whole pre-training has 454,400
METHODS = ("probe", "lora", "content_poe_distillation")
WITHOUT = "pixel_cnn"


def folder(samples: int) -> str:
    """Of the CLIP after so many samples, relative to the repository."""
    return f"{FOLDER}/{samples}"


def make_towers(chosen: Sequence[Arm]) -> None:
    """Pre-train as far as the chosen arms need, where their towers are not there."""
    root, wanted = find_root(), {arm.settings.get(CLIP) for arm in chosen}
    with alone(root / FOLDER / ".lock", "pre-training for the study priors"):
        early = {n: root / folder(n) for n in EARLY if folder(n) in wanted and not (root / folder(n) / CONFIG).exists()}
        if early:
            with one_thread():
                pretrain(None, Recipe(), root / FOLDER / "pretraining", os.cpu_count() or 1, early=early)


def arms() -> list[Arm]:
    """Every method on every tower, the whole one last, and the network without."""
    whole = load_params(MAIN).model.clip
    towers = [*map(folder, EARLY), whole]
    return [*(Arm(method, {CLIP: tower}) for tower in towers for method in METHODS), Arm(WITHOUT)]


if __name__ == "__main__":
    command("priors", arms, first=make_towers)
