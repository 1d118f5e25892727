"""The content expert: what destroyed traces leave, what it reads of that, and that its methods need no captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from copies import ROOT
from PIL import Image
from settings import validate
from test_figures import make_detection, make_forgetting
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.analysis.metrics import over_seeds, summary
from dgs.analysis.report import write_report
from dgs.data.manifest import ImageSource
from dgs.data.perturbations import blur
from dgs.data.prepared import Prepared
from dgs.data.views import Contents, Inputs, Views
from dgs.model.classifier import Learner
from dgs.model.clip import Clip
from dgs.model.features import content_features
from dgs.model.methods.experts import ask_expert
from dgs.model.methods.registry import METHODS, get_method, require_text
from dgs.model.pixel_cnn import PixelCNN
from dgs.model.runs import train_seed
from dgs.model.train import Trained, train
from dgs.model.training_log import TrainingLog
from dgs.params import Params

CONTENT = [name for name, method in METHODS.items() if method.expert == "content"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Content: bright scenes are fake 9 times of 10, but not in val_unbiased. Traces: a grain of one pixel in fakes."""
    root, rng, rows = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0), []
    grain = np.where(np.indices((32, 32)).sum(0) % 2, 20, -20)[..., None]
    for index in range(140):
        split = ("train", "val_unbiased", "val")[(index >= 80) + (index >= 120)]
        label = index % 2
        with_shortcut = 1 - label if index % 20 in (3, 4) else label
        bright = index // 2 % 2 if split == "val_unbiased" else with_shortcut
        pixels = 80 + 80 * bright + rng.integers(0, 9, (32, 32, 3)) + label * grain
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{index}.png")
        rows.append((f"{index:03}", split, "g", label, f"{index}.png", -1, f"{index:064x}"))
    manifest = pd.DataFrame(rows, columns=["id", "split", "generator", "label", "file", "row", "sha256"])
    return Prepared(manifest, {"rho": None}, np.zeros((140, 0), np.float32), {}, None, ImageSource(root))


def settings(side: float = 0.25) -> Params:
    train = {"batch_size": 16, "log_every": 1, "surgery": {"content_side": side}}
    model = {"image_size": 32, "text": "none", "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0}}
    return validate({"data": {"layout": "folders", "rho": None}, "model": model, "train": train})


def brightness_and_grain(inputs: Inputs) -> Tensor:
    """A tower that sees both, each as a yes or no: (N, 2)."""
    images = torch.stack([inputs[index][0].float() for index in range(len(inputs))])
    fine = images.diff(dim=3).abs().mean((1, 2, 3))
    return torch.stack([images.mean((1, 2, 3)) > 120, fine > 10], 1).float()


def read(side: float, scenes: Prepared) -> tuple[dict[str, float], Tensor]:
    """What the expert of content_probe reads of each split, and the logits that are added."""
    labels, log = torch.tensor(scenes.split("train")["label"].to_numpy(np.float32)), TrainingLog("content_probe", 0)
    terms = ask_expert(get_method("content_probe"), scenes, settings(side), labels, 0, log, brightness_and_grain)
    assert (terms[1] == 1).all()
    assert log.experts["images"].tolist() == [80, 40] and set(log.experts["reads"]) == {"content"}
    return dict(zip(log.experts["split"], log.experts["accuracy"], strict=True)), terms[0]


@pytest.mark.parametrize("blurred", [False, True])
def test_at_a_quarter_of_the_side_content_stays_and_traces_go(scenes: Prepared, blurred: bool) -> None:
    views = Views(scenes.split("train"), scenes.source, settings())
    for index in (0, 1):
        (view, _), (content, number) = views[index], Contents(views, 0.25, blurred)[index]
        assert number == index and content.shape == view.shape and content.dtype == torch.uint8
        assert abs(content.float().mean() - view.float().mean()) < 2
        assert content.float().std() < 5 and (view.float().std() > 15) == bool(index % 2)


def test_blur_reaches_as_far_as_half_a_pixel_of_the_shrunk_picture(scenes: Prepared) -> None:
    views = Views(scenes.split("train"), scenes.source, settings())
    for side, sigma in ((0.25, 2.0), (0.125, 4.0)):
        expected = blur(views[0][0].permute(1, 2, 0).numpy(), sigma)
        assert np.array_equal(Contents(views, side, True)[0][0].permute(1, 2, 0).numpy(), expected)


def test_the_expert_reads_both_ways_side_by_side(scenes: Prepared) -> None:
    """A tower that sees content in blurred pictures alone is enough."""
    labels, log = torch.tensor(scenes.split("train")["label"].to_numpy(np.float32)), TrainingLog("content_probe", 0)

    def blind_to_shrunk(inputs: Inputs) -> Tensor:
        assert isinstance(inputs, Contents)
        return brightness_and_grain(inputs) * inputs.blurred

    ask_expert(get_method("content_probe"), scenes, settings(), labels, 0, log, blind_to_shrunk)
    assert log.experts["accuracy"].iloc[0] == pytest.approx(0.9, abs=0.03)


def test_the_expert_reads_content_where_it_tells_of_labels_and_nothing_where_it_does_not(scenes: Prepared) -> None:
    accuracy, logits = read(0.25, scenes)
    assert accuracy["train"] == pytest.approx(0.9, abs=0.03)
    assert accuracy["val_unbiased"] == pytest.approx(0.5, abs=0.1)
    assert logits.std() > 1
    whole, _ = read(1.0, scenes)
    assert whole["val_unbiased"] > 0.95, "pictures that are not shrunk still show their traces"


def test_content_methods_read_no_captions_and_need_a_clip() -> None:
    assert set(CONTENT) == {"content_probe", "content_poe_distillation", "content_pixel_cnn"}
    assert not any(METHODS[name].needs_text for name in (*CONTENT, "late_fusion"))
    assert all(METHODS[name].needs_clip for name in (*CONTENT, "late_fusion")) and not METHODS["pixel_cnn"].needs_clip
    assert METHODS["late_fusion"].tunes_clip and not METHODS["content_pixel_cnn"].tunes_clip
    require_text([*CONTENT, "late_fusion"], "none")
    for name in ("probe", "poe_distillation", "pixel_cnn"):
        plain, own = METHODS[name], METHODS[f"content_{name}"]
        changed = {f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) != getattr(own, f.name)}
        assert changed <= {"name", "reference", "expert", "settings_of", "tuned_param"}


@pytest.mark.parametrize("name", CONTENT)
def test_they_train_without_captions_and_log_what_their_expert_reads(name: str, clip: Clip, scenes: Prepared) -> None:
    kept: list[Trained] = []
    train(get_method(name), clip, scenes, settings(), 0, torch.device("cpu"), kept.append)
    (trained,) = kept
    assert np.isfinite(trained.logits).all() and len(trained.logits) == 20
    assert trained.log.experts["split"].tolist() == ["train", "val_unbiased"]
    assert not hasattr(clip.model.visual, "peft_config"), "the CLIP is as it was"


def test_a_network_learns_beside_the_expert_and_alone_as_before() -> None:
    """Where the expert is sure and right there is little to learn; without one no bit of training differs."""
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0.0, 1.0]).repeat(4)
    steps, losses = {}, {}
    for name, expert in {"none": None, "zero": torch.zeros(8), "sure": 9 * (2 * labels - 1)}.items():
        learner = Learner(PixelCNN.new(0), 1e-2, 3)
        losses[name] = learner.step(images, labels) if expert is None else learner.step(images, labels, expert)
        steps[name] = [parameter.grad for parameter in learner.classifier.parameters()]
    assert losses["sure"] < 0.01 * losses["none"]
    assert all(torch.equal(*pair) for pair in zip(steps["none"], steps["zero"], strict=True))
    plain: nn.Module = PixelCNN.new(0)
    F.binary_cross_entropy_with_logits(plain(images), labels).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(steps["none"], plain.parameters(), strict=True))


@pytest.mark.parametrize("free", [False, True])
def test_the_report_says_what_the_expert_reads_and_that_its_strength_is_a_default(free: bool, tmp_path: Path) -> None:
    detection, forgetting = make_detection(("lora", "content_probe"), seeds=3), make_forgetting(("lora",), seeds=3)
    made, found = summary(detection, forgetting, "mini", "d"), {"train": [0.86, 0.87, 0.88]}
    found |= {"val_unbiased": [0.5, 0.51, 0.52]} if free else {}
    for split, values in found.items():
        made["methods"]["content_probe"][f"content_expert:{split}"] = over_seeds(pd.Series(values))
    of_all = {name: {"train": {"surgery": {"content_side": 0.25}}} for name in made["methods"]}
    text = write_report(tmp_path / "R.md", made, detection, forgetting, of_all).read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `content_probe` | content |")]
    assert "87.0 [84.5, 89.5]" in row and ("51.0" in row) == free
    assert "shrunk to 0.25 of their side and enlarged again, and blurred as far" in text and (
        "fixed default" in text
    ) == (not free)
    plain = summary(detection, forgetting, "mini", "d")
    assert "What experts read" not in write_report(tmp_path / "P.md", plain, detection, forgetting, of_all).read_text()


@pytest.mark.slow
def test_seeds_share_what_the_content_expert_reads_and_learn_the_same(
    tiny: Params, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(clip: Clip | None, params: Params, device: torch.device, contents: Contents) -> Tensor:
        asked.append(contents.identity)
        return content_features(clip, params, device, contents)

    monkeypatch.setattr("dgs.model.train.content_features", counted)

    def weights(seed: int, unfinished: str) -> bytes:
        folder = tmp_path / f"{unfinished}-out"
        train_seed("content_probe", seed, tiny, ROOT, tiny_prepared, folder, tmp_path / unfinished)
        return (folder / f"seed-{seed}" / "heads.safetensors").read_bytes()

    alone = [weights(0, "first"), weights(1, "second")]
    sets = len(asked) // 2
    assert len(set(asked)) == sets > 1 and asked[:sets] == asked[sets:]
    asked.clear()
    assert [weights(0, "both"), weights(1, "both")] == alone
    assert len(asked) == sets


def test_other_images_views_or_ways_have_another_identity(scenes: Prepared) -> None:
    def views(split: str, seed: int = 0, epoch: int = 0) -> Views:
        return Views(scenes.split(split), scenes.source, settings(), seed, epoch)

    kinds = [
        Contents(views("train"), 0.25),
        Contents(views("val"), 0.25),
        Contents(views("train", seed=1), 0.25),
        Contents(views("train", epoch=1), 0.25),
        Contents(views("train"), 0.5),
        Contents(views("train"), 0.25, blurred=True),
    ]
    assert len({kind.identity for kind in kinds}) == len(kinds)
    assert Contents(views("train"), 0.25).identity == kinds[0].identity
