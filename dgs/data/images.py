"""Safe decoding: any image file or bytes to (H, W, 3) uint8 RGB, or one sentence why not."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from dgs.data.containers import without_metadata
from dgs.errors import UserError, printable

# Photographs and what generators write; not every format that Pillow knows: for EPS, say, it starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
HEAD = 16  # bytes that tell a format
COMMON_HEADS = ("BMP", "DIB", "TIFF")  # other things begin so too, such as a camera's raw files
MAX_PIXELS = 80_000_000  # refuse decompression bombs: 80 MP decode to 240 MB, and take 1 GB on the way
SHARES = {"WEBP": 0.6, "AVIF": 0.6, "CMYK": 0.8}  # of MAX_PIXELS, where decoding takes more memory than that a pixel
MAX_BYTES = 200_000_000  # of a file
LONGEST = 16  # times the shorter side: what is longer is cut to its middle before it is scaled
BAND = 1 << 22  # pixels converted at a time
PHOTOMETRIC = 262  # TIFF's tag

# Once and for all: warnings.catch_warnings around each image would not be safe in threads. What matters is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")

# What decoders say of a picture that they do not know how to decode.
UNIDENTIFIED = ("cannot identify image file", "decoder error", "raw mode")


class UnreadableImage(UserError):
    """The file is not an image that can be decoded whole. One line, whatever its name is."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


GRAY_MODES = ("I;16", "I;16B", "I;16L", "I", "F")
WHITES = (1, 255, 65_535, 2**32 - 1)  # of floats
# Of rows and columns, by EXIF's orientation.
TURNS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@cache
def _extensions() -> frozenset[str]:
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def is_image_name(path: Path) -> bool:
    """True where the last suffix is one of a format in `FORMATS`, whatever its case."""
    return path.suffix.lower() in _extensions()


def is_image(path: Path) -> bool:
    """True where a file's suffix or its first bytes are those of a format in `FORMATS`: what is read of a folder.

    A suffix is enough, so that a broken image is not passed over in silence, and so is the content, whatever the name;
    but of `COMMON_HEADS` only where there is no suffix.
    """
    if is_image_name(path):
        return True
    try:
        found = format_of(read(path, HEAD))
    except UnreadableImage:
        return False
    return found != "" and (found not in COMMON_HEADS or path.suffix == "")


def format_of(head: bytes) -> str:
    """The format that a file's first bytes announce; "" if none of `FORMATS`."""
    Image.init()
    accepts = ((name, Image.OPEN[name][1]) for name in FORMATS if name in Image.OPEN)
    return next((name for name, accept in accepts if accept and accept(head[:HEAD].ljust(HEAD)) is True), "")


def files_under(paths: Iterable[Path]) -> Iterator[Path]:
    """Every file under `paths`, in the order of names; what cannot be looked at is passed on, reading it says why.

    In folders, whatever begins with a dot is left out. Links are followed, but no folder is entered twice. Kept in
    memory: the names in the folders that lead to the current file.
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
                    names = [] if real in entered else sorted(child.name for child in path.iterdir())
                    branches.append(map(path.joinpath, [name for name in names if not name.startswith(".")]))
                    entered.add(real)
                    continue
            except OSError:
                pass
            yield path


def _grey_to_rgb(band: Image.Image, white: float, transparent: object, is_inverted: bool) -> NDArray[np.uint8]:
    values = np.asarray(band)
    scaled = np.nan_to_num(values).astype(np.float64) * 255 / white
    scaled = np.clip(np.rint(scaled) if white == 1 else scaled, 0, 255).astype(np.uint8)
    grey = 255 - scaled if is_inverted else scaled
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _band_to_rgb(band: Image.Image) -> NDArray[np.uint8]:
    if band.mode == "La":  # which converts to nothing else
        band = band.convert("LA")
    if band.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in band.info:
        rgba = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(band.convert("RGB"))


def _white(image: Image.Image) -> float:
    """The value of white, which floats and 32-bit numbers do not say: the next that makes sense for the largest."""
    if image.mode not in ("I", "F"):
        return 65_535
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    if image.mode == "F":  # in 0..1 or 0..255 as a rule, where some values may lie beyond white
        return next((white for white in WHITES if high < 16 * white), 1)
    if low < 0 or high > 65_535:
        raise ValueError(
            f"expected grey values of 8 or 16 bits, found {low:.0f} to {high:.0f} (save the image with 16)"
        )
    return 255 if high <= 255 else 65_535


def _orientation(image: Image.Image) -> int:
    """1 to 8, as an opened image says; 1 where that cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata of any kind may be broken in any way
        return 1


def _turned(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(TURNS[orientation](rgb)) if orientation in TURNS else rgb


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A PIL image of any mode as (H, W, 3) uint8: turned as EXIF says, 16 bits and floats scaled, alpha over white.

    In bands, so that beside the two images little memory is needed.
    """
    image.load()
    return _turned(_pixels(image), _orientation(image))


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """As `to_rgb`, not turned."""
    is_grey = image.mode in GRAY_MODES
    white = _white(image) if is_grey else 255
    is_inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0  # TIFF's "white is zero"
    width, height = image.size
    rgb = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        band = image if rows >= height else image.crop((0, top, width, bottom))
        if is_grey:
            rgb[top:bottom] = _grey_to_rgb(band, white, image.info.get("transparency"), is_inverted)
        else:
            rgb[top:bottom] = _band_to_rgb(band)
    return rgb


# What a file that is none is called; Windows knows but the first two.
KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a named pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
}


def _require_file(found: os.stat_result, path: Path) -> None:
    for kind, is_one in KINDS.items():
        if is_one(found.st_mode):
            raise UnreadableImage(f"Cannot read {path}: expected a file, found {kind}.")
    if found.st_size > MAX_BYTES:
        size, most = found.st_size / 1e9, MAX_BYTES / 1e9
        raise UnreadableImage(f"Refused {path}: {size:.1f} GB, expected at most {most} GB.")


def size_of(path: Path) -> int:
    """Of a file, in bytes; 0 where that cannot be known."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read(path: Path, most: int = MAX_BYTES) -> bytes:
    """A file's bytes, the first `most` of them.

    Raises:
        UnreadableImage: missing, no permission, over `MAX_BYTES`, or no file: a folder, pipe, device or socket.
    """
    try:
        _require_file(path.stat(), path)  # before it is opened, which may already do something to a device
        # Neither a pipe put there meanwhile nor a file of the kernel's may make us wait.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            found = os.fstat(file.fileno())
            _require_file(found, path)
            return file.read(min(found.st_size + 1, most)) or b""  # the kernel's own files say 0, and may have no end
    except OSError as error:
        raise UnreadableImage(f"Cannot read {path}: {error.strerror or error}.") from None


def decode(data: bytes, name: str = "image", before: Callable[[int], object] = lambda _: None) -> NDArray[np.uint8]:
    """An encoded image, whole, as (H, W, 3) uint8 RGB.

    Args:
        data: the file's bytes, in one of `FORMATS`.
        name: how an error calls it.
        before: called when the header has been read and nothing has been decoded yet, with the number of pixels (more
            where they take more memory than others, at most `MAX_PIXELS`).

    Raises:
        UnreadableImage: empty, truncated, not an image, or over `MAX_PIXELS` (some formats: over less).
    """
    if not data:
        raise UnreadableImage(f"Cannot decode {name}: the file is empty. Remove or replace it.")
    kind = format_of(data)
    try:
        data, orientation = without_metadata(data, kind)  # now the file goes, where the caller kept none
        return _turned(*_decoded(data, orientation, name, before))
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, of 179 megapixels
        raise _too_large(name, "more than 179") from None
    except Exception as error:  # decoders raise anything at all on hostile bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if any(words in reason for words in UNIDENTIFIED):
            reason = f"not an image in a format that is read ({', '.join(FORMATS)})"
            if kind:
                reason = f"damaged, or a variant of {kind} that is not read (save it plainly, with 8 or 16 bits)"
        raise UnreadableImage(f"Cannot decode {name}: {reason}. Remove or replace it.") from None


def _decoded(
    data: bytes, orientation: int, name: str, before: Callable[[int], object]
) -> tuple[NDArray[np.uint8], int]:
    """Pixels, not turned, and their orientation; the decoder's own copy of them is gone when they are turned."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        share = min(SHARES.get(str(image.format), 1.0), SHARES.get(image.mode, 1.0))
        width, height = image.size
        if width * height > share * MAX_PIXELS:
            raise _too_large(name, f"{width} x {height} px", share)
        before(int(width * height / share))
        image.load()
        # An AVIF says it beside EXIF, to the decoder.
        return _pixels(image), orientation if orientation != 1 else _orientation(image)


def _too_large(name: str, found: str, share: float = 1.0) -> UnreadableImage:
    return UnreadableImage(f"Refused {name}: {found}, expected at most {share * MAX_PIXELS / 1e6:.0f} megapixels.")


def _middle(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # Scaled up, a line of 1 x 1,000,000 px would take gigabytes, of which all but the centre is cut off.
    most = LONGEST * min(image.shape[:2])
    top, left = (max(0, side - most) // 2 for side in image.shape[:2])
    return image[top : top + most, left : left + most]


def fit(image: NDArray[np.uint8], size: int, how: str) -> NDArray[np.uint8]:
    """An image as (size, size, 3): "crop" keeps pixels (centre crop; smaller sides are enlarged first), "resize"
    scales the shorter side (bicubic) and then crops the centre, as CLIP does."""
    image = _middle(image)
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
