"""The gradient-angle table: what training logged, in the contract's columns, and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dgs.analysis.intervals import Interval, seed_interval

COLUMNS = ["rho", "method", "seed", "step", "layer", "pair", "mean", "p05", "p95"]


def collect(folders: Mapping[str, Path], seeds: Sequence[int], pairs: Sequence[str], rho: float | None) -> pd.DataFrame:
    """The angles that training logged, for methods that train the tower.

    Args:
        folders: {method: build/<profile>/train/<method>}.
        seeds, pairs: which to keep.

    Returns:
        columns rho, method, seed, step, layer, pair, mean, p05, p95 (degrees over the samples of a step's batch);
        no rows where only methods on the frozen tower were trained.
    """
    tables = []
    for folder in folders.values():
        table = pd.read_parquet(folder / "angles.parquet")
        kept = table[table["seed"].isin(seeds) & table["pair"].isin(pairs)].dropna(subset="mean")
        if not kept.empty:
            tables.append(kept)
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    table["rho"] = np.nan if rho is None else rho
    return table[COLUMNS].round(6)


def energy_along_harm(folders: Mapping[str, Path], seeds: Sequence[int]) -> dict[str, Interval]:
    """Share of the task gradient's energy along the harmful direction, which exact suppression would remove.

    The mean over samples of cos^2(g_i, h_i), over all logged steps, then over seeds with its interval; a method that
    trains no tower is left out. `folders` as in `collect`.
    """
    shares = {}
    for method, folder in folders.items():
        table = pd.read_parquet(folder / "angles.parquet")
        kept = table[table["seed"].isin(seeds) & (table["pair"] == "task-harmful")]
        if not kept.empty:
            shares[method] = seed_interval(kept.groupby("seed")["cos2"].mean().to_numpy())
    return shares


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean angle in degrees, a method and pair: over the steps of a seed, then mean and s.d. over seeds."""
    per_seed = table.groupby(["method", "pair", "seed"])["mean"].mean().reset_index()
    grouped = per_seed.groupby(["method", "pair"])["mean"].agg(["mean", "std"]).reset_index()
    return grouped.rename(columns={"mean": "degrees", "std": "sd_over_seeds"}).round(3)
