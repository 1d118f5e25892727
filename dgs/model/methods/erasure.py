"""Affine maps of the features that a head reads through, fitted once on the frozen tower's features and captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgs.params import SurgeryParams


class Affine(nn.Module):
    """x to x M^T + b: (..., D) to (..., D). matrix: (D, D), bias: (D,)."""

    matrix: Tensor
    bias: Tensor

    def __init__(self, matrix: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("bias", bias)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.matrix.T + self.bias

    @torch.no_grad()
    def fold_into(self, head: nn.Linear) -> nn.Linear:
        """The linear head on raw features that equals `head` on mapped ones: checkpoints hold plain heads."""
        plain = nn.Linear(self.matrix.shape[1], 1, device=head.weight.device, dtype=head.weight.dtype)
        plain.weight.copy_(head.weight @ self.matrix)
        plain.bias.copy_(head.bias + head.weight[0] @ self.bias)
        return plain.requires_grad_(False)


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

    Differs from LEACE on the captions themselves: it erases their `params.directions` components of largest variance,
    since all of them would leave nothing. Of (N, D) features and captions, in float64.
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
    width = features.shape[1]
    return Affine(torch.eye(width, dtype=span.dtype, device=span.device) - span @ span.T, span.new_zeros(width))
