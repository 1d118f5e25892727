"""Scoring of files: every file under some paths becomes one row, a probability with a verdict or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from dgs.analysis.intervals import percent_text
from dgs.data.ahead import ahead
from dgs.data.images import files_under
from dgs.errors import UserError
from dgs.model.card import deciding_rule
from dgs.model.checkpoint import damaged
from dgs.model.detector import AHEAD, BATCH, Detector, newest_checkpoint, probability
from dgs.workspace import find_root

Row = dict[str, Any]
View = NDArray[np.uint8]
INDEX = "views.jsonl"


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False


def _named(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} or the {len(paths) - 1} other paths"


def threshold_of(detector: Detector, folder: Path) -> tuple[str, float]:
    """The rule that verdicts follow and its threshold on the logit: "val" where a checkpoint has it.

    Raises:
        UserError: `folder`'s checkpoint has no threshold.
    """
    thresholds = detector.info["thresholds"]
    if not thresholds:
        raise damaged(folder / "dgs.json", "expected a threshold, found none")
    rule = deciding_rule(thresholds)
    return rule, thresholds[rule]


def what_a_verdict_is(info: dict[str, Any], rule: str, threshold: float) -> str:
    """One sentence for people: what is called generated, and how often that was wrong on validation images."""
    above = f"'generated' above a probability of {float(probability(np.array(threshold))):.3f}"
    measured = info.get("calibration", {}).get(rule)
    if measured is None:
        return f"{above}, not calibrated on any images: how often that is a false alarm is not known"
    alarm, caught = measured["false_alarm"], measured["caught"]
    there = (
        "the best threshold on its validation images, where"
        if rule == "val"
        else ("not calibrated on any images; on its validation images")
    )
    return (
        f"{above}, {there} it raised a false alarm on {percent_text(alarm['rate'])} % "
        f"[{percent_text(alarm['low'])}, {percent_text(alarm['high'])}] of {alarm['of']} real images and caught "
        f"{percent_text(caught['rate'])} % of {caught['of']} generated ones; expect worse on images of other sources"
    )


class Explanations:
    """A folder with what the model saw of each image, and an index of which is which.

    Args:
        folder: new, or empty.

    Raises:
        UserError: there is something in it, or it cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            empty = not any(folder.iterdir())
        except OSError as error:
            raise self._cannot_write(error) from None
        if not empty:
            raise UserError(f"Expected --explain to name a new or an empty folder, found {folder}. Choose another.")

    def add(self, row: Row, view: View) -> None:
        """Save one view as a PNG, and its row with the PNG's name in the index."""
        self._count += 1
        name = f"{self._count:06d}.png"
        try:
            Image.fromarray(view).save(self.folder / name)
            with (self.folder / INDEX).open("a", encoding="ascii") as index:
                index.write(json.dumps({"view": name, **row}) + "\n")
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"Cannot write to {self.folder} ({error.strerror or error}). Choose another folder.")


def _require_apart(folder: Path, paths: list[Path]) -> None:
    # A view saved in a folder that is being scored would be scored in its turn.
    for path in filter(_is_there, paths):
        if folder.resolve().is_relative_to(path.resolve()):
            raise UserError(f"Expected --explain to lie outside of what is scored, found {folder} in {path}. Move it.")


def score_files(
    paths: Iterable[Path],
    checkpoint: Path | None,
    warn: Callable[[str], None],
    batch_size: int = BATCH,
    explain: Path | None = None,
) -> Iterator[Row]:
    """Every file under `paths`, scored or refused; a few batches of views are in memory at a time.

    Images are decoded in threads while the tower works on those before.

    Args:
        paths: files, or folders: every file in them is tried, whatever its name (but for a dot at its beginning).
        checkpoint: a checkpoint folder; None: the newest trained here.
        warn: told of what a verdict is worth.
        explain: a new folder for what the model saw of each image, the selected patches or else the whole view.

    Yields:
        {"path", "probability", "verdict"} ("generated" or "real", at the threshold chosen on validation images), or
        {"path", "error"}.

    Raises:
        UserError: none of the paths exists, nothing to score in them, no checkpoint or a damaged one, `explain` in
            one of the paths or not to be written to.
    """
    paths = list(paths)
    if paths and not any(map(_is_there, paths)):
        raise UserError(f"Expected a file or folder at {_named(paths)}, found none.")
    if explain is not None:
        _require_apart(explain, paths)
    files = files_under(paths)
    first = next(files, None)
    if first is None:
        raise UserError(f"Expected a file to score in {_named(paths) if paths else 'no path'}, found none.")
    folder = checkpoint or newest_checkpoint(find_root())
    detector = Detector.load(folder)
    rule, threshold = threshold_of(detector, folder)
    explanations = Explanations(explain) if explain is not None else None
    warn(f"checkpoint {folder}: {what_a_verdict_is(detector.info, rule, threshold)}.")
    if detector.params.data.layout == "minibench":
        warn(f"warning: {folder} was trained on the embedded 64 px benchmark; its verdicts on photographs mean little.")

    def view(path: Path) -> tuple[Path, View | str]:
        try:
            return path, detector.view(path)
        except UserError as error:
            return path, str(error)  # not the error itself, whose traceback keeps the image in memory

    def flush() -> Iterator[Row]:
        views = [view for _, view in pending if not isinstance(view, str)]
        logits = detector.logits(np.stack(views)).astype(np.float64) if views else np.zeros(0)
        scored = iter(zip(logits > threshold, probability(logits), strict=True))
        for path, view in pending:
            if isinstance(view, str):
                yield {"path": str(path), "error": view}
                continue
            generated, p = next(scored)
            row = {"path": str(path), "probability": float(p), "verdict": "generated" if generated else "real"}
            if explanations is not None:
                explanations.add(row, view)
            yield row
        pending.clear()

    pending: list[tuple[Path, View | str]] = []
    found = ahead(view, chain([first], files), AHEAD * batch_size)
    for item in tqdm(found, desc="scoring", unit="image"):
        pending.append(item)
        if len(pending) == batch_size:
            yield from flush()
    yield from flush()
