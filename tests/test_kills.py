"""kill -9 at random moments of real runs: the same command goes on, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from blips import write_random_blip
from conftest import structured_image
from copies import copy_repository, run, snapshot

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("DGS_KILL_SEED", random.SystemRandom().randrange(10_000)))

MAKE_REPRO = ("make", "repro", "CONDA_DEFAULT_ENV=dgs", f"CONDA_PREFIX={sys.prefix}")


@pytest.fixture(scope="module")
def moments() -> random.Random:
    """Draws the moments; another seed in every run, which a failure prints."""
    print(f"to repeat these kills: DGS_KILL_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which all ran to its end: dgs, two seeds, four epochs of six steps, with dropout."""
    folder = copy_repository(tmp_path_factory.mktemp("undisturbed"))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params |= {"methods": ["dgs"], "seeds": [0, 1]}
    params["train"]["batch_size"] = 8
    params["train"]["stage2"]["epochs"] = 4
    params["model"]["lora"]["dropout"] = 0.5
    params["compute"]["snapshot_seconds"] = 0.2
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    done = run(folder, "dvc", "repro")
    assert done.returncode == 0, done.stderr
    return folder


def outputs(repo: Path) -> dict[str, bytes]:
    """All that the pipeline makes, byte for byte; not what it needs on the way."""
    made = {f"results/{name}": data for name, data in snapshot(repo / "results").items()}
    return made | {f"build/{name}": data for name, data in snapshot(repo / "build").items()}


def copy_of(undisturbed: Path, target: Path, but: str = "") -> Path:
    """The same repository with nothing made yet, or with all of build/mini but one folder."""
    made = shutil.ignore_patterns("build", "results", "dvc.lock", "tmp", "cache")
    shutil.copytree(undisturbed, target, ignore=made)
    if but:
        shutil.copytree(undisturbed / "build", target / "build")
        shutil.rmtree(target / "build/mini" / but)
    return target


def start(repo: Path, *command: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=repo, env=env, start_new_session=True, **quiet)


def kill_all(process: subprocess.Popen[bytes]) -> bool:
    """The process and all that it started, at once, as a machine that stops; False: it had ended before."""
    had_ended = process.poll() is not None
    found: list[int] = []
    while (now := descendants(process.pid)) != found:  # stopped first: none may start another behind our back
        found = now
        for each in found:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGSTOP)
    for each in found:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in found))  # DVC takes a zombie for alive
    return not had_ended


def descendants(pid: int) -> list[int]:
    """A process and those below it; kernels and workers have sessions of their own, so that a group is not enough."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += [child for child, parent in parents.items() if parent == found[-1]]
    return found


def test_a_killed_repro_goes_on_and_ends_with_the_same_bytes(
    undisturbed: Path, tmp_path: Path, moments: random.Random
) -> None:
    repo = copy_of(undisturbed, tmp_path / "repo")
    killed = 0
    while killed < 6:
        process = start(repo, *MAKE_REPRO)
        time.sleep(moments.uniform(1, 14))
        if not kill_all(process):
            break
        killed += 1
    assert killed >= 3
    done = run(repo, *MAKE_REPRO)
    assert done.returncode == 0, done.stderr
    assert outputs(repo) == outputs(undisturbed)
    assert (repo / "dvc.lock").read_bytes() == (undisturbed / "dvc.lock").read_bytes()
    print(f"{killed} kills of dvc repro")


@pytest.mark.parametrize(("kills", "stage"), [(3, ["prepare"]), (4, ["train", "--method", "dgs"]), (4, ["evaluate"])])
def test_a_killed_stage_leaves_nothing_half_written_and_the_same_command_ends_it(
    undisturbed: Path, tmp_path: Path, moments: random.Random, kills: int, stage: list[str]
) -> None:
    made_here = "train/dgs" if stage[0] == "train" else stage[0]
    repo = copy_of(undisturbed, tmp_path / "repo", but=made_here)
    whole = outputs(undisturbed)
    for _ in range(kills):
        process = start(repo, "dgs", "stage", *stage)
        time.sleep(moments.uniform(0.5, 9))
        kill_all(process)
        left = {name: data for name, data in outputs(repo).items() if not re.search(r"/(\.|unfinished/|locks/)", name)}
        assert all(whole[name] == data for name, data in left.items()), "what is there is whole"
    done = run(repo, "dgs", "stage", *stage)
    assert done.returncode == 0, done.stderr
    made = outputs(repo)
    assert {name: data for name, data in whole.items() if name in made} == made
    assert (repo / "build/mini" / made_here).is_dir()


def test_a_lock_file_that_dvc_had_no_time_to_write_is_removed(undisturbed: Path) -> None:
    """DVC empties it before it writes it anew, and cannot read an empty one."""
    (undisturbed / ".dvc" / "tmp" / "rwlock").write_text("")
    assert "rwlock" in run(undisturbed, "dvc", "repro").stderr
    done = run(undisturbed, *MAKE_REPRO)
    assert done.returncode == 0, done.stderr
    assert "Running stage" not in done.stdout


def test_a_seed_killed_in_training_goes_on_from_its_snapshot(
    undisturbed: Path, tmp_path: Path, moments: random.Random
) -> None:
    """Killed between its first snapshot and its end, several times, it never starts over."""
    repo = copy_of(undisturbed, tmp_path / "repo", but="train")
    unfinished = repo / "build/mini/unfinished/train-dgs"
    reached: list[int] = []
    for _ in range(3):
        process = start(repo, "dgs", "stage", "train", "--method", "dgs")
        wanted = 1 + moments.randrange(3)  # snapshots after its start
        seen = {file: file.stat().st_mtime_ns for file in unfinished.glob("*/snapshot.pt")}
        patience = time.monotonic() + 120
        while wanted and process.poll() is None and time.monotonic() < patience:
            now = {file: file.stat().st_mtime_ns for file in unfinished.glob("*/snapshot.pt")}
            wanted -= now != seen
            seen = now
            time.sleep(0.01)
        if not kill_all(process):
            break
        files = sorted(unfinished.glob("*/snapshot.pt"))
        reached.append(sum(torch.load(file, weights_only=True)["step"] for file in files))
    assert reached == sorted(reached) and reached[0] > 0, "no kill takes back what was reached"
    done = run(repo, "dgs", "stage", "train", "--method", "dgs")
    assert done.returncode == 0, done.stderr
    trained = snapshot(undisturbed / "build/mini/train")
    assert snapshot(repo / "build/mini/train") == trained
    assert not unfinished.exists()


def test_a_killed_dvc_leaves_no_lock_in_the_way_and_its_stage_says_so(undisturbed: Path, tmp_path: Path) -> None:
    """Only dvc is killed: the stage that it started goes on alone, and a second one waits its turn."""
    repo = copy_of(undisturbed, tmp_path / "repo")
    process = start(repo, "dvc", "repro", "evaluate")
    lock = repo / "build/mini/locks/prepare"
    wait_for(lambda: lock.exists() and lock.read_text().strip() != "")
    process.kill()
    process.wait()
    second = run(repo, "dvc", "repro", "evaluate")
    assert second.returncode != 0
    number = int(lock.read_text())
    assert f"Expected stage prepare to run once at a time, found another run of it, process {number};" in second.stderr
    for pid in descendants(number):
        os.kill(pid, signal.SIGKILL)
    third = run(repo, "dvc", "repro", "prepare")
    assert third.returncode == 0, third.stderr
    assert snapshot(repo / "build/mini/prepare") == snapshot(undisturbed / "build/mini/prepare")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_captioning_goes_on_and_ends_with_the_same_lines(tmp_path: Path, moments: random.Random) -> None:
    photos, blip = tmp_path / "photos", write_random_blip(tmp_path / "blip")
    photos.mkdir()
    for number in range(60):
        structured_image(number).save(photos / f"{number:02d}.png")

    def command(out: str) -> list[str]:
        words = ["caption", photos, "--out", tmp_path / out, "--model", blip, "--batch-size", 1, "--device", "cpu"]
        return [sys.executable, "-m", "dgs.cli", *map(str, words)]

    here = Path(__file__).parent.parent
    subprocess.run(command("whole.jsonl"), cwd=here, check=True, capture_output=True)
    file = tmp_path / "killed.jsonl"

    def size() -> int:
        return file.stat().st_size if file.exists() else 0

    for _ in range(3):
        written = size()
        process = start(here, *command("killed.jsonl"))
        while process.poll() is None and size() == written:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        if not kill_all(process):
            break
    subprocess.run(command("killed.jsonl"), cwd=here, check=True, capture_output=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert lines == whole
