"""The image side of one CLIP in memory, with peft's LoRA on q, k, v: the teacher is it with adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from open_clip.transformer import ResidualAttentionBlock
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model import gemm
from dgs.model.clip import Clip
from dgs.params import LoraParams


class Tower(Protocol):
    """An image side: `dgs.model.clip.ClipTower` for open_clip's, `dgs.model.tower_timm.TimmTower` for timm's.

    blocks: what tokens go through, one after the other; attention in them has layers q_proj, k_proj and v_proj.
    adapted_blocks: the name of their list, in names of parameters.
    prefix_tokens: P, of the class and registers, which come before those of patches.
    token_shape: (P + L, W) of an image.
    output_dim: columns of its features.
    """

    blocks: Any
    adapted_blocks: str
    prefix_tokens: int
    token_shape: torch.Size
    output_dim: int

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S), normalised, to the tokens that the first block takes: (B, P + L, W)."""

    def block(self, number: int, tokens: Tensor) -> Tensor:
        """Tokens after block `number`."""

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block to features (B, D), projected where the tower has a projection."""


def token_statistics(tokens: Tensor, prefix: int = 1) -> Tensor:
    """Mean and standard deviation of each channel over patch tokens: (B, P + L, W), P not of patches, to (B, 2 W)."""
    patches = tokens[:, prefix:].float()
    return torch.cat([patches.mean(1), (patches.var(1) + 1e-6).sqrt()], 1)


def pools_class_token(visual: Any) -> bool:
    """True if a tower's output depends on nothing of its last block but the class token."""
    plain = isinstance(visual.blocks[-1], ResidualAttentionBlock)
    return plain and visual.attn_pool is None and visual.pool_type == "tok"


def class_token_after(block: Any, tokens: Tensor) -> Tensor:
    """What a block makes of the class token alone, within rounding: (B, 1 + L, W) to (B, 1, W).

    Without the other tokens' MLP, two thirds of the block's work: 6 % of a ViT-B's, 3 % of a ViT-L's.
    """
    token = (tokens + block.ls_1(block.attention(block.ln_1(tokens))))[:, :1]
    return token + block.ls_2(block.mlp(block.ln_2(token)))


class Backbone(nn.Module):
    """The image side: normalisation, the vision tower, and LoRA on q, k, v of the blocks asked for.

    Features are projected and *unnormalised*, as the method needs them, and float32 whatever the tower computes in.

    Args:
        clip: its tower is used, not copied.
        lora: adapters, if any.
        seed: of the adapters' initial values.
        levels: k stands for the tokens after k blocks, whose statistics follow the tower's output in the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Clip, lora: LoraParams | None = None, seed: int = 0, levels: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(clip.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(clip.std).view(1, 3, 1, 1))
        self.visual: Any = clip.model.visual  # a Tower, with adapters peft's model around it
        self.precision = clip.precision
        self.levels = tuple(levels)
        self.depth = 0  # blocks under the adapted ones
        depth = len(self.visual.blocks)
        if max(self.levels, default=0) > depth:
            raise UserError(
                f"Expected model.levels to be among 0 to {depth}, the depth of {clip.name}, found {max(self.levels)}."
            )
        if lora is not None:
            if lora.blocks is not None and max(lora.blocks) >= depth:
                raise UserError(
                    f"Expected model.lora.blocks to be among 0 to {depth - 1}, the blocks of {clip.name}, found "
                    f"{max(lora.blocks)}. Set it to null for all."
                )
            torch.manual_seed(seed)  # peft draws A (kaiming uniform) from the global generator; B is zero
            config = LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft annotates int, computes with any number
                lora_dropout=lora.dropout,
                use_rslora=lora.rslora,
                target_modules=["q_proj", "k_proj", "v_proj"],
                layers_to_transform=lora.blocks,
                layers_pattern=None if lora.blocks is None else self.visual.adapted_blocks,
            )
            self.adapt(get_peft_model(self.visual, config), clip)

    def adapt(self, visual: PeftModel, clip: Clip) -> None:
        """Take the tower with its adapters; its matrices are multiplied by `clip.gemm` until they come off."""
        self.visual = visual
        self.depth = min(visual.peft_config[visual.active_adapter].layers_to_transform or [0])
        gemm.use(visual, clip.gemm)

    def _embed(self, images: Tensor) -> Tensor:
        return self.visual.embed((images.to(self.mean.dtype) / 255 - self.mean) / self.std)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.precision is torch.float32 else torch.autocast(device.type, self.precision)

    def lower(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to the tokens that block `depth` takes: (B, P + L, W)."""
        with self._autocast(images.device):
            tokens = self._embed(images)
            for number in range(self.depth):
                tokens = self.visual.block(number, tokens)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to features (B, D), float32 (float64 for a tower of that dtype).

        Tokens as `lower` gives them do in place of images; they do not tell of levels below `depth`.
        With levels, D is the tower's width and two numbers for each channel of each level.
        """
        tower, heard, depth = self.visual, {}, len(self.visual.blocks)
        last = depth if pools_class_token(tower) and depth not in self.levels else None
        with self._autocast(images.device):
            start, tokens = (0, self._embed(images)) if images.ndim == 4 else (self.depth, images)
            for level in range(start, depth + 1):
                if level > start and level == last:
                    tokens = class_token_after(tower.blocks[level - 1], tokens)
                elif level > start:
                    tokens = tower.block(level - 1, tokens)
                if level in self.levels:
                    heard[level] = tokens
            features = tower.pool(tokens)
        if self.precision is not torch.float32:
            features = features.float()
        return torch.cat([features, *(token_statistics(heard[k], tower.prefix_tokens) for k in self.levels)], 1)

    @property
    def widths(self) -> tuple[int, int]:
        """(T, D): columns of CLIP's own features, and of all that this backbone gives."""
        own = int(self.visual.output_dim)
        return own, own + 2 * len(self.levels) * int(self.visual.token_shape[1])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this block the model is the teacher: adapters off, no dropout, no gradient."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                if isinstance(self.visual, PeftModel):
                    with self.visual.disable_adapter():
                        yield
                else:
                    yield
        finally:
            self.train(training)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The LoRA matrices; everything else stays frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def without_adapters(self) -> Any:
        """Take the adapters off again and return the bare tower: the next run starts from the same CLIP."""
        if isinstance(self.visual, PeftModel):
            self.visual = self.visual.unload()
            gemm.use(self.visual, "torch")
        return self.visual
