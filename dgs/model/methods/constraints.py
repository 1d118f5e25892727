"""What methods do to the adapters themselves: penalise, project or scale the update that they make to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """One adapted linear layer: its update is scale * b @ a.

    weight: (out, in), frozen; a: (rank, in) and b: (out, rank), learned.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float


def adapters(tower: nn.Module) -> Iterator[Adapter]:
    """The adapted layers of a tower, in its order."""
    from peft.tuners.lora import LoraLayer  # here: the registry of methods is read where no CLIP is loaded

    for module in tower.modules():
        if isinstance(module, LoraLayer):
            name = module.active_adapters[0]
            a, b = (cast(nn.Linear, part[name]).weight for part in (module.lora_A, module.lora_B))
            yield Adapter(cast(nn.Linear, module.base_layer).weight, a, b, module.scaling[name])


def squared_update(tower: nn.Module) -> Tensor:
    """sum |scale B A|_F^2 over all layers, without forming B A: the distance of L2-SP (Li et al. 2018)."""
    terms = [layer.scale**2 * ((layer.b.T @ layer.b) * (layer.a @ layer.a.T)).sum() for layer in adapters(tower)]
    return torch.stack(terms).sum()


@torch.no_grad()
def effort_projection(tower: nn.Module) -> Callable[[], None]:
    """A function that projects every update onto the weights' smallest singular directions, as many as its rank.

    Effort (Yan et al. 2025) freezes the principal part of each weight and trains the rest. Differs from Effort: it
    adapts whole weights and has two more losses, here LoRA adapts q, k and v.
    """
    bases = []
    for adapter in adapters(tower):
        left, _, right = torch.linalg.svd(adapter.weight.double(), full_matrices=False)
        rank = len(adapter.a)
        bases.append((adapter, left[:, -rank:].to(adapter.b.dtype), right[-rank:].to(adapter.a.dtype)))

    @torch.no_grad()
    def project() -> None:
        for adapter, left, right in bases:
            adapter.a.copy_(adapter.a @ right.T @ right)
            adapter.b.copy_(left @ (left.T @ adapter.b))

    return project


@torch.no_grad()
def scale_update(tower: nn.Module, factor: float) -> None:
    """Scale every update: 0 is the frozen tower, 1 the tuned one."""
    for adapter in adapters(tower):
        adapter.b.mul_(factor)
