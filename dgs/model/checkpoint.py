"""Checkpoints: a folder with peft's adapter, the heads as safetensors, and dgs.json saying what they belong to."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dgs.errors import UserError
from dgs.model.backbone import Backbone, Clip
from dgs.params import Params
from dgs.workspace import replacing

FORMAT = 1
RECORDED = ("torch", "open_clip_torch", "peft")


def save_checkpoint(
    folder: Path,
    backbone: Backbone,
    heads: dict[str, nn.Linear],
    clip: Clip,
    params: Params,
    method: str,
    seed: int,
    thresholds: dict[str, float],
    data_hash: str,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    Args:
        heads: by name; "image" is required, it decides.
        thresholds: by rule, on the logit: {"0.5": 0.0, "val": ...}.
    """
    info = {
        "format": FORMAT,
        "method": method,
        "seed": seed,
        "clip": {"name": clip.name, "pretrained": params.model.pretrained, "weights_sha256": clip.weights_hash},
        "adapter": isinstance(backbone.visual, PeftModel),
        "preprocessing": {
            "image_size": params.image_size,
            "mean": list(clip.mean),
            "std": list(clip.std),
            "patches": params.patches.model_dump(),
            "fit": params.data.fit,
        },
        "thresholds": thresholds,
        "data_hash": data_hash,
        "params": params.model_dump(),
        "versions": {name: version(name) for name in RECORDED},
    }
    with replacing(folder) as draft:
        if isinstance(backbone.visual, PeftModel):
            backbone.visual.save_pretrained(str(draft))
            (draft / "README.md").unlink(missing_ok=True)  # peft's empty model card
            config = draft / "adapter_config.json"  # peft writes a set in the order of this process's hash seed
            settings = json.loads(config.read_text())
            settings["target_modules"] = sorted(settings["target_modules"])
            config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        tensors = {
            f"{name}_head.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()
        }
        save_file(
            {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, draft / "heads.safetensors"
        )
        (draft / "dgs.json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")


def read_info(folder: Path) -> dict[str, Any]:
    """dgs.json of a checkpoint folder.

    Raises:
        UserError: no checkpoint there, or one of another format.
    """
    path = folder / "dgs.json"
    if not path.exists():
        raise UserError(f"Expected a checkpoint folder (with dgs.json) at {folder}, found none.")
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error.msg}); the checkpoint is damaged, train it again.") from None
    if info.get("format") != FORMAT:
        raise UserError(f"Expected a checkpoint of format {FORMAT} in {folder}, found {info.get('format')}.")
    return dict(info)


def load_heads(folder: Path) -> dict[str, nn.Linear]:
    """The heads of a checkpoint, by name ("image", "text", "teacher"), each D -> 1."""
    try:
        tensors = load_file(folder / "heads.safetensors")
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"Cannot read heads.safetensors in {folder} ({error}); train the checkpoint again.") from None
    heads = {}
    for name in sorted({key.split("_head.")[0] for key in tensors}):
        weight = tensors[f"{name}_head.weight"]
        head = nn.Linear(weight.shape[1], 1)
        head.load_state_dict({"weight": weight, "bias": tensors[f"{name}_head.bias"]})
        heads[name] = head.requires_grad_(False)
    return heads


def load_checkpoint(folder: Path, clip: Clip) -> tuple[Backbone, dict[str, nn.Linear], dict[str, Any]]:
    """A checkpoint onto its CLIP, in eval mode: (backbone, heads, dgs.json).

    `clip.model.visual` carries the adapters until `backbone.without_adapters()`.

    Raises:
        UserError: no checkpoint, a damaged one, or one trained on other CLIP weights.
    """
    info = read_info(folder)
    if info["clip"]["weights_sha256"] != clip.weights_hash:
        raise UserError(
            f"The checkpoint {folder} was trained on {info['clip']['name']} with weights "
            f"{info['clip']['weights_sha256'][:12]}, found {clip.name} with {clip.weights_hash[:12]}. "
            f"Set model.clip and model.pretrained to the same weights, or train again."
        )
    heads = load_heads(folder)
    backbone = Backbone(clip)
    if info["adapter"]:
        backbone.visual = PeftModel.from_pretrained(backbone.visual, folder)
    return backbone.eval(), heads, info
