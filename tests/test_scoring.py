"""`dgs score --processes N`: several processes give the rows of one, and end together however one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import structured_image
from PIL import Image
from typer.testing import CliRunner

from dgs.cli import app
from dgs.errors import UserError
from dgs.model.scoring import Row, own_device, score_files

NAMES = [*(f"{number:02}.png" for number in range(11)), "\u753b\u50cf \U0001f600.png", "caf\u00e9.png"]
CORRUPT = {"03 cut.png": 300, "07 empty.jpg": 0, "\u58de.png": 20}  # name: bytes that are left


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good, corrupt and unicode-named images, one of them with a name that is not UTF-8."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate([*NAMES, os.fsdecode(b"caf\xe9.png")]):
        structured_image(number, 32, 32).save(folder / name)
    for name, size in CORRUPT.items():
        (folder / name).write_bytes((folder / NAMES[0]).read_bytes()[:size])
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 images: tens of seconds, so that a busy machine does not end before it is interrupted."""
    return links(tmp_path_factory.mktemp("images") / "many", 60_000)


def links(folder: Path, count: int) -> Path:
    folder.mkdir()
    source = folder.parent / f"{folder.name}.jpg"
    structured_image(0, 32, 32).save(source)
    for number in range(count):
        (folder / f"{number:05}.jpg").hardlink_to(source)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dgs.cli", "score", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def scoring(folder: Path, whole: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """`dgs score --processes 2` in a session of its own, rows going to the file `out`; has printed some already."""
    told = command(folder, "--checkpoint", whole, "--json", "--processes", 2)
    # A shell starts what runs in its background deaf to Ctrl-C, and so would be what these tests start there.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with (
        out.open("w") as stdout,
        subprocess.Popen(
            told, stdout=stdout, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
            preexec_fn=hears,  # noqa: PLW1509 (no thread is started before it)
        ) as process,
    ):  # fmt: skip
        try:
            until(lambda: out.stat().st_size > 0)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def workers(parent: int) -> list[int]:
    """The processes that share the files, in the order of their start."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def said(stderr: str) -> list[str]:
    """What people are told: lines of stderr but those of the progress bar."""
    return [line for line in stderr.splitlines() if line.strip() and not line.startswith(("scoring:", "checkpoint "))]


def score(paths: list[Path], whole: Path, processes: int, explain: Path | None = None) -> list[Row]:
    return list(score_files(paths, whole, lambda _: None, 3, explain, processes))


class TestTheRowsAreThoseOfOneProcess:
    def test_in_their_order_every_file_once_with_what_the_model_saw(
        self, images: Path, whole: Path, tmp_path: Path
    ) -> None:
        """In batches of 3, so that each process has several, some of them mixed, and the last is short."""
        paths = [images, images / "gone.png", images / NAMES[0]]
        one, two = (score(paths, whole, count, tmp_path / f"seen by {count}") for count in (1, 2))
        assert [row["path"] for row in two] == [*map(str, sorted(images.iterdir())), *map(str, paths[1:])]
        for a, b in zip(one, two, strict=True):
            assert b == {**a, "probability": pytest.approx(a["probability"], abs=1e-6)} if "probability" in a else a
        assert {Path(row["path"]).name for row in two if "error" in row} == {*CORRUPT, "gone.png"}
        indices = []
        for folder in (tmp_path / "seen by 1", tmp_path / "seen by 2"):
            lines = (folder / "views.jsonl").read_text().splitlines()
            indices.append([(row := json.loads(line))["view"] + row["path"] for line in lines])
        assert indices[0] == indices[1]
        for view in sorted((tmp_path / "seen by 1").glob("*.png")):
            with Image.open(view) as a, Image.open(tmp_path / "seen by 2" / view.name) as b:
                assert np.array_equal(np.array(a), np.array(b))

    @pytest.mark.slow
    def test_to_the_byte_on_the_command_line(self, images: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With one thread in each; 170 files are three batches."""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        arguments = ["score", *[str(images)] * 10, "--checkpoint", str(whole), "--json", "--processes"]
        one, two = (CliRunner().invoke(app, [*arguments, count]) for count in ("1", "2"))
        assert (two.exit_code, two.stdout_bytes) == (one.exit_code, one.stdout_bytes)
        assert one.exit_code == 1 and len(one.stdout.splitlines()) == 170
        assert said(two.stderr) == []
        assert "170image" in two.stderr.splitlines()[-1], "there is one progress bar, over all files"

    @pytest.mark.slow
    def test_more_processes_than_files_are_no_mistake(self, images: Path, whole: Path) -> None:
        (row,) = score([images / NAMES[0]], whole, 2)
        assert "probability" in row

    @pytest.mark.slow
    def test_memory_does_not_grow_with_the_number_of_images(self, whole: Path, tmp_path: Path) -> None:
        """Bytes that the parent and the larger of its workers take at most, until 3,000 and until 30,000 images.

        Not counting mapped files: how much of the libraries' files is in memory is the system's choice.
        """
        highest = {"parent": 0, "worker": 0}
        few: dict[str, int] = {}
        with scoring(links(tmp_path / "many", 30_000), whole, tmp_path / "rows") as process:
            while process.poll() is None:
                for pid in (process.pid, *workers(process.pid)):
                    with suppress(OSError, ValueError):  # it may have ended meanwhile
                        status = Path(f"/proc/{pid}/status").read_text()
                        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
                        who = "parent" if pid == process.pid else "worker"
                        highest[who] = max(highest[who], int(line.split()[1]) * 1024)
                if not few and (tmp_path / "rows").read_bytes().count(b"\n") >= 3_000:
                    few = dict(highest)
                time.sleep(0.05)
            assert process.returncode == 0
        print(f"peaks with 3,000 images {few}, with 30,000 {highest}")
        assert all(highest[who] < few[who] + 30_000_000 for who in highest)


class TestTheyEndTogether:
    @pytest.mark.slow
    @pytest.mark.parametrize("number", [0, 1])
    def test_when_one_is_killed_that_is_one_sentence_and_no_row_before_it_is_wrong(
        self, number: int, many: Path, whole: Path, tmp_path: Path
    ) -> None:
        with scoring(many, whole, tmp_path / "rows") as process:
            started = workers(process.pid)
            assert len(started) == 2
            os.kill(started[number], signal.SIGKILL)
            _, stderr = process.communicate(timeout=300)
        (sentence,) = said(stderr.replace("\r", "\n"))
        assert sentence.startswith(f"dgs: Expected 2 processes to score together, found that process {number} died (")
        assert "killed by signal 9" in sentence and "Run the same command again" in sentence
        assert process.returncode == 2
        until(lambda: not any(map(alive, started)), 60)
        rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
        assert 0 < len(rows) < 20_000
        assert [Path(row["path"]).name for row in rows] == [f"{number:05}.jpg" for number in range(len(rows))]

    @pytest.mark.slow
    def test_ctrl_c_ends_all_as_it_ends_one_without_a_traceback(self, many: Path, whole: Path, tmp_path: Path) -> None:
        with scoring(many, whole, tmp_path / "rows") as process:
            started = workers(process.pid)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to each of them
            _, stderr = process.communicate(timeout=300)
        assert process.returncode not in (0, 1) and "Traceback" not in stderr and "Interrupt" not in stderr
        until(lambda: not any(map(alive, started)), 60)

    @pytest.mark.slow
    def test_when_the_one_that_started_them_is_killed_they_end_too(
        self, many: Path, whole: Path, tmp_path: Path
    ) -> None:
        with scoring(many, whole, tmp_path / "rows") as process:
            started = workers(process.pid)
            process.kill()
            until(lambda: not any(map(alive, started)), 60)

    @pytest.mark.slow
    def test_rows_that_nobody_takes_any_more_hold_up_no_one(self, many: Path, whole: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from dgs.model.scoring import score_files\n"
            "rows = score_files([Path(sys.argv[1])], Path(sys.argv[2]), print, processes=2)\n"
            "if __name__ == '__main__': print(next(rows))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(many), str(whole)], timeout=300, check=False)
        assert done.returncode == 0

    @pytest.mark.slow
    def test_a_mistake_that_a_process_finds_is_the_users_sentence(self, images: Path, checkpoint: Path) -> None:
        (checkpoint / "heads.safetensors").unlink()  # which is found after dgs.json was read
        with pytest.raises(UserError, match=r"^.*heads\.safetensors: no such file\. The checkpoint is damaged:"):
            score([images], checkpoint, 2)


@pytest.mark.parametrize(
    ("cards", "expected"), [(0, ["cpu"] * 3), (1, ["cuda:0"] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])]
)
def test_each_process_has_a_gpu_of_its_own_while_there_are_enough(
    cards: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert [own_device(number) for number in range(3)] == expected
