"""Patch selection: the definition of the entropy, which patches are kept, and where they go."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.data.patches import content_seed, patch_entropy, select_indices, select_patches, stitch
from dgs.errors import UserError


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """No pixel is black, so that a black cell of a canvas is an empty one."""
    return np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)


def mixed(rows: int, columns: int, size: int, seed: int = 0) -> np.ndarray:
    """Patches from nearly flat to pure noise, in random places: entropies far apart."""
    rng = np.random.default_rng(seed)
    image = np.empty((rows * size, columns * size, 3), dtype=np.uint8)
    strengths = rng.permutation(np.linspace(1, 120, rows * columns)).reshape(rows, columns)
    for y in range(rows):
        for x in range(columns):
            patch = 128 + rng.uniform(-1, 1, (size, size, 3)) * strengths[y, x]
            image[y * size : (y + 1) * size, x * size : (x + 1) * size] = patch.astype(np.uint8)
    return image


def entropy_by_definition(image: np.ndarray, size: int) -> list[float]:
    """Patch by patch, with the Fourier sum written out as a matrix."""
    height, width = image.shape[0] // size * size, image.shape[1] // size * size
    k = np.arange(size)
    fourier = np.exp(-2j * np.pi * (np.outer(k, k) % size) / size)
    values = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            patch = image[top : top + size, left : left + size].astype(np.float64)
            gray = 0.299 * patch[..., 0] + 0.587 * patch[..., 1] + 0.114 * patch[..., 2]
            if image.max() > 1:
                gray = gray / 255
            power = np.abs(fourier @ gray @ fourier) ** 2
            p = power / (power.sum() + 1e-12)
            values.append(float(-(p * np.log2(p + 1e-12)).sum()))
    return values


def cells(image: np.ndarray, size: int) -> list[bytes]:
    """The whole patches of an image, row-major."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return [
        image[y * size : (y + 1) * size, x * size : (x + 1) * size].tobytes()
        for y in range(rows)
        for x in range(columns)
    ]


class TestEntropy:
    @pytest.mark.parametrize(
        ("height", "width", "size"),
        [(64, 64, 8), (61, 83, 8), (8, 8, 8), (15, 9, 8), (200, 16, 8), (131, 40, 4), (224, 224, 32), (290, 101, 32)],
    )
    def test_it_is_what_the_definition_says(self, height: int, width: int, size: int) -> None:
        for image in (noise(height, width), mixed(height // size, width // size, size)):
            found = patch_entropy(image, size)
            assert (found.shape, found.dtype) == (((height // size) * (width // size),), np.float64)
            assert np.abs(found - entropy_by_definition(image, size)).max() < 1e-12

    def test_values_of_zero_and_one_are_not_divided_by_255(self) -> None:
        image = np.random.default_rng(0).integers(0, 2, (24, 24, 3)).astype(np.uint8)
        image[:8, :8] = 0
        image[0, 0, 2] = 1  # one faint pixel: here the 1e-12 in the normalisation shows
        assert np.abs(patch_entropy(image, 8) - entropy_by_definition(image, 8)).max() < 1e-12

    @pytest.mark.parametrize("colour", [0, 1, 7, 255])
    def test_a_flat_patch_has_none(self, colour: int) -> None:
        assert np.abs(patch_entropy(np.full((16, 24, 3), colour, dtype=np.uint8), 8)).max() < 1e-9

    def test_white_noise_comes_near_the_most_there_can_be(self) -> None:
        one_impulse = np.zeros((8, 8, 3), dtype=np.uint8)
        one_impulse[3, 5] = 255  # its spectrum is flat: log2 of the number of frequencies
        assert patch_entropy(one_impulse, 8)[0] == pytest.approx(6.0, abs=1e-6)

    def test_the_rest_that_fills_no_patch_does_not_count(self) -> None:
        image = noise(37, 45)
        assert np.array_equal(patch_entropy(image, 8), patch_entropy(image[:32, :40], 8))

    @pytest.mark.parametrize("shape", [(31, 100, 3), (100, 31, 3), (5, 5, 3)])
    def test_an_image_under_one_patch_is_an_error(self, shape: tuple[int, int, int]) -> None:
        for function in (patch_entropy, select_patches):
            with pytest.raises(UserError) as error:
                function(np.ones(shape, dtype=np.uint8), 32)
            message = str(error.value)
            assert "at least 32 x 32 px" in message and f"found {shape[1]} x {shape[0]}" in message
            assert "patches.size" in message and "\n" not in message

    @pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4), (3, 64, 64)])
    def test_another_shape_is_an_error(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(UserError, match=r"\(H, W, 3\)"):
            patch_entropy(np.ones(shape, dtype=np.uint8), 8)


class TestSelection:
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=120), st.sampled_from([1, 4, 9, 16, 25, 49]))
    def test_the_lowest_then_the_highest_earlier_patches_first_among_equals(
        self, values: list[int], count: int
    ) -> None:
        # Every level twice, apart by far less than 1e-9: those are ties, too.
        entropies = np.array([value / 8 + (index % 2) * 1e-13 for index, value in enumerate(values)])
        ranked = sorted(range(len(values)), key=lambda index: (values[index], index))
        low, high = count // 2, count - count // 2
        assert select_indices(entropies, count).tolist() == ranked[:low] + ranked[-high:]

    @pytest.mark.parametrize("colours", ["one", "many"])
    def test_flat_patches_are_ties_and_go_by_position(self, colours: str) -> None:
        image = np.full((64, 64, 3), 90, dtype=np.uint8)
        if colours == "many":
            image = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        kept = select_indices(patch_entropy(image, 8)).tolist()
        assert kept == [*range(24), *range(39, 64)]


class TestCanvas:
    @given(st.integers(7, 11), st.integers(7, 11), st.integers(0, 2**32))
    @settings(max_examples=25, deadline=None)
    def test_it_is_a_permutation_of_exactly_the_selected_patches(self, rows: int, columns: int, seed: int) -> None:
        image = mixed(rows, columns, 8, seed % 1000)
        entropies = entropy_by_definition(image, 8)
        ranked = sorted(range(len(entropies)), key=lambda index: (round(entropies[index], 9), index))
        patches = cells(image, 8)
        canvas = select_patches(image, 8, 49, seed)
        assert (canvas.shape, canvas.dtype) == ((56, 56, 3), np.uint8)
        assert Counter(cells(canvas, 8)) == Counter(patches[index] for index in ranked[:24] + ranked[-25:])

    def test_a_224_px_image_keeps_all_its_patches(self) -> None:
        image = noise(224, 224)
        canvas = select_patches(image, seed=0)
        assert canvas.shape == (224, 224, 3)
        assert Counter(cells(canvas, 32)) == Counter(cells(image, 32))
        assert not np.array_equal(canvas, image)

    @given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 100))
    @settings(max_examples=40, deadline=None)
    def test_too_few_patches_overlap_and_leave_black_cells(self, rows: int, columns: int, seed: int) -> None:
        n = rows * columns
        image = noise(rows * 4, columns * 4)
        found = Counter(cells(select_patches(image, 4, 49, seed), 4))
        black = found.pop(bytes(4 * 4 * 3), 0)
        assert black == max(0, 49 - min(24, n) - min(25, n))
        if n <= 24:
            assert found == Counter(cells(image, 4) * 2)
        elif n < 49:
            assert set(found) == set(cells(image, 4)) and found.total() == 49

    def test_stitch_without_a_seed_keeps_the_order(self) -> None:
        image = noise(24, 32)
        indices = np.array([11, 0, 5, 2], dtype=np.int32)
        canvas = stitch(image, indices, 8, 4, None)
        patches = cells(image, 8)
        assert cells(canvas, 8) == [patches[index] for index in indices]

    @pytest.mark.parametrize("count", [2, 48, 50])
    def test_a_count_that_makes_no_square_is_an_error(self, count: int) -> None:
        with pytest.raises(UserError, match=rf"square number, found {count}"):
            select_patches(noise(64, 64), 8, count)


class TestOrder:
    def test_the_same_seed_gives_the_same_canvas_and_another_seed_another_order(self) -> None:
        image = mixed(8, 8, 8)
        canvases = [select_patches(image, 8, seed=seed) for seed in range(5)]
        for seed, canvas in enumerate(canvases):
            assert np.array_equal(canvas, select_patches(image.copy(), 8, seed=seed))
        assert len({canvas.tobytes() for canvas in canvases}) == 5
        assert len({tuple(sorted(cells(canvas, 8))) for canvas in canvases}) == 1

    def test_places_are_random(self) -> None:
        image = mixed(7, 7, 4)
        first = cells(image, 4)[0]
        places = [cells(select_patches(image, 4, seed=seed), 4).index(first) for seed in range(300)]
        assert len(set(places)) > 45  # of 49; all equally likely would miss 0.1 on average
        assert 18 < np.mean(places) < 30

    def test_without_a_seed_the_order_depends_on_the_content_alone(self) -> None:
        image = mixed(8, 9, 8)
        canvas = select_patches(image, 8)
        np.random.seed(0)
        assert np.array_equal(canvas, select_patches(image.copy(), 8))
        np.random.seed(1)
        assert np.array_equal(canvas, select_patches(np.asfortranarray(image), 8))
        assert np.array_equal(canvas, select_patches(image, 8, seed=content_seed(image)))

    def test_without_a_seed_other_content_gives_another_order(self) -> None:
        image = np.pad(mixed(8, 8, 8), ((0, 1), (0, 1), (0, 0)))
        other = image.copy()
        other[-1, -1] = 9  # in the rest that fills no patch: the same patches are kept
        canvases = select_patches(image, 8), select_patches(other, 8)
        assert Counter(cells(canvases[0], 8)) == Counter(cells(canvases[1], 8))
        assert not np.array_equal(*canvases)

    def test_the_image_is_left_as_it_was(self) -> None:
        image = mixed(7, 7, 8)
        before = image.copy()
        select_patches(image, 8)
        assert np.array_equal(image, before)
