"""Whether a number noted in training predicts generalisation: a correlation with an interval, not an anecdote."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from dgs.analysis.metrics import headline, in_order
from dgs.data.conditions import NATIVE
from dgs.stats import Interval

COLUMNS = ["rho", "measure", "method", "generator", "runs", "seeds", "r", "low", "high"]
UNSEEN = "all unseen"  # the mean over generators that training did not see
WITHIN = "within methods"  # all runs, each method's mean taken off first
VARIES = 1e-9  # of the largest value; less is rounding
FEWEST = 4  # seeds that an interval needs


def correlation(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None, seeds: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """Pearson's r with Fisher's z interval; with groups, r of the deviations from each group's mean.

    Groups keep a difference between methods (dgs turns gradients and lora does not) from passing for a correlation; one
    whose x does not vary says nothing and is left out. Runs of one seed share weights to begin with, captions and the
    order of images, so that an interval counts seeds, not runs: z has standard error 1 / sqrt(seeds - 3).

    Args:
        x, y: (n,).
        groups, seeds: (n,) labels; without seeds every run is one of its own.

    Returns:
        r as `mean` and its ends; all NaN where x or y does not vary, NaN ends for fewer than `FEWEST` seeds.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"expected two 1-D arrays of one length, found shapes {x.shape} and {y.shape}")
    labels = np.zeros(len(x)) if groups is None else np.asarray(groups)
    runs = np.arange(len(x)) if seeds is None else np.asarray(seeds)
    table = pd.DataFrame({"x": x, "y": y, "group": labels, "seed": runs})
    varied = table.groupby("group")["x"].transform(lambda own: np.ptp(own) > VARIES * np.abs(own).max())
    table = table[varied.astype(bool)]
    a, b = (table[name] - table.groupby("group")[name].transform("mean") for name in "xy")
    first, second = a.to_numpy(dtype=np.float64), b.to_numpy(dtype=np.float64)
    spread = math.sqrt(float(first @ first) * float(second @ second))
    if spread == 0.0:
        return Interval(math.nan, math.nan, math.nan)
    r = float(np.clip(float(first @ second) / spread, -1.0, 1.0))
    count = table["seed"].nunique()
    if count < FEWEST or abs(r) == 1.0:
        return Interval(r, math.nan, math.nan)
    half = float(stats.norm.ppf((1.0 + level) / 2.0)) / math.sqrt(count - 3)
    z = math.atanh(r)
    return Interval(r, math.tanh(z - half), math.tanh(z + half))


def _measures(batches: pd.DataFrame, angles: pd.DataFrame) -> pd.DataFrame:
    """One row a run (method, seed): means over its logged steps."""
    rows = angles[(angles["layer"] == "features") & angles["pair"].isin(["task-harmful", "task-applied"])]
    by_pair = rows.pivot_table(index=["method", "seed"], columns="pair", values="mean")
    by_pair.columns = [f"angle {name}" for name in by_pair]
    shares = ["removed", "added", "conflict_harmful", "conflict_beneficial"]
    named = {name: name.replace("_", " ") for name in shares}
    return by_pair.join(batches.groupby(["method", "seed"])[shares].mean().rename(columns=named))


def _accuracies(detection: pd.DataFrame) -> pd.DataFrame:
    """Balanced accuracy, a row a run and a column a generator, and the mean over unseen ones.

    Of images as they are, at threshold 0.5: changed ones have rows of their own in the same table.
    """
    rows = headline(detection, condition=NATIVE, applied_to="both", threshold_rule="0.5")
    table = rows.pivot_table(index=["method", "seed"], columns="generator", values="balanced_acc", sort=False)
    unseen = in_order(rows.loc[~rows["seen"], "generator"])
    table = table[in_order(rows["generator"])]
    if unseen:
        table.insert(0, UNSEEN, table[unseen].mean(axis=1))
    return table


def predicts(angles: pd.DataFrame, batches: pd.DataFrame, detection: pd.DataFrame) -> pd.DataFrame:
    """Correlation of each measure with balanced accuracy over runs, by generator: columns `COLUMNS`.

    For each method alone (over its seeds) and within methods (over all runs, each method's mean taken off). Rows whose
    measure does not vary (nothing is removed without surgery) are left out.

    Args:
        angles, batches: the tables of `dgs.analysis.angles`.
        detection: the table of the evaluate stage.
    """
    if batches.empty:
        return pd.DataFrame(columns=COLUMNS)
    accuracies = _accuracies(detection)
    joined = _measures(batches, angles).join(accuracies, how="inner")
    measures = [name for name in joined if name not in accuracies]
    methods = joined.index.get_level_values("method")
    found = []
    for measure in measures:
        for method in [*in_order(methods), WITHIN]:
            runs = joined if method == WITHIN else joined[methods == method]
            groups, seeds = (runs.index.get_level_values(level).to_numpy() for level in ("method", "seed"))
            for generator in accuracies:
                r = correlation(runs[measure].to_numpy(), runs[generator].to_numpy(), groups, seeds)
                if not math.isnan(r.mean):
                    found.append((measure, method, generator, len(runs), len(np.unique(seeds)), *r))
    table = pd.DataFrame(found, columns=COLUMNS[1:])
    table.insert(0, "rho", batches["rho"].iloc[0])
    return table.round(6)
