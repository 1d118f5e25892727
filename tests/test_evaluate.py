"""Scores of checkpoints on images: each with what it was trained on and with, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_images
from copies import ROOT
from PIL import Image
from settings import validate
from trees import prepare, train_into

from dgs.analysis.evaluate import block_means, checkpoints, evaluate, settings, tsne_rows, write_tables
from dgs.analysis.figures.detection import robustness_curves
from dgs.analysis.from_scores import renew
from dgs.analysis.metrics import RATES, detection_table, summary
from dgs.analysis.report import write_report
from dgs.analysis.scores import FILE, SCORES
from dgs.conditions import parse_condition
from dgs.data.manifest import open_image
from dgs.data.perturbations import perturb
from dgs.data.prepared import Prepared, load_prepared
from dgs.data.views import Views
from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.clip import Clip, load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.detector import Detector
from dgs.params import Params
from dgs.tables import read_table
from dgs.workspace import Workspace

CPU = torch.device("cpu")


NAMES = ("probe", "dgs", "levels_probe", "levels_poe", "pixel_cnn", "late_fusion")


class Run(NamedTuple):
    """A run on a random CLIP and folders of images: what it was given and what it trained."""

    clip: Clip
    prepared: Prepared
    params: Params
    found: dict[tuple[str, int], Path]

    def evaluated(self, *names: str, **values: Any) -> tuple[pd.DataFrame, pd.DataFrame, Any]:
        """`evaluate` of some of what was trained, with some values of evaluate.robustness."""
        asked = self.params.replaced({f"evaluate.robustness.{name}": value for name, value in values.items()})
        return evaluate({(name, 0): self.found[name, 0] for name in names}, self.clip, self.prepared, asked, CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Run:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    params = validate(
        {
            "seeds": [0],
            "data": {"layout": "folders", "root": str(write_images(folder / "images")), "rho": None},
            "model": {"clip": str(clip_folder), "image_size": 32, "lora": {"rank": 2, "dropout": 0.0}},
            "train": {"batch_size": 6, "stage1": {"lr": 0.01}, "stage2": {"lr": 0.01}},
            "evaluate": {"retrieval_pool": 4},
        }
    )
    clip = load_clip(params.model, Path(), params.image_size)
    prepared = load_prepared(prepare(folder / "prepare", params, clip, ["alpha", "beta"]), Path())
    found = {(name, 0): train_into(folder / name, name, clip, prepared, params) for name in NAMES}
    return Run(clip, prepared, params, found)


@pytest.fixture(scope="module")
def evaluated(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, Any]:
    return run.evaluated(*NAMES)


def test_scores_are_those_of_the_detector_on_the_same_files(
    run: Run, evaluated: tuple[pd.DataFrame, pd.DataFrame, Any]
) -> None:
    scores, forgetting, panels = evaluated
    rows = run.prepared.manifest[run.prepared.manifest["split"] != "train"]
    assert len(scores) == len(NAMES) * len(rows)
    assert (
        ",".join(scores)
        == ",".join(SCORES)
        == ("id,sha256,split,generator,label,rho,condition,applied_to,logit,method,seed,profile")
    )
    assert {name: str(scores[name].dtype) for name, kind in SCORES.items() if kind != "str"} == {
        "label": "int64", "rho": "float64", "logit": "float32", "seed": "int64",
    }  # fmt: skip
    assert set(scores["profile"]) == {run.params.profile} and set(scores["split"]) == {"val", "test"}
    assert scores["sha256"].tolist() == len(NAMES) * rows["sha256"].tolist()
    for name in NAMES:
        own = scores[scores["method"] == name]
        assert own["id"].tolist() == rows["id"].tolist()
        expected = Detector.load(run.found[name, 0]).score([Path(run.params.data.root) / file for file in rows["file"]])
        assert np.allclose(1 / (1 + np.exp(-own["logit"].to_numpy())), expected, rtol=0, atol=1e-6)
    drift = forgetting[forgetting["measure"] == "cosine_drift"].set_index("method")["after"]
    for frozen, tuned in (("probe", "dgs"), ("levels_probe", "levels_poe"), ("probe", "late_fusion")):
        assert 0.0 <= drift[frozen] < 1e-12 < drift[tuned], "a frozen tower forgets nothing, a trained one moved"
    assert set(panels) == {"frozen", "dgs", "levels_poe", "late_fusion"}
    assert set(forgetting["method"]) == set(NAMES) - {"pixel_cnn"}, "without a CLIP there is nothing to forget"
    assert len({features.shape[1] for features, _ in panels.values()}) == 1  # levels are no part of what CLIP knows
    after = forgetting.pivot(index="measure", columns="method", values="after")
    ideal = {"cka": 1.0, "knn_overlap": 1.0, "cosine_drift": 0.0, "principal_angle": 0.0}
    of_blocks = [f"{name}_block:{k}" for name in ("cka", "cosine_drift") for k in (1, 2)]
    for name in ("cka_to_frozen", "knn_overlap", "principal_angle:mean", "principal_angle:max", *of_blocks):
        best = next(value for start, value in ideal.items() if name.startswith(start))
        assert after.loc[name, "probe"] == pytest.approx(best, abs=1e-6)
        moved = abs(after.loc[name, "dgs"] - best)
        assert moved > 1e-6 or name == "knn_overlap", f"{name} of a tower that was trained"
    unmoved = forgetting[forgetting["method"] == "probe"].set_index("measure").loc[["effective_rank", "silhouette"]]
    assert (unmoved["before"] == unmoved["after"]).all()


def test_a_tower_that_is_read_at_earlier_levels_has_the_same_blocks(run: Run) -> None:
    clip, prepared, params, _ = run
    views = Views(prepared.split("val"), prepared.source, params)
    plain, read = (ClipClassifier(clip, Backbone(clip, levels=levels), {}).eval() for levels in ((), (0, 2)))
    blocks = block_means(plain, views, params, "blocks")
    again = block_means(read, views, params, "blocks")
    assert [part.shape for part in blocks] == [(len(views), clip.model.visual.positional_embedding.shape[1])] * len(
        blocks
    )
    assert all(np.array_equal(a, b) for a, b in zip(blocks, again, strict=True))
    assert read.backbone.levels == (0, 2)
    heard: list[torch.Tensor] = []
    last = clip.model.visual.transformer.resblocks[-1]
    hook = last.register_forward_hook(lambda block, given, out: heard.append(out))
    with torch.no_grad():
        read.features(torch.stack([views[i][0] for i in range(len(views))]))
    hook.remove()
    assert np.allclose(blocks[-1], heard[0][:, 1:].mean(1).numpy(), atol=1e-6)


def test_blocks_below_the_adapters_are_run_once_for_all_checkpoints(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = run.params.replaced({"model.lora.blocks": [1]})
    found = {(name, 0): train_into(tmp_path / name, name, run.clip, run.prepared, upper) for name in ("lora", "dgs")}
    read: list[int] = []
    lower = Backbone.lower
    monkeypatch.setattr(Backbone, "lower", lambda own, images: read.append(len(images)) or lower(own, images))
    tables = []
    evaluated = int((run.prepared.manifest["split"] != "train").sum())
    of_blocks = len(run.prepared.split("test"))
    for allowed, images in ((0, 0), (1000, evaluated + of_blocks)):
        params = upper.replaced({"compute.prefix_mb": allowed})
        tables.append(evaluate(found, run.clip, run.prepared, params, CPU)[:2])
        assert sum(read) == images, f"prefix_mb {allowed}: each image once, and once for its blocks"
    for plain, kept in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(plain, kept, check_exact=False, rtol=1e-4, atol=1e-5)


def test_changed_images_are_scored_as_the_detector_scores_them(
    run: Run, evaluated: tuple[pd.DataFrame, pd.DataFrame, Any], tmp_path: Path
) -> None:
    """End to end: scores under conditions, their table, the report and the figure."""
    scores, forgetting, _ = run.evaluated("probe", "dgs", conditions=["jpeg:50", "noise:16", "png"], methods=["dgs"])
    native, plain = scores["condition"] == "native", evaluated[0]
    plain = plain[plain["method"].isin(["probe", "dgs"])]
    pd.testing.assert_frame_equal(scores[native].reset_index(drop=True), plain.reset_index(drop=True))
    changed = scores[~native]
    assert set(changed["method"]) == {"dgs"} and set(changed["split"]) == {"test"}
    rows = run.prepared.split("test")
    detector = Detector.load(run.found["dgs", 0])
    for name, own in changed.groupby("condition"):
        assert own["id"].tolist() == rows["id"].tolist()
        images = [
            Image.fromarray(perturb(open_image(run.prepared.source, file, row), parse_condition(str(name)), sha))
            for file, row, sha in zip(rows["file"], rows["row"], rows["sha256"], strict=True)
        ]
        expected = detector.score(images)
        assert np.allclose(1 / (1 + np.exp(-own["logit"].to_numpy())), expected, rtol=0, atol=1e-6)

    detection = detection_table(scores, {"alpha", "beta"})
    rates = detection.set_index(["method", "condition", "applied_to", "threshold_rule", "generator"])[
        RATES
    ].sort_index()
    assert set(rates.loc["probe"].index.get_level_values("condition")) == {"native"}
    pd.testing.assert_frame_equal(rates.loc["dgs", "png", "both"], rates.loc["dgs", "native", "both"])
    pd.testing.assert_frame_equal(rates.loc["dgs", "png", "fake"], rates.loc["dgs", "native", "both"])
    path = write_report(tmp_path / "REPORT.md", summary(detection, None, "mini", "x"), detection, forgetting, {})
    assert "| `noise:16` |" in path.read_text() and "| all PNG |" in path.read_text()
    assert len(robustness_curves(detection).axes) == 2


def test_changed_images_without_a_checkpoint_asked_for_are_an_error(run: Run) -> None:
    with pytest.raises(UserError, match=r"name a checkpoint among probe seed 0; found methods \['dgs'\]"):
        run.evaluated("probe", conditions=["jpeg:50"], methods=["dgs"])


@pytest.mark.parametrize(
    ("params", "others", "message"),
    [
        ({}, {"prepared": {"info": {"training_hash": "x"}}}, r"was trained on other data .*Train on this"),
        ({"data.fit": "resize"}, {}, "saw images with fit crop, prepared is resize"),
        ({}, {"clip": {"mean": (0.1, 0.2, 0.3)}}, "saw images with mean"),
        ({"model.precision": "bf16"}, {}, r"trained in fp32, model.precision is bf16.*Set it to fp32"),
    ],
    ids=["data", "fit", "mean", "precision"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_the_clip_as_it_was(
    run: Run, params: dict[str, str], others: dict[str, dict[str, Any]], message: str
) -> None:
    before = {name: value.clone() for name, value in run.clip.model.state_dict().items()}
    changed = {name: dataclasses.replace(getattr(run, name), **values) for name, values in others.items()}
    with pytest.raises(UserError, match=message):
        run._replace(params=run.params.replaced(params), **changed).evaluated("dgs")
    after = run.clip.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_settings_are_what_each_method_was_trained_with_not_what_the_file_says_now(run: Run, tmp_path: Path) -> None:
    by_hand = run.params.replaced({"train.stage2.lr": 0.05})
    found = {**run.found, ("lora", 0): train_into(tmp_path, "lora", run.clip, run.prepared, by_hand)}
    chosen = settings(found, run.params.replaced({"evaluate.tsne_images": 3}))
    rates = {method: own["train"]["stage2"]["lr"] for method, own in chosen.items()}
    assert rates == {**dict.fromkeys(NAMES, 0.01), "lora": 0.05}
    assert all(own["evaluate"]["tsne_images"] == 3 for own in chosen.values())


def test_what_is_unseen_by_accident_stands_in_metrics(
    run: Run, evaluated: tuple[pd.DataFrame, pd.DataFrame, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgs.analysis.evaluate.read_losses", lambda folders, rho: pd.DataFrame())
    workspace, manifest = Workspace(tmp_path, tmp_path, "own"), run.prepared.manifest.copy()
    assert "cautions" not in write_tables(workspace, run.found, *evaluated[:2], run.prepared, run.params).summary
    manifest.loc[manifest["split"] != "test", "generator"] += "-class"
    write_tables(workspace, run.found, *evaluated[:2], dataclasses.replace(run.prepared, manifest=manifest), run.params)
    (said,) = json.loads((workspace.results / "metrics.json").read_text())["cautions"]
    assert said.startswith("No tested generator was trained on: training has alpha-class, beta-class, tested are alpha")


class TestFromScores:
    """Tables of a real run on folders of images: three methods and two seeds, one with an expert that reads content."""

    @pytest.fixture(scope="class")
    def root(self, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("results")
        found = {("probe", 0): run.found["probe", 0]}
        for name, seed in (("probe", 1), ("lora", 0), ("lora", 1), ("content_probe", 0), ("content_probe", 1)):
            found[name, seed] = train_into(folder / name / str(seed), name, run.clip, run.prepared, run.params, seed)
        scores, forgetting, _ = evaluate(found, run.clip, run.prepared, run.params, CPU)
        read = [("content_probe", seed, "content", "train", 0.6 + 0.1 * seed) for seed in range(2)]
        experts = pd.DataFrame(read, columns=["method", "seed", "reads", "split", "accuracy"])
        workspace = Workspace(folder, folder, "own")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dgs.analysis.evaluate.read_losses", lambda folders, rho: pd.DataFrame())
            patch.setattr("dgs.analysis.evaluate.read_experts", lambda folders: experts)
            made = write_tables(workspace, found, scores, forgetting, run.prepared, run.params)
        told = (made.summary, made.detection, made.forgetting, settings(found, run.params), ["figures/x.png"])
        write_report(workspace.results / "REPORT.md", *told, differences=made.differences, verdicts=made.verdicts)
        return folder

    def test_they_are_equal_to_what_evaluate_wrote_and_come_back_from_damage(self, root: Path) -> None:
        results = root / "results/own"
        before = {path.name: path.read_bytes() for path in results.iterdir()}
        assert {"scores.parquet", "detection.csv", "differences.csv", "metrics.json", "REPORT.md"} <= set(before)
        assert (root / "build/own/evaluate/scores.parquet").read_bytes() == before["scores.parquet"]
        assert b"## What experts read" in before["REPORT.md"] and b"Pictures were shrunk to" in before["REPORT.md"]
        assert [path.name for path in renew(root, "own")] == [
            "REPORT.md",
            "detection.csv",
            "differences.csv",
            "metrics.json",
            "verdicts.csv",
        ]
        assert {path.name: path.read_bytes() for path in results.iterdir()} == before
        said = json.loads(before["metrics.json"])
        said["methods"]["lora"]["ap_seen"]["mean"] = 0.123
        (results / "metrics.json").write_text(json.dumps(said))
        report = before["REPORT.md"].decode()
        top, _, rest = report.partition("## Differences")
        (results / "REPORT.md").write_text(
            top.replace("0", "7") + "## Differences to lora\n\n" + rest[rest.index("## What exp") :]
        )
        renew(root, "own")
        assert {path.name: path.read_bytes() for path in results.iterdir()} == before

    def test_what_is_missing_is_named(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"Expected scores at .*found none"):
            renew(tmp_path, "own")
        (tmp_path / "results/own").mkdir(parents=True)
        shutil.copy(root / "results/own/scores.parquet", tmp_path / "results/own")
        with pytest.raises(UserError, match=r"Expected metrics.json, detection.csv, .*Run make repro PROFILE=own"):
            renew(tmp_path, "own")


class TestWhichCheckpoints:
    @pytest.fixture
    def workspace(self, tmp_path: Path) -> Workspace:
        return Workspace(tmp_path / "repo", tmp_path / "scratch", "own")

    def test_the_newer_of_scratch_and_pipeline_is_taken(self, workspace: Workspace) -> None:
        for newer, older in ((workspace.out, workspace.root), (workspace.root, workspace.out)):
            for base, made_at in ((newer, 2_000), (older, 1_000)):
                (base / "build/own/train/lora/seed-0").mkdir(parents=True, exist_ok=True)
                os.utime(base / "build/own/train/lora", (made_at, made_at))
            assert checkpoints(workspace, ["lora"], [0])["lora", 0].is_relative_to(newer)

    def test_a_method_that_was_not_trained_is_left_out_a_missing_seed_is_an_error(self, workspace: Workspace) -> None:
        for seed in (0, 1):
            (workspace.root / f"build/own/train/lora/seed-{seed}").mkdir(parents=True)
        assert list(checkpoints(workspace, ["probe", "lora"], [1])) == [("lora", 1)]
        with pytest.raises(UserError, match="lora with seed 7, found seeds 0, 1"):
            checkpoints(workspace, ["lora"], [7])

    def test_none_at_all_names_what_to_run_for_this_profile(self, workspace: Workspace) -> None:
        with pytest.raises(UserError, match=r"Expected checkpoints of lora, found none\. Run make repro PROFILE=own"):
            checkpoints(workspace, ["lora"], [0])
        with pytest.raises(UserError, match="make repro PROFILE=own"):
            workspace.find("prepare", made_by="prepare")


def test_paths_are_shown_as_a_reader_finds_them(tmp_path: Path) -> None:
    by_hand = Workspace(tmp_path, tmp_path / "scratch", "own")
    assert by_hand.shown(by_hand.build("prepare")) == "scratch/build/own/prepare"
    assert by_hand.shown(tmp_path / "build/own/prepare") == "build/own/prepare"
    stage = Workspace(tmp_path, tmp_path / "build/own/.prepare-x1", "own")
    assert stage.shown(stage.build("prepare")) == "build/own/prepare", "a draft's name differs from run to run"
    elsewhere = Workspace(tmp_path, Path("/elsewhere"), "own")
    assert elsewhere.shown(elsewhere.build("prepare")) == "/elsewhere/build/own/prepare"


def test_tsne_shows_two_seen_and_two_unseen_generators_and_as_many_reals() -> None:
    rows = pd.DataFrame(
        [{"generator": name, "label": 1, "seen": name in "ab"} for name in "abcdef" for _ in range(9)]
        + [{"generator": "real", "label": 0, "seen": False} for _ in range(50)]
    )
    chosen = tsne_rows(rows, 5)
    assert chosen.loc[chosen["label"] == 1, "generator"].value_counts().to_dict() == dict.fromkeys("abcd", 5)
    assert (chosen["label"] == 0).sum() == 20


@pytest.mark.slow
def test_the_committed_tables_of_mini_are_what_its_scores_say(tmp_path: Path) -> None:
    """Within rounding: another processor may add up in another order."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs/paper", tmp_path / "docs/paper")
    committed = ROOT / "results/mini"
    (tmp_path / "results/mini").mkdir(parents=True)
    for name in (FILE, "metrics.json", "detection.csv", "differences.csv", "forgetting.csv", "REPORT.md"):
        shutil.copyfile(committed / name, tmp_path / "results/mini" / name)
    made = renew(tmp_path, "mini")
    assert {path.name for path in made} == {
        "REPORT.md", "detection.csv", "differences.csv", "metrics.json", "verdicts.csv"
    }  # fmt: skip
    for name in ("detection.csv", "differences.csv", "verdicts.csv"):
        pd.testing.assert_frame_equal(
            read_table(tmp_path / "results/mini" / name), read_table(committed / name), rtol=1e-6, atol=2e-6
        )
    numbers = [re.findall(r"\d+\.\d+", (folder / "REPORT.md").read_text()) for folder in (committed, made[0].parent)]
    assert len(numbers[0]) == len(numbers[1]) > 1000
    assert np.allclose(*(np.array(found, float) for found in numbers), atol=0.11)
