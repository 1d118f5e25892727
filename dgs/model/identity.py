"""Which CLIP it is: a hash of its tensors, and a record of everything else that its features follow from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

POSITIONS = "positional_embedding"  # in names of tensors that depend on the image size, once they are interpolated
# Attributes of modules that no feature depends on: what they do to speed or form of the output is another matter, and
# which constants images are normalised by, a checkpoint says elsewhere.
IDLE = {"training", "grad_checkpointing", "output_dict", "output_tokens", "batch_first", "fused_attn", "use_fsdpa",
        "image_mean", "image_std"}  # fmt: skip
CONTAINERS = (
    nn.ModuleList,
    nn.Sequential,
    nn.Identity,
)  # an absent layer is an Identity: the kind of a present one tells
IMAGE_SIDE = "visual"  # every name of the image side begins so


def tensors_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 of names and values, as float32, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """sha256 of every tensor but the positions, which `features_of` has."""
    return tensors_hash({name: value for name, value in model.state_dict().items() if POSITIONS not in name})


def features_of(model: nn.Module) -> dict[str, Any]:
    """What a CLIP computes beside what `weights_hash` tells, by name, as JSON keeps it.

    The kind of every module, and every number, word and switch that modules hold: the activation, heads, pooling,
    epsilons, strides and sizes are among them. Blocks share one entry, a list where they differ. And the hash of each
    table of positions.

    `model`: as open_clip or timm built it, before it is made ready for adapters and another image size.
    """
    found: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        place = re.sub(r"\.\d+(?=\.|$)", "", path)
        held: dict[str, Any] = {} if isinstance(module, CONTAINERS) else {place: type(module).__name__}
        for name, value in vars(module).items():
            if name not in IDLE and not name.startswith("_") and _is_plain(value):
                held[f"{place}.{name}"] = list(value) if isinstance(value, tuple) else value
        for name, value in held.items():
            found.setdefault(name.removeprefix("."), []).append(value)
    same = {
        name: values[0] if all(value == values[0] for value in values) else values for name, values in found.items()
    }
    tables = {name: tensors_hash({"": value}) for name, value in model.state_dict().items() if POSITIONS in name}
    return {name: value for name, value in sorted({**same, **tables}.items()) if name}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def features_hash(features: Mapping[str, Any]) -> str:
    """sha256 of a record of `features_of`."""
    return hashlib.sha256(json.dumps(features, sort_keys=True).encode()).hexdigest()


def image_side(features: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that scores depend on."""
    return {name: value for name, value in features.items() if name.split(".")[0] == IMAGE_SIDE}


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Entries of two records that differ, in words; what only one has is left out: libraries add attributes."""
    return [
        f"{name} {_short(recorded[name])}, found {_short(found[name])}"
        for name in sorted(set(recorded) & set(found))
        if recorded[name] != found[name]
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
