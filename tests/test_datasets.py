"""Data sets as tables, imagefolder and parquet: the manifest is that of the same images in folders."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ImageTree
from settings import DataParams

from dgs.data import packs
from dgs.data.images import UnreadableImage
from dgs.data.layouts import LABELS
from dgs.data.manifest import ImageSource, build_manifest, data_hash, described, facts, open_image
from dgs.data.packs import Pack
from dgs.data.tree import scan_tree
from dgs.errors import UserError
from dgs.params import DataParams as Data

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def params(root: Path, layout: str, **more: Any) -> Data:
    return DataParams(layout=layout, root=str(root), rho=None, val_fraction=0.3, **more)


def read(root: Path, layout: str, captions: Path | None = None) -> pd.DataFrame:
    return build_manifest(root, params(root, layout), captions)


@pytest.fixture
def tree(image_tree: ImageTree) -> Path:
    """Folders of images, with a caption of each."""
    root = image_tree({"train": ("alpha", "NA"), "test": ("alpha", "gamma")})
    lines = [{"path": path, "caption": f"picture {number}"} for number, path in enumerate(files(root))]
    (root.parent / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*") if path.parent.name in LABELS)


def entries(tree: Path, **named: Any) -> list[dict[str, Any]]:
    """A row an image, as a table has it; "real" and "fake" are written as `named` says."""
    rows = []
    for number, file in enumerate(files(tree)):
        split, generator, label, _ = file.split("/")
        word = {"0_real": named.get("real", "real"), "1_fake": named.get("fake", "fake")}[label]
        rows.append(
            {"file_name": file, "label": word, "generator": generator, "text": f"picture {number}", "split": split}
        )
    return rows


def write_jsonl(tree: Path, rows: list[dict[str, Any]]) -> Path:
    (tree / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return tree


def write_csv(tree: Path, rows: list[dict[str, Any]]) -> Path:
    with (tree / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tree


def write_by_split(tree: Path, rows: list[dict[str, Any]]) -> Path:
    for split in ("train", "test"):
        own = [
            {**row, "file_name": row["file_name"].removeprefix(f"{split}/")} for row in rows if row["split"] == split
        ]
        write_jsonl(tree / split, [{key: value for key, value in row.items() if key != "split"} for row in own])
    return tree


def write_parquet(
    tree: Path,
    rows: list[dict[str, Any]],
    kind: Any = IMAGE,
    features: Any = None,
    group: int = 5,
    columns: tuple[str, ...] = ("label", "generator", "text"),
) -> Path:
    """Files as published: data/train-00000-of-00001.parquet, without a column of splits."""
    root = tree.parent / "packed"
    (root / "data").mkdir(parents=True, exist_ok=True)
    for split in sorted({row["split"] for row in rows}):
        own = [row for row in rows if row["split"] == split]
        images = [(tree / row["file_name"]).read_bytes() for row in own]
        values = [{"bytes": image, "path": None} for image in images] if kind is IMAGE else images
        table = pa.table({"image": pa.array(values, kind), **{name: [row[name] for row in own] for name in columns}})
        if features:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"data/{split}-00000-of-00001.parquet", row_group_size=group)
    return root


NAMES = {"label": {"names": ["FAKE", "REAL"], "_type": "ClassLabel"}}
FORMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "jsonl": ("imagefolder", lambda tree: write_jsonl(tree, entries(tree))),
    "jsonl, numbers": ("imagefolder", lambda tree: write_jsonl(tree, entries(tree, real=0, fake=1))),
    "a table a split": ("imagefolder", lambda tree: write_by_split(tree, entries(tree))),
    "csv": ("imagefolder", lambda tree: write_csv(tree, entries(tree, real="REAL", fake="FAKE"))),
    "csv, numbers": ("imagefolder", lambda tree: write_csv(tree, entries(tree, real=0, fake=1))),
    "parquet": ("parquet", lambda tree: write_parquet(tree, entries(tree))),
    "parquet, plain bytes": ("parquet", lambda tree: write_parquet(tree, entries(tree), pa.binary())),
    "parquet, large bytes": ("parquet", lambda tree: write_parquet(tree, entries(tree), pa.large_binary())),
    "parquet, one group": ("parquet", lambda tree: write_parquet(tree, entries(tree, real=0, fake=1), group=10**6)),
    "parquet, named numbers": (
        "parquet",
        lambda tree: write_parquet(tree, entries(tree, real=1, fake=0), features=NAMES),
    ),
    "parquet, booleans": ("parquet", lambda tree: write_parquet(tree, entries(tree, real=False, fake=True))),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_manifest_is_that_of_the_same_images_in_folders(tree: Path, form: str) -> None:
    expected = read(tree, "folders", tree.parent / "captions.jsonl")
    layout, write = FORMS[form]
    root = write(tree)
    found = read(root, layout)
    columns = ["split", "generator", "label", "seen", "sha256", "caption", "caption_source"]
    one, other = (table[columns].sort_values("sha256", ignore_index=True) for table in (found, expected))
    pd.testing.assert_frame_equal(one, other)
    assert data_hash(found) == data_hash(expected) and found["id"].is_unique
    source = pickle.loads(pickle.dumps(ImageSource(root)))
    for row in found.sample(frac=1, random_state=0).itertuples():
        assert hashlib.sha256(source.read(row.file, row.row)).hexdigest() == row.sha256
    assert open_image(source, found["file"][0], found["row"][0]).shape == (36, 40, 3)


def test_how_labels_were_read_is_said(tree: Path) -> None:
    root = write_parquet(tree, entries(tree, real=1, fake=0), features=NAMES)
    manifest = read(root, "parquet")
    assert "NOTE: Labels: REAL is real, FAKE is fake." in described(
        manifest, facts(manifest, params(root, "parquet")), root
    )


def test_without_generators_fakes_are_of_one_and_with_them_photographs_are_for_all(tree: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "generator"} for row in entries(tree)]
    assert set(read(write_jsonl(tree, rows), "imagefolder")["generator"]) == {"generated"}
    rows = [row | ({"generator": None} if row["label"] == "real" else {}) for row in entries(tree)]
    manifest = read(write_jsonl(tree, rows), "imagefolder")
    assert set(manifest.loc[manifest["label"] == 0, "generator"]) == {"real"}
    assert set(manifest.loc[manifest["label"] == 1, "generator"]) == {"alpha", "NA", "gamma"}


def test_captions_of_a_file_come_before_the_tables_and_templates_after(tree: Path) -> None:
    rows = entries(tree)
    rows[1]["text"] = " "
    root = write_parquet(tree, rows)
    plain = read(root, "parquet")
    first = plain.iloc[0]
    (tree.parent / "own.jsonl").write_text(json.dumps({"sha256": first["sha256"], "caption": "mine"}))
    manifest = read(root, "parquet", tree.parent / "own.jsonl").set_index("id")
    assert manifest.loc[first["id"], "caption"] == "mine"
    assert manifest["caption_source"].value_counts().to_dict() == {"file": len(plain) - 1, "template": 1}


def test_a_file_name_may_be_in_another_unicode_form(tree: Path) -> None:
    first, *rows = entries(tree)
    (tree / first["file_name"]).rename(tree / first["file_name"].replace("000", "\u00fc"))
    root = write_jsonl(tree, [{**first, "file_name": first["file_name"].replace("000", "u\u0308")}, *rows])
    assert len(read(root, "imagefolder")) == len(rows) + 1


def test_images_in_no_table_are_counted(tree: Path) -> None:
    root = write_jsonl(tree, entries(tree)[1:])
    manifest = read(root, "imagefolder")
    assert "NOTE: 1 images are in no table and not read, first test/alpha/0_real/000" in described(
        manifest, facts(manifest, params(root, "imagefolder")), root
    )


def test_all_images_that_cannot_be_read_are_named_in_one_round(tree: Path) -> None:
    root = write_jsonl(tree, entries(tree))
    broken = [root / file for file in files(tree)[:5]]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        read(root, "imagefolder")
    assert all(path.name in str(error.value) for path in broken) and str(error.value).count("Cannot decode") == 5


def test_a_manifest_of_folders_names_the_layout(tree: Path) -> None:
    with pytest.raises(UserError, match=r"With data\.layout: parquet the pipeline reads it"):
        scan_tree(write_parquet(tree, entries(tree)))


# Other spellings of the same table: what is changed in its rows.
SAME: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "labels as floats": lambda row: row | {"label": float(row["label"] == "fake")},
    "labels as text of floats": lambda row: row | {"label": f"{row['label'] == 'fake':.1f}"},
    "labels by folders": lambda row: {key: value for key, value in row.items() if key != "label"},
    "NaN for none": lambda row: row | {"split": float("nan"), "note": float("nan")},
    "a folder named as another split": lambda row: row,
}


@pytest.mark.parametrize("case", SAME)
def test_tables_that_say_the_same_give_the_same_manifest(tree: Path, case: str) -> None:
    expected = data_hash(read(write_jsonl(tree, entries(tree)), "imagefolder"))
    root = write_jsonl(tree, [SAME[case](row) for row in entries(tree)])
    if case == "a folder named as another split":
        (root / "metadata.jsonl").unlink()
        root = tree.parent / "around"
        root.mkdir()
        tree.rename(root / "hard-test")
        write_by_split(root / "hard-test", entries(root / "hard-test"))
    assert data_hash(read(root, "imagefolder")) == expected


def test_photographs_without_a_generator_are_for_all_whether_the_key_is_there_or_not(tree: Path) -> None:
    rows = entries(tree)
    bare = [row if row["label"] == "fake" else {k: v for k, v in row.items() if k != "generator"} for row in rows]
    manifest = read(write_jsonl(tree, bare), "imagefolder")
    assert set(manifest.loc[manifest["label"] == 0, "generator"]) == {"real"}


def test_a_file_that_names_its_numbers_names_those_of_the_others(tree: Path) -> None:
    rows = entries(tree, real=1, fake=0)
    root = write_parquet(tree, [row for row in rows if row["split"] == "train"], features=NAMES)
    write_parquet(tree, [row for row in rows if row["split"] == "test"])
    expected = read(tree, "folders")[["sha256", "label"]].sort_values("sha256", ignore_index=True)
    found = read(root, "parquet")[["sha256", "label"]].sort_values("sha256", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected)


def test_the_file_decides_the_split_before_a_word_in_a_folders_name(tree: Path) -> None:
    root = write_parquet(tree, entries(tree))
    (root / "data").rename(root / "hard-test")
    assert set(read(root, "parquet")["split"]) == {"train", "val", "test"}


def test_columns_that_are_not_read_and_files_that_are_missing_are_said(tree: Path) -> None:
    root = write_parquet(tree, [row | {"prompt": "x"} for row in entries(tree)], columns=("label", "prompt"))
    (root / "data/train-00000-of-00001.parquet").rename(root / "data/train-00001-of-00003.parquet")
    manifest = read(root, "parquet")
    said = described(manifest, facts(manifest, params(root, "parquet")), root)
    assert "NOTE: Columns that are not read: prompt." in said
    assert f"NOTE: Files are missing, here are 1 of 3 of {root}/data/train." in said


@pytest.mark.parametrize("rows", [1, 40, 10**6])
def test_whatever_the_row_groups_memory_stays_bounded(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "LARGE", 2_000_000)
    monkeypatch.setattr(packs, "KEPT", 4_000_000)
    pages = {"write_batch_size": 8, "data_page_size": 1_000_000}  # a page is read whole
    made = np.random.default_rng(0).integers(0, 256, (400, 100_000), dtype=np.uint8)
    pq.write_table(
        pa.table({"image": [bytes(row) for row in made]}), tmp_path / "a.parquet", row_group_size=rows, **pages
    )
    before, pack = pa.default_memory_pool().bytes_allocated(), Pack(tmp_path / "a.parquet")
    most = 0
    for row in (*range(400), 390, 20, 399):
        assert pack.read(row) == bytes(made[row])
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert len(pack) == 400 and most < 16_000_000  # of 40


def changed(**values: Any) -> Callable[[Path], tuple[Path, str]]:
    def make(tree: Path) -> tuple[Path, str]:
        rows = entries(tree)
        rows[3] |= values
        return write_jsonl(tree, rows), "imagefolder"

    return make


def without_bytes(tree: Path) -> tuple[Path, str]:
    root = write_parquet(tree, entries(tree))
    file = root / "data/test-00000-of-00001.parquet"
    table = pq.read_table(file)
    values = [{"bytes": None, "path": "a.png"}, *table["image"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, "image", pa.array(values, IMAGE)), file)
    return root, "parquet"


def two_columns(tree: Path) -> tuple[Path, str]:
    root = write_parquet(tree, entries(tree))
    file = root / "data/test-00000-of-00001.parquet"
    table = pq.read_table(file).rename_columns(["a", "label", "generator", "text"])
    pq.write_table(table.append_column("b", table["a"]), file)
    return root, "parquet"


def damaged(tree: Path) -> tuple[Path, str]:
    root = write_parquet(tree, entries(tree))
    (root / "data/test-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    return root, "parquet"


def torn(tree: Path) -> tuple[Path, str]:
    write_jsonl(tree, entries(tree)).joinpath("metadata.jsonl").open("a").write('{"file_name": ')
    return tree, "imagefolder"


WRONG: dict[str, tuple[Callable[[Path], tuple[Path, str]], str]] = {
    "no table": (lambda tree: (tree, "imagefolder"), "Expected metadata.jsonl or metadata.csv in"),
    "no parquet": (lambda tree: (tree, "parquet"), "Expected .parquet in"),
    "no such image": (changed(file_name="train/gone.png"), "line 4: expected an image at"),
    "an image elsewhere": (changed(file_name="../x.png"), "line 4: expected an image at"),
    "no file_name": (changed(file_name=None), "line 4: expected a file_name and a label"),
    "no label": (changed(label=None), "line 4: expected the label 0 or real, 1 or fake, found none"),
    "a strange label": (changed(label="maybe"), "found maybe"),
    "a number too large": (changed(label=2), "found 2"),
    "a strange split": (changed(split="holdout"), "expected a split (train, val, test)"),
    "a fake called real": (changed(generator="real", label="fake"), "expected a generator of a fake, found real"),
    "a name that no system has": (changed(file_name="x" * 5000), "line 4: expected an image at"),
    "half a sign": (changed(text="\ud800"), "line 4: expected text as text, found \\ud800."),
    "a list of texts": (changed(text=["a", "b"]), "line 4: expected text as text"),
    "nested without end": (
        lambda tree: (write_jsonl(tree, []).joinpath("metadata.jsonl").write_text("[" * 10**5) and tree, "imagefolder"),
        "to be text in UTF-8, an entry a line",
    ),
    "photographs of no fakes": (changed(label="real", generator="coco"), "images of coco in"),
    "two splits in one name": (
        changed(split=None, file_name="train_test.png"),
        "expected a split (train, val, test)",
    ),
    "an image twice": (lambda tree: (write_jsonl(tree, entries(tree) * 2), "imagefolder"), "Expected each image once"),
    "a torn line": (torn, "Expected"),
    "no test": (
        lambda tree: (write_jsonl(tree, [r for r in entries(tree) if r["split"] != "test"]), "imagefolder"),
        "Expected images of the split test",
    ),
    "no bytes": (without_bytes, "Expected the bytes of an image in"),
    "two columns": (two_columns, "found a.bytes, b.bytes. Call it image."),
    "a damaged file": (damaged, "Expected a parquet file at"),
    "no columns": (
        lambda tree: (write_parquet(tree, entries(tree), columns=("generator", "text")), "parquet"),
        "Expected a column label in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(tree: Path, case: str) -> None:
    make, fact = WRONG[case]
    (tree / "train_test.png").write_bytes(next(tree.rglob("*.png")).read_bytes())
    root, layout = make(tree)
    with pytest.raises((UserError, UnreadableImage)) as error:
        read(root, layout)
    assert fact in str(error.value) and "\n" not in str(error.value), str(error.value)
