"""Checkpoint files of the authors' release: told apart, imported to the same logits, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dgs.cli import app
from dgs.errors import UserError
from dgs.model.checkpoint import import_release, read_info
from dgs.model.clip import IMAGENET
from dgs.model.clip_classifier import load_heads
from dgs.model.detector import Detector
from dgs.model.release import read_tensors

FROZEN = "clip_model_frozen.clip_model_frozen."
Q = "clip_model.visual.transformer.resblocks.3.attn.q_proj"


def normalised(views: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    return (torch.from_numpy(views).permute(0, 3, 1, 2) / 255 - mean) / std


def views(size: int = 224, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def trained(geometry: oracle.Geometry, steps: int = 2, count: int = 4, lr: float = 1e-2) -> oracle.Release:
    """A release model after some steps, so that its adapters are not zero."""
    torch.manual_seed(0)
    model = oracle.Release(geometry, lr=lr)
    labels = torch.arange(count).remainder(2).float()
    for _ in range(steps):
        model.step(normalised(views(geometry.image, count)), torch.randint(1, 49_407, (count, 12)), labels)
    return model.eval()


@pytest.fixture(scope="module")
def release() -> oracle.Release:
    return trained(oracle.REDUCED)


def saved(state: object, folder: Path, name: str = "step2.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


def require_equal_logits(model: oracle.Release, folder: Path, tolerance: float = 1e-5) -> None:
    images = views(model.clip_model.visual.conv1.kernel_size[0] * 7)  # ViT-B/32 and the reduced one: 224 px
    with torch.no_grad():
        expected = model.logits(normalised(images)).numpy()
    found = Detector.load(folder).logits(images)
    assert np.abs(expected).max() > 100 * tolerance
    assert np.allclose(found, expected, rtol=0, atol=tolerance)


def test_the_files_have_as_many_tensors_as_the_releases(release: oracle.Release) -> None:
    assert len(release.state_dict()) == 1_138
    assert len(oracle.Probe(oracle.REDUCED).state_dict()) == 448


@pytest.fixture(scope="module", params=[False, True], ids=["unmerged", "merged"])
def merged(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def imported(merged: bool, release: oracle.Release, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """What importing says, and the folder it makes; to be read, not changed."""
    folder = tmp_path_factory.mktemp("release")
    path = saved(release.merged_state() if merged else release.state_dict(), folder)
    return import_release(path, out=folder / "imported"), folder / "imported"


def test_an_imported_checkpoint_gives_the_releases_logits(
    merged: bool, imported: tuple[dict, Path], release: oracle.Release
) -> None:
    made, folder = imported
    parameters = sum(value.numel() for value in release.state_dict().values())
    assert made == {"out": str(folder), "stage": 2, "merged": merged, "rank": 6, "parameters": parameters}
    require_equal_logits(release, folder)
    heads = load_heads(folder)
    assert torch.equal(heads["text"].weight, release.text_fc.weight)
    assert torch.equal(heads["teacher"].weight, release.clip_model_frozen.img_frozen_fc.weight)
    info = read_info(folder)
    assert (info["seed"], info["thresholds"], info["params"]["patches"]["size"]) == (None, {"0.5": 0.0}, 32)


def test_a_file_in_half_precision_is_imported_as_rounded(merged: bool, release: oracle.Release, tmp_path: Path) -> None:
    state = release.merged_state() if merged else release.state_dict()
    import_release(saved({name: value.half() for name, value in state.items()}, tmp_path), out=tmp_path / "imported")
    rounded = oracle.Release(oracle.REDUCED).eval()
    rounded.load_state_dict({name: value.half().float() for name, value in release.state_dict().items()})
    require_equal_logits(rounded, tmp_path / "imported")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "model.state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_common_wrappings_are_looked_through(wrapper: str, prefix: str, tmp_path: Path) -> None:
    state = {"clip_model.ln_final.bias": torch.ones(3), "img_fc.bias": torch.ones(1)}
    content: dict = {prefix + name: value for name, value in state.items()}
    for name in reversed(wrapper.split(".")):
        content = {name: content, "epoch": 3}
    found = read_tensors(saved(content, tmp_path))
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_folder_moved_elsewhere_scores_while_it_carries_its_clip(
    imported: tuple[dict, Path], release: oracle.Release, tmp_path: Path
) -> None:
    moved = shutil.copytree(imported[1], tmp_path / "elsewhere")
    require_equal_logits(release, moved)
    shutil.rmtree(moved / "clip")
    with pytest.raises(UserError, match=r"elsewhere/clip: expected the CLIP that this checkpoint carries, found none"):
        Detector.load(moved)


def test_merged_twice_would_have_been_seen(release: oracle.Release) -> None:
    """The mistake that telling the kinds apart prevents is larger than the tolerance of these tests."""
    twice = oracle.Release(oracle.REDUCED).eval()
    twice.load_state_dict(release.merged_state())
    with torch.no_grad():
        images = normalised(views())
        assert (twice.logits(images) - release.logits(images)).abs().max() > 1e-3


def test_a_stage_1_file_becomes_a_probe(release: oracle.Release, tmp_path: Path) -> None:
    probe = release.clip_model_frozen
    made = import_release(saved(probe.state_dict(), tmp_path), out=tmp_path / "probe")
    assert (made["stage"], made["rank"]) == (1, None)
    images = views()
    with torch.no_grad():
        expected = probe.img_frozen_fc(probe.clip_model_frozen.visual(normalised(images))).squeeze(1).numpy()
    assert np.allclose(Detector.load(tmp_path / "probe").logits(images), expected, rtol=0, atol=1e-5)


def test_stage_1_and_2_have_to_belong_together(release: oracle.Release, tmp_path: Path) -> None:
    step2 = saved(release.state_dict(), tmp_path)
    probe = {name: value.clone() for name, value in release.clip_model_frozen.state_dict().items()}
    import_release(step2, saved(probe, tmp_path, "step1.pth"), out=tmp_path / "fits")
    probe["img_frozen_fc.bias"] += 1
    with pytest.raises(UserError, match=r"to have started from .*step1\.pth, found another img_frozen_fc\.bias"):
        import_release(step2, saved(probe, tmp_path, "step1.pth"), out=tmp_path / "other")
    with pytest.raises(UserError, match=r"Expected a stage-2 file .* and then a stage-1 file"):
        import_release(step2, step2, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def without(state: dict[str, Tensor]) -> object:
    return {name: value for name, value in state.items() if name != f"{Q}.w_lora_B"}


def with_more(state: dict[str, Tensor]) -> object:
    return {**state, "module.extra": torch.zeros(1)}


def fine_tuned(state: dict[str, Tensor]) -> object:
    state["clip_model.visual.ln_post.bias"] = state["clip_model.visual.ln_post.bias"] + 1e-3
    return state


def merged_in_part(state: dict[str, Tensor]) -> object:
    scaling = 6 / 6**0.5
    state[f"{Q}.weight"] = state[f"{Q}.weight"] + scaling * state[f"{Q}.w_lora_B"] @ state[f"{Q}.w_lora_A"]
    return state


def infinite(state: dict[str, Tensor]) -> object:
    state["img_fc.weight"] = state["img_fc.weight"] * torch.inf
    return state


def shaped(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    def change(state: dict[str, Tensor]) -> object:
        assert name in state
        return {**state, name: torch.ones(shape)}

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without, rf"Expected the 1138 tensors of a stage-2 file.*found 1137; 1 missing: {Q}\.w_lora_B\."),
        (
            lambda state: {name: value for name, value in state.items() if not name.startswith(FROZEN)},
            r"tensors of a stage-2 file of the release in .*step2\.pth, found .*missing: clip_model_frozen\.",
        ),
        (with_more, r"found 1139; 1 not known: module\.extra\."),
        (fine_tuned, r"Expected clip_model\.visual\.ln_post\.bias .* to equal the frozen copy's"),
        (merged_in_part, r"blocks\.3\.attn\.q_proj\.weight .* by nothing or by the adapter .* as every one before it"),
        (shaped(f"{Q}.weight", 32, 64), r"attn\.q_proj\.weight in .* of shape \(64, 64\), found \(32, 64\)"),
        (shaped(f"{Q}.w_lora_A", 3, 64), r"attn\.q_proj\.w_lora_A in .* of shape \(6, 64\), found \(3, 64\)"),
        (
            shaped(Q.replace(".3.", ".0.") + ".w_lora_A", 6),
            r"Expected adapters A \(r, W\), r >= 1, .*found shape \(6,\)",
        ),
        (shaped("clip_model.ln_final.bias", 3), r"ln_final\.bias in .* of shape \(64,\), found \(3,\)"),
        (shaped(f"{FROZEN}visual.proj", 24), r"visual\.proj in .* to have 2 dimensions, found 1"),
        (shaped(f"{FROZEN}visual.positional_embedding", 48, 64), r"visual\.positional_embedding .*\(37, 64\), found"),
        (shaped("img_fc.weight", 1, 23), r"Expected img_fc\.weight in .* of shape \(1, 24\), found \(1, 23\)"),
        (shaped(f"{FROZEN}visual.conv1.weight", 200, 3, 32, 32), r"Expected a CLIP of OpenAI's .*, found other sizes"),
        (shaped(f"{FROZEN}visual.conv1.weight", 64, 3, 0, 0), r"conv1\.weight in .*, found none: .* \(64, 3, 0, 0\)\."),
        (shaped(f"{FROZEN}visual.conv1.weight", 0, 3, 8, 8), r"conv1\.weight in .*, found none: .* \(0, 3, 8, 8\)\."),
        (lambda state: {**state, "img_fc.bias": torch.ones(1).to_sparse()}, r"Expected dense real tensors"),
        (lambda state: {**state, "img_fc.bias": torch.ones(1) * 1j}, r"Expected dense real tensors .*complex64"),
        (infinite, r"Expected finite numbers in .*step2\.pth, found others in img_fc\.weight"),
        (lambda state: {}, r"Expected a file of the release in .*step2\.pth, .*, found no tensor"),
        (
            lambda state: {"fc.bias": torch.ones(1)},
            r"Expected a file of the release .*, found 1 tensors, fc\.bias first",
        ),
        (lambda state: [1], r"Expected a state dict in .*step2\.pth, found list"),
        (lambda state: {"epoch": 3}, r"Expected only tensors in .*step2\.pth, found int under 'epoch'"),
        (lambda state: {"model": Path("x")}, r"Cannot read .*step2\.pth as tensors alone"),
    ],
)
def test_anything_else_is_refused_with_what_is_wrong(
    change: Callable[[dict[str, Tensor]], object], sentence: str, release: oracle.Release, tmp_path: Path
) -> None:
    path = saved(change(dict(release.state_dict())), tmp_path)
    with pytest.raises(UserError, match=sentence):
        import_release(path, out=tmp_path / "imported")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step2.pth"]


def test_what_is_no_checkpoint_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name, sentence in (("text.pth", "Cannot read .*text"), ("gone.pth", "Expected a checkpoint file")):
        with pytest.raises(UserError, match=sentence):
            import_release(tmp_path / name, out=tmp_path / "imported")
    with pytest.raises(UserError, match=r"Cannot make .*text\.pth/imported"):
        import_release(tmp_path / "text.pth", out=tmp_path / "text.pth" / "imported")
    with pytest.raises(UserError, match=r"should not exist yet"):
        import_release(tmp_path / "text.pth", out=".")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=r"should not exist yet.*another --out"):
        import_release(tmp_path / "text.pth", out=tmp_path / "full")


def test_on_the_command_line(release: oracle.Release, tmp_path: Path) -> None:
    step2, out = str(saved(release.merged_state(), tmp_path)), str(tmp_path / "a")
    run = CliRunner().invoke(app, ["import-release", step2, "--out", out])
    assert run.exit_code == 0 and "adapters of rank 6, merged" in run.stdout
    run = CliRunner().invoke(app, ["import-release", step2, "--out", out])
    assert run.exit_code == 2 and "should not exist yet" in run.stderr
    shutil.rmtree(out)
    run = CliRunner().invoke(app, ["import-release", step2, "--out", out, "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["merged"] is True


@pytest.mark.slow
def test_vit_l_14_at_full_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = oracle.Release(oracle.VIT_L_14).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("w_lora_B"):  # zero at first; a step of training would take most of the test's time
            torch.nn.init.normal_(parameter, std=1e-2)
    assert sum(value.numel() for value in model.state_dict().values()) == 856_120_069
    made = import_release(saved(model.merged_state(), tmp_path), out=tmp_path / "imported")
    assert made["merged"] and made["parameters"] == 856_120_069
    config = json.loads((tmp_path / "imported" / "clip" / "open_clip_config.json").read_text())
    assert (config["model_cfg"]["vision_cfg"]["layers"], config["model_cfg"]["vision_cfg"]["image_size"]) == (24, 224)
    images = views(count=2)
    with torch.no_grad():
        expected = model.logits(normalised(images)).numpy()
    assert np.allclose(Detector.load(tmp_path / "imported").logits(images), expected, rtol=0, atol=1e-5)
