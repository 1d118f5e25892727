"""A linear head on the frozen tower that knows every generator, and never the image it is asked about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from dgs.cli import app
from dgs.errors import UserError
from dgs.params import Params
from dgs.workspace import Workspace
from studies.ceiling import accuracy_rows, by_label, ceiling, cross_validated

ROOT = Path(__file__).parents[1]
GENERATORS = np.array(["real"] * 300 + ["a"] * 300 + ["b"] * 300, dtype=object)


def judged(known: np.ndarray, test: np.ndarray) -> pd.Series:
    labels = np.arange(len(known)) % 2
    logits = cross_validated(known, labels, np.ones(len(known)), test, GENERATORS, 0.1)
    return accuracy_rows(GENERATORS, logits, {"a"}).set_index("generator")["balanced_acc"]


def test_it_is_high_where_a_direction_tells_a_generator_that_training_never_had() -> None:
    rng = np.random.default_rng(0)
    test = rng.normal(size=(900, 4))
    test[600:, 2] += 6  # only b, and training images hold nothing of it
    found = judged(rng.normal(size=(200, 4)), test)
    assert found["b"] > 0.8 and found["a"] < 0.6


def test_it_is_chance_where_features_hold_nothing_however_many_there_are() -> None:
    """What it learned by heart of the other folds is worth nothing: no image is judged by a head that saw it."""
    rng = np.random.default_rng(1)
    found = judged(rng.normal(size=(200, 400)), rng.normal(size=(900, 400)))
    assert found.between(0.42, 0.58).all()


def test_both_labels_weigh_the_same() -> None:
    labels = np.array([0, 1, 1, 1])
    weights = by_label(labels, np.array([2.0, 1.0, 1.0, 2.0]))
    assert weights[labels == 0].sum() == weights[labels == 1].sum() == 1


def test_rows_hold_balanced_accuracy_within_its_interval() -> None:
    logits = np.where(GENERATORS == "a", 1.0, -1.0)
    logits[:30] = 1.0
    rows = accuracy_rows(GENERATORS, logits, {"a"}).set_index("generator")
    assert rows.loc["a", "balanced_acc"] == pytest.approx(0.95) and rows.loc["b", "balanced_acc"] == pytest.approx(0.45)
    assert rows["seen"].to_dict() == {"a": True, "b": False}
    assert ((rows["low"] < rows["balanced_acc"]) & (rows["balanced_acc"] < rows["high"])).all()


def test_too_few_images_are_named() -> None:
    few = np.array(["real"] * 10 + ["rare"] * 3, dtype=object)
    with pytest.raises(UserError, match="at least 5 test images of every generator, found 3 of rare"):
        cross_validated(np.zeros((4, 2)), np.array([0, 1, 0, 1]), np.ones(4), np.zeros((13, 2)), few, 0.1)


def test_the_command_writes_both_heads_of_what_was_prepared(
    tiny: Params, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ceiling(tiny, ROOT, tiny_prepared)
    assert list(rows["head"].unique()) == ["output", "levels"]
    assert rows.groupby("head").size().nunique() == 1 and rows["balanced_acc"].between(0, 1).all()
    assert rows["seen"].any() and not rows["seen"].all()
    monkeypatch.setattr(Workspace, "of", lambda *_: Workspace(tmp_path, tmp_path, "tiny"))
    monkeypatch.setattr(Workspace, "find", lambda *_, **__: tiny_prepared)
    monkeypatch.setenv("DGS_PROFILE", "tiny")
    monkeypatch.setattr("studies.ceiling.ceiling", lambda *_: rows)
    done = CliRunner().invoke(app, ["ceiling", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["unseen"].keys() == {"output", "levels"}
    assert len(pd.read_csv(tmp_path / said["table"])) == len(rows)
