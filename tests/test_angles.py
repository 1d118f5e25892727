"""The gradient-angle tables: what training logged, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dgs.analysis import angles as analysis
from dgs.analysis.figures.angles import angles_over_training
from dgs.errors import UserError
from dgs.model.surgery import residual_directions, split_signs, suppress
from dgs.model.training_log import TrainingLog, angles, effective_rank, inner_products, write_logs

PAIRS = ["task-harmful", "task-applied"]
Vectors = dict[str, Tensor]


def rows(*vectors: list[float]) -> Tensor:
    return torch.tensor(vectors)


def some_gradients(applied: Callable[[Vectors], Tensor], count: int = 8, width: int = 6) -> Vectors:
    """Gradients as a step has them, with a surgery of one's own."""
    task, text, teacher = torch.randn(3, count, width, dtype=torch.float64)
    vectors = {"task": task, "harmful": split_signs(text)[0], "beneficial": split_signs(teacher)[1]}
    return {**vectors, "applied": applied(vectors)}


def noted(
    vectors: Vectors, method: str = "dgs", seed: int = 0, steps: Iterable[int] = (0, 10),
    layers: tuple[str, ...] = ("0.q", "1.v"),
) -> TrainingLog:  # fmt: skip
    """A journal with the same gradients at some steps."""
    journal = TrainingLog(method, seed)
    count = len(vectors["task"])
    for step in steps:
        journal.gradients(step, list(range(count)), torch.arange(count).remainder(2), vectors)
        for layer in layers:
            flat = {name: vectors[name].flatten()[None] for name in ("task", "harmful", "applied")}
            journal.layer(step, layer, flat)
    return journal


def written(folder: Path, *journals: TrainingLog) -> Path:
    folder.mkdir()
    write_logs(folder, journals)
    return folder


def turned_by(degrees: float) -> Vectors:
    """Two samples whose task gradient is so far from harm; nothing is done to them."""
    radians = np.radians(degrees)
    task = rows([np.cos(radians), np.sin(radians)], [2 * np.cos(radians), -2 * np.sin(radians)])
    harm = rows([1.0, 0.0], [3.0, 0.0])
    return {"task": task, "harmful": harm, "beneficial": rows([0.0, -1.0], [0.0, -1.0]), "applied": task}


class TestGeometry:
    def test_angles_by_hand(self) -> None:
        a = rows([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0])
        b = rows([2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 0.0])
        found = angles(a, b)
        assert np.allclose(found[:4], [0, 90, 180, 45], rtol=0, atol=1e-5)
        assert torch.isnan(found[4]), "a zero gradient has no direction"

    def test_inner_products_keep_each_pair_once(self) -> None:
        found = inner_products({"a": rows([1.0, 2.0], [0.0, 1.0]), "b": rows([3.0, 1.0], [5.0, 0.0])})
        expected = {"a.a": [5, 1], "a.b": [5, 0], "b.b": [10, 25]}
        assert {name: value.tolist() for name, value in found.items()} == expected

    @given(st.integers(1, 5), st.integers(1, 4))
    def test_k_orthogonal_directions_equally_often_have_effective_rank_k(self, k: int, often: int) -> None:
        lengths = torch.arange(1.0, k * often + 1)[:, None]
        assert effective_rank(torch.eye(7)[:k].repeat(often, 1) * lengths) == pytest.approx(k)

    def test_zero_rows_have_no_direction(self) -> None:
        assert effective_rank(rows([0.0, 0.0], [2.0, 0.0])) == pytest.approx(1)
        assert np.isnan(effective_rank(torch.zeros(3, 2)))

    def test_harmful_directions_of_a_linear_head_have_rank_two_at_most(self) -> None:
        harmful, _ = split_signs(residual_directions(torch.randn(64), torch.randn(20)))
        assert 1 < effective_rank(harmful) <= 2 + 1e-9
        assert effective_rank(torch.randn(64, 20)) > 10


class TestEnergies:
    def test_exact_suppression_removes_the_squared_cosine_and_adds_nothing(self) -> None:
        samples = noted(some_gradients(lambda v: suppress(v["task"], v["harmful"], eps=0.0))).samples
        found = analysis.energies(samples)
        assert np.allclose(found["removed"] / found["task"], analysis.cosines(samples, "task", "harmful") ** 2)
        assert (found["added"] == 0).all()
        assert np.allclose(analysis.degrees(samples, "applied-harmful"), 90)

    def test_what_alignment_adds_off_harm_is_added_and_along_it_counts_against_removed(self) -> None:
        vectors = turned_by(90.0)
        vectors["applied"] = vectors["task"] + rows([0.5, 2.0], [0.0, 0.0])
        found = analysis.energies(noted(vectors, steps=(0,)).samples)
        assert np.allclose(found["added"], [4.0, 0.0], rtol=0, atol=1e-6)
        assert np.allclose(found["removed"], [-0.25, 0.0], rtol=0, atol=1e-6)

    def test_without_surgery_nothing_is_removed_or_added(self) -> None:
        table = noted(some_gradients(lambda v: v["task"]))
        found = analysis.batch_table(table.samples, table.batches, 0.9)
        assert (found[["removed", "added"]] == 0).all(axis=None)

    def test_a_batchs_shares_are_sums_by_sums(self) -> None:
        """A confident sample with next to no gradient weighs as little as it does in training."""
        vectors = turned_by(60.0)
        vectors["task"][1] *= 1e-3
        vectors["applied"] = suppress(vectors["task"], vectors["harmful"], eps=0.0)
        vectors["applied"][1] += rows([0.0, 1e-3])[0]
        journal = noted(vectors, steps=(0,))
        found = analysis.batch_table(journal.samples, journal.batches, None).iloc[0]
        assert found["removed"] == pytest.approx(0.25, abs=1e-5) and found["added"] < 1e-5

    def test_conflicts_are_the_samples_beyond_a_right_angle(self) -> None:
        vectors = turned_by(60.0)
        vectors["task"][0] *= -1
        journal = noted(vectors, steps=(0,))
        found = analysis.batch_table(journal.samples, journal.batches, None).iloc[0]
        assert (found["conflict_harmful"], found["conflict_beneficial"]) == (0.5, 0.0)
        assert found["effective_rank"] == pytest.approx(1)


class TestTables:
    def test_the_table_has_the_contracts_columns_and_the_seeds_and_pairs_asked_for(self, tmp_path: Path) -> None:
        folders = {
            name: written(tmp_path / name, *(noted(turned_by(angle + seed), name, seed) for seed in (0, 1, 2)))
            for name, angle in (("lora", 80.0), ("dgs", 70.0))
        }
        samples, layers = (analysis.read_logged(folders, [0, 1], table) for table in ("samples", "layers"))
        table = analysis.angle_table(samples, layers, PAIRS, 0.9)
        assert list(table) == analysis.COLUMNS
        assert set(table["seed"]) == {0, 1} and set(table["rho"]) == {0.9} and set(table["pair"]) == set(PAIRS)
        assert set(table["layer"]) == {"features", "0.q", "1.v"}
        assert (table["p05"] <= table["mean"] + 1e-4).all() and (table["mean"] <= table["p95"] + 1e-4).all()
        means = analysis.summary(table).query("pair == 'task-harmful'").set_index("method")["degrees"]
        assert means.to_dict() == {"lora": 80.5, "dgs": 70.5}
        assert analysis.angle_table(samples, layers, PAIRS, None)["rho"].isna().all()

    def test_percentiles_are_of_the_samples_that_have_an_angle(self) -> None:
        vectors = turned_by(60.0)
        vectors["harmful"][1] = 0.0
        samples = noted(vectors, steps=(7,)).samples
        (row,) = analysis.angle_table(samples, pd.DataFrame(), ["task-harmful"], None).to_dict("records")
        assert (row["step"], row["layer"], row["p95"] - row["p05"]) == (7, "features", 0.0)
        assert row["mean"] == pytest.approx(60.0, abs=1e-4)

    def test_energy_along_harm_is_the_mean_over_samples_and_steps_not_that_of_a_mean_angle(self) -> None:
        parts = [
            noted(turned_by(angle), seed=seed, steps=(step,)).samples
            for seed in (0, 1)
            for step, angle in ((0, 60.0), (10, 90.0))
        ]
        shares = analysis.energy_along_harm(pd.concat(parts))
        assert shares["dgs"].mean == pytest.approx(0.125)
        assert not analysis.energy_along_harm(parts[0])["dgs"].known
        without = turned_by(60.0)
        without["harmful"][0] = 0.0
        assert analysis.energy_along_harm(noted(without).samples)["dgs"].mean == pytest.approx(0.125), (
            "no direction: nothing to remove"
        )
        without["harmful"][1] = 0.0
        assert analysis.energy_along_harm(noted(without).samples) == {}, "no text side: there is nothing to say"

    def test_frozen_methods_alone_have_empty_tables_and_a_figure_that_says_so(self, tmp_path: Path) -> None:
        folder = written(tmp_path / "probe", TrainingLog("probe", 0))
        samples, layers, batches = (
            analysis.read_logged({"probe": folder}, [0], table) for table in ("samples", "layers", "batches")
        )
        table = analysis.angle_table(samples, layers, PAIRS, 0.9)
        assert table.empty and list(table) == analysis.COLUMNS and analysis.summary(table).empty
        assert analysis.batch_table(samples, batches, 0.9).empty and analysis.energy_along_harm(samples) == {}
        (text,) = angles_over_training(table).texts
        assert "No method here trains the tower" in text.get_text()

    def test_a_folder_of_an_earlier_version_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"Expected samples\.parquet .* train dgs again"):
            analysis.read_logged({"dgs": tmp_path}, [0], "samples")

    def test_the_sample_to_draw_is_the_one_nearest_both_medians_of_the_middle_step(self) -> None:
        vectors = turned_by(60.0)
        vectors = {name: torch.cat([value, value[:1]]) for name, value in vectors.items()}
        vectors["task"][2] = rows([1.0, 1.2])
        vectors["task"][0] = rows([0.0, 1.0])
        row = analysis.one_sample(noted(vectors, steps=(0, 10, 20)).samples, "dgs", 0)
        assert (row["step"], row["image"]) == (10, 1), "60 degrees lies between 50 and 90"
        with pytest.raises(UserError, match="Expected logged gradients of lora"):
            analysis.one_sample(noted(vectors).samples, "lora", 0)
