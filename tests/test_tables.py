"""Names in tables stay as they are, whatever pandas or YAML would make of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dgs.analysis.metrics import RATES, read_detection
from dgs.analysis.tuning import trials
from dgs.tables import NAMES, read_table

# As folders may be called; pandas takes each for a missing value, a number or a switch.
ODD = ["NA", "N/A", "null", "nan", "NaN", "None", "<NA>", "#N/A", "1e3", "007", "2024", "-1.5", "inf", "true"]


@pytest.mark.parametrize("column", ["generator", "method", "profile", "left_out"])
def test_names_come_back_as_they_were_written(column: str, tmp_path: Path) -> None:
    table = pd.DataFrame({column: ODD, "seed": range(len(ODD)), "value": [0.5, None] * (len(ODD) // 2)})
    table.to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table)
    assert read_table(tmp_path / "t.csv", str)[column].tolist() == ODD


def test_the_columns_of_names_are_those_of_detection_csv_too(tmp_path: Path) -> None:
    row = dict.fromkeys(("method", "generator", "condition", "applied_to", "threshold_rule"), "NA")
    table = pd.DataFrame([{**row, "rho": None, "seed": 0, "seen": "true", **dict.fromkeys(RATES, 0.5)}])
    table.to_csv(tmp_path / "detection.csv", index=False)
    (read,) = read_detection(tmp_path / "detection.csv").to_dict("records")
    assert {name: read[name] for name in row} == row and set(row) <= set(NAMES)
    assert read["seen"] is True and pd.isna(read["rho"])


def _scored(name: str, seed: int) -> dict[str, float]:
    return {"balanced_acc": 0.5}


def test_a_search_that_goes_on_tries_no_odd_name_again(tmp_path: Path) -> None:
    todo = [{"generator": name, "seed": 0} for name in ODD]
    for left in (len(ODD), 0):
        columns = ["generator", "seed", "balanced_acc"]
        assert len(list(trials(_scored, todo, (), 1, tmp_path / "t.csv", columns))) == left
