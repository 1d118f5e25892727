"""Comparing two results folders: equal ones agree, and whatever moved is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from copies import ROOT

from dgs.analysis.metrics import DETECTION_COLUMNS, RATES, write_detection
from dgs.analysis.verify import ASIDE, TABLES, compare_results, rounding_notes
from dgs.errors import UserError

METHODS = ("probe", "dgs")
NAMES = ("detection.csv", "forgetting.csv", "gradient_angles.csv", "training.csv", "verdicts.csv")
OTHERS = ("REPORT.md", "figures/evaluate/detection.png", "notebooks/evaluate.ipynb", "notes/my own.txt")
Pair = tuple[Path, Path]
SIDES = ("committed", "reproduced")
either_side = pytest.mark.parametrize("side", [0, 1], ids=SIDES)


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


def crossed(runs: pd.DataFrame, column: str, values: tuple[Any, ...], **others: Any) -> pd.DataFrame:
    """Each run with each value of a column, and further columns."""
    return runs.merge(pd.DataFrame({column: values}), how="cross").assign(**others)


def tables(rho: float | None) -> dict[str, pd.DataFrame]:
    """What a run of two methods and seeds writes, but for metrics.json."""
    runs = crossed(crossed(pd.DataFrame({"rho": [rho]}, dtype=float), "method", METHODS), "seed", (0, 1))
    generators = pd.DataFrame({"generator": ["alpha", "gamma"], "seen": [True, False], "number": [0, 1]})
    cells = crossed(runs.merge(generators, how="cross"), "threshold_rule", ("0.5", "val"))
    rates = {name: 0.5 + 0.02 * index + 0.01 * cells["number"] for index, name in enumerate(RATES)}
    cells = cells.assign(condition="native", applied_to="both", n_real=100, n_fake=120, **rates)
    steps = crossed(runs, "step", (0, 10))
    return {
        "detection.csv": cells[DETECTION_COLUMNS],
        "forgetting.csv": crossed(runs, "measure", ("zero_shot_shape", "cka"), before=0.9, after=0.7),
        "gradient_angles.csv": steps.assign(layer="features", pair="task-harmful", mean=90.0, p05=80.0, p95=100.0),
        "training.csv": steps.assign(
            epoch=0, loss=0.69, loss_task=0.6, val_balanced_acc=[0.75 if step else None for step in steps["step"]]
        ),
        "verdicts.csv": runs.merge(generators, how="cross")
        .drop(columns="number")
        .assign(n_real=100, n_fake=120, ece_before=0.06, ece_after=0.05, aurc=0.2, miss=0.1),
    }


def write(folder: Path, rho: float | None = 0.9) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics(), indent=1))
    for name, table in tables(rho).items():
        if name == "detection.csv":
            write_detection(table, folder / name)
        else:
            table.to_csv(folder / name, index=False)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[float | None, Path]:
    """A results folder of data with rho and of one's own without."""
    return {rho: write(tmp_path_factory.mktemp("made") / "results", rho) for rho in (0.9, None)}


@pytest.fixture
def pair(made: dict[float | None, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Pair:
    """Two equal folders."""
    first, second = (shutil.copytree(made[getattr(request, "param", 0.9)], tmp_path / side) for side in SIDES)
    return first, second


with_and_without_rho = pytest.mark.parametrize("pair", [0.9, None], indirect=True, ids=["rho", "no rho"])


def put(content: Any, path: tuple[Any, ...], change: Any) -> Any:
    """`content` with another value at a path (a function is given the old one)."""
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]]) if callable(change) else change
    return content


def edit_metrics(folder: Path, path: tuple[Any, ...], change: Any) -> None:
    (folder / "metrics.json").write_text(json.dumps(put(metrics(), path, change)))


def number_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, float):
        yield path
    elif isinstance(value, dict):
        for key in value:
            yield from number_paths(value[key], (*path, key))


def read_text(file: Path) -> pd.DataFrame:
    """A table with every cell as it is written."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def edit(folder: Path, name: str, row: int, column: str, change: Any) -> pd.Series:
    """Change one cell of a table (a number is added to its own); returns the row as it was."""
    table = read_text(folder / name)
    before = table.iloc[row].copy()
    if not isinstance(change, str):
        change = str((float if "." in before[column] else int)(before[column]) + change)
    table.loc[row, column] = change
    table.to_csv(folder / name, index=False)
    return before


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


class TestAgreement:
    @with_and_without_rho
    def test_a_folder_agrees_with_itself_and_its_copy_in_any_order_of_rows(self, pair: Pair) -> None:
        assert compare_results(pair[0], pair[0]) == []
        assert compare_results(*pair) == []
        for name in NAMES:
            read_text(pair[1] / name).sample(frac=1, random_state=1).to_csv(pair[1] / name, index=False)
        assert compare_results(*pair) == []

    def test_half_a_point_is_within_the_tolerance_unless_it_is_stricter(self, pair: Pair) -> None:
        content = metrics()
        for path in list(number_paths(content)):
            put(content, path, lambda value: value + 0.005)
        (pair[1] / "metrics.json").write_text(json.dumps(content))
        edit(pair[1], "detection.csv", 2, "acc", -0.005)
        edit(pair[1], "forgetting.csv", 2, "after", 0.005)
        edit(pair[1], "gradient_angles.csv", 2, "mean", 0.9)  # degrees: 1 % of 180
        assert compare_results(*pair) == []
        lines = compare_results(*pair, tolerance=0.001)
        assert len(lines) == 2 * 4 * 5 + 3 and any(" acc:" in line for line in lines)


class TestMetrics:
    def test_two_points_in_any_metric_are_reported_by_name(self, pair: Pair) -> None:
        paths = list(number_paths(metrics()))
        assert len(paths) == 2 * 4 * 5
        for number, path in enumerate(paths):
            edit_metrics(pair[1], path, lambda value, step=0.02 * (-1) ** number: value + step)
            line = only(compare_results(*pair))
            assert all(str(part) in line for part in path), line
            assert line.startswith("metrics.json")

    @either_side
    @pytest.mark.parametrize("value", [0.42, None, float("nan"), "0.8", True])
    def test_another_number_or_none_is_reported_on_either_side(self, pair: Pair, side: int, value: Any) -> None:
        edit_metrics(pair[side], ("methods", "dgs", "ap_unseen", "mean"), value)
        assert "dgs.ap_unseen.mean" in only(compare_results(*pair))

    @pytest.mark.parametrize("name", ["profile", "data_hash"])
    def test_names_and_hashes_must_be_equal(self, pair: Pair, name: str) -> None:
        edit_metrics(pair[1], (name,), "other")
        line = only(compare_results(*pair))
        assert name in line and "other" in line and metrics()[name] in line

    def test_numbers_in_lists_have_the_tolerance_too_and_an_empty_one_holds_nothing(self, pair: Pair) -> None:
        for folder, end, empty in zip(pair, (2.0, 2.001), ({}, []), strict=True):
            edit_metrics(folder, ("more",), {"curve": [1.0, {"end": end}], "empty": empty})
        assert compare_results(*pair) == []
        edit_metrics(pair[1], ("more",), {"curve": [1.0, {"end": 2.02}]})
        assert only(compare_results(*pair)) == "metrics.json more.curve[1].end: committed 2.0, reproduced 2.02"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[1]", "expected an object, found list)"),
            ("null", "expected an object, found null)"),
            ("[" * 100_000, "maximum recursion depth exceeded"),
        ],
    )
    @either_side
    def test_json_that_is_no_object(self, pair: Pair, side: int, text: str, reason: str) -> None:
        (pair[side] / "metrics.json").write_text(text)
        assert rounding_notes(*pair) == []
        line = only(compare_results(*pair))
        assert line.startswith(f"metrics.json: the {SIDES[side]} file is no JSON object ({reason}")

    @either_side
    def test_a_metric_that_only_one_file_has(self, pair: Pair, side: int) -> None:
        content = metrics()
        del content["methods"]["dgs"]["zero_shot_kept"]["mean"]
        (pair[side] / "metrics.json").write_text(json.dumps(content))
        line = only(compare_results(*pair))
        assert "dgs.zero_shot_kept.mean" in line and f"only in the {SIDES[1 - side]}" in line


def test_what_rounds_differently_is_a_note_and_no_difference(pair: Pair) -> None:
    assert rounding_notes(*pair) == []
    for folder, gemm in zip(pair, ("torch", "onednn"), strict=True):
        rows = f"| `compute.device` | `cpu` |\n| `compute.gemm` | `{gemm}` |\n| `compute.threads` | `1` |\n"
        (folder / "REPORT.md").write_text(rows)
    note, rest, left_out = rounding_notes(*pair)
    assert note.startswith("compute.gemm was torch for the committed results and onednn for the reproduced ones")
    assert "jobs" in rest and "thresholds" in left_out
    assert compare_results(*pair) == []


class TestTables:
    @with_and_without_rho
    @pytest.mark.parametrize(
        ("name", "column", "step"),
        [
            *(("detection.csv", rate, 0.02) for rate in RATES),
            ("forgetting.csv", "before", 0.02),
            ("forgetting.csv", "after", -0.02),
            ("gradient_angles.csv", "mean", 3.6),
            *(("verdicts.csv", column, 0.02) for column in ("ece_after", "aurc", "miss")),
            *(("training.csv", column, 0.02) for column in ("loss", "loss_task", "val_balanced_acc")),
        ],
    )
    def test_two_points_in_any_table_are_reported_by_row(self, pair: Pair, name: str, column: str, step: float) -> None:
        row = edit(pair[1], name, 5, column, step)
        line = only(compare_results(*pair))
        assert line.startswith(f"{name} [") and f" {column}:" in line and str(float(row[column])) in line
        named = [row[key] for key in TABLES[name] if key in row and key != "seen"]
        assert all(value in line for value in named), line

    @pytest.mark.parametrize("name", ["detection.csv", "verdicts.csv"])
    @pytest.mark.parametrize("column", ["n_real", "n_fake"])
    @pytest.mark.parametrize("step", [1, -1])
    def test_a_count_off_by_one(self, pair: Pair, name: str, column: str, step: int) -> None:
        edit(pair[1], name, 3, column, step)
        assert f" {column}:" in only(compare_results(*pair, tolerance=1.0))

    @pytest.mark.parametrize(
        ("name", "column"),
        [
            ("detection.csv", "ap"),
            ("forgetting.csv", "after"),
            ("gradient_angles.csv", "mean"),
            ("training.csv", "loss"),
            ("verdicts.csv", "aurc"),
        ],
    )
    @either_side
    def test_a_value_that_only_one_table_has(self, pair: Pair, name: str, column: str, side: int) -> None:
        edit(pair[side], name, 1, column, "")
        assert f" {column}:" in only(compare_results(*pair))

    @with_and_without_rho
    @pytest.mark.parametrize("name", NAMES)
    @either_side
    def test_a_row_that_one_table_lacks_or_has_twice(self, pair: Pair, name: str, side: int) -> None:
        table = read_text(pair[side] / name)
        table.drop(index=len(table) - 1).to_csv(pair[side] / name, index=False)
        line = only(compare_results(*pair))
        assert name in line and "1 rows" in line and f"only in the {SIDES[1 - side]}" in line and "dgs" in line
        pd.concat([table, table.iloc[[1]]]).to_csv(pair[side] / name, index=False)
        line = only(compare_results(*pair))
        assert line.startswith(f"{name} [") and f"2 times in the {SIDES[side]} file" in line
        row = table.iloc[1]
        assert all(str(row[key]) in line for key in TABLES[name] if key in table.columns and row[key]), line

    def test_many_repeated_rows_are_counted_and_the_others_are_compared(self, pair: Pair) -> None:
        edit(pair[1], "forgetting.csv", 5, "after", 0.02)
        table = read_text(pair[1] / "forgetting.csv")
        pd.concat([table, table.iloc[:3]]).to_csv(pair[1] / "forgetting.csv", index=False)
        first, second = compare_results(*pair)
        assert "and 2 other rows more than once" in first and " after:" in second

    @pytest.mark.parametrize(("name", "column"), [("detection.csv", "ece"), ("training.csv", "rho")])
    @either_side
    def test_a_column_that_only_one_table_has(self, pair: Pair, side: int, name: str, column: str) -> None:
        read_text(pair[side] / name).drop(columns=column).to_csv(pair[side] / name, index=False)
        assert only(compare_results(*pair)) == f"{name}: column {column} only in the {SIDES[1 - side]} file"

    def test_a_generator_that_turned_from_seen_to_unseen(self, pair: Pair) -> None:
        edit(pair[1], "detection.csv", 0, "seen", "false")
        lines = compare_results(*pair)
        assert lines and all("detection.csv" in line and "alpha" in line for line in lines)

    def test_many_differences_are_listed_in_part_and_counted(self, pair: Pair) -> None:
        table = tables(0.9)["detection.csv"]
        wide = pd.concat([table.assign(seed=table["seed"] + 2 * index) for index in range(3)])
        for folder, shift in zip(pair, (0.0, 0.1), strict=True):
            write_detection(wide.assign(acc=wide["acc"] - shift), folder / "detection.csv")
        lines = compare_results(*pair)
        assert len(lines) < 48
        assert f"and {48 - (len(lines) - 1)} rows more" in lines[-1]

    def test_text_where_a_number_was_is_reported(self, pair: Pair) -> None:
        edit(pair[1], "forgetting.csv", 2, "after", "much")
        assert any(" after: committed 0.7, reproduced much" in line for line in compare_results(*pair))

    def test_losses_have_an_absolute_tolerance_and_need_no_rho(self, pair: Pair) -> None:
        for folder in pair:
            read_text(folder / "training.csv").drop(columns="rho").to_csv(folder / "training.csv", index=False)
            edit(folder, "training.csv", 1, "loss", "1000.0")
        edit(pair[1], "training.csv", 1, "loss", 0.009)
        assert compare_results(*pair) == []
        edit(pair[1], "training.csv", 1, "loss", 0.009)
        assert " loss:" in only(compare_results(*pair))

    def test_a_missing_value_equals_a_missing_value_alone(self, pair: Pair) -> None:
        assert read_text(pair[0] / "training.csv")["val_balanced_acc"].tolist().count("") == 4
        edit(pair[1], "training.csv", 0, "val_balanced_acc", "0.5")
        assert " val_balanced_acc:" in only(compare_results(*pair))


class TestOtherRounding:
    """Where reports say so, what last bits decide is not compared: here, on an x86 of another vendor."""

    @pytest.fixture
    def computed(self, pair: Pair) -> Pair:
        """The pair with pixel_cnn in place of dgs, the products of matrices summed in two orders."""
        for folder, gemm in zip(pair, ("torch", "onednn"), strict=True):
            for name in (*NAMES, "metrics.json"):
                (folder / name).write_text((folder / name).read_text().replace("dgs", "pixel_cnn"))
            (folder / "REPORT.md").write_text(f"| `compute.gemm` | `{gemm}` |\n")
        assert compare_results(*pair) == []
        return pair

    def row(self, folder: Path, name: str, **wanted: str) -> int:
        table = read_text(folder / name)
        return (table[list(wanted)] == pd.Series(wanted)).all(axis=1).tolist().index(True)

    @pytest.mark.parametrize(
        ("name", "column", "wanted"),
        [
            ("detection.csv", "ap", {"method": "pixel_cnn", "threshold_rule": "0.5"}),
            ("detection.csv", "balanced_acc", {"method": "probe", "threshold_rule": "val"}),
            ("training.csv", "loss", {"method": "pixel_cnn"}),
            ("verdicts.csv", "miss", {"method": "probe"}),
            ("verdicts.csv", "ece_after", {"method": "probe"}),
        ],
    )
    def test_what_last_bits_decide_is_compared_with_the_same_rounding_alone(
        self, computed: Pair, name: str, column: str, wanted: dict[str, str]
    ) -> None:
        edit(computed[1], name, self.row(computed[1], name, **wanted), column, 0.1)
        assert compare_results(*computed) == []
        shutil.copy(computed[0] / "REPORT.md", computed[1])
        assert f" {column}:" in only(compare_results(*computed))

    @pytest.mark.parametrize(
        ("name", "column", "step", "wanted"),
        [
            ("detection.csv", "balanced_acc", 0.02, {"method": "probe", "threshold_rule": "0.5"}),
            ("detection.csv", "n_real", 1, {"method": "pixel_cnn", "threshold_rule": "val"}),
            ("forgetting.csv", "after", 0.02, {"method": "probe"}),
            ("gradient_angles.csv", "mean", 3.6, {"method": "probe"}),
            ("training.csv", "loss", 0.02, {"method": "probe"}),
            ("verdicts.csv", "ece_before", 0.02, {"method": "probe"}),
        ],
    )
    def test_the_rest_is_compared(
        self, computed: Pair, name: str, column: str, step: float, wanted: dict[str, str]
    ) -> None:
        edit(computed[1], name, self.row(computed[1], name, **wanted), column, step)
        assert f" {column}:" in only(compare_results(*computed))

    @pytest.mark.parametrize("name", NAMES)
    def test_so_are_rows(self, computed: Pair, name: str) -> None:
        table = read_text(computed[1] / name)
        table[table["method"] != "pixel_cnn"].to_csv(computed[1] / name, index=False)
        assert "rows only in the committed file" in only(compare_results(*computed))

    def test_a_network_from_scratch_is_held_to_its_averages(self, computed: Pair) -> None:
        content = json.loads((computed[1] / "metrics.json").read_text())
        put(content, ("methods", "pixel_cnn", "ap_unseen", "mean"), lambda value: value + 0.02)
        (computed[1] / "metrics.json").write_text(json.dumps(content))
        assert "pixel_cnn" in only(compare_results(*computed))


class TestFiles:
    def test_files_that_both_have_may_differ_in_their_bytes_and_one_that_one_lacks_is_named(self, pair: Pair) -> None:
        for folder in pair:
            for name in OTHERS:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(str(folder))
        assert compare_results(*pair) == []
        for name in (*OTHERS, "training.csv", "verdicts.csv"):
            for folder, other in (pair, pair[::-1]):
                content = (folder / name).read_bytes()
                (folder / name).unlink()
                assert only(compare_results(*pair)) == f"{name}: only in the {other.name} folder"
                (folder / name).write_bytes(content)

    def test_tables_of_other_commands_and_what_tools_leave_are_no_part_of_what_is_reproduced(self, pair: Pair) -> None:
        """The committed results have tables of other commands beside them; the pipeline makes none of these."""
        for name in ASIDE:
            (pair[0] / name).write_text("a\n1\n")
        (pair[1] / "notebooks/.ipynb_checkpoints").mkdir(parents=True)
        (pair[1] / "notebooks/.ipynb_checkpoints/evaluate-checkpoint.ipynb").write_text("{}")
        (pair[0] / ".DS_Store").write_text("")
        (pair[0] / "train/probe").mkdir(parents=True)
        (pair[0] / "train/probe/seed0.safetensors").write_text("")
        assert compare_results(*pair) == []

    @pytest.mark.parametrize("profile", ["mini", "real"])
    def test_every_committed_table_is_an_output_of_a_stage_or_said_to_be_another_commands(self, profile: str) -> None:
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
        outputs = {next(iter(out)) if isinstance(out, dict) else out for stage in stages for out in stage["outs"]}
        made = {Path(out).name for out in outputs if out.startswith("results/${profile}/")}
        results = ROOT / "results" / profile
        committed = {path.name for path in results.iterdir() if path.suffix in (".csv", ".parquet")}
        assert committed - set(ASIDE) <= made, "add it to ASIDE of dgs/analysis/verify.py, or make it in a stage"

    @pytest.mark.parametrize("name", ["metrics.json", "detection.csv", "forgetting.csv", "gradient_angles.csv"])
    @either_side
    def test_a_missing_table_is_named_with_its_folder_unless_both_lack_it(
        self, pair: Pair, name: str, side: int
    ) -> None:
        (pair[side] / name).unlink()
        with pytest.raises(UserError) as error:
            compare_results(*pair)
        message = str(error.value)
        assert name in message and str(pair[side]) in message and "make repro" in message
        assert "\n" not in message
        (pair[1 - side] / name).unlink()
        if name != "metrics.json":
            assert compare_results(*pair) == []

    @pytest.mark.parametrize("name", ["metrics.json", "forgetting.csv", "training.csv"])
    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x80", b'a\n1,"2\n3\n'])
    @either_side
    def test_a_broken_file_is_one_line(self, pair: Pair, name: str, content: bytes, side: int) -> None:
        (pair[side] / name).write_bytes(content)
        assert only(compare_results(*pair)).startswith(f"{name}: the {SIDES[side]} file is no ")

    def test_a_missing_folder_is_named(self, pair: Pair, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gone"):
            compare_results(pair[0], tmp_path / "gone")


class TestSeeds:
    def test_a_run_of_one_seed_reproduces_what_that_seed_made(self, pair: Pair) -> None:
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
    def test_what_that_seed_made_otherwise_is_reported_and_what_others_made_is_not(self, pair: Pair, name: str) -> None:
        seeds = read_text(pair[1] / name)["seed"]
        columns = {
            "detection.csv": "auroc", "forgetting.csv": "after", "training.csv": "loss", "verdicts.csv": "aurc"
        }  # fmt: skip
        column = columns.get(name, "mean")
        edit(pair[1], name, int((seeds == "1").to_numpy().nonzero()[0][0]), column, 8)
        assert compare_results(*pair, seeds=[0]) == []
        assert column in only(compare_results(*pair, seeds=[1]))

    def test_a_seeds_value_in_the_metrics(self, pair: Pair) -> None:
        edit_metrics(pair[1], ("methods", "dgs", "ap_unseen", "per_seed", "1"), lambda value: value + 0.02)
        assert compare_results(*pair, seeds=[0]) == []
        assert "dgs.ap_unseen.per_seed.1" in only(compare_results(*pair, seeds=[0, 1]))

    @pytest.mark.parametrize("seeds", [[], [0, 7]])
    def test_a_seed_that_was_never_run(self, pair: Pair, seeds: list[int]) -> None:
        with pytest.raises(UserError, match=r"Expected some of the seeds \[0, 1\] .* found .*Name others"):
            compare_results(*pair, seeds=seeds)

    @pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
    def test_a_table_without_seeds(self, pair: Pair, content: str) -> None:
        (pair[0] / "detection.csv").write_text(content)
        with pytest.raises(UserError, match=r"Expected a column seed in .*detection\.csv, found none\. Name another"):
            compare_results(*pair, seeds=[0])
