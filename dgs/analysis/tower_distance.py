"""How far two towers are apart: features of the same images, each tower with its own input size and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dgs.analysis.forgetting import linear_cka
from dgs.data.images import UnreadableImage, decode, files_under, fit, is_image, read
from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.clip_source import find_clip
from dgs.params import merged_params, validate

Array = NDArray[np.float64]
BATCH = 16


def compare_towers(a: str, b: str, images: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Features of two frozen towers on a folder of images, as scored: shorter side scaled, centre cropped.

    Args:
        a, b: folders as model.clip takes them, or names with their weights, NAME:TAG, as timm/NAME:hub.
        say: told of every image that is left out.

    Returns:
        {"a", "b", "images", "left_out"} and what `distance` has.

    Raises:
        UserError: no image that can be read, neither a folder nor NAME:TAG; as `load_clip`.
    """
    towers = [_load(name) for name in (a, b)]
    names = [file for file in files_under([images]) if is_image(file)]
    parts: list[list[Array]] = []
    for start in tqdm(range(0, len(names), BATCH), unit="batch", disable=len(names) <= BATCH):
        if pictures := list(_decoded(names[start : start + BATCH], say)):
            parts.append([_features(backbone, side, pictures) for backbone, side in towers])
    if not parts:
        raise UserError(f"Expected images in {images}, found none that can be read. Name a folder of images.")
    first, second = (np.concatenate(each) for each in zip(*parts, strict=True))
    counts = {"images": len(first), "left_out": len(names) - len(first)}
    return {"a": a, "b": b, **counts, **distance(first, second)}


def distance(a: Array, b: Array) -> dict[str, Any]:
    """How far (N, D) features are apart, row by row and as a whole.

    Returns:
        {"cosine": {"mean", "min"}, "relative_difference": {"mean", "max"}, "cka"}: |a - b| / |a|; linear CKA, None for
        one image. Of towers with different D the first two are None.
    """
    rows: dict[str, Any] = {"cosine": None, "relative_difference": None}
    if a.shape == b.shape:
        norm = np.linalg.norm(a, axis=1)
        cosine = (a * b).sum(axis=1) / (norm * np.linalg.norm(b, axis=1))
        away = np.linalg.norm(a - b, axis=1) / norm
        rows["cosine"] = {"mean": float(cosine.mean()), "min": float(cosine.min())}
        rows["relative_difference"] = {"mean": float(away.mean()), "max": float(away.max())}
    return {**rows, "cka": linear_cka(a, b) if len(a) > 1 else None}


def described(found: dict[str, Any]) -> str:
    """`compare_towers`'s numbers as a line for people."""
    parts = []
    if found["cosine"] is not None:
        cosine, away = found["cosine"], found["relative_difference"]
        parts.append(f"cosine {cosine['mean']:.4f} on average, {cosine['min']:.4f} at least")
        parts.append(f"difference {100 * away['mean']:.1f} % on average, {100 * away['max']:.1f} % at most")
    if found["cka"] is not None:
        parts.append(f"CKA {found['cka']:.4f}")
    return f"{found['a']} and {found['b']} on {found['images']} images: {'; '.join(parts) or 'nothing to compare'}"


def _decoded(files: Iterable[Path], say: Callable[[str], None]) -> Iterator[NDArray[np.uint8]]:
    for file in files:
        try:
            yield decode(read(file), str(file))
        except UnreadableImage as error:
            say(str(error))


def _load(tower: str) -> tuple[Backbone, int]:
    """A frozen tower, and the side of what it sees."""
    name, _, tag = (tower, "", "") if Path(tower).is_dir() else tower.rpartition(":")
    if not name:
        raise UserError(f"Expected a tower's folder, or NAME:TAG as ViT-B-16-quickgelu:openai, found '{tower}'.")
    asked = {"clip": name, "pretrained": tag or None, "normalize": "clip", "precision": "fp32"}
    params = validate(merged_params()).model.model_copy(update=asked)
    side = find_clip(params, Path()).side
    return Backbone(load_clip(params, Path(), side, text=False)).eval(), side


@torch.no_grad()
def _features(backbone: Backbone, side: int, pictures: list[NDArray[np.uint8]]) -> Array:
    views = np.stack([fit(picture, side, "resize") for picture in pictures])
    return backbone(torch.from_numpy(views).permute(0, 3, 1, 2)).double().numpy()
