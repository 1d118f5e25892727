"""`make page` as a user sees it: pictures are dropped in, verdicts come out, and nothing leaves the machine."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Seen, chromium
from copies import ROOT
from PIL import Image
from playwright.sync_api import FilePayload
from test_browser import picture

from dgs.model.detector import Detector
from dgs.model.judge import Promise, judge
from dgs.model.runs import train_seed
from dgs.model.scoring import Upload, score_batches
from dgs.params import Params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny: Params, tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    (out / "build/tiny").mkdir(parents=True)
    (out / "build/tiny/prepare").symlink_to(tiny_prepared)
    train_seed("lora", 0, tiny, ROOT, tiny_prepared, out / "build/tiny/train/lora", out / "unfinished")
    return out


@pytest.fixture(scope="module")
def address(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`make page`, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path_factory.mktemp("config")
    (config / "voila.json").write_text(json.dumps({"Voila": {"port": port, "open_browser": False}}))
    env = {
        **os.environ, "CONDA_DEFAULT_ENV": "dgs", "CONDA_PREFIX": sys.prefix, "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(config), "DGS_OUT": str(trained),
    }  # fmt: skip
    with (config / "log").open("w") as log:
        process = subprocess.Popen(
            ["make", "page"], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for _ in range(240):
                assert process.poll() is None, (config / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/voila/static/voila.js", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


@pytest.fixture
def stopped() -> list[str]:
    """Addresses that the page would ask for elsewhere and the browser does not, by the page's own policy."""
    return []


@pytest.fixture
def seen(address: str, stopped: list[str]) -> Iterator[Seen]:
    with chromium() as found:
        found.page.on("requestfailed", lambda asked: stopped.append(asked.url) if asked.failure == "csp" else None)
        found.page.goto(address)
        found.page.wait_for_selector("text=Choose pictures", timeout=180_000)
        yield found


def png(seed: int, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    rough = np.random.default_rng(seed).integers(0, 256, (side, side, 3)) // (1 + seed % 5)
    Image.fromarray(rough.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def drop(seen: Seen, *pictures: tuple[str, bytes]) -> None:
    files = [FilePayload(name=name, mimeType="image/png", buffer=content) for name, content in pictures]
    with seen.page.expect_file_chooser() as chooser:
        seen.page.get_by_text("Choose pictures").click()
    chooser.value.set_files(files)


def test_a_picture_gets_the_verdict_of_dgs_score_and_nothing_is_asked_for_outside(
    seen: Seen, stopped: list[str], address: str, trained: Path, tmp_path: Path
) -> None:
    pictures = [Upload(f"{seed}.png", png(seed)) for seed in range(6)]
    folder = trained / "build/tiny/train/lora/seed-0"
    detector = Detector.load(folder)
    reader = judge(detector.info, folder, Promise())
    expected = [row for batch in score_batches(detector, reader, pictures, 1, stability=True) for row, _ in batch]
    drop(seen, *pictures)
    seen.page.wait_for_function("document.querySelectorAll('.dgs-card').length == 6", timeout=120_000)
    picture(tmp_path, "page.png").write_bytes(seen.page.screenshot(full_page=True))
    cards = [card.inner_text() for card in seen.page.locator(".dgs-card").all()][::-1]  # the last one is first
    for text, row in zip(cards, expected, strict=True):
        assert text.startswith(row["path"]) and f"Probability {row['probability']:.3f}" in text
        assert re.search(rf"^{row['verdict']}$", text, re.M), text
        assert f"{row['stable']} changed copies" in text and "Nearest training images" in text
    assert {row["verdict"] for row in expected} >= {"unsure"}, "one of them is unstable or between the thresholds"
    socket_of_page = address.replace("http", "ws")
    assert set(seen.outside(address, socket_of_page)) <= set(stopped), "Voilà's own page asks for fonts elsewhere"
    text = seen.page.content()
    assert str(trained) not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text


def test_a_hostile_file_is_one_sentence_and_the_page_goes_on(seen: Seen) -> None:
    drop(seen, ("<img src=x onerror=alert(1)>.png", b"no image"), ("fine.png", png(1)))
    seen.page.wait_for_function("document.querySelectorAll('.dgs-card').length == 2", timeout=120_000)
    bad = seen.page.locator(".dgs-card").last.inner_text()
    assert bad.startswith("<img src=x onerror=alert(1)>.png") and "not an image in a format that is read" in bad
    assert "Traceback" not in seen.page.content() and seen.page.locator(".dgs-card img[src=x]").count() == 0
    assert seen.page.locator(".dgs-verdict").count() == 1


def test_thirty_pictures_move_a_bar_of_progress(seen: Seen) -> None:
    drop(seen, *((f"{seed}.png", png(seed)) for seed in range(30)))
    bar = seen.page.locator(".widget-hprogress")
    bar.wait_for(state="visible", timeout=60_000)
    widths = set()
    for _ in range(600):
        widths.add(seen.page.evaluate("document.querySelector('.progress-bar')?.style.width"))
        if seen.page.locator(".dgs-card").count() == 30:
            break
        seen.page.wait_for_timeout(100)
    assert seen.page.locator(".dgs-card").count() == 30 and len(widths) > 5, widths
