"""Where does surgery help? DGS and LoRA over rates, epochs, dropout and shortcuts, then batch sizes, ranks and views.

`python -m studies.regimes` trains both in every cell, tests on fresh images, and writes results/study/regimes.csv. The
rates are those that `dgs tune` tries. What lies beside the map changes one parameter, at equal epochs: with another
batch size, the number of steps, stage 1 and the release's 1/B change too. DGS is suppression and alignment, lambda as
tuned: a cell does not say which of them made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from studies.sweep import EPOCHS, Arm, command

METHODS = ("lora", "dgs")
RHO, LR, DROPOUT = "data.rho", "train.stage2.lr", "model.lora.dropout"
# Every combination; epochs vary slowest, since a training goes on from the same one of fewer.
MAP = {EPOCHS: (1, 3, 9), RHO: (0.5, 0.75, 0.9), LR: (1e-3, 3e-3, 1e-2), DROPOUT: (0.0, 0.8)}
CENTRE = {RHO: 0.9, LR: 3e-3, EPOCHS: 3, DROPOUT: 0.0}
BESIDE = {"train.batch_size": (4, 16, 128), "model.lora.rank": (1, 24), "train.views": (3,)}  # at the centre


def cells() -> Iterator[dict[str, Any]]:
    """Settings of every cell: the map's, then those beside it."""
    for values in product(*MAP.values()):
        yield dict(zip(MAP, values, strict=True))
    for name, others in BESIDE.items():
        for value in others:
            yield {**CENTRE, name: value}


def arms() -> list[Arm]:
    """Both methods in every cell."""
    return [Arm(method, cell) for cell in cells() for method in METHODS]


if __name__ == "__main__":
    command("regimes", arms, seeds=(0, 1))
