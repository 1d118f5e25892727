"""Changes to a decoded image that tests of robustness make: JPEG, blur, resize, noise, crop, PNG.

Each is a pure function of (H, W, 3) uint8 RGB to the same shape and type. They act on the whole decoded image, before
a view is made of it: cropping, patch selection and normalisation see the changed image alone.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from dgs.conditions import PNG, Condition

Bytes = NDArray[np.uint8]


def _stored(image: Bytes, kind: str, **options: Any) -> Bytes:
    """The image after a file of Pillow's format `kind`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    with Image.open(buffer) as stored:
        return np.array(stored.convert("RGB"), dtype=np.uint8)


def _rounded(values: NDArray[np.float32]) -> Bytes:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def blur(image: Bytes, sigma: float) -> Bytes:
    """Gaussian blur by a standard deviation of `sigma` px, cut at 4 sigma, edges reflected."""
    return _rounded(gaussian_filter(image.astype(np.float32), sigma=(sigma, sigma, 0)))


def scale(image: Bytes, factor: float) -> Bytes:
    """The image at `factor` times its sides, in whole px, at least 1; bicubic, without aliasing."""
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def resize(image: Bytes, factor: float) -> Bytes:
    """`scale` by `factor` and, bicubic too, back to the image's own size: the same picture with less detail.

    Back to size, since a view takes a fixed number of pixels: without, it would show another part of the picture.
    """
    height, width = image.shape[:2]
    return np.array(Image.fromarray(scale(image, factor)).resize((width, height), Image.Resampling.BICUBIC))


def noise(image: Bytes, sigma: float, rng: np.random.Generator) -> Bytes:
    """Gaussian noise of `sigma` 8-bit levels, independent in each pixel and colour; then rounded and cut to 0..255."""
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    return _rounded(image.astype(np.float32) + np.float32(sigma) * grain)


def crop(image: Bytes, share: float) -> Bytes:
    """The middle `share` of both sides, in whole px, at least 1; then at the image's own size again, bicubic."""
    height, width = image.shape[:2]
    rows, columns = (max(1, round(side * share)) for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = Image.fromarray(np.ascontiguousarray(image[top : top + rows, left : left + columns]))
    return np.array(middle.resize((width, height), Image.Resampling.BICUBIC))


# By kind of condition: of an image, the strength, and random numbers of its own. A JPEG is a baseline file, 4:2:0, with
# libjpeg's tables for a quality of 1 to 100.
PERTURBATIONS: dict[str, Callable[[Bytes, float, np.random.Generator], Bytes]] = {
    "jpeg": lambda image, quality, _: _stored(image, "JPEG", quality=int(quality), subsampling="4:2:0"),
    "blur": lambda image, sigma, _: blur(image, sigma),
    "resize": lambda image, factor, _: resize(image, factor),
    "noise": noise,
    "crop": lambda image, share, _: crop(image, share),
    PNG: lambda image, strength, _: _stored(image, "PNG", compress_level=1),
}


def perturb(image: Bytes, condition: Condition, sha256: str) -> Bytes:
    """The image under a condition: the same for the same (image hash, condition), whatever ran before.

    Args:
        image: (H, W, 3) uint8; it is left as it was.
        sha256: of the image file; with the condition it fixes the noise.

    Returns:
        (H, W, 3) uint8.
    """
    if condition.kind not in PERTURBATIONS:
        raise ValueError(f"unknown kind of condition: {condition.kind!r}")
    seed = np.random.SeedSequence([int(sha256[:16], 16), zlib.crc32(condition.name.encode())])
    return PERTURBATIONS[condition.kind](image, condition.strength, np.random.default_rng(seed))
