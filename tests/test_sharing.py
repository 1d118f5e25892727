"""A checkpoint that is passed on: it needs no `dgs`, runs no code, shows each changed byte, and says what it is for."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clips import CALIBRATION, WIDTH, reseal, settings
from conftest import structured_image
from safetensors.torch import load_file, save_file
from test_checkpoint import as_format_2, assert_helpful
from torch import nn

from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.checkpoint import card, read_info, save_checkpoint
from dgs.model.checkpoint_files import SUMS
from dgs.model.clip import ConvStem, load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.clip_source import CONFIG, NO_TEXT, WEIGHTS
from dgs.model.detector import Detector
from dgs.model.scoring import score_files
from dgs.params import Params

ROOT = Path(__file__).parent.parent
PARTS = ("adapter_config.json", "adapter_model.safetensors", "dgs.json", "heads.safetensors")


@pytest.fixture(scope="module")
def whole_with_clip(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A probe's checkpoint with its CLIP in it."""
    folder = tmp_path_factory.mktemp("carrying")
    params, carried = settings(Path("clip")), shutil.copytree(clip_folder, folder / "moved")
    clip = load_clip(params.model, clip_folder.parent, params.image_size)
    probe = ClipClassifier(clip, Backbone(clip), {"image": nn.Linear(WIDTH, 1)})
    save_checkpoint(folder / "seed-0", probe, params, "probe", 0, {"0.5": 0.0}, "d", carried=carried)
    return folder / "seed-0"


@pytest.fixture
def with_clip(whole_with_clip: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole_with_clip, tmp_path / "carrying")


def code_of(folder: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return found


def run_card(folder: Path, view: Path, but: str = "") -> str:
    """What the card's code prints where `dgs` cannot be imported; but: a line of it that may, and is run first."""
    code = code_of(folder)
    assert but in code
    shutil.copy(view, folder / "000001.png")
    blocked = f"import sys\n{but}\nsys.modules['dgs'] = None\n"
    command = [sys.executable, "-c", blocked + code.replace(but, "")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


class TestWithoutDgs:
    def require_same_score(self, folder: Path, side: int, tmp_path: Path, but: str = "") -> None:
        structured_image(3, side + 18, side + 8).save(tmp_path / "a.png")
        (row,) = score_files([tmp_path / "a.png"], folder, lambda _: None, explain=tmp_path / "seen")
        printed = run_card(folder, tmp_path / "seen/000001.png", but).split()
        assert printed == [f"{row['probability']:.4f}", row["verdict"]]

    def test_open_clip_and_peft_alone_give_the_same_score_to_what_the_model_saw(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        self.require_same_score(checkpoint, 32, tmp_path)
        assert re.search(r"import (dgs|pickle)|from dgs", code_of(checkpoint)) is None

    @pytest.mark.slow
    def test_the_embedded_clip_needs_one_line_more_and_earlier_tokens_none(self, tmp_path: Path) -> None:
        params = settings(ROOT / "sample/clip", data={"layout": "minibench"})
        params = params.model_copy(update={"model": params.model.model_copy(update={"image_size": 64})})
        folder = mini_checkpoint(tmp_path / "seed-0", params)
        (line,) = [line for line in code_of(folder).splitlines() if "from dgs" in line]
        self.require_same_score(folder, 64, tmp_path, but=line)

    def test_a_tower_without_a_text_side_needs_nothing_else(self, clip_folder: Path, tmp_path: Path) -> None:
        alone = shutil.copytree(clip_folder, tmp_path / "clip")
        config = json.loads((alone / CONFIG).read_text())
        (alone / CONFIG).write_text(json.dumps({**config, "dgs": NO_TEXT}))
        state = load_file(alone / WEIGHTS)
        save_file({name: value for name, value in state.items() if name.startswith("visual.")}, alone / WEIGHTS)
        params = settings(alone)
        clip = load_clip(params.model, Path(), 32, text=False)
        probe = ClipClassifier(clip, Backbone(clip), {"image": nn.Linear(WIDTH, 1)})
        save_checkpoint(tmp_path / "seed-0", probe, params, "probe", 0, {"0.5": 0.0}, "d")
        self.require_same_score(tmp_path / "seed-0", 32, tmp_path)

    @pytest.mark.slow
    def test_a_checkpoint_that_carries_its_clip_needs_nothing_else(self, with_clip: Path, tmp_path: Path) -> None:
        self.require_same_score(with_clip, 32, tmp_path)


def mini_checkpoint(folder: Path, params: Params) -> Path:
    """One on the embedded CLIP, whose head reads earlier tokens too."""
    clip = load_clip(params.model, Path(), params.image_size)
    backbone = Backbone(clip, params.model.lora, levels=(0, 2))
    assert isinstance(backbone.visual.conv1, ConvStem)
    for parameter in backbone.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    classifier = ClipClassifier(clip, backbone, {"image": nn.Linear(backbone.widths[1], 1)})
    save_checkpoint(folder, classifier, params, "lora", 0, {"val": 0.1}, "d", {"val": CALIBRATION})
    return folder


def flip(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)


class TestEveryByteCounts:
    @pytest.mark.parametrize("saved_as", [2, 3])
    @pytest.mark.parametrize("name", PARTS)
    def test_a_changed_byte_is_an_error_that_names_the_file(self, name: str, saved_as: int, checkpoint: Path) -> None:
        if saved_as == 2:
            as_format_2(checkpoint)
        content = (checkpoint / name).read_bytes()
        for where in (0.0, 0.3, 0.6, 0.999):
            flip(checkpoint / name, where)
            with pytest.raises(UserError) as caught:
                Detector.load(checkpoint)
            assert_helpful(str(caught.value), checkpoint / name)
            (checkpoint / name).write_bytes(content)
        Detector.load(checkpoint)

    @pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
    def test_so_is_one_in_the_clip_that_is_carried(self, name: str, with_clip: Path) -> None:
        flip(with_clip / "clip" / name, 0.7)
        with pytest.raises(UserError) as caught:
            Detector.load(with_clip)
        assert_helpful(str(caught.value), with_clip / "clip" / name)

    def test_the_hashes_themselves_may_neither_change_nor_miss_a_file(self, checkpoint: Path) -> None:
        sums = (checkpoint / SUMS).read_bytes()
        flipped = [sums[:at] + bytes([sums[at] ^ 1]) + sums[at + 1 :] for at in range(0, len(sums), 7)]
        for changed in (*flipped, sums[: len(sums) // 2], sums[:-20], b"", b"\n"):
            (checkpoint / SUMS).write_bytes(changed)
            with pytest.raises(UserError, match="The checkpoint is damaged"):
                Detector.load(checkpoint)
        (checkpoint / SUMS).unlink()
        with pytest.raises(UserError, match="SHA256SUMS: no such file"):
            Detector.load(checkpoint)

    def test_they_can_be_checked_without_dgs(self, with_clip: Path) -> None:
        command = ["sha256sum", "--check", "--strict", SUMS]
        assert subprocess.run(command, cwd=with_clip, capture_output=True, check=False).returncode == 0
        flip(with_clip / "dgs.json", 0.5)
        assert subprocess.run(command, cwd=with_clip, capture_output=True, check=False).returncode == 1

    def test_the_card_is_for_people_and_may_be_edited(self, checkpoint: Path) -> None:
        (checkpoint / "README.md").write_text("Ask us first.")
        Detector.load(checkpoint)


class Malice:
    """What a pickle would do when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.marker,))


class TestLoadingRunsNoCode:
    NAMES = (
        *PARTS, "adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "heads.pt", "heads.bin", "model.pkl",
        "clip/open_clip_config.json", "clip/open_clip_model.safetensors", "clip/open_clip_pytorch_model.bin",
        "clip/open_clip_model.pt",
    )  # fmt: skip

    def test_a_pickle_under_any_name_is_not_read_as_one(self, checkpoint: Path, with_clip: Path) -> None:
        marker = checkpoint.parent / "ran"
        plain, zipped = pickle.dumps(Malice(marker)), checkpoint.parent / "zipped.pt"
        torch.save({"a": Malice(marker)}, zipped)
        pickle.loads(plain)
        assert marker.exists(), "the pickle must be one that would do harm"
        marker.unlink()
        for payload in (plain, zipped.read_bytes()):
            for folder in (checkpoint, with_clip):
                for name in self.NAMES:
                    self.try_with(payload, folder, name)
                    assert not marker.exists(), name

    def try_with(self, payload: bytes, whole: Path, name: str) -> None:
        folder = shutil.copytree(whole, whole.parent / "tried")
        file = folder / name
        known = file.exists()
        if file.parent.is_dir():
            file.write_bytes(payload)
            reseal(folder)
            try:
                Detector.load(folder)
                assert not known, f"{name} is not what it should be"
            except UserError as error:
                assert known and "\n" not in str(error)
        shutil.rmtree(folder)

    def test_a_tokenizer_that_a_clip_names_is_not_loaded(
        self, with_clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a tokenizer may bring code")

        monkeypatch.setattr(open_clip, "get_tokenizer", refuse)
        Detector.load(with_clip)


class TestCard:
    def test_it_says_what_is_known_and_is_the_same_each_time(self, whole: Path, clip_folder: Path) -> None:
        info = read_info(whole)
        text = (whole / "README.md").read_text()
        assert text == card(info) == card(read_info(whole))
        for part in (
            info["data_hash"], info["clip"]["weights_sha256"][:12],
            "8.4 [5.6, 12.5] of 250", "80.0 [74.6, 84.5] of 250",
            "results/mini/", "## Use", "Known failures", "## Licence", "library_name: peft",
        ):  # fmt: skip
            assert part in text
        assert np.isclose(CALIBRATION["false_alarm"]["rate"], 21 / 250)

    def test_without_calibration_it_says_so(self, whole_with_clip: Path) -> None:
        text = (whole_with_clip / "README.md").read_text()
        assert "how often it raises a false alarm is not known" in text
        assert "peft" not in text.split("```")[1], "a probe needs no peft"

    def test_the_files_it_names_are_all_there_are(self, whole: Path) -> None:
        assert {path.name for path in whole.iterdir()} == {*PARTS, "README.md", SUMS}
        assert set(read_info(whole)["files"]) == set(PARTS)
