"""Geometry of gradients: inner products, angles, effective rank. What is logged, and nothing of how it is used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pairs_of(names: list[str] | tuple[str, ...]) -> list[tuple[str, str]]:
    """Every pair of names once, a name with itself too: the upper triangle of a Gram matrix, row by row."""
    return [(a, b) for i, a in enumerate(names) for b in names[i:]]


def inner_products(vectors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """All inner products of named gradients, sample by sample: {"a.b": (B,) float64}, "a.a" the squared length.

    Lengths, angles, energies, and a picture in a plane follow from these numbers alone, so that nothing else needs to
    be kept of a step.

    Args:
        vectors: {name: (B, D)}, of one shape.
    """
    names = list(vectors)
    stacked = torch.stack([vectors[name].detach().double() for name in names], dim=1)
    gram = (stacked @ stacked.mT).cpu().numpy()
    return {f"{a}.{b}": gram[:, names.index(a), names.index(b)] for a, b in pairs_of(names)}


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the rows of two (B, D) tensors, in degrees (B,); NaN where a row is zero."""
    a, b = a.double(), b.double()
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = torch.where(norms > 0, (a * b).sum(dim=1) / norms, torch.nan)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def effective_rank(directions: Tensor) -> float:
    """How many directions a batch's rows really take: exp of the entropy of the spectrum (Roy & Vetterli 2007).

    Rows are brought to unit length first, since suppression does so; zero rows are left out. 1: all on one line, k: k
    orthogonal directions equally often. Rows of a linear head (two orthogonal half-vectors) have at most 2.

    Args:
        directions: (B, D).

    Returns:
        between 1 and min(B, D); NaN where every row is zero.
    """
    rows = directions.detach().double()
    norms = rows.norm(dim=1)
    rows = rows[norms > 0] / norms[norms > 0, None]
    if not len(rows):
        return float("nan")
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    shares = torch.linalg.eigvalsh(gram).clamp(min=0)
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())
