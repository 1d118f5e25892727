"""What the measures of forgetting mean, on features small enough to check by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.analysis import forgetting
from dgs.analysis.forgetting import (
    Tower,
    class_silhouette,
    cosine_drift,
    effective_rank,
    knn_overlap,
    linear_cka,
    linear_probe_accuracy,
    measure,
    measure_all,
    principal_angles,
    retrieval_at_1,
    spread_out,
    zero_shot_accuracy,
)


def features(seed: int, n: int = 30, d: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def rotation(seed: int, d: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


class TestLinearCka:
    def test_by_hand(self) -> None:
        x = np.array([[1.0], [-1.0], [0.0], [0.0]])
        y = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        # |Y'X|^2 = 4, |X'X| = 2, |Y'Y| = |diag(2, 2)| = sqrt(8)
        assert linear_cka(x, y) == pytest.approx(4 / (2 * np.sqrt(8)))

    @given(st.integers(0, 1000), st.floats(0.01, 100.0))
    @settings(max_examples=25, deadline=None)
    def test_rotation_scale_and_shift_change_nothing(self, seed: int, scale: float) -> None:
        x = features(seed)
        assert linear_cka(x, scale * x @ rotation(seed, 6) + 3.0) == pytest.approx(1.0)
        y = features(seed + 1)
        assert linear_cka(x @ rotation(seed, 6), y) == pytest.approx(linear_cka(x, y))
        assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))

    def test_more_features_than_images_gives_the_same_number(self) -> None:
        x, y = features(0, n=10, d=4), features(1, n=10, d=4)
        padded = np.hstack([y, np.zeros((10, 20))])
        assert linear_cka(x, padded) == pytest.approx(linear_cka(x, y))

    def test_unrelated_features_score_low_and_collapsed_ones_zero(self) -> None:
        assert linear_cka(features(0, n=2000), features(1, n=2000)) < 0.05
        assert linear_cka(features(0), np.ones((30, 6))) == 0.0


class TestZeroShot:
    prompts = np.array([[1.0, 0.0], [0.0, 1.0]])

    def test_by_hand(self) -> None:
        images = np.array([[2.0, 1.0], [0.1, 0.2], [3.0, 4.0], [-1.0, -2.0]])
        assert zero_shot_accuracy(images, self.prompts, [0, 1, 0, 0]) == 0.75

    def test_lengths_do_not_matter_and_tensors_do_as_well_as_arrays(self) -> None:
        images, labels = features(0, d=2), np.arange(30) % 2
        scaled = images * np.linspace(0.1, 9.0, 30)[:, None]
        expected = zero_shot_accuracy(images, self.prompts, labels)
        assert zero_shot_accuracy(scaled, self.prompts * [[5.0], [0.2]], labels) == expected
        tensors = torch.tensor(images, requires_grad=True), torch.tensor(self.prompts), torch.tensor(labels)
        assert zero_shot_accuracy(*tensors) == expected


class TestRetrieval:
    def test_perfect_and_shifted_pairs(self) -> None:
        texts, captions = np.eye(20), [*"abcdefghijklmnopqrst"]
        assert retrieval_at_1(texts, texts, captions, pool=20) == 1.0
        assert retrieval_at_1(np.roll(texts, 1, axis=0), texts, captions, pool=20) == 0.0

    def test_the_same_caption_elsewhere_is_right_too(self) -> None:
        images = np.repeat(np.eye(4), 2, axis=0)
        noisy = images + np.random.default_rng(0).normal(scale=1e-3, size=images.shape)
        assert retrieval_at_1(images, noisy, [*"abcdefgh"], pool=8) < 1.0
        assert retrieval_at_1(images, noisy, [*"aabbccdd"], pool=8) == 1.0

    def test_a_smaller_pool_is_easier_a_seed_fixes_the_pools_and_a_short_set_makes_one_pool(self) -> None:
        texts, captions = features(0, n=90), [str(number) for number in range(90)]
        images = texts + features(1, n=90)
        found = {pool: retrieval_at_1(images, texts, captions, pool, seed=3) for pool in (10, 40, 90, 200)}
        assert found[10] > found[90] == found[200]
        assert found[40] == retrieval_at_1(images, texts, captions, 40, seed=3)


class TestLinearProbe:
    labels = np.arange(90) % 3

    def test_what_lies_in_the_features_is_read_wherever_it_lies(self) -> None:
        told = np.hstack([features(0, n=90), 9.0 * np.eye(3)[self.labels]]) @ rotation(1, 9) + 5.0
        assert linear_probe_accuracy(told, self.labels) == 1.0

    def test_what_does_not_is_guessed_at(self) -> None:
        accuracies = [linear_probe_accuracy(features(seed, n=90), self.labels) for seed in range(40)]
        assert np.mean(accuracies) == pytest.approx(1 / 3, abs=0.05)
        assert linear_probe_accuracy(np.ones((90, 6)), self.labels) == pytest.approx(1 / 3, abs=0.1), "collapsed"

    def test_it_is_scored_on_images_it_was_not_fitted_on(self) -> None:
        """More features than images would tell any labels of fitted ones apart."""
        assert linear_probe_accuracy(features(0, n=90, d=400), self.labels) < 0.6

    def test_scale_and_names_of_classes_change_nothing(self) -> None:
        told = features(0, n=90) + np.eye(6)[self.labels]
        plain = linear_probe_accuracy(told, self.labels)
        assert linear_probe_accuracy(told * np.logspace(-3, 3, 6) + 7.0, self.labels) == plain
        assert linear_probe_accuracy(told, np.array([5, 0, 9])[self.labels]) == plain
        assert 0.4 < plain < 1.0, "else the test says little"


class TestPrincipalAngles:
    def test_by_hand(self) -> None:
        x = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, -0.5, 0.0]])
        turned = x @ np.array([[1.0, 0.0, 0.0], [0.0, np.cos(0.3), np.sin(0.3)], [0.0, -np.sin(0.3), np.cos(0.3)]])
        assert principal_angles(x, turned, k=2) == pytest.approx([0.3, 0.0], abs=1e-7)

    def test_a_direction_that_is_given_up_lies_at_a_right_angle(self) -> None:
        x = features(0, n=200, d=6) * [9, 9, 9, 0.1, 0.1, 0.1]
        y = features(1, n=300, d=6) * [9, 9, 0.1, 0.1, 0.1, 9]
        angles = principal_angles(x, y, k=3)
        assert angles[0] == pytest.approx(np.pi / 2, abs=0.05) and angles[1:].max() < 0.05

    def test_scale_and_shift_change_nothing_and_few_dimensions_are_all_taken(self) -> None:
        x, y = features(0), features(1)
        assert principal_angles(3 * x + 1, y, k=2) == pytest.approx(principal_angles(x, y, k=2))
        assert principal_angles(x, y, k=50) == pytest.approx(np.zeros(6), abs=1e-7), "both fill the space"


class TestEffectiveRank:
    def test_by_hand(self) -> None:
        share = np.array([0.75, 0.25])
        x = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        assert effective_rank(x) == pytest.approx(np.exp(-np.sum(share * np.log(share))))

    def test_equal_directions_count_one_each_and_a_collapsed_tower_uses_none(self) -> None:
        corners = np.vstack([np.eye(5), -np.eye(5)])
        assert effective_rank(corners) == pytest.approx(5.0)
        assert effective_rank(np.hstack([corners, np.zeros((10, 4))]) @ rotation(0, 9) + 2.0) == pytest.approx(5.0)
        assert effective_rank(np.ones((30, 6))) == 0.0
        assert effective_rank(np.outer(np.arange(30.0), np.ones(6))) == pytest.approx(1.0, abs=1e-5)


class TestKnnOverlap:
    def test_by_hand(self) -> None:
        def on_circle(*degrees: float) -> np.ndarray:
            return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)

        # nearest before: 1 0 3 2; after: 1 0 1 2
        assert knn_overlap(on_circle(0, 10, 50, 60), 7 * on_circle(0, 10, 30, 60), k=1) == 0.75

    def test_rotation_and_length_change_nothing_and_unrelated_features_share_by_chance(self) -> None:
        x = features(0, n=400)
        assert knn_overlap(x, (x * np.linspace(1, 9, 400)[:, None]) @ rotation(0, 6)) == 1.0
        assert knn_overlap(x, features(1, n=400)) == pytest.approx(10 / 399, abs=0.01)

    def test_an_image_is_not_its_own_neighbour(self) -> None:
        assert knn_overlap(features(0, n=11), features(1, n=11)) == 1.0, "all the others are neighbours"


class TestSilhouette:
    def test_by_hand(self) -> None:
        x = np.array([[0.0], [2.0], [10.0], [10.0]])
        # own and other mean distance: 2 and 10; 2 and 8; 0 and 9, twice
        assert class_silhouette(x, [0, 0, 1, 1]) == pytest.approx((((1 - 0.2) + (1 - 0.25)) / 2 + 1.0) / 2)

    def test_the_mix_of_classes_does_not_count(self) -> None:
        apart = np.repeat([[0.0], [1.0]], [5, 200], axis=0) + 0.01 * features(0, n=205, d=1)
        assert class_silhouette(apart, np.repeat([0, 1], [5, 200])) > 0.95
        mixed = features(0, n=205)
        assert abs(class_silhouette(mixed, np.repeat([0, 1], [5, 200]))) < 0.15


def test_a_sample_is_spread_out_over_the_rows_and_never_larger_than_them() -> None:
    assert spread_out(4000, 5).tolist() == [0, 1000, 2000, 2999, 3999]
    assert spread_out(3, 5).tolist() == [0, 1, 2]


class TestDrift:
    def test_by_hand(self) -> None:
        before = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        after = np.array([[9.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        assert cosine_drift(before, after) == pytest.approx((0 + 1 + 2) / 3)

        assert cosine_drift(np.ones((1, 2)), np.zeros((1, 2))) == 1.0, "a zero row counts as orthogonal"


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (linear_cka, (features(0), features(0, n=29)), "same images"),
        (zero_shot_accuracy, (np.ones((1, 2)), np.eye(2), [2]), r"labels in \[0, 2\)"),
        (zero_shot_accuracy, (np.ones((2, 2)), np.eye(2), [0]), "expected"),
        (retrieval_at_1, (np.eye(3), np.eye(4), "abc"), "one text an image"),
        (retrieval_at_1, (np.eye(3), np.eye(3), "abc", 1), "pool"),
        (retrieval_at_1, (np.eye(3), np.eye(3), "a"), "captions"),
        (linear_probe_accuracy, (np.ones((4, 2)), [0, 1]), "N >= 2"),
        (principal_angles, (features(0), features(0, d=5)), "one width"),
        (knn_overlap, (features(0, n=10), features(0, n=10)), "more than 10"),
        (cosine_drift, (np.ones((2, 2)), np.ones((2, 3))), "expected"),
        (cosine_drift, (np.ones(2), np.ones(2)), "shape"),
    ],
)
def test_what_does_not_fit_is_refused(function: Callable[..., float], given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*given)


class TestMeasures:
    """What is reported of a tower: one decorated function a measure."""

    @pytest.fixture
    def tuned(self) -> Tower:
        rows = pd.DataFrame({"label": np.arange(30) % 2, "caption": "x", "caption_source": "template", "shape": "disc"})
        frozen = Tower(rows, features(2), {}, 4, features(0), [features(3)])
        return dataclasses.replace(frozen, features=features(1), blocks=[features(4)], untuned=frozen)

    def test_a_new_measure_is_one_decorated_function(self, tuned: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forgetting, "MEASURES", {})

        @measure("first")
        def first(tower: Tower) -> float:
            return float(tower.features[0, 0])

        @measure("moved", unmoved=0.0)
        def moved(tower: Tower) -> dict[str, float]:
            return {"most": float(np.abs(tower.features - tower.frozen.features).max())}

        @measure("impossible")
        def impossible(tower: Tower) -> None:
            return None

        a, b = features(0), features(1)
        assert measure_all(tuned) == {"first": (a[0, 0], b[0, 0]), "moved:most": (0.0, np.abs(a - b).max())}

    def test_what_the_data_cannot_give_is_left_out(self, tuned: Tower) -> None:
        found = measure_all(tuned)
        assert list(found) == [
            "cka_to_frozen", "knn_overlap", "effective_rank", "cosine_drift", "principal_angle:mean",
            "principal_angle:max", "silhouette", "cka_block:1", "cosine_drift_block:1",
        ]  # fmt: skip
        assert found["cka_block:1"] == (1.0, linear_cka(features(3), features(4)))
        assert found["effective_rank"] == (effective_rank(features(0)) / 6, effective_rank(features(1)) / 6)
        few = dataclasses.replace(tuned, rows=tuned.rows[:5], features=features(1)[:5])
        assert "knn_overlap" not in measure_all(dataclasses.replace(few, untuned=few))
