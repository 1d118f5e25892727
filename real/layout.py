"""A folder of pictures as a manifest says, every file verified by its hash: whole, or as it was before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from dgs.atomic import alone, replacing
from dgs.data.images import files_under, is_image_name
from dgs.data.layouts import FEW
from dgs.data.tree import rows_of
from dgs.errors import UserError, printable
from real.repositories import fetch, place_of

CAPTIONS = "captions.jsonl"  # may lie there too
CLONES = "clones"  # beside the folder that is laid out


@dataclass(frozen=True)
class Layout:
    """What `lay_out` did, or found wrong.

    made: the folder was laid out anew. missing: paths of the manifest that no file was found for. different: those that
    only files with another content were found for, {path: that file}. Either is empty when the folder is whole.
    """

    out: Path
    pictures: int
    made: bool = False
    missing: tuple[str, ...] = ()
    different: tuple[tuple[str, str], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Every picture of the manifest lies there with its hash."""
        return not (self.missing or self.different)

    def record(self) -> dict[str, Any]:
        """As plain JSON types, with every missing and different file."""
        found = {"out": str(self.out), "pictures": self.pictures, "whole": self.is_whole, "made": self.made}
        return {**found, "missing": list(self.missing), "different": dict(self.different)}

    def lines(self) -> list[str]:
        """For people: the result, then what is missing and what differs, with a few examples."""
        if self.is_whole:
            return [f"{self.out}: {self.pictures:,} pictures, each with the hash of the manifest"]
        found = []
        for what, names in (
            ("missing", self.missing),
            ("other content", tuple(f"{path} ({file})" for path, file in self.different)),
        ):
            if names:
                more = f" and {len(names) - FEW:,} more" if len(names) > FEW else ""
                named = ", ".join(map(printable, names[:FEW]))
                found.append(f"{what}: {len(names):,} of {self.pictures:,} pictures: {named}{more}")
        return found


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _places(row: Any, folder: Path) -> Iterator[Path]:
    """Where a picture may lie: as in the manifest, with validation still in train/, or in clones side by side."""
    yield folder / row.path
    if row.path.startswith("val/"):
        yield folder / "train" / row.path.removeprefix("val/")
    owner_and_name = place_of(row.repository)
    for clone in (owner_and_name, owner_and_name.rpartition("/")[2]):
        yield folder / clone / row.source_path


def _elsewhere(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Files with a picture's name anywhere in `folder`, by those of their hashes that are wanted."""
    if not wanted:
        return {}
    files = [path for path in files_under([folder]) if is_image_name(path)]
    hashed = ((_sha256(path), path) for path in tqdm(files, "looking by hash", unit="file"))
    return {sha: path for sha, path in hashed if sha in wanted}


def _find(rows: pd.DataFrame, folders: list[Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Of each path of the manifest the file with its content; of others, a file that was expected to have it."""
    found: dict[str, Path] = {}
    other: dict[str, Path] = {}
    for row in tqdm(rows_of(rows), "verifying", len(rows), unit="picture"):
        for place in (place for folder in folders for place in _places(row, folder)):
            if place.is_file():
                if _sha256(place) == row.sha256:
                    found[row.path] = place
                    break
                other.setdefault(row.path, place)
    left = rows[~rows["path"].isin(found)]
    for folder in folders[1:]:
        by_hash = _elsewhere(folder, set(left["sha256"]))
        found |= {row.path: by_hash[row.sha256] for row in rows_of(left) if row.sha256 in by_hash}
    return found, {path: place for path, place in other.items() if path not in found}


def _require_own(rows: pd.DataFrame, out: Path) -> None:
    """Raise UserError if `out` is no folder that may be replaced."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"Expected --out {out} to be a folder, found {there} to be a file. Name another folder.")
    known = {out / path for path in rows["path"]} | {out / CAPTIONS}
    if strangers := [path for path in files_under([out]) if path != out and path not in known]:
        raise UserError(
            f"Expected --out {out} to be new, or laid out from the manifest, found {len(strangers)} other files, first "
            f"{strangers[0]}. Name another folder, or move them out."
        )


def _copy(source: Path, target: Path, sha256: str) -> None:
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"Expected {source} to stay as it is while it is copied, found it changed. Run the same command again."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def lay_out(rows: pd.DataFrame, out: Path, source: Path | None = None, clone: bool = False) -> Layout:
    """Lay out the pictures of a manifest as `out`/<path>, and verify each; a folder that is whole is left alone.

    The folder is replaced as a whole when every picture was found, and only then. What is in it already need not be in
    `source`. Clones stay beside it, so that a run that was broken off goes on with the next repository.

    Args:
        rows: columns path, repository, commit, source_path, sha256.
        source: a folder that has the files: laid out like this one, clones side by side (<owner>/<name> or <name>), or
            anywhere in it under a picture's name.
        clone: fetch the repositories. With neither, `out` is verified alone.

    Raises:
        UserError: `out` holds other files, `source` is no folder, or a repository cannot be fetched.
    """
    out = out.absolute()
    _require_own(rows, out)
    with alone(out.with_name(f".{out.name}.lock"), f"laying out {out}"):
        found, other = _find(rows, [out])
        if len(found) < len(rows) and (source or clone):
            if source is None:
                source = out.parent / CLONES
                lacking = rows[~rows["path"].isin(found)]
                by_repository: Any = lacking.groupby(["repository", "commit"], sort=False)
                for (repository, commit), of_one in by_repository:
                    fetch(repository, commit, list(of_one["source_path"]), source / place_of(repository))
            elif not source.is_dir():
                raise UserError(f"Expected a folder that has the pictures at {source}, found none. Mend the path.")
            found, other = _find(rows, [out, source])
            if len(found) == len(rows):
                with replacing(out) as draft:
                    for row in rows_of(rows):
                        _copy(found[row.path], draft / row.path, row.sha256)
                return Layout(out, len(rows), made=True)
    missing = tuple(path for path in rows["path"] if path not in found and path not in other)
    return Layout(out, len(rows), False, missing, tuple((path, str(place)) for path, place in other.items()))
