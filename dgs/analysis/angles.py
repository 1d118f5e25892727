"""Gradient angles: what training logged as inner products, as angles, energies and ranks; nothing is computed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgs.errors import UserError
from dgs.stats import Interval, seed_interval

COLUMNS = ["rho", "method", "seed", "step", "layer", "pair", "mean", "p05", "p95"]
_DIRECTIONS = ("harmful", "beneficial")
BATCHES = [
    "rho",
    "method",
    "seed",
    "step",
    "removed",
    "added",
    "conflict_harmful",
    "conflict_beneficial",
    "effective_rank",
]
FEATURES = "features"  # the layer that the surgery acts on
ROUNDING = 1e-12  # of a difference of energies, as a share of them
_RUN = ["method", "seed", "step"]


def read_logged(folders: Mapping[str, Path], seeds: Sequence[int], table: str) -> pd.DataFrame:
    """One logged table ("samples", "layers" or "batches") of all methods that train the tower.

    Args:
        folders: {method: build/<profile>/train/<method>}.

    Raises:
        UserError: a folder without that table, from a version that logged otherwise.
    """
    parts = []
    for method, folder in folders.items():
        file = folder / f"{table}.parquet"
        if not file.exists():
            raise UserError(f"Expected {file.name} in {folder}, found none: train {method} again, then run this again.")
        logged = pd.read_parquet(file)
        parts.append(logged[logged["seed"].isin(seeds)])
    filled = [part for part in parts if not part.empty]
    if filled:
        return pd.concat(filled, ignore_index=True)
    return parts[0] if parts else pd.DataFrame()


def product(table: pd.DataFrame, a: str, b: str) -> NDArray[np.float64]:
    """Inner products <a, b>, a row each; the logged tables keep each pair once."""
    column = f"{a}.{b}" if f"{a}.{b}" in table else f"{b}.{a}"
    return table[column].to_numpy(dtype=np.float64)


def cosines(table: pd.DataFrame, a: str, b: str) -> NDArray[np.float64]:
    """Cosine of the angle between two gradients, a row each; NaN where one is zero."""
    lengths = np.sqrt(product(table, a, a)) * np.sqrt(product(table, b, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, np.clip(product(table, a, b) / lengths, -1.0, 1.0), np.nan)


def degrees(table: pd.DataFrame, pair: str) -> NDArray[np.float64]:
    """Angles of a pair such as "task-harmful", in degrees, a row each; NaN where one of the two is zero."""
    first, _, second = pair.partition("-")
    return np.degrees(np.arccos(cosines(table, first, second)))


def energies(samples: pd.DataFrame) -> pd.DataFrame:
    """What the surgery took from and gave to each task gradient g, as energies: squared lengths.

    removed: energy along the harmful direction before less after; <g, h>^2 for the exact projection, below zero where a
    method adds along it. added: energy of what came in off the harmful direction, which is the alignment's part.

    Returns:
        columns task (|g|^2), removed, added; a row a row of `samples`.
    """
    task, harm = product(samples, "task", "task"), product(samples, "harmful", "harmful")
    task_along, applied_along = product(samples, "task", "harmful"), product(samples, "applied", "harmful")
    with np.errstate(invalid="ignore", divide="ignore"):
        removed = np.where(harm > 0, (task_along**2 - applied_along**2) / harm, 0.0)
        shift = np.where(harm > 0, (applied_along - task_along) ** 2 / harm, 0.0)
    applied = product(samples, "applied", "applied")
    added = applied + task - 2 * product(samples, "task", "applied") - shift
    added[added < ROUNDING * (applied + task)] = 0.0
    return pd.DataFrame({"task": task, "removed": removed, "added": added})


def angle_table(samples: pd.DataFrame, layers: pd.DataFrame, pairs: Sequence[str], rho: float | None) -> pd.DataFrame:
    """Angles in degrees, a row a logged step, layer and pair: columns `COLUMNS`.

    At the features mean, p05 and p95 are over the samples of a step's batch. A layer's adapters get one gradient a
    batch: the three are that one angle, and pairs with the beneficial direction are not logged there.
    """
    parts = []
    for pair in pairs:
        if not samples.empty:
            known = samples[_RUN].assign(angle=degrees(samples, pair)).dropna()
            grouped = known.groupby(_RUN, sort=False)["angle"]
            spread = grouped.quantile(np.array([0.05, 0.95])).unstack().set_axis(["p05", "p95"], axis=1)
            row = grouped.mean().rename("mean").to_frame().join(spread).reset_index()
            parts.append(row.assign(layer=FEATURES, pair=pair))
        if not layers.empty and "beneficial" not in pair:
            angle = degrees(layers, pair)
            row = layers[[*_RUN, "layer"]].assign(pair=pair, mean=angle, p05=angle, p95=angle)
            parts.append(row.dropna())
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    table["rho"] = np.nan if rho is None else rho
    return table[COLUMNS].round(6)


def batch_table(samples: pd.DataFrame, batches: pd.DataFrame, rho: float | None) -> pd.DataFrame:
    """What the surgery did in each logged step: columns `BATCHES`.

    removed, added: `energies` of the batch as shares of the energy of its task gradients (sums by sums: confident
    samples, whose gradients are next to nothing, weigh as little as they do in training). conflict_*: share of samples
    whose task gradient is more than 90 degrees from the direction. effective_rank: of the harmful directions.
    """
    if samples.empty:
        return pd.DataFrame(columns=BATCHES)
    keys = samples[_RUN].reset_index(drop=True)
    sums = pd.concat([keys, energies(samples)], axis=1).groupby(_RUN, sort=False).sum()
    conflicts = keys.assign(**{f"conflict_{other}": cosines(samples, "task", other) < 0 for other in _DIRECTIONS})
    table = conflicts.groupby(_RUN, sort=False).mean()
    for name in ("removed", "added"):
        table[name] = (sums[name] / sums["task"].where(sums["task"] > 0)).fillna(0.0)
    table = table.reset_index().merge(batches[[*_RUN, "effective_rank"]], on=_RUN, validate="one_to_one")
    table["rho"] = np.nan if rho is None else rho
    return table[BATCHES].round(6)


def over_seeds(table: pd.DataFrame, value: str) -> dict[str, Interval]:
    """{method: mean over the logged steps of a seed, then over seeds with its interval}."""
    per_seed = table.groupby(["method", "seed"], sort=False)[value].mean()
    return {str(method): seed_interval(values.to_numpy()) for method, values in per_seed.groupby("method", sort=False)}


def energy_along_harm(samples: pd.DataFrame) -> dict[str, Interval]:
    """Share of the task gradient's energy along the harmful direction, which exact suppression would remove.

    The mean over samples of cos^2(g_i, h_i), over all logged steps, then over seeds with its interval; a sample without
    a harmful direction counts as 0.
    """
    if samples.empty:
        return {}
    shares = np.nan_to_num(cosines(samples, "task", "harmful") ** 2)
    return over_seeds(samples[_RUN].assign(share=shares), "share")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean angle at the features in degrees, a method and pair: over the steps of a seed, then over seeds, with s.d."""
    rows = table[table["layer"] == FEATURES]
    per_seed = rows.groupby(["method", "pair", "seed"])["mean"].mean().reset_index()
    grouped = per_seed.groupby(["method", "pair"])["mean"].agg(["mean", "std"]).reset_index()
    return grouped.rename(columns={"mean": "degrees", "std": "sd_over_seeds"}).round(3)


def one_sample(samples: pd.DataFrame, method: str, seed: int) -> dict[str, Any]:
    """The row to draw of a method: of the step in the middle, the sample whose angle to harm is nearest the median.

    A real sample, neither the best nor the worst of the batch. Raises UserError where the method logged none.
    """
    rows = samples[(samples["method"] == method) & (samples["seed"] == seed)]
    if rows.empty:
        raise UserError(f"Expected logged gradients of {method} with seed {seed}, found none.")
    steps = np.sort(rows["step"].unique())
    batch = rows[rows["step"] == steps[len(steps) // 2]]
    angle = pd.Series(degrees(batch, "task-harmful"), index=batch.index).dropna()
    chosen = (angle - angle.median()).abs().idxmin() if len(angle) else batch.index[0]
    return {str(name): value for name, value in batch.loc[chosen].items()}
