"""dgs selfcheck: ten pictures that come with the package, and the logits that a checkpoint keeps of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from clips import reseal
from copies import ROOT
from typer.testing import CliRunner

from dgs.calibration import CalibrationMap, fit_map
from dgs.cli import app
from dgs.errors import UserError
from dgs.model.checkpoint import read_info
from dgs.model.detector import Detector
from dgs.model.onnx_export import export_checkpoint
from dgs.model.runs import train_seed
from dgs.model.selfcheck import PICTURES, TOLERANCE, compare
from dgs.params import Params
from dgs.stats import Scored


@pytest.fixture(scope="module", params=["lora", "pixel_cnn"])
def checkpoint(
    request: pytest.FixtureRequest, tiny: Params, tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As training leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    train_seed(request.param, 0, tiny, ROOT, tiny_prepared, folder, folder / "unfinished")
    return folder / "seed-0"


def test_the_pictures_are_ten_of_the_benchmarks_test_images() -> None:
    images = pd.read_parquet(ROOT / "sample/images-test.parquet").set_index("id")
    files = sorted(PICTURES.glob("*.png"))
    assert len(files) == 10 and len(set(images.loc[[file.stem for file in files], "generator"])) == 10
    for file in files:
        assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(images.loc[file.stem, "image"]).digest()


def test_where_it_was_trained_all_are_the_same(checkpoint: Path) -> None:
    rows = compare(Detector.load(checkpoint))
    assert len(rows) == 10 and all(row["same"] for row in rows)
    assert max(abs(row["difference"]) for row in rows) < 1e-4
    assert len({round(row["stored"], 4) for row in rows}) > 5, "pictures that all score alike would tell nothing"


def test_an_exported_file_is_checked_against_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "a.onnx")
    rows = compare(Detector.load(tmp_path / "a.onnx", engine="onnx"))
    assert len(rows) == 10 and all(row["same"] for row in rows)


def test_the_command_says_which_differ_and_exits_with_1(checkpoint: Path, tmp_path: Path) -> None:
    call = ["selfcheck", "--checkpoint", str(checkpoint)]
    fine = CliRunner().invoke(app, call)
    assert fine.exit_code == 0 and fine.stdout.count("\tsame\n") == 10
    assert f"10 of 10 logits are within {TOLERANCE} of those in training" in fine.stderr

    info = json.loads((checkpoint / "dgs.json").read_text())
    name = sorted(info["selfcheck"])[3]
    info["selfcheck"][name] += 2 * TOLERANCE
    changed = tmp_path / "seed-0"
    changed.mkdir()
    for file in checkpoint.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "dgs.json").write_text(json.dumps(info))
    reseal(changed)
    off = CliRunner().invoke(app, ["selfcheck", "--checkpoint", str(changed), "--json"])
    rows = [json.loads(line) for line in off.stdout.splitlines()]
    assert off.exit_code == 1 and [row["picture"] for row in rows if not row["same"]] == [name]


def test_a_checkpoint_without_their_logits_is_told_so(checkpoint: Path) -> None:
    detector = Detector.load(checkpoint)
    detector.info = {**detector.info, "selfcheck": {}}
    with pytest.raises(UserError, match=r"10 stored pictures, found 0\. .*own instead"):
        compare(detector)


def test_training_keeps_the_map_of_its_validation_images(checkpoint: Path) -> None:
    info = read_info(checkpoint)
    kept = info["validation_logits"]
    assert kept["real"] == sorted(kept["real"]) and kept["fake"] == sorted(kept["fake"])
    assert len(kept["real"]) == info["calibration"]["0.5"]["false_alarm"]["of"]
    images = Scored.of([0] * len(kept["real"]) + [1] * len(kept["fake"]), kept["real"] + kept["fake"])  # type: ignore[arg-type]
    fitted, stored = fit_map(images), info["calibration_map"]
    assert (fitted is None) == (stored is None)
    if fitted is not None:
        again = CalibrationMap.model_validate(stored)
        assert again.kind in ("temperature", "isotonic") and again.reliability["images"] == len(images.truth)
