"""Near duplicates: how close images of the other splits come to a training image, in pixels and for CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minibench.trivial_detectors import Bytes, Floats, Samples, rounded

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
    nearest = _Nearest(len(queries))
    above = dict.fromkeys((*twins, "both"), 0)
    for rows, columns, distance, cosine in _blocks(train, queries):
        nearest.update(rows, columns, distance, cosine)
        if limits:
            close = {"psnr": _psnr(distance) > limits["psnr"], "cosine": cosine > limits["cosine"]}
            close["both"] = close["psnr"] & close["cosine"]
            above = {name: above[name] + int(mask.sum()) for name, mask in close.items()}
    found = {"psnr": _psnr(nearest.distance), "cosine": nearest.cosine}
    closest = int(np.argmin(nearest.distance))
    return {
        "training_images": len(train),
        "queries": len(queries),
        "twins": {"pairs": len(twins["psnr"]), **{name: _quantiles(values) for name, values in twins.items()}},
        "nearest": {name: _quantiles(values) for name, values in found.items()},
        "closest": {
            "query": str(queries.table["id"][closest]),
            "training": str(train.table["id"][int(nearest.place[closest])]),
            "psnr": rounded(found["psnr"][closest]),
        },
        "limits": {name: rounded(value) for name, value in limits.items()} or None,
        "pairs_above": above if limits else None,
    }


@dataclass
class _Nearest:
    """Of every query: the least squared distance, the training image it belongs to, and the largest cosine."""

    count: int

    def __post_init__(self) -> None:
        self.distance = np.full(self.count, np.inf)
        self.place = np.zeros(self.count, np.int64)
        self.cosine = np.full(self.count, -1.0)

    def update(self, rows: slice, columns: slice, distance: Floats, cosine: Floats) -> None:
        best = distance.argmin(1)
        least = distance[np.arange(len(best)), best]
        closer = least < self.distance[rows]
        self.place[rows] = np.where(closer, best + columns.start, self.place[rows])
        self.distance[rows] = np.where(closer, least, self.distance[rows])
        self.cosine[rows] = np.maximum(self.cosine[rows], cosine.max(1))


def _twins(train: Samples) -> dict[str, Floats]:
    places = train.table.groupby("scene", sort=False).indices
    labels = train.labels
    pairs = [(a, b) for a, b in (rows for rows in places.values() if len(rows) == 2) if labels[a] != labels[b]]
    first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    distance = [float(((train.images[a].astype(np.float32) - train.images[b]) ** 2).mean()) for a, b in pairs]
    cosine = (train.features[first] * train.features[second]).sum(1)
    return {"psnr": _psnr(np.array(distance, np.float64)), "cosine": cosine}


def _blocks(train: Samples, queries: Samples) -> Iterator[tuple[slice, slice, Floats, Floats]]:
    """(rows of queries, rows of training, mean squared pixel difference, cosine) block by block."""
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, min(start + BLOCK, len(queries)))
        mine = _flat(queries.images[rows])
        for other in range(0, len(train), BLOCK):
            columns = slice(other, min(other + BLOCK, len(train)))
            theirs = _flat(train.images[columns])
            squares = (mine**2).sum(1)[:, None] + (theirs**2).sum(1)
            distance = (squares - 2 * (mine @ theirs.T)).clamp_min(0) / mine.shape[1]
            yield rows, columns, distance.numpy(), queries.features[rows] @ train.features[columns].T


def _flat(images: Bytes) -> torch.Tensor:
    # About the middle of the range, squares are small and their differences keep their digits.
    return torch.from_numpy(images).flatten(1).float() - 128


def _psnr(distance: Floats) -> Floats:
    """Mean squared differences in levels -> dB; at most 80, which is equal but for one level in a pixel or two."""
    return np.minimum(10 * np.log10(255**2 / np.maximum(distance, 1e-12)), 80.0)


def _quantiles(values: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    named = {f"q{round(100 * q):02d}": rounded(np.quantile(values, q)) for q in QUANTILES}
    return {"min": rounded(values.min()), **named, "max": rounded(values.max())}
