"""Runs a detector's file on its own: `detector_process.py FILE PATHS.json SCORES.json`; imports nothing of dgs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main(file: str, paths: str, scores: str) -> None:
    """Call `predict` of the file with the paths, and write what it gives as a list of numbers."""
    sys.path[0] = str(Path(file).parent)  # as if the file itself had been run
    found = runpy.run_path(file)
    if not callable(found.get("predict")):
        sys.exit("no function predict(paths)")
    given = found["predict"](json.loads(Path(paths).read_text()))
    Path(scores).write_text(json.dumps([float(score) for score in given]))


if __name__ == "__main__":
    main(*sys.argv[1:])
