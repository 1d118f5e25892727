"""Probes of a frozen tower: what they share is found, and no picture is judged by its own group."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from real.in_common import transfer

Pictures = tuple[pd.DataFrame, NDArray[np.float32]]


@pytest.fixture
def pictures() -> Pictures:
    """Fakes of "a" and "b" are shifted along one direction, those of "c" along another; photographs are shared."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            {"generator": generator, "label": label, "group": f"{generator} {number // 2}"}
            for generator, label, count in (("real", 0, 80), ("a", 1, 60), ("b", 1, 30), ("c", 1, 40))
            for number in range(count)
        ]
    )
    features = rng.normal(size=(len(rows), 12)).astype(np.float32)
    features[:, 0] += 3.0 * rows["generator"].isin(["a", "b"])
    features[:, 1] += 3.0 * (rows["generator"] == "c")
    return rows, features


def test_a_probe_carries_over_to_generators_that_leave_the_same_trace(pictures: Pictures) -> None:
    found = pd.DataFrame(transfer(*pictures)).set_index(["trained_on", "tested_on"])["auroc"]
    assert len(found) == 9
    for first, second in (("a", "a"), ("b", "b"), ("c", "c"), ("a", "b"), ("b", "a")):
        assert found[first, second] > 0.9
    for first, second in (("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")):
        assert found[first, second] < 0.75


def test_nothing_is_found_where_groups_are_all_that_tells(pictures: Pictures) -> None:
    """Twins of a group are alike and no group is like another: a probe that saw one twin would know the other."""
    rows, _ = pictures
    of_group = np.random.default_rng(1).normal(size=(rows["group"].nunique(), 200))
    features = of_group[rows["group"].astype("category").cat.codes].astype(np.float32)
    found = pd.DataFrame(transfer(rows, features))["auroc"]
    assert found.max() < 0.85 and 0.35 < found.mean() < 0.65
