"""The convolutional stem of the mini-CLIP: three stride-2 convolutions in place of open_clip's 8-pixel patches.

Attention, text tower and projections stay open_clip's own, so adapters meet the same modules as in ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvStem(nn.Module):
    """(B, 3, H, W) -> (B, width, H/8, W/8): conv-GELU, conv-GELU, conv, each 3x3 with stride 2.

    `norm=True` adds a BatchNorm after each convolution, for pre-training only: `fold` merges them, so that the shipped
    stem has no state that `train()` could change.
    """

    def __init__(self, channels: Sequence[int], norm: bool = False) -> None:
        super().__init__()
        sides = list(zip([3, *channels[:-1]], channels, strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=not norm) for a, b in sides)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) if norm else nn.Identity() for _, b in sides)

    def forward(self, image: Tensor) -> Tensor:
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            image = norm(conv(image))
            if depth + 1 < len(self.convs):
                image = F.gelu(image)
        return image

    @torch.no_grad()
    def fold(self) -> ConvStem:
        """A stem of plain convolutions that equals this one in eval mode."""
        layers: list[tuple[Any, Any]] = list(zip(self.convs, self.norms, strict=True))
        plain = ConvStem([conv.out_channels for conv, _ in layers])
        targets: list[Any] = list(plain.convs)
        for target, (conv, norm) in zip(targets, layers, strict=True):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            target.weight.copy_(conv.weight * scale[:, None, None, None])
            target.bias.copy_(norm.bias - norm.running_mean * scale)
        return plain


def attach(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put the stem of an `open_clip_config.json` (its "dgs" entry) in place of `visual.conv1`, before loading weights.

    A config without that entry is left alone.
    """
    own = config.get("dgs")
    if own is None:
        return
    if own.get("stem") != "conv3":
        raise ValueError(f'"dgs": {{"stem": ...}} should be "conv3". Found {own.get("stem")!r}.')
    visual: Any = model.visual
    visual.conv1 = ConvStem(own["stem_channels"])
