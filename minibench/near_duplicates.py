"""Near duplicates: how close images of the other splits come to a training image, in pixels and for CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dgs.stats import rounded
from minibench.trivial_detectors import Bytes, Floats, Samples

BLOCK = 512  # images on each side of one block of distances: 50 MB of floats
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
TWIN = 0.01  # the quantile of twins above which a pair looks like a duplicate


def near_duplicates(train: Samples, queries: Samples) -> dict[str, Any]:
    """How close the other splits' images come to a training image, in pixels (PSNR, dB) and for CLIP (cosine).

    What a duplicate looks like is read off the twins: scenes that training holds both real and fake. `pairs_above`
    counts (query, training image) pairs beyond the twins' 1 % quantile in PSNR, in cosine and in both; it is None
    without twins. Cosine alone says that two scenes share what captions can name. Memory: a float copy of two blocks.
    """
    twins = _twins(train)
    limits = {name: float(np.quantile(values, TWIN)) for name, values in twins.items() if len(values)}
    above = dict.fromkeys((*twins, "both"), 0)
    parts = []
    for distance, cosine in _distances(train, queries):
        parts.append([distance.min(1), distance.argmin(1), cosine.max(1)])
        if limits:
            close = {"psnr": _psnr(distance) > limits["psnr"], "cosine": cosine > limits["cosine"]}
            close["both"] = close["psnr"] & close["cosine"]
            above = {name: above[name] + int(mask.sum()) for name, mask in close.items()}
    least, place, cosines = (np.concatenate(values) for values in zip(*parts, strict=True))
    found = {"psnr": _psnr(least.astype(np.float64)), "cosine": cosines.astype(np.float64)}
    closest = int(np.argmin(least))
    return {
        "training_images": len(train),
        "queries": len(queries),
        "twins": {"pairs": len(twins["psnr"]), **{name: _quantiles(values) for name, values in twins.items()}},
        "nearest": {name: _quantiles(values) for name, values in found.items()},
        "closest": {
            "query": str(queries.table["id"][closest]),
            "training": str(train.table["id"][int(place[closest])]),
            "psnr": rounded(found["psnr"][closest]),
        },
        "limits": {name: rounded(value) for name, value in limits.items()} or None,
        "pairs_above": above if limits else None,
    }


def _twins(train: Samples) -> dict[str, Floats]:
    places = train.table.groupby("scene", sort=False).indices
    labels = train.labels
    pairs = [(a, b) for a, b in (rows for rows in places.values() if len(rows) == 2) if labels[a] != labels[b]]
    first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    distance = [float(((train.images[a].astype(np.float32) - train.images[b]) ** 2).mean()) for a, b in pairs]
    cosine = (train.features[first] * train.features[second]).sum(1)
    return {"psnr": _psnr(np.array(distance, np.float64)), "cosine": cosine}


def _distances(train: Samples, queries: Samples) -> Iterator[tuple[Floats, Floats]]:
    """(mean squared pixel difference, cosine) of some queries to all training images, (Q, N) each, block by block."""
    for start in range(0, len(queries), BLOCK):
        mine, features = _flat(queries.images[start : start + BLOCK]), queries.features[start : start + BLOCK]
        distances, cosines = [], []
        for other in range(0, len(train), BLOCK):
            theirs = _flat(train.images[other : other + BLOCK])
            squares = (mine**2).sum(1)[:, None] + (theirs**2).sum(1)
            distances.append((squares - 2 * (mine @ theirs.T)).clamp_min(0).numpy() / mine.shape[1])
            cosines.append(features @ train.features[other : other + BLOCK].T)
        yield np.concatenate(distances, 1), np.concatenate(cosines, 1)


def _flat(images: Bytes) -> torch.Tensor:
    # About the middle of the range, squares are small and their differences keep their digits.
    return torch.from_numpy(images).flatten(1).float() - 128


def _psnr(distance: Floats) -> Floats:
    """Mean squared differences in levels -> dB; at most 80, which is equal but for one level in a pixel or two."""
    return np.minimum(10 * np.log10(255**2 / np.maximum(distance, 1e-12)), 80.0)


def _quantiles(values: Floats) -> dict[str, float | None] | None:
    if not len(values):
        return None
    named = {f"q{round(100 * q):02d}": rounded(float(np.quantile(values, q))) for q in QUANTILES}
    return {"min": rounded(values.min()), **named, "max": rounded(values.max())}
