"""Our tables in CSV files, with names as they are: a generator may be called NA, null, 007 or 1e3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

NAMES = dict.fromkeys(
    ["method", "other_method", "generator", "condition", "applied_to", "threshold_rule", "measure", "metric", "profile",
     "data_hash", "candidate", "left_out", "start", "weights", "head", "pair", "layer", "side", "benchmark", "column"],
    str,
)  # fmt: skip  # columns that hold names, whatever these look like


def read_table(path: Path | str, dtype: Mapping[str, Any] | type = NAMES) -> pd.DataFrame:
    """A CSV file in which an empty cell, and nothing else, is a missing value.

    `dtype`: of columns, as pandas takes it; `str`: of all. Raises what pandas does, and OSError.
    """
    return pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=[""])
