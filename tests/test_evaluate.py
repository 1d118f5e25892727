"""Scores of checkpoints on images: each with what it was trained on and with, or not at all."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from clips import write_random_clip
from conftest import ImageTree
from PIL import Image
from settings import validate

from dgs.analysis.evaluate import block_means, checkpoints, evaluate, settings, tsne_rows
from dgs.analysis.figures.detection import robustness_curves
from dgs.analysis.metrics import RATES, SCORES, detection_table, summary
from dgs.analysis.report import write_report
from dgs.conditions import parse_condition
from dgs.data.manifest import build_manifest, data_hash, open_image
from dgs.data.perturbations import perturb
from dgs.data.prepared import Prepared, load_prepared, save_prepared
from dgs.data.views import Views
from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.checkpoint import save_checkpoint
from dgs.model.clip import Clip, encode_texts, load_clip
from dgs.model.detector import Detector
from dgs.model.methods.registry import get_method
from dgs.model.train import Trained, train
from dgs.params import Params
from dgs.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture
def params(image_tree: ImageTree, tmp_path: Path) -> Params:
    return validate(
        {
            "seeds": [0],
            "data": {"layout": "folders", "root": str(image_tree()), "rho": None},
            "model": {
                "clip": str(write_random_clip(tmp_path / "clip")),
                "image_size": 32,
                "lora": {"rank": 2, "dropout": 0.0},
            },
            "train": {"batch_size": 6, "stage1": {"lr": 0.01}, "stage2": {"lr": 0.01}},
            "evaluate": {"retrieval_pool": 4},
        }
    )


@pytest.fixture
def clip(params: Params) -> Clip:
    return load_clip(params.model, Path(), params.image_size)


@pytest.fixture
def prepared(params: Params, clip: Clip, tmp_path: Path) -> Prepared:
    folder = tmp_path / "scratch/build/mini/prepare"
    folder.mkdir(parents=True)
    manifest = build_manifest(Path(params.data.root), params.data)
    texts = sorted(manifest["caption"].unique())
    info = {"data_hash": data_hash(manifest), "rho": None, "seen": ["alpha", "beta"]}
    captions = dict(zip(texts, encode_texts(clip, texts), strict=True))
    save_prepared(folder, manifest, info, captions, {}, None, params)
    return load_prepared(folder, Path())


def trained(method: str, clip: Clip, prepared: Prepared, params: Params, folder: Path) -> Path:
    def keep(run: Trained) -> None:
        data = prepared.info["training_hash"]
        save_checkpoint(folder, run.backbone, run.heads, clip, params, method, 0, run.thresholds, data)

    train(get_method(method), clip, prepared, params, 0, CPU, keep)
    return folder


def test_scores_are_those_of_the_detector_on_the_same_files(
    params: Params, clip: Clip, prepared: Prepared, tmp_path: Path
) -> None:
    names = ("probe", "dgs", "levels_probe", "levels_poe")
    found = {(name, 0): trained(name, clip, prepared, params, tmp_path / name) for name in names}
    scores, forgetting, panels = evaluate(found, clip, prepared, params, CPU)
    rows = prepared.manifest[prepared.manifest["split"] != "train"]
    assert len(scores) == len(names) * len(rows)
    assert (
        ",".join(scores)
        == ",".join(SCORES)
        == ("id,sha256,split,generator,label,rho,condition,applied_to,logit,method,seed,profile")
    )
    assert {name: str(scores[name].dtype) for name, kind in SCORES.items() if kind != "str"} == {
        "label": "int64", "rho": "float64", "logit": "float32", "seed": "int64",
    }  # fmt: skip
    assert set(scores["profile"]) == {params.profile} and set(scores["split"]) == {"val", "test"}
    assert scores["sha256"].tolist() == len(names) * rows["sha256"].tolist()
    for name in names:
        own = scores[scores["method"] == name]
        assert own["id"].tolist() == rows["id"].tolist()
        expected = Detector.load(found[name, 0]).score([Path(params.data.root) / file for file in rows["file"]])
        assert np.allclose(1 / (1 + np.exp(-own["logit"].to_numpy())), expected, rtol=0, atol=1e-6)
    drift = forgetting[forgetting["measure"] == "cosine_drift"].set_index("method")["after"]
    for frozen, tuned in (("probe", "dgs"), ("levels_probe", "levels_poe")):
        assert 0.0 <= drift[frozen] < 1e-12 < drift[tuned], "a frozen tower forgets nothing, a trained one moved"
    assert set(panels) == {"frozen", "dgs", "levels_poe"}
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


def test_a_tower_that_is_read_at_earlier_levels_has_the_same_blocks(
    params: Params, clip: Clip, prepared: Prepared
) -> None:
    views = Views(prepared.split("val"), prepared.source, params)
    plain, read = Backbone(clip).eval(), Backbone(clip, levels=(0, 2)).eval()
    blocks = block_means(plain, views, params, "blocks")
    again = block_means(read, views, params, "blocks")
    assert [part.shape for part in blocks] == [(len(views), clip.model.visual.positional_embedding.shape[1])] * len(
        blocks
    )
    assert all(np.array_equal(a, b) for a, b in zip(blocks, again, strict=True)) and read.levels == (0, 2)
    heard: list[torch.Tensor] = []
    last = clip.model.visual.transformer.resblocks[-1]
    hook = last.register_forward_hook(lambda block, given, out: heard.append(out))
    with torch.no_grad():
        plain(torch.stack([views[i][0] for i in range(len(views))]))
    hook.remove()
    assert np.allclose(blocks[-1], heard[0][:, 1:].mean(1).numpy(), atol=1e-6)


def test_changed_images_are_scored_as_the_detector_scores_them(
    params: Params, clip: Clip, prepared: Prepared, tmp_path: Path
) -> None:
    """End to end: scores under conditions, their table, the report and the figure."""
    found = {(name, 0): trained(name, clip, prepared, params, tmp_path / name) for name in ("probe", "dgs")}
    robustness = {"conditions": ["jpeg:50", "noise:16", "png"], "methods": ["dgs"]}
    asked = validate({**params.model_dump(), "evaluate": {"retrieval_pool": 4, "robustness": robustness}})
    scores, forgetting, _ = evaluate(found, clip, prepared, asked, CPU)

    native = scores["condition"] == "native"
    plain, _, _ = evaluate(found, clip, prepared, params, CPU)
    pd.testing.assert_frame_equal(scores[native].reset_index(drop=True), plain)
    changed = scores[~native]
    assert set(changed["method"]) == {"dgs"} and set(changed["split"]) == {"test"}
    rows = prepared.split("test")
    detector = Detector.load(found["dgs", 0])
    for name, own in changed.groupby("condition"):
        assert own["id"].tolist() == rows["id"].tolist()
        images = [
            Image.fromarray(perturb(open_image(prepared.source, file, row), parse_condition(str(name)), sha))
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


def test_changed_images_without_a_checkpoint_asked_for_are_an_error(
    params: Params, clip: Clip, prepared: Prepared, tmp_path: Path
) -> None:
    found = {("probe", 0): trained("probe", clip, prepared, params, tmp_path / "probe")}
    robustness = {"conditions": ["jpeg:50"], "methods": ["dgs"]}
    asked = validate({**params.model_dump(), "evaluate": {"retrieval_pool": 4, "robustness": robustness}})
    with pytest.raises(UserError, match=r"name a checkpoint among probe seed 0; found methods \['dgs'\]"):
        evaluate(found, clip, prepared, asked, CPU)


def test_a_checkpoint_of_other_data_is_refused(params: Params, clip: Clip, prepared: Prepared, tmp_path: Path) -> None:
    found = {("probe", 0): trained("probe", clip, prepared, params, tmp_path / "probe")}
    prepared.info["training_hash"] = "another"
    with pytest.raises(UserError, match=r"was trained on other data .*Train on this"):
        evaluate(found, clip, prepared, params, CPU)


def test_a_checkpoint_that_saw_images_otherwise_is_refused_and_leaves_the_clip_as_it_was(
    params: Params, clip: Clip, prepared: Prepared, tmp_path: Path
) -> None:
    found = {("dgs", 0): trained("dgs", clip, prepared, params, tmp_path / "dgs")}
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    resized = params.model_copy(update={"data": params.data.model_copy(update={"fit": "resize"})})
    with pytest.raises(UserError, match="saw images with fit crop, prepared is resize"):
        evaluate(found, clip, prepared, resized, CPU)
    normalised = dataclasses.replace(clip, mean=(0.1, 0.2, 0.3))
    with pytest.raises(UserError, match="saw images with mean"):
        evaluate(found, normalised, prepared, params, CPU)
    after = clip.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_of_another_precision_is_refused(
    params: Params, clip: Clip, prepared: Prepared, tmp_path: Path
) -> None:
    found = {("probe", 0): trained("probe", clip, prepared, params, tmp_path / "probe")}
    half = params.model_copy(update={"model": params.model.model_copy(update={"precision": "bf16"})})
    with pytest.raises(UserError, match=r"trained in fp32, model.precision is bf16.*Set it to fp32"):
        evaluate(found, clip, prepared, half, CPU)


def test_settings_are_what_each_method_was_trained_with_not_what_the_file_says_now(
    params: Params, clip: Clip, prepared: Prepared, tmp_path: Path
) -> None:
    stage2 = params.train.stage2.model_copy(update={"lr": 0.05})
    by_hand = params.model_copy(update={"train": params.train.model_copy(update={"stage2": stage2})})
    found = {
        ("probe", 0): trained("probe", clip, prepared, params, tmp_path / "probe"),
        ("dgs", 0): trained("dgs", clip, prepared, by_hand, tmp_path / "dgs"),
    }
    now = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"tsne_images": 3})})
    chosen = settings(found, now)
    assert {method: own["train"]["stage2"]["lr"] for method, own in chosen.items()} == {"probe": 0.01, "dgs": 0.05}
    assert all(own["evaluate"]["tsne_images"] == 3 for own in chosen.values())


class TestWhichCheckpoints:
    @pytest.fixture
    def workspace(self, tmp_path: Path) -> Workspace:
        return Workspace(tmp_path / "repo", tmp_path / "scratch", "own")

    @staticmethod
    def make(base: Path, method: str, *seeds: int) -> None:
        for seed in seeds:
            (base / "build/own/train" / method / f"seed-{seed}").mkdir(parents=True)

    def test_the_newer_of_scratch_and_pipeline_is_taken(self, workspace: Workspace) -> None:
        for newer, older in ((workspace.out, workspace.root), (workspace.root, workspace.out)):
            for base, made_at in ((newer, 2_000), (older, 1_000)):
                (base / "build/own/train/lora/seed-0").mkdir(parents=True, exist_ok=True)
                os.utime(base / "build/own/train/lora", (made_at, made_at))
            assert checkpoints(workspace, ["lora"], [0])["lora", 0].is_relative_to(newer)

    def test_a_method_that_was_not_trained_is_left_out_a_missing_seed_is_an_error(self, workspace: Workspace) -> None:
        self.make(workspace.root, "lora", 0, 1)
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
