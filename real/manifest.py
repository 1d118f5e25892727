"""The manifest of real pictures: where each comes from, what it is, and which of them share an origin."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

import pandas as pd

from dgs.errors import UserError
from dgs.tables import read_table

FILE = Path(__file__).parent / "manifest.csv"
NEEDED = ("path", "repository", "commit", "source_path", "sha256")  # to lay pictures out
COLUMNS = (*NEEDED, "licence", "label", "generator", "split", "group", "prompt_trained_on")
HASHES = ("commit", "sha256")
VAL_SEED, VAL_SHARE = 0, 0.125  # of the committed split


def read_manifest(file: Path = FILE) -> pd.DataFrame:
    """A manifest as text, one row a picture; `NEEDED` columns at least, in README.md beside this file.

    Raises:
        UserError: no such file, a column is missing, a hash that is none, or a path that is no place in a folder or
            stands there twice.
    """
    try:
        rows = read_table(file, str).fillna("")
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected a manifest of pictures (CSV) at {file}, found none that can be read: {error}."
        ) from None
    if missing := [name for name in NEEDED if name not in rows]:
        raise UserError(f"Expected the columns {', '.join(NEEDED)} in {file}, found no {missing[0]}. Add it.")
    for name in NEEDED:
        fits, what = (_is_hash, "be a hash") if name in HASHES else (_lies_inside, "lie in a folder")
        for value in rows[name]:
            if not fits(value):
                raise UserError(f"Expected every {name} in {file} to {what}, found '{value}'. Mend that line.")
    if len(twice := rows["path"][rows["path"].duplicated()]):
        raise UserError(f"Expected every path once in {file}, found {twice.iloc[0]} twice. Remove one line.")
    return rows


def _is_hash(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def _lies_inside(path: str) -> bool:
    """Neither empty nor absolute, nor out of the folder that it is put in; also of repositories, which clones have."""
    return bool(path) and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def of_manifest(names: pd.Series, manifest: pd.DataFrame, column: str) -> pd.Series:
    """A column's value for each picture, found by its path but for the suffix: matched copies have another.

    A picture that the manifest does not have gets its own name: as a group, it is alone.
    """
    stems = names.map(_stem)
    return stems.map(dict(zip(manifest["path"].map(_stem), manifest[column], strict=True))).fillna(stems)


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def validation_groups(rows: pd.DataFrame, seed: int = VAL_SEED, share: float = VAL_SHARE) -> set[str]:
    """The groups that validation takes from training pictures: whole groups, in each generator and label alike.

    Groups of a generator and label come in the order of sha256("<seed> <least sha256 of the group's pictures>"), and
    are taken until they hold `share` of its pictures. A group that spans several of them is taken in all.

    Args:
        rows: training and validation pictures; columns generator, label, group and sha256.
    """
    least = rows.groupby("group")["sha256"].min()
    order = least.map(lambda sha: hashlib.sha256(f"{seed} {sha}".encode()).hexdigest())
    taken: set[str] = set()
    for _, cell in rows.groupby(["generator", "label"]):
        for group in sorted(cell["group"].unique(), key=lambda name: order[name]):
            if cell["group"].isin(taken).sum() >= share * len(cell):
                break
            taken.add(group)
    return taken
