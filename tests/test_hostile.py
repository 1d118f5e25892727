"""`dgs score` as a process on whatever can lie in a folder: each file a row, never a traceback, a hang or 2 GB."""

from __future__ import annotations

import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import settings, write_checkpoint
from conftest import structured_image
from pictures import chunk, entry, exif, segment
from PIL import Image

from dgs.data.images import MAX_BYTES
from dgs.model.checkpoint import read_info

PYTHONS = re.compile(r'Traceback|File "|Warning|Exception|Error:')
GIGABYTE = 1_000_000_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ico", ".ppm", ".pgm", ".avif"}

# Scores what it is told to, and says at the end of stderr how much memory that took at most (Linux): all of it, and,
# looked at every 10 ms, what is not mapped files, of which the system keeps 100 MB more or less from run to run. Not by
# getrusage, which counts what the parent had.
CHILD = """
import sys, threading, time
from pathlib import Path
from dgs.cli import main
sys.argv = ["dgs", "score", *sys.argv[1:]]
def memory(of):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of)]
    return int(line.split()[1]) * 1024
own = [memory("RssAnon")]
def look():
    while True:
        own[0] = max(own[0], memory("RssAnon"))
        time.sleep(0.01)
threading.Thread(target=look, daemon=True).start()
try:
    main()
finally:
    print("peak", memory("VmHWM"), own[0], file=sys.stderr)
"""


@dataclass
class Outcome:
    code: int
    rows: dict[str, dict[str, Any]]  # by name
    stderr: str
    peak: int  # bytes
    own: int  # bytes, without mapped files


def score(*arguments: str | Path, timeout: int = 300) -> Outcome:
    """`dgs score --json` in a process of its own."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    *said, peak = run.stderr.rstrip().rsplit("peak", 1)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    by_name = {Path(row["path"]).name: row for row in rows}
    assert len(by_name) == len(rows)
    return Outcome(run.returncode, by_name, "".join(said), *map(int, peak.split()))


def assert_civil(outcome: Outcome) -> None:
    """Each row is a score or one line, without a traceback or a warning, in less than 2 GB."""
    for name, row in outcome.rows.items():
        if "error" in row:
            assert set(row) == {"path", "error"} and "\n" not in row["error"] and len(row["error"]) < 2000, name
        else:
            assert set(row) == {"path", "probability", "verdict"} and 0 <= row["probability"] <= 1, name
    for line in outcome.stderr.splitlines():  # libtiff too writes there, whatever Pillow tells it
        assert not PYTHONS.search(line), line
    assert outcome.peak < 2 * GIGABYTE
    assert outcome.code == int(any("error" in row for row in outcome.rows.values()))


@pytest.fixture(scope="module", params=["whole images", "patches"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    patches = {"enabled": request.param == "patches", "size": 8, "count": 16}
    params = settings(clip_folder, patches=patches, data={"layout": "folders", "rho": None, "fit": "resize"})
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "seed-0", clip_folder, params)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of_zeros(width: int, height: int, channels: int = 3, bits: int = 8) -> bytes:
    """A valid PNG of black pixels in a few hundred kilobytes, made without the memory that decoding it takes."""
    packer = zlib.compressobj(1)
    line = b"\0" * (1 + width * channels * bits // 8)
    packed = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    colour = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


PICTURE = structured_image(1, 64, 48)
FRAMES = {"save_all": True, "append_images": [structured_image(2, 64, 48)], "duration": 40}
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
GOOD: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": lambda: encoded(PICTURE.convert("CMYK"), "JPEG"),
    "gray16.png": lambda: encoded(Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64) * 21), "PNG"),
    "rgb16.png": lambda: png_of_zeros(64, 48, bits=16),
    "float.tif": lambda: encoded(PICTURE.convert("F"), "TIFF"),
    "one bit.tif": lambda: encoded(PICTURE.convert("1"), "TIFF", compression="group4"),
    "palette.png": lambda: encoded(PICTURE.convert("P"), "PNG", transparency=3),
    "alpha.png": lambda: encoded(PICTURE.convert("RGBA"), "PNG"),
    "alpha.webp": lambda: encoded(PICTURE.convert("RGBA"), "WEBP"),
    "animated.gif": lambda: encoded(PICTURE, "GIF", **FRAMES),
    "animated.png": lambda: encoded(PICTURE, "PNG", **FRAMES),
    "animated.webp": lambda: encoded(PICTURE, "WEBP", **FRAMES),
    "pages.tif": lambda: encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]),
    "rotated.jpg": lambda: encoded(PICTURE, "JPEG", exif=ROTATED),
    "progressive.jpg": lambda: encoded(PICTURE, "JPEG", progressive=True),
    "jpeg called.png": lambda: encoded(PICTURE, "JPEG"),
    "\u753b\u50cf \U0001f600.png": lambda: encoded(PICTURE, "PNG"),
    "two\nlines\t\x1b[31m.png": lambda: encoded(PICTURE, "PNG"),
    os.fsdecode(b"not utf-8 \xff\xe9.png"): lambda: encoded(PICTURE, "PNG"),
    "-o.png": lambda: encoded(PICTURE, "PNG"),
}
BAD: dict[str, Callable[[], bytes]] = {
    "zero.jpg": lambda: b"",
    "text.jpg": lambda: b"<html>404 not found</html>" * 40,
    "cut.png": lambda: encoded(PICTURE, "PNG")[:900],
    "cut.jpg": lambda: encoded(PICTURE, "JPEG")[:900],
    "20000 x 20000.png": lambda: png_of_zeros(20_000, 20_000),
    "20000 x 20000, header alone.png": lambda: png_of_zeros(20_000, 20_000)[:100],
    "script.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
}
SMALL = {"1 x 1.png": (1, 1), "1 x 1000000.png": (1, 1_000_000), "1000000 x 1.png": (1_000_000, 1)}


@pytest.mark.slow
def test_each_is_scored_or_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in (GOOD | BAD).items():
        (folder / name).write_bytes(content())
    for name, (width, height) in SMALL.items():
        (folder / name).write_bytes(png_of_zeros(width, height))
    os.mkfifo(folder / "pipe.png")
    (folder / "zero device.png").symlink_to("/dev/zero")
    (folder / "terminal.png").symlink_to("/dev/tty")
    (folder / "memory.png").symlink_to("/proc/self/mem")
    (folder / "endless.png").symlink_to("/proc/self/pagemap")
    (folder / "kernel log.png").symlink_to("/proc/kmsg")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "not mine.png").write_bytes(GOOD["alpha.png"]())
    (folder / "not mine.png").chmod(0)
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.png")
        outcome = score(folder, "--checkpoint", checkpoint, "--explain", tmp_path / "seen")
    assert_civil(outcome)
    scored = {name for name, row in outcome.rows.items() if "error" not in row}
    too_small = set(SMALL) if read_info(checkpoint)["preprocessing"]["patches"]["enabled"] else set()
    readable = set(GOOD) | set(SMALL) | ({"not mine.png"} if os.geteuid() == 0 else set())
    assert scored == readable - too_small
    others = {"pipe.png", "zero device.png", "terminal.png", "memory.png", "endless.png", "kernel log.png", "loop",
              "gone.png", "not mine.png", "socket.png"}  # fmt: skip
    assert set(outcome.rows) == set(GOOD) | set(BAD) | set(SMALL) | others
    index = [json.loads(line) for line in (tmp_path / "seen/views.jsonl").read_text().splitlines()]
    assert {Path(row["path"]).name for row in index} == scored


def plain(megapixels: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (10_000, megapixels * 100))


TEXT = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1_000_000), 9))
EXIF = segment(0xE1, b"Exif\0\0" + exif(entry(0x112, 3, 1, b"\1"), after=bytes(65_000)))
MOST = 199_000_000  # of a file: `images.MAX_BYTES`, nearly


def filled(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece * ((MOST - len(data)) // len(piece)) + data[at:]


def with_xmp(data: bytes) -> bytes:
    size = (MOST - len(data)) // 2 * 2
    return data[:4] + struct.pack("<L", len(data) + size) + data[8:] + b"XMP " + struct.pack("<L", size) + bytes(size)


def with_tags(data: bytes) -> bytes:
    """As many tags as a directory holds, each of 100 MB, in one another."""
    (at,) = struct.unpack_from("<L", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    own = data[at + 2 : at + 2 + 12 * count]
    tags = b"".join(entry(tag, 7, 100_000_000, b"\x08") for tag in range(1_000, 60_000))
    data += bytes(MOST - len(data) - len(tags) - 1_000)
    directory = struct.pack("<H", 59_000 + count) + own + tags + bytes(4)
    return data[:4] + struct.pack("<L", len(data)) + data[8:] + directory


LARGEST: dict[str, Callable[[], bytes]] = {
    "alpha.png": lambda: png_of_zeros(10_000, 8_000, channels=4),
    "rotated.jpg": lambda: encoded(plain(80), "JPEG", exif=ROTATED),
    "progressive.jpg": lambda: encoded(plain(64, "CMYK"), "JPEG", progressive=True, subsampling=0),
    "uncompressed.tif": lambda: encoded(plain(66), "TIFF"),
    "alpha.webp": lambda: encoded(plain(48, "RGBA"), "WEBP", method=0),
    "full.avif": lambda: encoded(plain(48), "AVIF", speed=10, subsampling="4:4:4"),
    "texts of 170 GB.png": lambda: filled(png_of_zeros(10_000, 8_000, channels=4), 33, TEXT),
    "EXIF.jpg": lambda: filled(encoded(plain(80), "JPEG", exif=ROTATED), 2, EXIF),
    "XMP.webp": lambda: with_xmp(encoded(plain(48, "RGBA"), "WEBP", method=0, exif=ROTATED)),
    "tags.tif": lambda: with_tags(encoded(plain(20), "TIFF")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST)
def test_two_of_the_largest_at_once_stay_below_two_gigabytes(name: str, tmp_path: Path, clip_folder: Path) -> None:
    params = settings(clip_folder, patches={"enabled": True, "size": 8, "count": 16})
    checkpoint = write_checkpoint(tmp_path / "seed-0", clip_folder, params)
    (tmp_path / name).write_bytes(LARGEST[name]())
    assert (tmp_path / name).stat().st_size < MAX_BYTES
    (tmp_path / "again").hardlink_to(tmp_path / name)
    outcome = score(tmp_path / name, tmp_path / "again", "--checkpoint", checkpoint)
    print(f"{name}: peak {outcome.peak / 1e6:.0f} MB, without mapped files {outcome.own / 1e6:.0f} MB")
    assert_civil(outcome)
    assert [set(row) for row in outcome.rows.values()] == [{"path", "probability", "verdict"}] * 2


@pytest.mark.slow
def test_images_that_end_early_are_not_kept_in_memory(tmp_path: Path, whole: Path) -> None:
    png = png_of_zeros(5_000, 5_000)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/00.png").write_bytes(png[: len(png) // 2])
    for number in range(1, 30):
        (tmp_path / f"images/{number:02}.png").hardlink_to(tmp_path / "images/00.png")
    outcome = score(tmp_path / "images", "--checkpoint", whole)
    assert_civil(outcome)
    assert len(outcome.rows) == 30 and all("truncated" in row["error"] for row in outcome.rows.values())


def shipped_images() -> Iterator[bytes]:
    """The images that the installed packages bring."""
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size < 60_000:
            yield path.read_bytes()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Cut, overwritten or repeated in one to eight places; headers are hit more often than the rest."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(len(content), rng.choice([64, 1024, len(content)]))) if content else 0
        size = rng.choice([1, 1, 2, 4, 32])
        match rng.randrange(6):
            case 0:
                del content[at:]
            case 1:
                content[at : at + size] = rng.randbytes(size)
            case 2:
                content[at : at + size] = rng.choice([b"\xff", b"\x00", b"\x7f"]) * size
            case 3:
                del content[at : at + size]
            case 4:
                content[at:at] = content[at : at + size * 8]
            case _ if content:
                content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.slow
def test_ten_thousand_mutations_of_shipped_images(tmp_path: Path, whole: Path) -> None:
    seed = int(os.environ.get("DGS_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    print(f"DGS_FUZZ_SEED={seed}")
    rng = random.Random(seed)
    sources = [*shipped_images(), *(make() for make in GOOD.values())]
    assert len(sources) > 50
    for number, data in enumerate(sources):
        folder = tmp_path / "images" / f"{number:03}"
        folder.mkdir(parents=True)
        (folder / f"{number:03}.whole").write_bytes(data)
        for variant in range(-(-10_000 // len(sources))):
            (folder / f"{number:03}-{variant:03}").write_bytes(mutated(data, rng))
    outcome = score(tmp_path / "images", "--checkpoint", whole)
    assert_civil(outcome)
    assert len(outcome.rows) == sum(path.is_file() for path in (tmp_path / "images").rglob("*")) >= 10_000
    refused = sum("error" in row for row in outcome.rows.values())
    assert 1_000 < refused < 9_500, "mutations should neither all be harmless nor all be fatal"
    assert sum("error" not in row for name, row in outcome.rows.items() if name.endswith("whole")) > 50


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, whole: Path) -> None:
    sources = [tmp_path / f"{number}.jpg" for number in range(8)]
    for number, source in enumerate(sources):
        source.write_bytes(encoded(structured_image(number, 40, 32), "JPEG"))
    for number in range(100_000):
        folder = tmp_path / "images" / f"{number // 1000:02}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{number:05}.jpg").hardlink_to(sources[number % len(sources)])
    few = score(tmp_path / "images/00", "--checkpoint", whole)
    many = score(tmp_path / "images", "--checkpoint", whole, timeout=900)
    assert_civil(many)
    assert (len(few.rows), len(many.rows), many.code) == (1_000, 100_000, 0)
    print(f"peak with 1,000 images {few.own / 1e6:.0f} MB, with 100,000 {many.own / 1e6:.0f} MB")
    assert many.own < few.own + 30_000_000
