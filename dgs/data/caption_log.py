"""A caption file that grows batch by batch: whatever kills the process, at most its last line is torn."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dgs.data.captions import read_captions
from dgs.errors import UserError

START = b'{"sha256": "'  # how every line begins that is written here


def is_torn(tail: bytes) -> bool:
    """Whether bytes after a file's last newline are a line of ours that broke off.

    Whole JSON that only lacks its newline is not torn, and neither is what somebody else wrote.
    """
    written = tail.rstrip(b"\0")  # a crashed machine may leave a file longer than what reached the disk
    if not tail or not START.startswith(written[: len(START)]):
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def _mend(file: BinaryIO, path: Path, warn: Callable[[str], None]) -> None:
    file.seek(0)
    content = file.read()
    tail = content[content.rfind(b"\n") + 1 :]
    if is_torn(tail):
        os.ftruncate(file.fileno(), len(content) - len(tail))
        os.fsync(file.fileno())
        warn(f"{path}: cut off a torn last line of {len(tail)} bytes, which a killed run left.")
    elif tail.strip():
        _write(file, b"\n")


def _write(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # usually one write; a nearly full disk takes less than it is given
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


class CaptionLog:
    """An open caption file: what it holds, and a way to add to it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.captions = read_captions(path)

    def append(self, captions: Mapping[str, str]) -> None:
        """Add {sha256: caption}, a line each, in one write that is on the disk when this returns.

        Raises:
            UserError: the disk is full or the like; lines that were added before stay.
        """
        if not captions:
            return
        lines = [json.dumps({"sha256": sha, "caption": caption}) + "\n" for sha, caption in captions.items()]
        try:
            _write(self._file, "".join(lines).encode("ascii"))
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path} ({error.strerror or error}). Mend that and run the same command again: it "
                f"goes on where it stopped."
            ) from None
        self.captions.update(captions)


@contextmanager
def open_log(path: Path, warn: Callable[[str], None]) -> Iterator[CaptionLog]:
    """A caption file to read and add to, made if there is none; only one process has it open at a time.

    A torn last line is cut off, and `warn` told of it. A file that is empty in the end is removed.

    Raises:
        UserError: no caption file that `read_captions` takes, not to be written, or open in another process.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"Expected to write captions to a file, found {path} to be none. Give another --out FILE.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(
            f"Expected to write captions to {path}, found that impossible ({error.strerror or error}). Give another "
            f"--out FILE."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Expected {path} for this run alone, found another one writing to it. Wait for it, or give another "
                f"--out FILE."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            _mend(file, path, warn)
            yield CaptionLog(path, file)
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                with suppress(OSError):
                    path.unlink()
