"""Compare reproduced results with committed ones: counts exactly, rates within a tolerance, and say what moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from dgs.errors import UserError

TABLES = {
    "detection.csv": ["rho", "method", "seed", "generator", "seen", "condition", "applied_to", "threshold_rule"],
    "forgetting.csv": ["rho", "method", "seed", "measure"],
    "gradient_angles.csv": ["rho", "method", "seed", "step", "layer", "pair"],
}
COUNTS = ("n_real", "n_fake")
DEGREES = 180.0  # angles are compared as fractions of a half turn
SHOWN = 20  # differences listed for one table


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _metrics(committed: Path, reproduced: Path, tolerance: float) -> Iterator[str]:
    old = dict(_leaves(json.loads((committed / "metrics.json").read_text())))
    new = dict(_leaves(json.loads((reproduced / "metrics.json").read_text())))
    for name in sorted(set(old) ^ set(new)):
        yield f"metrics.json {name}: only in the {'committed' if name in old else 'reproduced'} file"
    for name in sorted(set(old) & set(new)):
        a, b = old[name], new[name]
        numbers = isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool)
        if not abs(a - b) <= tolerance if numbers else a != b:  # so that NaN counts as moved
            yield f"metrics.json {name}: committed {a}, reproduced {b}"


def _table(name: str, keys: list[str], committed: Path, reproduced: Path, tolerance: float) -> Iterator[str]:
    read = {"dtype": {"threshold_rule": str, "seen": str}, "keep_default_na": True}
    old = pd.read_csv(committed / name, **read).set_index(keys)  # type: ignore[call-overload]
    new = pd.read_csv(reproduced / name, **read).set_index(keys)  # type: ignore[call-overload]
    for missing, where in (
        (old.index.difference(new.index), "committed"),
        (new.index.difference(old.index), "reproduced"),
    ):
        if len(missing):
            yield f"{name}: {len(missing)} rows only in the {where} file, first {missing[0]}"
    shared = old.index.intersection(new.index)
    old, new = old.loc[shared].sort_index(), new.loc[shared].sort_index()
    for column in old.columns.intersection(new.columns):
        allowed = 0.0 if column in COUNTS else tolerance * (DEGREES if name.startswith("gradient") else 1.0)
        difference = (old[column] - new[column]).abs()
        moved = difference[(difference > allowed) | (old[column].isna() != new[column].isna())]
        for key in moved.index[:SHOWN]:
            row = ", ".join(str(part) for part in key)
            yield f"{name} [{row}] {column}: committed {old.loc[key, column]}, reproduced {new.loc[key, column]}"
        if len(moved) > SHOWN:
            yield f"{name} {column}: and {len(moved) - SHOWN} rows more"
    for column in sorted(set(old.columns) ^ set(new.columns)):
        yield f"{name}: column {column} only in one file"


def compare_results(committed: Path, reproduced: Path, tolerance: float = 0.01) -> list[str]:
    """What differs between two results folders, one line each; empty where they agree.

    Args:
        committed, reproduced: folders with metrics.json, detection.csv, forgetting.csv, gradient_angles.csv.
        tolerance: for rates, as a fraction (0.01 = 1 point); counts, names and hashes must be equal.

    Raises:
        UserError: a file is missing on either side.
    """
    for folder in (committed, reproduced):
        for name in ("metrics.json", *TABLES):
            if not (folder / name).exists():
                raise UserError(f"Expected {name} in {folder}, found none. Run make repro first.")
    lines = list(_metrics(committed, reproduced, tolerance))
    for name, keys in TABLES.items():
        lines += _table(name, keys, committed, reproduced, tolerance)
    return lines
