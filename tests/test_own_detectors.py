"""evaluate.detectors: files with `predict(paths)` as further methods, and the examples of docs/own-detector.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from copies import ROOT
from PIL import Image
from scipy.special import expit

from dgs.analysis.metrics import detection_table
from dgs.analysis.own_detectors import SUREST, scores, told
from dgs.analysis.scores import SCORES
from dgs.conditions import parse_condition
from dgs.data.images import decode
from dgs.data.perturbations import perturb
from dgs.data.prepared import Prepared, load_prepared
from dgs.errors import UserError
from dgs.params import Params, load_params
from dgs.profiles import check_params
from dgs.sources import write_sources

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-detector.md").read_text(), re.S)
# Brightness as a probability: what any test can compute again.
BRIGHT = """
import numpy as np
from PIL import Image

def predict(paths):
    assert not any(word in path for path in paths for word in ("real", "fake", "test", "val"))
    return [np.asarray(Image.open(path).convert("L"), float).mean() / 255 for path in paths]
"""


@pytest.fixture(scope="module")
def prepared(tiny_prepared: Path) -> Prepared:
    return load_prepared(tiny_prepared, ROOT)


def named(tiny: Params, tmp_path: Path, source: str, **evaluate: object) -> Params:
    (tmp_path / "own.py").write_text(source)
    changes = {f"evaluate.{name}": value for name, value in evaluate.items()}
    return tiny.replaced({"evaluate.detectors": {"mine": str(tmp_path / "own.py")}, **changes})


def test_its_rows_are_like_any_methods(tiny: Params, prepared: Prepared, tmp_path: Path) -> None:
    params = named(tiny, tmp_path, BRIGHT)
    (rows,) = scores(prepared, params, tmp_path)
    own = prepared.manifest[prepared.manifest["split"] != "train"]
    assert list(rows.columns) == list(SCORES) and rows["id"].tolist() == own["id"].tolist()
    assert set(rows["method"]) == {"mine"} and set(rows["seed"]) == {0} and set(rows["condition"]) == {"native"}
    assert rows["logit"].nunique() > 5
    table = detection_table(rows, set(prepared.info["seen"]))
    assert set(table["method"]) == {"mine"} and table["balanced_acc"].between(0, 1).all()


def test_each_image_gets_its_own_score_whatever_the_order_and_the_condition(
    tiny: Params, prepared: Prepared, tmp_path: Path
) -> None:
    params = named(tiny, tmp_path, BRIGHT, **{"robustness.conditions": ["noise:8"]})
    native, noisy = scores(prepared, params, tmp_path)
    own = prepared.manifest[prepared.manifest["split"] != "train"].set_index("id")
    for rows in (native, noisy):
        for image in rows.itertuples():
            entry = own.loc[image.id]
            pixels = decode(prepared.source.read(entry["file"], entry["row"]), entry["file"])
            if image.condition != "native":
                pixels = perturb(pixels, parse_condition(image.condition), entry["sha256"])
            bright = np.asarray(Image.fromarray(pixels).convert("L"), float).mean() / 255
            assert expit(image.logit) == pytest.approx(bright, abs=1e-5)
    assert set(noisy["split"]) == {"test"} and set(noisy["condition"]) == {"noise:8"}


def test_certainty_is_a_finite_logit(tiny: Params, prepared: Prepared, tmp_path: Path) -> None:
    (rows,) = scores(prepared, named(tiny, tmp_path, "def predict(paths):\n    return [1.0] * len(paths)"), tmp_path)
    assert np.allclose(expit(rows["logit"].to_numpy(np.float64)), 1 - SUREST)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", r"mine \(own\.py\) to predict \d+ images, found: no function predict\(paths\)\. Mend the file"),
        ("import nonexistent_module", r"found: ModuleNotFoundError: No module named 'nonexistent_module'"),
        ("def predict(paths):\n    raise KeyError('weights')", r"found: KeyError: 'weights'"),
        ("def predict(paths):\n    return [0.5]", r"one an image, found shape \(1,\)"),
        ("def predict(paths):\n    return [3.5] * len(paths)", r"from 0 \(real\) to 1 \(generated\), found 3\.5\. Map"),
        ("def predict(paths):\n    return [float('nan')] * len(paths)", r"found nan"),
        ("def predict(paths):\n    import os; os._exit(7)", r"found: exit code 7"),
    ],
)
def test_what_is_no_detector_is_told_so(
    tiny: Params, prepared: Prepared, tmp_path: Path, source: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(scores(prepared, named(tiny, tmp_path, source), tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dgs": "README.md"}, "that no method or checkpoint has, found dgs"),
        ({"mine": "no/such.py"}, r"Expected a Python file at evaluate\.detectors\.mine = no/such\.py, found none"),
        ({"mine": "README.md"}, "Expected a Python file"),
    ],
)
def test_wrong_names_and_files_are_found_before_any_stage(tiny: Params, given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_params(tiny.replaced({"evaluate.detectors": given}), ROOT)


def test_its_hash_is_in_the_report_and_an_edit_runs_evaluate_again(repo: Path) -> None:
    (repo / "detail.py").write_text(EXAMPLES[0])
    text = (repo / "params.yaml").read_text()
    assert "\n  detectors: {}" in text
    (repo / "params.yaml").write_text(text.replace("\n  detectors: {}", "\n  detectors: {detail: detail.py}"))
    folder = write_sources(None, lambda _: None)
    before = {stage.name: (stage / "code.txt").read_text() for stage in folder.iterdir()}
    (said,) = told(load_params()).values()
    assert said.startswith("detail.py (sha256 ") and said[-66:-1].split()[-1] in before["evaluate"]
    (repo / "detail.py").write_text(EXAMPLES[0] + "\n")
    after = {stage.name: (stage / "code.txt").read_text() for stage in write_sources(None, lambda _: None).iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}


def test_the_first_example_is_a_detector(tiny: Params, prepared: Prepared, tmp_path: Path) -> None:
    (rows,) = scores(prepared, named(tiny, tmp_path, EXAMPLES[0]), tmp_path)
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 10
    assert rows["logit"].between(-13, 13).all() and rows["logit"].nunique() > 5


@pytest.mark.slow
def test_the_timm_probe_learns_from_the_benchmarks_training_images(
    tiny: Params, prepared: Prepared, tmp_path: Path
) -> None:
    source = EXAMPLES[1].replace('"vit_tiny_patch16_224.augreg_in21k", True, 2000', '"test_vit", False, 200')
    assert source != EXAMPLES[1]
    source = re.sub(r"TRAINING = .*", f'TRAINING = "{ROOT}/sample/images-train.parquet"', source)
    (rows,) = scores(prepared, named(tiny, tmp_path, source), tmp_path)
    assert rows["logit"].notna().all() and rows["logit"].nunique() > 5
