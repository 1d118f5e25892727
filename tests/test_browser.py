"""What users see in a browser: JupyterLab with the explorer, and the report's pages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium
from copies import run
from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.slow
KEEP = os.environ.get("DGS_SCREENSHOTS")  # a folder to keep the pictures in


def picture(tmp_path: Path, name: str) -> Path:
    folder = Path(KEEP) if KEEP else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.fixture(scope="module")
def repo(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished copy of its own: JupyterLab and `make report` write into it."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("browser") / "repo")


@pytest.fixture
def lab(repo: Path, tmp_path: Path) -> Iterator[str]:
    """`make lab` in a finished copy, on a free port: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "config"
    config.mkdir()
    server = {"port": port, "open_browser": False, "allow_root": True, "ip": "127.0.0.1"}
    (config / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": server, "IdentityProvider": {"token": ""}})
    )
    env = {
        **os.environ, "CONDA_DEFAULT_ENV": "dgs", "CONDA_PREFIX": sys.prefix, "PYTHONPATH": str(repo),
        "JUPYTER_CONFIG_DIR": str(config), "DGS_OUT": str(tmp_path / "scratch"),
    }  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(
            ["make", "lab"], cwd=repo, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for _ in range(120):
                assert process.poll() is None, (tmp_path / "lab.log").read_text()
                try:
                    urllib.request.urlopen(f"{address}/api", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def run_all(page: Page) -> None:
    """Run All Cells, again where the kernel was not up yet: JupyterLab calls it idle before it is connected."""
    for _ in range(5):
        page.wait_for_selector("#jp-main-statusbar >> text=/Idle/", timeout=60_000)
        page.wait_for_timeout(2_000)
        if page.locator(".jp-Dialog").count():
            page.keyboard.press("Escape")  # of a file browser that was asked before the server was ready
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(5_000)
        if page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\d+|\*)\]:")).count():
            return
    raise AssertionError("JupyterLab ran no cell")


def settle(image: Locator) -> None:
    """Wait until the picture stands still: a few moves in a row are a few redraws in a row."""
    before = None
    for _ in range(60):
        if (now := image.get_attribute("src")) == before:
            return
        before = now
        image.page.wait_for_timeout(1_000)
    raise AssertionError("the picture goes on changing")


def test_the_explorer_in_jupyterlab_answers_to_a_slider(repo: Path, lab: str, tmp_path: Path) -> None:
    trained = json.loads((repo / "build/mini/train/dgs/seed-0/dgs.json").read_text())["params"]["train"]
    with chromium() as seen:
        page = seen.page
        page.goto(f"{lab}/lab/tree/explore.ipynb?reset")
        page.wait_for_selector(".jp-Notebook", timeout=90_000)
        run_all(page)
        row = page.locator(".widget-hslider", has_text="lambda").first
        row.wait_for(state="attached", timeout=120_000)  # JupyterLab hides cells that are scrolled out of sight
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
        row.scroll_into_view_if_needed()
        readout, image = row.locator(".widget-readout"), page.locator(".jupyter-widgets.widget-image").first
        before, picture_before = readout.text_content() or "", image.get_attribute("src")
        handle = row.locator(".noUi-handle")
        handle.focus()
        picture(tmp_path, "before.png").write_bytes(page.screenshot())
        for _ in range(5):
            handle.press("ArrowRight")
        page.wait_for_function("([box, old]) => box.src !== old", arg=[image.element_handle(), picture_before])
        after = readout.text_content() or ""
        assert float(after) > float(before) == trained["surgery"]["lam"]
        settle(image)
        for answer in page.get_by_role("button", name="No", exact=True).all():
            answer.click()  # JupyterLab's question about news lies on the picture
        page.wait_for_timeout(1_000)
        page.screenshot(path=picture(tmp_path, "explore.png"))
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert page.get_by_text("Traceback").count() == 0
        assert seen.outside(lab, lab.replace("http", "ws")) == [], "nothing is loaded from outside"


def test_the_report_is_pages_that_load_nothing_from_outside(repo: Path, tmp_path: Path) -> None:
    # Under `make test-slow`, make would add lines about the folders it enters.
    quiet = {"CONDA_DEFAULT_ENV": "dgs", "CONDA_PREFIX": sys.prefix}
    made = run(repo, "make", "--no-print-directory", "report", **quiet)
    assert made.returncode == 0, made.stderr
    index = repo / made.stdout.strip().splitlines()[-1]
    with chromium() as seen:
        page = seen.page
        page.goto(index.as_uri())
        links = [link.get_attribute("href") for link in page.locator("li a").all()]
        notebooks = {path.stem for path in (repo / "results/mini/notebooks").glob("*.ipynb")}
        assert set(links) == {f"{name}.html" for name in (*notebooks, "report")}
        for link in links:
            page.goto(index.as_uri())
            page.click(f"a[href='{link}']")
            page.wait_for_load_state("load")
            broken = page.evaluate("() => [...document.images].filter(i => !i.naturalWidth).length")
            assert broken == 0 and page.locator("h1").count() >= 1
            for other in page.locator("a[href$='.html']").all():
                assert (index.parent / str(other.get_attribute("href"))).exists()
        assert page.locator("img").count() > 0 or len(links) > 1
        page.goto((index.parent / "gradient_angles.html").as_uri())
        assert page.locator("img").count() >= 6
        page.screenshot(path=picture(tmp_path, "report.png"), full_page=True)
        assert seen.outside(index.parent.as_uri()) == []
    for path in index.parent.glob("*.html"):
        assert not re.search(r"<script|<link|@import|src=\"(?!data:)", path.read_text(encoding="utf-8")), path.name
