"""Views: what a model sees of an image, a pure function of (image hash, seed, epoch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgs.conditions import Condition
from dgs.data.images import decode, fit
from dgs.data.manifest import ImageSource
from dgs.data.patches import patch_indices, stitch
from dgs.data.perturbations import blur, perturb, resize
from dgs.params import ImageParams, Params

EVALUATION = -1  # the epoch of the view used at test time: no flip, one fixed patch order


def view_rng(sha256: str, seed: int, epoch: int) -> np.random.Generator:
    """The random numbers of one view."""
    return np.random.default_rng(np.random.SeedSequence([int(sha256[:16], 16), seed, epoch + 1]))


def make_view(
    image: NDArray[np.uint8],
    sha256: str,
    params: ImageParams,
    seed: int,
    epoch: int,
    patches: NDArray[np.int32] | None = None,
) -> NDArray[np.uint8]:
    """One view: patch selection or fit, then (training only) a horizontal flip with probability 1/2.

    Args:
        image: (H, W, 3) uint8.
        sha256: of the image file; with `seed` and `epoch` it fixes the view.
        epoch: EVALUATION for test time, where the view does not depend on `seed`.
        patches: indices from `patches.patch_indices`; required where params.patches.enabled.

    Returns:
        (S, S, 3) uint8, S = params.image_size.
    """
    rng = view_rng(sha256, 0 if epoch == EVALUATION else seed, epoch)
    if params.patches.enabled:
        if patches is None:
            raise ValueError("patch selection is on but no patch indices were given")
        order = int(rng.integers(2**63))
        view = stitch(image, patches, params.patches.size, params.patches.count, order)
    else:
        view = fit(image, params.image_size, params.data.fit)
    if epoch != EVALUATION and rng.random() < 0.5:
        view = np.ascontiguousarray(view[:, ::-1])
    return view


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


class Inputs(Dataset[tuple[Tensor, int]]):
    """What a tower takes: a set of numbered items, item i is (what stands for image i, i)."""

    empty: Tensor  # a batch of no items

    def __len__(self) -> int:
        raise NotImplementedError


class Views(Inputs):
    """The views of a manifest's rows in one epoch: item i is ((3, S, S) uint8, i).

    keep: every view is made once and then stays in memory. It is exact, since a view is a pure function.
    condition: a change to the decoded images, before a view is made of them; patches are then selected anew.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        source: ImageSource,
        params: Params,
        seed: int = 0,
        epoch: int = EVALUATION,
        patches: Mapping[str, NDArray[np.int32]] | None = None,
        keep: bool = False,
        condition: Condition | None = None,
    ) -> None:
        self.files = rows["file"].tolist()
        self.rows = rows["row"].tolist()
        self.hashes = rows["sha256"].tolist()
        self.source, self.params, self.seed, self.epoch, self.patches = source, params, seed, epoch, patches
        self.condition = condition
        self.empty = torch.empty(0, 3, params.image_size, params.image_size, dtype=torch.uint8)
        self._kept: dict[int, Tensor] | None = {} if keep else None

    @property
    def identity(self) -> str:
        """A hash of which images are in it, in which views; parameters are not in it."""
        return _digest([self.hashes, self.seed, self.epoch, self.condition and self.condition.name])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._kept is None:
            return self._make(index), index
        if index not in self._kept:
            self._kept[index] = self._make(index)
        return self._kept[index], index

    def _make(self, index: int) -> Tensor:
        sha = self.hashes[index]
        image = decode(self.source.read(self.files[index], self.rows[index]), self.files[index])
        if self.condition is not None:
            image = perturb(image, self.condition, sha)
        view = make_view(image, sha, self.params, self.seed, self.epoch, self._patches_of(image, sha))
        return torch.from_numpy(view).permute(2, 0, 1)

    def _patches_of(self, image: NDArray[np.uint8], sha: str) -> NDArray[np.int32] | None:
        if self.patches is None:
            return None
        if self.condition is None:
            return self.patches[sha]
        # A detector gets the changed image alone, so it would choose by that one's entropies.
        return patch_indices(image, self.params.patches.size, self.params.patches.count)


class Contents(Inputs):
    """Views whose traces are destroyed: what is shown stays, how it was made goes.

    Shrunk to a share `side` of their sides and enlarged again (`dgs.data.perturbations.resize`); or `blurred` as far:
    by a Gaussian of half the width that a pixel of the shrunk picture has, 1 / (2 side) px.
    """

    def __init__(self, views: Views, side: float, blurred: bool = False) -> None:
        self.views, self.side, self.blurred, self.empty = views, side, blurred, views.empty

    @property
    def identity(self) -> str:
        """A hash of the views' own and of how traces are destroyed."""
        return _digest([self.views.identity, self.side, self.blurred])

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        view, index = self.views[index]
        image = view.permute(1, 2, 0).numpy()
        content = blur(image, 0.5 / self.side) if self.blurred else resize(image, self.side)
        return torch.from_numpy(np.ascontiguousarray(content)).permute(2, 0, 1), index


def identity_of(sets: Sequence[Views], levels: Sequence[int]) -> str:
    """A hash of several sets of views and of the levels that a tower tells of."""
    return _digest([[views.identity for views in sets], list(levels)])


def worth_keeping(images: int, params: Params) -> bool:
    """Whether so many views fit into compute.keep_mb; loader processes would each keep their own, so not with those."""
    return params.compute.workers == 0 and images * 3 * params.image_size**2 <= params.compute.keep_mb * 1_000_000


def batch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the training images: the same for every method."""
    return [int(i) for i in np.random.default_rng([seed, epoch, 7]).permutation(size)]


def batches(
    views: Inputs,
    batch_size: int,
    workers: int = 0,
    order: Sequence[int] | None = None,
    part: Callable[[Sequence[int]], Sequence[int]] = lambda batch: batch,
) -> DataLoader[Any]:
    """Batches of views, in `order` or as they stand; the last one may be smaller.

    part: what to make of each batch's indices; a part may be empty, and is a batch of no images then.
    """
    chosen = range(len(views)) if order is None else order
    return DataLoader(
        views,
        batch_sampler=[list(part(chosen[start : start + batch_size])) for start in range(0, len(chosen), batch_size)],
        num_workers=workers,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        collate_fn=partial(_collate, views.empty),
        generator=torch.Generator(),  # or each loader would draw from torch's own, and shift the dropout masks
    )


def _collate(empty: Tensor, items: list[tuple[Tensor, int]]) -> list[Tensor]:
    if not items:
        return [empty, torch.empty(0, dtype=torch.int64)]
    return [torch.stack([image for image, _ in items]), torch.tensor([index for _, index in items])]
