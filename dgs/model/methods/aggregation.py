"""Neighbours of gradient surgery: maps that let two gradients into the features agree over a whole batch.

All take (B, D) gradients of task and prior as two vectors of B D entries, and return a (B, D) gradient.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _pcgrad() -> Any:
    from torchjd.aggregation import PCGrad  # here: it takes a second to import, and few methods use it

    return PCGrad()


def pcgrad(task: Tensor, prior: Tensor) -> Tensor:
    """Each gradient off the other where they conflict, then their sum (Yu et al. 2020, by torchjd).

    Of two gradients it is exact UPGrad too (Quinton & Rey 2024): what is left of one off the other is its nearest
    vector that does not conflict with the other.
    """
    if not (task.any() and prior.any()):
        return task + prior
    return _pcgrad()(torch.stack([task.flatten(), prior.flatten()])).view_as(task)


def prograd(task: Tensor, general: Tensor) -> Tensor:
    """The task gradient, off the general one where they conflict (Zhu et al. 2023, eq. 4)."""
    dot = (task * general).sum()
    return task - (dot / general.square().sum()).clamp_max(0) * general if dot < 0 else task
