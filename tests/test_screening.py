"""Float32's entropies: their bound holds, and what it leaves open is settled so that the order is float64's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.data.patches import patch_entropy, patch_indices, select_indices, select_patches
from dgs.data.screening import SIZES, bounded, gray, measure, undecided

Image = np.ndarray
Kind = Callable[[np.random.Generator, int, int, int], Image]
VARIANTS = 300  # of a texture in an image
SEEDS = st.integers(0, 2**32 - 1)


def as_patches(image: Image, size: int) -> Image:
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return image[: rows * size, : columns * size].reshape(rows, size, columns, 3 * size).swapaxes(1, 2)


def mosaic(rng: np.random.Generator, variants: list[Image], rows: int, columns: int) -> Image:
    """Patches drawn from `variants`."""
    size = variants[0].shape[0]
    drawn = np.stack(variants)[rng.integers(0, len(variants), (rows, columns))]
    return drawn.swapaxes(1, 2).reshape(rows * size, columns * size, 3)


def texture(rng: np.random.Generator, size: int, strength: float) -> Image:
    base = rng.integers(30, 220, 3)
    return np.clip(base + rng.normal(0, strength, (size, size, 3)), 0, 255).astype(np.uint8)


def noise(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    return rng.integers(0, 256, (rows * size, columns * size, 3), dtype=np.uint8)


def faint(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    """Nearly flat: a few pixels off by one, so that entropies are a few 1e-5 and less, and close to each other."""
    image = np.full((rows * size, columns * size, 3), int(rng.integers(1, 250)), dtype=np.uint8)
    image[rng.random(image.shape) < 0.003] += 1
    return image


def flats(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    top = int(rng.choice([1, 2, 256]))
    return rng.integers(0, top, (rows, columns, 3)).astype(np.uint8).repeat(size, 0).repeat(size, 1)


def binary(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    """Zeros and ones, hardly any: the 1e-12 of the definition show."""
    return (rng.random((rows * size, columns * size, 3)) < 0.01).astype(np.uint8)


def ties(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    """One texture shifted, mirrored and transposed: other pixels, the same spectrum in another order."""
    tile, found = texture(rng, size, float(rng.choice([1, 8, 60]))), []
    for _ in range(VARIANTS):
        turned = np.roll(tile, tuple(rng.integers(0, size, 2)), (0, 1))[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        found.append(turned.swapaxes(0, 1) if rng.random() < 0.5 else turned)
    return mosaic(rng, found, rows, columns)


def near_ties(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    """One texture with one pixel off by one in each: entropies 1e-9 to 1e-5 apart."""
    tile, found = texture(rng, size, float(rng.choice([1, 8, 60]))), []
    for _ in range(VARIANTS):
        patch = np.roll(tile, tuple(rng.integers(0, size, 2)), (0, 1)) if rng.random() < 0.5 else tile.copy()
        if rng.random() < 0.7:
            patch[tuple(rng.integers(0, size, 2))] ^= np.array([0, 0, 1], dtype=np.uint8)
        found.append(patch)
    return mosaic(rng, found, rows, columns)


def repeated(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    """A texture whose period is not that of the patches."""
    period = int(rng.integers(1, 2 * size))
    tile = noise(rng, 1, 1, period)
    return tile[np.arange(rows * size) % period][:, np.arange(columns * size) % period]


def ramp(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    y, x = np.mgrid[: rows * size, : columns * size]
    steps = rng.uniform(-1, 1, 2)
    return np.repeat(((steps[0] * y + steps[1] * x) % 256).astype(np.uint8)[..., None], 3, axis=2)


KINDS: list[Kind] = [noise, faint, flats, binary, ties, near_ties, repeated, ramp]


def mixture(rng: np.random.Generator, rows: int, columns: int, size: int) -> Image:
    """Patches of all kinds in one image."""
    parts = [as_patches(kind(rng, rows, columns, size), size) for kind in KINDS]
    chosen = np.choose(rng.integers(0, len(parts), (rows, columns))[..., None, None], parts)
    return chosen.swapaxes(1, 2).reshape(rows * size, columns * size, 3)


@pytest.mark.parametrize("kind", [*KINDS, mixture])
class TestSameAsFloat64:
    @given(st.sampled_from(SIZES), SEEDS, st.sampled_from([1, 4, 9, 49, 400]))
    @settings(max_examples=12, deadline=None)
    def test_the_kept_and_their_order(self, kind: Kind, size: int, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        rows, columns = (int(n) for n in rng.integers(512 // size, 580 // size, 2))  # enough for float32
        image = kind(rng, rows, columns, size)
        expected = select_indices(patch_entropy(image, size), count)
        assert np.array_equal(patch_indices(image, size, count), expected)

    @given(st.sampled_from(SIZES), SEEDS)
    @settings(max_examples=12, deadline=None)
    def test_no_entropy_is_beyond_its_bound(self, kind: Kind, size: int, seed: int) -> None:
        image = kind(np.random.default_rng(seed), 6, 7, size)
        scale = 1 / 255_000 if image.max() > 1 else 1 / 1000
        entropies, bounds = bounded(np.array(measure(as_patches(image, size))[:4]), size, scale)
        exact = patch_entropy(image, size)
        assert (np.abs(entropies - exact) <= bounds).all()
        flat = np.ptp(gray(as_patches(image, size)).reshape(len(exact), -1), axis=1) == 0
        assert np.array_equal(bounds == 0, flat) and np.array_equal(entropies[flat], exact[flat])
        assert bounds.max() < 1e-3  # or nothing would ever be settled


class TestOracle:
    @pytest.mark.parametrize("kind", [noise, flats, near_ties, repeated, ramp])
    def test_the_canvas_is_the_definitions(self, kind: Kind) -> None:
        image = kind(np.random.default_rng(7), 13, 17, 32)
        image = np.pad(image, ((0, 5), (0, 31), (0, 0)))
        order = np.random.default_rng(3).permutation(49)
        assert np.array_equal(select_patches(image, 32, 49, 3), oracle.select_patches(image, order))


def test_each_size_is_cut_from_images_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    for height, width, size in [(32, 9000, 32), (9000, 33, 32), (500, 700, 48), (301, 999, 7), (2500, 2500, 512)]:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for layout in (image, np.asfortranarray(image), image[::-1, ::-1]):
            expected = select_indices(patch_entropy(layout, size), 49)
            assert np.array_equal(patch_indices(layout, size), expected)


@given(st.integers(1, 60), st.sampled_from([1, 2, 9, 49]), SEEDS)
@settings(deadline=None)
def test_whatever_lies_within_the_bounds_only_the_undecided_decide(number: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bounds = 10 ** rng.uniform(-9, -1, number) * (rng.random(number) < 0.8)
    found = rng.choice([rng.random(number), np.round(rng.random(number), 1)])
    exact = found + bounds * rng.uniform(-1, 1, number)
    settled = found.copy()
    open_ones = undecided(found, bounds, count)
    settled[open_ones] = exact[open_ones]
    assert np.array_equal(select_indices(settled, count), select_indices(exact, count))
    assert (bounds[open_ones] > 0).all()


def test_where_entropies_are_far_apart_none_is_open() -> None:
    assert len(undecided(np.arange(100.0), np.full(100, 0.1), 49)) == 0
    assert len(undecided(np.arange(100.0), np.where(np.arange(100) == 50, 20.0, 0.1), 49)) == 0  # reaches none kept
    assert sorted(undecided(np.append(np.arange(99.0), 3.05), np.full(100, 0.1), 49)) == [3, 99]


@pytest.mark.parametrize("size", [2, 7, 8, 20, 32, 37])
def test_an_entropy_does_not_depend_on_the_patches_beside_it(size: int) -> None:
    rng = np.random.default_rng(size)
    patch, length = rng.integers(0, 256, (size, size, 3), dtype=np.uint8), 70
    # A transform of one patch may take another way than one of many: on an AMD EPYC (Zen 4) their last bits differ.
    alone, together = patch_entropy(patch, size), patch_entropy(np.tile(patch, (1, length, 1)), size)
    assert (together == together[0]).all() and together[0] == pytest.approx(alone[0], rel=1e-15)
    row = rng.integers(0, 256, (size, length * size, 3), dtype=np.uint8)
    for place in (0, 1, 30, 69):
        row[:, place * size : (place + 1) * size] = patch
        assert patch_entropy(row, size)[place] == together[0]


def test_the_logarithm_is_as_exact_as_the_bound_supposes() -> None:
    values = np.exp2(np.random.default_rng(0).uniform(-126, 60, 1_000_000)).astype(np.float32)
    exact = np.log2(values.astype(np.float64))
    assert (np.abs(np.log2(values) - exact) <= 4 * 2.0**-23 * np.abs(exact)).all()
