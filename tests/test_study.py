"""The study: conditions read from results/, compared in pairs, and what was asked told with yes or no."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dgs.analysis.differences import COLUMNS
from dgs.analysis.metrics import detection_table, write_detection
from dgs.analysis.scores import FILE, read_scores, write_scores
from dgs.analysis.study import (
    agreement,
    best_rival,
    comparison_table,
    crossed_gap,
    differences_of,
    finished_conditions,
    keep_runs,
    read_condition,
    read_scores_of,
    read_tables,
    study_report,
    unseen_cells,
    write_params,
    write_study,
)
from dgs.analysis.tuning import candidates
from dgs.errors import UserError
from dgs.model.methods.registry import METHODS
from dgs.params import load_params
from dgs.tables import read_table

ROOT = Path(__file__).parents[1]
SHIFT = {"lora": 0.5, "dgs": 0.1, "distillation": 1.5, "dgs_plus": 3.0, "poe_swad": 3.2}
FEW = {name: SHIFT[name] for name in ("lora", "dgs", "dgs_plus")}
KEPT = {"lora": 0.6, "dgs": 0.2, "distillation": 0.99, "dgs_plus": 0.97, "poe_swad": 0.7}


def write_results(root: Path, name: str, rho: float, shift: dict[str, float] = SHIFT, scored: bool = False) -> None:
    """A profile's tables, and its scores too if `scored`: logits of fakes lie `shift` above those of reals."""
    rng = np.random.default_rng(0)
    images = pd.DataFrame({"generator": np.repeat(["real", "seen", "new", "other"], 200)})
    images["label"] = (images["generator"] != "real").astype(int)
    parts = []
    for seed in range(3):
        for method, by in shift.items():
            logits = rng.normal(images["label"] * by - by / 2, 1.0)
            parts.append(images.assign(method=method, seed=seed, logit=logits))
    scores = pd.concat(parts).assign(split="test", condition="native", applied_to="both", rho=rho)
    folder = root / "results" / name
    write_detection(detection_table(scores, {"seen"}), folder / "detection.csv")
    rows = [
        {"rho": rho, "method": method, "seed": seed, "measure": measure, "before": 1.0, "after": KEPT[method]}
        for method in shift
        for seed in range(3)
        for measure in ("zero_shot:shape", "retrieval_at_1")
    ]
    pd.DataFrame(rows).to_csv(folder / "forgetting.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps({"data_hash": "0123456789abcdef"}))
    if scored:
        write_scores(scores.assign(id=scores.index.astype(str), sha256="", profile=name), folder / FILE)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("both")
    write_results(root, "strong", 0.9)
    write_results(root, "none", 0.5, {**SHIFT, "dgs_plus": -0.5})
    return root


@pytest.fixture
def root(both: Path, tmp_path: Path) -> Path:
    """A repository with the results of two conditions."""
    return shutil.copytree(both, tmp_path / "root")


def test_differences_are_paired_and_in_points(root: Path) -> None:
    condition = read_condition(root, "strong")
    table = comparison_table([condition]).set_index(["method", "metric"])
    row = table.loc["dgs_plus", "balanced_acc_unseen"]
    own, others = (condition.of(name, "balanced_acc_unseen") for name in ("dgs_plus", "lora"))
    assert row["minus_lora"] == pytest.approx(100 * (own - others).mean())
    assert row["minus_lora_low"] < row["minus_lora_boot_low"] < row["minus_lora"] < row["minus_lora_boot_high"]
    assert row["n_seeds"] == 3 and row["low"] < row["mean"] < row["high"]
    assert np.isnan(table.loc["lora", "balanced_acc_unseen"]["minus_lora"])
    assert table.loc["dgs_plus", "zero_shot_kept"]["mean"] == pytest.approx(0.97)


def test_parts_of_the_subject_are_no_rivals_of_it_and_orders_are_compared(root: Path) -> None:
    strong, none = read_condition(root, "strong"), read_condition(root, "none")
    assert best_rival(strong) == "distillation"
    assert agreement(strong, strong) == pytest.approx(1)
    assert agreement(strong, none) < 0.9


def test_the_report_says_what_was_reached_and_what_was_not(root: Path) -> None:
    report = write_study(root, ["strong", "none"], root / "results/study")
    text = report.read_text()
    (strong,) = [line for line in text.splitlines() if line.startswith("| `strong` | +15.0")]
    (none,) = [line for line in text.splitlines() if line.startswith("| `none` | +0.0")]
    assert [cell.strip() for cell in strong.split("|")][5] == "yes"
    assert [cell.strip() for cell in none.split("|")][5] == "no"
    assert "| `distillation` |" in strong and strong.rstrip(" |").endswith("yes")  # 97 % kept
    table = text.partition("## strong")[2].partition("##")[0]
    ranks = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert ranks[0] == "poe_swad" and ranks[-1] == "dgs"
    assert len(pd.read_csv(report.parent / "table.csv")) == 2 * 5 * 6


def test_what_a_text_side_that_was_trained_to_the_tower_takes_part_in_says_so(root: Path) -> None:
    plain = study_report([read_condition(root, "strong")])
    assert ", aligned text" not in plain
    file = root / "results/strong/forgetting.csv"
    rows = read_table(file)
    rows["measure"] = rows["measure"].str.replace("zero_shot:", "zero_shot_aligned:")
    rows.to_csv(file, index=False)
    report = study_report([read_condition(root, name) for name in ("strong", "none")])
    strong, none = (report.partition(f"## {name}")[2].partition("##")[0] for name in ("strong", "none"))
    assert "zero-shot kept, aligned text | retrieval kept, aligned text |" in strong and "aligned" not in none
    assert "| 97.0, aligned text | yes |" in report.partition("## What was asked")[2].partition("##")[0]


def test_the_report_names_the_settings_that_each_rule_chose(root: Path) -> None:
    tried = candidates(METHODS["dgs"])
    search = pd.DataFrame(
        {
            "data_hash": "d", "method": "dgs", "candidate": [json.dumps(candidate) for candidate in tried], "seed": 100,
            "val": [0.9, 0.8, 0.7, 0.7, 0.6, 0.6], "val_balanced": [0.6, 0.61, 0.7, 0.7, 0.65, 0.5],
            "val_unbiased": [0.6, 0.61, 0.6, 0.65, 0.64, 0.5],
        }
    )  # fmt: skip
    (root / "results/mini").mkdir()
    search.to_csv(root / "results/mini/tuning.csv", index=False)
    text = write_study(root, ["strong"], root / "results/study").read_text().partition("## Settings")[2]
    (line,) = [line for line in text.splitlines() if line.startswith("| `dgs`")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["lr 0.001, lam 0.2 (90.0)", "lr 0.003, lam 0.2 (70.0)", "lr 0.003, lam 1 (65.0)"]


def test_the_parts_that_are_there_are_found_the_fullest_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected results of a profile study-\*, found none. Run make study"):
        finished_conditions(tmp_path)
    for name, rho in (("study-50", 0.5), ("study-9", 0.9), ("mini", 0.9)):
        write_results(tmp_path, name, rho, FEW)
    write_results(tmp_path, "study-75", 0.75)
    assert finished_conditions(tmp_path) == ["study-75", "study-9", "study-50"]


def test_what_a_run_made_is_kept_without_its_folder_and_a_later_run_takes_its_place(tmp_path: Path) -> None:
    for name, rho in (("study-90", 0.9), ("study-50", 0.5)):
        write_results(tmp_path, name, rho, FEW)
    names = finished_conditions(tmp_path)
    before = [read_condition(tmp_path, name) for name in names]
    keep_runs(tmp_path)
    for name in names:
        shutil.rmtree(tmp_path / "results" / name)
    assert finished_conditions(tmp_path) == names
    after = [read_condition(tmp_path, name) for name in names]
    pd.testing.assert_frame_equal(comparison_table(after), comparison_table(before), check_exact=True)
    assert study_report(after) == study_report(before)

    stored = (tmp_path / "results/study/detection.parquet").read_bytes()
    keep_runs(tmp_path)
    assert (tmp_path / "results/study/detection.parquet").read_bytes() == stored, "nothing new, nothing written"
    write_results(tmp_path, "study-50", 0.5, SHIFT)
    keep_runs(tmp_path)
    shutil.rmtree(tmp_path / "results/study-50")
    assert read_condition(tmp_path, "study-50").methods == list(SHIFT)
    assert read_condition(tmp_path, "study-90").values.equals(before[0].values)


class TestScores:
    def test_a_run_takes_the_place_of_its_methods_and_leaves_the_others(self, tmp_path: Path) -> None:
        write_results(tmp_path, "study-90", 0.9)
        keep_runs(tmp_path)
        whole = read_tables(tmp_path, "study-90")
        shutil.rmtree(tmp_path / "results/study-90")
        write_results(tmp_path, "study-90", 0.9, {"lora": 2.0, "poe_swad": 1.0}, scored=True)
        for _ in ("before keeping", "after it"):
            tables = read_tables(tmp_path, "study-90")
            assert set(tables["detection"]["method"]) == set(SHIFT)
            old, new = (table["detection"].query("method == 'dgs_plus'") for table in (whole, tables))
            assert old.reset_index(drop=True).equals(new.reset_index(drop=True))
            assert not tables["detection"].duplicated(["method", "seed", "generator", "threshold_rule"]).any()
            scores = read_scores_of(tmp_path, "study-90")
            assert scores is not None and set(scores["method"]) == {"lora", "poe_swad"}
            keep_runs(tmp_path)
            shutil.rmtree(tmp_path / "results/study-90", ignore_errors=True)

    def test_of_other_images_nothing_is_left(self, tmp_path: Path) -> None:
        write_results(tmp_path, "study-90", 0.9, scored=True)
        keep_runs(tmp_path)
        write_results(tmp_path, "study-90", 0.9, FEW, scored=True)
        (tmp_path / "results/study-90/metrics.json").write_text(json.dumps({"data_hash": "another"}))
        keep_runs(tmp_path)
        shutil.rmtree(tmp_path / "results/study-90")
        scores = read_scores_of(tmp_path, "study-90")
        assert scores is not None and set(scores["method"]) == set(FEW)
        assert set(read_tables(tmp_path, "study-90")["detection"]["method"]) == set(FEW)

    def test_of_methods_that_run_again_without_scores_the_old_ones_go(self, tmp_path: Path) -> None:
        write_results(tmp_path, "study-90", 0.9, scored=True)
        keep_runs(tmp_path)
        shutil.rmtree(tmp_path / "results/study-90")
        write_results(tmp_path, "study-90", 0.9, FEW)
        scores = read_scores_of(tmp_path, "study-90")
        assert scores is not None and set(scores["method"]) == set(SHIFT) - set(FEW)
        assert differences_of(tmp_path, ["study-90"]) == {}, "without scores of lora nothing is compared"

    def test_scores_of_a_run_that_was_broken_off_do_not_count(self, tmp_path: Path) -> None:
        write_results(tmp_path, "study-90", 0.9, scored=True)
        (tmp_path / "results/study-90/metrics.json").unlink()
        assert read_scores_of(tmp_path, "study-90") is None

    def test_p_is_adjusted_for_a_whole_family_or_not_at_all(self, tmp_path: Path) -> None:
        write_results(tmp_path, "study-90", 0.9, scored=True)
        (whole,) = differences_of(tmp_path, ["study-90"]).values()
        keep_runs(tmp_path)
        kept = tmp_path / "results/study" / FILE
        write_scores(read_scores(kept).query("method in ['lora', 'dgs_plus']"), kept)
        shutil.rmtree(tmp_path / "results/study-90")
        (part,) = differences_of(tmp_path, ["study-90"]).values()
        assert whole["p_holm"].notna().any() and part["p_holm"].isna().all() and part["p"].notna().any()

    def test_a_crossed_gap_is_that_of_the_table_where_the_other_is_the_baseline(self, tmp_path: Path) -> None:
        write_results(tmp_path, "study-90", 0.9, scored=True)
        scores = read_scores_of(tmp_path, "study-90")
        assert scores is not None
        for rate in ("balanced_acc", "ap"):
            cells = unseen_cells(scores, ["seen"], rate)
            found = crossed_gap(cells["dgs_plus"], cells["lora"])
            (table,) = differences_of(tmp_path, ["study-90"]).values()
            row = table.query("method == 'dgs_plus' and rate == @rate and pictures == 'unseen'").iloc[0]
            assert row[["mean", "low", "high"]].tolist() == pytest.approx(list(found.interval), abs=1e-5)
            assert crossed_gap(cells["lora"], cells["dgs_plus"]).interval.mean == pytest.approx(-found.interval.mean)

    def test_conditions_that_have_scores_get_crossed_intervals_and_a_forest_of_them(self, root: Path) -> None:
        folder = root / "results/study"
        write_study(root, ["strong", "none"], folder)
        assert not list(folder.glob("differences.*"))
        write_results(root, "strong", 0.9, scored=True)
        write_study(root, ["strong", "none"], folder)
        table = read_table(folder / "differences.csv")
        assert set(table["condition"]) == {"strong"} and list(table.columns) == ["condition", *COLUMNS]
        shown = table.query("method == 'dgs_plus' and rate == 'balanced_acc' and pictures == 'unseen'").iloc[0]
        assert 0 < shown["low"] < shown["mean"] < shown["high"]
        assert (folder / "differences.png").stat().st_size > 0
        assert "](differences.png)" in (folder / "REPORT.md").read_text()


def test_folders_of_images_have_no_shortcut_and_no_abilities_to_keep(tmp_path: Path) -> None:
    write_results(tmp_path, "mine", float("nan"), FEW)
    forgetting = tmp_path / "results/mine/forgetting.csv"
    rows = pd.read_csv(forgetting)
    rows[~rows["measure"].str.contains("zero_shot|retrieval")].to_csv(forgetting, index=False)
    text = write_study(tmp_path, ["mine"], tmp_path / "results/mine/study").read_text()
    assert "Data hash `0123456789ab`.\n" in text and "nan" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| `mine` | –")]
    assert line.endswith("| – | – |")


def test_parameters_are_kept_beside_the_report(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "results").mkdir()
    for name in ("study-75", "study-90"):
        write_results(tmp_path, name, 0.9, {"lora": 1.0, "dgs": 1.0})
    kept = yaml.safe_load(write_params(tmp_path, ["study-75", "study-90"], tmp_path / "results").read_text())
    assert [kept[name]["data"]["rho"] for name in ("study-75", "study-90")] == [0.75, 0.9]
    assert kept["study-90"]["methods"] == ["lora", "dgs"], "those that have results"
    whole = load_params("study-75", tmp_path).model_dump(mode="json")
    assert kept["study-75"] == {**whole, "methods": ["lora", "dgs"]}


def test_missing_results_and_methods_are_one_sentence(root: Path) -> None:
    with pytest.raises(UserError, match=r"results of the profile absent, found none. Run make repro PROFILE=absent"):
        read_condition(root, "absent")
    write_results(root, "few", 0.9, {"lora": 1.0, "distillation": 1.0})
    with pytest.raises(UserError, match="Expected dgs among the methods of few"):
        study_report([read_condition(root, "few")])


def test_a_report_without_dgs_plus_says_nothing_of_what_was_asked_of_it(root: Path) -> None:
    write_results(root, "few", 0.9, {"lora": 1.0, "dgs": 1.0})
    write_results(root, "whole", 0.9, FEW)
    assert "What was asked" not in study_report([read_condition(root, "few")])
    both = study_report([read_condition(root, name) for name in ("few", "whole")]).split("## ")[1]
    assert both.startswith("What was asked of `dgs_plus`") and "| `whole` |" in both and "| `few` |" not in both


@pytest.mark.parametrize("name", ["study-90", "study-75"])
def test_under_both_shortcuts_the_study_has_every_method_of_the_registry(name: str) -> None:
    profile = yaml.safe_load((ROOT / "profiles" / f"{name}.yaml").read_text())
    assert sorted(profile["methods"]) == sorted(METHODS)
    assert profile["data"] == {"root": "build/fresh", "rho": int(name[-2:]) / 100}
    assert profile["compute"] == {"gemm": "torch"}  # as the committed results were computed
    assert set(profile) == {"methods", "data", "compute"}  # seeds are those of params.yaml: five


def test_the_protocol_lists_every_method_as_the_registry_does() -> None:
    lines = (ROOT / "docs" / "study.md").read_text().splitlines()
    told = [line for line in lines if line.startswith("| `")]
    assert told == [f"| `{method.name}` | {method.reference} |" for method in METHODS.values()]
