"""A matched copy: what trivial rules read is gone, pixels are the reader's, and everything else is where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ImageTree, structured_image
from copies import snapshot
from numpy.typing import NDArray
from PIL import ExifTags, Image
from test_cli import one_sentence, run
from trees import grow_with_pools

from dgs.data import matching
from dgs.data.captions import assign_captions, read_captions
from dgs.data.checks import PROPERTIES, check, file_properties
from dgs.data.images import decode
from dgs.data.matching import Matched, common_size, crop, match, matched_captions, new_names
from dgs.data.tree import scan_tree

SIZE = 32


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "a camera"
    return exif


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def see_through(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


# How a picture may have been stored, by the suffix that it got; "image.jpg" is what everything else is told from.
STORED: dict[str, tuple[str, Callable[[Image.Image, Path], None]]] = {
    "JPEG": (".jpg", lambda image, path: image.save(path, quality=75)),
    "JPEG turned by EXIF": (".jpeg", lambda image, path: image.save(path, quality=95, exif=turned())),
    "JPEG, progressive, full colour, profile": (
        ".JPG",
        lambda image, path: image.save(path, quality=96, subsampling=0, progressive=True, icc_profile=b"a profile"),
    ),
    "JPEG, CMYK": (".jpg", lambda image, path: image.convert("CMYK").save(path, quality=90)),
    "JPEG, grey": (".jpg", lambda image, path: image.convert("L").save(path, quality=90)),
    "PNG": (".png", lambda image, path: image.save(path)),
    "PNG, palette": (".png", lambda image, path: image.quantize(64).save(path)),
    "PNG, 16 bits": (".png", lambda image, path: sixteen_bits(image).save(path)),
    "PNG, see-through": (".png", lambda image, path: see_through(image).save(path, dpi=(300, 300))),
    "WebP": (".webp", lambda image, path: image.save(path, quality=80, xmp=b"<x/>")),
    "TIFF": (".tif", lambda image, path: image.save(path)),
    "GIF, moving": (
        ".gif",
        lambda image, path: image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)]),
    ),
    "PNG called JPEG": (".jpg", lambda image, path: image.save(path, "PNG")),
}


def store(folder: Path, kind: str, seeds: range, size: tuple[int, int] = (41, 37)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    suffix, save = STORED[kind]
    for seed in seeds:
        save(structured_image(seed, *size), folder / f"{seed}{suffix}")


def told_apart(root: Path, real: str = "JPEG turned by EXIF", fake: str = "PNG", count: int = 8) -> Path:
    """A tree in which the way of storing says everything."""
    for split in ("train", "test"):
        seed = 100 if split == "train" else 500
        store(root / split / "alpha/0_real", real, range(seed, seed + count), (48, 40))
        store(root / split / "alpha/1_fake", fake, range(seed + 200, seed + 200 + count), (40, 40))
    return root


def matched(root: Path, target: Path, size: int | None = SIZE, **more: Any) -> Matched:
    return match(scan_tree(root), target, size, **more)


def grey(path: Path) -> NDArray[np.float64]:
    """An image as a detector reads it, without the colour of which a JPEG keeps half."""
    return decode(path.read_bytes()) @ np.array([0.299, 0.587, 0.114])


class TestRules:
    @pytest.mark.parametrize("fake", STORED)
    def test_after_it_every_trivial_rule_is_a_coin(self, tmp_path: Path, fake: str) -> None:
        told_apart(tmp_path / "in", "JPEG" if "JPEG" not in fake else "PNG", fake)
        found = matched(tmp_path / "in", tmp_path / "out")
        assert all(row["before"]["format"]["accuracy"] == 1.0 for row in found.rows) == (fake != "PNG called JPEG")
        assert all(row["before"]["size"]["accuracy"] == 1.0 for row in found.rows)
        for row in found.rows:
            assert set(row["after"]) == set(PROPERTIES)
            assert {rule["accuracy"] for rule in row["after"].values()} == {0.5}
        report = check(scan_tree(tmp_path / "out"))
        assert report.findings == []
        assert [row["rules"] for row in report.rows] == [row["after"] for row in found.rows]

    def test_metadata_and_coding_are_rules_too(self, tmp_path: Path) -> None:
        told_apart(tmp_path / "in", "JPEG turned by EXIF", "JPEG, progressive, full colour, profile")
        rules = check(scan_tree(tmp_path / "in")).rows[0]["rules"]
        assert rules["metadata"] == {"words": "fake if without EXIF", "accuracy": 1.0, "suspicious": True}
        told_apart(tmp_path / "coding", "JPEG", "JPEG, progressive, full colour, profile")
        for path in (tmp_path / "coding").rglob("0_real/*"):
            pixels = Image.open(path).copy()
            pixels.save(path, quality=96)
        rule = check(scan_tree(tmp_path / "coding")).rows[0]["rules"]["quality"]
        assert (rule["words"], rule["accuracy"]) == ("fake if coded 4:4:4 progressive", 1.0)

    def test_a_pool_of_photographs_is_compared_with_as_in_a_check(self, tmp_path: Path) -> None:
        root = grow_with_pools(tmp_path / "UniversalFakeDetect", real=9, fake=9)
        found = matched(root, tmp_path / "out/UniversalFakeDetect", 12)
        report = check(scan_tree(tmp_path / "out/UniversalFakeDetect"))
        assert [row["after"] for row in found.rows] == [row["rules"] for row in report.rows]
        assert sum(bool(row["after"]) for row in found.rows) == 8


class TestPixels:
    @pytest.mark.parametrize("kind", STORED)
    def test_a_copy_is_a_piece_of_what_a_detector_reads_and_nothing_is_resampled(
        self, tmp_path: Path, kind: str
    ) -> None:
        told_apart(tmp_path / "in", kind, kind, count=2)
        matched(tmp_path / "in", tmp_path / "out", quality=98)
        for source in sorted((tmp_path / "in").rglob("*.*")):
            whole = grey(source)
            copy = grey((tmp_path / "out" / source.relative_to(tmp_path / "in")).with_suffix(".jpg"))
            pieces = np.lib.stride_tricks.sliding_window_view(whole, copy.shape).reshape(-1, *copy.shape)
            away = np.sort(np.abs(pieces - copy).mean(axis=(1, 2)))
            assert away[0] < 1.5 and away[1] > 2 * away[0]

    @pytest.mark.parametrize("kind", STORED)
    def test_no_metadata_is_left_and_one_encoder_wrote_all(self, tmp_path: Path, kind: str) -> None:
        told_apart(tmp_path / "in", kind, kind, count=1)
        matched(tmp_path / "in", tmp_path / "out", quality=83)
        for path in (tmp_path / "out").rglob("*.jpg"):
            found = file_properties(path)
            assert found[1:] == ("JPEG", SIZE, SIZE, 83, False, "4:2:0", (), "")
            with Image.open(path) as image:
                assert {name for name in image.info if not name.startswith("jfif")} == set() and image.mode == "RGB"

    def test_the_place_is_the_hashs_alone_and_any_is_as_likely(self) -> None:
        image = np.arange(40 * 50 * 3).reshape(40, 50, 3).astype(np.uint16)  # every pixel is another
        hashes = [hashlib.sha256(bytes([number // 256, number % 256])).hexdigest() for number in range(2000)]
        corners = [divmod(int(crop(image, sha, 32)[0, 0, 0]) // 3, 50) for sha in hashes]
        assert corners == [divmod(int(crop(image, sha, 32)[0, 0, 0]) // 3, 50) for sha in hashes]
        tops, lefts = (np.bincount(values) for values in zip(*corners, strict=True))
        assert (len(tops), len(lefts)) == (9, 19)
        for counts in (tops, lefts):
            expected = 2000 / len(counts)
            assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared, 18 degrees: once in 2000
        assert crop(image, hashes[0], 32).shape == (32, 32, 3) and crop(image[:32, :32], hashes[0], 32)[0, 0, 0] == 0

    def test_bytes_are_equal_whatever_the_number_of_processes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = told_apart(tmp_path / "in")
        one = matched(root, tmp_path / "one")
        monkeypatch.setattr("dgs.data.checks.WORTH_A_POOL", 1)
        two = matched(root, tmp_path / "two", jobs=2)
        assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two") and one.rows == two.rows

    def test_an_image_has_one_copy_wherever_it_lies_and_whatever_it_is_called(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in", count=2)
        first = next((root / "test/alpha/1_fake").iterdir())
        shutil.copy(first, root / "train/alpha/1_fake/again.png")
        matched(root, tmp_path / "out")
        same = [tmp_path / "out/train/alpha/1_fake/again.jpg", tmp_path / f"out/test/alpha/1_fake/{first.stem}.jpg"]
        assert same[0].read_bytes() == same[1].read_bytes()


class TestSize:
    def readable(self, **sides: list[int]) -> pd.DataFrame:
        rows = [(0, label, side, side + 5) for label, of in sides.items() for side in of]
        return pd.DataFrame(rows, columns=["group", "label", "width", "height"])

    @pytest.mark.parametrize(
        ("real", "fake", "size"),
        [
            ([100, 90], [80, 300], 80),
            ([100] * 20 + [7], [90] * 5, 90),  # one of 21 may go
            ([100] * 19 + [7], [90] * 5, 7),  # one of 20 may not
            ([100] * 39 + [7, 8], [90] * 400, 90),  # two of 41
            ([100] * 38 + [7, 8], [90] * 400, 8),  # of 40, one
        ],
    )
    def test_by_default_it_is_the_largest_that_keeps_95_percent_of_each_label(
        self, real: list[int], fake: list[int], size: int
    ) -> None:
        assert common_size(self.readable(real=real, fake=fake)) == size

    def test_smaller_images_are_left_out_with_a_line_each(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in")
        store(root / "test/alpha/1_fake", "PNG", range(900, 902), (31, 64))
        found = matched(root, tmp_path / "out")
        paths = [str(root / f"test/alpha/1_fake/{seed}.png") for seed in (900, 901)]
        assert found.left_out == [{"path": path, "why": "31 x 64 px, smaller than 32"} for path in paths]
        assert found.unreadable == 0 and [row["left_out"] for row in found.rows] == [2, 0]
        assert found.summary["images"] == 32 == len(list((tmp_path / "out").rglob("*.jpg")))

    def test_a_generator_that_loses_a_label_is_a_caution(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in", fake="PNG")
        store(root / "test/beta/0_real", "JPEG", range(900, 902), (80, 80))
        store(root / "test/beta/1_fake", "PNG", range(910, 912), (20, 80))
        (caution,) = [note for note in matched(root, tmp_path / "out").notes if note.startswith("CAUTION")]
        assert "test/beta" in caution

    def test_what_matching_cannot_remove_is_said_with_the_shares(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in", count=3)
        store(root / "train/alpha/1_fake", "JPEG", range(900, 902))
        (said,) = [note for note in matched(root, tmp_path / "out").notes if "cannot remove" in note]
        assert "100.0 % of the real ones, 25.0 % of the fake ones" in said and "compressed twice" in said


class TestNames:
    def test_every_name_ends_in_jpg_and_none_is_taken_twice(self, tmp_path: Path) -> None:
        names = ["a.png", "a.jpg", "A.webp", "a-2.png", "b.jpg.png", "c.d.tif", "deep/a.png"]
        files = pd.DataFrame({"path": [tmp_path / name for name in names], "sha256": list("3125678")})
        found = [path.as_posix() for path in new_names(files, tmp_path)]
        assert found == ["a-4.jpg", "a.jpg", "A-3.jpg", "a-2.jpg", "b.jpg", "c.d.jpg", "deep/a.jpg"]

    def test_of_equal_names_the_hash_decides_and_not_the_format(self, tmp_path: Path) -> None:
        for first, second in (("12", "a.jpg"), ("21", "a-2.jpg")):
            files = pd.DataFrame({"path": [tmp_path / "a.jpg", tmp_path / "a.png"], "sha256": list(first)})
            assert new_names(files, tmp_path)[0].name == second


class TestCaptions:
    def test_they_follow_their_images_and_those_of_images_left_out_go(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in", count=2)
        store(root / "test/alpha/1_fake", "PNG", range(900, 901), (20, 64))
        files = sorted((root / "test/alpha/1_fake").iterdir())
        by_hash = hashlib.sha256(files[1].read_bytes()).hexdigest()
        rows = [
            {"path": "test/alpha/1_fake/700.png", "caption": "a wave"},
            {"sha256": by_hash, "caption": "another wave"},
            {"path": "test/alpha/1_fake/900.png", "caption": "too small"},
        ]
        (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = matched(root, tmp_path / "out")
        lines = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
        new = hashlib.sha256((tmp_path / "out/test/alpha/1_fake/701.jpg").read_bytes()).hexdigest()
        assert lines == [
            {"path": "test/alpha/1_fake/700.jpg", "caption": "a wave"},
            {"sha256": new, "caption": "another wave"},
        ]
        assert found.summary["captions"] == 2 and found.notes[-1].endswith(
            "34 images, 2 of 3 captions; 1 left out."
        ) is (found.summary["images"] == 34)
        copies = sorted((tmp_path / "out").rglob("*.jpg"))
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in copies]
        names = [path.relative_to(tmp_path / "out").as_posix() for path in copies]
        captions = assign_captions(
            pd.DataFrame({"file": names, "sha256": hashes}), read_captions(tmp_path / "out/captions.jsonl")
        )
        assert sorted(captions.dropna()) == ["a wave", "another wave"]

    def test_files_that_differ_and_pieces_that_do_not_keep_both_captions(self) -> None:
        copied = pd.DataFrame(
            {"old": ["a.png", "b.bmp"], "new": ["a.jpg", "b.jpg"], "sha256": ["1", "2"], "sha256_new": ["x", "x"]}
        )
        assert list(matched_captions({"1": "red", "2": "blue"}, copied)) == [
            {"path": "a.jpg", "caption": "red"},
            {"path": "b.jpg", "caption": "blue"},
        ]
        assert list(matched_captions({"1": "red", "2": "red"}, copied)) == [{"sha256": "x", "caption": "red"}] * 2

    def test_a_tree_without_them_gets_no_file(self, tmp_path: Path) -> None:
        matched(told_apart(tmp_path / "in", count=1), tmp_path / "out")
        assert not (tmp_path / "out/captions.jsonl").exists()


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no source": (shutil.rmtree, "../out", "found none"),
    "a full folder": (lambda root: (root / "../out/x").mkdir(parents=True), "../out", "new or an empty folder"),
    "a file": (lambda root: (root / "../out").write_text(""), "../out", "out to be a file"),
    "below a file": (lambda root: (root / "../out").write_text(""), "../out/copy", "out to be a file"),
    "inside": (lambda root: None, "copy", "to lie outside of"),
    "around": (lambda root: None, "..", "to lie outside of"),
    "itself": (lambda root: None, ".", "to lie outside of"),
    "inside, by a link": (lambda root: (root / "../way").symlink_to(root), "../way/copy", "to lie outside of"),
    "broken captions": (lambda root: (root / "captions.jsonl").write_text("?"), "../out", "line 1: not JSON"),
    "no layout": (lambda root: [shutil.rmtree(root / s) for s in ("train", "test")], "../out", "to hold train"),
}


class TestWhole:
    def test_the_tree_is_kept_and_other_files_are_not(self, tmp_path: Path, image_tree: ImageTree) -> None:
        root = image_tree(level="car")
        (root / "test/alpha/car/0_real/notes.txt").write_text("not an image")
        found = matched(root, tmp_path / "out")
        made = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
        images = {path.relative_to(root) for path in root.rglob("*") if path.suffix in (".jpg", ".png")}
        assert made == {path.with_suffix(".jpg") for path in images}
        assert any("1 .txt" in note for note in found.notes)

    def test_a_run_that_is_broken_off_leaves_nothing_and_the_next_one_does_it_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = told_apart(tmp_path / "in", count=2)
        left = iter(range(3))

        def broken(*args: Any) -> bytes:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return b""

        with monkeypatch.context() as patched:
            patched.setattr(matching, "encode", broken)
            with pytest.raises(KeyboardInterrupt):
                matched(root, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        assert matched(root, tmp_path / "out").summary["images"] == 8

    @pytest.mark.parametrize("case", REFUSED)
    def test_what_cannot_be_done_is_one_sentence_and_nothing_is_written(self, tmp_path: Path, case: str) -> None:
        spoil, target, sentence = REFUSED[case]
        root = told_apart(tmp_path / "in", count=1)
        spoil(root)
        before = snapshot(tmp_path)
        assert sentence in one_sentence(run("match", root, root / target))
        assert snapshot(tmp_path) == before

    def test_a_size_that_no_image_has_is_refused(self, tmp_path: Path) -> None:
        result = run("match", told_apart(tmp_path / "in", count=1), tmp_path / "out", "--size", "41")
        assert result.exit_code == 2 and result.stdout == "" and "at least 41 x 41 px" in result.stderr.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def test_an_empty_folder_is_as_good_as_a_new_one(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in", count=1)
        (tmp_path / "out").mkdir()
        assert matched(root, tmp_path / "out").summary["images"] == len(list((tmp_path / "out").rglob("*.jpg"))) == 4


class TestCommand:
    def test_it_prints_the_rules_before_and_after(self, tmp_path: Path) -> None:
        result = run("match", told_apart(tmp_path / "in"), tmp_path / "out")
        assert result.exit_code == 0, result.output
        heading, *rows = (line.split("\t") for line in result.stdout.splitlines())
        assert heading[5:] == [f"by {name}" for name in PROPERTIES]
        shown = ["1.00 -> 0.50", "1.00 -> 0.50", "- -> 0.50", "1.00 -> 0.50"]
        assert rows == [[split, "alpha", "8", "8", "0", *shown] for split in ("test", "train")]
        assert "Crops of 40 x 40 px (the largest that keeps 95 % of each label" in result.stderr
        assert "cannot remove" in result.stderr and "32 images; 0 left out." in result.stderr

    def test_an_unreadable_image_is_left_out_and_the_exit_code_is_1(self, tmp_path: Path) -> None:
        root = told_apart(tmp_path / "in", count=2)
        broken = next((root / "test/alpha/0_real").iterdir())
        broken.write_bytes(b"?")
        result = run("match", root, tmp_path / "out", "--size", "8", "--json")
        assert result.exit_code == 1
        *rows, left_out, copy = map(json.loads, result.stdout.splitlines())
        assert [row["kind"] for row in (*rows, left_out, copy)] == ["images", "images", "left_out", "copy"]
        assert left_out["path"] == str(broken) and "Cannot decode" in left_out["why"]
        expected = {"images": 7, "size": 8, "quality": 90, "captions": 0, "target": str(tmp_path / "out")}
        assert {name: copy[name] for name in expected} == expected

    def test_an_image_that_changes_meanwhile_is_left_out(self, tmp_path: Path) -> None:
        path = next((told_apart(tmp_path / "in", count=1)).rglob("*.png"))
        found = matching.copy_image(path, tmp_path / "copy.jpg", "0" * 64, 8, 90)
        assert "found other bytes" in found.error and not (tmp_path / "copy.jpg").exists()
