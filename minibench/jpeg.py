"""The one last step of every image, real or fake: JPEG at a quality drawn without looking at the label.

File format is the field's best-known false cue; here it carries no label.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = (90, 97)  # inclusive

Bytes = NDArray[np.uint8]


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
