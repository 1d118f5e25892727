"""The network from scratch: what it sees, that it is a method as any other, and what is absent without a CLIP."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_sharing
import torch
import yaml
from clips import CALIBRATION, reseal, settings
from conftest import structured_image
from copies import ROOT, run, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_helpful
from test_cli import one_sentence
from test_cli import run as command
from test_figures import make_detection, make_forgetting

from dgs.analysis.differences import difference_table
from dgs.analysis.explore import Workbench, remark
from dgs.analysis.figures.detection import difference_forest
from dgs.analysis.figures.forgetting import forgetting_blocks, forgetting_measures, forgetting_plane
from dgs.analysis.metrics import per_seed_values, summary
from dgs.analysis.report import write_report
from dgs.errors import UserError
from dgs.model import runs
from dgs.model.checkpoint import load_checkpoint, read_info, save_checkpoint
from dgs.model.classifier import WEIGHTS
from dgs.model.detector import Detector
from dgs.model.methods.registry import METHODS
from dgs.model.pixel_cnn import PixelCNN, planes
from dgs.model.runs import train_seed
from dgs.params import Params
from dgs.workspace import Workspace

INFO = "dgs.json"


def random_network(seed: int = 0) -> PixelCNN:
    """In eval mode, its BatchNorm as training would leave it."""
    network, draw = PixelCNN.new(seed), torch.Generator().manual_seed(seed)
    for name, buffer in network.named_buffers():
        if buffer.dtype == torch.float32:
            buffer.copy_((torch.rand(buffer.shape, generator=draw) + ("var" in name) - 0.5) / 10)
    return network.eval()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for images of 32 px; to be read, not changed."""
    folder, params = tmp_path_factory.mktemp("own") / "seed-0", settings(Path("no/clip/here"))
    save_checkpoint(folder, random_network(), params, "pixel_cnn", 0, {"val": 0.1}, "d", {"val": CALIBRATION})
    return folder


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "seed-0")


class TestNetwork:
    def test_it_sees_pixels_and_what_a_mean_of_nine_leaves_of_them(self) -> None:
        images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        seen, values = planes(images), images.double()
        assert torch.allclose(seen[:, :3].double(), (values - 128) / 64)
        rest = (values[..., 4, 3] - values[..., 3:6, 2:5].mean((2, 3))) / 8
        assert torch.allclose(seen[:, 3:, 4, 3].double(), rest.clamp(-3, 3), atol=1e-5) and rest.abs().max() > 3
        flat = planes(torch.full((1, 3, 8, 8), 200, dtype=torch.uint8))
        assert torch.equal(flat[:, 3:], torch.zeros(1, 3, 8, 8)), "also at the edge"

    def test_its_weights_are_the_seeds_and_few(self) -> None:
        before = torch.get_rng_state()
        one, two, other = (PixelCNN.new(seed).state_dict() for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not torch.equal(one["head.weight"], other["head.weight"])
        assert 15_000 < sum(p.numel() for p in PixelCNN().parameters()) < 25_000


class TestTraining:
    def test_no_clip_is_loaded(
        self, tiny: Params, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dgs.model.clip.load_clip", None)
        log = train_seed("pixel_cnn", 0, tiny, ROOT, tiny_prepared, tmp_path, tmp_path / "unfinished")
        assert log is not None and log.losses["val_balanced_acc"].notna().sum() == 2
        assert read_info(tmp_path / "seed-0")["method"] == "pixel_cnn"

    @pytest.mark.slow
    def test_several_processes_end_with_the_same_bits(self, tiny: Params, tiny_prepared: Path, tmp_path: Path) -> None:
        weights = []
        for processes in (1, 2):
            params, out = tiny.replaced({"train.processes": processes}), tmp_path / str(processes)
            runs._train_together(
                processes, "pixel_cnn", 0, params, ROOT, tiny_prepared, out, tmp_path / f"unfinished-{processes}"
            )
            weights.append((out / "seed-0" / WEIGHTS).read_bytes())
        assert weights[0] == weights[1]

    def test_a_loss_that_is_no_number_names_the_batch(
        self, tiny: Params, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PixelCNN, "decide", lambda self, features: self.head(features).squeeze(1) * np.nan)
        with pytest.raises(
            UserError, match=r"loss became nan at step 0 of stage 1; the batch was .*Lower train\.stage1"
        ):
            train_seed("pixel_cnn", 0, tiny, ROOT, tiny_prepared, tmp_path, tmp_path / "unfinished")


class TestCheckpoint:
    def test_it_names_its_kind_and_no_clip(self, whole: Path) -> None:
        info = read_info(whole)
        assert {path.name for path in whole.iterdir()} == {INFO, WEIGHTS, "README.md", "SHA256SUMS"}
        assert info["kind"] == "pixel_cnn" and not {"clip", "adapter", "levels"} & set(info)
        assert set(info["preprocessing"]) == {"image_size", "patches", "fit"}

    def test_it_comes_back_to_the_bit_and_scores_without_any_clip(self, whole: Path) -> None:
        expected, (found, _) = random_network().state_dict(), load_checkpoint(whole, None)
        assert not found.training
        assert all(torch.equal(expected[name], value) for name, value in found.state_dict().items())
        views = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        logits = random_network()(torch.from_numpy(views).permute(0, 3, 1, 2)).detach().numpy()
        assert Detector.load(whole).logits(views).tolist() == logits.tolist() and logits.std() > 1e-3

    def test_on_the_command_line(self, whole: Path, tmp_path: Path) -> None:
        structured_image(0, 32, 32).save(tmp_path / "a.png")
        result = command("score", tmp_path / "a.png", "--checkpoint", whole, "--json")
        assert json.loads(result.stdout)["probability"] == Detector.load(whole).score([tmp_path / "a.png"])[0]

    def test_its_card_gives_the_same_score_without_dgs(self, checkpoint: Path, tmp_path: Path) -> None:
        test_sharing.TestWithoutDgs().require_same_score(checkpoint, 32, tmp_path)
        text = (checkpoint / "README.md").read_text()
        assert "without a CLIP" in text and "open_clip" not in text and "8.4 [5.6, 12.5] of 250" in text

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            (WEIGHTS, Path.unlink),
            (WEIGHTS, lambda file: file.write_bytes(b"")),
            (WEIGHTS, lambda file: os.truncate(file, 200)),
            (WEIGHTS, lambda file: edit(file, lambda t: t.pop("head.bias"))),
            (WEIGHTS, lambda file: edit(file, lambda t: t.update({"head.weight": torch.zeros(2, 32)}))),
            (WEIGHTS, lambda file: edit(file, lambda t: t.update(more=torch.zeros(1)))),
            (WEIGHTS, lambda file: edit(file, lambda t: t["body.1.running_var"].fill_(torch.nan))),
            (INFO, lambda file: put(file, kind="clip")),
            (INFO, lambda file: put(file, thresholds={"val": "0.5"})),
        ],
    )
    def test_a_damaged_one_is_one_sentence(self, name: str, damage: Callable[[Path], Any], checkpoint: Path) -> None:
        damage(checkpoint / name)
        reseal(checkpoint)
        with pytest.raises(UserError) as caught:
            Detector.load(checkpoint)
        assert_helpful(str(caught.value), checkpoint / name)

    def test_a_changed_byte_is_an_error_that_names_the_file(self, checkpoint: Path) -> None:
        content = bytearray((checkpoint / WEIGHTS).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / WEIGHTS).write_bytes(content)
        with pytest.raises(UserError) as caught:
            Detector.load(checkpoint)
        assert_helpful(str(caught.value), checkpoint / WEIGHTS)

    @pytest.mark.parametrize("kind", ["another", 3, None])
    def test_a_kind_that_is_not_known_is_one_sentence(self, kind: object, checkpoint: Path) -> None:
        put(checkpoint / INFO, kind=kind)
        reseal(checkpoint)
        with pytest.raises(
            UserError, match=r"of the kind clip or pixel_cnn or late_fusion in .*dgs\.json, found .*Use the version"
        ):
            Detector.load(checkpoint)


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def put(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class TestExport:
    @pytest.fixture(autouse=True)
    def _extra(self) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")

    def test_a_file_gives_the_logits_of_the_checkpoint(self, whole: Path, tmp_path: Path) -> None:
        made = json.loads(command("export", whole, "--out", tmp_path / "a.onnx", "--json").stdout)
        assert made["largest"] <= 1e-4 and made["verdicts"] == 1.0
        views = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        found = Detector.load(tmp_path / "a.onnx", engine="onnx")
        assert found.info["kind"] == "pixel_cnn"
        assert found.logits(views) == pytest.approx(Detector.load(whole).logits(views), abs=1e-4)

    def test_8_bits_are_refused_in_a_sentence(self, whole: Path, tmp_path: Path) -> None:
        refused = one_sentence(command("export", whole, "--out", tmp_path / "a.onnx", "--int8"))
        assert "found the kind pixel_cnn" in refused and refused.endswith("Leave --int8 out.")
        assert not list(tmp_path.iterdir())


class TestTables:
    """Of a method that has no row of forgetting."""

    detection = make_detection(("lora", "dgs", "pixel_cnn"), seeds=2)
    forgetting = make_forgetting(("lora", "dgs"), seeds=2)

    def test_metrics_are_null_and_the_report_has_dashes(self, tmp_path: Path) -> None:
        made = summary(self.detection, self.forgetting, "mini", "d")
        own = made["methods"]["pixel_cnn"]
        assert own["zero_shot_kept"] is None and own["cka_to_frozen"] is None and own["balanced_acc_unseen"]["mean"] > 0
        assert made["methods"]["dgs"]["zero_shot_kept"]["mean"] > 0
        of_all = {name: {"train": {"batch_size": 32}} for name in made["methods"]}
        text = write_report(tmp_path / "R.md", made, self.detection, self.forgetting, of_all, []).read_text()
        top = text.partition("## Headline")[2].partition("##")[0]
        (headline,) = [line for line in top.splitlines() if line.startswith("| `pixel_cnn` |")]
        assert headline.endswith("| – |")
        assert "A dash: pixel_cnn has no CLIP that could forget." in text
        assert "| measure | before | `lora` | `dgs` | `pixel_cnn` |" in text
        shapes = [line for line in text.splitlines() if line.startswith("| zero-shot shape")]
        assert len(shapes) == 1 and shapes[0].endswith("| – |")

    def test_alone_it_has_the_same_nulls_and_figures_say_why_they_are_empty(self, tmp_path: Path) -> None:
        detection, none = make_detection(("pixel_cnn",), seeds=2), self.forgetting.iloc[:0]
        made = summary(detection, none, "mini", "d")
        assert made["methods"]["pixel_cnn"]["zero_shot_kept"] is None
        text = write_report(tmp_path / "R.md", made, detection, none, {"pixel_cnn": {}}, []).read_text()
        assert "zero-shot kept" not in text
        for figure in (forgetting_measures(none), forgetting_plane(detection, none), forgetting_blocks(none)):
            assert "nothing that could be forgotten" in figure.texts[0].get_text().replace("\n", " ")

    def test_figures_leave_it_out_or_name_it(self) -> None:
        plane = forgetting_plane(self.detection, self.forgetting)
        assert "not measured: pixel\u00a0cnn" in plane.axes[0].get_xlabel()
        differences = difference_table(per_seed_values(self.detection, self.forgetting), self.detection)
        rows = [label.get_text() for label in difference_forest(differences).axes[0].get_yticklabels()]
        assert rows == ["dgs", "pixel\u00a0cnn"]


def test_the_explorer_shows_its_score_and_no_surgery(tiny: Params, tiny_prepared: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path / "scratch", tiny.profile)
    trained = tmp_path / "build" / tiny.profile / "train" / "pixel_cnn"
    trained.mkdir(parents=True)
    (trained.parent.parent / "prepare").symlink_to(tiny_prepared)
    (tmp_path / "sample").symlink_to(ROOT / "sample")
    for seed in (0, 1):
        train_seed("pixel_cnn", seed, tiny, tmp_path, tiny_prepared, trained, tmp_path / "unfinished")
    bench = Workbench(workspace, tiny.replaced({"methods": ["pixel_cnn"]}))
    method, seed, image = bench.choose(None, None, None)
    subject = bench.look(method, seed, image)
    assert subject.sample is None and "nothing to operate on" in remark(method, subject)
    expected = Detector.load(trained / "seed-0", tmp_path).score([Image.fromarray(subject.image)])
    assert subject.probability == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.slow
def test_the_pipeline_makes_its_results_beside_a_probes(finished: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(finished, tmp_path / "repo")
    params = yaml.safe_load((repo / "params.yaml").read_text())
    params |= {"methods": ["probe", "pixel_cnn"]}
    (repo / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    done = run(repo, "dvc", "repro")
    assert done.returncode == 0, done.stderr + done.stdout
    results, folder = repo / "results/mini", repo / "build/mini/train/pixel_cnn/seed-0"
    methods = json.loads((results / "metrics.json").read_text())["methods"]
    assert methods["pixel_cnn"]["zero_shot_kept"] is None and methods["probe"]["zero_shot_kept"]["mean"] == 1.0
    scores = pd.read_parquet(repo / "build/mini/evaluate/scores.parquet")
    assert scores.groupby("method").size().nunique() == 1
    assert set(pd.read_csv(results / "forgetting.csv")["method"]) == {"probe"}
    assert set(pd.read_csv(results / "detection.csv")["method"]) == set(methods) == {"probe", "pixel_cnn"}
    assert "pixel_cnn" in (results / "REPORT.md").read_text()
    compared = run(repo, "dgs", "verify", "results/mini", "results/mini")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    before = snapshot(folder)
    again = run(repo, "dvc", "repro", "--force", "--single-item", "train@pixel_cnn")
    assert again.returncode == 0 and snapshot(folder) == before


def test_adding_one_is_an_entry_of_the_registry() -> None:
    own = [name for name, method in METHODS.items() if method.model is not None]
    assert own == ["pixel_cnn", "content_pixel_cnn", "late_fusion"] and not METHODS["pixel_cnn"].adapters
    for source in (ROOT / "dgs").rglob("*.py"):
        if source.name not in ("pixel_cnn.py", "fusion.py", "registry.py", "style.py"):
            assert "pixel_cnn" not in source.read_text(), source
