"""What every test may use: a clean environment and small folders of images."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from clips import settings, write_checkpoint, write_random_clip
from copies import ROOT, copy_repository, run
from filelock import FileLock
from PIL import Image

from dgs.data.manifest import ImageSource, build_manifest
from dgs.data.prepared import Prepared, save_prepared
from dgs.model.clip import Clip, load_clip
from dgs.model.text import encode_texts
from dgs.params import Params, load_params

hypothesis.settings.register_profile("dgs", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("dgs")

ImageTree = Callable[..., Path]
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("alpha", "beta"),
    "val": ("alpha", "beta"),
    "test": ("alpha", "beta", "gamma"),
}


def pytest_sessionfinish() -> None:
    """Keep a worker's coverage before it says that it is done: then xdist kills it after 10 s, saved or not.

    On a busy machine a worker takes longer to end (findings/xdist_coverage_lost.sh).
    """
    measured = sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None
    if measured is not None:
        measured.save()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` runs the notebooks with DGS_PROFILE and DGS_OUT set: a test must set what it needs itself."""
    for name in ("DGS_PROFILE", "DGS_OUT", "DGS_PARAMS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """A test that draws from torch's global generator draws the same each time, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP's folder."""
    return write_random_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Clip:
    """It, loaded for images of 32 px; a test that changes it must change it back."""
    return load_clip(settings(clip_folder).model, Path(), 32)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """20 training and 10 validation images; fakes carry a checkerboard, so there is something to learn."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    board = np.indices((32, 32)).sum(0) % 2 * 60
    rows = []
    for index in range(30):
        label = index % 2
        pixels = rng.integers(80, 110, 3) + rng.integers(0, 5, (32, 32, 3)) + label * board[..., None]
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
        (root / f"{index:02}.png").write_bytes(buffer.getvalue())
        split, sha = "train" if index < 20 else "val", hashlib.sha256(buffer.getvalue()).hexdigest()
        rows.append((f"{index:02}", split, "g", label, f"{index:02}.png", -1, sha))
    captions = rng.normal(size=(30, 24)).astype(np.float32)
    manifest = pd.DataFrame(rows, columns=["id", "split", "generator", "label", "file", "row", "sha256"])
    return Prepared(manifest, {"data_hash": "d", "rho": None}, captions, {}, None, ImageSource(root))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A checkpoint with adapters on that CLIP; to be read, not changed."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "seed-0", clip_folder)


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(whole, tmp_path / "seed-0")


def structured_image(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """A colour wave over a gradient with some noise: another picture for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = []
    for _ in range(3):
        fx, fy, phase = rng.uniform(1, 9), rng.uniform(1, 9), rng.uniform(0, 6)
        wave = np.sin(2 * np.pi * (fx * x + fy * y) + phase)
        channels.append(110 + 70 * wave + 60 * (x - y) + rng.normal(0, 6, (height, width)))
    return Image.fromarray(np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8))


def write_images(
    root: Path,
    splits: Mapping[str, tuple[str, ...]] = SPLITS,
    real: int = 3,
    fake: int = 3,
    level: str = "",
    seed: int = 0,
    size: tuple[int, int] = (40, 36),
) -> Path:
    """`<root>/<split>/<generator>/{0_real,1_fake}` folders; all images differ, JPEG and PNG alternate.

    splits: a split's generators. level: a class folder in between.
    """
    number = seed * 100_000
    for split, generators in splits.items():
        for generator in generators:
            for label, count in (("0_real", real), ("1_fake", fake)):
                folder = root / split / generator / level / label
                folder.mkdir(parents=True)
                for index in range(count):
                    number += 1
                    suffix = ".jpg" if number % 2 else ".png"
                    structured_image(number, *size).save(folder / f"{index:03d}{suffix}")
    return root


@pytest.fixture
def image_tree(tmp_path: Path) -> ImageTree:
    """`write_images` into a folder of the test's own, "images" unless `name` says otherwise."""
    return lambda *args, name="images", **more: write_images(tmp_path / name, *args, **more)


@pytest.fixture(scope="session")
def tiny() -> Params:
    """The profile of tests."""
    return load_params("tiny", ROOT)


@pytest.fixture(scope="session")
def tiny_prepared(tiny: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the prepare stage makes of it, captions embedded by the embedded CLIP."""
    folder = tmp_path_factory.mktemp("prepared")
    manifest = build_manifest(ROOT / tiny.data.root, tiny.data)
    texts = sorted(manifest["caption"].unique())
    embeddings = encode_texts(load_clip(tiny.model, ROOT, tiny.image_size), texts)
    captions = dict(zip(texts, embeddings, strict=True))
    save_prepared(folder, manifest, {"data_hash": "d", "rho": 0.9, "seen": []}, captions, {}, None, tiny)
    return folder


@pytest.fixture(scope="session")
def _copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pristine = copy_repository(tmp_path_factory.mktemp("pristine"), git=False)
    return pristine, shutil.copytree(pristine, tmp_path_factory.mktemp("copy") / "repo")


@pytest.fixture
def repo(_copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of this repository at the tiny size, without git, as the current folder; put back after the test."""
    pristine, copy = _copies
    monkeypatch.chdir(copy)
    yield copy
    for path in sorted(copy.rglob("*"), reverse=True):
        before = pristine / path.relative_to(copy)
        if not before.exists():
            path.rmdir() if path.is_dir() else path.unlink()
        elif path.is_file() and path.stat().st_mtime_ns != before.stat().st_mtime_ns:
            shutil.copy2(before, path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A copy of this repository at the tiny size in which `dvc repro` has run; to be looked at or copied, not changed.

    All workers of pytest-xdist wait for one run: the folder takes its name when it is whole.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "finished"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = copy_repository(tmp_path_factory.mktemp("unfinished"))
            done = run(made, "dvc", "repro")
            assert done.returncode == 0, done.stderr + done.stdout
            made.rename(folder)
    return folder
