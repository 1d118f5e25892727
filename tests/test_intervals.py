"""What an interval over seeds promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dgs.stats import (
    Interval,
    iqm,
    paired_difference,
    percent_text,
    rounded_text,
    seed_interval,
    share_interval,
    stratified_bootstrap,
)


def test_three_seeds_by_hand() -> None:
    mean, low, high = seed_interval([1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) from a printed table, sd 1
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), abs=1e-5)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    interval = seed_interval([0.7])
    assert interval.mean == 0.7
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert not interval.known
    assert interval.spans_zero, "what is not known cannot exclude zero"


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 0.0 <= high for _, low, high in (seed_interval(rng.normal(size=5)) for _ in range(2000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_a_paired_difference_cancels_what_the_seeds_share() -> None:
    shared = np.array([0.1, 0.5, 0.9])
    assert tuple(paired_difference(shared + 0.02, shared)) == pytest.approx((0.02, 0.02, 0.02))
    assert tuple(seed_interval([0.5, 0.5, 0.5])) == (0.5, 0.5, 0.5), "seeds that agree give a point"


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=10))
def test_a_higher_level_is_never_narrower_and_swapping_the_methods_mirrors(values: list[float]) -> None:
    narrow, wide = seed_interval(values, 0.8), seed_interval(values, 0.99)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high
    other = np.linspace(0.0, 1.0, len(values))
    there, back = paired_difference(values, other), paired_difference(other, values)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


@pytest.mark.parametrize("values", [[], [[0.1, 0.2]], [0.1, math.nan]])
def test_values_that_make_no_sense_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        seed_interval(values)
    with pytest.raises(ValueError, match="same seeds"):
        paired_difference([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="level"):
        seed_interval([0.1, 0.2], level=95)
    with pytest.raises(ValueError, match="finite"):
        rounded_text(math.nan)
    with pytest.raises(ValueError, match="finite"):
        iqm(np.array([1.0, np.nan]))


class TestPrinting:
    @pytest.mark.parametrize("exact", [0.6955, 0.9825, 0.5005, 0.7025])
    def test_equal_numbers_print_alike_however_they_were_summed(self, exact: float) -> None:
        noisy = [exact + k * 2.0**-52 for k in range(-8, 9)] + [float(np.mean([exact - 0.1, exact + 0.1]))]
        assert {percent_text(value) for value in noisy} == {percent_text(exact)}
        assert {rounded_text(100 * value) for value in noisy} == {percent_text(exact)}

    @pytest.mark.parametrize("digits", [0, 1, 2])
    @given(st.floats(-1.0, 1.0))
    def test_what_metrics_json_keeps_prints_like_what_it_was_rounded_from(self, digits: int, value: float) -> None:
        if abs(value * 1e6 % 1.0 - 0.5) > 1e-6:  # halves of the last digit kept may go either way
            assert percent_text(round(value, 6), digits) == percent_text(value, digits)

    @pytest.mark.parametrize(
        ("value", "digits", "sign", "text"),
        [
            (69.55, 1, False, "69.6"),
            (98.25, 1, False, "98.3"),
            (-0.25, 1, False, "−0.3"),
            (100.0, 1, False, "100.0"),
            (59.5, 0, False, "60"),
            (2.0, 1, True, "+2.0"),
            (-2.0, 1, True, "−2.0"),
            (-0.04, 1, False, "0.0"),
            (-0.04, 1, True, "−0.0"),
            (0.04, 1, True, "+0.0"),
            (0.0, 1, True, "+0.0"),
            (-1e-9, 1, True, "+0.0"),
            (1e-9, 1, False, "0.0"),
        ],
    )
    def test_by_hand(self, value: float, digits: int, sign: bool, text: str) -> None:
        assert rounded_text(value, digits, sign) == text


def test_the_interquartile_mean_leaves_out_the_outer_quarters() -> None:
    assert iqm(np.array([[0.0, 1.0, 2.0, 100.0], [1.0, 2.0, -50.0, 3.0]])) == pytest.approx((1 + 1 + 2 + 2) / 4)


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=30))
def test_an_interquartile_mean_is_scipys_trimmed_mean(values: list[float]) -> None:
    assert iqm(np.array(values)) == pytest.approx(float(stats.trim_mean(values, 0.25)))


def test_a_stratified_bootstrap_draws_seeds_and_never_tasks() -> None:
    """Tasks that differ by far and agree over seeds leave nothing uncertain."""
    tasks = np.tile([0.1, 0.5, 0.9], (5, 1))
    assert stratified_bootstrap(tasks, np.mean) == Interval(0.5, 0.5, 0.5)
    noisy = tasks + np.random.default_rng(0).normal(0, 0.05, tasks.shape)
    found = stratified_bootstrap(noisy, np.mean)
    assert found.low < noisy.mean() < found.high
    assert found == stratified_bootstrap(noisy, np.mean)
    width = 2 * 1.96 * noisy.std(axis=0, ddof=0).mean() / np.sqrt(15)
    assert found.high - found.low == pytest.approx(width, rel=0.3)
    assert not stratified_bootstrap(noisy[:1]).known
    with pytest.raises(ValueError, match="shape"):
        stratified_bootstrap(noisy[0])


def test_tasks_are_drawn_apart_so_what_they_share_is_lost() -> None:
    """The reason to read it beside the t interval: seeds that move all tasks alike look more certain than they are."""
    moved = np.linspace(-1.0, 1.0, 5)[:, None] + np.zeros((5, 9))
    together, alone = stratified_bootstrap(moved, np.mean), stratified_bootstrap(moved[:, :1], np.mean)
    assert together.high - together.low == pytest.approx((alone.high - alone.low) / 3.0, rel=0.1)


def test_a_share_of_few_is_uncertain_and_stays_a_share() -> None:
    assert share_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)  # Wilson by hand
    for count in (0, 10):
        mean, low, high = share_interval(count, 10)
        assert 0 <= low < high <= 1 and mean == count / 10 and high - low > 0.2
    with pytest.raises(ValueError):
        share_interval(0, 0)
