"""docs/minibench.md says what the audit, the curves and the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from dgs.analysis.metrics import headline
from dgs.stats import percent_text

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "docs/minibench.md").read_text().splitlines()
METHODS = ("probe", "lora", "dgs")
KEYS = {"frozen_probe": "probe", "high_frequencies": "high_frequency"}  # the audit's words for a header's
ABILITIES = ("shape", "colour", "background", "size", "position", "medium", "recall")


def row(first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    (line,) = [line for line in LINES if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("name", "file"), [("shipped", "sample/clip/curve.csv"), ("seed 1", "docs/minibench/clip-seed-1.csv")]
)
def test_each_mini_clip_is_told_as_measured(name: str, file: str) -> None:
    last = pd.read_csv(ROOT / file).iloc[-1]
    assert row(name) == [f"{100 * last[ability]:.1f}" for ability in ABILITIES]


def test_the_ablation_is_at_equal_samples_and_told_as_measured() -> None:
    plain = pd.read_csv(ROOT / "docs/minibench/clip-without-prompts.csv")
    whole = pd.read_csv(ROOT / "sample/clip/curve.csv").set_index("samples")
    last = plain.iloc[-1]
    assert int(last["samples"]) == 352_000
    for name, at in (("without prompts, 352,000 samples", last), ("with, 352,000 samples", whole.loc[352_000])):
        assert row(name) == [f"{100 * at[ability]:.1f}" for ability in ABILITIES]


def test_generators_are_told_as_measured() -> None:
    table = headline(pd.read_csv(ROOT / "results/mini/detection.csv"))
    means = table.pivot_table(index="generator", columns="method", values="balanced_acc")
    for name, values in means.iterrows():
        shown = [line for line in LINES if line.startswith(f"| {name} ") and line.count("|") == 7]
        assert len(shown) == 1, name
        cells = [cell.strip() for cell in shown[0].strip("|").split("|")]
        assert cells[-3:] == [percent_text(values[method]) for method in METHODS]


@pytest.mark.parametrize("rho", ["0.5", "0.9"])
def test_the_audits_table_is_the_committed_audits(rho: str) -> None:
    """Means over the nine test generators of each detector that the table's header names."""
    audit = json.loads((ROOT / "docs/minibench/audit.json").read_text())["detectors"][f"rho_{float(rho):.2f}"]
    (header,) = [line for line in LINES if line.startswith("| trained on |")]
    names = [cell.strip().lower().replace(" ", "_") for cell in header.strip("|").split("|")][1:]
    for name, cell in zip(names, row(f"rho {rho}"), strict=True):
        found = audit[KEYS.get(name, name)]["test_mean"]
        assert cell == f"{percent_text(found['mean'])} [{percent_text(found['low'])}, {percent_text(found['high'])}]"
