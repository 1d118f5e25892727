"""Picture files with metadata of every kind, in parts that a test can change, and put together again."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from conftest import structured_image
from PIL import Image, ImageCms

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Software="a camera"/></x:xmpmeta>'
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURE = structured_image(7, 24, 16)


def encoded(kind: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def plain(kind: str, **options: Any) -> bytes:
    """`PICTURE` as a file, encoded once."""
    return encoded(kind, **options)


def entry(tag: int, kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    """One of a TIFF directory; `value` is 4 bytes at most."""
    return struct.pack(f"{order}HHL", tag, kind, count) + value.ljust(4, b"\0")


def exif(*entries: bytes, order: str = "<", after: bytes = b"") -> bytes:
    """A block of EXIF, which is a TIFF without pixels; `after` begins at 14 + 12 a entry."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}L", 8)
    return head + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4) + after


def turn(orientation: int, order: str = "<") -> bytes:
    return entry(0x112, 3, 1, struct.pack(f"{order}H", orientation), order)


def chunk(name: bytes, body: bytes, checksum: int = 0) -> bytes:
    """Of a PNG; with another checksum than 0 that is added to the right one."""
    right = zlib.crc32(name + body)
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", (right + checksum) % 2**32)


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG, cut to what one can hold."""
    body = body[:65_533]
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<L", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<L", len(body) + 4) + b"WEBP" + body


def png_with(*chunks: bytes, after: bytes = b"", image: Image.Image = PICTURE) -> bytes:
    """A PNG with chunks behind its header, and some behind its pixels."""
    data = encoded("PNG", image)
    return data[:33] + b"".join(chunks) + data[33:-12] + after + data[-12:]


def jpeg_with(*segments: bytes) -> bytes:
    data = plain("JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def webp_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A lossless WebP with flags for all kinds of metadata."""
    data = plain("WEBP", lossless=True)
    extended = bytes([0x2C]) + bytes(3) + struct.pack("<L", PICTURE.width - 1)[:3]
    extended += struct.pack("<L", PICTURE.height - 1)[:3]
    return riff((b"VP8X", extended), (b"VP8L", data[20 : 20 + struct.unpack_from("<L", data, 16)[0]]), *chunks)


def gif_with(*extensions: bytes) -> bytes:
    data = plain("GIF")
    at = 13 + (3 << (data[10] & 7) + 1)  # behind the palette
    return data[:at] + b"".join(extensions) + data[at:]


def tiff_with(*entries: bytes, after: bytes = b"", **options: Any) -> bytes:
    """A TIFF whose directory, at its end, has further entries, in their order; `after` lies at 8 in the file."""
    data = encoded("TIFF", **options)
    (at,) = struct.unpack_from("<L", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    own = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    kept = [each for each in own if struct.unpack("<H", each[:2])[0] != 0x112]
    body = data + after + bytes((len(data) + len(after)) % 2)
    directory = struct.pack("<H", len(entries) + len(kept)) + b"".join([*entries, *kept]) + bytes(4)
    return body[:4] + struct.pack("<L", len(body)) + body[8:] + directory


@dataclass
class Parts:
    """A picture file: `build` puts its pixels and its metadata, (name, content) each, together."""

    build: Callable[..., bytes]
    metadata: list[tuple[Any, bytes]] = field(default_factory=list)
    checksum: int = 0  # added to those of a PNG's metadata

    def data(self) -> bytes:
        return self.build(self)


def _png(parts: Parts) -> bytes:
    chunks = [chunk(name, body, parts.checksum) for name, body in parts.metadata]
    half = len(chunks) // 2
    return png_with(*chunks[:half], after=b"".join(chunks[half:]))


def _jpeg(parts: Parts) -> bytes:
    return jpeg_with(*(segment(marker, body) for marker, body in parts.metadata))


def _webp(parts: Parts) -> bytes:
    return webp_with(*parts.metadata)


def _tiff(parts: Parts) -> bytes:
    """Twelve bytes of content are an entry, whose tag is one that says nothing of pixels; the rest is its values."""
    entries = [struct.pack("<H", tag) + body[:10].ljust(10, b"\0") for tag, body in parts.metadata]
    return tiff_with(*entries, after=b"".join(body[10:] for _, body in parts.metadata))


def _gif(parts: Parts) -> bytes:
    blocks = []
    for label, body in parts.metadata:
        pieces = [body[i : i + 255] for i in range(0, len(body), 255)]
        blocks.append(bytes([0x21, label]) + b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0")
    return gif_with(*blocks)


def _avif(parts: Parts) -> bytes:
    """Of equal length as the original, since places of items are counted from the file's begin."""
    data = plain("AVIF", exif=EXIF, xmp=XMP, icc_profile=PROFILE, quality=100, subsampling="4:4:4")
    for original, body in parts.metadata:
        assert data.count(original) == 1
        data = data.replace(original, body[: len(original)].ljust(len(original), b"\0"))
    return data


EXIF = exif(
    entry(0x10F, 2, 4, b"abc"), entry(0x128, 3, 1, b"\2"), entry(0x11A, 5, 1, b"\x4a"), entry(0x8769, 4, 1, b"\x1a"),
    after=struct.pack("<LL", 72, 1),
)  # fmt: skip
PNG_TEXT = b"prompt\0a red cube on a green ground"
PICTURES: dict[str, Callable[[], Parts]] = {
    "PNG": lambda: Parts(
        _png,
        [
            (b"iCCP", b"sRGB\0\0" + zlib.compress(PROFILE)),
            (b"tEXt", PNG_TEXT),
            (b"zTXt", b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 99)),
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
            (b"eXIf", EXIF),
            (b"pHYs", struct.pack(">LLB", 2835, 2835, 1)),
            (b"gAMA", struct.pack(">L", 45_455)),
            (b"cHRM", struct.pack(">8L", *range(8))),
            (b"sRGB", b"\0"),
            (b"tIME", struct.pack(">HBBBBB", 2024, 1, 1, 1, 1, 1)),
            (b"acTL", struct.pack(">LL", 2, 0)),
            (b"fcTL", struct.pack(">LLLLLHHBB", 0, 24, 16, 0, 0, 1, 10, 0, 0)),
            (b"caBX", b"jumb" * 9),
            (b"tEXt", PNG_TEXT),
            (b"eXIf", EXIF),
            (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  99\n" + EXIF.hex().encode())),
        ],
    ),
    "JPEG": lambda: Parts(
        _jpeg,
        [
            (0xE1, b"Exif\0\0" + EXIF),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
            (0xE2, b"ICC_PROFILE\0\1\1" + PROFILE),
            (0xE2, b"MPF\0" + exif(entry(0xB001, 4, 1, b"\2"), entry(0xB002, 7, 32, b"\x26"), after=bytes(32))),
            (0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\x10" + bytes(16)),
            (0xEC, b"Ducky\0\1\0\4\0\0\0\x50"),
            (0xEB, b"JP\0\1\0\0\0\1jumb"),
            (0xFE, b"a comment"),
        ],
    ),
    "WEBP": lambda: Parts(_webp, [(b"ICCP", PROFILE), (b"EXIF", EXIF), (b"XMP ", XMP), (b"C2PA", b"jumb" * 9)]),
    "TIFF": lambda: Parts(
        _tiff,
        [
            (270, struct.pack("<HL", 2, 40) + b"\x08\0\0\0" + b"a comment"),
            (282, struct.pack("<HLL", 5, 1, 8)),
            (283, struct.pack("<HLL", 5, 1, 16)),
            (296, struct.pack("<HLL", 3, 1, 3)),
            (306, struct.pack("<HLL", 2, 20, 8)),
            (330, struct.pack("<HLL", 4, 1, 8)),
            (700, struct.pack("<HLL", 1, 90, 8) + XMP),
            (34_377, struct.pack("<HLL", 1, 60, 8)),
            (34_665, struct.pack("<HLL", 4, 1, 8) + EXIF),
            (34_675, struct.pack("<HLL", 7, 300, 8) + PROFILE),
            (34_853, struct.pack("<HLL", 4, 1, 8)),
            (50_838, struct.pack("<HLL", 4, 9, 8)),
        ],
    ),
    "GIF": lambda: Parts(
        _gif, [(0xFE, b"a comment"), (0xFF, b"NETSCAPE2.0"), (0xFF, b"XMP DataXMP" + XMP), (1, bytes(12) + b"text")]
    ),
    "AVIF": lambda: Parts(_avif, [(EXIF, EXIF), (XMP, XMP), (PROFILE, PROFILE)]),
}  # fmt: skip
SPOILT = {  # what metadata may be called, so that a decoder looks for more in it than there is
    "PNG": [b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"pHYs", b"gAMA", b"fcTL", b"fdAT", b"acTL", b"sRGB", b"cICP", b"prVt"],
    "JPEG": [*range(0xE1, 0xEE), 0xEF, 0xFE],
    "WEBP": [b"ICCP", b"EXIF", b"XMP ", b"zzzz"],
    "GIF": [0x01, 0xF9, 0xFE, 0xFF, 0x42],
    "TIFF": [270, 282, 296, 330, 33_723, 34_377, 34_665, 34_853, 37_724, 50_341, 65_000],
}


def _changed(body: bytes, rng: random.Random) -> bytes:
    """Cut, overwritten, repeated, emptied or made long, mostly near its begin, where its numbers are."""
    content = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 6])):
        at = rng.randrange(min(len(content), rng.choice([8, 32, 4096]))) if content else 0
        size = rng.choice([1, 1, 2, 4, 12])
        match rng.randrange(6):
            case 0:
                del content[at:]
            case 1:
                content[at : at + size] = rng.randbytes(size)
            case 2:
                content[at : at + size] = rng.choice([b"\xff", b"\0", b"\x7f"]) * size
            case 3:
                content[at:at] = content[at : at + size * 8]
            case 4:
                content += bytes(rng.choice([1, 3, 1000]))
            case _ if content:
                content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def mutated(kind: str, rng: random.Random) -> bytes:
    """A picture of the format `kind` whose metadata has been changed at random, its pixels not."""
    parts = PICTURES[kind]()
    metadata = list(parts.metadata)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(metadata))
        name, body = metadata[at]
        what = rng.randrange(8)
        if what < 5 or kind == "AVIF":
            metadata[at] = (name, _changed(body, rng))
        elif what == 5:
            metadata[at] = (rng.choice(SPOILT[kind]), body)
        elif what == 6:
            metadata.insert(at, metadata[rng.randrange(len(metadata))])
        else:
            metadata[at] = (name, b"")
    return replace(parts, metadata=metadata, checksum=rng.choice([0, 0, 1])).data()
