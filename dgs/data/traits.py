"""What one image file shows besides its picture: content hash, format, size, JPEG quality; or why it cannot be read."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgs.data.images import UnreadableImage, decode, read

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
}
SAME = {"MPO": "JPEG", "DIB": "BMP"}  # what a decoder calls variants of a format


@dataclass(frozen=True)
class Traits:
    """One image file, read whole."""

    sha256: str = ""  # of the file's bytes; "" if they could not be read
    format: str = ""  # by the first bytes, not by the name: "JPEG"
    size: tuple[int, int] = (0, 0)  # width, height in the file, before any rotation
    quality: int | None = None  # of a JPEG
    lies: bool = False  # the suffix is another format's
    error: str = ""  # why it cannot be decoded; then the rest but sha256 is empty


@cache
def _tables() -> NDArray[np.int64]:
    """Luminance tables of the common encoder at quality 1 to 100, (100, 64)."""
    tables = []
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as image:
            tables.append(image.quantization[0])  # type: ignore[attr-defined]
    return np.array(tables, dtype=np.int64)


def jpeg_quality(table: list[int]) -> int:
    """The quality, 1 to 100, at which the common encoder's luminance table is nearest to this one of 64 numbers.

    Encoders with tables of their own get the quality that compresses about as much.
    """
    return int(np.abs(_tables() - np.array(table)).sum(axis=1).argmin()) + 1


def traits(path: Path) -> Traits:
    """Read and decode one file; an unreadable one is no exception here, its `error` says why."""
    sha256 = ""
    try:
        data = read(path)
        sha256 = hashlib.sha256(data).hexdigest()
        decode(data, str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                named = image.format or "unknown"
                found = SAME.get(named, named)
                tables = getattr(image, "quantization", None)
                quality = jpeg_quality(tables[0]) if found == "JPEG" and tables and 0 in tables else None
                lies = FORMATS.get(path.suffix.lower(), found) != found
                return Traits(sha256, found, image.size, quality, lies)
    except UnreadableImage as error:
        return Traits(sha256, error=str(error))
