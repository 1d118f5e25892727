"""A check of a tree of images: every planted defect is found and counted, and a clean tree is left in peace."""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ImageTree, structured_image
from pictures import PICTURE, chunk, encoded, jpeg_with, png_with, segment
from PIL import Image
from test_cli import one_sentence, run
from test_suites import grow

from dgs.data.checks import CHANCE, LIMIT, Report, check, file_properties, jpeg_quality, stump
from dgs.data.defects import Finding
from dgs.data.suites import AIGI_BENCH, SUITES, UNIVERSAL_FAKE_DETECT
from dgs.data.tree import scan_tree

ONE = {"train": ("alpha",), "test": ("alpha", "beta")}
Save = Callable[[Path, int], None]


def report_on(root: Path, jobs: int = 1) -> Report:
    return check(scan_tree(root), jobs)


def the_finding(root: Path) -> Finding:
    (finding,) = report_on(root).findings
    return finding


def copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))


def png(path: Path, seed: int, width: int = 16, height: int = 12) -> None:
    structured_image(seed, width, height).save(path.with_suffix(".png"))


def jpeg(path: Path, seed: int, quality: int = 90, width: int = 16, height: int = 12) -> None:
    structured_image(seed, width, height).save(path.with_suffix(".jpg"), quality=quality)


def fill(folder: Path, count: int, save: Save, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        save(folder / f"{seed}-{number}", seed + number)


def one_generator(root: Path, real: Save, fake: Save, count: int = 20) -> Path:
    fill(root / "test/alpha/0_real", count, real, 1000)
    fill(root / "test/alpha/1_fake", count, fake, 2000)
    return root


class TestClean:
    def test_a_clean_tree_of_folders_has_nothing_amiss(self, image_tree: ImageTree) -> None:
        report = report_on(image_tree(real=8, fake=8))
        assert (report.findings, len(report.notes)) == ([], 1)
        assert len(report.rows) == 7
        for row in report.rows:
            assert (row["corrupt"], row["copies"]) == (0, 0)
            assert row["rules"]["format"]["accuracy"] == row["rules"]["size"]["accuracy"] == 0.5
            assert "quality" in row["rules"]

    def test_clean_suites_have_nothing_amiss(self, tmp_path: Path) -> None:
        for suite in SUITES:
            grow(tmp_path / suite.name, suite)
        report = report_on(tmp_path)
        assert (report.findings, len(report.rows)) == ([], 50)

    def test_several_processes_find_the_same(self, image_tree: ImageTree, monkeypatch: pytest.MonkeyPatch) -> None:
        root = image_tree(ONE)
        next(root.glob("test/beta/0_real/*.png")).write_bytes(b"no image")
        alone = report_on(root)
        monkeypatch.setattr("dgs.data.checks.WORTH_A_POOL", 1)
        together = report_on(root, jobs=2)
        assert together == alone
        assert len(alone.findings) == 1


class TestCorrupt:
    def test_files_that_do_not_decode_are_counted_by_label_with_the_reason(self, image_tree: ImageTree) -> None:
        root = image_tree(ONE, real=8, fake=8)
        files = sorted((root / "test/beta/1_fake").iterdir())
        files[0].write_bytes(b"")
        files[1].write_bytes(files[1].read_bytes()[:-200])
        files[2].unlink()
        files[2].symlink_to("nowhere.png")
        files[3].write_bytes(b"")  # the same bytes as another broken file are no copy
        report = report_on(root)
        (finding,) = report.findings
        assert (finding.kind, finding.where, finding.count) == ("corrupt", "test/beta", 4)
        assert "4 of 8 files in 1_fake" in finding.message and "the file is empty" in finding.message
        assert [str(path) in example for path, example in zip(files, finding.examples, strict=False)] == [True] * 4
        assert [row["corrupt"] for row in report.rows] == [0, 4, 0]


def again(source: str, target: str, count: int = 1) -> Callable[[Path], object]:
    """Copies a folder's first images into another folder."""
    return lambda root: [
        copy(path, root / target / f"again-{path.name}") for path in sorted((root / source).iterdir())[:count]
    ]


COPIES: dict[str, tuple[Callable[[Path], object], tuple[str, int], str]] = {
    "across splits": (
        again("train/alpha/0_real", "test/beta/0_real", 2),
        ("duplicated", 2),
        "2 images are in both test and train, first ",
    ),
    "a fake of two generators": (
        again("test/alpha/1_fake", "test/beta/1_fake"),
        ("duplicated", 1),
        "1 image is fake in both test/alpha and test/beta, first ",
    ),
    "real and fake": (
        again("test/beta/0_real", "test/beta/1_fake", 2),
        ("suspicious", 2),
        "2 images are real in test/beta and fake in test/beta, first ",
    ),
}


class TestCopies:
    @pytest.fixture
    def root(self, image_tree: ImageTree) -> Path:
        return image_tree(ONE, real=8, fake=8)

    def test_within_a_group_every_surplus_file_counts(self, root: Path) -> None:
        first, second, *_ = sorted((root / "test/beta/1_fake").iterdir())
        copy(first, first.with_stem("x"))
        copy(first, first.with_stem("y"))
        copy(second, second.with_stem("z"))
        report = report_on(root)
        (finding,) = report.findings
        assert (finding.kind, finding.where, finding.count) == ("duplicated", "test/beta", 3)
        assert "3 files repeat another in 1_fake of test/beta" in finding.message
        assert str(first) in finding.message and len(finding.examples) == 3
        assert [row["copies"] for row in report.rows] == [0, 3, 0]

    @pytest.mark.parametrize("case", COPIES)
    def test_elsewhere_each_shared_content_counts_once(self, root: Path, case: str) -> None:
        do, found, message = COPIES[case]
        do(root)
        finding = the_finding(root)
        assert (finding.kind, finding.count) == found and finding.message.startswith(message)
        assert all("again-" in example for example in finding.examples)

    def test_across_suites_and_a_training_split_beside_them(self, tmp_path: Path, image_tree: ImageTree) -> None:
        root = image_tree({"train": ("progan",)}, name="root")
        for suite in (AIGI_BENCH, UNIVERSAL_FAKE_DETECT):
            grow(root / suite.name, suite)
        again("UniversalFakeDetect/dalle/1_fake", "AIGIBench/DALLE-3/1_fake")(root)
        again("train/progan/0_real", "AIGIBench/SDXL/0_real")(root)
        findings = report_on(root).findings
        assert {(finding.kind, finding.count) for finding in findings} == {("duplicated", 1)}
        assert sorted(finding.message.split(", first")[0] for finding in findings) == [
            "1 image is in both AIGIBench/test and UniversalFakeDetect/test",
            "1 image is in both AIGIBench/test and train",
        ]

    def test_the_same_photograph_for_two_generators_is_only_noted(self, root: Path) -> None:
        again("test/alpha/0_real", "test/beta/0_real")(root)
        report = report_on(root)
        assert report.findings == []
        note, _ = report.notes
        assert note.startswith("1 image is real in several generators of a split")


def mostly_png(path: Path, seed: int) -> None:
    (jpeg if seed % 4 == 0 else png)(path, seed)


TELL_TALES: dict[str, tuple[Save, Save, tuple[str, ...]]] = {
    "format": (  # 15 of 20 fakes are PNG: (1 + 15/20) / 2
        jpeg,
        mostly_png,
        ("real JPEG 100 %", "fake PNG 75 %, JPEG 25 %", "'fake if PNG'", "balanced accuracy of 0.88"),
    ),
    "size, by the most telling rule": (
        lambda path, seed: png(path, seed, 20 + seed % 5, 15),
        lambda path, seed: png(path, seed, 16, 16),
        ("median 22 x 15 px, 0 % square", "median 16 x 16 px, 100 % square", "'fake if square'", "1.00"),
    ),
    "quality": (
        jpeg,
        lambda path, seed: jpeg(path, seed, quality=75 + seed % 2),
        ("real median 90, 90 to 90", "fake median 75, 75 to 76", "1.00 among the JPEGs"),
    ),
}


class TestTellTales:
    @pytest.mark.parametrize("case", TELL_TALES)
    def test_a_difference_is_stated_with_the_rules_accuracy(self, tmp_path: Path, case: str) -> None:
        real, fake, facts = TELL_TALES[case]
        finding = the_finding(one_generator(tmp_path, real, fake))
        assert (finding.kind, finding.where, finding.count) == ("suspicious", "test/alpha", 40)
        assert not [fact for fact in facts if fact not in finding.message], finding.message

    def test_formats_are_read_from_the_content_and_names_that_lie_are_counted(self, tmp_path: Path) -> None:
        root = one_generator(tmp_path, png, png)
        files = sorted((root / "test/alpha/1_fake").iterdir())
        for path in files[:3]:
            path.rename(path.with_suffix(".jpg"))
        report = report_on(root)
        (finding,) = report.findings
        assert (finding.kind, finding.count) == ("suspicious", 3)
        assert "3 of 20 files in 1_fake of test/alpha have another format than their name says" in finding.message
        assert str(files[0].with_suffix(".jpg")) in finding.message
        assert report.rows[0]["rules"]["format"]["accuracy"] == 0.5

    def test_shared_photographs_are_what_a_generators_fakes_are_compared_with(self, tmp_path: Path) -> None:
        fill(tmp_path / "test/alpha/1_fake", 20, png, 1)
        fill(tmp_path / "test/beta/1_fake", 20, jpeg, 100)
        fill(tmp_path / "test/real/0_real", 20, jpeg, 200)
        report = report_on(tmp_path)
        assert [(finding.kind, finding.where) for finding in report.findings] == [("suspicious", "test/alpha")]
        assert {row["generator"]: len(row["rules"]) for row in report.rows} == {"alpha": 3, "beta": 4, "real": 0}

    def test_so_few_images_that_it_may_be_chance_are_not_flagged(self, tmp_path: Path) -> None:
        report = report_on(one_generator(tmp_path, jpeg, png, count=7))
        assert report.findings == []
        assert report.rows[0]["rules"]["format"]["accuracy"] == 1.0


class TestRules:
    @pytest.mark.parametrize(
        ("kind", "real", "fake", "words", "accuracy"),
        [
            # Right on 80 % of the real (JPEG) and 80 % of the fake (PNG, WEBP).
            ("kinds", {"J": 80, "P": 15, "W": 5}, {"J": 20, "P": 60, "W": 20}, "fake if P or W", 0.8),
            # Labels of unequal number weigh the same.
            ("kinds", {"J": 900, "P": 100}, {"J": 10, "P": 10}, "fake if P", (0.9 + 0.5) / 2),
            # 9 of 10 below 3, 9 of 10 from it on; and the same the other way round.
            ("threshold", {1: 6, 2: 3, 3: 1}, {2: 1, 3: 4, 4: 5}, "fake if 3", 0.9),
            ("threshold", {2: 1, 3: 4, 4: 5}, {1: 6, 2: 3, 3: 1}, "real if 3", 0.9),
            # The one value whose shares differ most; of equals one that says "fake if".
            ("value", {5: 2, 6: 8}, {5: 7, 7: 3}, "real if 6", 0.9),
            ("value", {5: 1, 6: 1}, {5: 1, 7: 1}, "fake if 7", 0.75),
            # Equal distributions leave a coin.
            ("kinds", {"J": 3, "P": 9}, {"J": 3, "P": 9}, "real if nothing", 0.5),
            ("value", {1: 3, 2: 9}, {1: 1, 2: 3}, "real if 1", 0.5),
            ("threshold", {1: 3, 2: 9}, {1: 1, 2: 3}, "real if 1", 0.5),
        ],
    )
    def test_the_best_rule_is_found_and_put_into_words(
        self, kind: Any, real: dict[Any, int], fake: dict[Any, int], words: str, accuracy: float
    ) -> None:
        rule = stump(Counter(real).elements(), Counter(fake).elements(), kind)
        assert (rule.words, rule.accuracy) == (words, pytest.approx(accuracy))

    def test_only_what_is_above_the_limit_and_beyond_chance_is_suspicious(self) -> None:
        def flagged(images: int, share: float) -> bool:
            telling = round(images * share)
            return stump(["JPEG"] * images, ["PNG"] * telling + ["JPEG"] * (images - telling), "kinds").suspicious

        assert (LIMIT, CHANCE) == (0.6, 1.95)
        assert [flagged(10_000, share) for share in (0.19, 0.21)] == [False, True]  # accuracy 0.595 and 0.605
        assert [flagged(50, share) for share in (0.38, 0.40)] == [False, True]  # 1.95 * sqrt(2 / 50) = 0.39
        assert [flagged(images, 1.0) for images in (7, 8)] == [False, True]


class TestFileProperties:
    @pytest.mark.parametrize("quality", [1, 30, 50, 75, 80, 90, 95, 100])
    def test_the_quality_a_jpeg_was_saved_with_is_read_back_and_else_the_nearest(
        self, tmp_path: Path, quality: int
    ) -> None:
        jpeg(tmp_path / "a", 1, quality)
        assert file_properties(tmp_path / "a.jpg").quality == quality
        with Image.open(tmp_path / "a.jpg") as image:
            table = image.quantization[0]  # type: ignore[attr-defined]
        assert jpeg_quality([value + (index == 0) for index, value in enumerate(table)]) == quality

    def test_the_size_is_that_in_the_file_and_only_jpegs_have_a_quality(self, tmp_path: Path) -> None:
        png(tmp_path / "a", 1, 21, 13)
        found = file_properties(tmp_path / "a.png")
        assert found[1:] == ("PNG", 21, 13, 0, False, "", (), "")

    @pytest.mark.parametrize(
        ("data", "metadata"),
        [
            (png_with(chunk(b"tEXt", b"prompt\0a red cube")), ("text",)),
            (png_with(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000)))), ("unreadable metadata",)),
            (png_with(chunk(b"tEXt", b"workflow\0" + bytes(20_000_000))), ("unreadable metadata",)),
            (png_with(chunk(b"eXIf", b"garbage ")), ("EXIF",)),
            (jpeg_with(segment(0xE0, b"JFIF\0\1")), ("unreadable metadata",)),
        ],
        ids=["text", "large text, compressed", "large text", "EXIF", "heading"],
    )
    def test_metadata_that_cannot_be_read_is_a_kind_of_it(
        self, tmp_path: Path, data: bytes, metadata: tuple[str, ...]
    ) -> None:
        (tmp_path / "a.png").write_bytes(data)
        found = file_properties(tmp_path / "a.png")
        assert (found.error, found.width, found.height, found.metadata) == ("", *PICTURE.size, metadata)

    @pytest.mark.parametrize(
        ("name", "kind", "wrong"),
        [("a.jfif", "JPEG", False), ("a.mpo", "JPEG", False), ("a.dib", "DIB", False), ("a.dib", "BMP", False),
         ("a.avif", "AVIF", False), ("a.png", "AVIF", True), ("a", "PNG", False), ("a.jpg_large", "PNG", False)],
    )  # fmt: skip
    def test_a_suffix_is_wrong_where_it_is_another_formats(
        self, tmp_path: Path, name: str, kind: str, wrong: bool
    ) -> None:
        (tmp_path / name).write_bytes(encoded(kind))
        assert file_properties(tmp_path / name).wrong_suffix is wrong


class TestCommand:
    def test_without_check_it_prints_counts_by_generator_with_the_papers_column(self, tmp_path: Path) -> None:
        grow(tmp_path / "AIGIBench", AIGI_BENCH, real=2, fake=1)
        result = run("manifest", tmp_path)
        assert result.exit_code == 0, result.output
        heading, *rows = (line.split("\t") for line in result.stdout.splitlines())
        assert heading == ["place", "generator", "column", "real", "fake"]
        assert ["AIGIBench/test", "Midjourney", "Midjourney-V6", "2", "1"] in rows and len(rows) == 25
        assert "75 images in 25 groups, nothing amiss. No image was decoded" in result.stderr

    def test_with_check_it_prints_what_is_amiss_and_exits_with_1(self, image_tree: ImageTree) -> None:
        root = image_tree(ONE)
        assert run("manifest", root, "--check").exit_code == 0
        path = next((root / "test/beta/1_fake").glob("*.jpg"))
        copy(path, path.with_stem("copy"))
        result = run("manifest", root, "--check")
        assert result.exit_code == 1
        heading, *rows, finding = result.stdout.splitlines()
        cells = dict(zip(heading.split("\t"), rows[1].split("\t"), strict=True))
        assert (cells["generator"], cells["copies"], cells["corrupt"], cells["column"]) == ("beta", "1", "0", "-")
        assert finding.startswith("duplicated: 1 file repeats another in 1_fake of test/beta, first ")
        assert "1 duplicated" in result.stderr

    def test_what_is_missing_needs_no_check(self, tmp_path: Path) -> None:
        shutil.rmtree(grow(tmp_path / "AIGIBench", AIGI_BENCH) / "SDXL")
        result = run("manifest", tmp_path)
        assert result.exit_code == 1
        assert result.stdout.splitlines()[-1].startswith("missing: 1 of 25 generators of AIGIBench")

    def test_as_json_every_line_is_an_object_of_a_kind(self, tmp_path: Path) -> None:
        root = one_generator(tmp_path / "images", jpeg, png)
        next((root / "test/alpha/0_real").iterdir()).write_bytes(b"?")
        for options in ([], ["--check"]):
            result = run("manifest", root, "--json", *options)
            lines = [json.loads(line) for line in result.stdout.splitlines()]
            assert (lines[0]["kind"], lines[0]["real"], lines[0]["fake"]) == ("images", 20, 20)
        assert result.exit_code == 1
        assert [line["kind"] for line in lines] == ["images", "corrupt", "suspicious"]
        assert lines[0]["rules"]["format"] == {"words": "fake if PNG", "accuracy": 1.0, "suspicious": True}
        assert (lines[1]["count"], len(lines[1]["examples"])) == (1, 1)

    @pytest.mark.parametrize("options", [[], ["--check"], ["--json"]])
    def test_a_wrong_folder_is_one_sentence(self, tmp_path: Path, options: list[str]) -> None:
        assert "found none" in one_sentence(run("manifest", tmp_path / "nowhere", *options))
        (tmp_path / "pictures").mkdir()
        assert "found pictures" in one_sentence(run("manifest", tmp_path, *options))
