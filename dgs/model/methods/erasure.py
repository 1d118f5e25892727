"""Affine maps of the features that a head reads through, fitted once on the frozen tower's features and captions.

A linear head behind such a map is again a linear head (`Affine.before`), so that checkpoints hold plain heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgs.params import SurgeryParams


@dataclass(frozen=True)
class Affine:
    """x to x M^T + b. matrix: (D, D), bias: (D,)."""

    matrix: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return features @ self.matrix.T + self.bias

    @torch.no_grad()
    def before(self, head: nn.Linear) -> nn.Linear:
        """The head on raw features that equals `head` on mapped ones."""
        plain = nn.Linear(self.matrix.shape[1], 1, device=head.weight.device, dtype=head.weight.dtype)
        plain.weight.copy_(head.weight @ self.matrix)
        plain.bias.copy_(head.bias + head.weight[0] @ self.bias)
        return plain.requires_grad_(False)


class Through(nn.Module):
    """A linear head behind a map: (B, D) raw features to (B, 1)."""

    def __init__(self, lens: Affine, head: nn.Linear) -> None:
        super().__init__()
        self.lens, self.head = lens, head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.lens(features))


def standardise(features: Tensor, captions: Tensor, params: SurgeryParams) -> Affine:
    """Every feature to mean 0 and standard deviation 1 over the training images: (N, D) features."""
    scale = 1 / features.std(0).clamp_min(1e-6)
    return Affine(torch.diag(scale), -features.mean(0) * scale)


def _principal(captions: Tensor, count: int) -> Tensor:
    # (N, D) to the (D, count) directions of largest variance
    centred = (captions - captions.mean(0)).double()
    return torch.linalg.svd(centred, full_matrices=False).Vh[:count].T


def leace(features: Tensor, captions: Tensor, params: SurgeryParams) -> Affine:
    """Least-squares concept erasure (Belrose et al. 2023): afterwards no linear map of features predicts captions.

    Captions are taken by their `params.directions` components of largest variance, since all of them would leave
    nothing. In float64.

    Args:
        features, captions: (N, D) of the same images.
    """
    from concept_erasure import LeaceEraser  # here: the registry of methods is read where nothing is trained

    concepts = captions.double() @ _principal(captions, params.directions)
    eraser = LeaceEraser.fit(features.double(), concepts)
    assert eraser.bias is not None
    kept = eraser.P
    return Affine(kept.to(features.dtype), (eraser.bias - kept @ eraser.bias).to(features.dtype))


def null_space(features: Tensor, captions: Tensor, params: SurgeryParams) -> Affine:
    """Off the `params.directions` directions of largest variance of caption embeddings (N, D), in the shared space.

    What LEACE improves on: it takes image and text features to lie in the same directions.
    """
    span = _principal(captions, params.directions).to(features.dtype)
    return Affine(
        torch.eye(features.shape[1], dtype=span.dtype, device=span.device) - span @ span.T,
        span.new_zeros(()).expand(features.shape[1]),
    )
