"""Safe decoding: any image file or bytes to (H, W, 3) uint8 RGB, or one sentence why not."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dgs.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 100_000_000  # refuse decompression bombs: 100 MP decode to 300 MB


class UnreadableImage(UserError):
    """The file is not an image that can be decoded whole."""


def is_image_name(path: Path) -> bool:
    """True where the last suffix is an image's, whatever its case."""
    return path.suffix.lower() in EXTENSIONS


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def files_under(paths: Iterable[Path]) -> Iterator[Path]:
    """Every file under `paths`, in the order of names; what cannot be looked at is passed on, reading it says why.

    In folders, whatever begins with a dot is left out, and so are pipes and devices. Links are followed, but no folder
    is entered twice. Kept in memory: the names in the folders that lead to the current file.
    """
    for top in paths:
        entered: set[Path] = set()
        branches: list[Iterator[Path]] = [iter([top])]
        while branches:
            path = next(branches[-1], None)
            if path is None:
                branches.pop()
                continue
            try:
                if path.is_dir():
                    real = path.resolve()
                    branches.append(map(path.joinpath, () if real in entered else _names(path)))
                    entered.add(real)
                    continue
                special = path != top and path.exists() and not path.is_file()
            except OSError:
                special = False
            if not special:
                yield path


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A PIL image of any mode to (H, W, 3) uint8: EXIF rotation applied, 16 bits scaled to 8, alpha over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        levels = np.asarray(image).astype(np.float64)
        eight_bits = image.mode == "I" and levels.max() <= 255  # mode I alone does not say how deep the file was
        gray = np.clip(levels / (1.0 if eight_bits else 257.0), 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def read(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        UnreadableImage: missing, a folder, or no permission.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"Cannot read {path}: {error.strerror or error}.") from None


def decode(data: bytes, name: str = "image") -> NDArray[np.uint8]:
    """An encoded image, whole, as (H, W, 3) uint8 RGB.

    Args:
        data: the file's bytes.
        name: how an error calls it.

    Raises:
        UnreadableImage: empty, truncated, not an image, or over `MAX_PIXELS`.
    """
    if not data:
        raise UnreadableImage(f"Cannot decode {name}: the file is empty. Remove or replace it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(
                        f"Refused {name}: {width} x {height} px, expected at most {MAX_PIXELS / 1e6:.0f} megapixels."
                    )
                image.load()
                return to_rgb(image)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise anything at all on hostile bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not an image"
        raise UnreadableImage(f"Cannot decode {name}: {reason}. Remove or replace it.") from None


def fit(image: NDArray[np.uint8], size: int, how: str) -> NDArray[np.uint8]:
    """An image as (size, size, 3): "crop" keeps pixels (centre crop; smaller sides are enlarged first), "resize"
    scales the shorter side (bicubic) and then crops the centre, as CLIP does."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if how == "resize" or min(height, width) < size:
        scale = size / min(height, width)
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = np.array(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])
