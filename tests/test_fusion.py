"""Late fusion: the sum of its members' logits on one scale, members that are the methods themselves, and its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import reseal, write_checkpoint
from clips import settings as on_clip
from test_checkpoint import assert_helpful
from test_cli import run as command
from test_pixel_cnn import random_network
from test_train import run, settings, weights_of
from torch import Tensor

from dgs.data.prepared import Prepared
from dgs.errors import UserError
from dgs.model.checkpoint import load_checkpoint, save_checkpoint
from dgs.model.clip import Clip, load_clip
from dgs.model.detector import Detector
from dgs.model.fusion import LateFusion, spread
from dgs.model.methods.registry import METHODS, get_method
from dgs.model.snapshot import Snapshot
from dgs.model.train import Trained, train

MEMBERS = [member.name for member in METHODS["late_fusion"].members]
INFO = "dgs.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A checkpoint with random adapters and a random network; to be read, not changed."""
    root, params = tmp_path_factory.mktemp("fused"), on_clip(clip_folder)
    one, _ = load_checkpoint(write_checkpoint(root / "one", clip_folder), load_clip(params.model, Path(), 32))
    model = LateFusion([one, random_network()], [0.5, 2.0])
    save_checkpoint(root / "both", model, params, "late_fusion", 0, {"0.5": 0.0, "val": 0.3}, "d")
    model.close()
    return root / "both"


def views(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_logits_are_divided_by_their_spreads_and_summed(whole: Path, clip_folder: Path, tmp_path: Path) -> None:
    fused = Detector.load(whole).logits(views(4))
    one = Detector.load(write_checkpoint(tmp_path / "one", clip_folder)).logits(views(4))
    images = torch.from_numpy(views(4)).permute(0, 3, 1, 2)
    network = random_network()(images).detach().numpy()
    assert fused == pytest.approx(one / 0.5 + network / 2.0, abs=1e-6)
    assert np.std(one) > 1e-3 and np.std(network) > 1e-3


def test_a_spread_is_a_standard_deviation_and_never_zero() -> None:
    assert spread(np.array([1, 3], np.float32)) == 1.0
    for logits in (np.ones(7, np.float32), np.zeros(0, np.float32), np.array([0, np.nan], np.float32)):
        with pytest.raises(
            UserError, match=rf"Expected logits that differ .* all {len(logits)}\. Add validation images"
        ):
            spread(logits)


def test_its_members_are_the_methods_themselves_to_the_bit(clip: Clip, prepared: Prepared) -> None:
    params = settings(stage2={"lr": 0.01, "epochs": 2})
    both, trained = run("late_fusion", clip, prepared, params)
    losses = 1  # its own validation
    for number, name in enumerate(MEMBERS):
        own, alone = run(name, clip, prepared, params)
        losses += len(alone.log.losses)
        assert own and all(torch.equal(both[f"{number}.{key}"], value) for key, value in own.items())
        assert trained.classifier.spreads[number] == spread(alone.logits)  # type: ignore[union-attr]
    assert len(trained.log.losses) == losses and trained.log.losses["step"].is_monotonic_increasing


def test_without_validation_images_it_refuses_before_it_trains(clip: Clip, prepared: Prepared) -> None:
    without = replace(prepared, manifest=prepared.manifest[prepared.manifest["split"] != "val"])
    with pytest.raises(UserError, match=r"bring the parts of late_fusion to one scale, found none\. Set data\.val_"):
        train(get_method("late_fusion"), clip, without, settings(), 0, torch.device("cpu"), pytest.fail)


def test_settings_are_those_of_its_members() -> None:
    assert METHODS["late_fusion"].settings_of == tuple(of for name in MEMBERS for of in METHODS[name].settings_of)
    assert METHODS["late_fusion"].steps(20, settings()) == sum(METHODS[name].steps(20, settings()) for name in MEMBERS)


def test_broken_off_in_either_member_it_ends_with_the_same_bits(clip: Clip, prepared: Prepared, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def trained(stop: int | None, kept: Snapshot) -> dict[str, Tensor]:
        found, made = [], 0

        def on_step() -> None:
            nonlocal made
            made += 1
            if made == stop:
                raise Killed

        def keep(done: Trained) -> None:
            found.append(weights_of(done))

        try:
            train(get_method("late_fusion"), clip, prepared, params, 0, torch.device("cpu"), keep, on_step, kept)
        except Killed:
            return {}
        return found[0]

    both = {"epochs": 2, "lr": 0.01}
    params = settings(stage1=both, stage2=both).replaced({"model.lora.dropout": 0.5})
    expected = trained(None, Snapshot())
    for stop in (4, 10):  # six steps each
        assert not trained(stop, Snapshot(tmp_path / str(stop), 0.0))
        torch.rand(stop)
        again = trained(None, Snapshot(tmp_path / str(stop), 0.0))
        assert all(torch.equal(value, again[name]) for name, value in expected.items())


class TestFiles:
    @pytest.fixture
    def checkpoint(self, whole: Path, tmp_path: Path) -> Path:
        return shutil.copytree(whole, tmp_path / "seed-0")

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            (INFO, lambda info: info.pop("spreads")),
            (INFO, lambda info: info.update(spreads=[1.0])),
            (INFO, lambda info: info.update(spreads=[1.0, 0.0])),
            (INFO, lambda info: info.update(spreads=[1.0, "2"])),
            (INFO, lambda info: info.pop("clip")),
            (INFO, lambda info: info.pop("adapter")),
            ("model.safetensors", Path.unlink),
            ("heads.safetensors", Path.unlink),
            ("adapter_model.safetensors", lambda file: file.write_bytes(b"")),
        ],
    )
    def test_a_damaged_one_is_one_sentence(self, name: str, damage: Callable[[Any], Any], checkpoint: Path) -> None:
        file = checkpoint / name
        if name == INFO:
            info = json.loads(file.read_text())
            damage(info)
            file.write_text(json.dumps(info))
        else:
            damage(file)
        reseal(checkpoint)
        with pytest.raises(UserError) as caught:
            Detector.load(checkpoint)
        assert_helpful(str(caught.value), file)

    def test_its_card_says_what_it_is(self, whole: Path) -> None:
        text = (whole / "README.md").read_text()
        assert "two detectors" in text and "LoRA adapters" in text and "Detector.load(folder)" in text

    def test_exported_it_gives_the_same_logits(self, whole: Path, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        made = json.loads(command("export", whole, "--out", tmp_path / "a.onnx", "--json").stdout)
        assert made["largest"] <= 1e-3
        found = Detector.load(tmp_path / "a.onnx", engine="onnx")
        assert found.info["kind"] == "late_fusion"
        assert found.logits(views(5)) == pytest.approx(Detector.load(whole).logits(views(5)), abs=1e-3)
