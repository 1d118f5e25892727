"""Compare reproduced results with committed ones: counts exactly, rates within a tolerance, and say what moved."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dgs.analysis.verdicts import FILE as VERDICTS
from dgs.errors import UserError
from dgs.model.methods.registry import METHODS
from dgs.tables import NAMES, read_table

SIDES = ("committed", "reproduced")
METRICS, REPORT = "metrics.json", "REPORT.md"
ROUNDS = re.compile(r"^\| `compute\.(device|threads|gemm)` \| `([^`]+)` \|$", re.M)  # rows of the report's settings
TABLES = {
    "detection.csv": ["rho", "method", "seed", "generator", "seen", "condition", "applied_to", "threshold_rule"],
    "forgetting.csv": ["rho", "method", "seed", "measure"],
    "gradient_angles.csv": ["rho", "method", "seed", "step", "layer", "pair"],
    "training.csv": ["rho", "method", "seed", "epoch", "step"],
    VERDICTS: ["rho", "method", "seed", "generator", "seen"],
}
OPTIONAL = ("training.csv", VERDICTS)  # compared where both have it; without the others there is nothing to compare
ASIDE = {  # what other commands keep beside the pipeline's results
    "tuning.csv": "dgs tune",
    "left_out.csv": "dgs left-out",
    "ceiling.csv": "dgs ceiling",
    "text_sides.csv": "python -m real.text_sides",
    "text_alone.csv": "python -m real.text_alone",
    "in_common.csv": "python -m real.in_common",
    "study.csv": "python -m real.study",
}
DETECTORS = "train/"  # real/README.md: trained detectors beside the results that they gave
COUNTS = ("n_real", "n_fake")
DEGREES = 180.0  # angles are compared as fractions of a half turn
KEEP_BITS = "Of compute.*, jobs, workers, keep_mb and snapshot_seconds change no bit of a trained checkpoint."
AT_0_5 = "0.5"  # the one threshold rule that chooses nothing
UNDECIDED = ("ece_before", "brier_before")  # of verdicts.csv: by no map and no threshold
NOT_COMPARED = (
    "Not compared, since last bits decide it: what follows from thresholds and calibration maps that validation images "
    "choose, and tables of networks trained from scratch; their averages in metrics.json are."
)
SHOWN = 20  # differences listed for one table


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What nested objects and lists hold, with its place: ("methods.dgs.curve[0]", 0.5)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _kept(path: str, seeds: Collection[int] | None) -> bool:
    """Whether a leaf of metrics.json is compared: with `seeds`, of a method's metrics the values of these alone."""
    parts = path.split(".")
    if seeds is None or parts[0] != "methods":
        return True
    return "per_seed" in parts and parts[-1] in map(str, seeds)


def _from_scratch(method: object) -> bool:
    """Whether training starts from random weights: it multiplies rounding as it does another seed."""
    known = METHODS.get(str(method))
    return known is not None and known.model is not None


def _steady(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """`table` with NaN in place of the numbers that last bits decide (`NOT_COMPARED`)."""
    values = [column for column in table.columns if column not in (*TABLES[name], *COUNTS)]
    decided = pd.Series(False, table.index)
    if "method" in table:
        decided |= table["method"].map(_from_scratch)
    if "threshold_rule" in table:
        decided |= table["threshold_rule"] != AT_0_5
    chosen = [column for column in values if name == VERDICTS and column not in UNDECIDED]
    steady = table.copy()
    steady[values] = steady[values].mask(decided)
    steady[chosen] = math.nan
    return steady


def _read(name: str, kind: str, folders: Sequence[Path], read: Callable[[Path], Any]) -> tuple[list[Any], list[str]]:
    """Both sides of a file and nothing, or what is wrong with the first that cannot be read."""
    contents = []
    for folder, side in zip(folders, SIDES, strict=True):
        try:
            contents.append(read(folder / name))
        except (ValueError, RecursionError) as error:  # empty, no text, too deep, or lines of unequal length
            return [], [f"{name}: the {side} file is no {kind} ({' '.join(str(error).split()).rstrip('.')})"]
    return contents, []


def _metrics(folders: Sequence[Path], tolerance: float, seeds: Collection[int] | None) -> Iterator[str]:
    def read(path: Path) -> dict[str, Any]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {'null' if content is None else type(content).__name__}")
        return {name: value for name, value in _leaves(content) if _kept(name, seeds)}

    contents, wrong = _read(METRICS, "JSON object", folders, read)
    if wrong:
        yield from wrong
        return
    old, new = contents
    for name in sorted(set(old) ^ set(new)):
        yield f"{METRICS} {name}: only in the {SIDES[name in new]} file"
    for name in sorted(set(old) & set(new)):
        a, b = old[name], new[name]
        numbers = isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool)
        if not abs(a - b) <= tolerance if numbers else a != b:  # so that NaN counts as moved
            yield f"{METRICS} {name}: committed {a}, reproduced {b}"


def _row(key: object) -> str:
    return ", ".join(str(part) for part in key) if isinstance(key, tuple) else str(key)


def _table(
    name: str,
    wanted: list[str],
    folders: Sequence[Path],
    tolerance: float,
    seeds: Collection[int] | None,
    rounded_alike: bool,
) -> Iterator[str]:
    def read(path: Path) -> pd.DataFrame:
        table = read_table(path, {**NAMES, "seen": str})
        table = table if seeds is None or "seed" not in table else table[table["seed"].isin(seeds)]
        return table if rounded_alike else _steady(name, table)

    tables, wrong = _read(name, "table", folders, read)
    if wrong:
        yield from wrong
        return
    old, new = tables
    for column in sorted(set(old.columns) ^ set(new.columns)):
        yield f"{name}: column {column} only in the {SIDES[column in new.columns]} file"
    keys = [key for key in wanted if key in old.columns and key in new.columns]
    if not keys:
        yield f"{name}: expected the columns {', '.join(wanted)} in both files, found none of them"
        return
    old, new = old.set_index(keys), new.set_index(keys)
    repeated = [table.index[table.index.duplicated()].unique() for table in (old, new)]
    for table, several, side in zip((old, new), repeated, SIDES, strict=True):
        if len(several):
            more = f", and {len(several) - 1} other rows more than once" if len(several) > 1 else ""
            yield f"{name} [{_row(several[0])}]: {len(table.loc[[several[0]]])} times in the {side} file{more}"
    for several in repeated:  # which of them to compare nobody can say
        old, new = old[~old.index.isin(several)], new[~new.index.isin(several)]
    yield from _moved(name, old, new, tolerance)


def _moved(name: str, old: pd.DataFrame, new: pd.DataFrame, tolerance: float) -> Iterator[str]:
    """Rows of one table alone, and values that differ; both tables are indexed by the same keys, each key once."""
    for missing, side in zip((old.index.difference(new.index), new.index.difference(old.index)), SIDES, strict=True):
        if len(missing):
            yield f"{name}: {len(missing)} rows only in the {side} file, first {missing[0]}"
    shared = old.index.intersection(new.index)
    old, new = old.loc[shared].sort_index(), new.loc[shared].sort_index()
    for column in old.columns.intersection(new.columns):
        allowed = 0.0 if column in COUNTS else tolerance * (DEGREES if name.startswith("gradient") else 1.0)
        a, b = old[column], new[column]
        if pd.api.types.is_numeric_dtype(a) and pd.api.types.is_numeric_dtype(b):
            other = (a - b).abs() > allowed
        else:
            other = a.notna() & b.notna() & (a.astype(str) != b.astype(str))
        moved = a.index[other | (a.isna() != b.isna())]
        for key in moved[:SHOWN]:
            yield f"{name} [{_row(key)}] {column}: committed {a[key]}, reproduced {b[key]}"
        if len(moved) > SHOWN:
            yield f"{name} {column}: and {len(moved) - SHOWN} rows more"


def _files(folder: Path) -> set[str]:
    """Names of the pipeline's files below `folder`, relative to it, "/" between parts; hidden ones belong to tools."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}
    return {name for name in names - set(ASIDE) if not name.startswith(DETECTORS)}


def _check_seeds(committed: Path, seeds: Collection[int]) -> None:
    table = committed / "detection.csv"
    if not table.is_file():
        return  # that results are missing is said elsewhere
    try:
        found = set(read_table(table)["seed"].unique().tolist())
    except (KeyError, ValueError):
        raise UserError(f"Expected a column seed in {table}, found none. Name another results folder.") from None
    if not seeds or not set(seeds) <= found:
        raise UserError(
            f"Expected some of the seeds {sorted(found)} that {committed} has, found {sorted(seeds)}. Name others."
        )


def rounding_notes(committed: Path, reproduced: Path) -> list[str]:
    """A sentence for each of compute.* that rounds differently in two results folders, and then what does not."""
    sides = [folder / REPORT for folder in (committed, reproduced)]
    if not all(side.is_file() for side in sides):
        return []  # that a file is not there is said elsewhere
    old, new = (dict(ROUNDS.findall(side.read_text(encoding="utf-8", errors="replace"))) for side in sides)
    differ = [
        f"compute.{name} was {old[name]} for the committed results and {new[name]} for the reproduced ones: they "
        f"differ by rounding."
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    return [*differ, KEEP_BITS, NOT_COMPARED] if differ else []


def compare_results(
    committed: Path, reproduced: Path, tolerance: float = 0.01, seeds: Collection[int] | None = None
) -> list[str]:
    """What differs between two results folders, one line each; empty where they agree.

    metrics.json and the tables (`TABLES`) are compared number by number: missing values are equal to each other alone,
    and a row that a table has twice is reported and left out. Of all other files (report, figures, notebooks) only the
    names are compared, since their bytes hold times and fonts; hidden files and folders are passed over, and so are
    tables that commands of their own make (`ASIDE`). Where the reports say that the two were rounded differently
    (`rounding_notes`), numbers that last bits decide are not compared (`NOT_COMPARED`).

    Args:
        committed, reproduced: results folders.
        tolerance: for rates, as a fraction (0.01 = 1 point); for angles, of 180 degrees; for losses, absolute;
            counts, names and hashes must be equal.
        seeds: compare what these made, where a run has fewer seeds than the committed results: their rows and values,
            not means and intervals; None: everything.

    Raises:
        UserError: a folder has no metrics.json, so it holds no results; or one of the two alone has the table of
            detection, forgetting or angles; or `seeds` names one that the committed results lack.
    """
    if seeds is not None:
        _check_seeds(committed, seeds)
    old, new = _files(committed), _files(reproduced)
    for folder, mine, other in ((committed, old, new), (reproduced, new, old)):
        for name in (METRICS, *TABLES):
            if name not in mine and (name == METRICS or (name in other and name not in OPTIONAL)):
                raise UserError(f"Expected {name} in {folder}, found none. Run make repro first.")
    lines = [f"{name}: only in the {SIDES[name in new]} folder" for name in sorted(old ^ new)]
    rounded_alike = not rounding_notes(committed, reproduced)
    lines += _metrics((committed, reproduced), tolerance, seeds)
    for name, keys in TABLES.items():
        if name in old & new:
            lines += _table(name, keys, (committed, reproduced), tolerance, seeds, rounded_alike)
    return lines
