"""How the cost of a step grows: `python benchmarks/cost.py` (minutes, a quiet machine) writes cost.csv and cost.png.

One thing varies at a time around a ViT-B/32 (width 768, 12 blocks) with 4 images of 224 px, on one CPU thread: images,
their side, and the tower's width. Weights are random: they do not change what a step costs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from bench import GEMM, LR, arbitrary, machine, settings  # noqa: E402
from clips import CONFIG, write_random_clip  # noqa: E402
from timing import interleave  # noqa: E402

from dgs.analysis.figures import style as look  # noqa: E402
from dgs.model.backbone import Backbone  # noqa: E402
from dgs.model.clip import load_clip  # noqa: E402
from dgs.model.methods.registry import get_method  # noqa: E402
from dgs.model.step import stage2_step  # noqa: E402

BASE = {"images": 4, "side": 224, "width": 768}
VARIED = {"images": (1, 2, 4, 8, 16), "side": (96, 160, 224, 320, 416), "width": (192, 384, 576, 768, 1024)}
LABELS = {"images": "Images a batch", "side": "Side of an image (px)", "parameters": "Parameters (millions)"}
LOOKS = {"step": {"color": "C0", "marker": "o"}, "score": {"color": "C1", "marker": "s", "linestyle": "--"}}
PATCH, BLOCKS, ROUNDS = 32, 12, 3


def measure(images: int, side: int, width: int) -> dict[str, float]:
    """Seconds of a stage-2 step and of scoring alike images, and the tower's parameters in millions.

    The fastest of the rounds: what else a machine does only adds to it.
    """
    own = {"image_size": side, "layers": BLOCKS, "width": width, "head_width": 64, "patch_size": PATCH}
    config: dict[str, Any] = {**CONFIG, "vision_cfg": own}
    with tempfile.TemporaryDirectory() as folder:
        params = settings(side, batch=images).replaced({"model.clip": str(write_random_clip(Path(folder), 0, config))})
        clip = load_clip(params.model, HERE, side, text=False, gemm=GEMM)
    backbone, dim = Backbone(clip, params.model.lora).train(), CONFIG["embed_dim"]
    heads = {name: nn.Linear(dim, 1).requires_grad_(name != "teacher") for name in ("image", "text", "teacher")}
    learned = [*backbone.adapter_parameters(), *heads["image"].parameters(), *heads["text"].parameters()]
    optimizer, noise = torch.optim.Adam(learned, lr=LR), torch.randn(images, dim)
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    known = arbitrary(torch.arange(images) % 2.0, dim)

    def step() -> None:
        stage2_step(get_method("dgs"), backbone.train(), heads, optimizer, pixels, known, noise, params)

    def score() -> None:
        with torch.no_grad():
            heads["image"](backbone.eval()(pixels))

    timed = interleave({"step": step, "score": score}, ROUNDS)
    count = sum(p.numel() for p in backbone.parameters()) / 1e6
    return {"parameters": count, "step": min(timed.seconds["step"]), "score": min(timed.seconds["score"])}


def slope(table: pd.DataFrame, x: str) -> float:
    """The exponent of x in a step's seconds, over the upper half of the points: 1 is in proportion."""
    upper = table.nlargest(max(3, len(table) // 2), x)
    return float(np.polyfit(np.log(upper[x]), np.log(upper["step"]), 1)[0])


@look.style()
def figure(table: pd.DataFrame) -> Figure:
    """Seconds of a step and of scoring against each thing that varies; both axes logarithmic, slopes in the title."""
    fig, axes = look.panels(3, 0.8, 2.6, y="Seconds", sharey=True)
    slopes = []
    for ax, varied in zip(axes, VARIED, strict=True):
        own, x = table[table["varied"] == varied], "parameters" if varied == "width" else varied
        for what, line in LOOKS.items():
            ax.plot(own[x], own[what], **line)
        ax.set(xscale="log", yscale="log", xlabel=LABELS[x])
        ax.set_xticks(own[x], [f"{value:.0f}" for value in own[x]])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        slopes.append(slope(own, x))
    claim = (
        f"A step's cost grows with the images to the power {slopes[0]:.1f}, with their side {slopes[1]:.1f}, "
        f"with the tower's parameters {slopes[2]:.1f}"
    )
    handles = [look.handle(what, **line) for what, line in LOOKS.items()]
    return look.finish(fig, claim, f"One thread, {machine()['cpu']}; powers: upper three points", more=handles)


def main() -> None:
    """Measure, then write cost.csv and cost.png."""
    torch.set_num_threads(1)
    cases = [(varied, {**BASE, varied: value}) for varied, values in VARIED.items() for value in values]
    rows = [{"varied": varied, **case, **measure(**case)} for varied, case in tqdm(cases, unit="case")]
    table = pd.DataFrame(rows)
    table.round(4).to_csv(HERE / "cost.csv", index=False)
    look.save(figure(table), HERE / "cost.png")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
