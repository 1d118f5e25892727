"""CLIP by open_clip: loaded by name or from a folder; the mini-CLIP's stem; attention split into q, k, v and out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.errors import UserError, did_you_mean
from dgs.model.gemm import Gemm
from dgs.params import ModelParams
from dgs.workspace import no_such_clip, weights_twice

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the release's constants
RANDOM = "random"  # model.pretrained: seeded random weights, for tests of geometry
NO_TEXT = {"text": "none"}  # "dgs" of a config whose folder holds the image side alone


class ConvStem(nn.Module):
    """(B, 3, H, W) -> (B, width, H/8, W/8): conv-GELU, conv-GELU, conv, each 3x3 with stride 2.

    It takes the place of open_clip's 8-pixel patches in the mini-CLIP. Attention, text tower and projections stay
    open_clip's own, so that adapters meet the same modules as in ViT-L/14.
    `norm=True` adds a BatchNorm after each convolution, for pre-training only: `fold` merges them, so that the shipped
    stem has no state that `train()` could change.
    """

    def __init__(self, channels: Sequence[int], norm: bool = False) -> None:
        super().__init__()
        sides = list(zip([3, *channels[:-1]], channels, strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=not norm) for a, b in sides)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) if norm else nn.Identity() for _, b in sides)

    def forward(self, image: Tensor) -> Tensor:
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            image = norm(conv(image))
            if depth + 1 < len(self.convs):
                image = F.gelu(image)
        return image

    @torch.no_grad()
    def fold(self) -> ConvStem:
        """A stem of plain convolutions that equals this one in eval mode."""
        layers: list[tuple[Any, Any]] = list(zip(self.convs, self.norms, strict=True))
        plain = ConvStem([conv.out_channels for conv, _ in layers])
        targets: list[Any] = list(plain.convs)
        for target, (conv, norm) in zip(targets, layers, strict=True):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            target.weight.copy_(conv.weight * scale[:, None, None, None])
            target.bias.copy_(norm.bias - norm.running_mean * scale)
        return plain


def attach(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put the stem of an `open_clip_config.json` (its "dgs" entry) in place of `visual.conv1`, before loading weights.

    A config without a stem there is left alone.
    """
    own = config.get("dgs", NO_TEXT)
    if own == NO_TEXT:
        return
    if own.get("stem") != "conv3":
        raise ValueError(f'"dgs": {{"stem": ...}} should be "conv3". Found {own.get("stem")!r}.')
    visual: Any = model.visual
    visual.conv1 = ConvStem(own["stem_channels"])


class SplitAttention(nn.Module):
    """nn.MultiheadAttention with q, k, v and out as four linears, so that LoRA can sit on q, k and v alone.

    Same function as the module it replaces (self-attention, batch first, no dropout): peft's own layer for
    MultiheadAttention cannot adapt q, k and v separately.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        if attention.in_proj_weight is None or not attention.batch_first:
            raise ValueError("expected batch-first self-attention with one in_proj_weight")
        self.heads = attention.num_heads
        device, dtype = attention.in_proj_weight.device, attention.in_proj_weight.dtype
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width, device=device, dtype=dtype) for _ in range(4)
        )
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        for linear, weight, bias in zip((self.q_proj, self.k_proj, self.v_proj), weights, biases, strict=True):
            linear.load_state_dict({"weight": weight, "bias": bias})
        self.out_proj.load_state_dict(attention.out_proj.state_dict())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(B, L, D) queries, keys and values to ((B, L, D), None), as nn.MultiheadAttention without weights."""
        q, k, v = (
            module(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for module, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class LeanQuickGELU(nn.Module):
    """x sigmoid(1.702 x) as SiLU(1.702 x) / 1.702: one fused pass that keeps one tensor for backward, not three."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


def split_attention(visual: nn.Module) -> None:
    """In an open_clip vision transformer, in place: `SplitAttention` in every block, `LeanQuickGELU` for QuickGELU."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is None:
        raise UserError(
            "Expected a CLIP whose image side is open_clip's VisionTransformer (such as ViT-L-14-quickgelu), "
            f"found {type(visual).__name__}. Choose another model.clip."
        )
    for block in blocks:
        block.attn = SplitAttention(block.attn)
    for module in visual.modules():
        for name, child in module.named_children():
            if isinstance(child, QuickGELU):
                setattr(module, name, LeanQuickGELU())


@dataclass
class Clip:
    """A loaded CLIP.

    model: open_clip's, frozen, in eval mode, image attention split.
    tokenizer: texts -> (N, context) int64; None without the text side.
    mean, std: normalisation constants for RGB in 0..1.
    precision: what the image tower computes in; weights stay fp32.
    gemm: what multiplies its matrices where it has adapters.
    name, weights_hash: what a checkpoint records to find and check it again.
    """

    model: Any
    tokenizer: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str
    weights_hash: str
    precision: torch.dtype = torch.float32
    gemm: Gemm = "torch"


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _tensors_hash(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _from_folder(folder: Path, image_size: int) -> tuple[Any, dict[str, Any]]:
    config_file, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    for path in (config_file, weights):
        if not path.exists():
            raise UserError(f"Expected {path.name} in model.clip = {folder}, found none.")
    config = json.loads(config_file.read_text())
    with _quiet():  # open_clip warns of the random weights that are replaced below
        model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False, force_image_size=image_size)
    attach(model, config)
    if config.get("dgs") == NO_TEXT:
        _keep_image_side(model)
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}  # halves cannot be interpolated
    resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model, config.get("preprocess_cfg", {})


def _keep_image_side(model: nn.Module) -> None:
    for name in [name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))]:
        if name != "visual":
            delattr(model, name)


def _from_name(params: ModelParams, image_size: int) -> tuple[Any, dict[str, Any]]:
    names = open_clip.list_models()
    if params.clip not in names:
        raise no_such_clip(params.clip, did_you_mean(params.clip, names))
    if params.pretrained is None:
        raise UserError(f"Expected model.pretrained for '{params.clip}': an open_clip tag such as openai, or a file.")
    if params.pretrained == "openai" and "quickgelu" not in params.clip:
        raise UserError(
            f"OpenAI's weights were trained with QuickGELU; '{params.clip}' loads them silently with another "
            f"activation and wrong features. Set model.clip: {params.clip}-quickgelu."
        )
    if params.pretrained == RANDOM:
        torch.manual_seed(0)
        model: Any = open_clip.create_model(params.clip, pretrained=None, force_image_size=image_size)
    else:
        try:
            with _quiet():  # a hub that cannot be reached is retried for a minute, each time with a page of log
                model = open_clip.create_model(params.clip, pretrained=params.pretrained, force_image_size=image_size)
        except Exception as error:  # offline hubs and wrong tags fail in many ways
            reason = " ".join(str(error).split()).split(". ")[0][:200]
            raise UserError(
                f"Cannot load the weights '{params.pretrained}' of {params.clip} ({type(error).__name__}: {reason}). "
                f"With network: python -c \"import open_clip; open_clip.create_model('{params.clip}', "
                f"pretrained='{params.pretrained}')\"; without: set model.pretrained to a weights file."
            ) from None
    return model, dict(open_clip.get_model_preprocess_cfg(model))


def load_clip(params: ModelParams, root: Path, image_size: int, text: bool = True, gemm: Gemm = "torch") -> Clip:
    """A frozen CLIP by open_clip name or from a folder, for images of `image_size` px (positions interpolated).

    Args:
        root: folder that a relative model.clip is looked up in.
        text: False leaves the text side out of memory: captions are embedded once, when data are prepared.
        gemm: what is to multiply matrices once the tower has adapters.

    Raises:
        UserError: unknown name, missing weights, the wrong activation for OpenAI's weights, another architecture, no
            text side where it is asked for.
    """
    folder = (root / params.clip).resolve()
    if folder.is_dir():
        if params.pretrained is not None:
            raise weights_twice(params.clip, params.pretrained)
        model, preprocess = _from_folder(folder, image_size)
        source = f"local-dir:{folder}"
    else:
        model, preprocess = _from_name(params, image_size)
        source = params.clip
    if text and not hasattr(model, "transformer") and not hasattr(model, "text"):
        raise UserError(
            f"Expected model.clip = {params.clip} to have a text side, found an image tower alone. "
            f"Set model.text to aligned or none."
        )
    tokenizer = open_clip.get_tokenizer(source) if text else None  # one that a folder names could bring code
    weights_hash = _tensors_hash({k: v for k, v in model.state_dict().items() if "positional_embedding" not in k})
    if not text:
        _keep_image_side(model)
    split_attention(model.visual)
    model.eval()
    model.requires_grad_(False)
    mean, std = IMAGENET if params.normalize == "imagenet" else (preprocess["mean"], preprocess["std"])
    precision = torch.bfloat16 if params.precision == "bf16" else torch.float32
    return Clip(model, tokenizer, tuple(mean), tuple(std), params.clip, weights_hash, precision, gemm)
