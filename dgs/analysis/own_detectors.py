"""Anybody's detector as one more method: a Python file with `predict(paths)`, on the same images, in the same tables.

The file is run in a process of its own (`detector_process.py`), so that it may import what it likes and change nothing
here. It gets image files, in an order that tells nothing, and no labels. Only files that evaluate.detectors names are
ever run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.special import logit

from dgs.analysis import detector_process
from dgs.analysis.scores import as_scores
from dgs.conditions import NATIVE, parse_condition
from dgs.data.images import decode
from dgs.data.perturbations import perturb
from dgs.data.prepared import Prepared
from dgs.errors import UserError
from dgs.params import Params
from dgs.workspace import find_root

SEED = 0  # as of checkpoints that were trained elsewhere
SUREST = 1e-6  # probabilities nearer to 0 or 1 count as this far from them: logits must be finite


def told(params: Params) -> dict[str, str]:
    """Each detector's file with its hash, for reports."""
    root, files = find_root(), params.evaluate.detectors
    hashes = {name: hashlib.sha256((root / file).read_bytes()).hexdigest() for name, file in files.items()}
    return {name: f"{file} (sha256 {hashes[name]})" for name, file in files.items()}


def scores(prepared: Prepared, params: Params, root: Path) -> Iterator[pd.DataFrame]:
    """Rows of `scores.SCORES` for every detector of evaluate.detectors, on what checkpoints are evaluated on.

    Raises:
        UserError: a file cannot be run, has no `predict`, or predicts something else than a probability an image.
    """
    asked, rows = params.evaluate.robustness, prepared.manifest[prepared.manifest["split"] != "train"]
    for name, file in params.evaluate.detectors.items():
        changed = name in (asked.methods or [name]) and SEED in (asked.seeds or [SEED])
        for condition in (NATIVE, *(asked.conditions if changed else ())):
            own = rows if condition == NATIVE else rows[rows["split"] == "test"]
            table = own.reset_index(drop=True)
            table["method"], table["seed"], table["profile"] = name, SEED, params.profile
            table["condition"], table["applied_to"], table["rho"] = condition, "both", prepared.info["rho"]
            table["logit"] = _logits(name, root / file, own, prepared, condition)
            yield as_scores(table)


def _logits(name: str, file: Path, rows: pd.DataFrame, prepared: Prepared, condition: str) -> NDArray[np.float32]:
    """(N,) of the rows under a condition."""
    order = np.argsort(rows["sha256"].to_numpy(), kind="stable")  # images of a label do not stand together
    with tempfile.TemporaryDirectory(prefix="dgs-detector-") as folder:
        paths = [_write(Path(folder), number, rows.iloc[at], prepared, condition) for number, at in enumerate(order)]
        found = np.empty(len(rows))
        found[order] = _predict(name, file, paths, Path(folder))
    return logit(np.clip(found, SUREST, 1 - SUREST)).astype(np.float32)


def _write(folder: Path, number: int, row: pd.Series, prepared: Prepared, condition: str) -> str:
    """An image as a file: its own bytes, or a changed one's pixels as PNG."""
    content = prepared.source.read(row["file"], row["row"])
    place = folder / f"{number:08d}"
    if condition == NATIVE:
        place.write_bytes(content)
    else:
        changed = perturb(decode(content, row["file"]), parse_condition(condition), row["sha256"])
        Image.fromarray(changed).save(place, "PNG")
    return str(place)


def _predict(name: str, file: Path, paths: list[str], folder: Path) -> NDArray[np.float64]:
    asked, answer = folder / "paths.json", folder / "scores.json"
    asked.write_text(json.dumps(paths))
    call = [sys.executable, detector_process.__file__, str(file.resolve()), str(asked), str(answer)]
    run = subprocess.run(call, cwd=file.resolve().parent, capture_output=True, text=True, check=False)
    where = f"evaluate.detectors.{name} ({file.name})"
    if run.returncode or not answer.exists():
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise UserError(f"Expected {where} to predict {len(paths)} images, found: {last}. Mend the file.")
    found = np.array(json.loads(answer.read_text()), dtype=np.float64)
    if found.shape != (len(paths),):
        raise UserError(f"Expected {where} to give {len(paths)} numbers, one an image, found shape {found.shape}.")
    if not ((found >= 0) & (found <= 1)).all():
        bad = found[~((found >= 0) & (found <= 1))][0]
        raise UserError(
            f"Expected {where} to give probabilities from 0 (real) to 1 (generated), found {bad:g}. Map scores to them."
        )
    return found
