"""Changes to a decoded image that tests of robustness make: JPEG, blur, resize, noise, PNG.

Each is a pure function of (H, W, 3) uint8 RGB to the same shape and type. They act on the whole decoded image, before
a view is made of it: cropping, patch selection and normalisation see the changed image alone.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from dgs.data.conditions import PNG, Condition

Bytes = NDArray[np.uint8]


def jpeg_file(image: Bytes, quality: int) -> bytes:
    """The image as a baseline JPEG file, 4:2:0, with libjpeg's tables for `quality` (1 to 100)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _png_file(image: Bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _decoded(data: bytes) -> Bytes:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"), dtype=np.uint8)


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


def perturb(image: Bytes, condition: Condition, sha256: str) -> Bytes:
    """The image under a condition: the same for the same (image hash, condition), whatever ran before.

    Args:
        image: (H, W, 3) uint8; it is left as it was.
        sha256: of the image file; with the condition it fixes the noise.

    Returns:
        (H, W, 3) uint8.
    """
    if condition.kind == "jpeg":
        return _decoded(jpeg_file(image, int(condition.strength)))
    if condition.kind == "blur":
        return blur(image, condition.strength)
    if condition.kind == "resize":
        return resize(image, condition.strength)
    if condition.kind == "noise":
        seed = np.random.SeedSequence([int(sha256[:16], 16), zlib.crc32(condition.name.encode())])
        return noise(image, condition.strength, np.random.default_rng(seed))
    if condition.kind == PNG:
        return _decoded(_png_file(image))
    raise ValueError(f"unknown kind of condition: {condition.kind!r}")
