"""Data sets as tables: metadata.jsonl or .csv beside image files, and parquet files with the images in a column."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dgs.data.images import is_image
from dgs.data.layouts import LABELS, REAL, SPLITS, UNNAMED, files_in, label_meant, split_meant
from dgs.data.packs import image_column, open_parquet
from dgs.data.suites import SHARED_REALS
from dgs.data.tree import TABLES
from dgs.errors import UserError

FIELDS = ("label", "generator", "text", "split")  # that are read, beside the image; label alone must be there


class Entry(NamedTuple):
    """One image of a table, as written there."""

    where: str  # how an error calls it
    file: str  # relative to the root
    row: int  # in a parquet file; -1 where the file is the image
    fields: Mapping[str, Any]
    names: list[str]  # of labels that are numbers, where the file has them


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
    except (ValueError, csv.Error) as error:
        raise UserError(f"Expected {table} to be text in UTF-8, an entry a line; found {error}. Mend it.") from None


def _metadata(root: Path, tables: list[Path]) -> Iterator[Entry]:
    for table in tables:
        for number, fields in _numbered(table):
            where = f"{table}, line {number}"
            name = fields.get("file_name") if isinstance(fields, dict) else None
            if not isinstance(name, str) or not name:
                raise UserError(f"{where}: expected a file_name and a label, found {fields}. Mend that line.")
            asked = os.path.normpath(table.parent / name.replace("\\", "/"))
            forms = (Path(asked), *(Path(unicodedata.normalize(form, asked)) for form in ("NFC", "NFD")))
            path = next((path for path in forms if path.is_relative_to(root) and path.is_file()), None)
            if path is None:
                raise UserError(f"{where}: expected an image at {asked}, found none. Mend file_name, or add the file.")
            yield Entry(where, path.relative_to(root).as_posix(), -1, fields, [])


def _label_names(schema: Any) -> list[str]:
    """What the numbers of the column label stand for, where the data set's own description says it."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return list(map(str, about["info"]["features"]["label"]["names"]))
    except (ValueError, LookupError, TypeError):
        return []


def _parquet(root: Path, tables: list[Path]) -> Iterator[Entry]:
    for table in tables:
        opened = open_parquet(table)
        schema = opened.schema_arrow
        image_column(schema, table)
        file, columns = table.relative_to(root).as_posix(), [name for name in FIELDS if name in schema.names]
        if "label" not in columns:
            raise UserError(f"Expected a column label in {table}, found {', '.join(schema.names)}. Add it.")
        row, names = 0, _label_names(schema)
        for batch in opened.iter_batches(columns=columns):
            for fields in batch.to_pylist():
                yield Entry(f"{file}, row {row}", file, row, fields, names)
                row += 1


def _label(entry: Entry) -> tuple[int, str]:
    """0 for real or 1 for fake, and how that was said."""
    value = entry.fields.get("label")
    if isinstance(value, int) and entry.names:
        value = entry.names[value] if 0 <= value < len(entry.names) else value
    word = str(int(value) if isinstance(value, bool) else value)
    label = int(word) if word in ("0", "1") else LABELS.get(label_meant(word))
    if label is None:
        raise UserError(
            f"{entry.where}: expected the label 0 or real, 1 or fake, found {word if value is not None else 'none'}. "
            f"Mend it."
        )
    return label, word


def _split(entry: Entry) -> str:
    given = entry.fields.get("split")
    words = [str(given)] if given else [word for part in Path(entry.file).parts for word in re.split(r"[-_.]", part)]
    found = next((split for split in map(split_meant, words) if split), "")
    if not found:
        raise UserError(
            f"{entry.where}: expected a split ({', '.join(SPLITS)}) in the column split or in the name of the file or "
            f"of its folder, found {given or entry.file}. Add it."
        )
    return found


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
    rows, said = [], Counter[tuple[int, str]]()
    for entry in (_metadata if is_folder else _parquet)(root, tables):
        (label, word), generator = _label(entry), str(entry.fields.get("generator") or "")
        said[label, word] += 1
        if label == LABELS[REAL] and "generator" in entry.fields and (not generator or label_meant(generator) == REAL):
            generator = SHARED_REALS
        elif generator == SHARED_REALS:
            raise UserError(f"{entry.where}: expected a generator of a fake, found {generator}. Mend it.")
        text = str(entry.fields.get("text") or "").strip() or None
        name = entry.file if entry.row < 0 else f"{entry.file}#{entry.row:07d}"
        rows.append(
            (name, _split(entry), generator or UNNAMED, label, entry.file, entry.row, text, generator or UNNAMED)
        )
    found = pd.DataFrame(rows, columns=["id", "split", "generator", "label", "file", "row", "text", "words"])
    if not (again := found.loc[found["id"].duplicated(), "id"]).empty:
        raise UserError(f"Expected each image once in {root}, found {again.iloc[0]} twice. Remove one of the lines.")
    for needed in ("train", "test"):
        if needed not in set(found["split"]):
            raise UserError(f"Expected images of the split {needed} in {root}, found none. Name it in a column split.")
    notes = ["Labels: " + ", ".join(f"{word} is {('real', 'fake')[label]}" for label, word in sorted(said)) + "."]
    others = {path.relative_to(root).as_posix() for path in files if is_image(path)} - set(found["file"])
    if is_folder and others:
        notes.append(f"{len(others)} images are in no table and not read, first {min(others)}.")
    return found, notes
