"""Gradients of adapters, layer by layer, with and without surgery: the same backward pass from other gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dgs.model import distributed as processes
from dgs.model.backbone import Backbone
from dgs.model.training_log import AT_LAYERS, Journal

_LAYER = re.compile(r"resblocks\.(\d+)\.attn\.([qkv])_proj\.lora_")


def layer_of(parameter: str) -> str:
    """The layer an adapter's parameter belongs to, "<block>.<q, k or v>": resblocks.3.attn.q_proj... -> "3.q"."""
    found = _LAYER.search(parameter)
    if found is None:
        raise ValueError(f"`{parameter}` should be a LoRA matrix on q, k or v of a vision block.")
    return f"{found[1]}.{found[2]}"


class LayerGradients:
    """What each layer's adapters would get from the task's gradient alone or from harm, and what they get.

    A backward pass is linear in the gradient that is sent in, so the first two are two more passes through the same
    graph. Nothing that training uses is touched: a run with and without this is the same to the bit.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        self._sums: dict[str, list[Tensor]] = {}

    def take(self, features: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Before the real backward pass of a batch, or of one of its parts (parts add up).

        Args:
            features: (B, D), with their graph, which is kept.
            gradients: {name: (B, D)} at the features.
        """
        wanted: list[nn.Parameter] = list(self._parameters.values())
        for name in AT_LAYERS:
            if name == "applied":
                continue  # is what the real pass leaves in .grad
            found = torch.autograd.grad(features, wanted, gradients[name], retain_graph=True)
            earlier = self._sums.get(name)
            self._sums[name] = list(found) if earlier is None else [a + b for a, b in zip(earlier, found, strict=True)]

    def note(self, journal: Journal, step: int) -> None:
        """Into the journal, after the real backward pass and before gradients are set to zero."""
        parameters = self._parameters.values()
        none = [torch.zeros_like(p) for p in parameters]  # of a process without rows in this batch
        own = {name: processes.summed(self._sums.get(name, none)) for name in AT_LAYERS if name != "applied"}
        taken = {**own, "applied": [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]}
        by_layer: dict[str, list[int]] = {}
        for number, name in enumerate(self._parameters):
            by_layer.setdefault(layer_of(name), []).append(number)
        for layer, numbers in by_layer.items():
            vectors = {name: torch.cat([found[i].flatten() for i in numbers])[None] for name, found in taken.items()}
            journal.layer(step, layer, vectors)
