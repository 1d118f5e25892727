"""`dgs real`: pictures of a manifest laid out from git repositories or a folder, by hash, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from dgs.cli import app
from real import repositories

ROOT = Path(__file__).resolve().parent.parent
# Names as sources have them: with spaces, and with what a pattern of git's would read as something else.
FILES = {"shoes": ["data/Train/a 2024 [1].jpg", "data/Test/#b!.jpg", "data/*c?.jpg"], "photographs": ["d.jpg", "e.jpg"]}


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout


def commit(folder: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "x")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Two repositories, whose pictures are those of their first commit."""
    rows = []
    for name, files in FILES.items():
        folder = tmp_path / "host" / "someone" / name
        folder.mkdir(parents=True)
        git(folder, "init", "-q", "-b", "main")
        git(folder, "config", "uploadpack.allowFilter", "true")
        first = commit(folder, {file: f"{name} {file}" for file in files} | {"large.bin": "not asked for"})
        commit(folder, {files[0]: "changed since"})
        for number, file in enumerate(files):
            path = f"{'val' if number == 1 else 'train'}/{name}/1_fake/{number}.jpg"
            sha = hashlib.sha256(f"{name} {file}".encode()).hexdigest()
            rows.append((path, f"file://{folder}", first, file, sha))
    table = pd.DataFrame(rows, columns=["path", "repository", "commit", "source_path", "sha256"])
    table.to_csv(tmp_path / "manifest.csv", index=False)
    return tmp_path


def command(sources: Path, *arguments: str) -> Result:
    known = ["--manifest", str(sources / "manifest.csv"), "--out", str(sources / "out" / "pictures"), "--json"]
    return CliRunner().invoke(app, ["real", *known, *arguments])


def laid(sources: Path) -> dict[str, str]:
    folder = sources / "out" / "pictures"
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {
    f"{'val' if number == 1 else 'train'}/{name}/1_fake/{number}.jpg": f"{name} {file}"
    for name, files in FILES.items()
    for number, file in enumerate(files)
}


def test_clones_give_the_files_of_that_commit_and_no_others(sources: Path) -> None:
    found = command(sources, "--clone")
    assert (found.exit_code, json.loads(found.stdout)["whole"]) == (0, True), found.stderr
    assert laid(sources) == EXPECTED
    clone = sources / "out" / "clones" / "someone" / "shoes"
    assert {p.name for p in clone.rglob("*") if p.is_file() and ".git" not in p.parts} == {
        Path(file).name for file in FILES["shoes"]
    }
    assert git(clone, "rev-list", "--count", "HEAD").strip() == "1", "no history"


def test_a_second_run_verifies_and_needs_no_source(sources: Path) -> None:
    command(sources, "--clone")
    shutil.rmtree(sources / "host")
    shutil.rmtree(sources / "out" / "clones")
    again = command(sources, "--clone")
    assert (again.exit_code, json.loads(again.stdout)["made"]) == (0, False)
    assert command(sources).exit_code == 0, "no source: only verify"


def test_a_clone_that_is_there_is_not_fetched_again(sources: Path) -> None:
    command(sources, "--clone")
    shutil.rmtree(sources / "out" / "pictures")
    shutil.rmtree(sources / "host")
    assert command(sources, "--clone").exit_code == 0
    assert laid(sources) == EXPECTED


def test_repositories_that_were_fetched_stay_when_the_next_one_fails(sources: Path) -> None:
    (sources / "host" / "someone" / "photographs").rename(sources / "away")
    failed = command(sources, "--clone")
    assert failed.exit_code == 2 and "no public repository is there" in failed.stderr
    assert not (sources / "out" / "pictures").exists()
    shutil.rmtree(sources / "host" / "someone" / "shoes")
    (sources / "away").rename(sources / "host" / "someone" / "photographs")
    assert command(sources, "--clone").exit_code == 0
    assert laid(sources) == EXPECTED


def as_laid_out(sources: Path, folder: Path) -> None:
    for path, content in EXPECTED.items():  # validation still in train, as in the sources' first lay-out
        target = folder / path.replace("val/shoes", "train/shoes").replace("val/photographs", "train/photographs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)


def as_clones(sources: Path, folder: Path) -> None:
    for name in FILES:
        git(sources, "clone", "-q", f"file://{sources}/host/someone/{name}", str(folder / name))
        git(folder / name, "checkout", "-q", "HEAD~1")


def as_archives(sources: Path, folder: Path) -> None:
    as_clones(sources, folder)
    for name in FILES:
        (folder / name).rename(folder / f"{name}-main")


@pytest.mark.parametrize("lie", [as_laid_out, as_clones, as_archives])
def test_a_folder_gives_them_laid_out_as_clones_or_anywhere(sources: Path, lie: object) -> None:
    folder = sources / "given"
    folder.mkdir()
    lie(sources, folder)  # type: ignore[operator]
    found = command(sources, "--from", str(folder))
    assert found.exit_code == 0, found.stderr
    assert laid(sources) == EXPECTED
    before = {path: path.stat().st_ino for path in folder.rglob("*.jpg")}
    assert not {p.stat().st_ino for p in (sources / "out/pictures").rglob("*.jpg")} & set(before.values()), "copies"


def test_all_missing_and_different_files_are_named_and_nothing_is_laid_out(sources: Path) -> None:
    folder = sources / "given"
    as_laid_out(sources, folder)
    (folder / "train/shoes/1_fake/0.jpg").unlink()
    (folder / "train/photographs/1_fake/0.jpg").write_text("another")
    found = command(sources, "--from", str(folder))
    record = json.loads(found.stdout)
    assert (found.exit_code, record["whole"]) == (1, False)
    assert record["missing"] == ["train/shoes/1_fake/0.jpg"]
    assert record["different"] == {"train/photographs/1_fake/0.jpg": str(folder / "train/photographs/1_fake/0.jpg")}
    assert not (sources / "out" / "pictures").exists()


def test_what_changed_in_the_folder_is_found_and_mended(sources: Path) -> None:
    command(sources, "--clone")
    (sources / "out/pictures/train/shoes/1_fake/0.jpg").write_text("edited")
    found = command(sources)
    assert (found.exit_code, list(json.loads(found.stdout)["different"])) == (1, ["train/shoes/1_fake/0.jpg"])
    assert command(sources, "--clone").exit_code == 0
    assert laid(sources) == EXPECTED


def test_a_folder_with_other_files_is_not_replaced(sources: Path) -> None:
    kept = sources / "out" / "pictures" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    found = command(sources, "--clone")
    assert found.exit_code == 2 and "notes.txt" in found.stderr
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/pictures"])
def test_a_file_is_not_replaced_either(sources: Path, out: str) -> None:
    (sources / "notes.txt").write_text("mine")
    found = command(sources, "--clone", "--out", str(sources / out))
    assert found.exit_code == 2 and "notes.txt to be a file" in found.stderr, found.stderr
    assert (sources / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"commit": "0" * 40}, "that commit is not there"),
        ({"repository": "https://localhost:1/someone/x"}, "it cannot be reached"),
        ({"path": "../x.jpg"}, "to lie in a folder, found '../x.jpg'"),
    ],
)
def test_mistakes_are_sentences(sources: Path, change: dict[str, str], sentence: str) -> None:
    table = pd.read_csv(sources / "manifest.csv")
    for name, value in change.items():
        table.loc[table.index[-1], name] = value
    table.to_csv(sources / "manifest.csv", index=False)
    found = command(sources, "--clone")
    assert found.exit_code == 2 and sentence in found.stderr and "Traceback" not in found.stderr


def test_no_git_is_a_sentence(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repositories.shutil, "which", lambda _: None)
    found = command(sources, "--clone")
    assert found.exit_code == 2 and "Expected git" in found.stderr and "--from" in found.stderr


def test_both_sources_are_refused_and_no_folder_is_a_sentence(sources: Path) -> None:
    assert command(sources, "--clone", "--from", str(sources)).exit_code == 2
    assert "Expected a folder that has the pictures" in command(sources, "--from", str(sources / "none")).stderr


def test_a_killed_run_leaves_nothing_half_there(sources: Path) -> None:
    # git waits here, in the second repository, until the run is killed
    slow = sources / "bin" / "git"
    slow.parent.mkdir()
    real_git = shutil.which("git")
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *photographs*add*|*add*photographs*) sleep 60;; esac\nexec {real_git} "$@"\n'
    )
    slow.chmod(0o755)
    known = ["--manifest", str(sources / "manifest.csv"), "--out", str(sources / "out" / "pictures"), "--clone"]
    environment = {**os.environ, "PATH": f"{slow.parent}:{os.environ['PATH']}"}
    run = subprocess.Popen(
        [sys.executable, "-m", "dgs.cli", "real", *known], env=environment, start_new_session=True, cwd=ROOT
    )
    first = sources / "out" / "clones" / "someone" / "shoes"
    while not first.exists() and run.poll() is None:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert first.exists() and not (sources / "out" / "pictures").exists()
    shutil.rmtree(sources / "host" / "someone" / "shoes")
    assert command(sources, "--clone").exit_code == 0, "goes on with the second"
    assert laid(sources) == EXPECTED
