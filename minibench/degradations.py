"""Six media a CLIP learns to name: what was done to a photograph after it was taken, from faint to strong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minibench import jpeg
from minibench.camera import blur

Bytes = NDArray[np.uint8]


def _bytes(image: NDArray[np.float32]) -> Bytes:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def apply(image: Bytes, medium: str, rng: np.random.Generator) -> Bytes:
    """(64, 64, 3) uint8 -> the same image as `medium`, strength drawn from `rng`, after its last JPEG step."""
    quality = jpeg.draw_quality(rng)
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
    return jpeg.decode(jpeg.encode(image, quality))
