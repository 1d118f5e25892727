"""Writing to real disks that are full or read-only, and by real processes that are killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dgs.atomic import alone, explained, replacing, replacing_file
from dgs.errors import UserError


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, or a limit of 1 MB a file where nobody may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted != 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted == 0:
            subprocess.run(["umount", "-l", folder], check=True)


def write_plainly(file: Path) -> None:
    file.write_bytes(b"0" * 2_000_000)


def write_tensors(file: Path) -> None:
    save_file({"a": torch.zeros(500_000)}, file)


@pytest.mark.parametrize("write", [write_plainly, write_tensors])
def test_a_full_disk_is_one_sentence_and_what_was_there_stays(full_disk: Path, write: Callable[[Path], None]) -> None:
    folder, file = full_disk / "seed-0", full_disk / "snapshot.pt"
    for replace, target, name in ((replacing, folder, "weights"), (replacing_file, file, "")):
        with replace(target) as draft:
            (draft / name).write_text("good")
        with pytest.raises(UserError) as caught, replace(target) as draft:
            write(draft / name)
        message = str(caught.value)
        assert message.startswith("Expected to write to ") and "\n" not in message
        assert "no space is left" in message or "larger than this process may write" in message
        assert "Make room" in message and str(folder if replace is replacing else full_disk) in message
        assert (target / name).read_text() == "good"
    assert {path.name for path in full_disk.iterdir()} == {"seed-0", "snapshot.pt"}, (
        "a half-written draft takes no room"
    )


def test_a_read_only_disk_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("root may write everywhere, and may mount nothing here")
    try:
        for writing in (replacing(folder / "new"), replacing_file(folder / "new")):
            with pytest.raises(UserError, match=r"read-only|not permitted"), writing:
                pass
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)
        folder.chmod(0o700)


def test_what_cannot_be_read_elsewhere_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explained(tmp_path / "a" / "b"):
        raise PermissionError(13, "Permission denied", "/elsewhere/image.png")
    with pytest.raises(UserError), explained(tmp_path / "a" / "b"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a" / "b" / "c"))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from dgs.atomic import replacing
    target = Path(sys.argv[1])
    number, kill_at = 0, int(sys.argv[2])

    def watched(event, _):  # every call into the system that has to do with files is a moment to die in
        global number
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "ctypes.dlsym"):
            number += 1
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watched)
    with replacing(target) as draft:
        for name in ("a", "b"):
            (draft / name).write_text("new")
    print(number)
"""


def test_killed_at_any_moment_the_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "seed-0"
    script = tmp_path / "replace.py"
    script.write_text(textwrap.dedent(KILLED))

    def replace(kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(target), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def fill(content: str) -> None:
        with replacing(target) as draft:
            for name in ("a", "b"):
                (draft / name).write_text(content)

    fill("old")
    moments = int(replace(0).stdout)
    assert moments > 8
    seen = set()
    for moment in range(1, moments + 1):
        fill("old")
        assert replace(moment).returncode == -signal.SIGKILL
        found = {path.name: path.read_text() for path in target.iterdir()}
        assert found in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"}), f"killed at {moment} of {moments}"
        seen.add(found["a"])
    assert seen == {"old", "new"}
    fill("old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replace.py", "seed-0"], "no draft is left behind"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_who_may_read_new_files_may_read_all_of_a_folder(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    """safetensors 0.8 makes files that their owner alone may read, whatever the umask is."""
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "out") as draft:
            (draft / "card.md").write_text("card")
            (draft / "clip").mkdir()
            write_tensors(draft / "clip" / "weights.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {"card.md": file, "clip": folder, "weights.safetensors": file}
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder


def test_a_draft_that_is_being_written_is_not_swept_away(tmp_path: Path) -> None:
    target = tmp_path / "seed-0"
    with replacing(target) as slow:
        (slow / "a").write_text("slow")
        with replacing(target) as quick:
            (quick / "a").write_text("quick")
        assert (target / "a").read_text() == "quick"
    assert (target / "a").read_text() == "slow"


class TestAlone:
    def test_a_second_run_is_told_which_process_is_in_its_way(self, tmp_path: Path) -> None:
        lock = tmp_path / "locks" / "train-dgs"
        refused = pytest.raises(UserError, match=rf"stage train-dgs .* process {os.getpid()}; .*kill {os.getpid()}")
        with alone(lock, "stage train-dgs"), refused, alone(lock, "stage train-dgs"):
            pass
        assert list(lock.parent.iterdir()) == []
        with alone(lock, "stage train-dgs"):
            pass

    def test_the_lock_of_a_killed_process_is_in_nobodys_way(self, tmp_path: Path) -> None:
        code = "import os, sys\nfrom pathlib import Path\nfrom dgs.atomic import alone\n"
        code += "with alone(Path(sys.argv[1]), 'it'): os.kill(os.getpid(), 9)"
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
        assert killed.returncode == -signal.SIGKILL and (tmp_path / "lock").exists()
        with alone(tmp_path / "lock", "it"):
            pass
