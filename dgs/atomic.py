"""Writing so that nothing is ever half there, and what to say when the disk refuses."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dgs.errors import UserError

REFUSALS = {  # what a user can mend by making room or choosing another place
    errno.ENOSPC: "no space is left on it",
    errno.EDQUOT: "the quota on it is used up",
    errno.EFBIG: "a file would grow larger than this process may write",
    errno.EROFS: "it is read-only",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.EEXIST: "a file lies where a folder of its path should",
    errno.ENOTDIR: "a file lies where a folder of its path should",
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux's renameat2


def _refusal(error: BaseException, where: Path) -> int | None:
    """The errno of a failed write below `where`; safetensors puts it into its message alone."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        named = isinstance(error.filename, str | os.PathLike)  # what cannot be read elsewhere is another matter
        return error.errno if not named or Path(error.filename).is_relative_to(where) else None
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1]) if int(found[1]) in REFUSALS else None
    return None


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """In this block a full or read-only disk is one sentence that names `folder`.

    Raises:
        UserError: in place of the OSError; what was whole before the block stays.
    """
    try:
        yield
    except Exception as error:
        number = _refusal(error, folder.parent)
        if number is None:
            raise
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / 1e6
        raise UserError(
            f"Expected to write to {folder}, found that {REFUSALS[number]} ({free:,.0f} MB free). What was whole "
            f"before is kept. Make room, mend the permissions or name another place, then run the same command again: "
            f"it goes on where it can."
        ) from None


def to_disk(path: Path) -> None:
    """A file, or a folder with all in it, out of the machine's cache and onto the disk (fsync)."""
    inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for each in (*inside, path):
        if not each.is_symlink() and (each.is_file() or each.is_dir()):
            _sync(each)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where the system can: at no moment is either missing."""
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None, use_errno=True)
        return library.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0
    return False


def _sweep(folder: Path) -> None:
    """Remove drafts beside `folder` that killed processes left: a living one holds a lock on its own."""
    for draft in folder.parent.glob(f".{folder.name}-*"):
        with suppress(OSError):
            handle = os.open(draft, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(handle)


def _readable(draft: Path) -> None:
    """Let those read a draft who may read new files here: mkdtemp and safetensors 0.8 keep theirs private."""
    usual = draft / ".usual"
    usual.touch()
    read = usual.stat().st_mode & 0o444
    usual.unlink()
    for path in (draft, *draft.rglob("*")):
        mode = path.lstat().st_mode
        wanted = mode | read | (read >> 2 if path.is_dir() else 0)
        if wanted != mode and not path.is_symlink():
            path.chmod(wanted & 0o777)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` only if the block ends well: outputs are whole or absent.

    It is on the disk before it takes its place, in one step where the system can: whatever kills the process or the
    machine, `folder` is the old one or the new one. Drafts that killed processes left are removed.

    Raises:
        UserError: as `explained`.
    """
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        lock = os.open(draft, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield draft
            _readable(draft)
            to_disk(draft)
            if folder.exists() and not _exchange(draft, folder):
                shutil.rmtree(folder)
            if not folder.exists():
                draft.rename(folder)
            to_disk_name(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            os.close(lock)


def to_disk_name(path: Path) -> None:
    """The entry of `path` in its folder onto the disk: a rename that must outlast the machine."""
    with suppress(OSError):
        _sync(path.parent)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """As `replacing`, for a file: write to the path that is given, and it takes the place of `path` in one step."""
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            yield draft
            to_disk(draft)
            draft.replace(path)
            to_disk_name(path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """A block that one process at a time may be in; the lock ends with the process, however it ends.

    Args:
        file: the lock, made if it is not there.
        what: how the error calls what is going on.

    Raises:
        UserError: another process is in it.
    """
    lock = FileLock(file, timeout=0.2, fallback_to_soft=False)  # a wait: a run before may be removing its file
    with explained(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            number = file.read_text("utf-8", "replace").strip() if file.exists() else ""
            number = number or "unknown"
            raise UserError(
                f"Expected {what} to run once at a time, found another run of it, process {number}; a killed command "
                f"may have left it behind. Wait for it, or end it (kill {number}), then run the same command again."
            ) from None
        except OSError as error:
            if error.errno in REFUSALS:
                raise
            # some network file systems have no locks
        file.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is let go: whoever waits looks again
        lock.release()
