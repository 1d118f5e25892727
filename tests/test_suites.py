"""The paper's test suites: their tables, how a folder is recognised as one, and what of it is found missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ImageTree
from trees import grow, put

from dgs.data.defects import Finding, find_missing
from dgs.data.suites import (
    AIGC_DETECT_BENCHMARK,
    AIGI_BENCH,
    SUITES,
    UNIVERSAL_FAKE_DETECT,
    Suite,
    suite_holding,
    suite_named,
)
from dgs.data.tree import Tree, count_suffixes, rows_of, scan_tree
from dgs.errors import UserError


def findings_of(root: Path) -> list[Finding]:
    return list(find_missing(scan_tree(root)))


def by_folder(tree: Tree) -> dict[str, Any]:
    return {group.generator: group for group in rows_of(tree.groups)}


def counted(group: Any) -> tuple[int, int]:
    return group.real, group.fake


class TestTable:
    @pytest.mark.parametrize(
        ("suite", "count"), [(UNIVERSAL_FAKE_DETECT, 8), (AIGC_DETECT_BENCHMARK, 17), (AIGI_BENCH, 25)]
    )
    def test_each_suite_has_the_papers_number_of_generators(self, suite: Suite, count: int) -> None:
        assert len({generator.column for generator in suite.generators}) == count == len(suite.generators)

    @pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
    def test_no_spelling_stands_for_two_generators_of_a_suite(self, suite: Suite) -> None:
        for generator in suite.generators:
            for name in (generator.folder, generator.column, *generator.also):
                assert [other for other in suite.generators if other.answers_to(name)] == [generator]

    @pytest.mark.parametrize(
        ("name", "column"),
        [
            ("stable_diffusion_v_1_4", "SDv1.4"),
            ("Stable-Diffusion-v1.4", "SDv1.4"),
            ("SDv1.5", "SDv1.5"),
            ("WhichFaceIsReal", "WFIR"),
            ("DALL-E 2", "DALLE2"),
            ("Style GAN_2", "StyleGAN2"),
            ("DALLE", None),
            ("StyleGAN3", None),
        ],
    )
    def test_case_and_hyphens_do_not_matter_but_letters_do(self, name: str, column: str | None) -> None:
        found = AIGC_DETECT_BENCHMARK.generator(name)
        assert (found.column if found else None) == column

    def test_a_suite_is_known_by_its_folders_name_or_by_half_of_its_generators_and_not_by_fewer(self) -> None:
        assert suite_named("aigi-bench") is AIGI_BENCH
        assert suite_named("AIGCDetectBenchMark") is AIGC_DETECT_BENCHMARK
        assert suite_named("diffusion_datasets") is UNIVERSAL_FAKE_DETECT
        assert suite_named("images") is None
        names = [generator.folder for generator in UNIVERSAL_FAKE_DETECT.generators]
        assert suite_holding(names[:4]) is UNIVERSAL_FAKE_DETECT
        assert suite_holding(names[:3]) is None
        assert suite_holding([*names[:3], "guided", "GUIDED"]) is suite_holding([*names[:3], "guided"])


class TestRecognised:
    def test_three_suites_in_one_folder_are_listed_with_the_papers_columns(self, tmp_path: Path) -> None:
        for suite in SUITES:
            grow(tmp_path / suite.name, suite)
        tree = scan_tree(tmp_path)
        assert (list(find_missing(tree)), tree.notes) == ([], [])
        assert tree.groups[["suite", "split", "column"]].to_records(index=False).tolist() == [
            (suite.name, "test", by_name.column)
            for suite in sorted(SUITES, key=lambda suite: suite.name)
            for by_name in sorted(suite.generators, key=lambda generator: generator.folder)
        ]
        assert len(tree.groups) == 8 + 17 + 25

    def test_images_of_all_classes_count_where_there_are_class_folders(self, tmp_path: Path) -> None:
        groups = by_folder(scan_tree(grow(tmp_path / "any", AIGC_DETECT_BENCHMARK, real=2, fake=1)))
        assert {name: counted(group) for name, group in groups.items() if counted(group) != (2, 1)} == dict.fromkeys(
            ("progan", "cyclegan", "stylegan", "stylegan2"), (4, 2)
        )

    @pytest.mark.parametrize("inner", ["", "test", "AIGIBench"])
    def test_a_suites_own_folder_and_its_test_folder_will_do(self, tmp_path: Path, inner: str) -> None:
        grow(tmp_path / "AIGIBench" / inner, AIGI_BENCH)
        for root in {tmp_path, tmp_path / "AIGIBench", tmp_path / "AIGIBench" / inner}:
            tree = scan_tree(root)
            assert set(tree.groups["place"]) == {"AIGIBench/test"}
            assert (len(tree.groups), list(find_missing(tree))) == (25, [])

    def test_its_training_split_may_have_other_generators(self, tmp_path: Path) -> None:
        grow(tmp_path / "AIGIBench" / "test", AIGI_BENCH)
        put(tmp_path / "AIGIBench/train/progan/0_real", [1, 2])
        put(tmp_path / "AIGIBench/train/progan/1_fake", [3, 4])
        assert findings_of(tmp_path) == []
        (train,) = [group for group in rows_of(scan_tree(tmp_path).groups) if group.split == "train"]
        assert (train.name, train.column, counted(train)) == ("AIGIBench/train/progan", "", (2, 2))

    def test_photographs_in_folders_of_their_own_serve_the_generators_without_any(self, tmp_path: Path) -> None:
        for generator in UNIVERSAL_FAKE_DETECT.generators:
            put(tmp_path / "UFD" / generator.folder / "1_fake", [1, 2])
        put(tmp_path / "UFD" / "laion" / "0_real", [3])
        put(tmp_path / "UFD" / "imagenet" / "0_real", [4])
        assert findings_of(tmp_path) == []
        groups = by_folder(scan_tree(tmp_path))
        assert counted(groups["laion"]) == counted(groups["imagenet"]) == (1, 0)
        assert groups["guided"].pool == "imagenet"
        assert {group.pool for name, group in groups.items() if name[:3] in ("dal", "gli", "ldm")} == {"laion"}

    def test_plain_folders_are_listed_as_the_manifest_reads_them(self, image_tree: ImageTree) -> None:
        tree = scan_tree(image_tree(real=2, fake=3, level="cat"))
        assert list(find_missing(tree)) == []
        assert list(tree.groups["name"]) == [
            *("test/alpha", "test/beta", "test/gamma", "train/alpha", "train/beta", "val/alpha", "val/beta")
        ]
        assert {(*counted(group), group.suite, group.column) for group in rows_of(tree.groups)} == {(2, 3, "", "")}

    def test_shared_photographs_of_a_split_are_a_group_of_their_own(self, image_tree: ImageTree) -> None:
        root = image_tree({"test": ("alpha",)}, real=0)
        put(root / "test/real/0_real", [1, 2])
        assert findings_of(root) == []
        groups = by_folder(scan_tree(root))
        assert (groups["alpha"].pool, counted(groups["alpha"]), counted(groups["real"])) == ("real", (0, 3), (2, 0))

    def test_other_files_are_counted_and_other_folders_named(self, tmp_path: Path) -> None:
        grow(tmp_path / "AIGIBench", AIGI_BENCH)
        (tmp_path / "AIGIBench/SDXL/1_fake/prompts.txt").write_text("a cat")
        (tmp_path / "AIGIBench/annotations").mkdir()
        (tmp_path / "AIGIBnch").mkdir()
        tree = scan_tree(tmp_path)
        assert list(find_missing(tree)) == []
        assert count_suffixes(tree.files.loc[~tree.files["is_image"], "path"]) == {".txt": 1}
        assert len(tree.notes) == 3
        assert "annotations" in tree.notes[0]
        assert "Did you mean 'AIGIBench'?" in tree.notes[1]

    @pytest.mark.parametrize("made", ["nothing", "no tree", "a pack"])
    def test_a_folder_of_no_known_layout_is_refused_in_one_sentence(self, tmp_path: Path, made: str) -> None:
        root = tmp_path / "images"
        if made != "nothing":
            put(root / "pictures", [1])
        if made == "a pack":
            (root / "minibench.json").write_text("{}")
        with pytest.raises(UserError) as error:
            scan_tree(root)
        assert "\n" not in str(error.value)
        wanted = {"nothing": "found none", "no tree": "found pictures", "a pack": "dgs minibench audit"}
        assert str(root) in str(error.value) and wanted[made] in str(error.value)


class TestMissing:
    def test_generators_that_are_not_there_are_counted_and_named(self, tmp_path: Path) -> None:
        suite = grow(tmp_path / "AIGCDetectBenchmark", AIGC_DETECT_BENCHMARK)
        (suite / "deepfake").rename(tmp_path / "elsewhere")
        (suite / "wukong").rename(suite / "wukonk")
        unknown, finding = findings_of(tmp_path)
        assert unknown.message.startswith(f"Expected generators of AIGCDetectBenchmark in {suite}, found wukonk.")
        assert (finding.kind, finding.where, finding.count) == ("missing", "AIGCDetectBenchmark/test", 2)
        assert "2 of 17 generators" in finding.message and "deepfake, wukong" in finding.message
        assert "Did you mean 'wukonk'?" in finding.message
        assert by_folder(scan_tree(tmp_path))["wukonk"].column == ""

    def test_a_named_suite_without_any_generator_misses_all(self, tmp_path: Path) -> None:
        (tmp_path / "AIGIBench").mkdir()
        (finding,) = findings_of(tmp_path)
        assert finding.count == 25

    @pytest.mark.parametrize("label", ["0_real", "1_fake"])
    def test_a_misnamed_label_folder_is_missing_and_the_name_meant_is_guessed(self, tmp_path: Path, label: str) -> None:
        suite = grow(tmp_path / "AIGIBench", AIGI_BENCH)
        (suite / "SDXL" / label).rename(suite / "SDXL" / label.replace("_", "-"))
        (finding,) = findings_of(tmp_path)
        assert (finding.kind, finding.where, finding.count) == ("missing", "AIGIBench/test/SDXL", 1)
        assert label in finding.message and f"Did you mean '{label}'?" in finding.message

    def test_an_empty_label_folder_is_missing_too(self, image_tree: ImageTree) -> None:
        root = image_tree({"train": ("alpha",), "test": ("alpha", "beta")})
        for path in (root / "test/beta/0_real").iterdir():
            path.unlink()
        (finding,) = findings_of(root)
        assert (finding.kind, finding.where) == ("missing", "test/beta")
        assert "found none (3 in 1_fake)" in finding.message

    def test_a_class_without_one_label_is_counted(self, tmp_path: Path) -> None:
        suite = grow(tmp_path / "AIGCDetectBenchmark", AIGC_DETECT_BENCHMARK, classes=("car", "cat", "dog"))
        (suite / "progan/cat/1_fake").rename(tmp_path / "gone")
        (finding,) = findings_of(tmp_path)
        assert "1 of 3 class folders" in finding.message and "no 1_fake, first cat" in finding.message

    def test_fakes_among_shared_photographs_are_suspicious(self, image_tree: ImageTree) -> None:
        root = image_tree({"test": ("alpha", "real")})
        (finding,) = findings_of(root)
        assert (finding.kind, finding.where, finding.count) == ("suspicious", "test/real", 3)

    def test_two_spellings_of_a_generator_are_suspicious(self, tmp_path: Path) -> None:
        suite = grow(tmp_path / "AIGIBench", AIGI_BENCH)
        put(suite / "DALLE3/0_real", [1])
        put(suite / "DALLE3/1_fake", [2])
        (finding,) = findings_of(tmp_path)
        assert finding.kind == "suspicious" and f"DALLE-3 and {suite / 'DALLE3'}: two spellings" in finding.message
