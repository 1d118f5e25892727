"""The paper's suites as published, at reduced size; and what a run makes of folders of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from conftest import structured_image

from dgs.data.manifest import ImageSource, build_manifest, data_hash
from dgs.data.prepared import Prepared, compute_patches, save_prepared
from dgs.data.suites import SUITES, UNIVERSAL_FAKE_DETECT, Suite
from dgs.model.checkpoint import save_checkpoint
from dgs.model.clip import Clip
from dgs.model.methods.registry import get_method
from dgs.model.text import encode_texts
from dgs.model.train import Trained, train
from dgs.params import Params


def put(folder: Path, seeds: Iterable[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        structured_image(seed, 16, 12).save(folder / f"{seed:05d}.png")


def grow(folder: Path, suite: Suite, real: int = 1, fake: int = 1, classes: tuple[str, ...] = ("car", "cat")) -> Path:
    """A suite as published, at reduced size; where it has class folders, every class has that many images."""
    seed = 1000 * (1 + SUITES.index(suite))
    for generator in suite.generators:
        for level in classes if generator.classes else ("",):
            for label, count in (("0_real", real), ("1_fake", fake)):
                put(folder / generator.folder / level / label, range(seed, seed + count))
                seed += count
    return folder


def grow_with_pools(folder: Path, real: int = 2, fake: int = 1) -> Path:
    """UniversalFakeDetect as first published: fakes alone, and photographs in two folders of their own."""
    for number, generator in enumerate(UNIVERSAL_FAKE_DETECT.generators):
        put(folder / generator.folder / "1_fake", range(100 * number, 100 * number + fake))
    put(folder / "laion/0_real", range(900, 900 + real))
    put(folder / "imagenet/0_real", range(800, 800 + real + 1))
    return folder


def prepare(folder: Path, params: Params, clip: Clip, seen: Iterable[str]) -> Path:
    """What the prepare stage makes of the images in `params.data.root`; captions come from folders' names."""
    folder.mkdir(parents=True)
    manifest = build_manifest(Path(params.data.root), params.data)
    patches = compute_patches(manifest, ImageSource(Path(params.data.root)), params) if params.patches.enabled else None
    texts = sorted(manifest["caption"].unique())
    captions = dict(zip(texts, encode_texts(clip, texts), strict=True))
    info = {"data_hash": data_hash(manifest), "rho": None, "seen": list(seen)}
    save_prepared(folder, manifest, info, captions, {}, patches, params)
    return folder


def train_into(folder: Path, method: str, clip: Clip, prepared: Prepared, params: Params, seed: int = 0) -> Path:
    """A method's checkpoint."""

    def keep(run: Trained) -> None:
        decided = (run.thresholds, prepared.info["training_hash"])
        save_checkpoint(folder, run.classifier, params, method, seed, *decided)

    train(get_method(method), clip, prepared, params, seed, torch.device("cpu"), keep)
    return folder
