"""Checkpoints on the Hugging Face hub: pushed to and loaded from a server on this machine with the hub's own layout."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from clips import settings
from huggingface_hub import ModelCard
from test_pixel_cnn import random_network
from typer.testing import CliRunner

from dgs.cli import app
from dgs.model.checkpoint import save_checkpoint
from dgs.model.hub import FILES, is_address

pytestmark = pytest.mark.slow  # each loads or pushes in a process of its own
NAME = "someone/a-detector"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as huggingface_hub asks for; what is pushed is kept in `files`."""

    files: dict[str, dict[str, bytes]]

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'someone'}/{said['name']}".replace("someone/someone/", "someone/")
            self.files.setdefault(name, {})
            self._json({"url": f"https://huggingface.co/{name}", "name": name})
        elif path.endswith("/preupload/main"):
            told = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._json({"files": told})
        elif path.endswith("/commit/main"):
            name = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self._commit(name)
            url = f"https://huggingface.co/{name}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "success": True})
        else:
            self._json({})

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if parts[:2] == ["api", "whoami-v2"]:
            return self._json({"name": "someone", "orgs": [], "auth": {}})
        if name not in self.files:
            return self._answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        commit = self._commit(name)
        if parts[0] == "api" and "tree" in parts:
            return self._json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in self.files[name].items()
                ]
            )
        if parts[0] == "api":
            return self._json(
                {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in self.files[name]]}
            )
        content = self.files[name].get("/".join(parts[4:]))
        if content is None:
            return self._answer(404, b'{"error": "Entry not found"}', X_Error_Code="EntryNotFound")
        tag = hashlib.sha1(content).hexdigest()
        return self._answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Its address, and what it holds: {model: {file: bytes}}."""
    held: dict[str, dict[str, bytes]] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Hub,), {"files": held}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", held
    server.shutdown()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    params = settings(Path("no/clip/here"))
    save_checkpoint(tmp_path / "seed-0", random_network(), params, "pixel_cnn", 0, {"val": 0.1}, "d")
    return tmp_path / "seed-0"


def run(tmp_path: Path, endpoint: str, *call: str) -> subprocess.CompletedProcess[str]:
    own = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_of_nobody",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run(call, env={**os.environ, **own}, capture_output=True, text=True, check=False)


LOAD = "import sys; from dgs.model.detector import Detector as D; d = D.load(sys.argv[1]); print(d.score(sys.argv[2:]))"


def test_what_is_pushed_loads_elsewhere_and_scores_alike(
    tmp_path: Path, checkpoint: Path, hub: tuple[str, dict[str, dict[str, bytes]]]
) -> None:
    endpoint, held = hub
    (checkpoint / "notes.py").write_text("print('no part of a checkpoint')")
    pushed = run(tmp_path, endpoint, sys.executable, "-m", "dgs.cli", "push", str(checkpoint), NAME)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"hf://{NAME}"
    assert set(held[NAME]) == {"dgs.json", "SHA256SUMS", "README.md", "model.safetensors"}
    assert held[NAME]["dgs.json"] == (checkpoint / "dgs.json").read_bytes()

    picture = str(next(Path(__file__).parents[1].glob("dgs/data/selfcheck/*.png")))
    here, there = (
        run(tmp_path, endpoint, sys.executable, "-c", LOAD, where, picture)
        for where in (str(checkpoint), f"hf://{NAME}")
    )
    assert there.returncode == 0, there.stderr
    assert here.stdout == there.stdout and here.stdout.startswith("[0.")
    scored = run(
        tmp_path, endpoint, sys.executable, "-m", "dgs.cli", "score", picture, "--checkpoint", f"hf://{NAME}", "--json"
    )
    assert scored.returncode == 0 and json.loads(scored.stdout)["probability"] == pytest.approx(
        float(there.stdout.strip()[1:-2]), abs=1e-6
    )


def test_a_changed_file_is_refused_on_both_ways(
    tmp_path: Path, checkpoint: Path, hub: tuple[str, dict[str, dict[str, bytes]]]
) -> None:
    endpoint, held = hub
    assert run(tmp_path, endpoint, sys.executable, "-m", "dgs.cli", "push", str(checkpoint), NAME).returncode == 0
    held[NAME]["model.safetensors"] = held[NAME]["model.safetensors"][:-1] + b"\0"
    loaded = run(tmp_path, endpoint, sys.executable, "-c", LOAD, f"hf://{NAME}")
    assert loaded.returncode and "its content is not what was saved" in loaded.stderr
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(bytes(content))
    pushed = run(tmp_path, endpoint, sys.executable, "-m", "dgs.cli", "push", str(checkpoint), "someone/other")
    assert pushed.returncode == 2 and "its content is not what was saved" in pushed.stderr
    assert "Traceback" not in pushed.stderr and "someone/other" not in held


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://someone/absent", "Cannot load hf:/"),
        ("hf://a/b/c", "Expected hf://OWNER/NAME"),
        ("hf://someone/empty", "found no dgs.json there"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    tmp_path: Path, hub: tuple[str, dict[str, dict[str, bytes]]], address: str, message: str
) -> None:
    endpoint, held = hub
    held["someone/empty"] = {"README.md": b"nothing"}
    call = (sys.executable, "-m", "dgs.cli", "score", str(Path(__file__)), "--checkpoint", address)
    found = run(tmp_path, endpoint, *call)
    assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr


def test_addresses_are_told_from_paths() -> None:
    assert is_address("hf://a/b") and is_address(Path("hf://a/b"))
    assert not is_address("build/hf/x") and not is_address(Path("/hf:/a"))


def test_no_code_goes_up_or_comes_down() -> None:
    assert not any(pattern.endswith((".py", "*", ".bin", ".pt")) and pattern != "clip/*" for pattern in FILES)


def test_the_card_is_one_of_the_hubs(checkpoint: Path) -> None:
    """By the hub's own reader of cards; the names are those of its documented metadata."""
    card = ModelCard.load(checkpoint / "README.md")
    known = {"license", "library_name", "pipeline_tag", "tags", "base_model", "license_name", "license_link"}
    data = card.data.to_dict()
    assert set(data) <= known and data["pipeline_tag"] == "image-classification"
    assert data["license"] in ("mit", "other") and all(isinstance(tag, str) for tag in data["tags"])
    assert card.text.startswith("# pixel_cnn, seed 0") or "# pixel_cnn, seed 0" in card.text


def test_a_folder_that_is_no_checkpoint_is_not_pushed(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(tmp_path), NAME])
    assert result.exit_code == 2 and "Expected a checkpoint folder" in result.output
