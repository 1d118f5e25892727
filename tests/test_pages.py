"""The report's pages: what a notebook showed, and nothing that would have to be fetched."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dgs.errors import UserError
from dgs.html_report import write_pages

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository whose profile has two executed notebooks and a report."""
    results = tmp_path / "results" / "mini"
    (results / "notebooks").mkdir(parents=True)
    (results / "figures").mkdir()
    (results / "figures" / "a.png").write_bytes(PIXEL)
    text = "# Evaluate: scores\n\nSee [train](train.ipynb), [code](../dgs/x.py) and [paper](https://example.org/p)."
    script = "<table><tr><td>7</td></tr></table><script src='https://example.org/x.js'></script>"
    outputs = [
        new_output("display_data", data={"text/html": script}),
        new_output("display_data", data={"image/png": base64.b64encode(PIXEL).decode()}),
    ]
    cells = [new_markdown_cell(text), new_code_cell("print(1 < 2)", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), results / "notebooks" / "evaluate.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Train")]), results / "notebooks" / "train-dgs.ipynb")
    (results / "REPORT.md").write_text(
        "# Results\n\n![a](figures/a.png) ![b](../../secret.png) ![c](https://x.org/c.png)\n"
    )
    return tmp_path


def test_an_index_leads_to_every_page_in_the_order_of_the_stages(root: Path) -> None:
    index = write_pages(root, "mini")
    assert index == root / "build/mini/report/index.html"
    found = re.findall(r'<a href="([^"]+)">([^<]+)</a>', index.read_text())
    assert found == [
        ("report.html", "Report: tables and figures"),
        ("train-dgs.html", "Train (dgs)"),
        ("evaluate.html", "Evaluate: scores"),
    ]
    assert all((index.parent / page).exists() for page, _ in found)


def test_a_page_shows_the_notebook_and_fetches_nothing(root: Path) -> None:
    page = (write_pages(root, "mini").parent / "evaluate.html").read_text()
    assert "<h1" in page and "<td>7</td>" in page and "data:image/png;base64," in page
    assert "<script" not in page and "x.js" not in page and "&lt;" in page, (
        "code is shown, scripts are not carried over"
    )
    assert '<a href="train-dgs.html">train</a>' in page, "to a notebook that has a page"
    assert "x.py" not in page and "code" in page, "a path that leads nowhere is text"
    assert '<a href="https://example.org/p">paper</a>' in page, "a link is followed only when it is clicked"


def test_a_report_carries_its_own_pictures_and_no_others(root: Path) -> None:
    (root / "secret.png").write_bytes(PIXEL)
    page = (write_pages(root, "mini").parent / "report.html").read_text()
    assert re.findall(r'<img[^>]*src="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert "../../secret.png" in page and "https://x.org/c.png" in page, "named, not loaded"


def test_without_executed_notebooks_it_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found none\. Run make repro PROFILE=own first"):
        write_pages(tmp_path, "own")
