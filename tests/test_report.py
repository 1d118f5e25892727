"""What REPORT.md says, and that it says it the same way each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_figures import GENERATORS, make_detection, make_forgetting

from dgs.analysis.metrics import summary
from dgs.analysis.report import markdown_table, write_report

PARAMS = {"train": {"lr": 0.003, "epochs": 1}, "seeds": [0, 1]}


def report(folder: Path, detection: pd.DataFrame, forgetting: pd.DataFrame | None = None, **more: Any) -> str:
    made = summary(detection, forgetting, "mini", "abc123")
    return write_report(folder / "deep" / "REPORT.md", made, detection, forgetting, PARAMS, **more).read_text("utf-8")


def test_everything_a_reader_asks_for_is_there(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(), make_forgetting(), figures=["figures/detection_bars.png"])
    sections = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert sections == [
        "What was run", "Headline", "Differences to lora", "Operating points", "By generator", "Forgetting", "Figures",
        "How to read this",
    ]  # fmt: skip
    assert "| profile | `mini` |" in text and "| data hash | `abc123` |" in text
    assert "| `train.lr` | `0.003` |" in text and "| `seeds` | `[0, 1]` |" in text
    assert "![Balanced accuracy by generator](figures/detection_bars.png)" in text
    for generator in GENERATORS:
        assert text.count(f"\n| {generator} | ") == 5, "one row in each of Acc, balanced Acc, R.Acc, F.Acc, AP"
    assert "nan" not in text and "None" not in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    args = (make_detection(), make_forgetting())
    assert report(tmp_path / "a", *args) == report(tmp_path / "b", *args)


def test_headline_numbers_by_hand(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(noise=0.0), make_forgetting(noise=0.0))
    # levels 62, 72, 74 % less 1 point a generator: the 2 seen average -0.5, the 6 unseen -4.5
    assert "| `lora` | 71.5 [71.5, 71.5] | 67.5 [67.5, 67.5] |" in text
    operating = "| `lora` | 67.5 ±0.0 | 67.5 ±0.0 | 20.0 ±0.0 | 40.0 ±0.0 | 67.5 ±0.0 | 10.0 ±0.0 |"
    assert operating in text, "operating points are those of the unseen generators"
    assert "| `dgs` | balanced acc., unseen | +2.0 [+2.0, +2.0] | 5 | higher |" in text
    assert "| `probe` | balanced acc., unseen | −10.0 [−10.0, −10.0] | 5 | lower |" in text
    assert "| `dgs` | zero-shot kept | −10.0 [−10.0, −10.0] | 5 | lower |" in text


def test_an_interval_across_zero_reads_no_difference_shown(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(("lora", "dgs"), noise=0.2))
    line = next(line for line in text.splitlines() if line.startswith("| `dgs` | balanced acc., unseen | "))
    assert line.endswith("| no difference shown |")
    assert "## Forgetting" not in text


def test_one_seed_is_said_to_be_one_seed(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(seeds=1), make_forgetting(seeds=1))
    assert "one seed: no interval" in text and "comes from one seed" in text
    assert "±" not in text.split("## How to read")[0].replace("± half the 95 % interval", "")
    assert "nan" not in text


def test_a_users_own_folder_has_no_unseen_columns(tmp_path: Path) -> None:
    text = report(tmp_path, make_detection(("dgs",), 2, ("mine",), 1, rho=float("nan")))
    assert "| method | balanced acc., seen | AP, seen |" in text
    assert "## Differences" not in text, "there is no lora to compare with"
    assert "| unseen generators | none |" in text and "rho" not in text


def test_other_conditions_get_a_table(tmp_path: Path) -> None:
    native = make_detection(noise=0.0)
    text = report(tmp_path, pd.concat([native, native.assign(condition="jpeg_50", balanced_acc=0.5)]))
    assert "| jpeg_50 | both | 50.0 ±0.0 | 50.0 ±0.0 | 50.0 ±0.0 |" in text


def test_links_are_relative(tmp_path: Path) -> None:
    assert "(my%20figures/x.png)" in report(tmp_path, make_detection(), figures=[Path("my figures/x.png")])
    with pytest.raises(ValueError, match="relative"):
        report(tmp_path, make_detection(), figures=["/tmp/x.png"])


def test_a_pipe_in_a_name_does_not_break_the_table() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]
