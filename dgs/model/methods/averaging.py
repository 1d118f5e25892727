"""The mean of weights along the end of a run: what single steps add by chance averages out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 2 / 3  # of a run's steps, its last ones: with three epochs all after the first


class Tail:
    """The mean of parameters over the last steps of a run (SWAD, Cha et al. 2021; with a fixed window).

    Differs from SWAD: the window is the last two thirds of the steps, not found by the validation loss, since those
    images are of the generators that are trained on. An adapter's two factors are averaged, not their product.

    Args:
        parameters: to average, always in the same order.
        steps: of the whole run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        self.parameters = list(parameters)
        self.start = steps - max(1, round(SHARE * steps))
        self.means: list[Tensor] = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.count = 0

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take the parameters in as they are after `step`, counted from 0, where it is one of the last."""
        if step < self.start:
            return
        self.count += 1
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            mean.lerp_(parameter, 1 / self.count)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the parameters their means."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            parameter.copy_(mean)

    def content(self) -> dict[str, Any]:
        """As tensors and numbers."""
        return {"means": self.means, "count": self.count}

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Become what `content` was taken of."""
        self.count = content["count"]
        for mean, value in zip(self.means, content["means"], strict=True):
            mean.copy_(value)
