"""The model card of a checkpoint: what it is, how to load it without this package, what it is and is not for."""

from __future__ import annotations

from typing import Any

from dgs.stats import percent_text

CARD = """\
---
license: {licence_tag}
library_name: {library}
pipeline_tag: image-classification
tags: [ai-generated-image-detection, clip]
---
# {method}{seed}, a detector of generated images

From `dgs`, which re-runs DGS-Net ([arXiv 2511.13108](https://arxiv.org/abs/2511.13108)): CLIP's image tower{adapters},
and a linear head on its features. It gives the probability that an image was generated.

| | |
|---|---|
| method, seed | {method}, {seed_or_unknown} |
| CLIP | {clip} (weights sha256 {weights}) |
| trained on | training and validation images and captions of data hash {data_hash} |
| the model sees | {sees} |

## How well it does

{metrics}
Numbers on test images, generator by generator, are not known when a checkpoint is saved: they are in the
`results/{profile}/` of where it was trained. Add them here. This card has no hash in `dgs.json`, so it may be edited.

## Use

For research into such detectors, and as one hint among others about an image of a kind it was tested on. Not as proof,
and not for decisions about people: a verdict says what the image resembles, not where it comes from.

Known failures: generators, cameras and editing it has not seen; images re-compressed, resized, cropped or screenshot
after they were made, real or generated; images generated in part; a shortcut in the training images, which it will have
learned. The probability was not calibrated: it orders images, and only the threshold was chosen on validation images.

`dgs score IMAGES --checkpoint FOLDER` scores files (`--explain DIR` saves what the model saw of each). Without `dgs`:

```python
{code}```

The files are safetensors and JSON: loading them runs no code. `dgs` checks their hashes, which `dgs.json` records.

## Licence

{licence}
"""

IMPORTS = """\
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
{peft}from PIL import Image
from safetensors.torch import load_file

folder = Path(".")  # where this card lies
view = Path("000001.png")  # what the model sees of an image, as `dgs score --explain` saves it
info = json.loads((folder / "dgs.json").read_text())
seen = info["preprocessing"]

"""
NAMED = """\
model = open_clip.create_model({name!r}, pretrained={pretrained!r}, force_image_size=seen["image_size"])
visual = model.visual.eval()
"""
FOLDER = """\
clip = {place}
model = open_clip.create_model(f"local-dir:{{clip}}", force_image_size=seen["image_size"])
visual = model.visual.eval()
"""
STEM = """\
from dgs.model.clip import attach  # the embedded CLIP's own first layer: the one line that is not open_clip's

clip = {place}
model = open_clip.create_model(f"local-dir:{{clip}}", load_weights=False, force_image_size=seen["image_size"])
attach(model, json.loads((clip / "open_clip_config.json").read_text()))
model.load_state_dict(load_file(clip / "open_clip_model.safetensors"))
visual = model.visual.eval()
"""
ADAPTERS = """\
for block in visual.transformer.resblocks:  # q, k and v as layers beside the one matrix that open_clip has for them
    attention = block.attn
    parts = zip("qkv", attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    for letter, weight, bias in parts:
        layer = torch.nn.Linear(*weight.shape)
        layer.load_state_dict({"weight": weight, "bias": bias})
        attention.add_module(f"{letter}_proj", layer)
visual = PeftModel.from_pretrained(visual, folder).merge_and_unload()
for block in visual.transformer.resblocks:
    layers = [getattr(block.attn, f"{letter}_proj") for letter in "qkv"]
    block.attn.in_proj_weight.data = torch.cat([layer.weight for layer in layers])
"""
LEVELS = """\
heard = {}  # the head reads the tokens after some blocks too (0: before the first)
for level in info["levels"]:
    if level == 0:
        visual.transformer.resblocks[0].register_forward_pre_hook(lambda _, given: heard.update({0: given[0]}))
    else:
        block = visual.transformer.resblocks[level - 1]
        block.register_forward_hook(lambda _, given, tokens, level=level: heard.update({level: tokens}))
"""
SCORE = """\
heads = load_file(folder / "heads.safetensors")
mean, std = (torch.tensor(seen[name]).view(3, 1, 1) for name in ("mean", "std"))
pixels = torch.tensor(np.array(Image.open(view).convert("RGB"))).permute(2, 0, 1)
with torch.no_grad():
    features = visual(((pixels / 255 - mean) / std)[None])
READ_LEVELS    logit = (features @ heads["image_head.weight"].T + heads["image_head.bias"]).item()
print(f"{1 / (1 + np.exp(-logit)):.4f}", "generated" if logit > info["thresholds"]["RULE"] else "real")
"""
READ_LEVELS = """\
    for level in info["levels"]:
        patches = heard[level][:, 1:]
        features = torch.cat([features, patches.mean(1), (patches.var(1) + 1e-6).sqrt()], 1)
"""


def deciding_rule(thresholds: dict[str, float]) -> str:
    """The rule that verdicts follow: "val", chosen on validation images, where there is one."""
    return "val" if "val" in thresholds else min(thresholds)


def card(info: dict[str, Any], stem: bool = False) -> str:
    """The model card for the content of dgs.json, the same text for the same content.

    Args:
        info: dgs.json's content.
        stem: whether the CLIP has the embedded one's convolutional stem.
    """
    clip, seen, embedded = info["clip"], info["preprocessing"], info["params"]["data"]["layout"] == "minibench"
    side = seen["image_size"]
    patches = f"{seen['patches']['count']} patches of {seen['patches']['size']} px, chosen by spectral entropy"
    whole = f"the image by {seen['fit']}"
    seed = info["seed"]
    return CARD.format(
        licence_tag="mit" if embedded else "other",
        licence=LICENCES["embedded" if embedded else "own" if seed is not None else "release"],
        library="peft" if info["adapter"] else "open_clip",
        method=info["method"],
        seed="" if seed is None else f", seed {seed}",
        seed_or_unknown="not known" if seed is None else seed,
        adapters=" with LoRA adapters on q, k and v" if info["adapter"] else ", frozen",
        clip=f"{clip['name']}, {clip['pretrained']}" if clip["pretrained"] else f"the folder `{clip['name']}`",
        weights=clip["weights_sha256"][:12],
        data_hash=info["data_hash"],
        sees=f"{patches if seen['patches']['enabled'] else whole}, as {side} x {side} px",
        metrics=_metrics(info),
        profile=info["params"]["profile"],
        code=_code(info, stem),
    )


LICENCES = {
    "embedded": "MIT, as `dgs` and its embedded benchmark, which this was trained on.",
    "own": (
        "Whoever trained this decides, within the licences of the CLIP weights and of the training images. "
        "`dgs` itself is under the MIT licence."
    ),
    "release": (
        "Imported from a checkpoint of the authors' release, which came without a licence file: ask them before you "
        "pass it on. `dgs` itself is under the MIT licence."
    ),
}


def _metrics(info: dict[str, Any]) -> str:
    rows = [
        f"| {rule} | {info['thresholds'][rule]:.4f} | {_share(one['false_alarm'])} | {_share(one['caught'])} |\n"
        for rule, one in sorted(info.get("calibration", {}).items())
    ]
    if not rows:
        return "Its threshold was calibrated on no images: how often it raises a false alarm is not known.\n"
    return (
        "On its validation images, which are of the generators it was trained on; for `val` the threshold was chosen "
        "on them too.\nPer cent [95 % interval] of how many images:\n\n"
        "| rule | threshold (logit) | real images called generated | generated images caught |\n|---|---|---|---|\n"
        f"{''.join(rows)}"
    )


def _share(one: dict[str, Any]) -> str:
    return f"{percent_text(one['rate'])} [{percent_text(one['low'])}, {percent_text(one['high'])}] of {one['of']}"


def _code(info: dict[str, Any], stem: bool) -> str:
    clip = info["clip"]
    place = 'folder / "clip"' if clip["carried"] else f"Path({clip['name']!r})"
    tower = STEM if stem else NAMED if clip["pretrained"] else FOLDER
    parts = [
        IMPORTS.format(peft="from peft import PeftModel\n" if info["adapter"] else ""),
        tower.format(place=place, name=clip["name"], pretrained=clip["pretrained"]),
        ADAPTERS if info["adapter"] else "",
        LEVELS if info["levels"] else "",
        SCORE.replace("READ_LEVELS", READ_LEVELS if info["levels"] else ""),
    ]
    return "".join(parts).replace("RULE", deciding_rule(info["thresholds"]) if info["thresholds"] else "val")
