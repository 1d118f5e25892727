"""Any image file is decoded whole to (H, W, 3) uint8, or refused in one sentence."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import PICTURE, chunk, entry, exif, png_with, tiff_with, turn
from PIL import Image, ImageFile

from dgs.data import images
from dgs.data.images import UnreadableImage, decode, fit, is_image, is_image_name, read, to_rgb

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "DIB"]
SUFFIXES = ["jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "dib", "tif", "tiff", "gif", "avif", "avifs"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def refusal(data: bytes, name: str = "folder/a.jpg") -> str:
    with pytest.raises(UnreadableImage) as error:
        decode(data, name)
    message = str(error.value)
    assert name in message and "\n" not in message and "0x" not in message
    return message


class TestModes:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_every_format_gives_height_width_three(self, kind: str) -> None:
        decoded = decode(encode(Image.fromarray(noise(7, 12)), kind))
        assert (decoded.shape, decoded.dtype) == ((7, 12, 3), np.uint8)

    def test_lossless_colours_stay_as_they_are(self) -> None:
        pixels = noise(9, 5)
        assert np.array_equal(decode(encode(Image.fromarray(pixels))), pixels)

    @pytest.mark.parametrize("mode", ["1", "L"])
    def test_gray_is_repeated(self, mode: str) -> None:
        gray = Image.fromarray(noise(6, 8)[..., 0]).convert(mode)
        decoded = decode(encode(gray))
        assert np.array_equal(decoded, np.repeat(np.array(gray.convert("L"))[..., None], 3, axis=2))

    def test_cmyk_is_ink_on_white(self) -> None:
        inks = np.array([[[0, 0, 0, 0], [0, 255, 255, 0], [255, 0, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
        decoded = decode(encode(Image.fromarray(inks, "CMYK"), "TIFF"))
        assert decoded.tolist() == [[[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 0]]]

    def test_cmyk_jpeg_keeps_its_polarity(self) -> None:
        red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        assert np.abs(decode(encode(red, "JPEG", quality=95)).astype(int) - [255, 0, 0]).max() < 12

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_are_scaled_to_eight(self, kind: str) -> None:
        levels = np.arange(256).reshape(16, 16)
        decoded = decode(encode(Image.fromarray((levels * 257).astype(np.uint16)), kind))
        assert np.array_equal(decoded, np.repeat(levels[..., None], 3, axis=2))

    def test_a_dark_sixteen_bit_image_stays_dark(self) -> None:
        levels = np.full((4, 4), 200, dtype=np.uint16)  # 200 of 65535: black to the eye
        assert decode(encode(Image.fromarray(levels))).max() <= 1

    @pytest.mark.parametrize(("options", "second"), [({}, [10, 20, 30]), ({"transparency": 0}, [255, 255, 255])])
    def test_a_palette_is_looked_up_and_its_transparent_colour_is_white(
        self, options: dict[str, int], second: list[int]
    ) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putdata([1, 0])
        assert decode(encode(image, **options)).tolist() == [[[200, 100, 50], second]]

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    @pytest.mark.parametrize("alpha", [0, 51, 128, 255])
    def test_alpha_lies_over_white(self, mode: str, alpha: int) -> None:
        colour = (200, 100, 0)[: len(mode) - 1]
        decoded = decode(encode(Image.new(mode, (3, 2), (*colour, alpha))))
        expected = np.resize(colour, 3) * alpha / 255 + 255 * (1 - alpha / 255)
        assert np.abs(decoded - expected).max() <= 1

    @pytest.mark.parametrize(("mode", "premultiplied"), [("RGBA", (100, 50, 0)), ("LA", (100,))])
    def test_so_does_alpha_that_a_tiff_has_multiplied_already(self, mode: str, premultiplied: tuple[int, ...]) -> None:
        data = encode(Image.new(mode, (3, 2), (*premultiplied, 128)), "TIFF")
        unassociated = entry(338, 3, 1, b"\2")
        assert data.count(unassociated) == 1
        decoded = decode(data.replace(unassociated, entry(338, 3, 1, b"\1")))
        assert np.abs(decoded - (np.resize(premultiplied, 3) + 127)).max() <= 2

    def test_an_animation_is_its_first_frame(self) -> None:
        first, second = Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("RGB", (5, 4), (0, 0, 255))
        decoded = decode(encode(first, "GIF", save_all=True, append_images=[second], duration=50))
        assert np.array_equal(decoded, np.broadcast_to([255, 0, 0], (4, 5, 3)))

    @pytest.mark.parametrize(
        ("orientation", "upright"),
        [
            (1, lambda a: a),
            (2, np.fliplr),
            (3, lambda a: np.rot90(a, 2)),
            (4, np.flipud),
            (5, lambda a: a.transpose(1, 0, 2)),
            (6, lambda a: np.rot90(a, -1)),
            (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
            (8, lambda a: np.rot90(a, 1)),
        ],
    )
    def test_a_camera_held_askew_gives_an_upright_image(self, orientation: int, upright: Any) -> None:
        pixels = noise(4, 7)
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(decode(encode(Image.fromarray(pixels), exif=exif)), upright(pixels))

    @pytest.mark.parametrize("peak", [1.0, 255.0, 65_535.0])
    def test_floats_are_scaled_to_eight_bits_whatever_white_is(self, peak: float) -> None:
        levels = np.arange(256, dtype=np.float32).reshape(16, 16)
        decoded = decode(encode(Image.fromarray(levels / np.float32(255) * np.float32(peak)), "TIFF"))
        assert np.abs(decoded[..., 0].astype(int) - levels).max() <= (peak > 1)  # above 1 they are cut, not rounded

    def test_floats_beyond_white_are_white_and_what_is_no_number_black(self) -> None:
        values = np.array([[-0.2, 0.0, 0.5, 1.0, 1.3, np.nan, -np.inf]], dtype=np.float32)
        decoded = decode(encode(Image.fromarray(values), "TIFF"))
        assert decoded[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 0]

    @pytest.mark.filterwarnings("error")
    def test_a_number_that_signals_it_is_none_is_black_without_a_word(self) -> None:
        values = np.array([[0x7FA00000, 0x3F800000]], dtype=np.uint32).view(np.float32)  # a signalling NaN, and 1
        assert decode(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 255]

    @pytest.mark.parametrize("values", [[0, 70_000], [-4, 200]])
    def test_grey_of_32_bits_is_named(self, values: list[int]) -> None:
        message = refusal(encode(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF"), "folder/a.tif")
        assert f"found {values[0]} to {values[1]} (save the image with 16)" in message

    @pytest.mark.parametrize("kind", ["I;16", "F"])
    def test_white_may_be_zero(self, kind: str) -> None:
        levels = np.arange(256).reshape(16, 16)
        image = Image.fromarray((levels * 257).astype(np.uint16) if kind == "I;16" else levels.astype(np.float32))
        stream = io.BytesIO()
        image.save(stream, "TIFF")
        data = bytearray(stream.getvalue())
        at = data.index(b"\x06\x01\x03\0\1\0\0\0\1")  # the photometric interpretation: black is zero
        data[at + 8] = 0
        assert np.array_equal(decode(bytes(data))[..., 0], 255 - levels)

    def test_sixteen_bits_of_colour_are_scaled_too(self) -> None:
        head = struct.pack(">LLBBBBB", 2, 1, 16, 2, 0, 0, 0)
        pixels = b"\0" + struct.pack(">6H", 0, 257, 25_700, 65_535, 12_850, 1)
        data = b"".join([chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")])
        assert decode(b"\x89PNG\r\n\x1a\n" + data).tolist() == [[[0, 1, 100], [255, 50, 0]]]

    def test_a_pil_image_is_left_as_it_was(self) -> None:
        image = Image.fromarray(noise(4, 4, 4), "RGBA")
        before = image.tobytes()
        to_rgb(image)
        assert (image.mode, image.tobytes()) == ("RGBA", before)

    def test_a_pil_image_is_read_as_its_file(self) -> None:
        for data in (encode(Image.fromarray(noise(4, 7)), exif=exif(turn(6))), png_with(chunk(b"eXIf", b"garbage "))):
            with Image.open(io.BytesIO(data)) as image:
                assert np.array_equal(to_rgb(image), decode(data))


class TestRefusals:
    def test_a_kind_that_is_not_read_is_named(self) -> None:
        data = bytearray(encode(Image.fromarray(noise(4, 4)), "TIFF"))
        at = data.index(b"\x02\x01\x03\0\3\0\0\0")  # bits a sample, three numbers elsewhere
        data[at + 4] = 1
        data[at + 8 : at + 10] = b"\x20\0"
        message = refusal(bytes(data))
        assert "a variant of TIFF that is not read" in message and "8 or 16 bits" in message

    def test_no_number_of_a_decoder_is_passed_on(self) -> None:
        data = bytearray(encode(PICTURE, "TIFF", compression="jpeg"))
        (at,) = struct.unpack_from("<L", data, data.index(entry(273, 4, 1, b"")[:8]) + 8)
        data[at : at + 4] = b"none"
        message = refusal(bytes(data))
        assert "damaged, or a variant of TIFF that is not read" in message and "error" not in message

    def test_an_empty_file(self) -> None:
        message = refusal(b"")
        assert "empty" in message and "Remove or replace" in message

    def test_text_that_calls_itself_jpg(self) -> None:
        message = refusal(b"<html>404 not found</html>")
        assert "not an image" in message and "Remove or replace" in message

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_a_truncated_image(self, kind: str, share: float) -> None:
        data = encode(Image.fromarray(noise(64, 64)), kind)
        assert "Remove or replace" in refusal(data[: int(len(data) * share)])

    def test_a_bomb_is_refused_before_it_is_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "MAX_PIXELS", 100)
        data = encode(Image.fromarray(noise(10, 11)))
        assert "11 x 10" in refusal(data)
        assert "11 x 10" in refusal(data[:60])  # the header alone: no pixel was asked for
        assert decode(encode(Image.fromarray(noise(10, 10)))).shape == (10, 10, 3)

    def test_pixels_up_to_the_limit_are_not_pillows_business(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70)  # Pillow warns above this and raises at twice that
        assert decode(encode(Image.fromarray(noise(10, 10)))).shape == (10, 10, 3)

    @given(st.sampled_from(FORMATS), st.floats(0, 1), st.binary(max_size=12))
    @settings(max_examples=60, deadline=None)
    def test_hostile_bytes_are_an_image_or_a_sentence(self, kind: str, share: float, junk: bytes) -> None:
        data = encode(Image.fromarray(noise(12, 9)), kind)
        cut = int(len(data) * share)
        try:
            decoded = decode(data[:cut] + junk + data[cut + len(junk) :], "x")
        except UnreadableImage as error:
            assert "\n" not in str(error)
        else:
            assert decoded.ndim == 3 and decoded.shape[2] == 3 and decoded.dtype == np.uint8

    @pytest.mark.parametrize("name", ["gone.jpg", "."])
    def test_a_path_that_cannot_be_read(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UnreadableImage) as error:
            read(tmp_path / name)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def _half_transparent() -> Image.Image:
    return Image.merge("RGBA", [*PICTURE.split(), Image.new("L", PICTURE.size, 128)])


def _gray16() -> Image.Image:
    return Image.fromarray(noise(6, 8)[..., 0].astype(np.uint16) * 257)


RELEASE: dict[str, tuple[bytes, bool]] = {  # docs/release.md has these rows: a file, and whether pixels are the same
    "PNG": (encode(PICTURE), True),
    "JPEG": (encode(PICTURE, "JPEG"), True),
    "CMYK": (encode(PICTURE.convert("CMYK"), "JPEG"), True),
    "palette": (encode(PICTURE.convert("P")), True),
    "animation": (encode(PICTURE, "GIF", save_all=True, append_images=[Image.new("RGB", PICTURE.size)]), True),
    "orientation of a TIFF": (tiff_with(turn(6)), True),
    "alpha": (encode(_half_transparent()), False),
    "transparent colour": (encode(PICTURE, transparency=PICTURE.getpixel((0, 0))), False),
    "orientation": (encode(PICTURE, exif=exif(turn(6))), False),
    "gray of 16 bits": (encode(_gray16()), False),
    "floats": (encode(Image.fromarray(np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)), "TIFF"), False),
}


class TestBesideTheRelease:
    """It opens a file with Pillow, turns nothing, converts to RGB, and fills up what is cut short."""

    @pytest.mark.parametrize("what", RELEASE)
    def test_where_it_reads_other_pixels(self, what: str) -> None:
        data, is_same = RELEASE[what]
        with Image.open(io.BytesIO(data)) as image:
            theirs = np.asarray(image.convert("RGB"))
        assert np.array_equal(theirs, decode(data)) is is_same

    def test_what_is_cut_short_it_fills_with_gray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encode(Image.fromarray(noise(64, 64)), "JPEG")[:1_500]
        refusal(data)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with Image.open(io.BytesIO(data)) as image:
            assert set(np.asarray(image.convert("RGB"))[-16:].ravel()) == {128}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "a.JPEG", "v1.2.final.Png", "a.webp", "x y.TIFF"], True),
        (["a", "a.jpg.txt", "jpg", "notes.md", "a.mp4"], False),
    ],
)
def test_image_names_are_told_by_the_last_suffix(names: list[str], expected: bool) -> None:
    assert [is_image_name(Path(name)) for name in names] == [expected] * 5


class TestIsImage:
    """What of a folder is read: by the suffix, and by the first bytes of a file with another or none."""

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_suffix_of_a_format_is_enough_so_that_a_broken_file_is_named(self, tmp_path: Path, suffix: str) -> None:
        for name in (f"a.{suffix}", f"b.{suffix.upper()}"):
            (tmp_path / name).write_text("not found")
            assert is_image(tmp_path / name)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_a_file_without_a_suffix_is_known_by_its_content(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "9f86d081").write_bytes(encode(Image.fromarray(noise(5, 5)), kind))
        assert is_image(tmp_path / "9f86d081")
        assert decode(read(tmp_path / "9f86d081")).shape == (5, 5, 3)

    @pytest.mark.parametrize("name", ["a.jpg_large", "v1.2", "photo.jpg~", "a.txt", "a.mpo", "x.part"])
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
    def test_so_is_one_with_a_suffix_of_something_else(self, tmp_path: Path, name: str, kind: str) -> None:
        (tmp_path / name).write_bytes(encode(Image.fromarray(noise(5, 5)), kind))
        assert is_image(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.dng", "a.nef", "a.cr2", "a.txt"])
    @pytest.mark.parametrize("kind", ["TIFF", "BMP", "DIB"])
    def test_but_not_where_other_things_begin_in_the_same_way(self, tmp_path: Path, name: str, kind: str) -> None:
        (tmp_path / name).write_bytes(encode(Image.fromarray(noise(5, 5)), kind))
        assert not is_image(tmp_path / name)

    def test_other_things_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "empty").write_bytes(b"")
        (tmp_path / "notes.md").write_text("BMW\n")
        (tmp_path / "short").write_bytes(b"\xff\xd8")
        (tmp_path / "a.psd").write_bytes(b"8BPS\0\1" + bytes(30))
        (tmp_path / "film.mp4").write_bytes(bytes(4) + b"ftypisom" + bytes(30))
        (tmp_path / "a.heic").write_bytes(bytes(4) + b"ftypheic" + bytes(30))
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
        assert [path.name for path in tmp_path.iterdir() if is_image(path)] == []


class TestFit:
    @given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 48), st.sampled_from(["crop", "resize"]))
    @settings(max_examples=80, deadline=None)
    def test_the_result_is_a_square_of_the_asked_size(self, height: int, width: int, size: int, how: str) -> None:
        fitted = fit(noise(height, width), size, how)
        assert (fitted.shape, fitted.dtype) == ((size, size, 3), np.uint8)
        assert fitted.flags["C_CONTIGUOUS"]

    @given(st.integers(16, 60), st.integers(16, 60))
    @settings(deadline=None)
    def test_crop_keeps_the_pixels_of_the_centre(self, height: int, width: int) -> None:
        pixels = noise(height, width)
        fitted = fit(pixels, 16, "crop")
        top, left = (height - 16) // 2, (width - 16) // 2
        assert np.array_equal(fitted, pixels[top : top + 16, left : left + 16])

    def test_resize_scales_the_shorter_side_as_clip_does(self) -> None:
        pixels = noise(40, 60)
        scaled = np.array(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC))
        assert np.array_equal(fit(pixels, 16, "resize"), scaled[:, 4:20])

    def test_crop_enlarges_what_is_too_small_and_no_further(self) -> None:
        pixels = noise(8, 20)
        enlarged = np.array(Image.fromarray(pixels).resize((40, 16), Image.Resampling.BICUBIC))
        assert np.array_equal(fit(pixels, 16, "crop"), enlarged[:, 12:28])

    @pytest.mark.parametrize("how", ["crop", "resize"])
    def test_an_image_of_the_right_size_is_untouched(self, how: str) -> None:
        pixels = noise(16, 16)
        assert np.array_equal(fit(pixels, 16, how), pixels)
