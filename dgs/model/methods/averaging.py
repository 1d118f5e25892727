"""Means of weights: over the last steps of a run (SWAD), or of tuned with frozen ones (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgs.model.methods.constraints import scale_update

WINDOW = 2 / 3  # of a run's steps, its last ones: with three epochs all after the first


class Averaging:
    """The mean of parameters over the last steps of a run (SWAD, Cha et al. 2021).

    Differs from SWAD: the window is the last two thirds of the steps, not found by the validation loss, since those
    images are of the generators that are trained on. An adapter's two factors are averaged, not their product.
    `steps`: of the whole run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        self.parameters = list(parameters)
        self.start = steps - max(1, round(WINDOW * steps))
        self.means: list[Tensor] = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.count = 0

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the parameters after `step`, counted from 0, if it lies in the window."""
        if step < self.start:
            return
        self.count += 1
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(parameter, 1 / self.count)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the parameters to their means."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            parameter.copy_(mean)

    def state(self) -> dict[str, Any]:
        """As tensors and numbers."""
        return {"means": self.means, "count": self.count}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken of."""
        self.count = state["count"]
        for mean, value in zip(self.means, state["means"], strict=True):
            mean.copy_(value)


@torch.no_grad()
def wise_ft(tower: nn.Module, head: nn.Linear, probe: nn.Linear, tuned: float) -> None:
    """WiSE-FT (Wortsman et al. 2022), in place: `tuned` of adapters and head, the rest of tower and probe."""
    scale_update(tower, tuned)
    for mine, frozen in zip(head.parameters(), probe.parameters(), strict=True):
        mine.lerp_(frozen, 1 - tuned)
