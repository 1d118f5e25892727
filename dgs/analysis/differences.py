"""Differences of methods to a baseline, measure by measure: what is shown, and how sure each is.

Shown is what `dgs.crossed.crossed_interval` of image-level scores excludes zero of. The table is differences.csv; the
report's section and the forest plots are pivots of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from dgs.analysis.metrics import headline, metrics_of, native_rows, rows_by_generator, unique
from dgs.crossed import BLOCKS, RATES, Crossed, crossed_interval, holm, sign_flip_p
from dgs.stats import DECIMALS, Interval, seed_interval

BASELINES = ("lora", "probe")  # the first that was run is what all other methods are compared with
COMPARED = {key: metric for key, metric in metrics_of("run", "forgetting").items() if metric.label}
GROUPS = {False: "unseen", True: "seen"}  # of generators
UNKNOWN = Crossed(Interval(np.nan, np.nan, np.nan), np.nan, np.nan)
COLUMNS = [
    "method", "other", "rate", "pictures", "mean", "low", "high", "p", "p_holm", "low_seeds", "high_seeds",
    "p_sign_flip", "n_seeds", "n_generators",
]  # fmt: skip


def baseline_of(methods: Collection[str]) -> str | None:
    """What the methods of a profile are compared with; None where neither lora nor the probe was run."""
    return next((name for name in BASELINES if name in methods), None)


def rate_cells(scores: pd.DataFrame, rate: str, generators: Sequence[str]) -> dict[tuple[str, int], np.ndarray]:
    """A rate of each run, (method, seed): (generators, 1 + blocks), of all images, then without each block of them.

    `scores`: native test rows. A jackknife block is every so-manieth image of each generator and label, by id: a
    photograph is in one block for all generators that share it, and so are fakes of one place in their generators'
    lists, which in the embedded benchmark show the same things. With a column "group" each group is a block: images
    that share one, as a prompt, are no two facts. Without blocks where a generator has one image (or group) of a label:
    left out, it would leave none.
    """
    cells: dict[tuple[str, int], np.ndarray] = {}
    for _, run in scores.sort_values("id", kind="stable").groupby(["method", "seed"], sort=False):
        parts = dict(rows_by_generator(run))
        rows = [[own[own["label"] == label] for label in (0, 1)] for own in (parts[name] for name in generators)]
        sides = [[side["logit"].to_numpy(np.float64) for side in pair] for pair in rows]
        blocks, of = _blocks(rows)
        with np.errstate(invalid="ignore"):  # of no images
            rates = [RATES[rate](pair[0], pair[1], own[0], own[1], blocks) for pair, own in zip(sides, of, strict=True)]
        every = np.array(rates)
        cells[str(run["method"].iloc[0]), int(run["seed"].iloc[0])] = every if blocks > 1 else every[:, :1]
    return cells


def _blocks(rows: list[list[pd.DataFrame]]) -> tuple[int, list[list[np.ndarray]]]:
    """How many jackknife blocks there are, and the number of each image's; `rows`: by generator and label."""
    every = [side for pair in rows for side in pair]
    if "group" in every[0].columns:
        numbers = {name: number for number, name in enumerate(sorted(set(pd.concat(every)["group"])))}
        of = [[side["group"].map(numbers).to_numpy(np.int64) for side in pair] for pair in rows]
        alone = any(side["group"].nunique() < 2 for side in every)
        return (1, [[0 * side for side in pair] for pair in of]) if alone else (len(numbers), of)
    count = min([BLOCKS, *map(len, every)])
    return count, [[np.arange(len(side)) % count for side in pair] for pair in rows]


def difference_table(values: pd.DataFrame, detection: pd.DataFrame, scores: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every method minus the baseline (`baseline_of`) in every measure of `COMPARED`: columns `COLUMNS`, fractions.

    low, high: 95 %, crossed (`crossed_interval`), of balanced accuracy and AP on the unseen generators, or on the seen
    ones where there are no others; with p, and p_holm: p adjusted (Holm) over all methods in that rate, a family that
    is named before any result is known. Other measures have none of these: for them seeds alone are drawn. low_seeds,
    high_seeds: 95 % Student t, paired by seed; p_sign_flip: exact, a description. n_generators: 0 where a measure is
    not of generators. Empty where there is no baseline.

    Args:
        values: `per_seed_values` of `detection` and of what was forgotten.
        scores: image by image, of the same runs; None: no crossed intervals.
    """
    methods = unique(values["method"])
    other = baseline_of(methods)
    if other is None:
        return pd.DataFrame(columns=COLUMNS)
    by_seed = values.pivot(index=["metric", "seed"], columns="method", values="value")
    rows = headline(detection)
    sets = {name: unique(rows.loc[rows["seen"] == seen, "generator"]) for seen, name in GROUPS.items()}
    drawn = "unseen" if sets["unseen"] else "seen"
    native = None if scores is None else native_rows(scores[scores["split"] == "test"])
    cells = {} if native is None else {rate: rate_cells(native, rate, sets[drawn]) for rate in RATES}
    found: list[dict[str, Any]] = []
    for method, (key, metric) in product([name for name in methods if name != other], COMPARED.items()):
        both = by_seed.loc[key, [method, other]].dropna() if key in by_seed.index else pd.DataFrame()
        if both.empty:
            continue
        rate, pictures = _parted(key)
        gaps, crossed = (both[method] - both[other]).to_numpy(), UNKNOWN
        if pictures == drawn and rate in cells:
            tables = [cells[rate][method, seed] - cells[rate][other, seed] for seed in both.index]
            crossed = crossed_interval(np.moveaxis(np.array(tables), -1, 0))
        seeds = seed_interval(gaps)
        generators = sets.get(pictures, rows["generator"].unique()) if metric.of == "run" else ()
        found.append(
            {
                "method": method, "other": other, "rate": rate, "pictures": pictures, "mean": seeds.mean,
                "low": crossed.interval.low, "high": crossed.interval.high, "p": crossed.p, "p_holm": np.nan,
                "low_seeds": seeds.low, "high_seeds": seeds.high, "p_sign_flip": sign_flip_p(gaps),
                "n_seeds": len(gaps), "n_generators": len(generators),
            }
        )  # fmt: skip
    table = pd.DataFrame(found, columns=COLUMNS)
    for _, family in table[table["p"].notna()].groupby("rate"):
        table.loc[family.index, "p_holm"] = holm(family["p"].to_numpy())
    return table.round(DECIMALS)


def _parted(key: str) -> tuple[str, str]:
    """A key of `METRICS` as rate and pictures; "all": of no group of generators. `key_of` undone."""
    rate, _, pictures = key.rpartition("_")
    return (rate, pictures) if pictures in GROUPS.values() else (key, "all")


def is_crossed(differences: pd.DataFrame) -> pd.Series:
    """True for rows whose reading goes by the crossed interval; the others' goes by the one over seeds."""
    drawn = "unseen" if (differences["pictures"] == "unseen").any() else "seen"
    return differences["rate"].isin(RATES) & (differences["pictures"] == drawn)


def intervals(differences: pd.DataFrame) -> Iterator[tuple[Any, Interval, Interval, Interval]]:
    """Each row with its crossed interval, that over seeds, and the one that its reading goes by, in points."""
    rows: Iterator[Any] = differences.itertuples()
    for row, crossed in zip(rows, is_crossed(differences), strict=True):
        ends = [(row.low, row.high), (row.low_seeds, row.high_seeds)]
        drawn, seeds = (Interval(*(100 * float(value) for value in (row.mean, *pair))) for pair in ends)
        yield row, drawn, seeds, drawn if crossed else seeds


def key_of(rate: str, pictures: str) -> str:
    """The key of `METRICS` of a row's measure."""
    return rate if pictures == "all" else f"{rate}_{pictures}"
