"""Tokens below the first adapted block, kept on the disk: with fixed views a step then costs the upper blocks alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dgs.data.views import Inputs, Views, batches
from dgs.model import distributed
from dgs.model.backbone import Backbone
from dgs.model.features import in_parts
from dgs.params import Params


class Tokens(Inputs):
    """What `Backbone.lower` makes of views, in their place: item i is ((P + L, W) float32, i), read from `file`."""

    def __init__(self, file: Path, count: int, shape: torch.Size) -> None:
        self.file, self.count, self.shape = file, count, shape
        self.empty = torch.empty(0, *shape)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        size = self.shape.numel()
        # Mapped anew for each item: a map that is kept would be copied whole into a loader process.
        tokens = np.memmap(self.file, np.float32, "r", offset=4 * index * size, shape=tuple(self.shape))
        return torch.from_numpy(np.array(tokens)), index


def token_bytes(backbone: Backbone, sets: Sequence[Views]) -> int:
    """Bytes of the tokens of all views in `sets`, float32."""
    tokens, width = backbone.visual.token_shape
    return sum(map(len, sets)) * tokens * width * 4


def is_worth_keeping(backbone: Backbone, sets: Sequence[Views], params: Params) -> bool:
    """True if blocks below the first adapted one repeat themselves, nothing else needs them, and disk is allowed."""
    repeats = backbone.depth > 0 and backbone.precision is torch.float32
    reads_lower = min(backbone.levels, default=backbone.depth) < backbone.depth
    return repeats and not reads_lower and token_bytes(backbone, sets) <= params.compute.prefix_mb * 1_000_000


def keep_tokens(backbone: Backbone, sets: Sequence[Views], params: Params, folder: Path | None) -> list[Inputs]:
    """Each set of views as the tokens that the first adapted block takes, memory-mapped in `folder`.

    Views stay as they are where that is not possible, or would take more than compute.prefix_mb. Files of an earlier
    run are used; the folder is named by all that they depend on. Processes share the work and the files.
    """
    if folder is None or not is_worth_keeping(backbone, sets, params):
        return list(sets)
    return [_kept(backbone, views, params, folder / f"tokens-{number}.f32") for number, views in enumerate(sets)]


def _kept(backbone: Backbone, views: Views, params: Params, file: Path) -> Tokens:
    draft, first = file.with_suffix(".draft"), distributed.rank() == 0
    kept = Tokens(file, len(views), backbone.visual.token_shape)
    if distributed.broadcast(file.exists()):
        return kept
    if first:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(b"")
    distributed.wait_for_all()
    rows = distributed.shard(range(len(views)))
    loader = batches(views, params.compute.batch_size, params.compute.workers, rows)
    with draft.open("r+b") as opened, backbone.frozen():
        opened.seek(4 * kept.shape.numel() * (rows[0] if rows else 0))
        for images, _ in tqdm(loader, desc="tokens below the adapters", unit="batch", leave=False):
            opened.write(in_parts(backbone.lower, images.to(backbone.mean.device)).cpu().numpy().tobytes())
    distributed.wait_for_all()
    if first:
        draft.rename(file)
    distributed.wait_for_all()
    return kept


def remove_tokens(sets: Sequence[Inputs]) -> None:
    """Free the disk of what `keep_tokens` kept."""
    distributed.wait_for_all()
    for kept in sets:
        if isinstance(kept, Tokens) and distributed.rank() == 0:
            kept.file.unlink(missing_ok=True)
