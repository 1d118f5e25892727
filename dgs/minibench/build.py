"""Make the benchmark folder from seeds: packed images, a CLIP, the generators' weights and one JSON of all numbers."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dgs.errors import UserError
from dgs.minibench import camera, captions, generators, jpeg, plan, pool, pretrain, scenes, train_generators

Bytes = NDArray[np.uint8]

VERSION = "1.0"
SHIPPED = Path(__file__).resolve().parents[2] / "sample"
WEIGHTS = "generators.safetensors"
META = "minibench.json"


def content_hash(records: Sequence[dict[str, Any]]) -> str:
    """sha256 over the sorted (id, sha256 of the image file, label, caption): independent of how rows are packed."""
    lines = sorted(
        json.dumps([r["id"], hashlib.sha256(r["image"]).hexdigest(), int(r["label"]), r["caption"]]) for r in records
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: its sums depend on how many share the work, and bytes must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(
    seed: int,
    rows: Sequence[plan.Row],
    models: dict[str, generators.Generator],
    workers: int = 1,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The finished records of one split's plan, in its order; "image" holds the JPEG file."""
    split = rows[0].split
    found, photographs = pool.shoot(seed, split, max(row.index for row in rows) + 1, workers, progress)
    images: dict[int, Bytes] = {}
    for maker in tqdm(dict.fromkeys(row.generator for row in rows), f"images of {split}", disable=not progress):
        places = [i for i, row in enumerate(rows) if row.generator == maker]
        index = [rows[i].index for i in places]
        made = photographs[index]
        if maker != plan.REAL:
            noise = [scenes.stream(seed, split, k, "generator") for k in index]
            made = generators.synthesise(maker, models[maker], made, [found[k] for k in index], noise)
        images.update(zip(places, made, strict=True))
    records = []
    for i, row in enumerate(rows):
        s = found[row.index]
        quality = jpeg.draw_quality(scenes.stream(seed, split, row.index, "jpeg"))
        records.append(
            {
                "id": f"{split}-{row.index:06d}-{row.generator}",
                "scene": s.id,
                "split": split,
                "generator": row.generator,
                "label": int(row.generator != plan.REAL),
                "caption": captions.caption(s.attributes, scenes.stream(seed, split, row.index, "caption")),
                **s.attributes.as_dict(),
                "image": jpeg.encode(images[i], quality),
            }
        )
    return records


def write(records: Sequence[dict[str, Any]], rows: Sequence[plan.Row], path: Path) -> None:
    """One parquet file: a row an image, one boolean column a set."""
    sets = sorted(set().union(*(row.sets for row in rows)))
    columns = {
        name: pa.array([r[name] for r in records], {"label": pa.int8(), "image": pa.binary()}.get(name, pa.string()))
        for name in records[0]
    }
    columns |= {name: pa.array([name in row.sets for row in rows], pa.bool_()) for name in sets}
    # JPEG files do not compress further, and a dictionary of them only doubles the file.
    packed = [name for name in columns if name not in ("image", "id")]
    pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=packed, row_group_size=512)


def _clip(
    mode: str, folder: Path, shipped: Path, recipe: pretrain.Recipe, scratch: Path | None, workers: int, progress: bool
) -> dict[str, Any]:
    if mode == "train":
        pretrain.pretrain(folder / "clip", recipe, scratch or folder / "pretraining", None, workers, progress)
        if scratch is None:
            shutil.rmtree(folder / "pretraining")
        return asdict(recipe)
    shutil.copytree(shipped / "clip", folder / "clip")
    return dict(_meta(shipped)["clip"])


def _generators(
    mode: str, folder: Path, shipped: Path, recipe: train_generators.Recipe, workers: int, progress: bool
) -> dict[str, Any]:
    if mode == "train":
        return asdict(recipe) | {"psnr": train_generators.train_all(folder / WEIGHTS, recipe, workers, progress)}
    shutil.copyfile(shipped / WEIGHTS, folder / WEIGHTS)
    return dict(_meta(shipped)["generators"])


def _meta(shipped: Path) -> dict[str, Any]:
    return dict(json.loads((shipped / META).read_text(encoding="utf-8")))


def build(
    out: Path,
    seed: int,
    rho: float | None = None,
    clip: Literal["shipped", "train"] = "shipped",
    shipped: Path = SHIPPED,
    weights: Literal["shipped", "train"] = "shipped",
    sizes: plan.Sizes | None = None,
    clip_recipe: pretrain.Recipe | None = None,
    generator_recipe: train_generators.Recipe | None = None,
    scratch: Path | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the benchmark of `seed` to `out` and return its `minibench.json`; another seed shares no scene with it.

    `rho`: one shortcut strength in place of 0.5, 0.75 and 0.9. `clip` and `weights` (the generators) are copied from
    `shipped` or trained anew; `scratch` keeps the CLIP's checkpoints, so that a broken run resumes. The folder
    appears whole or not at all.
    """
    if rho is not None and not 0.0 <= rho <= 1.0:
        raise UserError(f"rho should be a probability, 0 to 1. Found {rho}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} should not exist yet, or be an empty folder. Remove it or choose another --out.")
    needed = [name for name, mode in (("clip", clip), (WEIGHTS, weights), (META, clip)) if mode == "shipped"]
    missing = [name for name in needed if not (shipped / name).exists()]
    if missing:
        raise UserError(f"{shipped} should hold {', '.join(missing)} to reuse. Found none; train them instead.")
    sizes, rhos = sizes or plan.Sizes(), plan.RHOS if rho is None else (rho,)
    clip_recipe, generator_recipe = clip_recipe or pretrain.Recipe(), generator_recipe or train_generators.Recipe()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with _one_thread():
            made_generators = _generators(weights, folder, shipped, generator_recipe, workers, progress)
            made_clip = _clip(clip, folder, shipped, clip_recipe, scratch, workers, progress)
            models = generators.load(folder / WEIGHTS)
            everything: list[dict[str, Any]] = []
            counts: dict[str, dict[str, int]] = {}
            for split, rows in plan.rows(seed, sizes, rhos).items():
                records = make(seed, rows, models, workers, progress)
                write(records, rows, folder / f"images-{split}.parquet")
                everything += records
                makers = [row.generator for row in rows]
                counts[split] = {maker: makers.count(maker) for maker in dict.fromkeys(makers)}
        meta = _describe(seed, rhos, sizes, counts, content_hash(everything), made_clip, made_generators)
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        folder.chmod(0o755)  # mkdtemp makes private folders
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return meta


def _describe(
    seed: int,
    rhos: Sequence[float],
    sizes: plan.Sizes,
    counts: dict[str, dict[str, int]],
    digest: str,
    clip_recipe: dict[str, Any],
    generator_recipe: dict[str, Any],
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "seed": seed,
        "content_hash": digest,
        "rhos": list(rhos),
        "shortcut": {
            "attribute": "background",
            "fake_with_rho": list(plan.SHORTCUT),
            "fake_with_1_minus_rho": [b for b in scenes.BACKGROUNDS if b not in plan.SHORTCUT],
        },
        "seen": list(generators.SEEN),
        "unseen": list(generators.UNSEEN),
        "attributes": {name: list(values) for name, values in scenes.VOCABULARY.items()},
        "sizes": asdict(sizes),
        "counts": counts,
        "image": {"side": scenes.SIZE, "jpeg_quality": list(jpeg.QUALITY), "subsampling": "4:2:0"},
        "camera": {
            "blur": list(camera.BLUR),
            "exposure": list(camera.EXPOSURE),
            "electrons": list(camera.ELECTRONS),
            "read_noise": list(camera.READ_NOISE),
        },
        "clip": clip_recipe,
        "generators": generator_recipe,
        "packages": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow", "pyarrow")},
        },
    }
