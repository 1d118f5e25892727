"""A picture's file without its metadata: a decoder sees what pixels need, and of EXIF the orientation alone is read.

Metadata is skipped, never decoded: it can neither make a decoder refuse a picture nor take memory beside the file's.
BMP has none that a decoder stumbles over.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import repeat
from typing import NamedTuple

ORIENTATION = 274  # the tag's number
EXIF = b"Exif\0\0"  # may stand before a block
RAW_EXIF = b"Raw profile type exif\0"  # ImageMagick's way to keep EXIF in a PNG: as text, in hexadecimal
MAX_TEXT = 1 << 20  # of that, uncompressed
MAX_TAGS = 1 << 16  # of a directory
MAX_PARTS = 1 << 20  # of a file: many times what pictures have
JPEG_METADATA = (*range(0xE0, 0xF0), 0xFE)  # application segments and comments
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
TRANSPARENT = {0: 2, 2: 6}  # bytes of the transparent grey and colour
WEBP_CHUNKS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
WEBP_EXIF, WEBP_METADATA = 0x08, 0x2C  # flags of a VP8X chunk: EXIF; EXIF, XMP or ICC profile
GIF_CONTROL = b"\xf9\4"  # the extension that says which colour is transparent, in a block of 4 bytes
# Of TIFF: size, samples, compression, colours, strips, tiles, the tables of its compressions, and subsampling.
TIFF_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 326, 327, 328, 338,
     339, 347, *range(512, 522), 529, 530, 531, 532, 50674}
)  # fmt: skip
UNREADABLE = (ValueError, IndexError, OverflowError, struct.error)  # too short, or numbers that lead out of the file
INTEGERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # TIFF's types of an orientation, as `struct` calls them
# An AVIF's entry of an item: version and flags, the item's number, its protection; then its type.
AVIF_METADATA = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", re.DOTALL)


Parts = list[bytes | memoryview]


class Entry(NamedTuple):
    """One tag of a TIFF directory."""

    tag: int
    type: int
    length: int  # how many values
    value: bytes  # 4 or 8 bytes: the values, or where they are
    all: bytes  # the whole entry


class Directory:
    """The first directory of a TIFF, which EXIF is too.

    Raises:
        one of `UNREADABLE`: no TIFF, or one without a directory.
    """

    def __init__(self, data: memoryview) -> None:
        head = bytes(data[:4])
        if head[:2] not in (b"II", b"MM") or not {42, 43} & set(head[2:]):
            raise ValueError("no TIFF")
        self.data, self.order, self.is_big = data, "<" if head[:2] == b"II" else ">", head[2] == 43
        self.offset = self._unpack("Q" if self.is_big else "L", 8 if self.is_big else 4)
        self.count = min(MAX_TAGS, self._unpack("Q" if self.is_big else "H", self.offset))

    def _unpack(self, form: str, at: int) -> int:
        (value,) = struct.unpack_from(self.order + form, self.data, at)
        return int(value)

    def entries(self) -> Iterator[Entry]:
        """Those that lie in the file."""
        head = struct.Struct(self.order + ("HHQ" if self.is_big else "HHL"))
        size = 20 if self.is_big else 12
        at = self.offset + (8 if self.is_big else 2)
        for _ in range(self.count):
            entry = bytes(self.data[at : at + size])
            if len(entry) < size:
                return
            tag, kind, length = head.unpack_from(entry)
            yield Entry(tag, kind, length, entry[head.size :], entry)
            at += size

    def orientation(self) -> int:
        """1 to 8, of the first entry that can be read; 1 if there is none."""
        for entry in self.entries():
            if entry.tag == ORIENTATION and entry.type in INTEGERS:
                form = struct.Struct(self.order + INTEGERS[entry.type])
                if 1 <= entry.length <= len(entry.value) // form.size:
                    (value,) = form.unpack_from(entry.value)
                    return value if 1 <= value <= 8 else 1
        return 1

    def with_tags(self, tags: frozenset[int]) -> bytes:
        """The file with a directory of these tags alone, at its end; other directories are cut off."""
        kept = sorted((entry for entry in self.entries() if entry.tag in tags), key=lambda entry: entry.tag)
        count, offset = ("Q", "Q") if self.is_big else ("H", "L")
        end = len(self.data) + len(self.data) % 2
        head = 8 if self.is_big else 4  # what the offset of the directory takes, too
        return b"".join(
            [
                self.data[:head],
                struct.pack(self.order + offset, end),
                self.data[2 * head :],
                bytes(end - len(self.data)),
                struct.pack(self.order + count, len(kept)),
                *(entry.all for entry in kept),
                struct.pack(self.order + offset, 0),
            ]
        )


def _turns() -> Iterator[None]:
    """One for each part of a file, up to `MAX_PARTS`."""
    yield from repeat(None, MAX_PARTS)
    raise RuntimeError(f"its metadata has more than {MAX_PARTS:,} parts")


def _bare(block: memoryview) -> memoryview:
    while block[: len(EXIF)] == EXIF:
        block = block[len(EXIF) :]
    return block


def _orientation(blocks: Iterable[memoryview]) -> int:
    """Of the first EXIF block that can be read; 1 where none can."""
    for block in blocks:
        with suppress(*UNREADABLE):
            return Directory(_bare(block)).orientation()
    return 1


def _raw_exif(name: bytes, text: bytes) -> Iterator[memoryview]:
    """EXIF from a text chunk of a PNG, which says its name and its length in lines of their own."""
    try:
        text = text.removeprefix(RAW_EXIF)
        if name == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], MAX_TEXT)
        yield memoryview(bytes.fromhex(text.split(b"\n", 3)[3].decode("ascii")))
    except (ValueError, IndexError, zlib.error):
        return


def _transparency(body: bytes, depth: int, colour: int) -> bytes:
    """A PNG's transparent grey of less than 8 bits as it is among 8, which is how a decoder compares it."""
    if colour == 0 and depth in (2, 4):
        return struct.pack(">H", int.from_bytes(body[:2]) * 255 // (2**depth - 1))
    return body


def _png(data: bytes) -> tuple[bytes, int]:
    view, exif = memoryview(data), []
    exif_as_text: list[memoryview] = []
    kept, at = Parts([view[:8]]), 8
    depth, colour = data[24], data[25]
    for _ in _turns():
        if at + 8 > len(data):
            break
        size, name = struct.unpack_from(">L4s", data, at)
        begin, end = at + 8, at + 12 + size
        if name == b"tRNS":  # ancillary: viewers pay no heed to its checksum, nor to one cut short
            if size >= TRANSPARENT.get(colour, 0):
                chunk = name + _transparency(data[begin : begin + size], depth, colour)
                kept.append(struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk)))
        elif name in PNG_CHUNKS:
            kept.append(view[at:end])
        elif name == b"eXIf":
            exif.append(view[begin : begin + size])
        elif name in (b"zTXt", b"tEXt") and data.startswith(RAW_EXIF, begin):
            exif_as_text.extend(_raw_exif(name, data[begin : begin + size]))
        at = end
        if name == b"IEND":
            break
    return b"".join(kept), _orientation(exif + exif_as_text)


def _decides_colours(marker: int, body: memoryview) -> bool:
    """True for the two of a JPEG's application segments by which decoders choose the colour space."""
    is_jfif = marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14
    return is_jfif or (marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12)


def _jpeg(data: bytes) -> tuple[bytes, int]:
    view, exif = memoryview(data), []
    kept, at = Parts([view[:2]]), 2
    for _ in _turns():
        if not 0 <= at <= len(data) - 4:
            break
        marker, end = data[at + 1], at + 2 + max(2, data[at + 2] << 8 | data[at + 3])
        if data[at] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:  # filling, or no segment
            at = data.find(b"\xff", at + 1)
            continue
        if marker == 0xDA:  # the first scan: the rest is pixels
            kept.append(view[at:])
            break
        body = view[at + 4 : end]
        if marker == 0xE1 and body[: len(EXIF)] == EXIF:
            exif.append(body)
        if marker not in JPEG_METADATA or _decides_colours(marker, body):
            kept.append(view[at:end])
        at = end
    return b"".join(kept), _orientation(exif)


def _webp(data: bytes) -> tuple[bytes, int]:
    view, exif = memoryview(data), []
    kept, at = Parts(), 12
    flags = data[20] if data[12:16] == b"VP8X" else 0
    for _ in _turns():
        if at + 8 > len(data):
            break
        name, size = struct.unpack_from("<4sL", data, at)
        begin, end = at + 8, at + 8 + size + size % 2
        if name == b"VP8X":
            kept += [view[at:begin], bytes([flags & ~WEBP_METADATA]), view[begin + 1 : end]]
        elif name in WEBP_CHUNKS:
            kept.append(view[at:end])
        elif name == b"EXIF" and flags & WEBP_EXIF:
            exif.append(view[begin : begin + size])
        at = end
    chunks = b"".join(kept)
    size = len(chunks) + len(chunks) % 2
    return b"RIFF" + struct.pack("<L", size + 4) + b"WEBP" + chunks.ljust(size, b"\0"), _orientation(exif)


def _end_of_blocks(data: bytes, at: int, turns: Iterator[None]) -> int:
    for _ in turns:
        if data[at] == 0:
            break
        at += 1 + data[at]
    return at + 1


def _gif(data: bytes) -> tuple[bytes, int]:
    view = memoryview(data)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)  # behind the palette
    kept, turns = Parts([view[:at]]), _turns()
    for _ in turns:
        if data[at] != 0x21:  # the first frame: the rest is pixels
            kept.append(view[at:])
            break
        end = _end_of_blocks(data, at + 2, turns)
        if data[at + 1 : at + 3] == GIF_CONTROL:
            kept.append(view[at:end])
        at = end
    return b"".join(kept), 1


def _tiff(data: bytes) -> tuple[bytes, int]:
    directory = Directory(memoryview(data))
    return directory.with_tags(TIFF_TAGS), directory.orientation()


def _avif(data: bytes) -> tuple[bytes, int]:
    """Items that are metadata get a type that decoders pass over; how to turn it says the picture itself, not EXIF."""
    return AVIF_METADATA.sub(rb"\1skip", data), 1


FORMATS: dict[str, Callable[[bytes], tuple[bytes, int]]] = {
    "PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "GIF": _gif, "TIFF": _tiff, "AVIF": _avif,
}  # fmt: skip


def without_metadata(data: bytes, kind: str) -> tuple[bytes, int]:
    """A file of the same pixels in the same format, and the EXIF orientation, 1 to 8 (1: upright, or not said).

    Args:
        data: of a picture, maybe a damaged one, which is not mended.
        kind: its format, as Pillow calls it; others than `FORMATS` are given back as they are.

    Raises:
        RuntimeError: more than `MAX_PARTS` parts, which would take minutes.
    """
    try:
        return FORMATS[kind](data) if kind in FORMATS else (data, 1)
    except UNREADABLE:
        return data, 1
