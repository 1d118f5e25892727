"""Patch selection: keep the flattest and the busiest patches by spectral entropy, stitched in random order.

The release's preprocessing (shared with NS-Net), not in the paper's abstract. Differs from the release: ties are
broken by position after rounding to 1e-9, the order is seeded, and an image under one patch is an error.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fft import rfft2  # this and log2: twice as fast as numpy's on one thread

from dgs.errors import UserError

PIXELS = 1 << 15  # at a time: what an FFT batch and its spectrum need stays in the cache


def _grid(image: NDArray[np.uint8], size: int) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"Expected an image of shape (H, W, 3), found {image.shape}.")
    rows, columns = image.shape[0] // size, image.shape[1] // size
    if rows == 0 or columns == 0:
        raise UserError(
            f"Expected an image of at least {size} x {size} px for patch selection, found "
            f"{image.shape[1]} x {image.shape[0]}. Leave it out, or set patches.size lower."
        )
    return rows, columns


def patch_entropy(image: NDArray[np.uint8], size: int = 32) -> NDArray[np.float64]:
    """Spectral entropy of each whole patch, in bits.

    H = -sum p log2(p + 1e-12), p = |FFT2(gray)|^2 normalised to sum 1 (+ 1e-12), gray = 0.299 R + 0.587 G + 0.114 B,
    over 255 where any value of the patch's image exceeds 1.

    Args:
        image: (H, W, 3) uint8; a rest on the right and at the bottom that fills no patch is cut off.
        size: side of a patch, px.

    Returns:
        (H//size * W//size,) float64, row-major.

    Raises:
        UserError: a side shorter than one patch, or another shape.
    """
    rows, columns = _grid(image, size)
    weights = np.array([0.299, 0.587, 0.114]) / (255.0 if image.max() > 1 else 1.0)
    twice = _multiplicity(size)
    entropies = np.empty((rows, columns))
    high = max(1, PIXELS // (columns * size * size))
    wide = max(1, PIXELS // (size * size))
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            bottom, right = min(rows, top + high) * size, min(columns, left + wide) * size
            gray = image[top * size : bottom, left * size : right].astype(np.float64) @ weights
            blocks = gray.reshape(-1, size, gray.shape[1] // size, size).swapaxes(1, 2)
            spectrum = rfft2(torch.from_numpy(np.ascontiguousarray(blocks))).numpy()
            p = np.square(spectrum.real)
            p += np.square(spectrum.imag)
            p = p.reshape(*blocks.shape[:2], -1)
            p /= (p @ twice + 1e-12)[..., None]
            log2 = torch.from_numpy(p + 1e-12).log2_().numpy()
            entropies[top : top + high, left : left + wide] = -((p * log2) @ twice)
    return entropies.reshape(-1)


def _multiplicity(size: int) -> NDArray[np.float64]:
    """How often each bin of a real FFT stands in the whole spectrum, flat: all but the outer columns twice."""
    twice = np.full((size, size // 2 + 1), 2.0)
    twice[:, 0] = 1.0
    if size % 2 == 0:
        twice[:, -1] = 1.0
    return twice.reshape(-1)


def select_indices(entropies: NDArray[np.float64], count: int = 49) -> NDArray[np.int32]:
    """Which patches are kept: the `count // 2` of lowest entropy, then the rest of highest, ascending.

    With fewer than `count` patches the two sets overlap, and the result is shorter than `count` where even that
    does not suffice: n patches give min(count // 2, n) + min(count - count // 2, n) indices.
    """
    order = np.argsort(np.round(entropies, 9), kind="stable")
    low = count // 2
    return np.concatenate([order[:low], order[-(count - low) :]]).astype(np.int32)


def stitch(
    image: NDArray[np.uint8], indices: NDArray[np.int32], size: int, count: int, seed: int | None
) -> NDArray[np.uint8]:
    """The kept patches in a random order, row-major on a square canvas; cells without a patch stay black.

    Args:
        indices: as `select_indices` gives them.
        seed: of the order; None keeps the order of `indices` (ascending entropy).

    Returns:
        (sqrt(count) * size, sqrt(count) * size, 3) uint8.
    """
    side = round(count**0.5)
    if side * side != count:
        raise UserError(f"Expected patches.count to be a square number, found {count}.")
    _, columns = _grid(image, size)
    if seed is not None:
        indices = np.random.default_rng(seed).permutation(indices)
    rows = image.shape[0] // size
    blocks = image[: rows * size, : columns * size].reshape(rows, size, columns, size, 3)
    cells = np.zeros((count, size, size, 3), dtype=np.uint8)
    y, x = np.divmod(indices, columns)
    cells[: len(indices)] = blocks[y, :, x]
    return cells.reshape(side, side, size, size, 3).swapaxes(1, 2).reshape(side * size, side * size, 3)


def select_patches(
    image: NDArray[np.uint8], size: int = 32, count: int = 49, seed: int | None = None
) -> NDArray[np.uint8]:
    """Patch selection whole: entropies, the kept patches, a seeded order, the canvas.

    Args:
        image: (H, W, 3) uint8.
        size: side of a patch, px.
        count: patches kept; a square number.
        seed: of the order; None takes one from the image's content, so that equal images look equal.

    Returns:
        (7*size, 7*size, 3) uint8 for count 49.

    Raises:
        UserError: a side shorter than one patch, or a count that is not a square.
    """
    indices = select_indices(patch_entropy(image, size), count)
    return stitch(image, indices, size, count, content_seed(image) if seed is None else seed)


def content_seed(image: NDArray[np.uint8]) -> int:
    """A seed that depends on the pixels alone."""
    digest = hashlib.sha256(image.tobytes()).digest()
    return int.from_bytes(digest[:8], "big")
