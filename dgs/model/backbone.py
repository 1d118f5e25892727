"""The image side of one CLIP in memory, with peft's LoRA on q, k, v: the teacher is it with adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model import gemm
from dgs.model.clip import Clip
from dgs.params import LoraParams


def token_statistics(tokens: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over patch tokens: (B, 1 + L, W), class token first, to (B, 2 W)."""
    patches = tokens[:, 1:].float()
    return torch.cat([patches.mean(1), (patches.var(1) + 1e-6).sqrt()], 1)


def pools_class_token(visual: Any) -> bool:
    """True if a tower's output depends on nothing of its last block but the class token."""
    plain = isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
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
        self.visual: Any = clip.model.visual
        self.precision = clip.precision
        self.levels = tuple(levels)
        self.depth = 0 if lora is None or lora.blocks is None else min(lora.blocks)  # blocks under the adapted ones
        depth = len(self.visual.transformer.resblocks)
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
                layers_pattern=None if lora.blocks is None else "resblocks",
            )
            self.adapt(get_peft_model(self.visual, config), clip)

    def adapt(self, visual: PeftModel, clip: Clip) -> None:
        """Take the tower with its adapters; its matrices are multiplied by `clip.gemm` until they come off."""
        self.visual = visual
        gemm.use(visual, clip.gemm)

    def _embed(self, images: Tensor) -> Tensor:
        return self.visual._embeds((images.to(self.mean.dtype) / 255 - self.mean) / self.std)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.precision is torch.float32 else torch.autocast(device.type, self.precision)

    def lower(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to the tokens that block `depth` takes: (B, 1 + L, W), class token first."""
        with self._autocast(images.device):
            tokens = self._embed(images)
            for block in self.visual.transformer.resblocks[: self.depth]:
                tokens = block(tokens)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 to features (B, D), float32 (float64 for a tower of that dtype).

        Tokens as `lower` gives them do in place of images; they do not tell of levels below `depth`.
        With levels, D is the tower's width and two numbers for each channel of each level.
        """
        tower, blocks, heard = self.visual, self.visual.transformer.resblocks, {}
        last = len(blocks) if pools_class_token(tower) and len(blocks) not in self.levels else None
        with self._autocast(images.device):
            start, tokens = (0, self._embed(images)) if images.ndim == 4 else (self.depth, images)
            for level in range(start, len(blocks) + 1):
                if level > start:
                    block = blocks[level - 1]
                    tokens = class_token_after(block, tokens) if level == last else block(tokens)
                if level in self.levels:
                    heard[level] = tokens
            pooled = tower._pool(tokens)[0]
            features = pooled if tower.proj is None else pooled @ tower.proj
        if self.precision is not torch.float32:
            features = features.float()
        return torch.cat([features, *(token_statistics(heard[level]) for level in self.levels)], 1)

    @property
    def widths(self) -> tuple[int, int]:
        """(T, D): columns of CLIP's own features, and of all that this backbone gives."""
        own = int(self.visual.output_dim)
        return own, own + 2 * len(self.levels) * int(self.visual.positional_embedding.shape[1])

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
