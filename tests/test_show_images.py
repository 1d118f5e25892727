"""data.show_images: with false no pixel of an image reaches a figure or an executed notebook."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from copies import ROOT
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from dgs.analysis.figures.images import contact_sheet, mistakes_sheet, patches_figure, portrait
from dgs.analysis.figures.style import png
from dgs.params import DataParams

PAINTS = {"imshow", "figimage", "fromarray", "matshow"}  # what puts pixels into a figure
PAINTERS = {"picture_grid", "_picture"}  # the functions that call it
ELSEWHERE = {"_address", "_write"}  # the page, of what users drop into it (test_score_page.py); files for own detectors
# Colours that no plot has; an image is a quarter of each, but for some grain in its middle.
PATTERN = ((13, 201, 87), (249, 7, 131), (201, 187, 3), (57, 3, 219))
WORTH = 40  # pixels of one of those colours that are no accident


def names(node: ast.AST) -> Iterator[str]:
    """What a piece of code calls or mentions, without the modules it comes from."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute):
            yield inner.attr
        elif isinstance(inner, ast.Name):
            yield inner.id


def functions(paths: list[Path]) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path.relative_to(ROOT).as_posix(), node


def code_of(notebook: str) -> list[str]:
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


class TestOnePlace:
    FIGURES = sorted((ROOT / "dgs/analysis").rglob("*.py")) + sorted((ROOT / "dgs").glob("*.py"))

    def test_two_functions_paint_and_only_figures_that_can_be_withheld_call_them(self) -> None:
        painters, callers = set(), {}
        for path, function in functions(self.FIGURES):
            used = set(names(ast.Module(function.body, [])))
            if used & PAINTS:
                painters.add(function.name)
            if used & PAINTERS:
                decorators = {name for decorator in function.decorator_list for name in names(decorator)}
                callers[path, function.name] = "of_images" in decorators
        assert painters == PAINTERS | ELSEWHERE, "paint through one of them"
        assert all(callers.values()), f"decorate it with of_images: {callers}"
        assert {name for _, name in callers} == {"contact_sheet", "mistakes_sheet", "patches_figure", "portrait"}

    @pytest.mark.parametrize("notebook", ["prepare", "train", "evaluate", "gradient_angles", "explore"])
    def test_notebooks_paint_nothing_themselves(self, notebook: str) -> None:
        used = {name for cell in code_of(notebook) for name in names(ast.parse(cell))}
        assert not used & (PAINTS | PAINTERS | {"PIL", "Image"})

    def test_nothing_else_of_the_data_is_trained_on_again(self) -> None:
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        others = {f"data.{name}" for name in DataParams.model_fields} - {"data.show_images"}
        for stage in ("train", "gradient_angles"):
            assert {name for name in stages[stage]["params"] if name.startswith("data")} == others
        assert all("data" in stages[stage]["params"] for stage in ("prepare", "evaluate"))


def draw(root: Path) -> None:
    """Train and test images of the pattern: fakes are turned by a quarter, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for split, generators in {"train": ("alpha",), "val": ("alpha",), "test": ("alpha", "beta")}.items():
        for generator in generators:
            for label in (0, 1):
                folder = root / split / generator / ("0_real", "1_fake")[label]
                folder.mkdir(parents=True)
                for number in range(6):
                    colours = np.roll(np.array(PATTERN, np.uint8), label, axis=0).reshape(2, 2, 3)
                    pixels = colours.repeat(32, 0).repeat(32, 1)
                    pixels[28:36, 28:36] = rng.integers(0, 256, (8, 8, 3))
                    Image.fromarray(pixels).save(folder / f"{number}.png")


def pictures(content: Any) -> Iterator[bytes]:
    """Every PNG in an executed notebook: outputs, widgets, and pages of HTML."""
    if isinstance(content, dict | list):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from pictures(inner)
    elif isinstance(content, str):
        yield from map(base64.b64decode, re.findall(r"iVBORw0KGgo[A-Za-z0-9+/\n]+=*", content))


def shows_the_pattern(picture: bytes) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    return any(int((pixels == colour).all(axis=2).sum()) > WORTH for colour in PATTERN)


def execute(repo: Path, *notebooks: str) -> list[bytes]:
    """Run notebooks one after another in one kernel, and collect what they show and write."""
    cells = [nbformat.v4.new_code_cell(source) for notebook in notebooks for source in code_of(notebook)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(repo)}}).execute()
    return [*pictures(notebook), *(path.read_bytes() for path in repo.rglob("scratch/results/**/*.png"))]


IMAGE = np.array(PATTERN, np.uint8).reshape(2, 2, 3).repeat(32, 0).repeat(32, 1)
MISTAKES = pd.DataFrame({"group": ["real"], "id": ["a"], "label": [0], "logit": [3.0]})
FIGURES: dict[str, Callable[[bool], Figure]] = {
    "contact sheet": lambda shown: contact_sheet(shown, {"real": [IMAGE]}),
    "mistakes": lambda shown: mistakes_sheet(shown, MISTAKES, [IMAGE]),
    "patches": lambda shown: patches_figure(shown, IMAGE, IMAGE, 8),
    "portrait": lambda shown: portrait(shown, IMAGE, IMAGE, "title", "caption", None, 8),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_withheld_figure_says_why_and_shows_none_of_its_pixels(name: str) -> None:
    shown, withheld = (FIGURES[name](may) for may in (True, False))
    assert shows_the_pattern(png(shown)) and not shows_the_pattern(png(withheld))
    assert "data.show_images" in withheld.texts[0].get_text()


def is_grey(picture: bytes) -> bool:
    """As words on white are, and neither photographs nor plots."""
    return int(np.ptp(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int), axis=2).max()) < 8


@pytest.mark.parametrize("results", sorted({path.parents[1] for path in ROOT.glob("results/real*/notebooks/prepare*")}))
def test_committed_results_show_none_of_others_pictures(results: Path) -> None:
    def prepared(folder: Path) -> list[bytes]:
        notebook = json.loads((folder / "notebooks/prepare.ipynb").read_text())
        return [*pictures(notebook), *(path.read_bytes() for path in (folder / "figures/prepare").iterdir())]

    assert len(prepared(results)) == 4 and all(map(is_grey, prepared(results)))
    assert not any(map(is_grey, prepared(ROOT / "results/mini"))), "or grey says nothing"


@pytest.mark.slow
def test_no_pixel_reaches_a_figure_or_a_notebook_unless_it_may(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repo))
    draw(repo / "pattern")
    params = yaml.safe_load((repo / "params.yaml").read_text())

    def settle(show_images: bool) -> None:
        params["data"] |= {"layout": "folders", "root": "pattern", "rho": None, "show_images": show_images}
        (repo / "params.yaml").write_text(yaml.safe_dump({**params, "methods": ["dgs"]}))

    settle(False)
    withheld = execute(repo, "prepare", "train", "evaluate", "explore")
    assert len(withheld) > 20 and not [picture for picture in withheld if shows_the_pattern(picture)]
    written = repo / "scratch/results/mini/figures/prepare"
    assert {path.name for path in written.iterdir()} == {"images.png", "patches.png"}

    settle(True)  # and what was trained is still good
    shown = execute(repo, "prepare", "explore")
    assert len([picture for picture in shown if shows_the_pattern(picture)]) >= 2 * 2 + 2
