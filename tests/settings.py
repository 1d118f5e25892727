"""Small parameters for tests: whatever a test does not name has a value that trains in no time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dgs import params as real
from dgs.workspace import read_yaml_text

BASE: dict[str, Any] = read_yaml_text(
    """
profile: mini
methods: [probe, lora, dgs]
seeds: [0, 1, 2, 3, 4]
data: {layout: minibench, root: data, rho: 0.9, shortcut: background, captions: null, caption_drop: 0.0,
       val_fraction: 0.1, limit: null, fit: crop, show_images: true}
patches: {enabled: false, size: 8, count: 49}
model: {clip: data/clip, pretrained: null, image_size: 64, normalize: clip, precision: fp32, text: own,
        levels: [0],
        lora: {rank: 6, alpha: 6.0, dropout: 0.8, rslora: true, blocks: null}}
train:
  batch_size: 32
  accumulate: 1
  processes: 1
  images: null
  views: 1
  stage1: {epochs: 3, lr: 1e-4}
  stage2: {epochs: 1, lr: 1e-4}
  surgery: {lam: 0.2, distill: 1.0, eps: 1e-6, decay: 0.01, mix: 0.5, directions: 16, content_side: 0.25,
            order: release, scale: release, text_head: release}
  log_every: 10
  log_gradients: true
tuned: {}
compute: {device: auto, gemm: torch, jobs: 2, threads: 1, workers: 0, batch_size: 256, keep_mb: 512, prefix_mb: 0,
          snapshot_seconds: 60.0}
evaluate: {retrieval_pool: 200, tsne_images: 100, robustness: {conditions: [], methods: null, seeds: null},
           checkpoints: {}, detectors: {}}
gradient_angles: {pairs: [task-harmful, task-beneficial, task-applied]}
"""
)


def validate(content: Mapping[str, Any], source: str = "params.yaml") -> real.Params:
    """`dgs.params.validate` of `content` over the small parameters."""
    return real.validate(real.merged(BASE, content), source)


def Params() -> real.Params:
    """The small parameters."""
    return validate({})


def DataParams(**values: Any) -> real.DataParams:
    """The group `data` of the small parameters, with `values` in their place."""
    return real.DataParams.model_validate({**BASE["data"], **values})


def ModelParams(**values: Any) -> real.ModelParams:
    """As `DataParams`, for `model`."""
    return real.ModelParams.model_validate({**BASE["model"], **values})


def LoraParams(**values: Any) -> real.LoraParams:
    """As `DataParams`, for `model.lora`."""
    return real.LoraParams.model_validate({**BASE["model"]["lora"], **values})


def SurgeryParams(**values: Any) -> real.SurgeryParams:
    """As `DataParams`, for `train.surgery`."""
    return real.SurgeryParams.model_validate({**BASE["train"]["surgery"], **values})
