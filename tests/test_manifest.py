"""The manifest of a folder of images: what is counted, how val is cut, and what is refused, in one sentence each."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SPLITS, ImageTree, structured_image
from settings import DataParams

from dgs.analysis.metrics import detection_table
from dgs.data.captioning import image_files
from dgs.data.images import UnreadableImage, decode
from dgs.data.manifest import (
    COLUMNS,
    MINIBENCH_SPLITS,
    PROMPTS,
    ImageSource,
    build_manifest,
    cautions,
    content_hash,
    counts,
    data_hash,
    duplicates_across_splits,
    examples,
    open_image,
    read_prompts,
)
from dgs.data.matching import match
from dgs.data.tree import MINIBENCH, ignored_files, scan_root, scan_tree
from dgs.errors import UserError

NO_VAL = {"train": ("alpha", "beta"), "test": ("alpha", "gamma")}


@pytest.fixture
def root(image_tree: ImageTree) -> Path:
    """Images of the default splits; to be read or damaged."""
    return image_tree()


def settings(root: Path, **values: Any) -> DataParams:
    return DataParams(layout="folders", root=str(root), rho=None, **values)


def manifest_of(root: Path, captions: Path | None = None, **values: Any) -> pd.DataFrame:
    return build_manifest(root, settings(root, **values), captions)


def refusal(root: Path, **values: Any) -> str:
    with pytest.raises(UserError) as error:
        manifest_of(root, **values)
    message = str(error.value)
    assert "\n" not in message
    return message


def says(message: str, *facts: object) -> None:
    missing = [str(fact) for fact in facts if str(fact) not in message]
    assert not missing, f"{message!r} does not say {missing}"


def caption_file(root: Path, *entries: dict[str, str]) -> Path:
    file = root.parent / "captions.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return file


class TestFolders:
    def test_one_row_an_image_with_what_the_folders_say(self, image_tree: ImageTree) -> None:
        root = image_tree(real=2, fake=3)
        manifest = manifest_of(root)
        assert list(manifest.columns) == list(COLUMNS)
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
        assert len(files) == 7 * 5
        assert sorted(manifest["file"]) == files
        for row in manifest.itertuples():
            split, generator, label, _ = str(row.file).split("/")
            assert (row.split, row.generator, row.label) == (split, generator, int(label[0]))
            assert row.sha256 == hashlib.sha256((root / str(row.file)).read_bytes()).hexdigest()
        assert manifest["id"].is_unique and (manifest["row"] == -1).all()
        pd.testing.assert_frame_equal(manifest, manifest.sort_values(["split", "id"], ignore_index=True))

    def test_counts_are_those_of_the_folders_and_a_generator_is_seen_if_it_is_trained_on(
        self, image_tree: ImageTree
    ) -> None:
        table = counts(manifest_of(image_tree(real=2, fake=4)))
        assert len(table) == 7
        assert (table["real"] == 2).all() and (table["fake"] == 4).all()
        assert set(zip(table["split"], table["generator"], table["seen"], strict=True)) == {
            *[(split, name, True) for split in ("train", "val", "test") for name in ("alpha", "beta")],
            ("test", "gamma", False),
        }

    def test_a_class_level_folder_is_part_of_its_generator(self, image_tree: ImageTree) -> None:
        root = image_tree(level="GoldenHorse")
        image_tree({"train": ("delta",)}, level="cat", seed=1)
        image_tree({"train": ("delta/dog",)}, seed=2)
        manifest = manifest_of(root)
        assert len(manifest) == 7 * 6 + 2 * 6
        delta = manifest[manifest["generator"] == "delta"]
        assert set(delta["caption"]) == {"a photo of cat", "a photo of dog"}
        assert set(manifest.loc[manifest["generator"] == "alpha", "caption"]) == {"a photo of golden horse"}

    def test_other_files_and_hidden_folders_are_not_images(self, root: Path) -> None:
        before = manifest_of(root)
        (root / "README.txt").write_text("notes")
        (root / "train" / "alpha" / "0_real" / "labels.csv").write_text("a,b")
        (root / ".cache").mkdir()
        (root / "train" / ".cache").mkdir()
        pd.testing.assert_frame_equal(manifest_of(root), before)
        inner = root / "train/alpha/1_fake/batch 2"  # but suffixes in capitals and folders below the label count
        inner.mkdir()
        structured_image(9001).save(inner / "UPPER.PNG")
        assert set(manifest_of(root)["file"]) - set(before["file"]) == {"train/alpha/1_fake/batch 2/UPPER.PNG"}

    def test_limit_keeps_the_first_by_content_of_every_cell(self, image_tree: ImageTree) -> None:
        root = image_tree(real=5, fake=4)
        whole, limited = manifest_of(root), manifest_of(root, limit=2)
        cells = ["split", "generator", "label"]
        assert (limited.groupby(cells).size() == 2).all()
        for cell, rows in whole.groupby(cells):
            kept = limited[(limited[cells] == list(cell)).all(axis=1)]
            assert set(kept["sha256"]) == set(sorted(rows["sha256"])[:2])
        renamed(root)
        assert set(manifest_of(root, limit=2)["sha256"]) == set(limited["sha256"])

    def test_the_images_of_a_row_can_be_opened(self, root: Path) -> None:
        manifest = manifest_of(root)
        source = ImageSource(root)
        row = manifest.iloc[5]
        assert np.array_equal(
            open_image(source, row["file"], row["row"]), decode((root / row["file"]).read_bytes(), "x")
        )
        with pytest.raises(UnreadableImage, match=r"gone\.png"):
            source.read("train/gone.png", -1)

    def test_examples_of_the_test_split_say_what_they_are(self, root: Path) -> None:
        pictures = examples(manifest_of(root), ImageSource(root), per_row=2)
        names = "alpha, real|beta, real|gamma, real|alpha, seen|beta, seen|gamma, unseen"
        assert list(pictures) == names.split("|")
        assert all(len(images) == 2 and images[0].shape == (36, 40, 3) for images in pictures.values())

    def test_copies_in_several_splits_are_counted_by_content(self, root: Path) -> None:
        assert duplicates_across_splits(manifest_of(root)) == 0
        first, second, third = sorted((root / "train" / "alpha" / "0_real").iterdir())
        shutil.copy(third, root / "val" / "beta" / "0_real" / f"copy{third.suffix}")
        shutil.copy(first, root / "test" / "gamma" / "0_real" / f"copy{first.suffix}")
        shutil.copy(first, root / "val" / "alpha" / "0_real" / f"copy{first.suffix}")
        shutil.copy(second, root / "train" / "beta" / "0_real" / f"copy{second.suffix}")  # within one split: fine
        assert duplicates_across_splits(manifest_of(root)) == 2


class TestValidationSplit:
    def test_it_is_the_share_of_train_with_the_lowest_hashes(self, image_tree: ImageTree) -> None:
        manifest = manifest_of(image_tree(NO_VAL, real=12, fake=12), val_fraction=0.4)
        trained = manifest[manifest["split"] != "test"]
        assert len(trained) == 48
        for sha, split in zip(trained["sha256"], trained["split"], strict=True):
            assert split == ("val" if int(sha, 16) / 16**64 < 0.4 else "train")
        assert 5 < (trained["split"] == "val").sum() < 35
        in_test = manifest[manifest["file"].str.startswith("test/")]
        assert len(in_test) == 48 and (in_test["split"] == "test").all(), "the test split is never cut"

    def test_a_val_folder_of_the_users_own_is_taken_as_it_is(self, image_tree: ImageTree) -> None:
        manifest = manifest_of(image_tree(), val_fraction=0.9)
        assert (manifest["split"] == manifest["file"].str.split("/").str[0]).all()

    def test_copies_stay_together(self, image_tree: ImageTree) -> None:
        root = image_tree(NO_VAL, real=10, fake=10)
        for path in sorted((root / "train" / "alpha" / "1_fake").iterdir()):
            shutil.copy(path, root / "train" / "beta" / "1_fake" / f"copy of {path.name}")
        manifest = manifest_of(root, val_fraction=0.5)
        assert duplicates_across_splits(manifest) == 0
        copies = manifest[manifest["file"].str.contains("copy of")]
        assert set(copies["split"]) == {"train", "val"}

    def test_added_files_move_no_other_image(self, image_tree: ImageTree) -> None:
        root = image_tree(NO_VAL, real=10, fake=10)
        before = manifest_of(root, val_fraction=0.5).set_index("file")["split"]
        image_tree({"train": ("added",)}, real=7, fake=7, seed=1)
        for index in range(5):
            structured_image(7000 + index).save(root / "train" / "alpha" / "0_real" / f"0000{index}.png")
        after = manifest_of(root, val_fraction=0.5).set_index("file")["split"]
        assert len(after) == len(before) + 19
        assert after.loc[before.index].equals(before)

    @pytest.mark.parametrize("seed", range(3))
    def test_few_images_still_give_every_generator_and_label_one(self, image_tree: ImageTree, seed: int) -> None:
        manifest = manifest_of(image_tree(NO_VAL, real=4, fake=4, seed=seed), val_fraction=0.02)
        cells = manifest.groupby(["split", "generator", "label"]).size()
        assert all(cells["val", generator, label] >= 1 for generator in ("alpha", "beta") for label in (0, 1))
        assert all(cells["train", generator, label] >= 2 for generator in ("alpha", "beta") for label in (0, 1))

    @pytest.mark.parametrize("seed", range(2))
    def test_a_generator_with_one_fake_keeps_it_in_train_and_stays_seen(self, image_tree: ImageTree, seed: int) -> None:
        root = image_tree({"train": ("many",), "test": ("many",)}, real=12, fake=12, seed=seed)
        image_tree({"train": ("few",)}, real=1, fake=1, seed=seed + 50)
        manifest = manifest_of(root, val_fraction=0.9)
        few = manifest[manifest["generator"] == "few"]
        assert set(few["split"]) == {"train"} and few["seen"].all()
        assert (manifest[manifest["generator"] == "many"].groupby(["split", "label"]).size() >= 1).all()

    @pytest.mark.parametrize(("fraction", "split"), [(0.0, "val"), (1.0, "train")])
    def test_a_cut_that_leaves_nothing_is_an_error(self, image_tree: ImageTree, fraction: float, split: str) -> None:
        message = refusal(image_tree(NO_VAL), val_fraction=fraction)
        says(message, f"data.val_fraction = {fraction}", f"/{split}, found none of", "give a val folder")


class TestPhotographsForAllGenerators:
    """A folder named `real` in place of a generator's: its 0_real is what all fakes of the split are compared with."""

    @staticmethod
    def shared(root: Path) -> Path:
        (root / "test" / "real" / "0_real").mkdir(parents=True)
        for generator in ("alpha", "beta", "gamma"):
            own = root / "test" / generator / "0_real"
            for index, path in enumerate(sorted(own.iterdir())):
                path.rename(root / "test" / "real" / "0_real" / f"{generator}-{index}{path.suffix}")
            own.rmdir()
        return root

    def test_other_generators_then_need_none_of_their_own(self, image_tree: ImageTree) -> None:
        manifest = manifest_of(self.shared(image_tree()))
        test = manifest[manifest["split"] == "test"]
        assert set(test.loc[test["label"] == 0, "generator"]) == {"real"} and not test["seen"][test["label"] == 0].any()
        assert set(test.loc[test["label"] == 1, "generator"]) == {"alpha", "beta", "gamma"}
        scores = pd.DataFrame(test[["id", "split", "generator", "label"]]).assign(
            condition="native", applied_to="both", logit=test["label"] * 2.0 - 1.0, method="probe", seed=0, rho=np.nan
        )
        val = scores.assign(split="val")
        table = detection_table(pd.concat([scores, val]), {"alpha", "beta"})
        assert set(table["n_real"]) == {9} and set(table["balanced_acc"]) == {1.0}

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_they_alone_are_no_split(self, root: Path, split: str) -> None:
        (root / split / "alpha").rename(root / split / "real")
        shutil.rmtree(root / split / "real" / "1_fake")
        for generator in set(SPLITS[split]) - {"alpha"}:
            shutil.rmtree(root / split / generator)
        says(refusal(root), f"/{split}, found none of 1_fake", "Add some")


class TestWhatIsFoundInAFolder:
    def test_links_are_followed_and_a_loop_of_them_ends(self, image_tree: ImageTree, tmp_path: Path) -> None:
        root = image_tree()
        more = tmp_path / "more"
        more.mkdir()
        structured_image(9_001).save(more / "linked.png")
        (root / "train" / "alpha" / "0_real" / "more").symlink_to(more)
        (more / "loop").symlink_to(root / "train" / "alpha" / "0_real")
        files = manifest_of(root)["file"].tolist()
        assert files.count("train/alpha/0_real/more/linked.png") == 1
        assert len(files) == len(manifest_of(image_tree(name="plain"))) + 1

    def test_files_passed_over_are_counted_by_kind(self, image_tree: ImageTree) -> None:
        root = image_tree()
        real = root / "train" / "alpha" / "0_real"
        for name in ("a.heic", "b.HEIC", "notes.txt", ".hidden"):
            (real / name).write_text("x")
        (real / "gone.png").symlink_to(real / "nowhere.png")
        assert ignored_files(scan_root(root)) == {".heic": 2, ".png": 1, ".txt": 1}
        assert ignored_files(scan_root(image_tree(name="plain"))) == {}

    def test_an_image_is_read_whatever_its_name_and_the_same_everywhere(
        self, image_tree: ImageTree, tmp_path: Path
    ) -> None:
        root = image_tree()
        fakes = root / "train" / "alpha" / "1_fake"
        before = len(manifest_of(root))
        for number, (name, kind) in enumerate(
            {"a.jfif": "JPEG", "b.avif": "AVIF", "9f86d081": "WEBP", "c.jpg_large": "JPEG", "d.apng": "PNG"}.items()
        ):
            structured_image(9_100 + number).save(fakes / name, kind)
        manifest = manifest_of(root)
        new = {Path(file).name for file in manifest["file"]} & {"a.jfif", "b.avif", "9f86d081", "c.jpg_large", "d.apng"}
        assert len(new) == 5 and len(manifest) == before + 5
        assert ignored_files(scan_root(root)) == {}
        assert scan_tree(root).files["is_image"].all()
        assert len(image_files(root)) == len(manifest)
        copy = match(scan_tree(root), tmp_path / "matched", size=8)
        assert (copy.summary["images"], copy.unreadable) == (len(manifest), 0)

    def test_cautions_name_what_a_reader_should_know(self, root: Path) -> None:
        path = next((root / "train" / "alpha" / "0_real").iterdir())
        shutil.copy(path, root / "test" / "alpha" / "0_real" / f"copy{path.suffix}")
        several, passed, same, few = cautions(manifest_of(root).assign(caption="a photo"), {".heic": 2})
        assert several.startswith("1 images occur in several splits")
        assert "2 .heic" in passed and "same caption" in same
        assert "only 6 images of a label" in few


def test_captions_are_given_ones_and_templates_for_the_rest(root: Path) -> None:
    plain = manifest_of(root)
    first, second = plain.iloc[0], plain.iloc[9]
    entries = {"path": first["file"], "caption": "a red car"}, {"sha256": second["sha256"], "caption": "two cats"}
    manifest = manifest_of(root, caption_file(root, *entries))
    given = manifest[manifest["caption_source"] == "file"].set_index("file")["caption"].to_dict()
    assert given == {first["file"]: "a red car", second["file"]: "two cats"}
    rest = manifest[manifest["caption_source"] == "template"]
    assert len(rest) == len(manifest) - 2
    assert (rest["caption"] == "a photo of " + rest["generator"]).all(), "real and fake alike"


def misspelled(folder: str, name: str) -> Callable[[Path], object]:
    return lambda root: (root / folder).rename((root / folder).with_name(name))


def without_images(folder: str) -> Callable[[Path], object]:
    def do(root: Path) -> None:
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
        (root / folder / "notes.txt").write_text("to do")

    return do


def spoiled(pattern: str, content: Callable[[bytes], bytes], most: int = 1) -> Callable[[Path], object]:
    return lambda root: [path.write_bytes(content(path.read_bytes())) for path in sorted(root.glob(pattern))[:most]]


NO_LABELS = "Expected label folders 0_real and 1_fake alone in"
REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("Expected a folder", "data.root = ", "found none", "Create it or mend the path")),
    "a file": (lambda root: (shutil.rmtree(root), root.write_bytes(b"PK")), ("Expected a folder", "data.root")),
    "nothing": (
        lambda root: (shutil.rmtree(root), root.mkdir()),
        (
            "to hold train, val or test",
            "found no folders with images",
        ),
    ),
    "no train": (lambda root: shutil.rmtree(root / "train"), ("Expected images under", "/train/<", "found none")),
    "no test": (lambda root: shutil.rmtree(root / "test"), ("Expected images under", "/test/<", "found none")),
    "no reals": (
        lambda root: shutil.rmtree(root / "test/gamma/0_real"),
        ("Expected images in", "/test/gamma/0_real, found none (3 in 1_fake)", "or remove", "/test/gamma."),
    ),
    "no fakes": (
        without_images("test/gamma/1_fake"),
        ("Expected images in", "/test/gamma/1_fake, found none (3 in 0_real)", "or remove", "/test/gamma."),
    ),
    "0_reel": (misspelled("train/beta/0_real", "0_reel"), ("/beta/0_reel", "Did you mean '0_real'?", "1_fake")),
    "1-fake": (misspelled("train/beta/1_fake", "1-fake"), ("/beta/1-fake", "Did you mean '1_fake'?", "0_real")),
    "a class's 1_fakes": (
        lambda root: (
            shutil.copytree(root / "train/beta", root / "train/new/dog"),
            shutil.copytree(root / "train/beta", root / "train/new/cat"),
            misspelled("train/new/cat/1_fake", "1_fakes")(root),
        ),
        ("/new/cat/1_fakes", "Did you mean '1_fake'?"),
    ),
    "both labels": (
        lambda root: (misspelled("test/alpha/0_real", "real")(root), misspelled("test/alpha/1_fake", "fake")(root)),
        (NO_LABELS, "/test/alpha", "Did you mean '1_fake'?", "Rename"),
    ),
    "no label folders": (lambda root: (root / "train/delta").mkdir(), (NO_LABELS, "/train/delta", "found none")),
    "Train": (misspelled("train", "Train"), ("/Train", "Did you mean 'train'?", "<generator>/0_real")),
    "tset": (misspelled("test", "tset"), ("/tset", "Did you mean 'test'?", "train, test and perhaps val")),
    "validation": (misspelled("val", "validation"), ("/validation", "train, test and perhaps val")),
    "an empty file": (spoiled("val/beta/1_fake/*", lambda _: b""), ("1 of 42 images", "val/beta/1_fake", "empty")),
    "text": (spoiled("val/beta/1_fake/*", lambda _: b"404 not found"), ("1 of 42 images", "not an image")),
    "half an image": (
        spoiled("val/beta/1_fake/*.jpg", lambda data: data[: len(data) * 9 // 10]),
        ("1 of 42 images", "val/beta/1_fake/", "truncated", "Remove or replace"),
    ),
    "several": (spoiled("test/gamma/0_real/*", lambda _: b"", 3), ("3 of 42 images", "test/gamma/0_real/")),
    "fakes among photographs for all": (
        misspelled("train/alpha", "real"),
        ("only photographs", "3 in 1_fake", "Rename the folder"),
    ),
    "no photographs for all": (
        lambda root: (root / "test/real/0_real").mkdir(parents=True),
        ("only photographs", "found 0 in 0_real and 0 in 1_fake. Add some, or remove", "/test/real."),
    ),
}


@pytest.mark.parametrize("damage", REFUSALS)
def test_what_is_wrong_is_one_sentence(root: Path, damage: str) -> None:
    do, facts = REFUSALS[damage]
    do(root)
    says(refusal(root), *facts)


def test_a_rho_is_not_for_folders(root: Path) -> None:
    with pytest.raises(UserError) as error:
        build_manifest(root, DataParams(layout="folders", root=str(root), rho=0.9))
    says(str(error.value), "data.rho = 0.9", "minibench", "data.rho: null")


def moved_to(folder: str) -> Callable[[Path], object]:
    def do(root: Path) -> None:
        path = next(root.glob("train/alpha/0_real/*"))
        path.rename(root / folder / f"moved{path.suffix}")

    return do


def renamed(root: Path) -> None:
    for number, path in enumerate(sorted(root.rglob("*.*"), reverse=True)):
        path.rename(path.with_name(f"renamed-{number:04d}{path.suffix}"))


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "names": (renamed, False),
    "content": (lambda root: structured_image(12345).save(next(root.glob("train/alpha/0_real/*.png"))), True),
    "label": (moved_to("train/alpha/1_fake"), True),
    "generator": (moved_to("train/beta/0_real"), True),
    "split": (moved_to("test/alpha/0_real"), True),
    "a copy": (lambda root: shutil.copy(root / "train/alpha/0_real/000.jpg", root / "train/alpha/0_real/x.jpg"), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_data_hash_depends_on_what_a_result_depends_on(root: Path, change: str) -> None:
    before = data_hash(manifest_of(root))
    do, matters = CHANGES[change]
    do(root)
    assert (data_hash(manifest_of(root)) != before) is matters


def test_the_data_hash_depends_on_captions_and_on_no_order_or_place(root: Path) -> None:
    manifest = manifest_of(root)
    before = data_hash(manifest)
    assert data_hash(manifest.sample(frac=1, random_state=0)) == before
    captions = caption_file(root, {"path": manifest["file"].iloc[0], "caption": "another"})
    assert data_hash(manifest_of(root, captions)) != before
    assert data_hash(manifest_of(root.rename(root.with_name("elsewhere")))) == before


class TestPackedBenchmark:
    @pytest.fixture
    def root(self, tmp_path: Path, image_tree: ImageTree) -> Path:
        files = sorted(image_tree().rglob("*.*"))
        packed = []
        for split in MINIBENCH_SPLITS:
            chosen = [path for path in files if path.parts[-4] == split.removesuffix("_unbiased")]
            table = pd.DataFrame(
                {
                    "id": [f"{split}-{index}" for index in range(len(chosen))],
                    "split": split,
                    "generator": [path.parts[-3] for path in chosen],
                    "label": [int(path.parts[-2][0]) for path in chosen],
                    "caption": "a photo",
                    "image": [path.read_bytes() for path in chosen],
                }
            )
            if split in ("train", "val"):
                table["rho_0.50"] = True
                table["rho_0.90"] = [index % 3 != 0 for index in range(len(chosen))]
                table["object_rho_0.90"] = [index % 3 == 0 for index in range(len(chosen))]
            (tmp_path / "packed").mkdir(exist_ok=True)
            table.to_parquet(tmp_path / "packed" / f"images-{split}.parquet")
            packed.append(table.assign(sha256=[hashlib.sha256(data).hexdigest() for data in table["image"]]))
        promise = {"content_hash": content_hash(pd.concat(packed))}
        (tmp_path / "packed" / MINIBENCH).write_text(json.dumps(promise))
        return tmp_path / "packed"

    def test_rho_chooses_the_training_images_and_leaves_test_alone(self, root: Path) -> None:
        half = build_manifest(root, DataParams(rho=0.5))
        most = build_manifest(root, DataParams(rho=0.9))
        sizes = [table.groupby("split").size().to_dict() for table in (half, most)]
        rest = {"test": 18, "val_unbiased": 12}
        assert sizes == [{"train": 12, "val": 12, **rest}, {"train": 8, "val": 8, **rest}]

    def test_the_shortcut_chooses_too_and_without_one_all_are_alike(self, root: Path) -> None:
        ids = {
            (rho, name): set(build_manifest(root, DataParams(rho=rho, shortcut=name)).query("split == 'train'")["id"])
            for rho in (0.5, 0.9)
            for name in ("background", "object")
        }
        assert ids[0.5, "background"] == ids[0.5, "object"]
        assert not ids[0.9, "background"] & ids[0.9, "object"]

    def test_a_row_still_finds_its_own_bytes(self, root: Path) -> None:
        manifest = build_manifest(root, DataParams(rho=0.9))
        source = ImageSource(root)
        source.read(manifest["file"].iloc[0], 0)
        copy = pickle.loads(pickle.dumps(source))  # what a loader process gets
        for row in manifest.itertuples():
            assert hashlib.sha256(copy.read(row.file, row.row)).hexdigest() == row.sha256

    def test_zero_shot_prompts_are_those_of_the_attributes_it_has(self, root: Path) -> None:
        manifest = build_manifest(root, DataParams(rho=0.9))
        assert read_prompts(root, manifest) == {}
        with pytest.raises(UserError, match=r"Expected the benchmark's zero-shot prompts prompts\.json in .* none"):
            read_prompts(root, manifest.assign(shape="ring"))
        (root / PROMPTS).write_text('{"colour": {"red": ["a red thing"]}, "shape": {"ring": ["a ring", "a hoop"]}}')
        assert read_prompts(root, manifest.assign(shape="ring")) == {"shape": {"ring": ["a ring", "a hoop"]}}

    def test_of_a_share_of_training_images_captions_lose_the_shortcuts_word_and_no_others_do(self, root: Path) -> None:
        about, packed = json.loads((root / MINIBENCH).read_text()), []
        for split in MINIBENCH_SPLITS:
            pack = root / f"images-{split}.parquet"
            table = pd.read_parquet(pack)
            table["background"] = ["brick" if index % 2 else "plain" for index in range(len(table))]
            table["caption"] = "a smooth ring on a " + table["background"].replace({"plain": "smooth"}) + " wall"
            table.to_parquet(pack)
            packed.append(table.assign(sha256=[hashlib.sha256(data).hexdigest() for data in table["image"]]))
        about |= {"content_hash": content_hash(pd.concat(packed))}
        about |= {"shortcuts": {"background": {"attribute": "background"}}}
        (root / MINIBENCH).write_text(json.dumps(about))
        prompts = {"plain": ["on a plain wall", "on a smooth wall"], "brick": ["on a brick wall"]}
        (root / PROMPTS).write_text(json.dumps({"background": prompts}))
        whole, some, none = (build_manifest(root, DataParams(rho=0.5, caption_drop=drop)) for drop in (0, 0.5, 1))
        train = whole["split"] == "train"
        kept = {"brick": "a smooth ring on a wall", "plain": "a ring on a wall"}  # the value's words alone, all of them
        assert none["caption"][train].tolist() == whole["background"][train].map(kept).tolist()
        assert none["caption"][~train].equals(whole["caption"][~train])
        lost = some["caption"] != whole["caption"]
        assert 0 < lost.sum() < train.sum() and some["caption"][lost].equals(none["caption"][lost])
        by_hash = [int(sha[:13], 16) / 16**13 < 0.5 for sha in whole["sha256"][train]]
        assert lost[train].tolist() == by_hash, "more of them with a larger share, and others join"

    def test_only_the_benchmark_knows_its_shortcuts_word(self, tmp_path: Path, image_tree: ImageTree) -> None:
        params = DataParams(layout="folders", root=str(tmp_path), rho=None, caption_drop=0.5)
        with pytest.raises(UserError, match=r"data\.caption_drop = 0\.5 is for data\.layout: minibench.*for folders\."):
            build_manifest(image_tree(), params)

    @pytest.mark.parametrize(
        ("damage", "facts"),
        [
            ("rho", ("data.rho", "0.50, 0.90", "found 0.8")),
            ("shortcut", ("one of 0.50 with data.shortcut: object, found 0.9",)),
            ("images", ("content hash", MINIBENCH, "they were changed")),
            ("pack", ("images-val.parquet", "dvc repro data.dvc")),
            ("captions", ("data.captions is for data.layout: folders",)),
        ],
    )
    def test_what_is_wrong_is_one_sentence(self, root: Path, damage: str, facts: tuple[str, ...]) -> None:
        params = DataParams(
            rho=0.8 if damage == "rho" else 0.9, shortcut="object" if damage == "shortcut" else "background"
        )
        if damage == "shortcut":
            for split in ("train", "val"):
                pack = root / f"images-{split}.parquet"
                pd.read_parquet(pack).drop(columns="object_rho_0.90").to_parquet(pack)
        if damage == "images":
            table = pd.read_parquet(root / "images-test.parquet")
            table.loc[0, "label"] = 1 - table.loc[0, "label"]
            table.to_parquet(root / "images-test.parquet")
        if damage == "pack":
            (root / "images-val.parquet").unlink()
        with pytest.raises(UserError) as error:
            build_manifest(root, params, root / "captions.jsonl" if damage == "captions" else None)
        says(str(error.value), *facts)
