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

from dgs.data.screening import PIXELS, SIZES, Pixels, bounded, gray, measure, pieces, undecided
from dgs.errors import UserError

FEW = 1 << 18  # pixels: below, trying float32 on a part first costs what it saves


def patch_entropy(image: NDArray[np.uint8], size: int = 32) -> NDArray[np.float64]:
    """Spectral entropy of each whole patch, in bits.

    H = -sum p log2(p + 1e-12), p = |FFT2(gray)|^2 normalised to sum 1 (+ 1e-12), gray = 0.299 R + 0.587 G + 0.114 B,
    over 255 where any value of the patch's image exceeds 1. Equal patches have equal entropies, to the last bit.

    Args:
        image: (H, W, 3) uint8; a rest on the right and at the bottom that fills no patch is cut off.
        size: side of a patch, px.

    Returns:
        (H//size * W//size,) float64, row-major.

    Raises:
        UserError: a side shorter than one patch, or another shape.
    """
    patches, scale = _patches(image, size), _scale(image)
    found = np.empty(patches.shape[:2])
    for piece in pieces(patches):
        found[piece] = _entropies(patches[piece], scale).reshape(found[piece].shape)
    return found.reshape(-1)


def patch_indices(image: NDArray[np.uint8], size: int = 32, count: int = 49) -> NDArray[np.int32]:
    """Which patches are kept: `select_indices(patch_entropy(image, size), count)`, faster.

    Entropies are computed in float32; in float64 only those whose proven error (`dgs.data.screening`) leaves their
    place among the kept ones open, equal patches once.

    Raises:
        UserError: as `patch_entropy`.
    """
    patches, scale = _patches(image, size), _scale(image)
    if size not in SIZES or patches.size // 3 < FEW:
        return select_indices(patch_entropy(image, size), count)
    plan = list(pieces(patches, min(FEW // 4, patches.size // 12)))  # a quarter of the image at most
    rows, columns = patches.shape[:2]
    measured, step = np.empty((5, rows, columns)), min(8, len(plan))
    for start in range(step):
        for piece in plan[start::step]:
            part = patches[piece]
            measured[:, *piece] = np.reshape(measure(part), (5, *part.shape[:2]))
        if start == 0:  # a sample from all over the image; where a third is open, float64 alone is faster
            sample = np.concatenate([measured[:, *piece].reshape(5, -1) for piece in plan[::step]], axis=1)
            entropies, bounds = bounded(sample[:4], size, scale)
            if len(np.unique(sample[4, undecided(entropies, bounds, count)])) > len(entropies) // 3:
                return select_indices(patch_entropy(image, size), count)
    entropies, bounds = bounded(measured[:4].reshape(4, -1), size, scale)
    open_ones = undecided(entropies, bounds, count)
    if len(open_ones):
        _settle(entropies, open_ones, measured[4].reshape(-1), patches, scale)
    return select_indices(entropies, count)


def _patches(image: NDArray[np.uint8], size: int) -> Pixels:
    """The whole patches: (rows, columns, size, 3 * size), a view where the image's layout allows one."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"Expected an image of shape (H, W, 3), found {image.shape}.")
    rows, columns = image.shape[0] // size, image.shape[1] // size
    if rows == 0 or columns == 0:
        raise UserError(
            f"Expected an image of at least {size} x {size} px for patch selection, found "
            f"{image.shape[1]} x {image.shape[0]}. Leave it out, or set patches.size lower."
        )
    return image[: rows * size, : columns * size].reshape(rows, size, columns, 3 * size).swapaxes(1, 2)


def _scale(image: NDArray[np.uint8]) -> float:
    """What `gray` is multiplied by; most images show by their first row that a value exceeds 1."""
    return 1 / 255_000 if image[0].max() > 1 or image.max() > 1 else 1 / 1000


def _entropies(patches: Pixels, scale: float) -> NDArray[np.float64]:
    """In float64, row-major; none depends on the patches beside it."""
    x = np.multiply(gray(patches), scale, dtype=np.float64)
    spectrum = rfft2(torch.from_numpy(x)).numpy()
    p = np.square(spectrum.real)
    p += np.square(spectrum.imag)

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over the whole spectrum; row by row, where a product by BLAS would round by a row's place."""
        once = values[:, :, 0].sum(1)  # outer columns of a real FFT's half stand there once, the others twice
        if x.shape[1] % 2 == 0:
            once += values[:, :, -1].sum(1)
        return 2.0 * values.reshape(len(values), -1).sum(1) - once

    p /= (summed(p) + 1e-12)[:, None, None]
    p *= torch.from_numpy(p + 1e-12).log2_().numpy()
    return -summed(p)


def _settle(
    entropies: NDArray[np.float64],
    indices: NDArray[np.int64],
    marks: NDArray[np.float64],
    patches: Pixels,
    scale: float,
) -> None:
    """Put float64's entropies in the place of float32's at `indices`, each distinct patch computed once."""
    columns, step = patches.shape[1], max(1, PIXELS // patches.shape[2] ** 2)

    def pixels(part: NDArray[np.int64]) -> Pixels:
        return patches[np.divmod(part, columns)][None]

    _, first, same = np.unique(marks[indices], return_index=True, return_inverse=True)
    model = indices[first][same]  # the one that a patch may be equal to
    equal = np.zeros(len(indices), dtype=bool)
    doubtful = np.flatnonzero(model != indices)
    for k in range(0, len(doubtful), step):
        part = doubtful[k : k + step]
        equal[part] = (pixels(indices[part]) == pixels(model[part])).all((0, 2, 3))
    distinct = indices[~equal]
    for k in range(0, len(distinct), step):
        entropies[distinct[k : k + step]] = _entropies(pixels(distinct[k : k + step]), scale)
    entropies[indices[equal]] = entropies[model[equal]]


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
    patches = _patches(image, size)
    if seed is not None:
        indices = np.random.default_rng(seed).permutation(indices)
    cells = np.zeros((count, size, 3 * size), dtype=np.uint8)
    cells[: len(indices)] = patches[np.divmod(indices, patches.shape[1])]
    return cells.reshape(side, side, size, 3 * size).swapaxes(1, 2).reshape(side * size, side * size, 3)


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
    indices = patch_indices(image, size, count)
    return stitch(image, indices, size, count, content_seed(image) if seed is None else seed)


def content_seed(image: NDArray[np.uint8]) -> int:
    """A seed that depends on the pixels alone."""
    digest = hashlib.sha256(image.tobytes()).digest()
    return int.from_bytes(digest[:8], "big")
