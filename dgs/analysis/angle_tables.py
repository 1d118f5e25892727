"""The tables of the gradient angles stage: what is read, and what is written to results/<profile>/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dgs.analysis import angles
from dgs.analysis.metrics import detection_table
from dgs.analysis.scores import FILE, read_scores
from dgs.data.prepared import Prepared
from dgs.errors import UserError
from dgs.workspace import Workspace


class Logged(NamedTuple):
    """What training logged: folders of methods, and the tables of `read_logged`."""

    folders: dict[str, Path]
    samples: pd.DataFrame
    layers: pd.DataFrame
    batches: pd.DataFrame

    def __str__(self) -> str:
        return f"{len(self.samples)} samples, {len(self.layers)} layers, {len(self.batches)} steps logged"


def open_logged(workspace: Workspace, methods: Sequence[str], seeds: Sequence[int]) -> Logged:
    """What was logged of `methods`; one that was not trained is named and left out."""
    folders = workspace.trained(methods)
    for name in methods:
        if name not in folders:
            print("not trained, left out:", name)
    return Logged(folders, *(angles.read_logged(folders, seeds, table) for table in ("samples", "layers", "batches")))


class Tables(NamedTuple):
    """The tables of results/<profile>; `main`: `angle_table` of `MAIN_PAIRS`, whichever pairs are written."""

    angles: pd.DataFrame
    batches: pd.DataFrame
    updates: pd.DataFrame
    ranks: pd.DataFrame
    main: pd.DataFrame


def write_tables(
    results: Path, logged: Logged, prepared: Prepared, pairs: Sequence[str], seeds: Sequence[int]
) -> Tables:
    """Write gradient_angles.csv, gradient_batches.csv, update_subspaces.csv and head_ranks.csv."""
    rho, rows = prepared.info["rho"], prepared.split("train")
    checkpoints = {(name, seed): folder / f"seed-{seed}" for name, folder in logged.folders.items() for seed in seeds}
    updates = {run: angles.read_updates(folder) for run, folder in checkpoints.items() if folder.exists()}
    tables = Tables(
        angles.angle_table(logged.samples, logged.layers, pairs, rho),
        angles.batch_table(logged.samples, logged.batches, rho),
        angles.compare_updates(updates, rho),
        angles.text_head_ranks(prepared.caption_embeddings[rows.index], rows["label"].to_numpy(), seeds[0]).round(4),
        angles.angle_table(logged.samples, logged.layers, angles.MAIN_PAIRS, rho),
    )
    results.mkdir(parents=True, exist_ok=True)
    names = ("gradient_angles", "gradient_batches", "update_subspaces", "head_ranks")
    for name, table in zip(names, tables, strict=False):  # not main
        table.to_csv(results / f"{name}.csv", index=False)
    return tables


def write_correlations(workspace: Workspace, tables: Tables, prepared: Prepared) -> pd.DataFrame | None:
    """Write angle_correlations.csv, where the evaluate stage has left scores; else say that it has not."""
    try:
        scores = read_scores(workspace.find("evaluate", made_by="evaluate") / FILE)
    except UserError as error:
        print("not evaluated yet:", error)
        return None
    detection = detection_table(scores, set(prepared.info["seen"]))
    found = angles.correlations(tables.main, tables.batches, detection)
    found.to_csv(workspace.results / "angle_correlations.csv", index=False)
    return found
