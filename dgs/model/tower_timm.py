"""timm's vision transformers as image towers: DINOv2 and v3, PE, SigLIP 2, EVA02, MetaCLIP and plain ViTs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgs.errors import UserError
from dgs.model.checkpoint_files import read_state, reason_of
from dgs.model.clip_source import HUB, RANDOM, TIMM, ClipSource, no_tower

ATTENTIONS = (Attention, AttentionRope, EvaAttention)
CLOSE = 1e-4  # of the largest feature: how far our walk through a tower may be from timm's own


class SplitQkv(nn.Module):
    """nn.Linear for q, k and v at once as three linears whose outputs are joined, so that LoRA can sit on each alone.

    Same function as the layer it replaces; what surrounds it (rotary positions, norms of q and k, gates) stays timm's.
    """

    def __init__(self, joined: nn.Linear, biases: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        if biases is None and joined.bias is not None:
            biases = joined.bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(joined.in_features, joined.out_features // 3, biases is not None) for _ in range(3)
        )
        for number, linear in enumerate((self.q_proj, self.k_proj, self.v_proj)):
            linear.weight.data = joined.weight.detach().chunk(3)[number].clone()
            if biases is not None:
                linear.bias.data = biases[number].detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, W) to (B, L, 3 W')."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def split_qkv(attention: Any) -> None:
    """`SplitQkv` in an attention of timm's, in place; EVA's own biases of q and v go with it."""
    if attention.qkv is None:  # q_proj, k_proj and v_proj already
        return
    biases = None
    if getattr(attention, "q_bias", None) is not None:
        biases = (attention.q_bias, attention.k_bias, attention.v_bias)
        attention.q_bias = attention.k_bias = attention.v_bias = None  # forward then calls qkv as a layer
    attention.qkv = SplitQkv(attention.qkv, biases)


class TimmTower(nn.Module):
    """A vision transformer of timm's as `dgs.model.backbone.Tower`; names of tensors are those of open_clip's wrapper.

    Args:
        trunk: timm's model without a classifier.
        head: what follows it (open_clip's projection).
        name: for messages.
        image_size: px; positions are interpolated.

    Raises:
        UserError: a tower with other parts than these, which adapters cannot sit on; a size its patches do not divide.
    """

    adapted_blocks = "blocks"
    rope: Tensor | None

    def __init__(self, trunk: Any, head: nn.Module, name: str, image_size: int) -> None:
        super().__init__()
        require_adaptable(trunk, name, image_size)
        if tuple(trunk.patch_embed.img_size) != (image_size, image_size):
            trunk.set_input_size(img_size=(image_size, image_size))
        self.trunk, self.head = trunk.eval(), head.eval()
        self.prefix_tokens = int(trunk.num_prefix_tokens)
        noise = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            own = self(noise)
            first = trunk._pos_embed(trunk.patch_embed(noise[:1]))
            # Rotary positions of the one image size that there is: a table, for each block where they differ.
            self.register_buffer("rope", first[1] if isinstance(first, tuple) else None, persistent=False)
            tokens = self.embed(noise)
            self.token_shape = tokens.shape[1:]
            for attention in (block.attn for block in trunk.blocks):
                split_qkv(attention)
            for number in range(len(trunk.blocks)):
                tokens = self.block(number, tokens)
            ours = self.pool(tokens)
        if own.ndim != 2 or not torch.allclose(ours, own, rtol=0, atol=CLOSE * float(own.abs().max())):
            raise UserError(
                f"Expected {name} to be made of patches, blocks and pooling alone, found that it computes otherwise. "
                f"Choose another model.clip."
            )
        self.output_dim = own.shape[1]

    @property
    def blocks(self) -> nn.Module:
        """Its blocks, the first one first."""
        return self.trunk.blocks

    def embed(self, images: Tensor) -> Tensor:
        """As `Tower.embed`."""
        tokens = self.trunk._pos_embed(self.trunk.patch_embed(images))
        return self.trunk.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)

    def block(self, number: int, tokens: Tensor) -> Tensor:
        """As `Tower.block`."""
        block = self.trunk.blocks[number]
        if self.rope is None:
            return block(tokens)
        return block(tokens, rope=self.rope[number] if self.trunk.rope_mixed else self.rope)

    def pool(self, tokens: Tensor) -> Tensor:
        """As `Tower.pool`."""
        return self.head(self.trunk.forward_head(self.trunk.norm(tokens)))

    def forward(self, images: Tensor) -> Tensor:
        """timm's own forward: (B, 3, S, S) normalised to (B, D)."""
        return self.head(self.trunk(images))

    def train(self, mode: bool = True) -> TimmTower:
        """As nn.Module's, but for rotary positions, which some models move at random in training."""
        super().train(mode)
        if isinstance(rope := getattr(self.trunk, "rope", None), nn.Module):
            rope.eval()
        return self


def why_not(trunk: Any) -> str:
    """Why adapters cannot sit on q, k and v of every block of a timm model; empty if they can."""
    kind = type(trunk).__name__
    if type(trunk) not in (VisionTransformer, Eva):
        return f"{kind} is no plain transformer, whose blocks have q, k and v of all tokens"
    if type(trunk.patch_embed) is not PatchEmbed:
        return f"its patches come from a network of their own ({type(trunk.patch_embed).__name__})"
    if not isinstance(getattr(trunk, "patch_drop", None), (nn.Identity, type(None))):
        return "it drops patches"
    for block in trunk.blocks:
        attention = getattr(block, "attn", None)
        if type(attention) not in ATTENTIONS:
            return f"its blocks ({type(block).__name__}) have q, k and v in other layers"
    if any(isinstance(module, _BatchNorm) for module in trunk.modules()):
        return "it has batch norm, which training would change"
    return ""


def require_adaptable(trunk: Any, name: str, image_size: int) -> None:
    """Raise UserError, naming model.clip = `name`, unless a `TimmTower` can be made of a timm model."""
    if reason := why_not(trunk):
        raise UserError(f"Expected a vision transformer for model.clip, found {name}: {reason}. Choose another.")
    height, width = trunk.patch_embed.patch_size
    if image_size % height or image_size % width:
        raise UserError(
            f"Expected model.image_size to be a multiple of {height} px, the patch of {name}, found {image_size}."
        )


def require_tower(source: ClipSource, name: str, image_size: int) -> None:
    """Raise UserError where loading model.clip = `name` would, for its architecture, before any weight is there."""
    vision = source.config.get("model_cfg", {}).get("vision_cfg", {})
    if kind := source.timm or vision.get("timm_model_name"):
        with torch.device("meta"):  # no memory, no time
            trunk: Any = timm.create_model(kind, num_classes=0)
        require_adaptable(trunk, name, image_size)
    elif isinstance(vision.get("layers"), list):
        raise no_tower("ModifiedResNet")


def create_timm(name: str, weights: str) -> Any:
    """A model of timm's as the image side of a CLIP that has no other: `.visual.trunk` and an empty `.visual.head`.

    weights: RANDOM, HUB (downloaded), or a file of tensors under timm's names; a classifier in it is left out.

    Raises:
        UserError: weights that cannot be had or do not fit.
    """
    if weights == RANDOM:
        torch.manual_seed(0)
    try:
        trunk: Any = timm.create_model(name, pretrained=weights == HUB, num_classes=0)
        if weights not in (HUB, RANDOM):
            state = read_state(Path(weights))
            trunk.load_state_dict({key: value for key, value in state.items() if not key.startswith("head.")})
    except Exception as error:  # offline hubs and wrong files fail in many ways
        advice = (
            f"With network: python -c \"import timm; timm.create_model('{name}', pretrained=True)\"; without: set "
            f"model.pretrained to a safetensors file of it."
            if weights == HUB
            else f"Expected tensors of {name} under timm's names: give another file."
        )
        what = "from the hub" if weights == HUB else weights
        raise UserError(f"Cannot load the weights of {TIMM}{name}, {what} ({reason_of(error)}). {advice}") from None
    model, visual = nn.Module(), nn.Module()
    visual.trunk, visual.head = trunk, nn.Identity()
    model.visual = visual
    return model
