"""Leaving out a generator: what is trained on, what is tested on, and that no test image is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from copies import ROOT

from dgs.data.prepared import Prepared, load_prepared
from dgs.errors import UserError
from dgs.params import Params
from studies.leave_one_generator_out import COLUMNS, SPLIT, generators_to_leave_out, leave_one_generator_out, without


@pytest.fixture(scope="module")
def prepared(tiny_prepared: Path) -> Prepared:
    return load_prepared(tiny_prepared, ROOT)


def test_a_generator_left_out_is_neither_trained_nor_validated_on(prepared: Prepared) -> None:
    before = prepared.manifest
    for generator in generators_to_leave_out(prepared):
        after = without(prepared, generator).manifest
        fakes = (before["generator"] == generator) & (before["label"] == 1)
        train = before["split"] == "train"
        assert (after.loc[train & fakes, "split"] == SPLIT).all()
        assert not after.loc[fakes, "split"].isin(["train", "val", "val_unbiased"]).any()
        photographs = train & (before["label"] == 0)
        kept = after.loc[photographs, "split"].value_counts()
        assert abs(kept["train"] - kept[SPLIT]) <= 1
        others = ~fakes & ~photographs
        assert (after.loc[others, "split"] == before.loc[others, "split"]).all()
    assert before["split"].ne(SPLIT).all(), "what was given is as it was"


def test_the_same_photographs_are_left_out_for_each(prepared: Prepared) -> None:
    one, two = (
        frozenset(made.split(SPLIT).query("label == 0")["id"])
        for made in (without(prepared, generator) for generator in generators_to_leave_out(prepared))
    )
    assert one == two


def test_of_a_single_generator_none_can_be_left_out(prepared: Prepared) -> None:
    rows = prepared.manifest
    first = generators_to_leave_out(prepared)[0]
    alone = replace(prepared, manifest=rows[(rows["label"] == 0) | (rows["generator"] == first)])
    with pytest.raises(UserError, match=f"two generators or more, to leave one out; found {first}"):
        generators_to_leave_out(alone)


def test_each_is_trained_and_tested_once_and_a_second_run_has_nothing_to_do(
    tiny: Params, tiny_prepared: Path, prepared: Prepared, tmp_path: Path
) -> None:
    out = tmp_path / "left_out.csv"
    rows = list(leave_one_generator_out(["probe", "lora"], tiny, ROOT, tiny_prepared, out, [100]))
    table = pd.read_csv(out)
    assert list(table.columns) == COLUMNS and len(table) == len(rows) == 4
    assert set(table["generator"]) == set(generators_to_leave_out(prepared))
    assert table[COLUMNS[4:]].stack().between(0, 1).all()
    assert list(leave_one_generator_out(["probe", "lora"], tiny, ROOT, tiny_prepared, out, [100])) == []
    assert len(list(leave_one_generator_out(["probe"], tiny, ROOT, tiny_prepared, out, [101]))) == 2
