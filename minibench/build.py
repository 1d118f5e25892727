"""Make the benchmark folder from seeds: packed images, a CLIP, the generators' weights and one JSON of all numbers."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dgs.data.manifest import PROMPTS, SEMANTICS, content_hash
from dgs.data.tree import MINIBENCH
from dgs.errors import UserError
from minibench import camera, captions, degradations, generators, pretrain, scenes, splits, train_generators
from minibench.camera import Bytes
from minibench.clip import one_thread

Source = Literal["shipped", "train"]  # of a network

VERSION = "2.1"
SHIPPED = Path(__file__).resolve().parents[1] / "sample"
WEIGHTS = "generators.safetensors"


def make(
    seed: int,
    rows: Sequence[splits.Row],
    models: dict[str, generators.Generator],
    workers: int = 1,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The finished records of one split's rows, in their order; "image" holds the JPEG file."""
    split = rows[0].split
    shot = sorted({row.index for row in rows})
    found, photographs = camera.photographs(seed, split, shot, camera.MARGIN, workers, progress)
    place = {index: i for i, index in enumerate(shot)}
    images: dict[int, Bytes] = {}
    for maker in tqdm(dict.fromkeys(row.generator for row in rows), f"images of {split}", disable=not progress):
        places = [i for i, row in enumerate(rows) if row.generator == maker]
        index = [rows[i].index for i in places]
        own = [place[k] for k in index]
        made = photographs[own]
        if maker != splits.REAL:
            noise = [scenes.stream(seed, split, k, "generator") for k in index]
            made = generators.synthesise(models[maker], made, [found[k] for k in own], noise)
        else:
            made = camera.crop(made)
        images.update(zip(places, made, strict=True))
    records = []
    for i, row in enumerate(rows):
        s = found[place[row.index]]
        told = scenes.stream(seed, split, scenes.elder(split, row.index), "caption")
        data = degradations.encode(images[i], degradations.draw_quality(scenes.stream(seed, split, row.index, "jpeg")))
        records.append(
            {
                "id": f"{split}-{row.index:06d}-{row.generator}",
                "scene": s.id,
                "split": split,
                "generator": row.generator,
                "label": int(row.generator != splits.REAL),
                "caption": captions.caption(s.attributes, told),
                **s.attributes._asdict(),
                "image": data,
            }
        )
    return records


def write(records: Sequence[dict[str, Any]], rows: Sequence[splits.Row], path: Path) -> None:
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
    mode: Source, folder: Path, shipped: Path, recipe: pretrain.Recipe, scratch: Path, workers: int, progress: bool
) -> dict[str, Any]:
    if mode == "train":
        pretrain.pretrain(folder / "clip", recipe, scratch, workers, progress)
        return asdict(recipe)
    shutil.copytree(shipped / "clip", folder / "clip")
    return dict(_meta(shipped)["clip"])


def _generators(
    mode: Source, folder: Path, shipped: Path, recipe: train_generators.Recipe, workers: int, progress: bool
) -> dict[str, Any]:
    if mode == "train":
        return asdict(recipe) | {"psnr": train_generators.train_all(folder / WEIGHTS, recipe, workers, progress)}
    shutil.copyfile(shipped / WEIGHTS, folder / WEIGHTS)
    return dict(_meta(shipped)["generators"])


def _meta(shipped: Path) -> dict[str, Any]:
    return dict(json.loads((shipped / MINIBENCH).read_text(encoding="utf-8")))


def _check_seen(seen: Sequence[str], training: Literal["fresh", "shipped"]) -> None:
    unknown = [name for name in seen if name not in generators.NAMES]
    if unknown or not seen or len(set(seen)) < len(seen):
        raise UserError(
            f"Expected generators to train on, each once, found {', '.join(unknown or seen) or 'none'}. "
            f"Known: {', '.join(generators.NAMES)}."
        )
    if len(seen) == len(generators.NAMES):
        raise UserError("Expected a generator that training does not see, found all among --seen. Leave one out.")
    if training == "shipped" and set(seen) != set(generators.SEEN):
        raise UserError("The shipped training sets have their own fakes. Leave out --seen, or make training sets anew.")


def build(
    out: Path,
    seed: int,
    rho: float | None = None,
    clip: Source = "shipped",
    shipped: Path = SHIPPED,
    weights: Source = "shipped",
    training: Literal["fresh", "shipped"] = "fresh",
    sizes: splits.Sizes | None = None,
    clip_recipe: pretrain.Recipe | None = None,
    generator_recipe: train_generators.Recipe | None = None,
    seen: Sequence[str] = generators.SEEN,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the benchmark of `seed` to `out` and return its `minibench.json`; another seed shares no scene with it.

    `rho`: one shortcut strength in place of 0.5, 0.75 and 0.9. `clip` and `weights` (the generators) are copied from
    `shipped` or trained anew. `training="shipped"`: only the test set is made, the other images are those of
    `shipped`, so that a method trained on them meets a test set nobody has seen. `seen`: the generators of training
    fakes, instead of the benchmark's two; the others are the unseen ones. The folder appears whole or not at
    all; a broken pre-training goes on where it stopped when the same call comes again.
    """
    if rho is not None and not 0.0 <= rho <= 1.0:
        raise UserError(f"rho should be a probability, 0 to 1. Found {rho}.")
    if rho is not None and training == "shipped":
        raise UserError("The shipped training sets have their own rho. Leave out --rho, or make training sets anew.")
    _check_seen(seen, training)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} should not exist yet, or be an empty folder. Remove it or choose another --out.")
    sources = {"clip": clip, WEIGHTS: weights, MINIBENCH: training if "shipped" not in (clip, weights) else "shipped"}
    missing = [name for name, mode in sources.items() if mode == "shipped" and not (shipped / name).exists()]
    if missing:
        raise UserError(f"{shipped} should hold {', '.join(missing)} to reuse. Found none; train them instead.")
    if training == "shipped" and seed == _meta(shipped)["seed"]:
        raise UserError(f"Seed {seed} is that of {shipped}: its test set would not be fresh. Choose another --seed.")
    sizes, rhos = sizes or splits.Sizes(), splits.RHOS if rho is None else (rho,)
    clip_recipe, generator_recipe = clip_recipe or pretrain.Recipe(), generator_recipe or train_generators.Recipe()
    scratch = out.parent / f".{out.name}-pretraining"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"Cannot make {out} ({error.strerror or error}). Choose another --out.") from None
    try:
        with one_thread():
            made_generators = _generators(weights, folder, shipped, generator_recipe, workers, progress)
            made_clip = _clip(clip, folder, shipped, clip_recipe, scratch, workers, progress)
            models = generators.load(folder / WEIGHTS)
            images: list[pd.DataFrame] = []
            for split, rows in splits.rows(seed, sizes, rhos, seen).items():
                pack = folder / f"images-{split}.parquet"
                if training == "shipped" and split != "test":
                    shutil.copyfile(shipped / pack.name, pack)
                else:
                    write(make(seed, rows, models, workers, progress), rows, pack)
                images.append(_listed(pack))
        old = _meta(shipped) if training == "shipped" else None
        meta = {
            "version": VERSION,
            "seed": seed,
            "training_seed": old["training_seed"] if old else seed,
            "content_hash": content_hash(pd.concat(images)),
            "rhos": old["rhos"] if old else list(rhos),
            "sizes": {**old["sizes"], "test": sizes.test} if old else asdict(sizes),
            "counts": {some["split"].iloc[0]: some["generator"].value_counts(sort=False).to_dict() for some in images},
            **_described(seen),
            "clip": made_clip,
            "generators": made_generators,
        }
        (folder / MINIBENCH).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        prompts = {attribute: captions.prompts(attribute) for attribute in SEMANTICS}
        (folder / PROMPTS).write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
        folder.chmod(0o755)  # mkdtemp makes private folders
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    return meta


def _listed(pack: Path) -> pd.DataFrame:
    """What the content hash and the counts need of a pack, a row an image."""
    table = pq.read_table(pack, columns=["id", "split", "generator", "label", "caption", "image"])
    hashes = [hashlib.sha256(image.as_py()).hexdigest() for image in table.column("image")]
    return table.drop_columns(["image"]).to_pandas().assign(sha256=hashes)


def _described(seen: Sequence[str]) -> dict[str, Any]:
    """What does not depend on the seed."""
    return {
        "shortcuts": {
            name: {
                "attribute": shortcut.attribute,
                "fake_with_rho": list(shortcut.fake),
                "fake_with_1_minus_rho": list(shortcut.real),
            }
            for name, shortcut in splits.SHORTCUTS.items()
        },
        "seen": list(seen),
        "unseen": [name for name in generators.NAMES if name not in seen],
        "attributes": {name: list(values) for name, values in scenes.VOCABULARY.items()},
        "image": {"side": scenes.SIZE, "jpeg_quality": list(degradations.QUALITY), "subsampling": "4:2:0"},
        "camera": {
            "blur": list(camera.BLUR),
            "exposure": list(camera.EXPOSURE),
            "electrons": list(camera.ELECTRONS),
            "read_noise": list(camera.READ_NOISE),
        },
        "packages": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow", "pyarrow")},
        },
    }
