"""Checkpoints trained elsewhere beside those of a run: the authors' as rows of the same tables, or a reason why not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from clips import write_checkpoint, write_random_clip
from conftest import write_images
from settings import validate
from trees import prepare, train_into

from dgs.analysis import metrics, report
from dgs.analysis.differences import difference_table
from dgs.analysis.evaluate import evaluate, evaluate_from_disk, settings
from dgs.analysis.figures import detection as figures
from dgs.analysis.figures import forgetting as memory
from dgs.analysis.figures.images import tsne, tsne_panels
from dgs.analysis.figures.style import save
from dgs.data.prepared import load_prepared, load_training
from dgs.errors import UserError
from dgs.model.checkpoint import import_release, read_info
from dgs.model.clip import Clip, load_clip
from dgs.model.detector import Detector
from dgs.model.methods.registry import METHODS
from dgs.params import Params
from dgs.workspace import external_checkpoints

CPU = torch.device("cpu")


class Run(NamedTuple):
    """A run whose CLIP is the release's, and what it trained."""

    params: Params
    clip: Clip
    prepared: Path
    found: dict[tuple[str, int], Path]
    imported: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = oracle.Release(oracle.REDUCED, lr=1e-2)
    tokens = torch.randint(1, 49_407, (4, 12))
    for _ in range(2):  # so that its adapters are not zero
        model.step(torch.randn(4, 3, 224, 224), tokens, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.save(model.eval().state_dict(), folder / "step2.pth")
    import_release(folder / "step2.pth", out=folder / "imported")
    splits = {"train": ("a", "b"), "val": ("a", "b"), "test": ("a", "b", "c")}
    images = write_images(folder / "images", splits, real=2, fake=2, size=(70, 64))
    params = validate(
        {
            "methods": ["probe", "lora"],
            "seeds": [0, 1],
            "data": {
                "layout": "folders",
                "root": str(images),
                "rho": None,
            },
            "patches": {"enabled": True, "size": 32, "count": 49},
            "model": {"clip": str(folder / "imported/clip"), "image_size": 224, "normalize": "imagenet"},
            "train": {"batch_size": 6, "stage1": {"lr": 0.01}, "stage2": {"lr": 0.001}},
            "evaluate": {"retrieval_pool": 4, "tsne_images": 6, "checkpoints": {"release": str(folder / "imported")}},
        }
    )
    clip = load_clip(params.model, Path(), params.image_size)
    training = load_training(prepare(folder / "prepare", params, clip, ["a", "b"]), Path())
    found = {
        (method, seed): train_into(folder / f"{method}-{seed}", method, clip, training, params, seed)
        for method in params.methods
        for seed in params.seeds
    }
    return Run(params, clip, folder / "prepare", found, folder / "imported")


class Tables(NamedTuple):
    """What the evaluate stage makes of the run, and what it then goes on with."""

    found: dict[tuple[str, int], Path]
    scores: pd.DataFrame
    forgetting: pd.DataFrame
    panels: Any


@pytest.fixture(scope="module")
def tables(run: Run) -> Tables:
    found = dict(run.found)
    return Tables(found, *evaluate_from_disk(found, Path(), run.prepared, run.params))


def named(params: Params, checkpoints: dict[str, str], **others: Any) -> Params:
    content = params.model_dump()
    return validate({**content, "evaluate": {**content["evaluate"], "checkpoints": checkpoints}, **others})


def test_the_release_stands_beside_what_was_trained_in_every_table_and_figure(
    run: Run, tables: Tables, tmp_path: Path
) -> None:
    found, scores, forgetting, panels = tables
    assert found == {**run.found, ("release", 0): run.imported}, "whoever goes on with these has it too"
    own = scores[scores["method"] == "release"]
    rows = load_prepared(run.prepared, Path()).manifest.query("split != 'train'")
    assert own["id"].tolist() == rows["id"].tolist() and set(own["seed"]) == {0}
    expected = Detector.load(run.imported).score([Path(run.params.data.root) / file for file in rows["file"]])
    assert np.allclose(1 / (1 + np.exp(-own["logit"].to_numpy())), expected, rtol=0, atol=1e-5)
    drift = forgetting[forgetting["measure"] == "cosine_drift"].groupby("method")["after"].max()
    assert drift["release"] > 1e-6 > drift["probe"] and "release" in panels

    detection = metrics.detection_table(scores, {"a", "b"})
    summary = metrics.summary(detection, forgetting, run.params.profile, "d")
    assert list(summary["methods"]) == ["probe", "lora", "release"]
    assert len(summary["methods"]["release"]["balanced_acc_unseen"]["per_seed"]) == 1
    differences = difference_table(metrics.per_seed_values(detection, forgetting), detection, scores)
    assert differences.query("method == 'release'")[["low", "high_seeds", "p_holm"]].isna().all(axis=None), "one seed"
    drawn = {
        "detection": figures.detection_by_generator(detection),
        "heatmap": figures.detection_heatmap(detection),
        "differences": figures.difference_forest(differences, forgetting),
        "calibration": figures.reliability_diagram(scores, {"a", "b"}),
        "forgetting": memory.forgetting_measures(forgetting),
        "plane": memory.forgetting_plane(detection, forgetting),
        "blocks": memory.forgetting_blocks(forgetting),
        "tsne": tsne_panels(tsne(panels, seed=0), seed=0),
    }
    for name, figure in drawn.items():
        assert save(figure, tmp_path / f"{name}.png").stat().st_size > 0
    chosen = settings(found, run.params)
    assert chosen["release"]["data"]["root"] == read_info(run.imported)["params"]["data"]["root"]
    text = report.write_report(tmp_path / "REPORT.md", summary, detection, forgetting, chosen, []).read_text()
    assert "**Fewer seeds than the others' 2** of `release` (1)" in text
    assert "Only 2 seeds" in text and "One seed only" not in text
    assert "`evaluate.checkpoints.release`" in text and text.count("| `release` |") >= 2


def test_without_any_the_tables_are_those_of_what_was_trained(run: Run, tables: Tables) -> None:
    alone, forgetting, _ = evaluate_from_disk(dict(run.found), Path(), run.prepared, named(run.params, {}))
    assert set(alone["method"]) == set(forgetting["method"]) == {"probe", "lora"}
    beside = tables.scores[tables.scores["method"] != "release"].reset_index(drop=True)
    pd.testing.assert_frame_equal(beside, alone)


class TestRefusedBeforeAnythingIsComputed:
    @pytest.fixture(autouse=True)
    def _nothing_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def computed(*_: object) -> None:
            raise AssertionError("features were computed")

        monkeypatch.setattr("dgs.analysis.evaluate.image_features", computed)

    def test_one_that_saw_images_otherwise(self, run: Run) -> None:
        found = {("release", 0): run.imported}
        seen = dataclasses.replace(run.clip, mean=(0.1, 0.2, 0.3))
        with pytest.raises(
            UserError, match=r"imported saw images with mean .* prepared is .*in a profile with its set"
        ):
            evaluate(found, seen, load_prepared(run.prepared, Path()), run.params, CPU)
        model = {**run.params.model.model_dump(), "precision": "bf16"}
        half = named(run.params, {"release": str(run.imported)}, model=model)
        with pytest.raises(UserError, match=r"trained in fp32, model.precision is bf16"):
            evaluate(found, run.clip, load_prepared(run.prepared, Path()), half, CPU)

    def test_one_of_another_clip(self, run: Run, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", write_random_clip(tmp_path / "clip"))
        params = named(run.params, {"other": str(other)})
        with pytest.raises(UserError, match=r"other was trained on .* with weights .*found .*Set model.clip and"):
            evaluate_from_disk(dict(run.found), Path(), run.prepared, params)

    @pytest.mark.parametrize("name", ["dgs", "probe", "leace", "frozen"])
    def test_a_name_that_a_method_has(self, name: str, run: Run) -> None:
        expected = rf"^Expected names in evaluate.checkpoints that no method has, found {name}\. Call it otherwise"
        with pytest.raises(UserError, match=expected):
            external_checkpoints({name: str(run.imported)}, METHODS, Path())

    @pytest.mark.parametrize("folder", ["nowhere", "imported/clip", "step2.pth"])
    def test_what_is_no_checkpoints_folder(self, folder: str, run: Run) -> None:
        expected = f"at evaluate.checkpoints.release = {folder}, found none. Mend the path, or make it: dgs import"
        with pytest.raises(UserError, match=re.escape(expected)):
            external_checkpoints({"release": folder}, METHODS, run.imported.parent)

    @pytest.mark.parametrize("name", ["The release", "a|b", ""])
    def test_a_name_that_no_table_could_hold(self, name: str, run: Run) -> None:
        with pytest.raises(UserError, match=r"Parameter 'evaluate\.checkpoints\."):
            named(run.params, {name: str(run.imported)})
