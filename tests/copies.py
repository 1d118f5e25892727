"""Copies of this repository for tests that run real pipelines: small parameters, a git history of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def copy_repository(target: Path, tiny: bool = True, git: bool = True) -> Path:
    """Every file git knows or would add, without results and lock.

    tiny: params.yaml becomes the tiny profile's values.
    git: a repository with one commit, as DVC needs it.
    """
    files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(files, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith("results/") and source.name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    if tiny:
        params = yaml.safe_load((target / "params.yaml").read_text())
        overlay = yaml.safe_load((target / "profiles" / "tiny.yaml").read_text())
        for group, values in overlay.items():
            params[group] = {**params[group], **values} if isinstance(values, dict) else values
        params["train"]["stage1"] = {"epochs": 2, "lr": 3.0e-3}
        params["train"]["stage2"] = {"epochs": 1, "lr": None}
        (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    if not git:
        return target
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "--all"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "start"],
    ):
        subprocess.run(command, cwd=target, check=True)
    return target


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a copy, with the copy's own package first; output captured, never raises."""
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Contents of every file under a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
