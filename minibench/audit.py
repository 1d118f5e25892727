"""Audit a benchmark folder: is "fake" told by anything but what generators leave behind, and is anything there twice?

Every number comes from the folder alone. The same folder gives the same numbers on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from dgs.stats import Interval, percent_text, rounded_text
from minibench import clip, scenes
from minibench import splits as plan
from minibench import trivial_detectors as controls
from minibench.trivial_detectors import Bytes, Floats, Samples

DECIMALS = 6
CONTENT = ("shape", "colour", "background")
AMONG = 200  # captions that one retrieval chooses from
LEVEL = 0.05
BLOCK = 512  # images on each side of one block of distances: 50 MB of floats
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
TWIN = 0.01  # the quantile of twins above which a pair looks like a duplicate


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
    with controls.one_thread():
        digest = check_content_hash(found, meta)
        sets = training_sets(found["train"], rhos)
        model, preprocess = clip.load(folder / "clip")

        def embed(images: Bytes) -> Floats:
            return np.asarray(clip.embed_images(model, images, preprocess).numpy())

        bar = partial(tqdm, disable=not progress)
        packs = {name: controls.samples(table, embed) for name, table in bar(found.items(), "images")}
        fairest = sets[int(np.argmin([abs(_rho(name) - 0.5) for name in sets]))]
        queries = join([some for name, some in packs.items() if name != "train"])
        return {
            "seed": meta.get("seed"),
            "content_hash": digest,
            "counts": counts(found),
            "content": content(packs["test"], model),
            "statistics": statistics(packs, fairest),
            "detectors": {name: detectors(packs, name, progress) for name in sets},
            "near_duplicates": near_duplicates(packs["train"], queries) | identical(found),
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
        sets = {
            column: {label: int((table["label"][table[column]] == value).sum()) for value, label in _LABELS}
            for column in set_names(table)
        }
        makers = {str(maker): int(n) for maker, n in table["generator"].value_counts(sort=False).items()}
        result[name] = {"images": len(table), "scenes": table["scene"].nunique(), "generators": makers, "sets": sets}
    return result


_LABELS = ((0, "real"), (1, "fake"))


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
        {"measure": measure, "generator": maker, "points": round(100 * (seen[plan.REAL][measure].mean - value.mean), 4)}
        for maker, measures in seen.items()
        if maker != plan.REAL
        for measure, value in measures.items()
    ]
    return {
        "among": among,
        "makers": {maker: {name: _ends(value) for name, value in measures.items()} for maker, measures in seen.items()},
        "largest_drop": max(drops, key=lambda drop: float(str(drop["points"]))),
    }


def _seen(some: Samples, model: Any, among: int) -> dict[str, Interval]:
    table, embedded = some.table, torch.from_numpy(some.features)
    attributes = [scenes.Attributes(*row) for row in table[list(scenes.VOCABULARY)].itertuples(index=False)]
    measures = {
        name: wilson(clip.zero_shot(model, embedded, table[name].tolist(), name), len(table)) for name in CONTENT
    }
    # Retrieval leaves out what does not fill a group.
    asked = len(table) // among * among
    measures["retrieval"] = wilson(clip.recall(model, embedded, attributes, table["caption"].tolist(), among), asked)
    return measures


def wilson(share: float, count: int) -> Interval:
    """A share of `count` images with its 95 % score interval (Wilson 1927), which has a width at 0 and 1 too."""
    ends = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
    return Interval(share, float(ends.low), float(ends.high))


# --- statistics --------------------------------------------------------------------------------------------------

_NUMBERS: dict[str, tuple[controls.Feature, int]] = {
    "mean_red": (controls.mean_colour, 0),
    "mean_green": (controls.mean_colour, 1),
    "mean_blue": (controls.mean_colour, 2),
    "std_red": (controls.colour_spread, 0),
    "std_green": (controls.colour_spread, 1),
    "std_blue": (controls.colour_spread, 2),
    "file_size": (controls.file_size, 0),
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
        if name != plan.REAL:
            pairs[str(name)] = test.where(test.table["generator"].isin([plan.REAL, name]).to_numpy())
    compared = {name: _compare(some) for name, some in pairs.items()}
    values = [row["p"] for rows in compared.values() for row in rows.values()]
    return {
        "tests": len(values),
        "below_0.05": int(np.sum(np.array(values) < LEVEL)),
        "after_bonferroni": int(np.sum(np.array(values) * len(values) < LEVEL)),
        "compared": compared,
    }


def _compare(some: Samples) -> dict[str, dict[str, float]]:
    fake = some.labels == 1
    rows = {}
    columns = {feature: feature(some) for feature, _ in _NUMBERS.values()}
    for name, (feature, column) in _NUMBERS.items():
        values = columns[feature][:, column]
        rows[name] = _means(values, fake) | {"p": float(stats.ks_2samp(values[~fake], values[fake]).pvalue)}
    quality = controls.jpeg_quality(some)[:, 0]
    rows["jpeg_quality"] = _means(quality, fake) | {"p": chi_square(quality, fake)}
    for name in scenes.VOCABULARY:
        rows[name] = {"p": chi_square(some.table[name].to_numpy(), fake)}
    return rows


def _means(values: Floats, fake: NDArray[np.bool_]) -> dict[str, float]:
    real, made = values[~fake], values[fake]
    pooled = math.sqrt((real.var() + made.var()) / 2)
    difference = float(made.mean() - real.mean())
    return {
        "real": _round(real.mean()),
        "fake": _round(made.mean()),
        "difference": _round(difference / pooled) if pooled else 0.0,
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
    result = {}
    for detector, fit in tqdm(controls.DETECTORS.items(), f"controls of {name}", disable=not progress):
        verdict = controls.judge(fit, train, others, packs["test"])
        result[detector] = {
            "train": _round(verdict.train),
            **{pack: _round(value) for pack, value in verdict.others.items()},
            "test": {maker: _ends(value) for maker, value in verdict.generators.items()},
            "test_mean": _ends(verdict.mean),
        }
    return result


# --- near duplicates ---------------------------------------------------------------------------------------------


def join(some: Sequence[Samples]) -> Samples:
    """Samples one after the other."""
    return Samples(
        pd.concat([part.table for part in some], ignore_index=True),
        np.concatenate([part.images for part in some]),
        np.concatenate([part.features for part in some]),
    )


def near_duplicates(train: Samples, queries: Samples) -> dict[str, Any]:
    """How close the other splits' images come to a training image, in pixels (PSNR, dB) and for CLIP (cosine).

    What a duplicate looks like is read off the twins: scenes that training holds both real and fake. `pairs_above`
    counts (query, training image) pairs beyond the twins' 1 % quantile in PSNR, in cosine and in both; it is None
    without twins. Cosine alone says that two scenes share what captions can name. Memory: a float copy of two blocks.
    """
    twins = _twins(train)
    limits = {name: float(np.quantile(values, TWIN)) for name, values in twins.items() if len(values)}
    nearest = _Nearest(len(queries))
    above = dict.fromkeys((*twins, "both"), 0)
    for rows, columns, distance, cosine in _blocks(train, queries):
        nearest.update(rows, columns, distance, cosine)
        if limits:
            close = {"psnr": _psnr(distance) > limits["psnr"], "cosine": cosine > limits["cosine"]}
            close["both"] = close["psnr"] & close["cosine"]
            above = {name: above[name] + int(mask.sum()) for name, mask in close.items()}
    found = {"psnr": _psnr(nearest.distance), "cosine": nearest.cosine}
    closest = int(np.argmin(nearest.distance))
    return {
        "training_images": len(train),
        "queries": len(queries),
        "twins": {"pairs": len(twins["psnr"]), **{name: _quantiles(values) for name, values in twins.items()}},
        "nearest": {name: _quantiles(values) for name, values in found.items()},
        "closest": {
            "query": str(queries.table["id"][closest]),
            "training": str(train.table["id"][int(nearest.place[closest])]),
            "psnr": _round(found["psnr"][closest]),
        },
        "limits": {name: _round(value) for name, value in limits.items()} or None,
        "pairs_above": above if limits else None,
    }


@dataclass
class _Nearest:
    """Of every query: the least squared distance, the training image it belongs to, and the largest cosine."""

    count: int

    def __post_init__(self) -> None:
        self.distance = np.full(self.count, np.inf)
        self.place = np.zeros(self.count, np.int64)
        self.cosine = np.full(self.count, -1.0)

    def update(self, rows: slice, columns: slice, distance: Floats, cosine: Floats) -> None:
        best = distance.argmin(1)
        least = distance[np.arange(len(best)), best]
        closer = least < self.distance[rows]
        self.place[rows] = np.where(closer, best + columns.start, self.place[rows])
        self.distance[rows] = np.where(closer, least, self.distance[rows])
        self.cosine[rows] = np.maximum(self.cosine[rows], cosine.max(1))


def _twins(train: Samples) -> dict[str, Floats]:
    places = train.table.groupby("scene", sort=False).indices
    labels = train.labels
    pairs = [(a, b) for a, b in (rows for rows in places.values() if len(rows) == 2) if labels[a] != labels[b]]
    first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    distance = [float(((train.images[a].astype(np.float32) - train.images[b]) ** 2).mean()) for a, b in pairs]
    cosine = (train.features[first] * train.features[second]).sum(1)
    return {"psnr": _psnr(np.array(distance, np.float64)), "cosine": cosine}


def _blocks(train: Samples, queries: Samples) -> Iterator[tuple[slice, slice, Floats, Floats]]:
    """(rows of queries, rows of training, mean squared pixel difference, cosine) block by block."""
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, min(start + BLOCK, len(queries)))
        mine = _flat(queries.images[rows])
        for other in range(0, len(train), BLOCK):
            columns = slice(other, min(other + BLOCK, len(train)))
            theirs = _flat(train.images[columns])
            squares = (mine**2).sum(1)[:, None] + (theirs**2).sum(1)
            distance = (squares - 2 * (mine @ theirs.T)).clamp_min(0) / mine.shape[1]
            yield rows, columns, distance.numpy(), queries.features[rows] @ train.features[columns].T


def _flat(images: Bytes) -> torch.Tensor:
    # About the middle of the range, squares are small and their differences keep their digits.
    return torch.from_numpy(images).flatten(1).float() - 128


def _psnr(distance: Floats) -> Floats:
    """Mean squared differences in levels -> dB; at most 80, which is equal but for one level in a pixel or two."""
    return np.minimum(10 * np.log10(255**2 / np.maximum(distance, 1e-12)), 80.0)


def _quantiles(values: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    named = {f"q{round(100 * q):02d}": _round(np.quantile(values, q)) for q in QUANTILES}
    return {"min": _round(values.min()), **named, "max": _round(values.max())}


def identical(found: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Image files that occur more than once, byte for byte: {"identical_files": {"all", "across_packs"}}."""
    files = pd.concat([pd.DataFrame({"pack": name, "hash": _file_hashes(table)}) for name, table in found.items()])
    packs = files.groupby("hash")["pack"].agg(["size", "nunique"])
    return {
        "identical_files": {"all": int((packs["size"] > 1).sum()), "across_packs": int((packs["nunique"] > 1).sum())}
    }


# --- the report --------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """An audit's result as Markdown: a table a check, its takeaway above it. Per cent with 95 % intervals."""
    parts = [
        f"# Audit of the benchmark of seed {result['seed']}",
        f"Content hash `{result['content_hash']}`: the images, labels and captions are those that were made.",
        *_counts_text(result["counts"]),
        *_content_text(result["content"]),
        *_statistics_text(result["statistics"]),
    ]
    for name, rows in result["detectors"].items():
        parts += _detectors_text(name, rows)
    return "\n\n".join([*parts, *_duplicates_text(result["near_duplicates"])]) + "\n"


def _counts_text(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, pack in found.items():
        makers = ", ".join(f"{maker} {n}" for maker, n in pack["generators"].items())
        rows.append([name, str(pack["images"]), str(pack["scenes"]), makers])
    sets = [
        [pack, name, str(part["real"]), str(part["fake"])]
        for pack, some in found.items()
        for name, part in some["sets"].items()
    ]
    return [
        "## Counts",
        _table(["pack", "images", "scenes", "by maker"], rows),
        *([_table(["pack", "set", "real", "fake"], sets)] if sets else []),
    ]


def _content_text(found: dict[str, Any]) -> list[str]:
    drop = found["largest_drop"]
    named = {"retrieval": f"caption R@1 among {found['among']}"}
    measures = [*CONTENT, "retrieval"]
    rows = [[maker, *(_cell(values[name]) for name in measures)] for maker, values in found["makers"].items()]
    return [
        "## Content",
        "What a frozen CLIP names in real and re-synthesised test images (%). The largest loss to a generator is "
        f"{rounded_text(drop['points'])} points ({named.get(drop['measure'], drop['measure'])}, {drop['generator']}).",
        _table(["maker", *(named.get(name, name) for name in measures)], rows),
    ]


def _statistics_text(found: dict[str, Any]) -> list[str]:
    compared = found["compared"]
    names = list(next(iter(compared.values())))
    rows = [[name, *(_difference(some[name]) for some in compared.values())] for name in names]
    return [
        "## Simple statistics",
        f"Standardised mean difference, fake minus real, and p. {found['tests']} tests: {found['below_0.05']} below "
        f"0.05 ({rounded_text(LEVEL * found['tests'])} expected by chance were they independent; those of one column "
        f"or of the shared reals are not), {found['after_bonferroni']} after Bonferroni's correction.",
        _table(["", *compared], rows),
    ]


def _difference(row: dict[str, float]) -> str:
    p = f"p {row['p']:.2g}"
    return f"{rounded_text(row['difference'], 2, sign=True)}, {p}" if "difference" in row else p


def _detectors_text(name: str, found: dict[str, Any]) -> list[str]:
    columns = list(found)
    first = found[columns[0]]
    others = [key for key in first if key not in ("train", "test", "test_mean")]
    rows = [[key, *(percent_text(found[column][key]) for column in columns)] for key in ("train", *others)]
    rows += [[maker, *(_cell(found[column]["test"][maker]) for column in columns)] for maker in first["test"]]
    rows.append(["mean of test", *(_cell(found[column]["test_mean"]) for column in columns)])
    off = [c for c in columns if c in controls.CUES and not _holds_chance(found[c]["test_mean"])]
    finds = [c for c in columns if c in controls.TRACES]
    cues = (
        "Every control that should be at chance is: its mean over test generators is compatible with 50 %."
        if not off
        else f"Should be at chance over test generators and are not: {_listed(off, found)}."
    )
    return [
        f"## Trivial detectors trained on {name}",
        f"Balanced accuracy (%) at probability 0.5. {cues} What may see traces: {_listed(finds, found)}.",
        _table(["judged on", *columns], rows),
    ]


def _listed(names: Sequence[str], found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(found[name]['test_mean'])}" for name in names)


def _holds_chance(ends: dict[str, float]) -> bool:
    return ends["low"] <= 0.5 <= ends["high"]


def _duplicates_text(found: dict[str, Any]) -> list[str]:
    above, same, closest = found["pairs_above"], found["identical_files"], found["closest"]
    if above is None:
        verdict = "Training holds no scene both real and fake, so there is nothing to say what a duplicate looks like."
    else:
        verdict = (
            f"{above['psnr']} pairs are beyond the twins' 1 % quantile in PSNR, {above['cosine']} in cosine "
            f"(scenes that share what captions name), {above['both']} in both."
        )
    rows = [
        [f"{label} ({unit})", *_quantile_cells(some[key], 2 if key == "psnr" else 4)]
        for label, some in (("twins", found["twins"]), ("nearest in training", found["nearest"]))
        for key, unit in (("psnr", "dB"), ("cosine", "cosine"))
    ]
    return [
        "## Near duplicates",
        f"{found['queries']} images of the other packs against {found['training_images']} of training; "
        f"{found['twins']['pairs']} twins. {verdict} The closest pair is at {rounded_text(closest['psnr'])} dB "
        f"(`{closest['query']}`, `{closest['training']}`). Files that occur twice: {same['all']}, "
        f"in two packs: {same['across_packs']}.",
        _table(["", "min", *(f"{round(100 * q)} %" for q in QUANTILES), "max"], rows),
    ]


def _quantile_cells(values: dict[str, float] | None, digits: int) -> list[str]:
    return [rounded_text(v, digits) for v in values.values()] if values else ["–"] * (len(QUANTILES) + 2)


def _cell(ends: dict[str, float]) -> str:
    return f"{percent_text(ends['mean'])} [{percent_text(ends['low'])}, {percent_text(ends['high'])}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ends(interval: Interval) -> dict[str, float]:
    return {name: _round(value) for name, value in interval._asdict().items()}


def _round(value: Any) -> float:
    return round(float(value), DECIMALS)
