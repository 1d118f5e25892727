"""The notebooks: short, without logic or outputs, every picture explained; and what they open with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from copies import ROOT

from dgs.errors import UserError
from dgs.params import load_params
from dgs.pipeline import open_stage

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST = 30  # lines of code beside the cell of parameters
PICTURES = ("show(", "bundle(")  # that show one
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"]), "tags": cell["metadata"].get("tags", [])} for cell in cells]


@each
def test_it_opens_with_what_it_needs_makes_and_takes_and_ends_with_where_to_go(path: Path) -> None:
    cells = cells_of(path)
    assert cells[0]["source"].startswith("# ")
    assert all(f"\n**{word}** " in cells[0]["source"] for word in ("Needs", "Makes", "Takes"))
    assert cells[-1]["source"].startswith("**Next:**")


@each
def test_its_code_is_short_and_defines_nothing(path: Path) -> None:
    code = [
        cell["source"] for cell in cells_of(path) if cell["cell_type"] == "code" and "parameters" not in cell["tags"]
    ]
    lines = [line.strip() for source in code for line in source.splitlines()]
    counted = [line for line in lines if line and not line.startswith("#")]
    assert len(counted) <= MOST
    assert not [line for line in counted if line.startswith(("def ", "class ", "while ", "try:"))]


@each
def test_every_picture_is_followed_by_how_to_read_it(path: Path) -> None:
    cells = cells_of(path)
    shown = [number for number, cell in enumerate(cells) if any(word in cell["source"] for word in PICTURES)]
    shown = [number for number in shown if cells[number]["cell_type"] == "code"]
    assert shown
    for number in shown:
        assert sum(cells[number]["source"].count(word) for word in PICTURES) == 1, "one cell, one picture"
        assert cells[number + 1]["cell_type"] == "markdown"
        assert cells[number + 1]["source"].startswith("**Reading "), cells[number]["source"]


@each
def test_it_is_committed_without_outputs(path: Path) -> None:
    for cell in cells_of(path):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


class TestOpening:
    @pytest.fixture(autouse=True)
    def out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DGS_OUT", str(tmp_path))
        return tmp_path

    def test_pictures_of_an_earlier_run_go_and_named_ones_are_written(self, out: Path) -> None:
        names = {"params": load_params("tiny", ROOT), "limit": 3}
        stage = open_stage("prepare", names)
        assert stage.params.data.limit == 3 and stage.prepared is None
        fig = plt.Figure()
        for name in ("old", None):
            stage.show(fig, name)
        assert [path.name for path in out.rglob("*.png")] == ["old.png"]
        open_stage("prepare", names).show(fig, "new")
        assert list(out.rglob("*.png")) == [out / "results" / "tiny" / "figures" / "prepare" / "new.png"]

    def test_what_was_prepared_holds_and_is_told(
        self, out: Path, tiny_prepared: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (out / "build" / "tiny").mkdir(parents=True)
        (out / "build" / "tiny" / "prepare").symlink_to(tiny_prepared)
        params = load_params("tiny", ROOT).replaced({"data.limit": 5})
        stage = open_stage("train", {"params": params, "method": "lora"})
        assert stage.params.data.limit == 16 and capsys.readouterr().out.startswith("NOTE: data.limit stays 16,")
        assert stage.prepared is not None and set(stage.prepared.manifest["split"]) <= {"train", "val", "val_unbiased"}

    def test_what_is_unseen_by_accident_is_said_first_where_it_is_evaluated(
        self, out: Path, tiny_prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (out / "build" / "tiny").mkdir(parents=True)
        (out / "build" / "tiny" / "prepare").symlink_to(tiny_prepared)
        params = load_params("tiny", ROOT)
        open_stage("evaluate", {"params": params})
        assert "CAUTION" not in capsys.readouterr().out
        monkeypatch.setattr("dgs.data.prepared.unseen_by_accident", lambda trained, tested: [f"{len(tested)} tested."])
        open_stage("evaluate", {"params": params})
        assert re.search(r"^CAUTION: [1-9]\d* tested\.$", capsys.readouterr().out, re.M)

    def test_nothing_prepared_is_a_sentence(self, out: Path) -> None:
        params = load_params("tiny", ROOT).model_copy(update={"profile": "nowhere"})
        with pytest.raises(UserError, match=r"Run the stage before it first: .*notebooks/prepare\.ipynb"):
            open_stage("evaluate", {"params": params})
