"""What a fine-tuned image tower still knows, measured on features alone (no model is run here).

Feature arguments are float arrays or CPU tensors of shape (N, D), one row an image; all sums are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

Features: TypeAlias = np.ndarray | torch.Tensor


def linear_cka(x: Features, y: Features) -> float:
    """Linear centred kernel alignment, |Y'X|^2 / (|X'X| |Y'Y|) on centred features (Kornblith et al. 2019, eq. 3-5).

    `x`: (N, D1), `y`: (N, D2), rows of the same images. 1 = equal up to rotation, shift and uniform scale; 0 = nothing
    in common, which is also the value for features collapsed to one point. Raises ValueError for unequal N.
    """
    a, b = _matrix(x, "x"), _matrix(y, "y")
    if len(a) != len(b):
        raise ValueError(f"expected features of the same images, found {a.shape} and {b.shape}")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    if max(a.shape[1], b.shape[1]) <= len(a):
        shared, own_a, own_b = np.sum((b.T @ a) ** 2), np.linalg.norm(a.T @ a), np.linalg.norm(b.T @ b)
    else:  # the same three numbers from the N x N kernels, cheaper where features outnumber images
        kernel_a, kernel_b = a @ a.T, b @ b.T
        shared, own_a, own_b = np.sum(kernel_a * kernel_b), np.linalg.norm(kernel_a), np.linalg.norm(kernel_b)
    scale = float(own_a * own_b)
    return float(shared) / scale if scale > 0.0 else 0.0


def zero_shot_accuracy(image_features: Features, prompt_features: Features, labels: Sequence[int] | Features) -> float:
    """Fraction of images whose most similar prompt (cosine) is their class (CLIP, Radford et al. 2021, sec. 3.1).

    `image_features`: (N, D), `prompt_features`: (C, D), one a class, `labels`: (N,) integers in [0, C). A tie goes to
    the lower class. Raises ValueError for shapes or labels that do not fit.
    """
    images, prompts = _unit_rows(image_features, "image_features"), _unit_rows(prompt_features, "prompt_features")
    truth = np.asarray(labels)
    if images.shape[1] != prompts.shape[1] or truth.shape != (len(images),):
        raise ValueError(f"expected (N, D), (C, D) and (N,), found {images.shape}, {prompts.shape} and {truth.shape}")
    if truth.min() < 0 or truth.max() >= len(prompts):
        raise ValueError(f"expected labels in [0, {len(prompts)}), found {truth.min()} to {truth.max()}")
    return float(np.mean(np.argmax(images @ prompts.T, axis=1) == truth))


def retrieval_at_1(
    image_features: Features,
    text_features: Features,
    pool: int = 200,
    seed: int = 0,
    captions: Sequence[str] | None = None,
) -> float:
    """Image-to-text recall@1: how often an image's most similar caption in a random pool is one of its own words.

    `image_features`, `text_features`: (N, D), row i of both is pair i. The pairs are shuffled by `seed` and cut into
    pools of `pool` pairs; the rest that fills no pool is left out, and fewer than `pool` pairs make one pool of all.
    Two pairs with the same caption are interchangeable: by `captions` (N strings) where given, else by text features
    that agree to 1e-6 after normalisation. Raises ValueError for shapes that do not fit or a pool below 2.
    """
    images, texts = _unit_rows(image_features, "image_features"), _unit_rows(text_features, "text_features")
    if images.shape != texts.shape:
        raise ValueError(f"expected one text an image, found {images.shape} and {texts.shape}")
    if pool < 2:
        raise ValueError(f"expected a pool of at least 2 pairs, found {pool}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"expected {len(images)} captions, found {len(captions)}")
    if captions is None:
        _, same = np.unique(np.round(texts, 6), axis=0, return_inverse=True)
    else:
        _, same = np.unique(np.asarray(captions, dtype=object).astype(str), return_inverse=True)
    same = same.reshape(-1)
    size = min(pool, len(images))
    shuffled = np.random.default_rng(seed).permutation(len(images))
    hits: list[np.ndarray] = []
    for start in range(0, len(images) - size + 1, size):
        members = shuffled[start : start + size]
        found = members[np.argmax(images[members] @ texts[members].T, axis=1)]
        hits.append(same[found] == same[members])
    return float(np.mean(np.concatenate(hits)))


def cosine_drift(before: Features, after: Features) -> float:
    """Mean over images of 1 - cos(before, after): 0 = no image moved, 1 = on average orthogonal to where it was.

    `before`, `after`: (N, D), rows of the same images; a zero row counts as orthogonal. Raises ValueError for unequal
    shapes.
    """
    a, b = _unit_rows(before, "before"), _unit_rows(after, "after")
    if a.shape != b.shape:
        raise ValueError(f"expected the same images and width, found {a.shape} and {b.shape}")
    return max(0.0, float(np.mean(1.0 - np.sum(a * b, axis=1))))  # rounding may end just below zero


def _matrix(features: Features, name: str) -> np.ndarray:
    plain = features.detach().cpu().double().numpy() if isinstance(features, torch.Tensor) else features
    matrix = np.asarray(plain, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) == 0:
        raise ValueError(f"expected `{name}` of shape (N, D) with N >= 1, found {matrix.shape}")
    return matrix


def _unit_rows(features: Features, name: str) -> np.ndarray:
    matrix = _matrix(features, name)
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(length > 0.0, length, 1.0)
