"""Audit a benchmark folder: is "fake" told by anything but what generators leave behind, and is anything there twice?

Every number comes from the folder alone. The same folder gives the same numbers on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from dgs.data.manifest import content_hash, training_set
from dgs.data.tree import MINIBENCH
from dgs.errors import UserError
from dgs.stats import Interval, rounded, share_interval
from minibench import clip, scenes, trivial_detectors
from minibench.near_duplicates import near_duplicates
from minibench.splits import REAL
from minibench.trivial_detectors import Bytes, Floats, Samples, ends

CONTENT = ("shape", "colour", "background")
AMONG = 200  # captions that one retrieval chooses from
LEVEL = 0.05


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The packs of a benchmark by the name of their file: train first, test last.

    Raises UserError where the folder has no training or no test pack.
    """
    paths = {path.stem.removeprefix("images-"): path for path in sorted(folder.glob("images-*.parquet"))}
    missing = [f"images-{name}.parquet" for name in ("train", "test") if name not in paths]
    if missing:
        raise UserError(f"Expected {' and '.join(missing)} in {folder}, found none. Give the folder of a benchmark.")
    order = sorted(paths, key=lambda name: (name == "test", name != "train", name))
    return {name: pd.read_parquet(paths[name]) for name in order}


def audit(folder: Path, rhos: Sequence[float] = (0.5, 0.9), progress: bool = False) -> dict[str, Any]:
    """All checks of a benchmark folder as plain JSON types; accuracies and shares are fractions.

    Sections: content_hash, counts, content, statistics, detectors (of every training set whose name ends with one of
    `rhos`) and near_duplicates. About a minute for each training set of 3,000, on one core. Raises UserError where the
    folder is incomplete, was changed after it was made, or has no training set of a rho.
    """
    found = tables(folder)
    meta = _meta(folder)
    with clip.one_thread():
        digest = check_content_hash(found, meta)
        sets = training_sets(found["train"], rhos)
        model, preprocess = clip.load(folder / "clip")

        def embed(images: Bytes) -> Floats:
            return np.asarray(clip.embed_images(model, images, preprocess).numpy())

        bar = partial(tqdm, disable=not progress)
        packs = {name: trivial_detectors.samples(table, embed) for name, table in bar(found.items(), "images")}
        fairest = sets[int(np.argmin([abs(_rho(name) - 0.5) for name in sets]))]
        queries = trivial_detectors.join([some for name, some in packs.items() if name != "train"])
        return {
            "seed": meta.get("seed"),
            "content_hash": digest,
            "counts": counts(found),
            "content": content(packs["test"], model),
            "statistics": statistics(packs, fairest),
            "detectors": {name: detectors(packs, name, progress) for name in sets},
            "near_duplicates": near_duplicates(packs["train"], queries) | identical_files(found),
        }


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / MINIBENCH
    if not path.exists():
        raise UserError(f"Expected {MINIBENCH} in {folder}, found none. Give the folder of a benchmark.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def check_content_hash(found: dict[str, pd.DataFrame], meta: dict[str, Any]) -> str:
    """The content hash of all packs. Raises UserError where it is not the one in the folder's JSON."""
    hashed = [table[["id", "label", "caption"]].assign(sha256=_file_hashes(table)) for table in found.values()]
    digest = content_hash(pd.concat(hashed))
    if digest != meta.get("content_hash"):
        raise UserError(
            f"Expected the content hash {meta.get('content_hash')} of {MINIBENCH}, found {digest}. "
            "The images, labels or captions are not those that were made: build the benchmark anew."
        )
    return digest


def _file_hashes(table: pd.DataFrame) -> list[str]:
    return [hashlib.sha256(file).hexdigest() for file in table["image"]]


def training_sets(train: pd.DataFrame, rhos: Sequence[float]) -> list[str]:
    """Names of the training sets of `rhos`, of any shortcut. Raises UserError for a rho that has none."""
    known = set_names(train)
    chosen: list[str] = []
    for rho in rhos:
        wanted = training_set(rho)
        names = [name for name in known if name.endswith(wanted)]
        if not names:
            raise UserError(f"Expected a training set {wanted}, found {', '.join(known)}. Name one of these.")
        chosen += names
    return chosen


def set_names(table: pd.DataFrame) -> list[str]:
    """The columns that say which rows belong to a set."""
    return [str(name) for name in table.columns if table[name].dtype == bool]


def _rho(name: str) -> float:
    return float(name.rpartition("_")[2])


def counts(found: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Images of each pack by generator, and of each set by label."""
    result: dict[str, Any] = {}
    for name, table in found.items():
        fake = table["label"] == 1
        sets = {
            column: {"real": int((table[column] & ~fake).sum()), "fake": int((table[column] & fake).sum())}
            for column in set_names(table)
        }
        makers = {str(maker): int(n) for maker, n in table["generator"].value_counts(sort=False).items()}
        result[name] = {"images": len(table), "scenes": table["scene"].nunique(), "generators": makers, "sets": sets}
    return result


# --- content -----------------------------------------------------------------------------------------------------


def content(test: Samples, model: Any) -> dict[str, Any]:
    """What the frozen CLIP still sees in the images of each maker, with Wilson intervals over images.

    {"among": captions a retrieval chooses from, "makers": {maker: {measure: {mean, low, high}}}, "largest_drop": the
    measure and generator that fall furthest behind the reals}.
    """
    makers = test.table["generator"].unique()
    among = min(AMONG, *(int(n) for n in test.table["generator"].value_counts()))
    seen = {
        str(maker): _seen(test.where((test.table["generator"] == maker).to_numpy()), model, among) for maker in makers
    }
    drops = [
        {"measure": measure, "generator": maker, "points": round(100 * (seen[REAL][measure].mean - value.mean), 4)}
        for maker, measures in seen.items()
        if maker != REAL
        for measure, value in measures.items()
    ]
    return {
        "among": among,
        "makers": {maker: {name: ends(value) for name, value in measures.items()} for maker, measures in seen.items()},
        "largest_drop": max(drops, key=lambda drop: float(str(drop["points"]))),
    }


def _seen(some: Samples, model: Any, among: int) -> dict[str, Interval]:
    table, embedded = some.table, torch.from_numpy(some.features)
    attributes = [scenes.Attributes(*row) for row in table[list(scenes.VOCABULARY)].itertuples(index=False)]
    shares = {name: (clip.zero_shot(model, embedded, table[name].tolist(), name), len(table)) for name in CONTENT}
    # Retrieval leaves out what does not fill a group.
    asked = len(table) // among * among
    shares["retrieval"] = clip.recall(model, embedded, attributes, table["caption"].tolist(), among), asked
    return {name: share_interval(round(share * of), of) for name, (share, of) in shares.items()}


# --- statistics --------------------------------------------------------------------------------------------------

_NUMBERS = {
    ("mean_red", "mean_green", "mean_blue"): trivial_detectors.mean_colour,
    ("std_red", "std_green", "std_blue"): trivial_detectors.colour_spread,
    ("file_size",): trivial_detectors.file_size,
}


def statistics(packs: dict[str, Samples], fairest: str) -> dict[str, Any]:
    """Real against fake in the training set `fairest`, and against each generator in test: differences and p-values.

    Numbers: standardised mean difference (fake minus real, over the pooled deviation) and the two-sample
    Kolmogorov-Smirnov test. Categories (JPEG quality, what captions name): chi-square test. `tests` is how many
    p-values there are: by chance 5 % of them fall below 0.05, and p * tests is Bonferroni's bound.
    """
    train, test = packs["train"], packs["test"]
    pairs = {fairest: train.where(train.table[fairest].to_numpy())}
    for name in test.table["generator"].unique():
        if name != REAL:
            pairs[str(name)] = test.where(test.table["generator"].isin([REAL, name]).to_numpy())
    compared = {name: _compare(some) for name, some in pairs.items()}
    values = [row["p"] for rows in compared.values() for row in rows.values()]
    return {
        "tests": len(values),
        "below_0.05": int(np.sum(np.array(values) < LEVEL)),
        "after_bonferroni": int(np.sum(np.array(values) * len(values) < LEVEL)),
        "compared": compared,
    }


def _compare(some: Samples) -> dict[str, dict[str, Any]]:
    fake = some.labels == 1
    rows = {}
    for names, feature in _NUMBERS.items():
        for name, values in zip(names, feature(some).T, strict=True):
            rows[name] = _means(values, fake) | {"p": float(stats.ks_2samp(values[~fake], values[fake]).pvalue)}
    quality = trivial_detectors.jpeg_quality(some)[:, 0]
    rows["jpeg_quality"] = _means(quality, fake) | {"p": chi_square(quality, fake)}
    for name in scenes.VOCABULARY:
        rows[name] = {"p": chi_square(some.table[name].to_numpy(), fake)}
    return rows


def _means(values: Floats, fake: NDArray[np.bool_]) -> dict[str, Any]:
    real, made = values[~fake], values[fake]
    pooled = math.sqrt((real.var() + made.var()) / 2)
    difference = float(made.mean() - real.mean())
    return {
        "real": rounded(real.mean()),
        "fake": rounded(made.mean()),
        "difference": rounded(difference / pooled) if pooled else 0.0,
    }


def chi_square(values: NDArray[Any], fake: NDArray[np.bool_]) -> float:
    """The p-value of values (N,) being independent of `fake` (N,); 1 where there is but one value."""
    table = pd.crosstab(values, fake).to_numpy()
    return float(stats.chi2_contingency(table).pvalue) if len(table) > 1 else 1.0


# --- detectors ---------------------------------------------------------------------------------------------------


def detectors(packs: dict[str, Samples], name: str, progress: bool = False) -> dict[str, Any]:
    """Balanced accuracy of every control that learns from the training set `name`.

    Judged on that set, on the set of the same name of every pack between train and test (a pack without sets is taken
    whole), and on each test generator.
    """
    train = packs["train"].where(packs["train"].table[name].to_numpy())
    others = {}
    for pack, some in packs.items():
        if pack not in ("train", "test"):
            if name in some.table.columns:
                others[pack] = some.where(some.table[name].to_numpy())
            elif not set_names(some.table):
                others[pack] = some
    controls = tqdm(trivial_detectors.DETECTORS.items(), f"controls of {name}", disable=not progress)
    return {detector: trivial_detectors.judge(fit, train, others, packs["test"]) for detector, fit in controls}


def identical_files(found: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Image files that occur more than once, byte for byte: {"identical_files": {"all", "across_packs"}}."""
    files = pd.concat([pd.DataFrame({"pack": name, "hash": _file_hashes(table)}) for name, table in found.items()])
    packs = files.groupby("hash")["pack"].agg(["size", "nunique"])
    return {
        "identical_files": {"all": int((packs["size"] > 1).sum()), "across_packs": int((packs["nunique"] > 1).sum())}
    }
