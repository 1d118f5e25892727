"""Data sets as tables: metadata.jsonl or .csv beside image files, and parquet files with the images in a column."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dgs.data.images import is_image
from dgs.data.layouts import LABELS, REAL, SPLITS, UNNAMED, files_in, label_meant, listed, split_meant
from dgs.data.packs import image_column, open_parquet
from dgs.data.suites import SHARED_REALS
from dgs.data.tree import TABLES
from dgs.errors import UserError, is_text, printable

FIELDS = ("label", "generator", "text", "split")  # that are read, beside the image; label alone must be there
SHOWN = 300  # letters of a table that an error shows
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.parquet")  # train-00000-of-00002.parquet


class Entry(NamedTuple):
    """One image of a table, as written there."""

    where: str  # how an error calls it
    file: str  # relative to the root
    row: int  # in a parquet file; -1 where the file is the image
    fields: Mapping[str, Any]
    columns: Collection[str]
    names: Sequence[str]  # of labels that are numbers, where a file has them


def _numbered(table: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a metadata file, as objects."""
    try:
        with table.open(encoding="utf-8-sig", newline="" if table.suffix == ".csv" else None) as lines:
            if table.suffix == ".csv":
                yield from enumerate(csv.DictReader(lines), 2)
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"Expected {table} to be text in UTF-8, an entry a line; found {error}. Mend it.") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _metadata(root: Path, tables: list[Path]) -> Iterator[Entry]:
    for table in tables:
        for number, fields in _numbered(table):
            where = f"{table}, line {number}"
            name = fields.get("file_name") if isinstance(fields, dict) else None
            if not isinstance(name, str) or not name:
                found = printable(str(fields)[:SHOWN])
                raise UserError(f"{where}: expected a file_name and a label, found {found}. Mend that line.")
            asked = os.path.normpath(table.parent / name.replace("\\", "/"))
            forms = (Path(asked), *(Path(unicodedata.normalize(form, asked)) for form in ("NFC", "NFD")))
            path = next((path for path in forms if path.is_relative_to(root) and _is_file(path)), None)
            if path is None:
                asked = printable(asked[:SHOWN])
                raise UserError(f"{where}: expected an image at {asked}, found none. Mend file_name, or add the file.")
            yield Entry(where, path.relative_to(root).as_posix(), -1, fields, fields, ())


def _label_names(schema: Any) -> list[str]:
    """What the numbers of the column label stand for, where the data set's own description says it."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return list(map(str, about["info"]["features"]["label"]["names"]))
    except (ValueError, RecursionError, LookupError, TypeError):
        return []


def _parquet(root: Path, tables: list[Path]) -> Iterator[Entry]:
    known = next((names for table in tables if (names := _label_names(open_parquet(table).schema_arrow))), [])
    for table in tables:
        opened = open_parquet(table)
        schema = opened.schema_arrow
        image = image_column(schema, table).partition(".")[0]
        file, columns = table.relative_to(root).as_posix(), [name for name in FIELDS if name in schema.names]
        if "label" not in columns:
            raise UserError(f"Expected a column label in {table}, found {', '.join(schema.names)}. Add it.")
        row, names, others = 0, _label_names(schema) or known, {*schema.names} - {image}
        for batch in opened.iter_batches(columns=columns):
            for fields in batch.to_pylist():
                yield Entry(f"{file}, row {row}", file, row, fields, others, names)
                row += 1


def _text(entry: Entry, name: str) -> str:
    """A field as text; "" where it is missing, null or NaN."""
    value = entry.fields.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    if not isinstance(value, (str, int, float)) or not is_text(text):
        raise UserError(f"{entry.where}: expected text as {name}, found {printable(text[:SHOWN])}. Mend it.")
    return text


def _label(entry: Entry) -> tuple[int, str]:
    """0 for real or 1 for fake, and how that was said: by the column, or without one by a folder's name."""
    value = entry.fields.get("label")
    if "label" not in entry.fields:
        value = next(filter(label_meant, Path(entry.file).parts[:-1]), None)
    word = str(int(value) if isinstance(value, bool) else value).removesuffix(".0")
    if word.isdecimal() and int(word) < len(entry.names):
        word = entry.names[int(word)]
    label = int(word) if word in ("0", "1") else LABELS.get(label_meant(word))
    if label is None:
        found = "none" if value is None else printable(word[:SHOWN])
        raise UserError(f"{entry.where}: expected the label 0 or real, 1 or fake, found {found}. Mend it.")
    return label, word


def _split(entry: Entry) -> str:
    """By the column, else by the first folder or the file that is called so, else by a word in their names."""
    given, (*above, name) = _text(entry, "split"), Path(entry.file).parts
    stem = re.sub(r"\d+(-of-\d+)?$", "", Path(name).stem)
    words = {split for part in (*above, name) for split in map(split_meant, re.split(r"[-_. ]", part))} - {""}
    called = next((split for split in map(split_meant, (*above, stem)) if split), "")
    found = split_meant(given) if given else called or ("" if len(words) > 1 else "".join(words))
    if not found:
        raise UserError(
            f"{entry.where}: expected a split ({', '.join(SPLITS)}) in the column split or in the name of the file or "
            f"of its folder, found {printable((given or entry.file)[:SHOWN])}. Add it."
        )
    return found


def _require_both(found: pd.DataFrame) -> None:
    """Fakes of a generator are compared with its own photographs, or with those for all of the split."""
    shared = set(found.loc[found["generator"] == SHARED_REALS, "split"])
    for (split, generator), labels in found.groupby(["split", "generator"])["label"]:
        only = {0: "real", 1: "fake"}[labels.iloc[0]] if labels.nunique() == 1 and generator != SHARED_REALS else ""
        if only == "real" or (only and split not in shared):
            raise UserError(
                f"Expected real and fake images of {printable(str(generator))} in {split}, found {only} ones alone. "
                f"Leave generator empty for photographs that all generators of a split are compared with."
            )


def _incomplete(tables: list[Path]) -> list[str]:
    """A sentence on parts of a file that are not there: 00001-of-00002 without 00000-of-00002."""
    found = ((table, SHARD.fullmatch(table.name)) for table in tables)
    counts = Counter((table.parent / match[1], int(match[3])) for table, match in found if match)
    few = [f"{count} of {total} of {name}" for (name, total), count in counts.items() if count < total]
    return [f"Files are missing, here are {listed(few)}."] if few else []


def read_dataset(root: Path, layout: str) -> tuple[pd.DataFrame, list[str]]:
    """The images of an "imagefolder" or "parquet" root, and how the tables were read, a sentence each.

    Returns:
        columns id, split, generator, label (0 or 1), file (relative to the root), row (-1 where the file is the image),
        text (None where none is given) and words (for a caption).

    Raises:
        UserError: no table, one that cannot be read, an entry without label, split or image, or one image twice.
    """
    files = sorted(files_in(root))
    is_folder = layout == "imagefolder"
    tables = [path for path in files if path.name.endswith(TABLES[layout])]
    if not tables:
        wanted = " or ".join(TABLES[layout])
        raise UserError(
            f"Expected {wanted} in {root} for data.layout: {layout}, found none. Mend data.root or the layout."
        )
    rows, said, columns = [], set[tuple[int, str]](), set[str]()
    for entry in (_metadata if is_folder else _parquet)(root, tables):
        (label, word), generator, text = _label(entry), _text(entry, "generator"), _text(entry, "text").strip()
        said.add((label, word))
        columns.update(entry.columns)
        if label == LABELS[REAL]:
            generator = "" if label_meant(generator) == REAL else generator
        elif generator == SHARED_REALS:
            raise UserError(f"{entry.where}: expected a generator of a fake, found {generator}. Mend it.")
        name = entry.file if entry.row < 0 else f"{entry.file}#{entry.row:07d}"
        rows.append((name, _split(entry), generator, label, entry.file, entry.row, text or None))
    found = pd.DataFrame(rows, columns=["id", "split", "generator", "label", "file", "row", "text"])
    is_shared = (found["label"] == LABELS[REAL]) & ("generator" in columns)
    unnamed = is_shared.map({True: SHARED_REALS, False: UNNAMED})
    found["generator"] = found["generator"].where(found["generator"] != "", unnamed)
    found["words"] = found["generator"]
    if not (again := found.loc[found["id"].duplicated(), "id"]).empty:
        raise UserError(f"Expected each image once in {root}, found {again.iloc[0]} twice. Remove one of the lines.")
    for needed in ("train", "test"):
        if needed not in set(found["split"]):
            raise UserError(f"Expected images of the split {needed} in {root}, found none. Name it in a column split.")
    _require_both(found)
    notes = ["Labels: " + ", ".join(f"{word} is {('real', 'fake')[label]}" for label, word in sorted(said)) + "."]
    if unread := sorted(columns - {*FIELDS, "file_name"}):
        notes.append(f"Columns that are not read: {listed(unread)}.")
    notes += _incomplete(tables)
    others = {path.relative_to(root).as_posix() for path in files if is_image(path)} - set(found["file"])
    if is_folder and others:
        notes.append(f"{len(others)} images are in no table and not read, first {min(others)}.")
    return found, notes
