"""Checkpoints: whole ones come back to the bit, damaged ones are refused in one sentence that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from clips import WIDTH, reseal, settings
from safetensors.torch import load_file, save_file

from dgs.errors import UserError
from dgs.model.checkpoint import load_checkpoint, read_info
from dgs.model.checkpoint_files import SUMS
from dgs.model.clip import Clip, load_clip
from dgs.model.clip_classifier import load_heads

HUB = (
    "peft.config.hf_hub_download",
    "peft.utils.save_and_load.hf_hub_download",
    "peft.utils.save_and_load.file_exists",
)


@pytest.fixture
def clip(clip_folder: Path) -> Clip:
    return load_clip(settings(clip_folder).model, Path(), 32)


def as_format_2(folder: Path) -> Path:
    """Make of a checkpoint what was saved before there was SHA256SUMS: dgs.json has all hashes, and its own."""
    lines = (folder / SUMS).read_text().splitlines()
    files = {name: sha for sha, name in (line.split("  ") for line in lines) if name != INFO}
    info = {**json.loads((folder / INFO).read_text()), "format": 2, "files": files, "sha256": "0" * 64}
    del info["kind"]  # which came later still
    text = json.dumps(info, indent=1, sort_keys=True)
    (folder / INFO).write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    (folder / SUMS).unlink()
    return folder


def edit_tensors(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    reseal(file.parent)


def edit_json(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    reseal(file.parent)


ADAPTER, CONFIG, HEADS, INFO = "adapter_model.safetensors", "adapter_config.json", "heads.safetensors", "dgs.json"
MATRIX = "base_model.model.transformer.resblocks.1.attn.v_proj.lora_B.weight"
TENSORS: list[tuple[str, str, Callable[[dict[str, torch.Tensor]], object]]] = [
    ("an adapter without one matrix", ADAPTER, lambda t: t.pop(MATRIX)),
    ("an adapter that is not a number", ADAPTER, lambda t: t[MATRIX].fill_(torch.nan)),
    ("an adapter with one infinite number", ADAPTER, lambda t: t[MATRIX][0].fill_(torch.inf)),
    ("heads without one tensor", HEADS, lambda t: t.pop("text_head.bias")),
    ("no image head", HEADS, lambda t: [t.pop(f"image_head.{part}") for part in ("weight", "bias")]),
    ("a head for other features", HEADS, lambda t: t.update({"image_head.weight": torch.zeros(1, 7)})),
    ("a head of two classes", HEADS, lambda t: t.update({"image_head.weight": torch.zeros(2, WIDTH)})),
    ("a head of one dimension", HEADS, lambda t: t.update({"image_head.weight": torch.zeros(WIDTH)})),
]
SETTINGS: list[tuple[str, str, Callable[[dict], object]]] = [
    ("adapter settings of another rank", CONFIG, lambda c: c.update(r=3)),
    ("adapter settings for no such layer", CONFIG, lambda c: c.update(target_modules=["x"])),
    ("adapter settings without a type", CONFIG, lambda c: c.pop("peft_type")),
    ("adapter settings that would import a module", CONFIG, lambda c: c.update(megatron_config={"a": 1})),
    ("adapter settings of another kind of LoRA", CONFIG, lambda c: c.update(use_dora=True)),
    ("dgs.json of another format", INFO, lambda c: c.update(format=99)),
    ("dgs.json of the format before, unsealed", INFO, lambda c: c.update(format=2)),
    ("dgs.json without the hash of the CLIP", INFO, lambda c: c["clip"].pop("weights_sha256")),
    ("dgs.json with a number for what was measured", INFO, lambda c: c["calibration"].update(val=3)),
    ("dgs.json with a word for a threshold", INFO, lambda c: c["thresholds"].update(val="0.5")),
]
TEXTS = {"not JSON": "{", "a list": "[]", "an object without keys": "{}", "a format alone": '{"format": 1}'}
# What is wrong -> the file to blame, and how to make it so.
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"no {name}": (name, Path.unlink) for name in (ADAPTER, CONFIG, HEADS)},
    **{f"{name} is a folder": (name, lambda file: (file.unlink(), file.mkdir())) for name in (ADAPTER, CONFIG, HEADS)},
    **{f"{name} is empty": (name, lambda file: file.write_bytes(b"")) for name in (ADAPTER, CONFIG, HEADS, INFO)},
    **{f"{name} is cut short": (name, lambda file: os.truncate(file, 200)) for name in (ADAPTER, CONFIG, HEADS, INFO)},
    **{f"{name} is not text": (name, lambda file: file.write_bytes(b"\xff\xfe")) for name in (CONFIG, INFO)},
    **{
        f"{name} is {what}": (name, partial(Path.write_text, data=t))
        for name in (CONFIG, INFO)
        for what, t in TEXTS.items()
    },
    **{what: (name, partial(edit_tensors, edit=edit)) for what, name, edit in TENSORS},
    **{what: (name, partial(edit_json, edit=edit)) for what, name, edit in SETTINGS},
    "adapters for other layers than the settings say, which peft would drop silently": (
        ADAPTER,
        lambda file: edit_json(file.parent / CONFIG, lambda settings: settings.update(target_modules=["q_proj"])),
    ),
}


def assert_helpful(sentence: str, file: Path) -> None:
    """One line that names the file and says what to do."""
    assert "\n" not in sentence and len(sentence) < 1000
    assert str(file) in sentence
    assert "train it again, or give another --checkpoint" in sentence.replace("Train", "train")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence_and_asks_no_hub(
    damage: str, checkpoint: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def no_network(*_: object, **__: object) -> None:
        asked.append("a name")
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for function in HUB:
        monkeypatch.setattr(function, no_network)
    name, break_it = DAMAGES[damage]
    break_it(checkpoint / name)
    reseal(checkpoint)
    with pytest.raises(UserError) as caught:
        load_checkpoint(checkpoint, clip)
    assert_helpful(str(caught.value), checkpoint / name)
    assert not asked, "a damaged checkpoint must not be looked up on a hub"


def test_a_whole_one_comes_back_to_the_bit(whole: Path, clip: Clip) -> None:
    classifier, info = load_checkpoint(whole, clip)
    loaded = {name: parameter for name, parameter in classifier.backbone.named_parameters() if "lora_" in name}
    saved = load_file(whole / ADAPTER)
    assert len(loaded) == len(saved) == 12, "A and B of q, k and v in 2 blocks"
    for name, tensor in saved.items():
        assert torch.equal(loaded[f"visual.{name.replace('.weight', '.default.weight')}"], tensor), name
    assert set(classifier.heads) == {"image", "text", "teacher"}
    assert not classifier.training and info == read_info(whole)


def test_one_of_the_format_before_comes_back_alike(whole: Path, checkpoint: Path, clip: Clip) -> None:
    classifier, info = load_checkpoint(as_format_2(checkpoint), clip)
    state = classifier.state_dict()
    classifier.close()
    again, new_info = load_checkpoint(whole, clip)
    assert "head.weight" in state
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert {name for name in info if info[name] != new_info.get(name)} == {"format", "files", "sha256"}
    assert new_info["kind"] == "clip" and "kind" not in info


def test_heads_are_read_without_the_rest(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / HEADS, tmp_path)
    heads = load_heads(tmp_path)
    assert torch.equal(heads["image"].weight, load_file(whole / HEADS)["image_head.weight"])
    assert not any(parameter.requires_grad for head in heads.values() for parameter in head.parameters())


@pytest.mark.parametrize("what", ["a missing folder", "an empty folder", "a file"])
def test_no_checkpoint_is_one_sentence(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    if what == "a file":
        folder.write_text("")
    elif what == "an empty folder":
        folder.mkdir()
    with pytest.raises(UserError, match=r"Expected a checkpoint folder \(with dgs\.json\) at .*/x, found none\."):
        read_info(folder)
