"""The gradient-angle table: what training logged, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dgs.analysis.angles import COLUMNS, collect, energy_along_harm, summary
from dgs.analysis.figures import angles_over_training
from dgs.model.journal import Journal, angles

PAIRS = ["task-harmful", "task-applied"]


def logged(folder: Path, method: str, degrees: dict[int, float]) -> Path:
    """A training folder whose journal notes two steps a seed, 10 degrees apart."""
    folder.mkdir()
    tables = []
    for seed, angle in degrees.items():
        journal = Journal(method, seed)
        for step in (0, 10):
            journal.angle(step, "features", "task-harmful", torch.tensor([angle + step, angle + step]))
        tables.append(journal.angle_table)
    pd.concat(tables).to_parquet(folder / "angles.parquet")
    return folder


def test_angles_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    found = angles(a, b)
    assert np.allclose(found[:4], [0, 90, 180, 45], rtol=0, atol=1e-5)
    assert torch.isnan(found[4]), "a zero gradient has no direction"


def test_a_journal_keeps_mean_and_percentiles_of_the_samples_that_have_an_angle() -> None:
    journal = Journal("dgs", 3)
    journal.angle(7, "features", "task-harmful", torch.tensor([0.0, 100.0, torch.nan]))
    journal.angle(8, "features", "task-harmful", torch.tensor([torch.nan]))
    row, without = journal.angle_table.to_dict("records")
    assert np.isnan(without["mean"]) and (without["cos2"], without["n"]) == (0.0, 0)
    assert (row["method"], row["seed"], row["step"], row["n"]) == ("dgs", 3, 7, 2)
    assert (row["mean"], row["p05"], row["p95"]) == (50.0, 5.0, 95.0)
    assert row["cos2"] == pytest.approx((1 + np.cos(np.radians(100)) ** 2 + 0) / 3), "no direction: nothing to remove"


def test_energy_along_harm_is_the_mean_over_samples_and_steps_not_that_of_a_mean_angle(tmp_path: Path) -> None:
    folder = tmp_path / "dgs"
    folder.mkdir()
    tables = []
    for seed in (0, 1):
        journal = Journal("dgs", seed)
        journal.angle(0, "features", "task-harmful", torch.tensor([60.0, 120.0]))
        journal.angle(10, "features", "task-harmful", torch.tensor([90.0, 90.0]))
        journal.angle(10, "features", "task-applied", torch.tensor([0.0, 0.0]))
        tables.append(journal.angle_table)
    pd.concat(tables).to_parquet(folder / "angles.parquet")
    shares = energy_along_harm({"dgs": folder}, [0, 1])
    assert shares["dgs"].mean == pytest.approx(0.125)
    assert not energy_along_harm({"dgs": folder}, [0])["dgs"].known
    assert energy_along_harm({"dgs": folder}, [7]) == {}


def test_the_table_has_the_contracts_columns_and_the_seeds_and_pairs_asked_for(tmp_path: Path) -> None:
    folders = {
        "lora": logged(tmp_path / "lora", "lora", {0: 80.0, 1: 82.0, 2: 10.0}),
        "dgs": logged(tmp_path / "dgs", "dgs", {0: 70.0, 1: 72.0, 2: 10.0}),
    }
    table = collect(folders, [0, 1], PAIRS, 0.9)
    assert list(table) == COLUMNS
    assert set(table["seed"]) == {0, 1} and set(table["rho"]) == {0.9}
    means = summary(table).set_index("method")["degrees"]
    assert means.to_dict() == {"lora": 86.0, "dgs": 76.0}
    assert collect(folders, [0], ["task-harmful"], None)["rho"].isna().all()


def test_frozen_methods_alone_have_an_empty_table_and_a_figure_that_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    folder.mkdir()
    Journal("probe", 0).angle_table.to_parquet(folder / "angles.parquet")
    table = collect({"probe": folder}, [0], PAIRS, 0.9)
    assert table.empty and list(table) == COLUMNS and summary(table).empty
    (text,) = angles_over_training(table).texts
    assert "No method here trains the tower" in text.get_text()
