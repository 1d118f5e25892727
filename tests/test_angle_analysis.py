"""Correlations, update subspaces, shapes of heads and the plane: each against what is known by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy import stats

from dgs.analysis.angles import (
    UNSEEN,
    WITHIN,
    compare_updates,
    correlation,
    correlations,
    principal_angles,
    random_mean_angle,
    read_updates,
    text_head_ranks,
)
from dgs.analysis.figures.plane import project_to_plane, share_inside

LAYERS = ("features", "0.q")


class TestCorrelation:
    def test_r_and_interval_are_scipys(self) -> None:
        x, y = np.random.default_rng(0).normal(size=(2, 12))
        theirs = stats.pearsonr(x, y)
        found = correlation(x, y)
        assert found.mean == pytest.approx(theirs.statistic)
        assert found[1:] == pytest.approx(theirs.confidence_interval())

    def test_a_difference_between_methods_alone_is_no_correlation(self) -> None:
        rng = np.random.default_rng(1)
        method = np.repeat([0, 1], 40)
        x, y = rng.normal(size=(2, 80)) + 50 * method
        assert correlation(x, y).mean > 0.99
        assert abs(correlation(x, y, method).mean) < 0.3

    def test_runs_of_one_seed_count_once(self) -> None:
        """Two methods that move together with their seeds bring no second opinion."""
        x, y = np.random.default_rng(2).normal(size=(2, 6))
        once = correlation(x, y)
        seeds = np.arange(6)
        twice = correlation(np.tile(x, 2), np.tile(y, 2), np.repeat([0, 1], 6), np.tile(seeds, 2))
        assert twice == pytest.approx(once)

    def test_the_interval_covers_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(3)
        covered = 0
        for _ in range(400):
            x = rng.normal(size=8)
            found = correlation(x, 0.6 * x + 0.8 * rng.normal(size=8))
            covered += found.low <= 0.6 <= found.high
        assert 0.91 <= covered / 400 <= 0.98

    def test_too_few_seeds_have_no_interval_and_what_does_not_vary_no_correlation(self) -> None:
        assert not correlation(np.array([1.0, 2, 4]), np.array([1.0, 3, 2])).known
        assert math.isnan(correlation(np.ones(5), np.arange(5.0)).mean)
        assert math.isnan(correlation(np.full(5, 0.1 + 0.2), np.arange(5.0)).mean)

    def test_a_method_whose_measure_does_not_vary_is_left_out_of_the_rest(self) -> None:
        x, y = np.random.default_rng(4).normal(size=(2, 6))
        flat = np.concatenate([x, np.zeros(6)])
        found = correlation(flat, np.concatenate([y, 9 * y]), np.repeat([0, 1], 6), np.tile(np.arange(6), 2))
        assert found == pytest.approx(correlation(x, y))

    def test_a_table_by_measure_method_and_generator(self) -> None:
        rng = np.random.default_rng(5)
        runs = [(method, seed) for method in ("lora", "dgs") for seed in range(5)]
        angle = {run: 80 + rng.normal() for run in runs}
        means = [(*run, layer, angle[run] + rng.normal() * (layer != "features")) for run in runs for layer in LAYERS]
        angles = pd.DataFrame(means, columns=["method", "seed", "layer", "mean"]).assign(pair="task-harmful")
        nothing = dict.fromkeys(("conflict_harmful", "conflict_beneficial", "removed", "added"), 0.0)
        batches = pd.DataFrame(runs, columns=["method", "seed"]).assign(rho=0.9, **nothing)
        rates = [(*run, name, rng.uniform(0.6, 0.8)) for run in runs for name in ("a", "b", "c")]
        detection = pd.DataFrame(rates, columns=["method", "seed", "generator", "balanced_acc"])
        predicted = pd.Series([0.5 + angle[run] / 400 for run in runs for _ in "abc"])
        detection["balanced_acc"] = detection["balanced_acc"].mask(detection["generator"] == "c", predicted)
        detection = detection.assign(seen=detection["generator"] == "a", rho=0.9, threshold_rule="0.5")
        detection = detection.assign(condition="native", applied_to="both")
        table = correlations(angles, batches, detection)
        assert set(table["measure"]) == {"angle task-harmful"}, "nothing was removed in any run"
        assert set(table["method"]) == {"lora", "dgs", WITHIN} and set(table["generator"]) == {"a", "b", "c", UNSEEN}
        c = table.query("generator == 'c'")
        assert np.allclose(c["r"], 1.0), "features alone, not layers"
        within = table[table["method"] == WITHIN].iloc[0]
        assert (within["runs"], within["seeds"]) == (10, 5)
        others = (
            {"condition": "jpeg:75"},
            {"condition": "jpeg:75", "applied_to": "real"},
            {"threshold_rule": "oracle"},
        )
        changed = [detection.assign(**own, balanced_acc=rng.uniform(size=len(detection))) for own in others]
        again = correlations(angles, batches, pd.concat([changed[0], detection, *changed[1:]], ignore_index=True))
        pd.testing.assert_frame_equal(again, table)


class TestSubspaces:
    @given(st.floats(0.0, 90.0))
    def test_lines_are_as_far_apart_as_their_angle(self, degrees: float) -> None:
        a, b = np.array([[1.0], [0.0]]), np.array([[np.cos(np.radians(degrees))], [np.sin(np.radians(degrees))]])
        assert principal_angles(a, 3 * b) == pytest.approx([degrees], abs=1e-9)

    def test_planes_that_share_a_line(self) -> None:
        eye = np.eye(4)
        assert principal_angles(eye[:, :2], eye[:, 1:3]) == pytest.approx([0.0, 90.0])

    def test_a_basis_of_the_same_span_changes_nothing(self) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 20, 3))
        assert principal_angles(a @ rng.normal(size=(3, 3)), b) == pytest.approx(principal_angles(a, b))
        assert principal_angles(a, a @ rng.normal(size=(3, 3))) == pytest.approx([0.0] * 3, abs=1e-6)

    def test_a_zero_update_has_no_subspace(self) -> None:
        assert principal_angles(np.zeros((5, 2)), np.eye(5)[:, :2]).size == 0

    def test_random_subspaces_are_nearly_orthogonal_where_there_is_room(self) -> None:
        assert 80 < random_mean_angle(400, 2) < 90 and random_mean_angle(4, 3) < 40

    def test_runs_are_compared_with_the_first_method_and_with_its_other_seeds(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        runs = {}
        for method, seed in (("probe", 0), ("lora", 0), ("lora", 1), ("dgs", 0), ("dgs", 1)):
            folder = tmp_path / f"{method}-{seed}"
            folder.mkdir()
            (folder / "dgs.json").write_text(json.dumps({"adapter": method != "probe"}))
            name = "base_model.model.transformer.resblocks.10.attn.v_proj.lora_{}.weight"
            start = np.random.default_rng(seed).normal(size=(2, 30)).astype(np.float32)
            save_file(
                {name.format("A"): start, name.format("B"): rng.normal(size=(30, 2)).astype(np.float32)},
                folder / "adapter_model.safetensors",
            )
            runs[method, seed] = read_updates(folder)
        table = compare_updates(runs, 0.9)
        pairs = {tuple(row) for row in table[["method", "seed", "other_method", "other_seed"]].to_numpy()}
        assert pairs == {("lora", 0, "dgs", 0), ("lora", 1, "dgs", 1), ("lora", 0, "lora", 1)}
        assert set(table["layer"]) == {"10.v"}
        same = table.query("side == 'input' and other_method == 'dgs'")
        assert np.allclose(same["mean"], 0, rtol=0, atol=1e-4), "runs of one seed start from the same A"
        assert (table.query("side == 'output'")["mean"] > 45).all()


def test_an_mlp_gives_each_sample_its_own_harmful_direction_and_a_linear_head_two() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(2_000) % 2
    shift = 0.3 * np.where(np.arange(12) % 2, 1, -1)  # of one sign, the direction of one class would vanish
    captions = (rng.normal(size=(2_000, 12)) + shift * labels[:, None]).astype(np.float32)
    ranks = text_head_ranks(captions, labels, seed=0, steps=50)
    linear, mlp = (ranks[ranks["head"] == kind] for kind in ("linear", "MLP"))
    assert linear["effective_rank"].max() <= 2 + 1e-9 and mlp["effective_rank"].min() > 2.2
    assert np.allclose(linear["same_class_angle"], 0, rtol=0, atol=0.05) and (mlp["same_class_angle"] > 5).all()
    assert linear["accuracy"].iloc[-3:].mean() > 0.6, "the heads learn what they are given"
    pd.testing.assert_frame_equal(ranks, text_head_ranks(captions, labels, seed=0, steps=50))


class TestPlane:
    def row(self, **vectors: list[float]) -> dict[str, float]:
        return {f"{a}.{b}": float(np.dot(x, y)) for a, x in vectors.items() for b, y in vectors.items()}

    def test_a_projection_by_hand(self) -> None:
        vectors = {"task": [3.0, 4, 0], "harmful": [2.0, 0, 0], "applied": [0.0, 4, 0], "beneficial": [-1.0, 0, -1]}
        points = project_to_plane(self.row(**vectors), tuple(vectors))
        expected = {"task": (0.6, 0.8, 0), "harmful": (0.4, 0, 0), "applied": (0, 0.8, 0), "beneficial": (-0.2, 0, 0.2)}
        assert all(points[name] == pytest.approx(place) for name, place in expected.items())
        assert share_inside(points["beneficial"]) == pytest.approx(0.5) and share_inside(points["task"]) == 1.0

    def test_no_harm_and_no_task_are_drawn_too(self) -> None:
        without = project_to_plane(self.row(task=[0.0, 2.0], harmful=[0.0, 0.0]), ("task", "harmful"))
        assert {name: tuple(point) for name, point in without.items()} == {"task": (0, 1, 0), "harmful": (0, 0, 0)}
        assert share_inside(without["harmful"]) == 1.0
        none = project_to_plane(self.row(task=[0.0, 0.0], harmful=[1.0, 0.0]), ("harmful",))
        assert none["harmful"].tolist() == [0, 0, 0]
