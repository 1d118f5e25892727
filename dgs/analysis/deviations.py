"""Where the paper, the authors' release and a run of `dgs` differ: one table, the run's column from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = (
    "tower",
    "training set",
    "captions",
    "patch selection",
    "normalisation",
    "order of surgery",
    "scale of directions",
    "dropout",
    "stage 1",
    "stage 2",
    "threshold",
    "headline number",
    "patch order at test time",
    "uncertainty",
)
UNKNOWN = "–"  # not known from what the project was built from


def deviations(settings: Mapping[str, Any], seeds: int) -> list[list[str]]:
    """Rows of what, paper, release, this run.

    Args:
        settings: parameters of `dgs` as trained, nested as in params.yaml.
        seeds: how many the run has.
    """
    data, patches, model, train = (settings[group] for group in ("data", "patches", "model", "train"))
    surgery, lora = train["surgery"], model["lora"]
    order = {"release": "task and alignment together are projected", "paper": "the task alone is projected"}
    scale = {"release": "carry 1/B", "per_sample": "do not depend on B"}
    normalisation = {"clip": "CLIP's constants", "imagenet": "ImageNet's constants"}
    selected = f"{patches['count']} patches of {patches['size']} px" if patches["enabled"] else "off"
    macc = "mAcc: one Real column and one F.Acc column a generator"
    found = {
        "tower": (
            "CLIP ViT-L/14",
            "CLIP ViT-L/14, features not normalised",
            f"`{model['clip']}`, not normalised either",
        ),
        "training set": ("ProGAN and SDv1.4 (AIGIBench setting II)", "the same", _data(data)),
        "captions": ("BLIP", "BLIP, looked up by absolute path", _captions(data)),
        "patch selection": (UNKNOWN, "7 x 7 patches of 32 px by spectral entropy", selected),
        "normalisation": (UNKNOWN, normalisation["imagenet"], normalisation[model["normalize"]]),
        "order of surgery": (order["paper"], order["release"], order[surgery["order"]]),
        "scale of directions": (UNKNOWN, scale["release"], scale[surgery["scale"]]),
        "dropout": (UNKNOWN, "0.8", f"{lora['dropout']:g}"),
        "stage 1": ("3 epochs at 0.0001", "the same", _stage(train["stage1"])),
        "stage 2": ("1 epoch at 0.0001", "the same", _stage(train["stage2"])),
        "threshold": ("0.5", "0.5", "0.5, and chosen on validation images"),
        "headline number": (macc, "mean accuracy over generators", "balanced accuracy; mAcc beside it"),
        "patch order at test time": (UNKNOWN, "drawn anew each time", "fixed by the image's content"),
        "uncertainty": ("none", "none", f"{seeds} seeds, 95 % intervals" if seeds > 1 else "none: one seed"),
    }
    return [[name, *found[name]] for name in ROWS]


def _data(data: Mapping[str, Any]) -> str:
    if data["layout"] != "minibench":
        return f"`{data['root']}`"
    return f"embedded benchmark, rho {data['rho']:g}, shortcut by the {data['shortcut']}"


def _captions(data: Mapping[str, Any]) -> str:
    if data["layout"] == "minibench":
        return "those the scenes were drawn from"
    return f"`{data['captions']}`" if data["captions"] else "a template for every image"


def _stage(stage: Mapping[str, Any]) -> str:
    epochs = stage["epochs"]
    return f"{epochs} epoch{'s' if epochs > 1 else ''} at {stage['lr']:g}"
