"""Scores, the interface between inference and everything later: one row an image, checkpoint and condition."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dgs.errors import UserError

FILE = "scores.parquet"  # in build/<profile>/evaluate and in results/<profile>
SCORES = {
    "id": "str",  # of the image in the manifest
    "sha256": "str",  # of the image file
    "split": "str",  # "test", or validation: "val", and "val_unbiased" where the data has it
    "generator": "str",
    "label": "int64",  # 0 real, 1 fake
    "rho": "float64",  # strength of the shortcut in training; NaN where the data has none
    "condition": "str",  # "native", or a change to test images as in evaluate.robustness.conditions
    "applied_to": "str",  # which images the condition changed: "both"
    "logit": "float32",  # before the sigmoid: called generated where it is above the threshold
    "method": "str",
    "seed": "int64",
    "profile": "str",
}
_SCHEMA = pa.schema([(name, pa.string() if kind == "str" else kind) for name, kind in SCORES.items()])


def as_scores(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the columns of `SCORES`, in order and of their types; others are left out.

    Raises:
        UserError: a column is missing, or its values are not of its type.
    """
    if missing := [name for name in SCORES if name not in table]:
        raise UserError(
            f"Expected scores with the columns {', '.join(SCORES)}; found none called {', '.join(missing)}. "
            f"Evaluate again."
        )
    kinds = {name: kind for name, kind in SCORES.items() if kind != "str"}
    try:
        return table[list(SCORES)].astype(kinds)
    except (TypeError, ValueError) as error:
        raise UserError(f"Expected scores with numbers as label, rho, logit and seed, found {error}.") from None


def write_scores(scores: pd.DataFrame, path: Path) -> None:
    """Write a table of scores; the same rows give the same bytes. Raises UserError as `as_scores` does.

    Rows stay in their order, run after run and the same images in each: that makes the file small, since names are kept
    once each (dictionaries) and what repeats is compressed away (zstd). Logits take 4 bytes each.
    """
    try:
        table = pa.Table.from_pandas(as_scores(scores), schema=_SCHEMA, preserve_index=False)
    except pa.ArrowException as error:
        raise UserError(f"Expected scores with names as text, found {error}.") from None
    names = [name for name, kind in SCORES.items() if kind == "str"]
    bare = table.replace_schema_metadata(None)  # the libraries' versions are no part of the results
    pq.write_table(bare, path, compression="zstd", compression_level=9, use_dictionary=names, store_schema=False)


def read_scores(path: Path) -> pd.DataFrame:
    """A table of scores.

    Raises:
        UserError: no such file, no table, or `as_scores` does.
    """
    if not path.is_file():
        raise UserError(f"Expected scores at {path}, found none. Evaluate first: dvc repro evaluate.")
    try:
        table = pd.read_parquet(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"Expected a table of scores at {path}, found another file ({error}). Evaluate again."
        ) from None
    return as_scores(table)
