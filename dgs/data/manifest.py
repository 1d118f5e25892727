"""The manifest: one row an image, with its split, generator, label, content hash and caption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from dgs.data.captions import assign_captions, read_captions, template_caption
from dgs.data.datasets import read_dataset
from dgs.data.defects import read_rows
from dgs.data.images import UnreadableImage, decode, read
from dgs.data.layouts import LABELS, SPLITS
from dgs.data.packs import Pack
from dgs.data.suites import SHARED_REALS, SUITES, foreign, full_name, is_seen, parted, unseen_by_accident
from dgs.data.tree import MINIBENCH, ignored_files, passed_over, scan_root
from dgs.errors import UserError, printable
from dgs.params import DataParams
from dgs.workspace import Workspace, require_data_root

MINIBENCH_SPLITS = (*SPLITS, "val_unbiased")  # val has the shortcut of train, val_unbiased none
SEMANTICS = ("shape", "colour", "background")  # the minibench's attributes that zero-shot is measured on
PROMPTS = "prompts.json"  # of the minibench: {attribute: {value: zero-shot prompts}}
FEW = 30  # validation images of a label, below which a threshold is rough
NAMED = 30  # broken images of a table that a refusal names
COLUMNS = ("id", "split", "generator", "label", "seen", "file", "row", "sha256", "caption", "caption_source")


class ImageSource:
    """Encoded images by manifest entry: a plain file (row -1), or a row of a packed parquet file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._packs: dict[str, Pack] = {}

    def read(self, file: str, row: int) -> bytes:
        """The bytes of one image file.

        Raises:
            UnreadableImage: the file is gone or unreadable.
        """
        if row < 0:
            return read(self.root / file)
        if file not in self._packs:
            self._packs[file] = Pack(self.root / file)
        return self._packs[file].read(row)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_packs": {}}  # loader processes reopen packs rather than copy them


def content_hash(images: pd.DataFrame) -> str:
    """sha256 over the sorted (id, sha256, label, caption) of a benchmark's images, whatever their order and packing."""
    fields = zip(images["id"], images["sha256"], images["label"], images["caption"], strict=True)
    lines = sorted(json.dumps([id_, sha, int(label), caption]) for id_, sha, label, caption in fields)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def training_set(rho: float | None, shortcut: str = "background") -> str:
    """The column that marks a training set: (0.9, "background") -> "rho_0.90", (0.9, "object") -> "object_rho_0.90".

    At rho 0.5 there is no shortcut, and all have one set.
    """
    prefix = "" if shortcut == "background" or rho == 0.5 else f"{shortcut}_"
    return f"{prefix}rho_{'none' if rho is None else f'{rho:.2f}'}"


def _fraction(sha: str) -> float:
    """A number in 0..1 that an image's content hash draws."""
    return int(sha[:13], 16) / 16**13


def without_word(captions: pd.Series, values: pd.Series, prompts: Mapping[str, list[str]]) -> pd.Series:
    """Captions that no longer name an attribute: the words that tell an image's value from others are left out.

    Args:
        values: of the attribute, an image's each.
        prompts: zero-shot prompts of each value; their words are its own but for those that all values' prompts have.
    """
    found = {value: set(" ".join(of).split()) for value, of in prompts.items()}
    common = set.intersection(*found.values())
    named = zip(captions, values, strict=True)
    kept = [" ".join(word for word in text.split() if word not in found[value] - common) for text, value in named]
    return pd.Series(kept, captions.index, dtype=captions.dtype)


def _minibench(root: Path, params: DataParams) -> pd.DataFrame:
    frames, rho, shortcut = {}, params.rho, params.shortcut
    for split in MINIBENCH_SPLITS:
        path = root / f"images-{split}.parquet"
        if not path.exists():
            raise UserError(
                f"Expected the embedded benchmark's {path.name} in {root}, found none. Run dvc repro data.dvc."
            )
        table = pq.read_table(path)
        hashes = [hashlib.sha256(image.as_py()).hexdigest() for image in table.column("image")]
        frame = table.drop_columns(["image"]).to_pandas()
        frames[split] = frame.assign(row=range(len(frame)), file=path.name, sha256=hashes)
    about = json.loads((root / MINIBENCH).read_text(encoding="utf-8"))
    if (found := content_hash(pd.concat(frames.values()))) != (promised := about["content_hash"]):
        raise UserError(
            f"Expected the images of {root} to have the content hash {promised[:12]} that {MINIBENCH} gives, found "
            f"{found[:12]}: they were changed. Make the folder again, or use data.layout: folders for your own images."
        )
    column = training_set(rho, shortcut)
    for split in ("train", "val"):
        if column not in frames[split]:
            rhos = sorted({name.rpartition("rho_")[2] for name in frames[split] if "rho_" in name})
            choices = [value for value in rhos if training_set(float(value), shortcut) in frames[split]]
            raise UserError(
                f"Expected data.rho to be one of {', '.join(choices)} with data.shortcut: {shortcut}, found {rho}."
            )
        frames[split] = frames[split][frames[split][column]].copy()
    if params.caption_drop > 0:
        attribute, train = about["shortcuts"][shortcut]["attribute"], frames["train"]
        drawn = train[train["sha256"].map(_fraction) < params.caption_drop]
        prompts = read_prompts(root, train)[attribute]
        train.loc[drawn.index, "caption"] = without_word(drawn["caption"], drawn[attribute], prompts)
    return pd.concat(frames.values(), ignore_index=True).assign(caption_source="file")


def _cut_val(manifest: pd.DataFrame, fraction: float) -> pd.DataFrame:
    """Train rows whose content hash falls into the first `fraction` become val: copies of an image stay together, and
    the cut does not move when images are added. Except that each generator and label keeps at least one image in
    train, and gives at least one if it has two: its first by hash."""
    train = manifest[manifest["split"] == "train"]
    cut = set(train.loc[train["sha256"].map(_fraction) < fraction, "sha256"])
    for _, rows in train.groupby(["generator", "label"]) if 0 < fraction < 1 else ():
        contents = sorted(rows["sha256"].unique())
        if cut >= set(contents):
            cut.discard(contents[-1])
        if len(contents) > 1 and not cut & set(contents):
            cut.add(contents[0])
    manifest.loc[(manifest["split"] == "train") & manifest["sha256"].isin(cut), "split"] = "val"
    return manifest


def _require_both_labels(manifest: pd.DataFrame, root: Path, cut: float | None) -> None:
    where = "" if cut is None else f" after cutting val from train (data.val_fraction = {cut})"
    for split in SPLITS:
        present = set(manifest.loc[manifest["split"] == split, "label"])
        if missing := [name for name, label in LABELS.items() if label not in present]:
            raise UserError(
                f"Expected real and fake images in {root / split}, found none of {' and '.join(missing)}{where}. "
                f"Add some{', give a val folder, or set another fraction' if cut is not None else ''}."
            )


def _own(root: Path, params: DataParams, captions_file: Path | None) -> pd.DataFrame:
    """The images of a user's own data set, each read and decoded."""
    if params.layout == "folders":
        rows = read_rows(scan_root(root))
        manifest = rows.assign(id=rows["file"], row=-1, text=None)
    else:
        manifest, _ = read_dataset(root, params.layout)
    source, hashes, unreadable = ImageSource(root), [], []
    places = zip(manifest["id"], manifest["file"], manifest["row"], strict=True)
    for name, file, row in tqdm(places, "reading images", len(manifest), unit="image"):
        try:
            data = source.read(file, row)
            hashes.append(hashlib.sha256(data).hexdigest())
            decode(data, name)
        except UnreadableImage as error:
            unreadable.append(str(error))
    if unreadable:
        check = f" For all of them: dgs manifest {root} --check --json"
        if params.layout != "folders":  # which that command does not read
            check = "".join(f" Also: {error}" for error in unreadable[1:NAMED])
        raise UserError(f"{len(unreadable)} of {len(manifest)} images cannot be read, first: {unreadable[0]}{check}")
    manifest["sha256"] = hashes
    captions = read_captions(captions_file) if captions_file else {}
    given = assign_captions(manifest.assign(file=manifest["id"]), captions)
    given = given.where(given.notna(), manifest["text"])
    manifest["caption"] = given.where(given.notna(), manifest["words"].map(template_caption))
    manifest["caption_source"] = given.notna().map({True: "file", False: "template"})
    cut = None if (manifest["split"] == "val").any() else params.val_fraction
    if cut is not None:
        manifest = _cut_val(manifest, cut)
    _require_both_labels(manifest, root, cut)
    return manifest.drop(columns=["words", "text"])


def build_manifest(root: Path, params: DataParams, captions_file: Path | None = None) -> pd.DataFrame:
    """Every image of a data set, checked, one row each.

    Args:
        root: folder of the layout: "minibench" (packed parquet files) or "folders"
            (`<split>/<generator>/{0_real,1_fake}`, or one class folder more in between; `<split>/real/0_real` may
            hold photographs for all generators of the split, which then need none of their own; beside the splits
            the paper's suites as published, whose generators are test ones; other published forms as
            `layouts.read_layout` takes them), "imagefolder" or "parquet" (`datasets.read_dataset`).
        params: rho and shortcut choose the minibench's training set, caption_drop its captions; val_fraction and limit
            as documented there.
        captions_file: as `read_captions` takes it; not for "minibench".

    Returns:
        columns id, split, generator, label (0 real, 1 fake), seen (the generator is in train), file, row, sha256,
        caption, caption_source ("file" or "template"), and for the minibench shape, colour, background; sorted by
        split and id.

    Raises:
        UserError: one sentence for the first thing that is wrong.
    """
    require_data_root(root, params.root)
    if params.layout == "minibench":
        if captions_file:
            raise UserError(
                "data.captions is for data.layout: folders, imagefolder and parquet; the minibench brings its own "
                "captions."
            )
        manifest = _minibench(root, params)
    else:
        if params.rho is not None:
            raise UserError(
                f"data.rho = {params.rho} is for data.layout: minibench. Set data.rho: null for {params.layout}."
            )
        if params.caption_drop > 0:
            raise UserError(
                f"data.caption_drop = {params.caption_drop:g} is for data.layout: minibench, whose captions name the "
                f"shortcut. Set data.caption_drop: 0 for {params.layout}."
            )
        manifest = _own(root, params, captions_file)
    trained_on = set(manifest.loc[(manifest["split"] == "train") & (manifest["label"] == 1), "generator"])
    seen = {name for name in manifest["generator"].unique() if is_seen(name, trained_on)}
    manifest["seen"] = manifest["generator"].isin(seen)
    if params.limit is not None:
        by_hash = manifest.sort_values(["sha256", "id"])
        manifest = by_hash.groupby(["split", "generator", "label"], sort=False).head(params.limit)
    extra = [name for name in SEMANTICS if name in manifest]
    manifest = manifest[[*COLUMNS, *extra]].sort_values(["split", "id"], ignore_index=True)
    return manifest.astype({"label": "int64", "row": "int64"})


def open_manifest(workspace: Workspace, params: DataParams) -> tuple[pd.DataFrame, ImageSource]:
    """The manifest of data.root, as `build_manifest` makes it, and the source that its images are read from."""
    root = workspace.resolve(params.root)
    captions_file = workspace.resolve(params.captions) if params.captions else None
    return build_manifest(root, params, captions_file), ImageSource(root)


def read_prompts(root: Path, manifest: pd.DataFrame) -> dict[str, dict[str, list[str]]]:
    """Zero-shot prompts of the minibench: {attribute: {value: prompts}}; empty for a data set without attributes.

    Raises:
        UserError: the benchmark has none.
    """
    attributes = [name for name in SEMANTICS if name in manifest]
    if not attributes:
        return {}
    if not (root / PROMPTS).exists():
        raise UserError(
            f"Expected the benchmark's zero-shot prompts {PROMPTS} in {root}, found none. Run dvc repro data.dvc, or "
            f"make the folder again (dgs minibench build)."
        )
    prompts = json.loads((root / PROMPTS).read_text(encoding="utf-8"))
    return {name: prompts[name] for name in attributes}


def facts(manifest: pd.DataFrame, params: DataParams) -> dict[str, Any]:
    """What is noted of a data set beside its images: hash, layout, rho, seen generators and counts."""
    return {
        "data_hash": data_hash(manifest),
        "layout": params.layout,
        "rho": params.rho,
        "images": len(manifest),
        "seen": sorted(manifest.loc[manifest["seen"], "generator"].unique()),
        "captions": {key: int(n) for key, n in manifest["caption_source"].value_counts().sort_index().items()},
        "in_several_splits": duplicates_across_splits(manifest),
    }


def described(manifest: pd.DataFrame, info: Mapping[str, Any], root: Path) -> str:
    """A data set in a few lines: images and hashes, where captions come from, and `cautions`; `info`: its `facts`."""
    without_test = data_hash(manifest[manifest["split"] != "test"])
    given, made = (info["captions"].get(source, 0) for source in ("file", "template"))
    tree = scan_root(root) if info["layout"] == "folders" else None
    ignored, notes = (ignored_files(tree), tree.reading()) if tree else ({}, [])
    if info["layout"] in ("imagefolder", "parquet"):
        _, notes = read_dataset(root, info["layout"])
    loose = [tree.loose_images()] if tree and tree.layout.loose else []
    lines = [
        f"{len(manifest)} images, data hash {info['data_hash'][:12]}; without test images {without_test[:12]}",
        f"captions: {given} given, {made} made from folder names",
        *(f"NOTE: {note}" for note in notes),
        *(f"CAUTION: {caution}" for caution in [*loose, *cautions(manifest, ignored)]),
    ]
    return "\n".join(map(printable, lines))


def data_hash(manifest: pd.DataFrame) -> str:
    """sha256 over what a result depends on: each image's split, generator, label, content and caption.

    File names and packing do not enter, so a moved or repacked data set keeps its hash.
    """
    digest = hashlib.sha256()
    fields = ["split", "generator", "label", "sha256", "caption"]
    for line in sorted("\t".join(map(str, row)) for row in manifest[fields].itertuples(index=False)):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def duplicates_across_splits(manifest: pd.DataFrame) -> int:
    """Number of distinct images (by content) that occur in more than one split."""
    return int((manifest.groupby("sha256")["split"].nunique() > 1).sum())


def _incomplete(tested: set[str]) -> list[str]:
    """A sentence for each suite of which some generators are there and others are not."""
    notes = []
    for suite in SUITES:
        absent = [known.column for known in suite.generators if full_name(suite.name, known.column) not in tested]
        if 0 < len(absent) < len(suite.generators):
            notes.append(
                f"{len(absent)} of {len(suite.generators)} generators of {suite.name} are missing, so that its means "
                f"are not the paper's: {', '.join(absent)}."
            )
    return notes


def trained_and_tested(manifest: pd.DataFrame) -> list[set[str]]:
    """The generators with fakes in train, and those in test."""
    fakes = manifest[manifest["label"] == 1]
    return [set(fakes.loc[fakes["split"] == split, "generator"]) for split in ("train", "test")]


def cautions(manifest: pd.DataFrame, ignored: Mapping[str, int]) -> list[str]:
    """What a reader of the results should know of the data, a sentence each; `ignored` as from `ignored_files`."""
    notes = []
    if several := duplicates_across_splits(manifest):
        notes.append(f"{several} images occur in several splits: test numbers will flatter.")
    tested = set(manifest.loc[manifest["split"] == "test", "generator"])
    notes += _incomplete(tested) + foreign(tested)
    notes += passed_over(ignored) + unseen_by_accident(*trained_and_tested(manifest))
    if manifest["caption"].nunique() < 2:
        notes.append("All images have the same caption: the text side has nothing to reveal, so surgery has no use.")
    smallest = int(manifest[manifest["split"] == "val"].groupby("label").size().reindex([0, 1], fill_value=0).min())
    if smallest < FEW:
        notes.append(
            f"Validation has only {smallest} images of a label: thresholds chosen on it, and verdicts, are rough."
        )
    return notes


def counts(manifest: pd.DataFrame) -> pd.DataFrame:
    """Images a split and generator: columns split, generator, seen, real, fake."""
    counted = manifest.assign(real=manifest["label"] == 0, fake=manifest["label"] == 1)
    return counted.groupby(["split", "generator", "seen"])[["real", "fake"]].sum().reset_index()


def open_image(source: ImageSource, file: str, row: int) -> NDArray[np.uint8]:
    """The decoded image of a manifest entry: (H, W, 3) uint8."""
    return decode(source.read(file, row), file)


def _kind(generator: str, label: int, seen: bool) -> str:
    if label == 1:
        return f"{generator}, {'seen' if seen else 'unseen'}"
    suite, own = parted(generator)
    return "real" if own == SHARED_REALS and not suite else f"{suite or own}, real"


def examples(manifest: pd.DataFrame, source: ImageSource, per_row: int = 6) -> dict[str, list[NDArray[np.uint8]]]:
    """A few images of each kind for a contact sheet: {"<generator>, real | seen | unseen": images}.

    Photographs for all generators of the split are "real", and all of a suite's are "<suite>, real".
    """
    test = manifest[manifest["split"] == "test"].sort_values(
        ["label", "seen", "generator"], ascending=[True, False, True]
    )
    kinds = [_kind(*row) for row in test[["generator", "label", "seen"]].itertuples(index=False, name=None)]
    return {
        str(name): [open_image(source, file, row) for file, row in rows[["file", "row"]].head(per_row).to_numpy()]
        for name, rows in test.groupby(kinds, sort=False)
    }
