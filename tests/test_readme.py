"""What the documents say is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from dgs.stats import percent_text, seed_interval

ROOT = Path(__file__).parent.parent
MEASURES = ("balanced_acc_seen", "balanced_acc_unseen", "ap_unseen", "zero_shot_kept")


@pytest.mark.parametrize("document", ["README.md", "docs/findings.md"])
def test_the_headline_table_is_that_of_the_committed_metrics(document: str) -> None:
    metrics = json.loads((ROOT / "results/mini/metrics.json").read_text())["methods"]
    text = (ROOT / document).read_text()
    for name, values in metrics.items():
        cells = [[percent_text(values[measure][end]) for end in ("mean", "low", "high")] for measure in MEASURES]
        row = " | ".join(f"{mean} [{low}, {high}]" for mean, low, high in cells)
        assert f"| {name} | {row} |" in text


def test_the_angle_that_the_documents_name_is_the_committed_one() -> None:
    table = pd.read_csv(ROOT / "results/mini/gradient_angles.csv")
    kept = table[(table["method"] == "dgs") & (table["pair"] == "task-harmful") & (table["layer"] == "features")]
    angle = seed_interval(kept.groupby("seed")["mean"].mean().to_numpy())
    findings = " ".join((ROOT / "docs/findings.md").read_text().split())
    assert f"{angle.mean:.1f} degrees [{angle.low:.1f}, {angle.high:.1f}] apart over training" in findings
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"task and harmful direction are {angle.mean:.0f} degrees apart" in readme


def test_the_share_of_energy_that_the_documents_name_is_the_committed_notebooks() -> None:
    notebook = (ROOT / "results/mini/notebooks/gradient_angles.ipynb").read_text()
    found = re.search(r"dgs: ([0-9.]+) \[([0-9.]+), ([0-9.]+)\] % of the task gradient's energy", notebook)
    assert found is not None
    mean, low, high = (f"{float(number):.1f}" for number in found.groups())
    for document in ("README.md", "docs/findings.md"):
        assert f"{mean} % [{low}, {high}] of the" in " ".join((ROOT / document).read_text().split())


def test_every_file_the_documents_point_to_is_there() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"
