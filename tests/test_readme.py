"""What the documents say is what the committed results say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

from dgs.stats import percent_text

ROOT = Path(__file__).parent.parent
MEASURES, ENDS = ("balanced_acc_unseen", "zero_shot_kept"), ("mean", "low", "high")


def test_the_headline_table_is_that_of_the_committed_metrics() -> None:
    metrics = json.loads((ROOT / "results/mini/metrics.json").read_text())["methods"]
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    for name, values in metrics.items():
        (row,) = [row for row in rows if row.startswith(f"| `{name}`:")]
        found = [values[measure] and [percent_text(values[measure][end]) for end in ENDS] for measure in MEASURES]
        cells = [f"{each[0]} [{each[1]}, {each[2]}]" if each else "–" for each in found]  # pixel_cnn keeps no CLIP
        assert row.endswith(f"| {' | '.join(cells)} |")


def test_the_table_of_faults_is_the_one_that_is_tried() -> None:
    command = [sys.executable, "tests/mutants.py", "--list"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert table.strip() in (ROOT / "docs/running.md").read_text()


def test_every_fault_is_of_a_line_that_is_there() -> None:
    faults = yaml.safe_load((ROOT / "tests/mutants.yaml").read_text(encoding="utf-8"))
    counts = {each["id"]: (ROOT / each["file"]).read_text(encoding="utf-8").count(each["old"]) for each in faults}
    assert {name for name, count in counts.items() if count != 1} == set()


def test_every_file_the_documents_point_to_is_there() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"
