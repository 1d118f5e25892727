"""What lies beside a picture's pixels can neither reject, exhaust nor change it; EXIF's orientation alone is read."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from pictures import (
    EXIF,
    PICTURE,
    PICTURES,
    PROFILE,
    XMP,
    chunk,
    encoded,
    entry,
    exif,
    gif_with,
    jpeg_with,
    mutated,
    png_with,
    riff,
    segment,
    tiff_with,
    turn,
    webp_with,
)
from PIL import Image

from dgs.data import containers
from dgs.data.containers import without_metadata
from dgs.data.images import UnreadableImage, decode, format_of

MUTATIONS = 2_000
REFUSED = 0.01  # of them, at most
Pixels = np.ndarray
PIXELS = np.asarray(PICTURE)
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def jpeg_pixels() -> Pixels:
    return decode(encoded("JPEG"))


# With EXIF, and the pixels without it.
WITH_EXIF: dict[str, tuple[Callable[[bytes], bytes], Callable[[], Pixels]]] = {
    "PNG": (lambda block: png_with(chunk(b"eXIf", block)), lambda: PIXELS),
    "PNG, behind the pixels": (lambda block: png_with(after=chunk(b"eXIf", block)), lambda: PIXELS),
    "PNG, bad checksum": (lambda block: png_with(chunk(b"eXIf", block, 1)), lambda: PIXELS),
    "PNG, as text": (
        lambda block: png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\n" + block.hex().encode())),
        lambda: PIXELS,
    ),
    "PNG, as compressed text": (
        lambda block: png_with(
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\n" + block.hex().encode()))
        ),
        lambda: PIXELS,
    ),
    "JPEG": (lambda block: jpeg_with(segment(0xE1, b"Exif\0\0" + block)), jpeg_pixels),
    "WEBP": (lambda block: webp_with((b"EXIF", block)), lambda: PIXELS),
    "WEBP, with a heading": (lambda block: webp_with((b"EXIF", b"Exif\0\0" + block)), lambda: PIXELS),
}


class TestOrientation:
    @pytest.mark.parametrize("where", WITH_EXIF)
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("orientation", UPRIGHT)
    def test_a_camera_held_askew_gives_an_upright_image(self, where: str, order: str, orientation: int) -> None:
        put, pixels = WITH_EXIF[where]
        assert np.array_equal(decode(put(exif(turn(orientation, order), order=order))), UPRIGHT[orientation](pixels()))

    @pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
    @pytest.mark.parametrize("orientation", UPRIGHT)
    def test_a_tiff_says_it_in_its_own_directory(self, compression: str | None, orientation: int) -> None:
        plain = decode(encoded("TIFF", compression=compression))
        turned = decode(tiff_with(turn(orientation), compression=compression))
        assert np.array_equal(turned, UPRIGHT[orientation](plain))

    @pytest.mark.parametrize("orientation", UPRIGHT)
    def test_an_avif_says_it_beside_exif(self, orientation: int) -> None:
        plain, turned = encoded("AVIF", quality=90), encoded("AVIF", quality=90, exif=exif(turn(orientation)))
        assert np.array_equal(decode(turned), UPRIGHT[orientation](decode(plain)))

    @pytest.mark.parametrize("where", WITH_EXIF)
    @pytest.mark.parametrize(
        "block",
        [
            b"garbage ",
            b"",
            b"II*\0",
            b"II*\0" + b"\xff" * 4,
            b"II+\0\x08\0\0\0" + b"\xff" * 8,  # of the kind for large files: an offset beyond any file
            exif(turn(6))[:12],
            exif(turn(0)),
            exif(turn(9)),
            exif(entry(0x112, 2, 2, b"6")),
            exif(entry(0x112, 99, 1, b"\6")),
            exif(entry(0x112, 3, 0, b"\6")),
            exif(entry(0x112, 3, 70_000, b"\6")),
        ],
        ids=lambda block: block[:24].hex(),
    )
    def test_what_cannot_be_read_turns_nothing(self, where: str, block: bytes) -> None:
        put, pixels = WITH_EXIF[where]
        assert np.array_equal(decode(put(block)), pixels())

    @pytest.mark.parametrize("where", WITH_EXIF)
    @pytest.mark.parametrize(
        "entries",
        [
            (entry(0x100, 2, 4, b"24\0\0"), turn(6)),  # a width as text, first
            (turn(6), entry(0x128, 4, 1, struct.pack("<L", 70_000))),  # of a type that cannot be written back
            (turn(6), entry(0x8769, 4, 1, b"\xff\xff\xff\xff")),  # a directory out of the file
            (entry(0x10F, 2, 2**32 - 1, b"\x08"), turn(6)),  # a text of 4 GB
            (entry(0x112, 99, 1, b"\3"), turn(6)),  # once unreadable, once not
            (entry(0x112, 4, 1, b"\6"),),
            *[(turn(6), entry(tag, kind, 9, b"\xf0")) for tag in (0x11A, 0x927C, 0x8825) for kind in range(14)],
        ],
        ids=lambda entries: b"".join(entries)[:24].hex(),
    )
    def test_entries_beside_it_do_not_matter(self, where: str, entries: tuple[bytes, ...]) -> None:
        put, pixels = WITH_EXIF[where]
        assert np.array_equal(decode(put(exif(*entries))), UPRIGHT[6](pixels()))

    def test_the_first_block_that_can_be_read_counts(self) -> None:
        blocks = [b"garbage ", exif(turn(6)), exif(turn(3))]
        assert np.array_equal(decode(png_with(*(chunk(b"eXIf", block) for block in blocks))), UPRIGHT[6](PIXELS))

    def test_so_does_one_that_says_nothing_or_that_the_picture_is_upright(self) -> None:
        for first in (exif(turn(1)), exif(entry(0x10F, 2, 4, b"abc"))):
            blocks = [segment(0xE1, b"Exif\0\0" + block) for block in (first, exif(turn(6)))]
            assert np.array_equal(decode(jpeg_with(*blocks)), jpeg_pixels())

    @pytest.mark.parametrize(("in_chunk", "in_text"), [(1, 6), (6, 1)])
    def test_a_chunk_of_a_png_comes_before_its_text(self, in_chunk: int, in_text: int) -> None:
        text = b"Raw profile type exif\0\nexif\n  9\n" + exif(turn(in_text)).hex().encode()
        pieces = [chunk(b"tEXt", text), chunk(b"eXIf", exif(turn(in_chunk)))]
        for order in (pieces, pieces[::-1]):
            assert np.array_equal(decode(png_with(*order)), UPRIGHT[in_chunk](PIXELS))

    def test_xmp_turns_nothing(self) -> None:
        says = XMP.replace(b'tiff:Software="a camera"', b'tiff:Orientation="6"')
        data = png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + says))
        assert np.array_equal(decode(data), PIXELS)


def bombs(size: int) -> bytes:
    """Compressed texts of a megabyte each, in chunks of a PNG, as many as go into `size` bytes."""
    one = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1_000_000)))
    return one * (size // len(one))


# Each has the pixels of `PICTURE`, exactly.
HARMLESS: dict[str, Callable[[], bytes]] = {
    "PNG: text": lambda: png_with(chunk(b"tEXt", b"prompt\0" + bytes(3_000_000))),
    "PNG: compressed text": lambda: png_with(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000)))),
    "PNG: compressed text behind the pixels": lambda: png_with(
        after=chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))
    ),
    "PNG: a gigabyte in compressed texts": lambda: png_with(bombs(1_100_000)),
    "PNG: profile": lambda: png_with(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000)))),
    "PNG: empty profile": lambda: png_with(chunk(b"iCCP", b"")),
    "PNG: profile compressed in another way": lambda: png_with(chunk(b"iCCP", b"p\0\7" + PROFILE)),
    "PNG: bad checksums": lambda: png_with(
        chunk(b"tEXt", b"k\0v", 1), chunk(b"pHYs", bytes(9), 1), after=chunk(b"tIME", b"", 1)
    ),
    "PNG: cut short": lambda: png_with(chunk(b"pHYs", b"\0"), chunk(b"gAMA", b""), chunk(b"sRGB", b"")),
    "PNG: a name that is none": lambda: png_with(chunk(b"t\xff x", b"k")),
    "PNG: an animation out of order": lambda: png_with(
        chunk(b"acTL", struct.pack(">LL", 9, 0)), after=chunk(b"fdAT", struct.pack(">L", 7) + b"x")
    ),
    "PNG: no end": lambda: png_with(chunk(b"tEXt", b"k\0v"))[:-12],
    "TIFF: resolution as text": lambda: tiff_with(
        entry(282, 2, 4, b"72\0"), entry(283, 2, 4, b"72\0"), entry(296, 3, 1, b"\3")
    ),
    "TIFF: XMP as numbers": lambda: tiff_with(entry(700, 3, 2, b"\1\0\2")),
    "TIFF: a directory out of the file": lambda: tiff_with(entry(0x8769, 4, 1, b"\xff\xff\xff\x7f")),
    "TIFF: more tag data than the file has": lambda: tiff_with(
        *(entry(tag, 7, 6_000, b"\x08") for tag in range(1, 250)), after=bytes(8_000)
    ),
    "TIFF: a directory that follows itself": lambda: tiff_with()[:-4] + struct.pack("<L", 8),
    "TIFF: tags without order": lambda: tiff_with(entry(65_000, 3, 1, b"\1"), entry(34_675, 7, 4, b"abcd")),
    "WEBP: a chunk cut short": lambda: webp_with((b"XMP ", XMP))[:-20],
    "WEBP: of no known kind": lambda: webp_with((b"\xff\0\1\2", XMP), (b"EXIF", b""), (b"ICCP", b"")),
    "WEBP: a size that is another": lambda: b"RIFF\xff\xff\xff\x7f" + webp_with((b"XMP ", XMP))[8:],
    "WEBP: no pad at the end": lambda: webp_with((b"XMP ", b"odd"))[:-1],
}  # fmt: skip
# Each has the pixels of `PICTURE` as JPEG.
HARMLESS_JPEG: dict[str, Callable[[], bytes]] = {
    "a heading cut short": lambda: jpeg_with(segment(0xE0, b"JFIF\0\1")),
    "the other heading cut short": lambda: jpeg_with(segment(0xEE, b"Adobe\0")),
    "profile cut short": lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0")),
    "half a profile": lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\2" + PROFILE)),
    "Photoshop's block cut short": lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\x008BIM\3\xed")),
    "several pictures that are not there": lambda: jpeg_with(
        segment(0xE2, b"MPF\0" + exif(entry(0xB001, 4, 1, b"\3"), entry(0xB002, 7, 16, b"\x26"), after=bytes(16)))
    ),
    "EXIF in 300 segments": lambda: jpeg_with(*[segment(0xE1, b"Exif\0\0" + EXIF + bytes(60_000))] * 300),
    "resolution that is none": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + exif(entry(0x11A, 5, 0, b"")))),
    "a segment without a length": lambda: jpeg_with(b"\xff\xfe\0\0"),
    "filling": lambda: jpeg_with(b"\xff" * 9 + segment(0xFE, b"x")[1:]),
}


class TestMetadata:
    @pytest.mark.parametrize("what", HARMLESS)
    def test_pixels_are_what_they_are_without_it(self, what: str) -> None:
        assert np.array_equal(decode(HARMLESS[what]()), PIXELS)

    @pytest.mark.parametrize("what", HARMLESS_JPEG)
    def test_so_are_those_of_a_jpeg(self, what: str) -> None:
        assert np.array_equal(decode(HARMLESS_JPEG[what]()), jpeg_pixels())

    @pytest.mark.parametrize("what", ["head", "palette"])
    def test_a_bad_checksum_of_what_decides_pixels_is_refused(self, what: str) -> None:
        data = bytearray(encoded("PNG", PICTURE.convert("P")))
        data[29 if what == "head" else data.index(b"PLTE") + 9] ^= 1
        with pytest.raises(UnreadableImage, match=r"^Cannot decode x: [^\n]+$"):
            decode(bytes(data), "x")

    def test_a_colour_space_is_no_metadata(self) -> None:
        rgb = encoded("JPEG", keep_rgb=True, quality=95)  # says so in a segment of its own
        assert np.abs(decode(rgb).astype(int) - PIXELS).max() < 40
        cmyk = PICTURE.convert("CMYK")
        assert np.abs(decode(encoded("JPEG", cmyk, quality=95)).astype(int) - PIXELS).mean() < 8

    def test_a_million_pieces_are_refused_in_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(containers, "MAX_PARTS", 50)
        assert np.array_equal(decode(png_with(chunk(b"tEXt", b"") * 40)), PIXELS)
        for data in (
            png_with(chunk(b"tEXt", b"") * 60),
            jpeg_with(segment(0xFE, b"") * 60),
            webp_with(*[(b"zzzz", b"")] * 60),
            gif_with(*[b"\x21\xfe" + b"\1x" * 9 + b"\0"] * 6),
        ):
            with pytest.raises(UnreadableImage, match="more than 50 parts"):
                decode(data, "x")

    def test_it_is_gone_before_memory_for_pixels_is_asked_for(self) -> None:
        seen: list[int] = []

        def content() -> bytes:
            return png_with(chunk(b"tEXt", bytes(30_000_000)))

        tracemalloc.start()
        try:
            decode(content(), "x", lambda _: seen.append(tracemalloc.get_traced_memory()[0]))
        finally:
            tracemalloc.stop()
        assert len(seen) == 1 and seen[0] < 3_000_000

    def test_no_format_is_mended(self) -> None:
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "GIF", "BMP"):
            data = encoded(kind)
            assert format_of(data) == kind
            for size in (0, 3, 9, 16, 30, 60, len(data) // 2):
                without_metadata(data[:size], kind)
                with pytest.raises(UnreadableImage):
                    decode(data[:size])


@pytest.mark.parametrize("kind", PICTURES)
def test_the_pictures_to_mutate_are_full_of_metadata(kind: str) -> None:
    data = PICTURES[kind]().data()
    assert len(data) > len(encoded(kind)) + 40
    plain = PIXELS if kind in ("PNG", "WEBP", "TIFF") else decode(data)
    assert np.array_equal(decode(data), plain)


def test_two_thousand_mutations_of_metadata_leave_the_pixels_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(21)
    expected = {kind: decode(PICTURES[kind]().data()) for kind in PICTURES}
    refused: list[str] = []
    tried: Counter[str] = Counter()
    while tried.total() < MUTATIONS:
        kind = rng.choice(list(PICTURES))
        data = mutated(kind, rng)
        tried[kind] += 1
        try:
            assert np.array_equal(decode(data, "x"), expected[kind]), (kind, data)
        except UnreadableImage as error:
            refused.append(str(error))
    with capsys.disabled():
        print(f"\n{tried.total()} mutations of metadata ({dict(tried)}): {len(refused)} refused")
    assert all("\n" not in reason for reason in refused)
    assert len(refused) <= REFUSED * MUTATIONS


@pytest.mark.parametrize("where", ["PNG", "JPEG", "WEBP"])
def test_mutations_behind_the_orientation_leave_the_picture_turned(where: str) -> None:
    rng = random.Random(6)
    put, pixels = WITH_EXIF[where]
    upright = UPRIGHT[6](pixels())
    block = exif(turn(6), *(EXIF[10 + 12 * i : 22 + 12 * i] for i in range(4)), after=EXIF[62:])
    for _ in range(100):
        content = bytearray(block)
        for _ in range(rng.choice([1, 2, 9])):
            at = rng.randrange(22, len(content))
            content[at : at + rng.choice([1, 2, 4])] = rng.randbytes(4)
        assert np.array_equal(decode(put(bytes(content))), upright)


class TestPixels:
    """Of what the container says, what decides pixels is kept: transparency, above all."""

    @pytest.mark.parametrize("checksum", [0, 1])
    def test_a_transparent_colour_lies_over_white(self, checksum: int) -> None:
        image = Image.new("RGB", (2, 1), (9, 9, 9))
        image.putpixel((0, 0), (10, 20, 30))
        data = png_with(chunk(b"tRNS", struct.pack(">3H", 10, 20, 30), checksum), image=image)
        assert decode(data).tolist() == [[[255, 255, 255], [9, 9, 9]]]

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_one_that_is_cut_short_is_none(self, mode: str) -> None:
        image = PICTURE.convert(mode)
        data = png_with(chunk(b"tRNS", b"\0"), image=image)
        assert np.array_equal(decode(data), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    def test_so_does_a_transparent_grey_of_any_depth(self, depth: int) -> None:
        black_and_grey = {1: b"\x40", 2: b"\x10", 4: b"\x01", 8: b"\0\1", 16: b"\0\0\x40\1"}[depth]
        key = 0x4001 if depth == 16 else 1
        head = struct.pack(">LLBBBBB", 2, 1, depth, 0, 0, 0, 0)
        body = chunk(b"tRNS", struct.pack(">H", key)) + chunk(b"IDAT", zlib.compress(b"\0" + black_and_grey))
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")
        assert decode(data)[0, :, 0].tolist() == [0, 255]

    def test_an_animation_is_its_first_frame(self) -> None:
        frames = {"save_all": True, "append_images": [Image.new("RGB", PICTURE.size)], "duration": 50}
        assert np.array_equal(decode(encoded("PNG", **frames)), PIXELS)
        assert np.array_equal(decode(encoded("WEBP", lossless=True, **frames)), PIXELS)

    def test_pages_are_the_first_of_them(self) -> None:
        assert np.array_equal(decode(encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (4, 4))])), PIXELS)

    @pytest.mark.parametrize("kind", ["VP8 ", "VP8L"])
    def test_a_webp_without_room_for_metadata_has_none(self, kind: str) -> None:
        data = encoded("WEBP", lossless=kind == "VP8L")
        trailing = riff((kind.encode(), data[20:]), (b"EXIF", exif(turn(6))))
        assert data[12:16] == kind.encode() and np.array_equal(decode(trailing), decode(data))
