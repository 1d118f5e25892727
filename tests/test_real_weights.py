"""Trained weights of the study on real pictures: what results/real/train has is what its results come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgs.model.checkpoint import read_info, require_unchanged
from dgs.params import load_params
from dgs.tables import read_table

RESULTS = Path(__file__).resolve().parent.parent / "results" / "real"
FOLDERS = sorted((RESULTS / "train").glob("*/seed-*"))


def test_every_method_has_every_seed() -> None:
    params = load_params("real", RESULTS.parent.parent)
    found = {folder.parent.name for folder in FOLDERS}
    assert found == set(params.methods)
    assert [(folder.parent.name, folder.name) for folder in FOLDERS] == [
        (method, f"seed-{seed}") for method in sorted(found) for seed in params.seeds
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_detector_is_as_it_was_saved_and_learned_from_the_pictures_that_rates_were_chosen_on(folder: Path) -> None:
    info = read_info(folder)
    require_unchanged(folder, info, carried=False)
    (data_hash,) = set(read_table(RESULTS / "tuning.csv")["data_hash"])
    assert (info["method"], f"seed-{info['seed']}") == (folder.parent.name, folder.name)
    assert info["data_hash"] == data_hash
    assert info["clip"]["name"] == "build/real/tower" if info["kind"] == "clip" else "clip" not in info
