"""Exported detectors: one ONNX file gives its checkpoint's scores, and nothing else may stand in such a file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import CONFIG, LORA, settings, write_random_clip
from conftest import ROOT, structured_image
from settings import LoraParams
from test_cli import one_sentence, run
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from dgs.errors import UserError  # noqa: E402
from dgs.model import onnx_engine, onnx_graph  # noqa: E402
from dgs.model.backbone import Backbone  # noqa: E402
from dgs.model.checkpoint import save_checkpoint  # noqa: E402
from dgs.model.clip import ConvStem, load_clip  # noqa: E402
from dgs.model.clip_classifier import ClipClassifier  # noqa: E402
from dgs.model.detector import Detector, TorchTower  # noqa: E402
from dgs.model.onnx_engine import OnnxTower, read_export, sealed  # noqa: E402
from dgs.model.onnx_export import export_checkpoint  # noqa: E402
from dgs.model.onnx_graph import float_linear, int8_linear  # noqa: E402
from dgs.model.scoring import score_files  # noqa: E402
from dgs.params import Params  # noqa: E402

VIEWS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
VIEWS[1:3] //= np.array([40, 2], np.uint8)[:, None, None, None]  # a dark one and a paler one among them


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the checkpoint `whole`, to be read, not changed."""
    folder = tmp_path_factory.mktemp("exported")
    files = {name: folder / f"{name}.onnx" for name in ("float32", "int8")}
    for name, file in files.items():
        export_checkpoint(whole, file, int8=name == "int8")
    return files


def adapted(folder: Path, lora: LoraParams | None = LORA, levels: tuple[int, ...] = (), **vision: Any) -> TorchTower:
    """A random tower with random adapters and head; `vision`: what its config says otherwise than `clips.CONFIG`."""
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}
    config["quick_gelu"] = vision.pop("quick_gelu", False)
    config["vision_cfg"].pop("quick_gelu", None)
    clip = load_clip(settings(write_random_clip(folder, config=config)).model, Path(), 32, text=False)
    if vision.get("patch_size") == 8:
        clip.model.visual.conv1 = ConvStem([4, 8, config["vision_cfg"]["width"]])
    backbone = Backbone(clip, lora, levels=levels).eval()
    for parameter in backbone.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    return TorchTower(ClipClassifier(clip, backbone, {"image": nn.Linear(backbone.widths[1], 1)}))


class TestGraph:
    @pytest.mark.parametrize(
        "kind",
        [
            {},
            {"lora": None},
            {"lora": LORA.model_copy(update={"blocks": [1], "rslora": True})},
            {"levels": (0, 1, 2)},
            {"quick_gelu": True},
            {"patch_size": 8},  # with the embedded CLIP's stem
            {"ls_init_value": 0.5},
            {"no_ln_pre": True, "pool_type": "avg"},
            {"pool_type": "avg", "final_ln_after_pool": True},
        ],
        ids=str,
    )
    def test_it_gives_the_logits_of_the_tower_whatever_its_parts(self, kind: dict[str, Any], tmp_path: Path) -> None:
        tower = adapted(tmp_path, **kind)
        expected = tower.logits(VIEWS)
        found = OnnxTower(tower.classifier.onnx(32, float_linear).SerializeToString()).logits(VIEWS)
        assert found == pytest.approx(expected, abs=1e-4)
        assert expected.std() > 1e-2, "or the test could not tell"
        if kind.get("lora", LORA) is not None:
            with tower.classifier.backbone.frozen():
                frozen = tower.logits(VIEWS)
            assert np.abs(frozen - expected).max() > 1e-2, "or adapters could be lost"

    def test_a_tower_with_other_parts_is_one_sentence(self, tmp_path: Path) -> None:
        tower = adapted(tmp_path, attentional_pool=True, attn_pooler_heads=4)
        with pytest.raises(UserError, match="Expected a CLIP whose image side is a plain vision transformer"):
            tower.classifier.onnx(32, float_linear)


class TestInt8:
    @pytest.fixture(scope="class")
    def runs(self, exported: dict[str, Path]) -> Callable[..., Any]:
        """The file itself, without the engine's own batches."""
        session = OnnxTower(exported["int8"].read_bytes())._session
        return lambda views: session.run(["logits"], {"views": views})[0]

    def test_a_score_does_not_depend_on_the_batch_it_came_in(self, runs: Callable[..., Any]) -> None:
        together = runs(VIEWS)
        assert together.tolist() == [runs(view[None])[0] for view in VIEWS] == runs(VIEWS[::-1])[::-1].tolist()

    def test_a_processor_that_would_overflow_gives_the_same_bits(
        self, exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those without VNNI; only how this one does it exactly can be tried here."""
        expected = Detector.load(exported["int8"], engine="onnx").logits(VIEWS)
        (tmp_path / "cpuinfo").write_text("flags: avx2 avx512f")
        monkeypatch.setattr(onnx_engine, "CPUINFO", tmp_path / "cpuinfo")
        assert Detector.load(exported["int8"], engine="onnx").logits(VIEWS).tolist() == expected.tolist()

    def test_it_is_close_to_float32_and_not_the_same(self, runs: Callable[..., Any], whole: Path) -> None:
        expected = Detector.load(whole).logits(VIEWS)
        away = np.abs(runs(VIEWS) - expected).max()
        assert 1e-5 < away < 0.05 * np.ptp(expected)

    def test_a_layer_is_exact_where_8_bits_are_enough(self) -> None:
        """Whole numbers whose largest in a row is 127 times a scale; with both zero points."""
        rng = np.random.default_rng(0)
        x = rng.integers(-20, 128, (5, 16)).astype(np.float32) * np.float32([[1], [2], [0.5], [64], [0.25]])
        weight = rng.integers(-127, 128, (8, 16)).astype(np.float32)
        weight[:, 0], x[:, 0], bias = 127, 127 * np.float32([1, 2, 0.5, 64, 0.25]), np.arange(8, dtype=np.float32)
        graph = onnx_graph.Graph()
        graph.nodes.append(helper.make_node("Identity", [int8_linear(graph, "x", weight, bias, 128)], ["y"]))
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, w]) for n, w in (("x", 16), ("y", 8))]
        made = helper.make_graph(graph.nodes, "layer", ends[:1], ends[1:], graph.constants)
        opset = helper.make_opsetid("", onnx_graph.OPSET)
        tower = OnnxTower(helper.make_model(made, opset_imports=[opset], ir_version=9).SerializeToString())
        (found,) = tower._session.run(["y"], {"x": x})
        assert found == pytest.approx(x @ weight.T + bias, rel=1e-6, abs=1e-3)


class TestExport:
    def test_it_says_what_it_compared_and_keeps_it(self, whole: Path, tmp_path: Path) -> None:
        result = run("export", whole, "--out", tmp_path / "a.onnx", "--json")
        made = json.loads(result.stdout)
        assert result.exit_code == 0 and made["precision"] == "float32" and made["largest"] <= 1e-4
        assert (made["images"], made["validation"], made["auroc"], made["verdicts"]) == (64, False, None, 1.0)
        info, _ = read_export(tmp_path / "a.onnx")
        assert info["export"]["agreement"].items() <= made.items()
        assert (info["method"], info["seed"], info["data_hash"]) == ("dgs", 0, "d")
        assert set(info["thresholds"]) == set(info["calibration"]) == {"0.5", "val"}
        assert "64 made-up images" in run("export", whole, "--out", tmp_path / "a.onnx", "--int8").stdout

    @pytest.mark.parametrize("same", [True, False])
    def test_it_takes_the_validation_images_of_the_run_if_they_are_here(
        self, same: bool, tiny: Params, tiny_prepared: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "build" / "tiny").mkdir(parents=True)
        (tmp_path / "build" / "tiny" / "prepare").symlink_to(tiny_prepared)
        (tmp_path / "sample").symlink_to(ROOT / "sample")
        clip = load_clip(tiny.model, ROOT, tiny.image_size, text=False)
        backbone = Backbone(clip, LORA)
        training = json.loads((tiny_prepared / "training" / "data.json").read_text())["training_hash"]
        data = training if same else "another"
        classifier = ClipClassifier(clip, backbone, {"image": nn.Linear(backbone.widths[1], 1)})
        save_checkpoint(tmp_path / "seed-0", classifier, tiny, "lora", 0, {"val": 0.0}, data)
        made, text = export_checkpoint(tmp_path / "seed-0", tmp_path / "a.onnx", root=tmp_path)
        assert made["validation"] is same and (made["auroc"] is not None) is same
        assert ("validation images" in text) is same

    def test_a_file_that_does_not_agree_is_not_left(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            onnx_graph,
            "float_linear",
            lambda graph, x, weight, bias, zero: float_linear(graph, x, weight, 0 * bias, zero),
        )
        out = tmp_path / "a.onnx"
        out.write_bytes(b"before")
        assert "No file was written" in one_sentence(run("export", whole, "--out", out))
        assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"] and out.read_bytes() == b"before"

    def test_int8_that_disagrees_in_too_many_verdicts_is_not_left(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(onnx_graph, "int8_linear", lambda g, x, w, bias, zero: int8_linear(g, x, -w, bias, zero))
        assert "90 % of verdicts equal" in one_sentence(run("export", whole, "--out", tmp_path / "a.onnx", "--int8"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["a.png", "a", "."])
    def test_only_an_onnx_file_is_made(self, name: str, whole: Path, tmp_path: Path) -> None:
        assert "Expected --out to name a file *.onnx" in one_sentence(run("export", whole, "--out", tmp_path / name))

    def test_the_same_checkpoint_gives_the_same_bytes(self, whole: Path, exported: dict[str, Path]) -> None:
        again = exported["int8"].parent / "again.onnx"
        export_checkpoint(whole, again, int8=True)
        assert again.read_bytes() == exported["int8"].read_bytes()


class TestScoring:
    @pytest.fixture
    def images(self, tmp_path: Path) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for number in range(5):
            structured_image(number).save(folder / f"{number}.png")
        (folder / "2.png").write_bytes(b"no image")
        return folder

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_the_rows_are_those_of_torch(
        self, processes: int, images: Path, whole: Path, exported: dict[str, Path], tmp_path: Path
    ) -> None:
        said: list[str] = []
        expected = list(score_files([images], whole, lambda _: None, 2, tmp_path / "a"))
        found = list(score_files([images], exported["float32"], said.append, 2, tmp_path / "b", processes, "onnx"))
        for row, other in zip(expected, found, strict=True):
            assert other == {**row, "probability": pytest.approx(row["probability"], abs=1e-4)} if len(row) > 2 else row
        assert (tmp_path / "a" / "000004.png").read_bytes() == (tmp_path / "b" / "000004.png").read_bytes()
        assert len(said) == 1 and said[0].startswith(f"checkpoint {exported['float32']}: 'generated' above")

    def test_on_the_command_line_and_from_python(self, images: Path, exported: dict[str, Path]) -> None:
        result = run("score", images, "--engine", "onnx", "--checkpoint", exported["int8"], "--json")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.exit_code == 1 and ["error" in row for row in rows] == [False, False, True, False, False]
        scores = Detector.load(exported["int8"], engine="onnx").score(
            [row["path"] for row in rows if "error" not in row]
        )
        assert scores.tolist() == [row["probability"] for row in rows if "error" not in row]

    @pytest.mark.parametrize(("verdicts", "warned"), [(0.989, True), (0.99, False)])
    def test_a_file_whose_verdicts_often_differ_says_so_at_every_start(
        self, verdicts: float, warned: bool, images: Path, exported: dict[str, Path], tmp_path: Path
    ) -> None:
        file = changed(
            exported["int8"], tmp_path, lambda info, _: info["export"]["agreement"].update(verdicts=verdicts)
        )
        for _ in range(2):
            result = run("score", images / "0.png", "--engine", "onnx", "--checkpoint", file)
            assert ("98.9 % of verdicts equal the checkpoint's on 64 made-up images" in result.stderr) is warned


def changed(file: Path, folder: Path, change: Callable[[dict[str, Any], Any], object]) -> Path:
    """A copy with a hash that fits, as one who means harm could make it; `change` gets what it says, and the model."""
    info, data = read_export(file)
    model = onnx.ModelProto.FromString(data)
    change(info, model)
    (folder / "changed.onnx").write_bytes(sealed(model, info))
    return folder / "changed.onnx"


def add_node(model: Any, kind: str, domain: str = "", **attributes: Any) -> None:
    model.graph.node.append(helper.make_node(kind, ["views"], ["more"], domain=domain, **attributes))


def from_elsewhere(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


FOREIGN: dict[str, Callable[[Any], object]] = {
    "an operator of its own": lambda model: add_node(model, "Gemm", "com.example"),
    "another operator": lambda model: add_node(model, "Identity"),
    "a graph within": lambda model: add_node(model, "Add", body=helper.make_graph([], "g", [], [])),
    "another domain": lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
    "a function": lambda model: model.functions.append(
        helper.make_function("ai", "F", [], [], [], [helper.make_opsetid("", 20)])
    ),
    "numbers elsewhere": from_elsewhere,
    "another output": lambda model: model.graph.output.append(model.graph.output[0]),
    "an opset of the future": lambda model: model.opset_import[0].__setattr__("version", 9999),
    "no nodes": lambda model: model.graph.ClearField("node"),
    "another size": lambda model: model.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 64),
}


class TestReading:
    @pytest.mark.parametrize("foreign", FOREIGN)
    def test_more_than_plain_operators_is_refused(
        self, foreign: str, exported: dict[str, Path], tmp_path: Path
    ) -> None:
        file = changed(exported["float32"], tmp_path, lambda _, model: FOREIGN[foreign](model))
        sentence = one_sentence(run("score", tmp_path, "--engine", "onnx", "--checkpoint", file))
        assert f"{file}: " in sentence and "make it again with dgs export" in sentence

    def test_each_changed_byte_is_one_sentence(self, exported: dict[str, Path], tmp_path: Path) -> None:
        whole, file = exported["float32"].read_bytes(), tmp_path / "damaged.onnx"
        rng = np.random.default_rng(0)
        cuts = [whole[:0], whole[: len(whole) // 2], whole[:-1], whole + b"\0", b"\xff" * 100]
        flips = [(at, whole[at] ^ 1 << int(rng.integers(8))) for at in rng.integers(0, len(whole), 60).tolist()]
        for content in [*cuts, *(whole[:at] + bytes([value]) + whole[at + 1 :] for at, value in flips)]:
            file.write_bytes(content)
            with pytest.raises(UserError) as caught:
                Detector.load(file, engine="onnx")
            assert str(file) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda info, _: info.update(format=2), "Expected an exported file of format 1 in .*, found 2"),
            (lambda info, _: info.pop("thresholds"), "thresholds: Field required"),
            (lambda info, _: info["thresholds"].clear(), "thresholds: "),
            (lambda info, _: info["params"]["model"].update(image_size=0), "image_size"),
            (lambda info, _: info["export"].update(made_up=[9.0] * 4), "Expected .* to give its checkpoint's logits"),
            (lambda info, _: info["export"].update(made_up=[0.0]), "logits"),
        ],
    )
    def test_what_it_says_of_itself_must_hold(
        self, change: Callable[..., object], message: str, exported: dict[str, Path], tmp_path: Path
    ) -> None:
        file = changed(exported["float32"], tmp_path, change)
        with pytest.raises(UserError, match=message) as caught:
            Detector.load(file, engine="onnx")
        assert "\n" not in str(caught.value)

    def test_what_is_no_exported_file_is_one_sentence(self, whole: Path, tmp_path: Path) -> None:
        (tmp_path / "text.onnx").write_text("no model")
        graph = helper.make_graph([], "g", [], [])
        (tmp_path / "other.onnx").write_bytes(helper.make_model(graph).SerializeToString())
        with (tmp_path / "huge.onnx").open("wb") as file:
            file.truncate(3 * 2**30)
        for path in (tmp_path / "gone.onnx", whole, *(tmp_path / f"{name}.onnx" for name in ("text", "other", "huge"))):
            sentence = one_sentence(run("score", tmp_path, "--engine", "onnx", "--checkpoint", path))
            assert f"Expected a file made by dgs export at {path}, found" in sentence

    def test_an_exported_file_without_the_engine_says_which_it_needs(
        self, exported: dict[str, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "a").touch()
        assert "needs --engine onnx" in one_sentence(run("score", tmp_path, "--checkpoint", exported["int8"]))

    @pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
    @pytest.mark.parametrize("command", [["score", "--engine", "onnx", "--checkpoint"], ["export", "--out", "a.onnx"]])
    def test_without_the_extra_it_is_one_sentence(
        self, command: list[str], missing: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").touch()
        monkeypatch.setitem(sys.modules, missing, None)
        name, *options = command
        result = run(name, *([tmp_path] if name == "score" else []), *options, whole)
        assert "pip install -e '.[fast]'" in one_sentence(result)

    def test_a_gpu_is_not_for_this_engine(self, exported: dict[str, Path]) -> None:
        with pytest.raises(UserError, match="Expected device auto or cpu with the engine onnx, found cuda"):
            Detector.load(exported["float32"], device="cuda", engine="onnx")


def test_scores_have_the_same_bits_each_time(exported: dict[str, Path]) -> None:
    for file in exported.values():
        one, two = (Detector.load(file, engine="onnx").logits(VIEWS) for _ in range(2))
        assert one.tobytes() == two.tobytes()


def test_the_example_of_serving_runs_without_dgs(exported: dict[str, Path], tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/scoring.md").read_text()
    (code,) = re.findall(r"### Serving one.*?```python\n(.*?)```", text, re.S)
    shutil.copyfile(exported["float32"], tmp_path / "dgs.onnx")
    end = "\nimport sys\nassert 0 < probability < 1 and 'dgs' not in {name.partition('.')[0] for name in sys.modules}"
    subprocess.run([sys.executable, "-c", code + end], cwd=tmp_path, check=True)
