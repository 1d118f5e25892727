"""Scoring files: `python benchmarks/scoring.py` (five minutes) writes scoring.md beside it.

Against the tower alone, on one CPU thread: what is left of its throughput when images are read, decoded, cut into
patches and put together by threads beside it. And by ONNX Runtime against torch, on two. All sides of a row take turns
in one process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from timing import interleave
from torch import nn

from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.detector import Detector, TorchTower
from dgs.model.onnx_engine import OnnxTower
from dgs.model.onnx_graph import float_linear, int8_linear
from dgs.params import dotted, load_params
from dgs.workspace import MAIN

HERE = Path(__file__).resolve().parent
TOWER = "ViT-B-32-quickgelu"
REQUIRED = 0.9
ENGINES = {"float32": (float_linear, 1.8), "int8": (int8_linear, 3.5)}  # of ONNX Runtime: times torch's speed, at least


def detector(patches: bool, tower: str = TOWER) -> Detector:
    """An adapted tower with random weights and the release's view of an image, or a resized one."""
    own = {
        "data": {"layout": "folders", "rho": None, "fit": "resize"},
        "patches": {"enabled": patches, "size": 32, "count": 49},
        "model": {"clip": tower, "pretrained": "random", "image_size": 224, "lora": {"rank": 6, "alpha": 6.0}},
        "compute": {"device": "cpu"},
    }
    params = load_params(MAIN, HERE.parent).replaced(dotted(own))
    clip = load_clip(params.model, HERE, params.image_size, text=False)
    backbone = Backbone(clip, params.model.lora).eval()
    head = nn.Linear(backbone.visual.output_dim, 1)
    return Detector(TorchTower(ClipClassifier(clip, backbone, {"image": head})), params, {})


def photographs(folder: Path, count: int, side: int) -> list[Path]:
    """JPEGs with detail at every scale, so that decoding costs what it costs for photographs."""
    paths = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        pixels = np.zeros((side, side, 3))
        for scale in (2, 8, 32, 128):
            coarse = Image.fromarray(rng.integers(0, 256, (side // scale, side // scale, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 4
        paths.append(folder / f"{seed}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], quality=92)
    return paths


def engines(images: int, rounds: int) -> list[str]:
    """A ViT-B/16 scores JPEGs of 512 px on two threads, decoding and patches included: torch, and exported files."""
    torch.set_num_threads(2)
    one = detector(True, "ViT-B-16-quickgelu")
    sides = {"torch": one}
    for name, (linear, _) in ENGINES.items():
        model = one.tower.classifier.onnx(224, linear).SerializeToString()
        sides[name] = Detector(OnnxTower(model), one.params, {})
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder), images, 512)
        timed = interleave({name: lambda side=side: side.score(paths, 16) for name, side in sides.items()}, rounds)
    lines = [
        "",
        f"`dgs score --engine onnx` on two threads: ViT-B-16-quickgelu, random weights, {images} JPEGs of 512 px, 49 "
        f"patches; torch {images / timed.median('torch'):.1f} a second, ONNX Runtime {onnxruntime.__version__}.",
        "",
        "| exported file | a second | times torch's | required |",
        "|---|---|---|---|",
    ]
    for name, (_, required) in ENGINES.items():
        ratio, low, high = timed.ratio("torch", name)
        met = f">= {required}" + ("" if ratio >= required else " **missed**")
        lines.append(f"| {name} | {images / timed.median(name):.1f} | {ratio:.2f} [{low:.2f}, {high:.2f}] | {met} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "scoring.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of the random weights
    lines = [
        f"Measured {date.today()}: {TOWER}, random weights, {chosen.images} JPEGs in batches of 16, the tower on one "
        f"CPU thread, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "Share of the tower's own images a second that scoring files reaches: median of the rounds [lowest, highest].",
        "",
        "| images | tower alone | files | share | required |",
        "|---|---|---|---|---|",
    ]
    for patches, side in ((True, 512), (True, 1024), (False, 512), (False, 1024)):
        one = detector(patches)
        with tempfile.TemporaryDirectory() as folder:
            paths = photographs(Path(folder), chosen.images, side)
            views = [np.stack([one.view(path) for path in paths[i : i + 16]]) for i in range(0, len(paths), 16)]
            timed = interleave(
                {
                    "tower": lambda one=one, views=views: [one.logits(batch) for batch in views],
                    "files": lambda one=one, paths=paths: one.score(paths, batch_size=16),
                },
                chosen.rounds,
            )
        share, low, high = timed.ratio("tower", "files")
        rates = [f"{chosen.images / timed.median(name):.1f} a second" for name in ("tower", "files")]
        what = f"{side} x {side} px, {'49 patches of 32 px' if patches else 'resized'}"
        met = f">= {REQUIRED}" + ("" if share >= REQUIRED else " **missed**")
        lines.append(f"| {what} | {rates[0]} | {rates[1]} | {share:.2f} [{low:.2f}, {high:.2f}] | {met} |")
        print(lines[-1], file=sys.stderr, flush=True)
    lines += engines(chosen.images, chosen.rounds)
    chosen.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
