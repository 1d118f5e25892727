"""The mini-CLIP: open_clip's own towers behind a convolutional stem; config, export, loading and zero-shot measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from dgs.model.clip import ConvStem, attach
from minibench import captions, scenes

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"

MODEL: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": scenes.SIZE,
        "patch_size": 8,
        "width": 96,
        "layers": 4,
        "head_width": 24,
        "pool_type": "avg",
    },
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
PREPROCESS: dict[str, Any] = {
    "size": scenes.SIZE,
    "mode": "RGB",
    "mean": [0.45, 0.45, 0.45],
    "std": [0.22, 0.22, 0.22],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
STEM: dict[str, Any] = {"stem": "conv3", "stem_channels": [32, 64, 96]}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch and BLAS on one thread: the order of their sums, and so the last digits, depends on how many share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def create(norm: bool = False) -> open_clip.model.CLIP:
    """A fresh mini-CLIP (open_clip.CLIP), its stem with BatchNorm if `norm`."""
    model = open_clip.model.CLIP(**MODEL)
    model.visual.conv1 = ConvStem(STEM["stem_channels"], norm)
    return model


def load(folder: Path) -> tuple[open_clip.model.CLIP, dict[str, Any]]:
    """The CLIP of an export folder in eval mode, float32, and its "preprocess_cfg"."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model = open_clip.model.CLIP(**config["model_cfg"])
    attach(model, config)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval(), config["preprocess_cfg"]


def export(state: dict[str, Tensor], untouched: Tensor, folder: Path) -> None:
    """Write a pre-trained state (stem with BatchNorm) as an open_clip folder: stem folded, float16.

    `untouched`: (vocabulary,) bool, the tokens no caption holds. Their rows become zero, so that they compress away.
    """
    model = create(norm=True)
    model.load_state_dict(state)
    stem = model.visual.conv1
    assert isinstance(stem, ConvStem)
    model.visual.conv1 = stem.eval().fold()
    tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    tensors["token_embedding.weight"][untouched] = 0
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS, "dgs": STEM}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pixels(images: NDArray[np.uint8], preprocess: dict[str, Any]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised; no resizing."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(preprocess[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (values - mean) / std


@cache  # reading its 49,000 merges takes a quarter of a second
def tokenizer() -> Callable[[Sequence[str]], Tensor]:
    """open_clip's own tokenizer at the mini-CLIP's context length: texts -> (N, 24) int64."""
    return open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])


@torch.no_grad()
def embed_images(
    model: open_clip.model.CLIP, images: NDArray[np.uint8], preprocess: dict[str, Any], batch: int = 128
) -> Tensor:
    """Unit image embeddings, (N, 96) float32."""
    parts = [
        model.encode_image(pixels(images[i : i + batch], preprocess), normalize=True)
        for i in range(0, len(images), batch)
    ]
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(model: open_clip.model.CLIP, tokens: Tensor, batch: int = 512) -> Tensor:
    """Unit text embeddings, (N, 96) float32."""
    parts = [model.encode_text(part, normalize=True) for part in tokens.split(batch)]
    return torch.cat(parts)


def zero_shot(model: open_clip.model.CLIP, embeddings: Tensor, truth: Sequence[str], attribute: str) -> float:
    """Fraction of unit image embeddings (N, D) whose nearest prompt mean names the true value of `attribute`."""
    prompts = captions.prompts(attribute)
    tokenize = tokenizer()
    means = [embed_texts(model, tokenize(texts)).mean(0) for texts in prompts.values()]
    weight = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    found = (embeddings @ weight.T).argmax(1)
    names = list(prompts)
    return float(np.mean([names[int(i)] == t for i, t in zip(found, truth, strict=True)]))


def recall(
    model: open_clip.model.CLIP,
    embeddings: Tensor,
    attributes: Sequence[scenes.Attributes],
    texts: Sequence[str],
    among: int = 200,
) -> float:
    """Image-to-caption R@1 in groups of `among`; a caption of a scene with equal attributes counts as right."""
    text = embed_texts(model, tokenizer()(texts))
    right = []
    for start in range(0, len(texts) - among + 1, among):
        part = slice(start, start + among)
        best = (embeddings[part] @ text[part].T).argmax(1)
        right += [attributes[start + int(b)] == attributes[start + i] for i, b in enumerate(best)]
    return float(np.mean(right))
