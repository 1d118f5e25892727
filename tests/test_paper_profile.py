"""The paper's profile: its numbers, what it says where weights or data are missing, and the whole of it, reduced."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from blips import write_random_blip
from clips import write_random_clip
from conftest import structured_image
from copies import ROOT, copy_repository, run

from dgs.data.captions import read_captions
from dgs.data.prepared import load_prepared
from dgs.errors import UserError
from dgs.model.clip import IMAGENET, load_clip
from dgs.params import load_params

SIDE = 240  # px: 49 whole patches of 32 px, and a margin that is cut off
REDUCED = {  # ViT-L/14's kind of tower, with as many tokens as ViT-B/32, and narrow
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 48, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_the_profile_is_the_papers_setting() -> None:
    """arXiv 2511.13108 and the release: every number that differs from the embedded benchmark's."""
    params = load_params("paper", ROOT)
    assert (params.model.clip, params.model.pretrained) == ("ViT-L-14-quickgelu", "openai")
    assert params.model.normalize == "imagenet" and params.model.precision == "fp32"
    assert (params.patches.enabled, params.patches.size, params.patches.count) == (True, 32, 49)
    assert params.image_size == 224
    lora = params.model.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.blocks) == (6, 6.0, 0.8, True, None)
    train = params.train
    assert (train.batch_size, train.accumulate, train.processes) == (32, 1, 1)
    assert (train.stage1.epochs, train.stage1.lr) == (3, 1e-4)
    assert (train.stage2.epochs, train.stage2.lr) == (1, 1e-4)
    surgery = train.surgery
    assert (surgery.lam, surgery.eps, surgery.order, surgery.scale) == (0.2, 1e-6, "release", "release")
    assert params.data.layout == "folders" and params.data.rho is None and params.data.limit is None
    assert set(params.methods) >= {"probe", "lora", "dgs"}


def test_without_the_data_it_says_where_they_go_and_how_to_look_at_them(tmp_path: Path) -> None:
    repo = copy_repository(tmp_path / "repo", git=False)
    tried = run(repo, "dgs", "profile", "paper")
    assert tried.returncode == 2 and "Traceback" not in tried.stderr
    assert "Expected a folder of images at data.root = aigibench, found none." in tried.stderr
    assert "ln -s /path/to/them aigibench" in tried.stderr and "dgs manifest aigibench --check" in tried.stderr


@pytest.mark.slow
def test_without_the_weights_it_says_which_command_gets_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("open_clip.create_model", no_network)
    with pytest.raises(UserError) as caught:
        load_clip(load_params("paper", ROOT).model, ROOT, 224)
    command = "python -c \"import open_clip; open_clip.create_model('ViT-L-14-quickgelu', pretrained='openai')\""
    assert f"With network: {command}; without: set model.pretrained to a weights file." in str(caught.value)


def no_network(*_: object, **__: object) -> None:
    """What open_clip ends with on a machine without a network."""
    raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.")


@pytest.mark.slow
def test_the_whole_profile_runs_reduced(tmp_path: Path) -> None:
    """As docs say: folders, captions by `dgs caption`, the profile, `dvc repro`; but for sizes, seeds and device."""
    repo = copy_repository(tmp_path / "repo", tiny=False)
    images, number = tmp_path / "images", 0
    for split, generators in {"train": ("progan", "sd14"), "test": ("progan", "sd14", "midjourney")}.items():
        for generator in generators:
            for label in ("0_real", "1_fake"):
                folder = images / split / generator / label
                folder.mkdir(parents=True)
                for index in range(20 if split == "train" else 6):
                    number += 1
                    suffix = ".jpg" if number % 2 else ".png"
                    structured_image(number, SIDE, SIDE + 20).save(folder / f"{index:03d}{suffix}")
    blip = write_random_blip(tmp_path / "blip")
    captioned = run(repo, "dgs", "caption", str(images), "--model", str(blip), "--device", "cpu")
    assert captioned.returncode == 0, captioned.stderr
    assert len(read_captions(images / "captions.jsonl")) == number

    overlay = yaml.safe_load((repo / "profiles" / "paper.yaml").read_text())
    overlay["data"] |= {"root": str(images), "captions": str(images / "captions.jsonl"), "val_fraction": 0.2}
    clip = write_random_clip(tmp_path / "clip", config=REDUCED)
    overlay["model"] |= {"clip": str(clip), "pretrained": None}
    overlay |= {"seeds": [0], "methods": ["probe", "dgs"], "evaluate": {"retrieval_pool": 4, "tsne_images": 4}}
    overlay["compute"] |= {"workers": 1, "device": "cpu"}
    overlay["train"]["log_every"] = 1
    (repo / "profiles" / "reduced.yaml").write_text(yaml.safe_dump(overlay))
    assert run(repo, "dgs", "profile", "reduced").returncode == 0
    done = run(repo, "dvc", "repro", "profiles/reduced/dvc.yaml")
    assert done.returncode == 0, done.stderr

    build, results = repo / "build" / "reduced", repo / "results" / "reduced"
    prepared = load_prepared(build / "prepare", repo)
    assert prepared.patches is not None and [len(kept) for kept in prepared.patches.values()] == [49] * number
    info = json.loads((build / "train" / "dgs" / "seed-0" / "dgs.json").read_text())
    assert info["preprocessing"]["mean"] == list(IMAGENET[0]) and info["preprocessing"]["image_size"] == 224
    config = json.loads((build / "train" / "dgs" / "seed-0" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (6, 6.0, 0.8, True)
    training = pd.read_csv(results / "training.csv")
    stage2 = training[(training["method"] == "dgs") & training["loss"].notna()]
    images_seen = len(prepared.split("train"))
    assert list(stage2["step"]) == list(range(images_seen // 32)), "one epoch in batches of 32, the whole ones recorded"
    assert stage2["loss"].between(0, 10).all()
    metrics = json.loads((results / "metrics.json").read_text())
    assert set(metrics["methods"]) == {"probe", "dgs"}
    assert {"balanced_acc_seen", "balanced_acc_unseen", "ap_unseen"} <= set(metrics["methods"]["dgs"])
    detection = pd.read_csv(results / "detection.csv")
    assert set(detection.loc[~detection["seen"].astype(bool), "generator"]) >= {"midjourney"}
    assert (results / "REPORT.md").exists()
