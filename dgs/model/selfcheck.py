"""Does a checkpoint score here as where it was trained? It keeps the logits of ten pictures of the benchmark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

import dgs
from dgs.errors import UserError
from dgs.model.detector import Detector

PICTURES = Path(dgs.__file__).parent / "data" / "selfcheck"  # test images of the embedded benchmark: a scene, ten ways
TOLERANCE = 0.02  # of a logit: what processors, versions and precision of the same weights may change
KEY = "selfcheck"  # in dgs.json


def logits_of_pictures(detector: Detector) -> dict[str, float]:
    """A logit for each of the ten pictures, by its name; {} where pictures so small cannot be read."""
    files = sorted(PICTURES.glob("*.png"))
    try:
        views = [detector.view(file) for file in files]
    except UserError:  # smaller than a patch
        return {}
    found = detector.logits(np.stack(views))
    return {file.stem: float(str(logit)) for file, logit in zip(files, found, strict=True)}


def compare(detector: Detector) -> list[dict[str, Any]]:
    """{"picture", "stored", "here", "difference", "same"} of each picture, all logits; same: within `TOLERANCE`.

    Raises:
        UserError: the checkpoint has no logits of these pictures.
    """
    stored = detector.info.get(KEY) or {}
    here = logits_of_pictures(detector)
    if not stored or stored.keys() != here.keys():
        raise UserError(
            f"Expected the checkpoint to have logits of the {len(list(PICTURES.glob('*.png')))} stored pictures, found "
            f"{len(stored)}. It was made before these were kept, from a release, or with patches larger than they are: "
            f"compare `dgs score` of an image of your own instead."
        )
    return [
        {
            "picture": name,
            "stored": stored[name],
            "here": logit,
            "difference": logit - stored[name],
            "same": math.isclose(logit, stored[name], rel_tol=0, abs_tol=TOLERANCE),
        }
        for name, logit in here.items()
    ]
