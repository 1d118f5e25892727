"""Views: a pure function of (image hash, seed, epoch); flips and patch orders in training only."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ImageTree
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import DataParams, validate

from dgs.data.images import fit
from dgs.data.manifest import ImageSource, build_manifest, open_image
from dgs.data.patches import patch_indices
from dgs.data.views import EVALUATION, Views, batch_order, batches, make_view
from dgs.params import Params

FITTED = validate({"model": {"image_size": 16}})
PATCHED = validate({"patches": {"enabled": True, "size": 8, "count": 49}})
IMAGE = np.random.default_rng(0).integers(1, 256, (64, 72, 3), dtype=np.uint8)
KEPT = patch_indices(IMAGE, 8, 49)


def sha(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def view(params: Params, number: int, seed: int, epoch: int) -> np.ndarray:
    return make_view(IMAGE, sha(number), params, seed, epoch, KEPT if params.patches.enabled else None)


def cells(canvas: np.ndarray) -> list[bytes]:
    return [canvas[y : y + 8, x : x + 8].tobytes() for y in range(0, 56, 8) for x in range(0, 56, 8)]


BOTH = pytest.mark.parametrize("params", [FITTED, PATCHED], ids=["fit", "patches"])


class TestPurity:
    @BOTH
    @given(number=st.integers(0, 10**6), seed=st.integers(0, 2**31), epoch=st.integers(-1, 100))
    @settings(max_examples=30, deadline=None)
    def test_equal_arguments_give_equal_views_whatever_ran_before(
        self, params: Params, number: int, seed: int, epoch: int
    ) -> None:
        before, first = IMAGE.copy(), view(params, number, seed, epoch)
        assert np.array_equal(before, IMAGE), "the image is left as it was"
        view(params, number + 1, seed, epoch)
        np.random.seed(seed % 100)
        torch.manual_seed(epoch + 1)
        assert np.array_equal(view(params, number, seed, epoch), first)
        assert (first.shape, first.dtype) == ((params.image_size, params.image_size, 3), np.uint8)

    @BOTH
    @pytest.mark.parametrize("vary", ["number", "seed", "epoch"])
    def test_hash_seed_and_epoch_each_count_in_training(self, params: Params, vary: str) -> None:
        base = {"number": 3, "seed": 1, "epoch": 2}
        seen = {view(params, **{**base, vary: value}).tobytes() for value in range(20)}
        assert len(seen) == (20 if params.patches.enabled else 2)

    def test_seed_and_epoch_are_not_interchangeable(self) -> None:
        pairs = [(seed, epoch) for seed in range(6) for epoch in range(6)]
        assert len({view(PATCHED, 0, seed, epoch).tobytes() for seed, epoch in pairs}) == 36


class TestFlips:
    @pytest.mark.parametrize("how", ["crop", "resize"])
    def test_about_half_of_the_training_views_are_mirrored(self, how: str) -> None:
        params = FITTED.model_copy(update={"data": DataParams(fit=how)})  # type: ignore[arg-type]
        straight = fit(IMAGE, 16, how)
        mirrored = straight[:, ::-1]
        kinds: Counter[str] = Counter()
        for number in range(100):
            for epoch in range(4):
                found = view(params, number, 0, epoch)
                kinds["straight" if np.array_equal(found, straight) else "mirrored"] += 1
                assert np.array_equal(found, straight) or np.array_equal(found, mirrored)
        assert 160 < kinds["mirrored"] < 240  # 400 fair coins: four standard deviations either way

    def test_an_image_is_not_mirrored_in_every_epoch_alike(self) -> None:
        mirrored = fit(IMAGE, 16, "crop")[:, ::-1]
        flips = [[np.array_equal(view(FITTED, n, 0, e), mirrored) for e in range(12)] for n in range(10)]
        assert all(0 < sum(row) < 12 for row in flips)

    def test_evaluation_never_mirrors(self) -> None:
        straight = fit(IMAGE, 16, "crop")
        assert all(np.array_equal(view(FITTED, number, 0, EVALUATION), straight) for number in range(60))

    def test_a_training_canvas_is_mirrored_as_a_whole(self) -> None:
        evaluated = Counter(cells(view(PATCHED, 0, 0, EVALUATION)))
        kinds: Counter[str] = Counter()
        for epoch in range(60):
            canvas = view(PATCHED, 0, 0, epoch)
            straight, mirrored = Counter(cells(canvas)), Counter(cells(canvas[:, ::-1]))
            assert evaluated in (straight, mirrored)
            kinds["straight" if straight == evaluated else "mirrored"] += 1
        assert 14 < kinds["mirrored"] < 46


class TestEvaluation:
    @BOTH
    def test_it_does_not_depend_on_the_seed(self, params: Params) -> None:
        assert len({view(params, 5, seed, EVALUATION).tobytes() for seed in range(8)}) == 1

    def test_patches_keep_one_order_for_an_image_and_another_for_the_next(self) -> None:
        orders = {view(PATCHED, number, 0, EVALUATION).tobytes() for number in range(8)}
        assert len(orders) == 8

    def test_no_training_epoch_sees_the_evaluation_order(self) -> None:
        evaluated = view(PATCHED, 0, 0, EVALUATION)
        for epoch in range(20):
            canvas = view(PATCHED, 0, 0, epoch)
            assert not np.array_equal(canvas, evaluated) and not np.array_equal(canvas[:, ::-1], evaluated)

    def test_patch_selection_without_indices_is_a_bug(self) -> None:
        with pytest.raises(ValueError, match="no patch indices"):
            make_view(IMAGE, sha(0), PATCHED, 0, 0)


class TestOrder:
    @given(st.integers(0, 200), st.integers(0, 2**31), st.integers(0, 50))
    def test_every_image_once_and_repeatably(self, size: int, seed: int, epoch: int) -> None:
        order = batch_order(size, seed, epoch)
        assert sorted(order) == list(range(size))
        assert order == batch_order(size, seed, epoch)

    def test_seeds_and_epochs_differ(self) -> None:
        orders = {tuple(batch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
        assert len(orders) == 25


class TestDataset:
    @pytest.fixture
    def parts(self, image_tree: ImageTree) -> tuple[Any, ImageSource]:
        root = image_tree()
        manifest = build_manifest(root, DataParams(layout="folders", root=str(root), rho=None))
        return manifest[manifest["split"] == "test"], ImageSource(root)

    def test_item_i_is_the_view_of_row_i(self, parts: tuple[Any, ImageSource]) -> None:
        rows, source = parts
        views = Views(rows, source, FITTED, seed=3, epoch=1)
        assert len(views) == len(rows) == 18
        for index, row in enumerate(rows.itertuples()):
            tensor, number = views[index]
            assert (number, tensor.shape, tensor.dtype) == (index, (3, 16, 16), torch.uint8)
            expected = make_view(open_image(source, row.file, row.row), row.sha256, FITTED, 3, 1)
            assert np.array_equal(tensor.permute(1, 2, 0).numpy(), expected)

    def test_the_default_is_the_evaluation_view(self, parts: tuple[Any, ImageSource]) -> None:
        rows, source = parts
        assert torch.equal(Views(rows, source, FITTED)[0][0], Views(rows, source, FITTED, 9, EVALUATION)[0][0])

    def test_patch_indices_are_looked_up_by_content(self, parts: tuple[Any, ImageSource]) -> None:
        rows, source = parts
        params = validate({"patches": {"enabled": True, "size": 8, "count": 4}})
        kept = {name: np.array([number, 3, 2, 1], np.int32) for number, name in enumerate(rows["sha256"])}
        kept = {name: indices % 16 for name, indices in kept.items()}
        views = Views(rows, source, params, 0, 2, kept)
        row = rows.iloc[7]
        image = open_image(source, row["file"], row["row"])
        expected = make_view(image, row["sha256"], params, 0, 2, kept[row["sha256"]])
        assert np.array_equal(views[7][0].permute(1, 2, 0).numpy(), expected)

    def test_batches_follow_the_order_and_the_last_may_be_smaller(self, parts: tuple[Any, ImageSource]) -> None:
        rows, source = parts
        views = Views(rows, source, FITTED)
        order = batch_order(len(rows), 1, 0)
        loaded = list(batches(views, 4, order=order))
        assert [len(numbers) for _, numbers in loaded] == [4, 4, 4, 4, 2]
        assert torch.cat([numbers for _, numbers in loaded]).tolist() == order
        assert torch.equal(loaded[0][0][2], views[order[2]][0])
        as_they_stand = torch.cat([numbers for _, numbers in batches(views, 5)])
        assert as_they_stand.tolist() == list(range(len(rows)))
