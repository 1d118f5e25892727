"""What the measures of forgetting mean, on features small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.analysis.forgetting import cosine_drift, linear_cka, retrieval_at_1, zero_shot_accuracy


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

    def test_other_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="same images"):
            linear_cka(features(0), features(0, n=29))


class TestZeroShot:
    prompts = np.array([[1.0, 0.0], [0.0, 1.0]])

    def test_by_hand(self) -> None:
        images = np.array([[2.0, 1.0], [0.1, 0.2], [3.0, 4.0], [-1.0, -2.0]])
        assert zero_shot_accuracy(images, self.prompts, [0, 1, 0, 0]) == 0.75

    def test_lengths_do_not_matter(self) -> None:
        images, labels = features(0, d=2), np.arange(30) % 2
        scaled = images * np.linspace(0.1, 9.0, 30)[:, None]
        expected = zero_shot_accuracy(images, self.prompts, labels)
        assert zero_shot_accuracy(scaled, self.prompts * [[5.0], [0.2]], labels) == expected

    def test_tensors_do_as_well_as_arrays(self) -> None:
        images, labels = features(0, d=2), np.arange(30) % 2
        tensors = torch.tensor(images, requires_grad=True), torch.tensor(self.prompts), torch.tensor(labels)
        assert zero_shot_accuracy(*tensors) == zero_shot_accuracy(images, self.prompts, labels)

    def test_labels_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"labels in \[0, 2\)"):
            zero_shot_accuracy(np.ones((1, 2)), self.prompts, [2])
        with pytest.raises(ValueError, match="expected"):
            zero_shot_accuracy(np.ones((2, 2)), self.prompts, [0])


class TestRetrieval:
    def test_perfect_and_shifted_pairs(self) -> None:
        texts = np.eye(20)
        assert retrieval_at_1(texts, texts, pool=20) == 1.0
        assert retrieval_at_1(np.roll(texts, 1, axis=0), texts, pool=20) == 0.0

    def test_the_same_caption_elsewhere_is_right_too(self) -> None:
        texts = np.repeat(np.eye(4), 2, axis=0)
        images = texts.copy()
        assert retrieval_at_1(images, texts, pool=8) == 1.0
        noisy = texts + np.random.default_rng(0).normal(scale=1e-3, size=texts.shape)  # no longer equal to 1e-6
        assert retrieval_at_1(images, noisy, pool=8) < 1.0
        assert retrieval_at_1(images, noisy, pool=8, captions=[*"aabbccdd"]) == 1.0

    def test_a_smaller_pool_is_easier(self) -> None:
        texts = features(0, n=400)
        images = texts + features(1, n=400)
        assert retrieval_at_1(images, texts, pool=10) > retrieval_at_1(images, texts, pool=200)

    def test_a_seed_fixes_the_pools_and_a_short_set_makes_one_pool(self) -> None:
        texts = features(0, n=90)
        images = texts + features(1, n=90)
        assert retrieval_at_1(images, texts, pool=40, seed=3) == retrieval_at_1(images, texts, pool=40, seed=3)
        assert retrieval_at_1(images, texts, pool=200) == retrieval_at_1(images, texts, pool=90)

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="one text an image"):
            retrieval_at_1(np.eye(3), np.eye(4))
        with pytest.raises(ValueError, match="pool"):
            retrieval_at_1(np.eye(3), np.eye(3), pool=1)
        with pytest.raises(ValueError, match="captions"):
            retrieval_at_1(np.eye(3), np.eye(3), captions=["a"])


class TestDrift:
    def test_by_hand(self) -> None:
        before = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        after = np.array([[9.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        assert cosine_drift(before, after) == pytest.approx((0 + 1 + 2) / 3)

    def test_a_zero_row_counts_as_orthogonal(self) -> None:
        assert cosine_drift(np.ones((1, 2)), np.zeros((1, 2))) == 1.0

    def test_unequal_shapes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="expected"):
            cosine_drift(np.ones((2, 2)), np.ones((2, 3)))
        with pytest.raises(ValueError, match="shape"):
            cosine_drift(np.ones(2), np.ones(2))
