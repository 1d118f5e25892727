"""Verdicts: files in, a row of each out, a batch at a time; what `dgs score` runs, in one process or in several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgs.data.ahead import ahead
from dgs.errors import UserError
from dgs.model.checkpoint import deciding_rule as threshold_of  # noqa: F401
from dgs.model.detector import AHEAD, Detector, probability

Row = dict[str, Any]
View = NDArray[np.uint8]
Judged = tuple[Row, View | None]  # a row, and what the model saw where it saw anything


def verdicts(
    detector: Detector, threshold: float, files: Iterable[Path], size: int, threads: int | None = None
) -> Iterator[list[Judged]]:
    """Every file, scored or refused, in order and `size` at a time; the last batch may be shorter.

    Images are decoded in threads while the tower works on those before, at most `AHEAD` batches ahead.

    Args:
        threshold: on the logit; above it is "generated".
        files: taken one by one, never more than `AHEAD` batches and one file before a batch is yielded.
        threads: that decode; None: one a core.

    Yields:
        ({"path", "probability", "verdict"}, view) or ({"path", "error"}, None) of each file.
    """

    def view(path: Path) -> tuple[Path, View | str]:
        try:
            return path, detector.view(path)
        except UserError as error:
            return path, str(error)  # not the error itself, whose traceback keeps the image in memory

    def judged(batch: list[tuple[Path, View | str]]) -> Iterator[Judged]:
        views = [view for _, view in batch if not isinstance(view, str)]
        logits = detector.logits(np.stack(views)).astype(np.float64) if views else np.zeros(0)
        scored = iter(zip(logits > threshold, probability(logits), strict=True))
        for path, view in batch:
            if isinstance(view, str):
                yield {"path": str(path), "error": view}, None
                continue
            generated, p = next(scored)
            yield {"path": str(path), "probability": float(p), "verdict": "generated" if generated else "real"}, view

    pending: list[tuple[Path, View | str]] = []
    for item in ahead(view, files, AHEAD * size, threads):
        pending.append(item)
        if len(pending) == size:
            yield list(judged(pending))
            pending = []
    if pending:
        yield list(judged(pending))
