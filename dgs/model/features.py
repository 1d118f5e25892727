"""Features and logits of a set of views, in batches; several processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dgs.data.views import Inputs, batches
from dgs.errors import UserError
from dgs.model import distributed
from dgs.model.backbone import Backbone
from dgs.model.classifier import Classifier
from dgs.model.clip import Clip
from dgs.params import Params

ON_CPU = 32  # images at a time through a model on the CPU: what more leave between layers does not fit into caches


def in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`function` of (B, ...) images row by row, (B, D); on the CPU `ON_CPU` of them at a time."""
    size = ON_CPU if images.device.type == "cpu" else max(1, len(images))
    return torch.cat([function(part) for part in images.split(size)])


@torch.no_grad()
def over_views(
    function: Callable[[Tensor], Tensor], width: int, device: torch.device, views: Inputs, params: Params, label: str
) -> Tensor:
    """`function` of batches of views, (B, ...) to (B, width), put together: (N, width); processes share the work."""
    shard = distributed.shard(range(len(views)))
    mine = batches(views, params.compute.batch_size, params.compute.workers, shard)
    parts = [in_parts(function, images.to(device)) for images, _ in tqdm(mine, desc=label, unit="batch", leave=False)]
    return distributed.all_gather_rows(torch.cat(parts) if parts else torch.zeros(0, width, device=device))


def extract_features(backbone: Backbone, views: Inputs, params: Params, label: str) -> Tensor:
    """Features of views in the tower as it stands: (N, D) float32 on its device."""
    device = backbone.mean.device
    return over_views(lambda images: backbone(images).float(), backbone.widths[1], device, views, params, label)


def classify(classifier: Classifier, views: Inputs, params: Params, label: str) -> NDArray[np.float32]:
    """Logits of views, (N,), in eval mode."""
    training = classifier.training
    where = (classifier.width, classifier.device, views, params, label)
    with torch.no_grad():
        logits = classifier.decide(over_views(classifier.eval().features, *where))
    classifier.train(training)
    return logits.cpu().numpy()


def frozen_features(backbone: Backbone, views: Sequence[Inputs], params: Params) -> Tensor:
    """The frozen tower's features of every training view, once: (views, N, D)."""
    labels = [f"frozen features {number}/{len(views)}" for number in range(1, len(views) + 1)]
    with backbone.frozen():
        found = [extract_features(backbone, some, params, label) for some, label in zip(views, labels, strict=True)]
    return torch.stack(found)


def content_features(clip: Clip | None, params: Params, device: torch.device, contents: Inputs) -> Tensor:
    """What a content expert reads: (N, D) features of the frozen tower, before it gets adapters."""
    assert clip is not None, "a content expert needs one"
    backbone = Backbone(clip).to(device).eval()
    with backbone.frozen():
        return extract_features(backbone, contents, params, "frozen features of contents")


def require_finite(frozen: Tensor, names: list[str]) -> None:
    """Raise UserError where one of (views, N, D) features is not finite: it would spoil every weight."""
    if bad := (~frozen.isfinite()).any(2).any(0).nonzero().flatten().tolist():
        raise UserError(
            f"Expected finite features from CLIP, found others for {len(bad)} images, {names[bad[0]]} first. "
            f"Look at those images; with model.precision: bf16 try fp32; else CLIP's weights are damaged."
        )
