"""The deviations table: the run's column is what its settings say."""

from __future__ import annotations

from typing import Any

from dgs.analysis.deviations import ROWS, deviations
from dgs.params import load_params, validate


def column(content: dict[str, Any] | None = None, seeds: int = 5) -> dict[str, str]:
    params = validate(content).model_dump() if content is not None else load_params().model_dump()
    rows = deviations(params, seeds)
    assert [row[0] for row in rows] == list(ROWS) and all(len(row) == 4 and all(row) for row in rows)
    return {row[0]: row[3] for row in rows}


def test_the_embedded_run_is_told_by_its_settings() -> None:
    own = column()
    assert own["patch selection"] == "off"
    assert own["training set"] == "embedded benchmark, rho 0.9, shortcut by the background"
    assert own["order of surgery"] == "task and alignment together are projected"
    assert own["uncertainty"] == "5 seeds, 95 % intervals"


def test_a_run_with_the_papers_choices_says_so() -> None:
    own = column(
        {
            "data": {"layout": "folders", "rho": None, "root": "x", "captions": "c.jsonl"},
            "patches": {"enabled": True, "size": 32, "count": 49},
            "model": {"normalize": "imagenet", "lora": {"dropout": 0.8}},
            "train": {"stage2": {"epochs": 1, "lr": 1e-4}, "surgery": {"order": "paper", "scale": "per_sample"}},
        },
        seeds=1,
    )
    assert own["patch selection"] == "49 patches of 32 px"
    assert own["order of surgery"] == "the task alone is projected"
    assert (own["dropout"], own["stage 2"], own["scale of directions"]) == (
        "0.8",
        "1 epoch at 0.0001",
        "do not depend on B",
    )
    assert own["captions"] == "`c.jsonl`" and own["uncertainty"] == "none: one seed"
