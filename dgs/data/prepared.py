"""What the prepare stage leaves for the later ones: manifest, caption embeddings, prompts, patch indices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from dgs.data.manifest import ImageSource, open_image
from dgs.data.patches import patch_entropy, select_indices
from dgs.errors import UserError
from dgs.params import Params, validate

PREPARED_WITH = {
    "data": None,
    "patches": None,
    "model": {"lora", "levels", "precision"},
}  # parameter groups that are settled by preparing


@dataclass(frozen=True)
class Prepared:
    """The prepare stage's output, opened.

    manifest: one row an image.
    info: data hash, counts, rho, seen generators, and the parameters it was prepared with (data.json).
    caption_embeddings: (N, D) float32, row i belongs to manifest row i; unnormalised, from the frozen text tower.
    prompts: {attribute: (values, (C, D) float32 unit-length prompt embeddings)}; empty where the data has none.
    patches: {sha256: kept patch indices}, None where patch selection is off.
    """

    manifest: pd.DataFrame
    info: dict[str, Any]
    caption_embeddings: NDArray[np.float32]
    prompts: dict[str, tuple[list[str], NDArray[np.float32]]]
    patches: dict[str, NDArray[np.int32]] | None
    source: ImageSource

    def split(self, name: str) -> pd.DataFrame:
        """Rows of one split; the index still points into `caption_embeddings`."""
        return self.manifest[self.manifest["split"] == name]

    def adopt(self, params: Params) -> Params:
        """`params` with the data, patches and CLIP that were prepared: by hand, prepare may have been given others."""
        content = params.model_dump()
        for group, settings in self.info["params"].items():
            content[group] |= settings
        return validate(content, "data.json")

    def kept(self, params: Params) -> list[str]:
        """What `adopt` changes in `params`, a sentence each; nothing in a pipeline, where both are the same."""
        given = params.model_dump()
        return [
            f"{group}.{name} stays {value!r}, as prepared, not {given[group][name]!r}: to change it, prepare again."
            for group, settings in self.info["params"].items()
            for name, value in settings.items()
            if given[group][name] != value
        ]


def compute_patches(manifest: pd.DataFrame, source: ImageSource, params: Params) -> dict[str, NDArray[np.int32]]:
    """The kept patch indices of every distinct image: entropies are computed here once, training does no FFT."""
    indices: dict[str, NDArray[np.int32]] = {}
    rows = manifest.drop_duplicates("sha256")
    for file, row, sha in tqdm(
        zip(rows["file"], rows["row"], rows["sha256"], strict=True), total=len(rows), desc="patch entropy", unit="image"
    ):
        try:
            image = open_image(source, file, row)
            indices[sha] = select_indices(patch_entropy(image, params.patches.size), params.patches.count)
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
    texts = sorted(captions)
    manifest = manifest.assign(caption_index=manifest["caption"].map({text: i for i, text in enumerate(texts)}))
    manifest.to_parquet(folder / "manifest.parquet", index=False, compression="zstd")
    save_file({"captions": np.stack([captions[text] for text in texts])}, folder / "captions.safetensors")
    (folder / "prompts.json").write_text(json.dumps({name: values for name, (values, _) in prompts.items()}, indent=1))
    if prompts:
        # safetensors writes an array's memory as it lies: a transposed one would come back scrambled.
        save_file(
            {name: np.ascontiguousarray(embedding) for name, (_, embedding) in prompts.items()},
            folder / "prompts.safetensors",
        )
    if patches is not None:
        width = max(len(kept) for kept in patches.values())
        table = np.full((len(patches), width), -1, dtype=np.int32)  # -1 pads images with fewer patches
        for line, sha in zip(table, sorted(patches), strict=True):
            line[: len(patches[sha])] = patches[sha]
        save_file({"indices": table}, folder / "patches.safetensors")
    settled = {group: getattr(params, group).model_dump(exclude=without) for group, without in PREPARED_WITH.items()}
    (folder / "data.json").write_text(json.dumps({**info, "params": settled}, indent=1, sort_keys=True) + "\n")


def load_prepared(folder: Path, root: Path) -> Prepared:
    """Open a prepare stage's output.

    Args:
        folder: build/<profile>/prepare.
        root: the repository, which a relative data.root is relative to.
    """
    info = json.loads((folder / "data.json").read_text())
    manifest = pd.read_parquet(folder / "manifest.parquet")
    embeddings = load_file(folder / "captions.safetensors")["captions"]
    names = json.loads((folder / "prompts.json").read_text())
    prompts = load_file(folder / "prompts.safetensors") if names else {}
    patches = None
    if (folder / "patches.safetensors").exists():
        table = load_file(folder / "patches.safetensors")["indices"]
        patches = {sha: line[line >= 0] for sha, line in zip(sorted(manifest["sha256"].unique()), table, strict=True)}
    return Prepared(
        manifest=manifest,
        info=info,
        caption_embeddings=embeddings[manifest["caption_index"].to_numpy()],
        prompts={name: (values, prompts[name]) for name, values in names.items()},
        patches=patches,
        source=ImageSource((root / info["params"]["data"]["root"]).resolve()),
    )
