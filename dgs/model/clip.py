"""CLIP by open_clip: loaded by name or from a folder; the mini-CLIP's stem; attention split into q, k, v and out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.errors import UserError
from dgs.model.checkpoint_files import read_state, reason_of
from dgs.model.clip_source import NO_TEXT, RANDOM, WEIGHTS, ClipSource, find_clip, no_tower
from dgs.model.gemm import Gemm
from dgs.model.identity import features_hash, features_of, weights_hash
from dgs.model.tower_timm import TimmTower, create_timm
from dgs.params import ModelParams

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the release's constants


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


class ClipTower(VisionTransformer):
    """open_clip's vision transformer as `dgs.model.backbone.Tower`, under its own names, which checkpoints have."""

    adapted_blocks = "resblocks"
    prefix_tokens = 1

    @property
    def blocks(self) -> nn.ModuleList:
        """Its blocks, the first one first."""
        return self.transformer.resblocks

    @property
    def token_shape(self) -> torch.Size:
        """(1 + L, W) of an image."""
        return self.positional_embedding.shape

    def embed(self, images: Tensor) -> Tensor:
        """As `Tower.embed`."""
        return self._embeds(images)

    def block(self, number: int, tokens: Tensor) -> Tensor:
        """As `Tower.block`."""
        return self.blocks[number](tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """As `Tower.pool`."""
        pooled = self._pool(tokens)[0]
        return pooled if self.proj is None else pooled @ self.proj


def as_tower(visual: Any, name: str, image_size: int) -> Any:
    """A CLIP's image side made ready for adapters on q, k and v and for images of `image_size` px.

    open_clip's vision transformer in place: `SplitAttention` in every block, `LeanQuickGELU` for QuickGELU. A model of
    timm's inside of `TimmTower`.

    Raises:
        UserError: neither, or one with other attention.
    """
    if hasattr(visual, "trunk"):
        return TimmTower(visual.trunk, visual.head, name, image_size)
    blocks = visual.transformer.resblocks if isinstance(visual, VisionTransformer) else None
    if blocks is None or not all(isinstance(block, ResidualAttentionBlock) for block in blocks):
        raise no_tower(f"{type(visual).__name__}{'' if blocks is None else ' of ' + type(blocks[0]).__name__}")
    resize(visual, image_size)
    visual.__class__ = ClipTower
    for block in blocks:
        block.attn = SplitAttention(block.attn)
    for module in visual.modules():
        for place, child in module.named_children():
            if isinstance(child, QuickGELU):
                setattr(module, place, LeanQuickGELU())
    return visual


def resize(visual: Any, image_size: int) -> None:
    """Let an open_clip vision transformer take images of `image_size` px, in place: its positions are interpolated."""
    if visual.image_size == (image_size, image_size):
        return
    height, width = visual.patch_size
    visual.image_size, visual.grid_size = (image_size, image_size), (image_size // height, image_size // width)
    state = {"visual.positional_embedding": visual.positional_embedding.detach()}
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])


@dataclass
class Clip:
    """A loaded CLIP.

    model: open_clip's, frozen, in eval mode, image attention split.
    tokenizer: texts -> (N, context) int64; None without the text side.
    mean, std: normalisation constants for RGB in 0..1.
    precision: what the image tower computes in; weights stay fp32.
    gemm: what multiplies its matrices where it has adapters.
    name, weights_hash, features: what a checkpoint records to find and check it again (`dgs.model.identity`).
    notes: what was assumed of it, a sentence each.
    """

    model: Any
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    weights_hash: str
    precision: torch.dtype = torch.float32
    gemm: Gemm = "torch"
    features: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of all that its features follow from; what is computed by it is kept under them."""
        settings = {**self.features, "mean": self.mean, "std": self.std}
        return {"clip": self.weights_hash, "clip_features": features_hash(settings)}


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _from_folder(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        with _quiet():  # open_clip warns of the random weights that are replaced below
            model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        attach(model, config)
        if config.get("dgs") == NO_TEXT:
            _keep_image_side(model)
        model.load_state_dict({name: tensor.float() for name, tensor in read_state(folder / WEIGHTS).items()})
    except Exception as error:  # configs and weights that do not fit fail in many ways
        raise UserError(
            f"Cannot load the CLIP in model.clip = {folder} ({reason_of(error)}). Restore that folder."
        ) from None
    return model


def _keep_image_side(model: nn.Module) -> None:
    for name in [name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))]:
        if name != "visual":
            delattr(model, name)


def _from_file(name: str, file: Path) -> Any:
    """As open_clip loads a file; if it cannot, it loads a copy of the tensors alone, which may be wrapped there."""
    state = {key: value.contiguous().clone() for key, value in read_state(file).items()}
    if not state:
        raise ValueError("it holds no tensor")
    try:
        return open_clip.create_model(name, pretrained=str(file))
    except Exception:  # wrong files fail in many ways
        with tempfile.TemporaryDirectory(prefix="dgs-") as folder:
            save_file(state, f"{folder}/{WEIGHTS}")
            return open_clip.create_model(name, pretrained=f"{folder}/{WEIGHTS}")


def _from_name(name: str, weights: str, said: str) -> Any:
    if weights == RANDOM:
        torch.manual_seed(0)
        return open_clip.create_model(name, pretrained=None)
    file = Path(weights)
    try:
        with _quiet():  # a hub that cannot be reached is retried for a minute, each time with a page of log
            return _from_file(name, file) if file.is_file() else open_clip.create_model(name, pretrained=weights)
    except Exception as error:  # offline hubs and wrong files fail in many ways
        advice = (
            f"Expected tensors of {name} under open_clip's names: give another file."
            if file.is_file()
            else f"With network: python -c \"import open_clip; open_clip.create_model('{name}', pretrained='{weights}')"
            f'"; without: set model.pretrained to a weights file.'
        )
        raise UserError(f"Cannot load the weights '{said}' of {name} ({reason_of(error)}). {advice}") from None


def _load(source: ClipSource, params: ModelParams) -> Any:
    if source.folder is not None:
        return _from_folder(source.folder, source.config)
    assert source.weights is not None and params.pretrained is not None
    if source.timm is not None:
        return create_timm(source.timm, source.weights)
    return _from_name(params.clip, source.weights, params.pretrained)


def _tokenizer(source: ClipSource, name: str) -> Any:
    try:
        with _quiet():
            return open_clip.get_tokenizer(f"local-dir:{source.folder}" if source.folder else name)
    except Exception as error:  # SigLIP's come from a hub, which fails in many ways
        raise UserError(
            f'Cannot load the tokenizer of {name} ({reason_of(error)}). With network: python -c "import '
            f"open_clip; open_clip.get_tokenizer('{name}')\"; without: set model.text to aligned or none."
        ) from None


def load_clip(params: ModelParams, root: Path, image_size: int, text: bool = True, gemm: Gemm = "torch") -> Clip:
    """A frozen CLIP from a folder, or by open_clip's or timm's name, for images of `image_size` px.

    Args:
        root: folder that relative paths are looked up in.
        text: False leaves the text side out of memory: captions are embedded once, when data are prepared.
        gemm: what is to multiply matrices once the tower has adapters.

    Raises:
        UserError: unknown name, missing weights, weights trained with another activation, another architecture, no
            text side where it is asked for.
    """
    source = find_clip(params, root)
    if text:
        source.require_text(params.clip)
    model = _load(source, params)
    tokenizer = _tokenizer(source, params.clip) if text else None
    own, features = weights_hash(model), {**features_of(model), **source.text_settings}
    if not text:
        _keep_image_side(model)
    model.visual = as_tower(model.visual, params.clip, image_size)
    model.eval()
    model.requires_grad_(False)
    mean, std = IMAGENET if params.normalize == "imagenet" else (source.mean, source.std)
    precision = torch.bfloat16 if params.precision == "bf16" else torch.float32
    return Clip(model, tokenizer, mean, std, params.clip, own, precision, gemm, features, source.notes_at(image_size))
