"""What is shown: an interval in which seeds, generators and test images are random, and p values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from sklearn.metrics import average_precision_score

from dgs.crossed import RATES, average_precisions, balanced_accuracies, crossed_interval, holm, sign_flip_p
from dgs.stats import Scored, balanced_accuracy, seed_interval
from studies.coverage import CASES, cells, coverage, logits, truth

COVERAGE = Path(__file__).parents[1] / "results" / "study" / "coverage.csv"


def table(whole: list[list[float]], shared: list[float] = [0.0, 0.0]) -> np.ndarray:  # noqa: B006
    """Cells, and without each block: all of them moved alike, by `shared`."""
    cells = np.array(whole)
    return np.stack([cells, *(cells + moved for moved in shared)])


def test_two_seeds_and_three_generators_by_hand() -> None:
    # means: seeds 2, 4; generators 1, 3, 5; all 3. What is left over: [0.5, 0, -0.5] and its mirror image.
    cells = [[0.5, 2.0, 3.5], [1.5, 4.0, 6.5]]
    of_seeds, of_generators, of_rest = 3 * 2.0, 2 * 4.0, (4 * 0.25) / 2
    variance = (of_seeds + of_generators - of_rest) / 6
    df = (6 * variance) ** 2 / (of_seeds**2 / 1 + of_generators**2 / 2 + of_rest**2 / 2)
    found = crossed_interval(table(cells))
    assert found.df == pytest.approx(df) and 1 < df < 3
    half = t.ppf(0.975, df) * math.sqrt(variance)
    assert tuple(found.interval) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert found.p == pytest.approx(2 * t.sf(3.0 / math.sqrt(variance), df))
    assert crossed_interval(-table(cells)).interval == pytest.approx((-3.0, -3.0 - half, -3.0 + half))


def test_photographs_that_all_cells_share_are_the_jackknife_s_variance() -> None:
    moved = [0.03, -0.01, -0.02, 0.0]
    found = crossed_interval(table([[1.0] * 3] * 2, moved))
    error = math.sqrt(3 / 4 * sum(value**2 for value in moved))
    assert found.df == pytest.approx(3), "blocks less one: nothing else varies"
    assert found.interval.high == pytest.approx(1.0 + t.ppf(0.975, 3) * error)


def test_photographs_of_one_generator_are_not_counted_twice() -> None:
    """Only cells that differ in seed and generator say what all share: the rest is in the mean squares already."""
    alone = np.zeros((5, 3, 4))
    alone[1:, :, 0] = np.array([0.4, -0.1, -0.3, 0.0])[:, None]
    alone[1:, 1, :] += np.array([0.1, 0.1, 0.1, -0.3])[:, None] * [0, 1, 1, 1]
    alone[0] = np.random.default_rng(0).normal(size=(3, 4))
    nothing = np.concatenate([alone[:1], np.zeros((4, 3, 4))])
    assert crossed_interval(alone).interval == pytest.approx(crossed_interval(nothing).interval)


def test_what_cannot_be_known_has_a_mean_alone() -> None:
    whole = np.arange(12.0).reshape(3, 4)
    for part in (whole[:1], whole[:, :1]):
        found = crossed_interval(table(part.tolist()))
        assert found.interval.mean == part.mean() and not found.interval.known and math.isnan(found.p)
    assert not crossed_interval(table(whole.tolist(), [0.0])).interval.known, "one block is no jackknife"
    with pytest.raises(ValueError, match="finite"):
        crossed_interval(table([[math.nan, 1.0]]))
    with pytest.raises(ValueError, match="shape"):
        crossed_interval(whole)


def test_equal_methods_do_not_differ() -> None:
    found = crossed_interval(np.zeros((5, 3, 4)))
    assert tuple(found.interval) == (0, 0, 0) and found.p == 1


@pytest.mark.parametrize("ties", [False, True])
def test_rates_without_each_block_are_those_of_the_other_images(ties: bool) -> None:
    rng = np.random.default_rng(1)
    reals, fakes = rng.normal(0, 1, 50), rng.normal(0.7, 1, 30)
    if ties:
        reals, fakes = reals.round(), fakes.round()
    of_reals, of_fakes = np.arange(50) % 7, np.arange(30) % 7
    found = {name: rate(reals, fakes, of_reals, of_fakes, 7) for name, rate in RATES.items()}
    for block in range(-1, 7):
        kept = reals[of_reals != block], fakes[of_fakes != block]
        labels, scores = np.repeat([0, 1], [len(side) for side in kept]), np.concatenate(kept)
        assert found["ap"][1 + block] == pytest.approx(average_precision_score(labels, scores))
        assert found["balanced_acc"][1 + block] == pytest.approx(balanced_accuracy(Scored.of(labels, scores)))


def test_an_image_at_the_threshold_is_real_as_elsewhere() -> None:
    of = np.array([0, 1])
    assert balanced_accuracies(np.zeros(2), np.zeros(2), of, of, 2).tolist() == [0.5] * 3
    assert average_precisions(np.zeros(2), np.zeros(2), of, of, 2).tolist() == [0.5] * 3


def test_holm_by_hand_and_what_was_not_tested_does_not_count() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.6, 0.7]).tolist() == [1, 1] and holm([]).size == 0


def test_five_seeds_cannot_go_below_a_sixteenth() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == sign_flip_p([-0.1] * 5) == 0.0625
    assert sign_flip_p([1.0, -1.0, 1.0, -1.0]) == 1 and sign_flip_p([3.0, -1.0]) == 1
    assert math.isnan(sign_flip_p([0.2]))


class TestCoverage:
    def test_the_committed_simulation_holds_the_truth_as_often_as_it_says(self) -> None:
        found = pd.read_csv(COVERAGE)
        assert set(found["case"]) == set(CASES) and set(found["rate"]) == set(RATES)
        assert found["crossed"].between(0.93, 0.97).all()
        assert (found["over_seeds"] < 0.9).all(), "seeds alone leave the truth out twice as often as they say, or more"

    def test_it_is_what_the_program_makes(self) -> None:
        rows = pd.DataFrame(coverage(2))
        committed = pd.read_csv(COVERAGE)
        assert list(rows) == list(committed)
        known = ["case", "rate", "seeds", "generators", "images"]
        assert rows[known].equals(committed[known])
        exact = committed["rate"] == "balanced_acc"
        assert rows.loc[exact, "truth"].to_numpy() == pytest.approx(committed.loc[exact, "truth"], abs=1e-4)

    @pytest.mark.parametrize("case", CASES)
    def test_its_truth_is_the_mean_of_what_it_draws(self, case: str) -> None:
        rng = np.random.default_rng(0)
        drawn = [cells(logits(CASES[case], 3, 4, rng), "balanced_acc")[0].mean() for _ in range(40)]
        mean, low, high = seed_interval(drawn, 0.999)
        assert low <= truth(CASES[case]) <= high, f"{mean}"
