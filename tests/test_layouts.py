"""Trees as people have them: `dgs manifest --check` and the pipeline say the same of each, and of how it was read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from settings import DataParams
from test_cli import one_sentence, run
from trees import grow, put

from dgs.data.captioning import image_files
from dgs.data.checks import Report, check
from dgs.data.layouts import SYSTEMS, label_meant, split_meant
from dgs.data.manifest import build_manifest, described, facts
from dgs.data.suites import AIGI_BENCH, PROGAN_CLASSES, unseen_by_accident
from dgs.data.tree import scan_tree
from dgs.errors import UserError
from dgs.params import DataParams as Data
from dgs.workspace import walk

PLAIN = ("train/a", "test/a")
PROGAN = ("car", "cat", "chair", "horse")
FORENSYNTHS = (
    "progan", "stylegan", "stylegan2", "biggan", "cyclegan", "stargan", "gaugan", "crn", "imle", "seeingdark", "san",
    "deepfake", "whichfaceisreal",
)  # fmt: skip


def plant(root: Path, places: tuple[str, ...], labels: tuple[str, ...] = ("0_real", "1_fake")) -> Path:
    """Three images in each label folder of these places; no two are alike."""
    for number, place in enumerate(Path(place) / label for place in places for label in labels):
        put(root / place, range(10_000 + 10 * number, 10_003 + 10 * number))
    return root


def params(root: Path) -> Data:
    return DataParams(layout="folders", root=str(root), rho=None, val_fraction=0.3)


def read(root: Path) -> pd.DataFrame:
    return build_manifest(root, params(root))


def groups(manifest: pd.DataFrame) -> set[str]:
    rows = manifest[manifest["label"] == 1]
    return set((rows["split"].replace("val", "train") + "/" + rows["generator"]).unique())


def both(root: Path) -> tuple[Report, pd.DataFrame | str]:
    """What the check says, and what the pipeline makes of the tree or why it refuses."""
    report = check(scan_tree(root))
    try:
        return report, read(root)
    except UserError as error:
        return report, str(error)


def link_photographs(root: Path) -> None:
    plant(root, ("train/a", "test/a"), ("fake", "real"))
    for seed, place in enumerate(("train/b", "test/c")):
        put(root / place / "fake", [seed])
        (root / place / "real").symlink_to(Path("../a/real"))


# What is read: the folders and their labels' names -> the generators by split, and words of the line that says how.
READ: dict[str, tuple[Callable[[Path], object], set[str], str]] = {
    "generators": (lambda root: plant(root, PLAIN), {"train/a", "test/a"}, ""),
    "class folders": (
        lambda root: plant(root, ("train/a/x", "train/a/y", "test/a")),
        {"train/a", "test/a"},
        "a (x, y)",
    ),
    "AIGIBench's training set": (
        lambda root: plant(root, (*(f"train/{name}" for name in (*PROGAN, "sdv1.4")), "test/progan", "test/sdxl")),
        {"train/progan", "train/sdv1.4", "test/progan", "test/sdxl"},
        "car, cat, chair, horse in",
    ),
    "another spelling in test": (
        lambda root: plant(root, (*(f"train/{name}" for name in PROGAN), "test/ProGAN")),
        {"train/ProGAN", "test/ProGAN"},
        "read as the generator ProGAN",
    ),
    "ForenSynths": (
        lambda root: plant(
            root, (*(f"train/{name}" for name in sorted(PROGAN_CLASSES)), "test/progan/car", "test/gaugan")
        ),
        {"train/progan", "test/progan", "test/gaugan"},
        "classes of ProGAN's training images",
    ),
    "all of ForenSynths": (
        lambda root: plant(root, (*(f"train/{name}" for name in PROGAN), *(f"test/{name}" for name in FORENSYNTHS))),
        {"train/progan", *(f"test/{name}" for name in FORENSYNTHS)},
        "classes of ProGAN's training images",
    ),
    "AIGIBench itself": (
        lambda root: (grow(root / "test", AIGI_BENCH), plant(root, tuple(f"train/{name}" for name in PROGAN))),
        {"train/ProGAN", *(f"test/AIGIBench/{generator.column}" for generator in AIGI_BENCH.generators)},
        "classes of ProGAN's training images",
    ),
    "a suite beside nothing": (
        lambda root: (grow(root / "AIGIBench/test", AIGI_BENCH), plant(root / "AIGIBench", ("train/progan",))),
        {"train/progan", *(f"test/AIGIBench/{generator.column}" for generator in AIGI_BENCH.generators)},
        "",
    ),
    "a suite in test": (
        lambda root: (grow(root / "test/AIGIBench", AIGI_BENCH), plant(root, ("train/progan",))),
        {"train/progan", *(f"test/AIGIBench/{generator.column}" for generator in AIGI_BENCH.generators)},
        "test/AIGIBench is read as AIGIBench.",
    ),
    "GenImage": (
        lambda root: plant(root, ("ADM/train", "ADM/val", "Midjourney/train", "Midjourney/val"), ("nature", "ai")),
        {"train/ADM", "test/ADM", "train/Midjourney", "test/Midjourney"},
        "nature is real, ai is fake, val is test",
    ),
    "GenImage as unpacked": (
        lambda root: plant(root, ("ADM/imagenet_ai_0508_adm/train", "ADM/imagenet_ai_0508_adm/val"), ("nature", "ai")),
        {"train/ADM", "test/ADM"},
        "generators: ADM.",
    ),
    "CIFAKE": (
        lambda root: plant(root, ("train", "test"), ("REAL", "FAKE")),
        {"train/generated", "test/generated"},
        "REAL is real, FAKE is fake; generators: generated.",
    ),
    "Kaggle": (
        lambda root: plant(root, ("Train", "Validation", "Test"), ("Real", "Fake")),
        {"train/generated", "test/generated"},
        "Real is real",
    ),
    "labels directly in splits": (
        lambda root: plant(root, ("train", "test")),
        {"train/generated", "test/generated"},
        "is real, 1_fake is fake, of the generator generated.",
    ),
    "labels directly in one split": (
        lambda root: (
            plant(root, ("train/generated", "train/a")),
            put(root / "test/REAL", [1]),
            put(root / "test/FAKE", [2]),
        ),
        {"train/generated", "train/a", "test/generated"},
        "is real, FAKE is fake, of the generator generated.",
    ),
    "photographs linked into two generators": (
        link_photographs,
        {"train/a", "train/b", "test/c", "test/a"},
        "real is real, fake is fake; generators: a, b, c.",
    ),
    "labels above splits": (
        lambda root: plant(root, ("real", "fake"), ("train", "test")),
        {"train/generated", "test/generated"},
        "real is real",
    ),
    "labels with splits in their names": (
        lambda root: plant(root, ("",), ("training_real", "training_fake", "test_real", "test_fake")),
        {"train/generated", "test/generated"},
        "test_real, training_real is real",
    ),
    "other labels below generators": (
        lambda root: plant(root, PLAIN, ("real_images", "ai-images")),
        {"train/a", "test/a"},
        "real_images is real, ai-images is fake; generators: a.",
    ),
}


@pytest.mark.parametrize("tree", READ)
def test_a_published_tree_is_read_alike_by_both_with_a_line_that_says_how(tmp_path: Path, tree: str) -> None:
    make, expected, said = READ[tree]
    root = tmp_path / "images"
    make(root)
    report, manifest = both(root)
    assert [finding.message for finding in report.findings] == []
    assert isinstance(manifest, pd.DataFrame) and groups(manifest) == expected
    assert any(said in note for note in report.notes), report.notes
    rows = described(manifest, facts(manifest, params(root)), root)
    assert said in rows and "CAUTION: No tested" not in rows
    images = [file for folder, files in walk(root, again=True) for file in files]
    assert len(manifest) == len(images) == sum(row["real"] + row["fake"] for row in report.rows)


def beside(place: str) -> Callable[[Path], object]:
    return lambda root: put(plant(root, PLAIN) / place, [1])


def thinned(root: Path) -> None:
    for path in (plant(root, PLAIN) / "train").rglob("*[12].png"):
        path.unlink()


# What is refused: by the check as a finding, by the pipeline with the same sentence, which names what to do.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "some classes": (
        lambda root: plant(root, ("train/cow", "train/dog", "test/a")),
        "cd {0}/train && mkdir NAME && mv cow dog NAME/",
    ),
    "a class beside a generator": (
        lambda root: plant(root, (*PLAIN, "train/bus")),
        "cd {0}/train && mkdir NAME && mv bus NAME/",
    ),
    "a collection": (
        lambda root: plant(root, ("train/progan", "test/web/progan", "test/web/sdxl")),
        "mv {0}/test/web/* {0}/test/ && rmdir {0}/test/web",
    ),
    "a collection with classes": (
        lambda root: plant(root, ("train/a", "test/web/a/cat", "test/web/b/cat")),
        "mv {0}/test/web/* {0}/test/",
    ),
    "published split names": (
        lambda root: plant(root, (*PLAIN, "progan_val/x")),
        "mv {0}/progan_val {0}/val",
    ),
    "a folder that is none": (lambda root: plant(root, (*PLAIN, "notes/x")), "Unknown split folder {0}/notes."),
    "no test": (lambda root: plant(root, ("train/a",)), "Expected images under {0}/test/<generator>"),
    "collections under other names": (
        lambda root: plant(
            root, tuple(f"{name}/{split}" for name in ("GAN/x", "DM/ADM", "DM/sd") for split in ("train", "test")),
            ("real", "fake"),
        ),
        "(ADM, sd), which would count as its classes. Move them up: mv {0}/DM/* {0}/ && rmdir {0}/DM",
    ),
    "GenImage in a folder of its own": (
        lambda root: plant(
            root, tuple(f"GenImage/{name}/{split}" for name in ("ADM/adm", "BigGAN/x") for split in ("train", "val")),
            ("nature", "ai"),
        ),
        "found GenImage alone, and in it ADM, BigGAN. Give {0}/GenImage as the folder",
    ),
    "generators below a label": (
        lambda root: plant(root, ("train", "test"), ("real/coco", "fake/ADM", "fake/newest")),
        "mkdir -p {0}/test/ADM && mv {0}/test/fake/ADM {0}/test/ADM/1_fake",
    ),
    "a collection that is a link": (
        lambda root: (
            plant(root, PLAIN), plant(root.parent / "web", ("progan",)), (root / "test/web").symlink_to("../../web"),
        ),
        "/web/* {0}/test/ && rm {0}/test/web",
    ),
    "two folders of the usual names": (
        lambda root: plant(root, ("",)),
        "mv {0}/0_real {0}/train/generated/0_real && mv {0}/1_fake {0}/train/generated/1_fake",
    ),
    "generators of the usual labels without splits": (
        lambda root: plant(root, ("x", "y")),
        "mv {0}/x/1_fake {0}/train/x/1_fake && mv {0}/y/0_real {0}/train/y/0_real",
    ),
    "photographs directly in a split": (
        lambda root: (put(root / "train/0_real", [1]), plant(root, PLAIN, ("1_fake",))),
        "mkdir -p {0}/train/real && mv {0}/train/0_real {0}/train/real",
    ),
    "images in no label folder": (
        lambda root: put(plant(root, PLAIN) / "test/newest", [1, 2]),
        "found 2 images in none of them. If all are of 1_fake: mv {0}/test/newest {0}/test/newest- && "
        "mkdir -p {0}/test/newest && mv {0}/test/newest- {0}/test/newest/1_fake",
    ),
    "photographs in no label folder": (
        lambda root: put(plant(root, PLAIN) / "test/real", [1, 2]),
        "mv {0}/test/real- {0}/test/real/0_real",
    ),
    "real beside generators": (
        lambda root: plant(root, ("train/a", "test/lsun"), ("1_fake", "adm", "real", "0_real")),
        "/real. Did you mean '0_real'?",
    ),
    "one label under another name": (
        lambda root: (plant(root, PLAIN, ("ai", "nature")), plant(root, ("test/b",), ("ai",))),
        "Expected real images of b in {0}/test/b, found none (3 fake).",
    ),
    "a link to a disk that is not there": (
        lambda root: (plant(root, PLAIN) / "train/b").symlink_to("/nowhere/sdxl"),
        "Expected a file or folder at {0}/train/b, found a link to /nowhere/sdxl",
    ),
    "such a link under other names": (
        lambda root: (plant(root, PLAIN, ("ai", "nature")) / "train/b").symlink_to("/nowhere/sdxl"),
        "Expected a file or folder at {0}/train/b, found a link to /nowhere/sdxl",
    ),
    "two folders": (
        lambda root: plant(root, ("",), ("real", "fake")),
        "mkdir -p {0}/train/generated {0}/test/generated && mv {0}/real {0}/train/generated/0_real",
    ),
    "generators without splits": (
        lambda root: plant(root, ("x", "y"), ("ai", "nature")),
        "mv {0}/x/nature {0}/train/x/0_real",
    ),
    "photographs alone": (
        lambda root: put(plant(root, ("train/a",)) / "test/real/0_real", [1]),
        "found none of 1_fake",
    ),
    "training images twice": (
        lambda root: grow(plant(root, ("train/progan", "AIGIBench/train/progan")) / "AIGIBench/test", AIGI_BENCH),
        "Move {0}/AIGIBench/train there, or out of data.root.",
    ),
    "a generator that a suite has not": (
        lambda root: (grow(root / "AIGIBench", AIGI_BENCH), plant(root, ("train/progan", "AIGIBench/newest"))),
        "found newest.",
    ),
    "an empty suite": (
        lambda root: (plant(root, PLAIN) / "AIGIBench").mkdir(),
        "Expected generators of AIGIBench (ProGAN, R3GAN ...) in {0}/AIGIBench, found no folder.",
    ),
    "a folder beside labels": (beside("train/a/2_other"), "found {0}/train/a/2_other"),
    "one label": (
        lambda root: shutil.rmtree(plant(root, PLAIN) / "test/a/1_fake"),
        "Expected images in {0}/test/a/1_fake",
    ),
    "too few to cut val from": (thinned, ""),
}  # fmt: skip


@pytest.mark.parametrize("tree", REFUSED)
def test_what_the_pipeline_refuses_is_a_finding_of_the_check(tmp_path: Path, tree: str) -> None:
    make, fact = REFUSED[tree]
    root = tmp_path / "images"
    make(root)
    report, refusal = both(root)
    assert isinstance(refusal, str) and "\n" not in refusal and fact.format(root) in refusal
    messages = [finding.message for finding in report.findings]
    assert messages and (not fact or refusal in messages), messages


def test_suites_alone_are_a_list_and_no_fault_but_what_training_needs_is_said(tmp_path: Path) -> None:
    report, refusal = both(grow(tmp_path / "AIGIBench", AIGI_BENCH).parent)
    assert report.findings == [] and any(str(refusal)[1:] in note for note in report.notes)


class TestBesideImages:
    @pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".Trash-1000", ".thumbnails"])
    @pytest.mark.parametrize("place", ["", "train", "train/a", "train/a/0_real"])
    def test_folders_of_systems_are_no_data_wherever_they_lie_and_counted(
        self, tmp_path: Path, name: str, place: str
    ) -> None:
        before = read(plant(tmp_path / "plain", PLAIN))
        root = plant(tmp_path / "images", PLAIN)
        put(root / place / name / "0.png", [7, 8])
        report, manifest = both(root)
        assert report.findings == [] and isinstance(manifest, pd.DataFrame)
        assert list(manifest["id"]) == list(before["id"])
        said = f"Folders of systems, and hidden ones, passed over: 1 {name}."
        assert said in report.notes and said in described(manifest, facts(manifest, params(root)), root)

    def test_they_are_counted_once_where_labels_have_other_names_too(self, tmp_path: Path) -> None:
        root = plant(tmp_path / "images", PLAIN, ("nature", "ai"))
        put(root / "train/a/ai/@eaDir/0.png", [7])
        assert "Folders of systems, and hidden ones, passed over: 1 @eaDir." in scan_tree(root).notes

    def test_their_names_are_compared_without_case(self) -> None:
        assert all(name == name.casefold() for name in SYSTEMS)

    @pytest.mark.parametrize("place", ["", "train", "train/a", "train/c", "test/c/x", "val"])
    def test_images_beside_label_folders_are_counted_and_named(self, tmp_path: Path, place: str) -> None:
        root = plant(tmp_path / "images", (*PLAIN, "train/c/x", "test/c/x"))
        put(root / place, [7, 8])
        report, manifest = both(root)
        (finding,) = report.findings
        assert (finding.count, len(finding.examples)) == (2, 2)
        assert finding.message.startswith(f"2 images lie beside the label folders, not read, first {root / place}")
        assert isinstance(manifest, pd.DataFrame)
        assert "2 images lie beside" in described(manifest, facts(manifest, params(root)), root)

    @pytest.mark.parametrize("place", ["train/a/1_fake/\udcc9\udcfa.png", "train/a/\udcc9/x.txt", ".hidden/\udcff"])
    def test_names_that_are_no_utf8_are_a_finding_and_a_refusal_escaped(self, tmp_path: Path, place: str) -> None:
        root = plant(tmp_path / "images", PLAIN)
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_bytes(next(root.rglob("*.png")).read_bytes() + b" ")
        with pytest.raises(UserError) as error:
            read(root)
        escaped = os.fsencode(place).decode(errors="backslashreplace")
        assert "UTF-8" in str(error.value) and "\\x" in str(error.value) and str(error.value).isascii()
        found = [finding for finding in check(scan_tree(root)).findings if finding.message == str(error.value)]
        assert len(found) == 1 and escaped.startswith(found[0].examples[0].split("/x.txt")[0])
        result = run("manifest", root, "--check")
        assert result.exit_code == 1 and "\\x" in result.stdout

    @pytest.mark.parametrize("labels", [("0_real", "1_fake"), ("nature", "ai")])
    def test_captions_are_made_of_the_images_that_are_read_alone(self, tmp_path: Path, labels: tuple[str, str]) -> None:
        root = plant(tmp_path / "images", PLAIN, labels)
        put(root / "train", [7])
        assert sorted(read(root)["file"]) == [path.relative_to(root).as_posix() for path in image_files(root)]

    @pytest.mark.parametrize("labels", [("0_real/coco", "1_fake/x"), ("real/coco", "fake/x")])
    def test_folders_below_label_folders_are_read_and_named(self, tmp_path: Path, labels: tuple[str, str]) -> None:
        report, manifest = both(plant(tmp_path / "images", PLAIN, labels))
        assert len(manifest) == 12 and groups(pd.DataFrame(manifest)) == {"train/a", "test/a"}
        (note,) = [note for note in report.notes if note.startswith("Folders below label folders, read as part of")]
        assert f"test/a/{Path(labels[0]).parent} (coco)" in note


def test_folders_around_the_splits_are_named_by_both(tmp_path: Path) -> None:
    root = plant(tmp_path / "images", ("my/data/train/a", "my/data/test/a"))
    with pytest.raises(UserError, match=f"These lie in {root}/my/data: give that folder") as refused:
        scan_tree(root)
    with pytest.raises(UserError) as error:
        read(root)
    assert str(error.value) == str(refused.value)


def test_images_without_any_folder_of_a_name_are_counted_by_both_with_a_command_that_begins(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    put(flat / "train", [1, 2])
    generators = plant(tmp_path / "bare", ("",), ("dalle2", "firefly"))
    for root, fact in (
        (flat, "2 images in none of these"),
        (generators, f"mkdir -p {generators}/test/dalle2 && mv {generators}/dalle2 {generators}/test/dalle2/1_fake"),
    ):
        with pytest.raises(UserError) as refused:
            scan_tree(root)
        with pytest.raises(UserError) as error:
            read(root)
        assert fact in str(error.value) and str(error.value) == str(refused.value)


def test_names_that_would_break_a_line_are_escaped_wherever_they_are_printed(tmp_path: Path) -> None:
    root = plant(tmp_path / "images", ("train/new\nline", "test/tab\tx", "test/esc\x1b[2J"))
    (root / "test/tab\tx/1_fake/00000.png").unlink(missing_ok=True)
    result = run("manifest", root, "--check")
    table = [line.split("\t") for line in result.stdout.splitlines() if line.startswith(("train", "test"))]
    assert [row[1] for row in table] == ["esc\\x1b[2J", "tab\\tx", "new\\nline"] and len({*map(len, table)}) == 1
    assert "new\\nline" in result.stderr + result.stdout and "\x1b[2J" not in result.stderr + result.stdout
    shutil.rmtree(root / "test/tab\tx/0_real")
    manifest = one_sentence(run("match", root / "gone\nfolder", tmp_path / "out"))
    assert "gone\\nfolder" in manifest


class TestUnseenByAccident:
    def test_unicode_forms_and_scripts_other_than_latin_are_told_apart(self) -> None:
        (note,) = unseen_by_accident({"Mu\u0308", "x"}, {"M\u00fc", "x"})
        assert note.startswith("'M\\xfc' counts as unseen, though 'Mu\\u0308' in train")
        assert unseen_by_accident({"\u901a\u4e49", "x"}, {"\u6587\u5fc3", "x"}) == []

    def test_a_tested_generator_under_another_name_than_in_training_is_a_caution(self) -> None:
        (note,) = unseen_by_accident({"sdv1.4", "x"}, {"stable_diffusion_v_1_4", "x"})
        assert note.startswith("stable_diffusion_v_1_4 counts as unseen, though sdv1.4 in train is the same generator")
        assert unseen_by_accident({"ProGAN", "x"}, {"progan", "x"})
        assert unseen_by_accident({"progan", "sd14"}, {"AIGIBench/ProGAN", "AIGCDetectBenchmark/SDv1.4"}) == []
        assert unseen_by_accident({"stylegan", "x"}, {"stylegan2", "x"}) == []

    def test_if_no_tested_generator_was_trained_on_both_say_so(self, tmp_path: Path) -> None:
        root = plant(tmp_path / "images", ("train/a", "test/b", "test/c"))
        report, manifest = both(root)
        assert isinstance(manifest, pd.DataFrame)
        (finding,) = report.findings
        assert finding.message.startswith("No tested generator was trained on: training has a, tested are b, c, and")
        assert f"CAUTION: {finding.message}" in described(manifest, facts(manifest, params(root)), root)


def test_a_generator_that_a_suite_lacks_but_would_count_in_its_means_is_a_caution(tmp_path: Path) -> None:
    root = grow(tmp_path / "images/test", AIGI_BENCH).parent
    report, manifest = both(plant(root, ("train/progan", "test/newest")))
    assert isinstance(manifest, pd.DataFrame)
    (finding,) = report.findings
    assert finding.message.startswith("newest count as generators of AIGIBench and enter its means")
    assert f"CAUTION: {finding.message}" in described(manifest, facts(manifest, params(root)), root)


class TestAll:
    def test_json_lists_all_broken_files_and_all_copies_and_the_text_how_many_more(self, tmp_path: Path) -> None:
        root = plant(tmp_path / "images", ("train/b", "test/b"))
        put(root / "train/b/1_fake", range(40))
        for path in list((root / "train/b/1_fake").iterdir())[:30]:
            path.write_bytes(b"no image")
        for number, path in enumerate(sorted((root / "test/b/0_real").iterdir()) * 4):
            shutil.copy(path, path.with_name(f"copy-{number}.png"))
        lines = [json.loads(line) for line in run("manifest", root, "--check", "--json").stdout.splitlines()]
        assert {line["kind"]: len(line["examples"]) for line in lines if "examples" in line and line["count"] > 2} == {
            "corrupt": 30, "duplicated": 12,
        }  # fmt: skip
        text = run("manifest", root, "--check").stdout
        assert "; and 27 more, which --json lists." in text and "; and 9 more, which --json lists." in text


@pytest.mark.parametrize(
    ("name", "label", "split"),
    [
        ("REAL", "0_real", ""), ("Fake_images", "1_fake", ""), ("AiArtData", "1_fake", ""), ("RealArt", "0_real", ""),
        ("nature", "0_real", ""), ("real_vs_fake", "", ""), ("images", "", ""), ("valid", "", "val"),
        ("realistic", "", ""), ("Training", "", "train"), ("aircraft", "", ""), ("training_real", "0_real", ""),
        ("ai dalle", "", ""),
    ],
)  # fmt: skip
def test_folders_names_mean_a_label_or_a_split_only_where_all_their_words_do(name: str, label: str, split: str) -> None:
    assert (label_meant(name), split_meant(name)) == (label, split)


def test_a_folder_of_no_form_is_one_sentence_with_the_renames_that_make_it_one(tmp_path: Path) -> None:
    put(tmp_path / "holiday/real", [1])
    assert "found holiday" in one_sentence(run("manifest", tmp_path))
    root = plant(tmp_path / "published", ("progan_train/car", "progan_val/car", "CNN_synth_testset/san"))
    said = one_sentence(run("manifest", root))
    assert f"mv {root}/CNN_synth_testset {root}/test && mv {root}/progan_train {root}/train && mv" in said
    with pytest.raises(UserError, match="To rename: mv "):
        read(root)
