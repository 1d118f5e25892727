"""Tables of what runs beside the pipeline: from rows and scores alone, with the intervals that the package has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dgs.analysis.scores import write_scores
from dgs.analysis.study import crossed_gap, unseen_cells
from minibench import generators
from studies import dose_response, oracle_ladder, priors, seen_pairs, text_heads
from studies.sweep import FAILED, KEY, MEASURES, Arm
from studies.sweep_tables import MADE, NOT_RUN, STORE, sweep_tables
from studies.tables import drawn, told

UNSEEN = [name for name in generators.NAMES if name not in generators.SEEN]


def scores_of(arm: Arm, seed: int, shift: float) -> pd.DataFrame:
    """Native scores: 40 photographs, and 20 fakes of every unseen generator, whose mean logit is `shift`."""
    rng = np.random.default_rng([seed, int(100 * shift)])
    kinds = ["real"] * 40 + [name for name in UNSEEN for _ in range(20)]
    label = np.array([int(kind != "real") for kind in kinds])
    return pd.DataFrame({
        "id": [f"{kind}-{i}" for i, kind in enumerate(kinds)], "sha256": "0", "split": "test", "generator": kinds,
        "label": label, "rho": 0.9, "condition": "native", "applied_to": "both",
        "logit": (rng.normal(size=len(kinds)) + np.where(label == 1, shift, -0.5)).astype(np.float32),
        "method": arm.method, "seed": seed, "profile": arm.text,
    })  # fmt: skip


def write(root: Path, study: str, shifts: Iterable[tuple[Arm, float]], seeds: range = range(3)) -> pd.DataFrame:
    """results/study/<study>.csv and .parquet of arms; the scores."""
    rows, scores = [], []
    for arm, shift in shifts:
        for seed in seeds:
            rows.append({
                **dict(zip(KEY, ("r", arm.text, arm.method, seed), strict=True)),
                **dict.fromkeys(MEASURES, 0.5 + shift / 10 + seed / 100), FAILED: None,
            })  # fmt: skip
            scores.append(scores_of(arm, seed, shift))
    (root / STORE).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(root / STORE / f"{study}.csv", index=False)
    whole = pd.concat(scores, ignore_index=True)
    write_scores(whole, root / STORE / f"{study}.parquet")
    return whole


def cells(root: Path, name: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split(" | ") for line in drawn(*sweep_tables(root)[name]).splitlines()[2:]]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_only_studies_with_results_have_tables(tmp_path: Path) -> None:
    assert sweep_tables(tmp_path) == {}
    write(tmp_path, "seen_pairs", [(arm, 1.0) for arm in seen_pairs.arms()])
    assert set(sweep_tables(tmp_path)) == {"seen-pairs", "each-seen-pair"}


def test_a_difference_is_the_crossed_one_and_what_lacks_is_said(tmp_path: Path) -> None:
    lora, half = (
        Arm(name, {dose_response.DROPPED: share}) for name, share in (("lora", 0.0), ("poe_distillation", 0.5))
    )
    scores = write(tmp_path, "dose_response", [(lora, 0.5), (half, 1.5)])
    found = cells(tmp_path, "dose-response")
    assert list(found) == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    of = unseen_cells(scores, generators.SEEN, "ap")
    expected = crossed_gap(of["poe_distillation"], of["lora"]).interval
    columns = list(sweep_tables(tmp_path)["dose-response"][2])
    assert found["50 %"][columns.index("AP: `poe_distillation` minus LoRA")] == told(
        type(expected)(*(100 * e for e in expected))
    )
    assert set(found["0 %"]) == {NOT_RUN, ""} and found["50 %"].count(NOT_RUN) == len(columns) - 2


def test_of_several_recipes_the_last_counts(tmp_path: Path) -> None:
    rungs = {arm.method: arm for arm in oracle_ladder.arms()}
    write(tmp_path, "oracle_ladder", [(rungs["lora"], 0.5), (rungs["plane_2"], 0.5)])
    file = tmp_path / STORE / "oracle_ladder.csv"
    table = pd.read_csv(file)
    again = table[table["method"] == "plane_2"].assign(recipe="s", zero_shot_kept=0.9)
    pd.concat([table, again]).to_csv(file, index=False)
    assert cells(tmp_path, "oracle-ladder")["`plane_2`"][-1] == "90 [90, 90]"


def test_a_pair_of_generators_is_one_value(tmp_path: Path) -> None:
    write(tmp_path, "seen_pairs", [(arm, {"lora": 1.0}.get(arm.method, 0.5)) for arm in seen_pairs.arms()])
    assert cells(tmp_path, "seen-pairs")["`lora` minus `probe`"] == ["+5.0 [5.0, 5.0]"] * 3
    each = cells(tmp_path, "each-seen-pair")
    assert len(each) == seen_pairs.COUNT and all(row[:2] == ["+5.0", "-5.0"] for row in each.values())


def test_a_pair_that_was_not_run_says_so(tmp_path: Path) -> None:
    first, *others = map(seen_pairs.folder, seen_pairs.PAIRS)
    write(tmp_path, "seen_pairs", [(arm, 1.0) for arm in seen_pairs.arms() if arm.settings["data.root"] == first])
    rows = list(cells(tmp_path, "each-seen-pair").values())
    assert [set(row) for row in rows] == [{"0.0"}, *[{NOT_RUN}] * len(others)]


def test_a_measure_that_a_method_lacks_is_a_dash(tmp_path: Path) -> None:
    write(tmp_path, "seen_pairs", [(arm, 1.0) for arm in seen_pairs.arms()])
    file = tmp_path / STORE / "seen_pairs.csv"
    table = pd.read_csv(file)
    table["zero_shot_kept"] = table["zero_shot_kept"].mask(table["method"] == "pixel_cnn")
    table.to_csv(file, index=False)
    assert cells(tmp_path, "seen-pairs")["`pixel_cnn` minus `lora`"] == ["0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]", "–"]


@pytest.mark.parametrize(
    ("study", "arms", "rows"),
    [
        ("text_heads", text_heads.arms(), {"text-heads": 8 * 3, "text-head-controls": 7 * 3, "text-head-facts": 6}),
        ("dose_response", dose_response.arms(), {"dose-response": 5}),
        ("priors", priors.arms(), {"priors": 5, "priors-levels": 5, "priors-steps": 5}),
        ("oracle_ladder", oracle_ladder.arms(), {"oracle-ladder": len(oracle_ladder.RUNGS) - 1, "ladder-mlp": 3}),
    ],
)
def test_a_whole_study_leaves_no_cell_open(tmp_path: Path, study: str, arms: list[Arm], rows: dict[str, int]) -> None:
    write(tmp_path, study, [(arm, 1.0) for arm in arms], range(2))
    for name, count in rows.items():
        found = cells(tmp_path, name)
        assert len(found) == count and not any(NOT_RUN in cell for row in found.values() for cell in row), name
    assert set(rows) == set(MADE[study](tmp_path))
