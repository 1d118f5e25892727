"""Comparing two results folders: equal ones agree, and whatever moved is named."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dgs.analysis.metrics import DETECTION_COLUMNS, RATES, write_detection
from dgs.analysis.verify import ASIDE, TABLES, compare_results
from dgs.errors import UserError

METHODS = ("probe", "dgs")
NAMES = ("detection.csv", "forgetting.csv", "gradient_angles.csv", "training.csv")


def metrics() -> dict[str, Any]:
    def value(mean: float) -> dict[str, Any]:
        per_seed = {"0": mean - 0.01, "1": mean + 0.01}
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "per_seed": per_seed}

    names = ("balanced_acc_unseen", "balanced_acc_seen", "ap_unseen", "zero_shot_kept")
    methods = {
        method: {name: value(0.6 + 0.05 * i + 0.1 * j) for i, name in enumerate(names)}
        for j, method in enumerate(METHODS)
    }
    return {"profile": "mini", "data_hash": "ab" * 32, "methods": methods}


def detection(rho: float | None) -> pd.DataFrame:
    rows = []
    for method in METHODS:
        for seed in (0, 1):
            for number, (generator, seen) in enumerate((("alpha", True), ("gamma", False))):
                for rule in ("0.5", "val"):
                    rates = {name: 0.5 + 0.02 * index + 0.01 * number for index, name in enumerate(RATES)}
                    rows.append(
                        {
                            "rho": rho,
                            "method": method,
                            "seed": seed,
                            "generator": generator,
                            "seen": seen,
                            "condition": "native",
                            "applied_to": "both",
                            "n_real": 100,
                            "n_fake": 120,
                            "threshold_rule": rule,
                        }
                        | rates
                    )
    return pd.DataFrame(rows)[DETECTION_COLUMNS].astype({"rho": float})


def write(folder: Path, rho: float | None = 0.9) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics(), indent=1))
    write_detection(detection(rho), folder / "detection.csv")
    runs = [(method, seed) for method in METHODS for seed in (0, 1)]
    pd.DataFrame(
        [
            {"rho": rho, "method": method, "seed": seed, "measure": measure, "before": 0.9, "after": 0.7}
            for method, seed in runs
            for measure in ("zero_shot_shape", "cka")
        ]
    ).to_csv(folder / "forgetting.csv", index=False)
    angles = {"mean": 90.0, "p05": 80.0, "p95": 100.0}
    pd.DataFrame(
        [
            {"rho": rho, "method": method, "seed": seed, "step": step, "layer": "features", "pair": "task-harmful"}
            | angles
            for method, seed in runs
            for step in (0, 10)
        ]
    ).to_csv(folder / "gradient_angles.csv", index=False)
    pd.DataFrame(
        [
            {"rho": rho, "method": method, "seed": seed, "epoch": 0, "step": step, "loss": 0.69, "loss_task": 0.6}
            | {"val_balanced_acc": 0.75 if step else None}
            for method, seed in runs
            for step in (0, 10)
        ]
    ).to_csv(folder / "training.csv", index=False)
    return folder


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Two equal folders."""
    rho = getattr(request, "param", 0.9)
    return write(tmp_path / "committed", rho), write(tmp_path / "reproduced", rho)


# Of data of one's own, where the column rho is empty, too.
with_and_without_rho = pytest.mark.parametrize("pair", [0.9, None], indirect=True, ids=["rho", "no rho"])


def number_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, float):
        yield path
    elif isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from number_paths(value[key], (*path, key))


def put(content: Any, path: tuple[Any, ...], change: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = change(content[path[-1]]) if callable(change) else change


def read_text(file: Path) -> pd.DataFrame:
    """A table with every cell as it is written."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def edit(folder: Path, name: str, row: int, column: str, change: Any) -> pd.Series:
    """Change one cell of a table (a function is given its number); returns the row as it was."""
    table = read_text(folder / name)
    before = table.iloc[row].copy()
    value = before[column]
    table.loc[row, column] = str(change(float(value) if "." in value else int(value)) if callable(change) else change)
    table.to_csv(folder / name, index=False)
    return before


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


@with_and_without_rho
class TestAgreement:
    def test_a_folder_agrees_with_itself_and_its_copy(self, pair: tuple[Path, Path]) -> None:
        assert compare_results(pair[0], pair[0]) == []
        assert compare_results(*pair) == []

    @pytest.mark.parametrize("name", NAMES)
    def test_the_order_of_rows_does_not_matter(self, pair: tuple[Path, Path], name: str) -> None:
        table = read_text(pair[1] / name)
        table.sample(frac=1, random_state=1).to_csv(pair[1] / name, index=False)
        assert compare_results(*pair) == []

    def test_half_a_point_is_within_the_tolerance(self, pair: tuple[Path, Path]) -> None:
        content = metrics()
        for path in list(number_paths(content)):
            put(content, path, lambda value: value + 0.005)
        (pair[1] / "metrics.json").write_text(json.dumps(content))
        edit(pair[1], "detection.csv", 2, "acc", lambda value: value - 0.005)
        edit(pair[1], "forgetting.csv", 2, "after", lambda value: value + 0.005)
        edit(pair[1], "gradient_angles.csv", 2, "mean", lambda value: value + 0.9)  # degrees: 1 % of 180
        assert compare_results(*pair) == []

    def test_a_stricter_tolerance_reports_it(self, pair: tuple[Path, Path]) -> None:
        edit(pair[1], "detection.csv", 2, "acc", lambda value: value - 0.005)
        assert "acc" in only(compare_results(*pair, tolerance=0.001))


class TestMetrics:
    def test_two_points_in_any_metric_are_reported_by_name(self, pair: tuple[Path, Path]) -> None:
        paths = list(number_paths(metrics()))
        assert len(paths) == 2 * 4 * 5
        for number, path in enumerate(paths):
            content = metrics()
            put(content, path, lambda value, step=0.02 * (-1) ** number: value + step)
            (pair[1] / "metrics.json").write_text(json.dumps(content))
            line = only(compare_results(*pair))
            _, method, name, *rest = path
            assert all(str(part) in line for part in (method, name, *rest)), line
            assert line.startswith("metrics.json")

    def test_two_points_in_the_committed_file_are_reported_alike(self, pair: tuple[Path, Path]) -> None:
        content = metrics()
        put(content, ("methods", "dgs", "ap_unseen", "mean"), lambda value: value + 0.02)
        (pair[0] / "metrics.json").write_text(json.dumps(content))
        assert "dgs.ap_unseen.mean" in only(compare_results(*pair))

    @pytest.mark.parametrize("value", [None, float("nan"), "0.8", True])
    def test_what_is_no_number_any_more_is_reported(self, pair: tuple[Path, Path], value: Any) -> None:
        content = metrics()
        put(content, ("methods", "dgs", "balanced_acc_seen", "mean"), value)
        (pair[1] / "metrics.json").write_text(json.dumps(content))
        assert "dgs.balanced_acc_seen.mean" in only(compare_results(*pair))

    @pytest.mark.parametrize("name", ["profile", "data_hash"])
    def test_names_and_hashes_must_be_equal(self, pair: tuple[Path, Path], name: str) -> None:
        content = metrics() | {name: "other"}
        (pair[1] / "metrics.json").write_text(json.dumps(content))
        line = only(compare_results(*pair))
        assert name in line and "other" in line and metrics()[name] in line

    @pytest.mark.parametrize(("side", "where"), [(0, "reproduced"), (1, "committed")])
    def test_a_metric_that_only_one_file_has(self, pair: tuple[Path, Path], side: int, where: str) -> None:
        content = copy.deepcopy(metrics())
        del content["methods"]["dgs"]["zero_shot_kept"]["mean"]
        (pair[side] / "metrics.json").write_text(json.dumps(content))
        line = only(compare_results(*pair))
        assert "dgs.zero_shot_kept.mean" in line and f"only in the {where}" in line


@with_and_without_rho
class TestTables:
    @pytest.mark.parametrize("column", RATES)
    def test_two_points_in_any_rate_of_detection(self, pair: tuple[Path, Path], column: str) -> None:
        row = edit(pair[1], "detection.csv", 5, column, lambda value: value + 0.02)
        line = only(compare_results(*pair))
        assert all(str(row[key]) in line for key in ("method", "seed", "generator", "threshold_rule")), line
        assert f" {column}:" in line and line.startswith("detection.csv")
        assert str(row[column]) in line

    @pytest.mark.parametrize("column", ["n_real", "n_fake"])
    @pytest.mark.parametrize("step", [1, -1])
    def test_a_count_off_by_one(self, pair: tuple[Path, Path], column: str, step: int) -> None:
        edit(pair[1], "detection.csv", 3, column, lambda value: value + step)
        assert f" {column}:" in only(compare_results(*pair, tolerance=1.0))

    @pytest.mark.parametrize(
        ("name", "column", "step"),
        [("forgetting.csv", "before", 0.02), ("forgetting.csv", "after", -0.02), ("gradient_angles.csv", "mean", 3.6)],
    )
    def test_the_other_tables(self, pair: tuple[Path, Path], name: str, column: str, step: float) -> None:
        edit(pair[1], name, 1, column, lambda value: value + step)
        line = only(compare_results(*pair))
        assert line.startswith(name) and f" {column}:" in line and "probe" in line

    @pytest.mark.parametrize(
        ("name", "column"), [("detection.csv", "ap"), ("forgetting.csv", "after"), ("gradient_angles.csv", "mean")]
    )
    @pytest.mark.parametrize("side", [0, 1])
    def test_a_value_that_only_one_table_has(self, pair: tuple[Path, Path], name: str, column: str, side: int) -> None:
        edit(pair[side], name, 1, column, "")
        assert f" {column}:" in only(compare_results(*pair))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(("side", "where"), [(0, "reproduced"), (1, "committed")])
    def test_a_row_that_only_one_table_has(self, pair: tuple[Path, Path], name: str, side: int, where: str) -> None:
        table = read_text(pair[side] / name)
        table.drop(index=len(table) - 1).to_csv(pair[side] / name, index=False)
        line = only(compare_results(*pair))
        assert name in line and "1 rows" in line and f"only in the {where}" in line and "dgs" in line

    @pytest.mark.parametrize(("side"), [0, 1])
    def test_a_column_that_only_one_table_has(self, pair: tuple[Path, Path], side: int) -> None:
        table = read_text(pair[side] / "detection.csv")
        table.drop(columns="ece").to_csv(pair[side] / "detection.csv", index=False)
        line = only(compare_results(*pair))
        assert "detection.csv" in line and "ece" in line

    def test_a_generator_that_turned_from_seen_to_unseen(self, pair: tuple[Path, Path]) -> None:
        edit(pair[1], "detection.csv", 0, "seen", "false")
        lines = compare_results(*pair)
        assert lines and all("detection.csv" in line and "alpha" in line for line in lines)

    def test_many_differences_are_listed_in_part_and_counted(self, pair: tuple[Path, Path]) -> None:
        for folder, shift in zip(pair, (0.0, 0.1), strict=True):
            table = detection(0.9)
            wide = pd.concat([table.assign(seed=table["seed"] + 2 * index) for index in range(3)])
            write_detection(wide.assign(acc=wide["acc"] - shift), folder / "detection.csv")
        lines = compare_results(*pair)
        assert len(lines) < 48
        assert f"and {48 - (len(lines) - 1)} rows more" in lines[-1]


class TestFiles:
    others = ("REPORT.md", "figures/evaluate/detection.png", "notebooks/evaluate.ipynb", "notes/my own.txt")

    def fill(self, folder: Path, content: str) -> None:
        for name in self.others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)

    def test_files_that_both_have_may_differ_in_their_bytes(self, pair: tuple[Path, Path]) -> None:
        for folder, content in zip(pair, ("one", "two"), strict=True):
            self.fill(folder, content)
        assert compare_results(*pair) == []

    @pytest.mark.parametrize("name", [*others, "training.csv"])
    @pytest.mark.parametrize(("side", "where"), [(0, "reproduced"), (1, "committed")])
    def test_a_file_that_only_one_folder_has_is_named(
        self, pair: tuple[Path, Path], name: str, side: int, where: str
    ) -> None:
        for folder in pair:
            self.fill(folder, "same")
        (pair[side] / name).unlink()
        assert only(compare_results(*pair)) == f"{name}: only in the {where} folder"

    def test_tables_of_other_commands_are_no_part_of_what_is_reproduced(self, pair: tuple[Path, Path]) -> None:
        """The committed results have the search for settings and the bound beside them; the pipeline makes neither."""
        committed = Path(__file__).parents[1] / "results/mini"
        assert {"tuning.csv", "ceiling.csv"} <= {path.name for path in committed.glob("*.csv")} & set(ASIDE)
        for name in ASIDE:
            (pair[0] / name).write_text("a\n1\n")
        assert compare_results(*pair) == []

    def test_a_table_that_neither_has_is_no_difference(self, pair: tuple[Path, Path]) -> None:
        for folder in pair:
            (folder / "gradient_angles.csv").unlink()
        assert compare_results(*pair) == []

    def test_what_tools_leave_behind_is_passed_over(self, pair: tuple[Path, Path]) -> None:
        (pair[1] / "notebooks/.ipynb_checkpoints").mkdir(parents=True)
        (pair[1] / "notebooks/.ipynb_checkpoints/evaluate-checkpoint.ipynb").write_text("{}")
        (pair[0] / ".DS_Store").write_text("")
        assert compare_results(*pair) == []

    @pytest.mark.parametrize("name", ["metrics.json", "detection.csv", "forgetting.csv", "gradient_angles.csv"])
    @pytest.mark.parametrize("side", [0, 1])
    def test_a_missing_table_is_named_with_its_folder(self, pair: tuple[Path, Path], name: str, side: int) -> None:
        (pair[side] / name).unlink()
        with pytest.raises(UserError) as error:
            compare_results(*pair)
        message = str(error.value)
        assert name in message and str(pair[side]) in message and "make repro" in message
        assert "\n" not in message

    @pytest.mark.parametrize("name", ["metrics.json", "forgetting.csv", "training.csv"])
    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x80", b'a\n1,"2\n3\n'])
    @pytest.mark.parametrize(("side", "where"), [(0, "committed"), (1, "reproduced")])
    def test_a_broken_file_is_one_line(
        self, pair: tuple[Path, Path], name: str, content: bytes, side: int, where: str
    ) -> None:
        (pair[side] / name).write_bytes(content)
        line = only(compare_results(*pair))
        assert line.startswith(f"{name}: the {where} file is no ")


@with_and_without_rho
class TestRepeatedRows:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(("side", "where"), [(0, "committed"), (1, "reproduced")])
    def test_a_row_twice_is_one_sentence_with_table_and_key(
        self, pair: tuple[Path, Path], name: str, side: int, where: str
    ) -> None:
        table = read_text(pair[side] / name)
        pd.concat([table, table.iloc[[1]]]).to_csv(pair[side] / name, index=False)
        line = only(compare_results(*pair))
        assert line.startswith(f"{name} [") and f"2 times in the {where} file" in line
        row = table.iloc[1]
        assert all(str(row[key]) in line for key in TABLES[name] if key in table.columns and row[key]), line

    def test_many_are_counted_and_the_other_rows_are_compared(self, pair: tuple[Path, Path]) -> None:
        edit(pair[1], "forgetting.csv", 5, "after", lambda value: value + 0.02)
        table = read_text(pair[1] / "forgetting.csv")
        pd.concat([table, table.iloc[:3]]).to_csv(pair[1] / "forgetting.csv", index=False)
        first, second = compare_results(*pair)
        assert "and 2 other rows more than once" in first and " after:" in second


class TestTraining:
    @pytest.mark.parametrize("column", ["loss", "loss_task", "val_balanced_acc"])
    def test_a_change_beyond_the_tolerance(self, pair: tuple[Path, Path], column: str) -> None:
        row = edit(pair[1], "training.csv", 1, column, lambda value: value + 0.02)
        line = only(compare_results(*pair))
        assert line.startswith("training.csv [") and f" {column}:" in line and str(row[column]) in line
        assert all(str(row[key]) in line for key in ("method", "seed", "epoch", "step"))

    def test_the_tolerance_is_absolute(self, pair: tuple[Path, Path]) -> None:
        for folder in pair:
            edit(folder, "training.csv", 1, "loss", "1000.0")
        edit(pair[1], "training.csv", 1, "loss", lambda value: value + 0.009)
        assert compare_results(*pair) == []
        edit(pair[1], "training.csv", 1, "loss", lambda value: value + 0.009)
        assert " loss:" in only(compare_results(*pair))

    def test_a_missing_value_equals_a_missing_value_alone(self, pair: tuple[Path, Path]) -> None:
        assert read_text(pair[0] / "training.csv")["val_balanced_acc"].tolist().count("") == 4
        edit(pair[1], "training.csv", 0, "val_balanced_acc", "0.5")
        assert " val_balanced_acc:" in only(compare_results(*pair))

    def test_a_log_without_rho(self, pair: tuple[Path, Path]) -> None:
        for folder in pair:
            read_text(folder / "training.csv").drop(columns="rho").to_csv(folder / "training.csv", index=False)
        assert compare_results(*pair) == []
        edit(pair[1], "training.csv", 1, "loss", lambda value: value + 0.02)
        assert " loss:" in only(compare_results(*pair))

    def test_a_log_where_one_side_alone_has_rho(self, pair: tuple[Path, Path]) -> None:
        read_text(pair[0] / "training.csv").drop(columns="rho").to_csv(pair[0] / "training.csv", index=False)
        assert only(compare_results(*pair)) == "training.csv: column rho only in the reproduced file"


class TestSeeds:
    def test_a_run_of_one_seed_reproduces_what_that_seed_made(self, pair: tuple[Path, Path]) -> None:
        committed, one = pair
        for name in NAMES:
            table = read_text(one / name)
            table[table["seed"] == "1"].to_csv(one / name, index=False)
        content = metrics()
        for values in content["methods"].values():
            for value in values.values():  # as of a run of seed 1: no means and intervals of two, no seed 0
                value |= {"mean": value["per_seed"]["1"], "low": None, "high": None}
        (one / "metrics.json").write_text(json.dumps(content))
        assert compare_results(committed, one, seeds=[1]) == []
        assert len(compare_results(committed, one)) > len(NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_what_that_seed_made_otherwise_is_reported_and_what_others_made_is_not(
        self, pair: tuple[Path, Path], name: str
    ) -> None:
        seeds = read_text(pair[1] / name)["seed"]
        column = {"detection.csv": "auroc", "forgetting.csv": "after", "training.csv": "loss"}.get(name, "mean")
        edit(pair[1], name, int((seeds == "1").to_numpy().nonzero()[0][0]), column, lambda value: value + 8)
        assert compare_results(*pair, seeds=[0]) == []
        assert column in only(compare_results(*pair, seeds=[1]))

    def test_a_seeds_value_in_the_metrics(self, pair: tuple[Path, Path]) -> None:
        content = metrics()
        put(content, ("methods", "dgs", "ap_unseen", "per_seed", "1"), lambda value: value + 0.02)
        (pair[1] / "metrics.json").write_text(json.dumps(content))
        assert compare_results(*pair, seeds=[0]) == []
        assert "dgs.ap_unseen.per_seed.1" in only(compare_results(*pair, seeds=[0, 1]))

    @pytest.mark.parametrize("seeds", [[], [0, 7]])
    def test_a_seed_that_was_never_run(self, pair: tuple[Path, Path], seeds: list[int]) -> None:
        with pytest.raises(UserError, match=r"Expected some of the seeds \[0, 1\] .* found .*Name others"):
            compare_results(*pair, seeds=seeds)


def test_text_where_a_number_was_is_reported(pair: tuple[Path, Path]) -> None:
    edit(pair[1], "forgetting.csv", 2, "after", "much")
    assert any(" after: committed 0.7, reproduced much" in line for line in compare_results(*pair))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    committed = write(tmp_path / "committed")
    shutil.copytree(committed, tmp_path / "other")
    with pytest.raises(UserError, match="gone"):
        compare_results(committed, tmp_path / "gone")
