"""What the README says is what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURES = ("balanced_acc_seen", "balanced_acc_unseen", "ap_unseen", "zero_shot_kept")


def test_the_headline_table_is_that_of_the_committed_metrics() -> None:
    metrics = json.loads((ROOT / "results/mini/metrics.json").read_text())["methods"]
    readme = (ROOT / "README.md").read_text()
    for name, values in metrics.items():
        cells = [values[m] for m in MEASURES]
        row = " | ".join(f"{100 * c['mean']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]" for c in cells)
        assert f"| {name} | {row} |" in readme


def test_every_file_the_documents_point_to_is_there() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"
