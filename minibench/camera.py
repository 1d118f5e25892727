"""A photograph: lens blur, exposure, Bayer mosaic, shot and read noise, bilinear demosaic, gamma. "Real" means this."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tqdm import tqdm

from minibench import scenes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLUR = (0.3, 0.6)  # standard deviation, pixels
EXPOSURE = (0.8, 1.15)
ELECTRONS = (800.0, 4000.0)  # full well: shot noise falls as it rises
READ_NOISE = (0.003, 0.008)  # standard deviation, fraction of full scale
MARGIN = 8  # pixels made around every image of the benchmark, real or fake, and cut off
CHUNK = 250  # scenes that a process takes at a time


def blur(image: Floats, sigma: float) -> Floats:
    """Separable Gaussian blur by `sigma` pixels, edges reflected: (H, W, C) float32 -> the same."""
    radius = max(1, int(np.ceil(3 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    height, width = image.shape[:2]
    padded = np.pad(image, ((radius, radius), (0, 0), (0, 0)), mode="reflect")
    image = sum((t * padded[i : i + height] for i, t in enumerate(taps)), np.zeros_like(image))
    padded = np.pad(image, ((0, 0), (radius, radius), (0, 0)), mode="reflect")
    return sum((t * padded[:, i : i + width] for i, t in enumerate(taps)), np.zeros_like(image))


def _bayer(size: int) -> Floats:
    """Which of the three colours each sensor cell sees (RGGB): (size, size, 3) of 0 and 1."""
    cells = np.zeros((size, size, 3), np.float32)
    cells[0::2, 0::2, 0] = 1
    cells[0::2, 1::2, 1] = 1
    cells[1::2, 0::2, 1] = 1
    cells[1::2, 1::2, 2] = 1
    return cells


def _spread(image: Floats) -> Floats:
    """3x3 tent filter (1 2 1; 2 4 2; 1 2 1), edges reflected so that the mosaic's period is kept."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]


def demosaic(raw: Floats) -> Floats:
    """Bilinear interpolation of an RGGB mosaic: (H, W) float32 -> (H, W, 3)."""
    cells = _bayer(raw.shape[0])
    return _spread(raw[..., None] * cells) / _spread(cells)


def photograph(light: Floats, rng: np.random.Generator) -> Bytes:
    """Linear light (S, S, 3) float32 in [0, 1] -> the camera's sRGB-like image, uint8."""
    image = blur(light, rng.uniform(*BLUR)) * np.float32(rng.uniform(*EXPOSURE))
    raw = (image * _bayer(image.shape[0])).sum(-1)
    well = rng.uniform(*ELECTRONS)
    deviation = np.sqrt(np.maximum(raw, 0) / well + rng.uniform(*READ_NOISE) ** 2)
    raw = raw + deviation.astype(np.float32) * rng.standard_normal(raw.shape, dtype=np.float32)
    image = np.clip(demosaic(raw), 0, 1) ** (1 / 2.2)
    return np.rint(image * 255).astype(np.uint8)


def draw(s: scenes.Scene, margin: int = 0) -> Bytes:
    """The scene as a drawing: no lens, no sensor, no noise; (S, S, 3) uint8 sRGB-like, S = 64 + 2 margin."""
    return np.rint(scenes.render(s, margin) ** (1 / 2.2) * 255).astype(np.uint8)


def shoot(seed: int, split: str, index: int, margin: int = 0) -> tuple[scenes.Scene, Bytes]:
    """The scene (seed, split, index) and its photograph, (S, S, 3) uint8, S = 64 + 2 margin pixels (margin even)."""
    s = scenes.scene(seed, split, index)
    return s, photograph(scenes.render(s, margin), scenes.stream(seed, split, index, "camera"))


def _chunk(seed: int, split: str, indices: Sequence[int], margin: int) -> list[tuple[scenes.Scene, Bytes]]:
    return [shoot(seed, split, index, margin) for index in indices]


def photographs(
    seed: int, split: str, indices: Sequence[int], margin: int = 0, workers: int = 1, progress: bool = False
) -> tuple[list[scenes.Scene], Bytes]:
    """Scenes of a split by their indices, and their photographs: the same whatever the number of processes.

    Returns:
        the N scenes; (N, S, S, 3) uint8, S = 64 + 2 margin pixels.
    """
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    made = Parallel(workers, return_as="generator")(delayed(_chunk)(seed, split, some, margin) for some in chunks)
    found: list[scenes.Scene] = []
    side = scenes.SIZE + 2 * margin
    images = np.empty((len(indices), side, side, 3), np.uint8)
    with tqdm(total=len(indices), desc=f"photographs of {split} scenes", disable=not progress) as bar:
        for some in made:
            for scene, image in some:
                images[len(found)] = image
                found.append(scene)
            bar.update(len(some))
    return found, images


def crop(images: Bytes) -> Bytes:
    """Without `MARGIN`: (..., 80, 80, 3) -> (..., 64, 64, 3)."""
    return images[..., MARGIN:-MARGIN, MARGIN:-MARGIN, :]
