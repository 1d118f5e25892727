"""What is done to a photograph after it was taken: six media a CLIP learns to name, and one last JPEG step for all.

File format is the field's best-known false cue. Here every image, real or fake, ends as a JPEG of a quality drawn
without looking at its label.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minibench.camera import Bytes, blur

QUALITY = (90, 97)  # inclusive


def draw_quality(rng: np.random.Generator, low: int = QUALITY[0], high: int = QUALITY[1]) -> int:
    """A JPEG quality, uniform on low..high inclusive."""
    return int(rng.integers(low, high + 1))


def encode(image: Bytes, quality: int) -> bytes:
    """(H, W, 3) uint8 -> a baseline JPEG file, 4:2:0, optimised Huffman tables, no metadata."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return buffer.getvalue()


def decode(data: bytes) -> Bytes:
    """A JPEG file -> (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _bytes(image: NDArray[np.float32]) -> Bytes:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def degrade(image: Bytes, medium: str, rng: np.random.Generator) -> Bytes:
    """(64, 64, 3) uint8 -> the same image as `medium`, from faint to strong by `rng`, after its last JPEG step."""
    quality = draw_quality(rng)
    values = image.astype(np.float32)
    if medium == "blurry":
        image = _bytes(blur(values, rng.uniform(0.7, 1.5)))
    elif medium == "noisy":
        grain = rng.standard_normal(values.shape, dtype=np.float32)
        if rng.random() < 0.3:  # grey grain
            grain = grain[..., :1]
        image = _bytes(values + rng.uniform(6, 24) * grain)
    elif medium == "pixelated":
        side = image.shape[0]
        small = round(side / rng.uniform(1.6, 3.5))
        picture = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
        image = np.asarray(picture.resize((side, side), Image.Resampling.NEAREST))
    elif medium == "compressed":
        quality = int(rng.integers(10, 50))
    elif medium == "sharpened":
        image = _bytes(values + rng.uniform(0.7, 2.5) * (values - blur(values, rng.uniform(0.7, 1.2))))
    elif medium != "clean":
        raise ValueError(f"medium should be one of minibench.captions.MEDIA. Found {medium!r}.")
    return decode(encode(image, quality))
