"""Scoring of files: every file under some paths becomes one row, a probability with a verdict or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dgs.data.images import files_under
from dgs.errors import UserError
from dgs.model.detector import BATCH, newest_checkpoint, probability
from dgs.model.scorers import scorers
from dgs.model.verdicts import Row, View, threshold_of
from dgs.stats import percent_text
from dgs.workspace import find_root

INDEX = "views.jsonl"


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False


def _named(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} or the {len(paths) - 1} other paths"


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
    processes: int = 1,
) -> Iterator[Row]:
    """Every file under `paths`, scored or refused; a few batches of views are in memory at a time.

    Args:
        paths: files, or folders: every file in them is tried, whatever its name (but for a dot at its beginning).
        checkpoint: a checkpoint folder; None: the newest of the pipelines here.
        warn: told of what a verdict is worth.
        explain: a new folder for what the model saw of each image, the selected patches or else the whole view.
        processes: that share the files on this machine; the rows and their order are the same.

    Yields:
        {"path", "probability", "verdict"} ("generated" or "real", at the threshold chosen on validation images), or
        {"path", "error"}.

    Raises:
        UserError: none of the paths exists, nothing to score in them, no checkpoint or a damaged one, `explain` in
            one of the paths or not to be written to; one of several processes died.
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
    with scorers(folder, processes, batch_size, with_views=explain is not None) as ready:
        rule, threshold = threshold_of(ready.info, folder)
        explanations = Explanations(explain) if explain is not None else None
        warn(f"checkpoint {folder}: {what_a_verdict_is(ready.info, rule, threshold)}.")
        if ready.params.data.layout == "minibench":
            warn(
                f"warning: {folder} was trained on the embedded 64 px benchmark; its verdicts on photographs mean "
                f"little."
            )
        judged = chain.from_iterable(ready.verdicts(chain([first], files)))
        for row, view in tqdm(judged, desc="scoring", unit="image"):
            if explanations is not None and view is not None:
                explanations.add(row, view)
            yield row
