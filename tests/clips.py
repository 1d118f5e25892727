"""Small CLIPs with random weights, and checkpoints on them: for tests of geometry, not of what a CLIP knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from settings import LoraParams, validate
from torch import Tensor, nn

from dgs.model.backbone import Backbone
from dgs.model.checkpoint import save_checkpoint
from dgs.model.checkpoint_files import SUMS, seal
from dgs.model.clip import load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.methods.base import Precomputed
from dgs.params import Params

LORA = LoraParams(rank=2, alpha=4.0, dropout=0.0)
CALIBRATION = {
    "false_alarm": {"count": 21, "of": 250, "rate": 0.084, "low": 0.055599, "high": 0.125015},
    "caught": {"count": 200, "of": 250, "rate": 0.8, "low": 0.746015, "high": 0.844878},
}
WIDTH = 24  # features of the random CLIP
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_random_clip(folder: Path, seed: int = 0, config: dict[str, Any] | None = None) -> Path:
    """A CLIP folder as `dgs.model.clip.load_clip` reads it; of `CONFIG`, or of another open_clip config."""
    config = config or CONFIG
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    for block in model.visual.transformer.resblocks:
        torch.nn.init.normal_(block.attn.in_proj_bias)  # zero by default, which would hide a lost bias
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def settings(clip: Path, **groups: object) -> Params:
    """Parameters of a run on the random CLIP at `clip`, for images of 32 px."""
    model = {"clip": str(clip), "image_size": 32, "lora": LORA.model_dump()}
    return validate({"data": {"layout": "folders", "rho": None}, "model": model, **groups})


def precomputed(labels: Tensor, captions: Tensor, residual: Tensor, teacher: Tensor | None = None) -> Precomputed:
    """(N,) labels, (N, T) captions, (N,) residuals of a teacher; features of norm 1, no text expert."""
    ones = torch.ones_like(labels)
    frozen = torch.ones_like(captions) if teacher is None else teacher
    return Precomputed(labels, captions, frozen, ones, residual, torch.zeros_like(labels), ones)


def write_checkpoint(folder: Path, clip_folder: Path, params: Params | None = None, scale: float = 1.0) -> Path:
    """A checkpoint with random adapters and heads on the random CLIP at `clip_folder`.

    scale: of the image head; large ones give logits far from 0.
    """
    params = params or settings(clip_folder)
    clip = load_clip(params.model, Path(), params.image_size)
    torch.manual_seed(0)
    backbone = Backbone(clip, LORA)
    for parameter in backbone.adapter_parameters():  # B is zero at first, which would hide a lost adapter
        nn.init.normal_(parameter, std=0.3)
    heads = {name: nn.Linear(WIDTH, 1) for name in ("image", "text", "teacher")}
    heads["image"].weight.data *= scale
    thresholds, calibration = {"0.5": 0.0, "val": 0.0}, dict.fromkeys(("0.5", "val"), CALIBRATION)
    save_checkpoint(folder, ClipClassifier(clip, backbone, heads), params, "dgs", 0, thresholds, "d", calibration)
    return folder


def reseal(folder: Path) -> None:
    """Make the hashes of a checkpoint agree with what its files are now, as one who means harm could."""
    if (folder / SUMS).exists():
        seal(folder)
