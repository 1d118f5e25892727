"""What the prepare stage leaves for the later ones: manifest, caption embeddings, prompts, patch indices.

In two parts: `training/` is all that the train stage opens, so that other test images train nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from dgs.data.manifest import ImageSource, data_hash, open_image, trained_and_tested
from dgs.data.patches import patch_indices
from dgs.data.suites import unseen_by_accident
from dgs.errors import UserError
from dgs.params import Params, validate
from dgs.stats import percent_text

PREPARED_WITH = {
    "data": {"show_images"},
    "patches": None,
    "model": {"lora", "levels", "precision"},
}  # parameter groups that are settled by preparing, without some
TRAINING = "training"  # folder of the images that are learned or validated on
OWN_TEXT = {"side": "own"}  # of older ones too, which do not say
PARTS = {"test": False, TRAINING: True}
TRAINS = ("clip", "clip_features", "text", "rho", "seen")  # facts that are the training part's


@dataclass(frozen=True)
class Prepared:
    """The prepare stage's output, opened.

    manifest: one row an image.
    info: data_hash, of all images; training_hash, of those of other splits than test; rho, seen generators, the
        hashes of CLIP's weights and settings, what embeds captions ("text"), counts, and the parameters it was prepared
        with. Of the training part alone, without what depends on test images.
    caption_embeddings: (N, D) float32, row i belongs to manifest row i; unnormalised, from the frozen text tower.
        Without a text side D is 0, here and in the prompts.
    prompts: {attribute: (values, (C, D) float32 unit-length prompt embeddings)}; empty where the data has none.
    patches: {sha256: kept patch indices}, None where patch selection is off.
    """

    manifest: pd.DataFrame
    info: dict[str, Any]
    caption_embeddings: NDArray[np.float32]
    prompts: dict[str, tuple[list[str], NDArray[np.float32]]]
    patches: dict[str, NDArray[np.int32]] | None
    source: ImageSource

    @property
    def has_text(self) -> bool:
        """False where captions are not embedded (model.text: none)."""
        return self.caption_embeddings.shape[1] > 0

    @property
    def text_note(self) -> str:
        """What embedded captions, in a sentence; "" where that is CLIP's own text tower."""
        about = self.info.get("text", OWN_TEXT)
        return "" if about == OWN_TEXT else text_sentence(about)

    @property
    def cautions(self) -> list[str]:
        """What to know of seen and unseen generators, a sentence each."""
        return unseen_by_accident(*trained_and_tested(self.manifest))

    def split(self, name: str) -> pd.DataFrame:
        """Rows of one split; the index still points into `caption_embeddings`."""
        return self.manifest[self.manifest["split"] == name]

    def with_training_images(self, count: int | None, seed: int) -> Prepared:
        """Training on `count` images alone (None: all), drawn by `seed` in proportion to generators and labels.

        The draws of a seed are nested: 64 images are among its 128. Validation and test images stay.

        Raises:
            UserError: there are not so many.
        """
        if count is None:
            return self
        rows = self.split("train")
        if count > len(rows):
            raise UserError(
                f"Expected train.images to be at most {len(rows)}, the training images there are, found {count}."
            )
        rows = rows.iloc[np.random.default_rng([seed, 13]).permutation(len(rows))]
        cells = rows.groupby(["generator", "label"])["id"]
        share = (cells.cumcount() + 0.5) / cells.transform("size")  # of its generator and label, up to here
        manifest = self.manifest.copy()
        manifest.loc[share.sort_values(kind="stable").index[count:], "split"] = "unused"
        return replace(self, manifest=manifest)

    def with_prepared(self, params: Params) -> Params:
        """`params` with the data, patches and CLIP that were prepared: by hand, prepare may have been given others."""
        content = params.model_dump()
        for group, settings in self.info["params"].items():
            content[group] |= settings
        return validate(content, "data.json")

    def overridden(self, params: Params) -> list[str]:
        """What `with_prepared` changes, a sentence each; nothing in a pipeline, where both are the same."""
        given = params.model_dump()
        return [
            f"{group}.{name} stays {value!r}, as prepared, not {given[group][name]!r}: to change it, prepare again."
            for group, settings in self.info["params"].items()
            for name, value in settings.items()
            if given[group][name] != value
        ]


def compute_patches(manifest: pd.DataFrame, source: ImageSource, params: Params) -> dict[str, NDArray[np.int32]] | None:
    """The kept patch indices of every distinct image: entropies are computed here once, training does no FFT.

    None where patch selection is off.
    """
    if not params.patches.enabled:
        return None
    indices: dict[str, NDArray[np.int32]] = {}
    distinct = manifest.drop_duplicates("sha256")[["file", "row", "sha256"]].to_numpy().tolist()
    for file, row, sha in tqdm(distinct, desc="patch entropy", unit="image"):
        try:
            image = open_image(source, file, row)
            indices[sha] = patch_indices(image, params.patches.size, params.patches.count)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    return indices


def save_prepared(
    folder: Path,
    manifest: pd.DataFrame,
    info: Mapping[str, Any],
    captions: Mapping[str, NDArray[np.float32]],
    prompts: Mapping[str, tuple[list[str], NDArray[np.float32]]],
    patches: Mapping[str, NDArray[np.int32]] | None,
    params: Params,
) -> None:
    """Write a prepare stage's output into `folder`; `captions` maps each distinct caption to its (D,) embedding."""
    trains = manifest["split"] != "test"
    for part, training in PARTS.items():
        (folder / part).mkdir()
        _save_part(folder / part, manifest[trains == training], captions, patches)
    settled = {group: getattr(params, group).model_dump(exclude=without) for group, without in PREPARED_WITH.items()}
    facts = {name: info[name] for name in TRAINS if name in info}
    _write_json(
        folder / TRAINING / "data.json", {**facts, "training_hash": data_hash(manifest[trains]), "params": settled}
    )
    _write_json(folder / "data.json", {name: value for name, value in info.items() if name not in facts})
    (folder / "prompts.json").write_text(json.dumps({name: values for name, (values, _) in prompts.items()}, indent=1))
    if prompts:
        # safetensors writes an array's memory as it lies: a transposed one would come back scrambled.
        save_file(
            {name: np.ascontiguousarray(embedding) for name, (_, embedding) in prompts.items()},
            folder / "prompts.safetensors",
        )


def _save_part(
    folder: Path,
    manifest: pd.DataFrame,
    captions: Mapping[str, NDArray[np.float32]],
    patches: Mapping[str, NDArray[np.int32]] | None,
) -> None:
    texts = sorted(manifest["caption"].unique())
    manifest = manifest.assign(caption_index=manifest["caption"].map({text: i for i, text in enumerate(texts)}))
    manifest.to_parquet(folder / "manifest.parquet", index=False, compression="zstd")
    save_file({"captions": np.stack([captions[text] for text in texts])}, folder / "captions.safetensors")
    if patches is not None:
        hashes = sorted(manifest["sha256"].unique())
        width = max(len(patches[sha]) for sha in hashes)
        table = np.full((len(hashes), width), -1, dtype=np.int32)  # -1 pads images with fewer patches
        for line, sha in zip(table, hashes, strict=True):
            line[: len(patches[sha])] = patches[sha]
        save_file({"indices": table}, folder / "patches.safetensors")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def load_prepared(folder: Path, root: Path) -> Prepared:
    """Open a prepare stage's output.

    Args:
        folder: build/<profile>/prepare.
        root: the repository, which a relative data.root is relative to.
    """
    return _load(folder, root, list(PARTS))


def load_training(folder: Path, root: Path) -> Prepared:
    """Open what training depends on: as `load_prepared`, but for test images, prompts and what tells of them."""
    return _load(folder, root, [TRAINING])


def _load(folder: Path, root: Path, parts: list[str]) -> Prepared:
    info = _read_json(folder / TRAINING / "data.json")
    prompts: dict[str, tuple[list[str], NDArray[np.float32]]] = {}
    if parts != [TRAINING]:
        info |= _read_json(folder / "data.json")
        if names := _read_json(folder / "prompts.json"):
            embedded = load_file(folder / "prompts.safetensors")
            prompts = {name: (values, embedded[name]) for name, values in names.items()}
    manifests, embeddings = [], []
    patches: dict[str, NDArray[np.int32]] = {}
    for part in parts:
        manifest = pd.read_parquet(folder / part / "manifest.parquet")
        captions = load_file(folder / part / "captions.safetensors")["captions"]
        embeddings.append(captions[manifest["caption_index"].to_numpy()])
        manifests.append(manifest.drop(columns="caption_index"))
        if (folder / part / "patches.safetensors").exists():
            table = load_file(folder / part / "patches.safetensors")["indices"]
            hashes = sorted(manifest["sha256"].unique())
            patches |= {sha: line[line >= 0] for sha, line in zip(hashes, table, strict=True)}
    return Prepared(
        manifest=pd.concat(manifests, ignore_index=True),
        info=info,
        caption_embeddings=np.concatenate(embeddings),
        prompts=prompts,
        patches=patches or None,
        source=ImageSource((root / info["params"]["data"]["root"]).resolve()),
    )


def text_sentence(about: Mapping[str, Any]) -> str:
    """A text side in a sentence, `about` as prepared data have it."""
    if about["side"] != "aligned":
        return {"own": "CLIP's own text tower embeds captions.", "none": "Captions are not embedded."}[about["side"]]
    learned = (
        f"A text tower aligned to the locked image tower embeds captions: it learned from {about['captions']} captions "
        f"of {about['images']} training images, and stands in for CLIP's own "
        f"(weights {about['weights'][:12]})."
    )
    if (found := about["held_out"]) is None:
        return f"{learned} How well it does is not known: no validation caption is new to it."
    rates = [
        f"R@{k} {percent_text(found[f'r{k}'])} % [{percent_text(found[f'r{k}_low'])}, "
        f"{percent_text(found[f'r{k}_high'])}], by chance {percent_text(found[f'chance{k}'])} %"
        for k in (1, 5)
    ]
    return (
        f"{learned} Of {found['pool']} captions held out, it finds an image's own: {'; '.join(rates)} "
        f"({found['images']} validation images)."
    )


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())
