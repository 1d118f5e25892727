"""What it costs a step to log its gradients: at most 5 % over a run, measured in turns on the embedded CLIP."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from clips import precomputed
from torch import nn

from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.methods.registry import get_method
from dgs.model.step import stage2_step
from dgs.model.training_log import LAYERS_EVERY, LayerGradients, TrainingLog
from dgs.params import load_params

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from timing import interleave  # noqa: E402


@pytest.mark.slow
def test_logging_costs_at_most_five_per_cent_of_a_run() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    params = load_params(root=ROOT).for_method("dgs")
    clip = load_clip(params.model.model_copy(update={"clip": "sample/clip"}), ROOT, params.image_size, text=False)
    backbone, method = Backbone(clip, params.model.lora).train(), get_method("dgs")
    size, width = params.train.batch_size, clip.model.visual.output_dim
    heads = {name: nn.Linear(width, 1).requires_grad_(name != "teacher") for name in ("image", "text", "teacher")}
    learned = [p for head in (backbone, *heads.values()) for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=1e-4)
    images = torch.randint(0, 256, (size, 3, params.image_size, params.image_size), dtype=torch.uint8)
    captions, frozen, noise = torch.randn(3, size, width)
    labels = torch.arange(size).remainder(2).float()
    known = precomputed(labels, captions, torch.rand(size) - 0.5, frozen)
    log = TrainingLog("dgs", 0)

    def step(logged: bool, layers: LayerGradients | None = None) -> None:
        _, gradients = stage2_step(method, backbone, heads, optimizer, images, known, noise, params, layers=layers)
        if logged:
            log.gradients(0, list(range(size)), labels, gradients)
        if layers is not None:
            layers.record(log, 0)

    try:
        logging = {"features": lambda: step(True), "layers": lambda: step(True, LayerGradients(backbone))}
        timed = interleave({"plain": lambda: step(False), **logging}, 15)
    finally:
        torch.set_num_threads(before)
    best = {name: min(seconds) for name, seconds in timed.seconds.items()}
    every = params.train.log_every
    whole = (every - 1) * LAYERS_EVERY * best["plain"] + (LAYERS_EVERY - 1) * best["features"] + best["layers"]
    mean = whole / (every * LAYERS_EVERY)
    print(f"a step that logs costs {mean / best['plain'] - 1:.1%} more on average")
    assert mean <= 1.05 * best["plain"]
