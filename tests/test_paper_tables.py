"""docs/paper-tables.md: averages from the paper's cells by hand, and the page as the data make it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from dgs.analysis.paper import PAGE, averages, misprinted, page, paper_cells, rerun_cells
from dgs.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cells() -> pd.DataFrame:
    return paper_cells(ROOT)


def test_the_page_is_what_the_data_make() -> None:
    """After results/mini changed: python -m dgs.analysis.paper."""
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(ROOT)


def test_every_cell_of_the_paper_is_there(cells: pd.DataFrame) -> None:
    single = cells[cells["column"] != "PRINTED_AVERAGE"]
    assert len(single) == 732 and not cells.duplicated(["table", "method", "column"]).any()
    assert single.groupby("table")["column"].nunique().to_dict() == {1: 18, 2: 17, 3: 26}
    assert set(cells.groupby("table")["method"].nunique()) == {12}
    assert cells["value"].between(0, 100).all()


def test_averages_by_hand() -> None:
    made = pd.DataFrame(
        [("r_acc", "Real", 90.0), ("f_acc", "a", 60.0), ("f_acc", "b", 30.0), ("macc", "PRINTED_AVERAGE", 60.2)],
        columns=["metric", "column", "value"],
    ).assign(table=1, benchmark="AIGCDetectBenchmark", method="m")
    found = averages(made, 1).loc["m"]
    assert found.to_dict() == {"printed": 60.2, "average": 60.0, "r_acc": 90.0, "f_acc": 45.0, "balanced_acc": 67.5}
    assert misprinted(averages(made, 1)).to_dict() == {"m": pytest.approx(0.2)}
    right = made.replace({60.2: 60.0})
    assert misprinted(averages(right, 1)).empty


def test_printed_averages_that_are_not_the_mean_of_their_cells_are_named(cells: pd.DataFrame) -> None:
    assert list(misprinted(averages(cells, 1)).index) == ["CNN-Spot", "UnivFD", "FreqNet", "DFFreq", "Effort"]
    assert misprinted(averages(cells, 1))["CNN-Spot"] == pytest.approx(2.03, abs=0.01)
    assert "CNN-Spot +2.03, UnivFD +0.07, FreqNet +0.17, DFFreq −0.82, Effort −0.14." in page(ROOT)


def test_the_papers_margins_shrink_as_balanced_accuracy(cells: pd.DataFrame) -> None:
    both = averages(cells, 1).loc[["DGS-Net", "NS-Net"], ["average", "balanced_acc"]]
    margin = both.loc["DGS-Net"] - both.loc["NS-Net"]
    assert margin["average"] == pytest.approx(4.4, abs=0.05) and margin["balanced_acc"] == pytest.approx(1.2, abs=0.05)


def test_the_re_run_is_matched_generator_by_generator(cells: pd.DataFrame) -> None:
    rerun = rerun_cells(ROOT)
    assert rerun["benchmark"].value_counts().to_dict() == {
        "AIGIBench": 25, "AIGCDetectBenchmark": 16, "UniversalFakeDetect": 8,
    }  # fmt: skip
    ours = cells[(cells["method"] == "DGS-Net") & (cells["metric"] == "f_acc")]
    both = rerun.merge(ours, left_on=["benchmark", "generator"], right_on=["benchmark", "column"])
    assert len(both) == 16 + 25, "all but the paper's Deepfake have a partner"
    assert (both["f_acc"] - both["value"]).abs().max() < 3.0, "the same detector on the same generator"


def test_a_missing_file_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected .*paper_tables.csv, found none"):
        page(tmp_path)
