"""The release's training step, transcribed from its equations alone: what `dgs` is measured against.

Three towers in memory (student, frozen teacher, frozen text), every gradient by autograd, adapters as a dense B@A, text
encoded anew in each step. Nothing here is shared with `dgs`. Parameters bear the names of the release's checkpoint, so
`Release.state_dict()` is a stage-2 file and `Probe.state_dict()` a stage-1 file.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """Sizes of an OpenAI CLIP; heads are 64 wide."""

    width: int
    layers: int
    patch: int
    image: int
    embed: int
    text_width: int
    text_layers: int
    vocabulary: int = 49408
    context: int = 77


VIT_B_32 = Geometry(768, 12, 32, 224, 512, 512, 12)
VIT_L_14 = Geometry(1024, 24, 14, 224, 768, 768, 12)
REDUCED = Geometry(64, 24, 32, 224, 24, 64, 12, vocabulary=49408, context=77)  # as many tensors as ViT-L/14, small ones


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class AdaptedAttention(nn.Module):
    """Self-attention with a dense s B@A beside each of q, k and v, on a dropped-out input."""

    def __init__(self, width: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = width // 64, dropout
        self.scaling = alpha / math.sqrt(rank)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = nn.Linear(width, width)
            linear.w_lora_A = nn.Parameter(torch.empty(rank, width))
            linear.w_lora_B = nn.Parameter(torch.zeros(width, rank))
            nn.init.kaiming_uniform_(linear.w_lora_A, a=math.sqrt(5))
            self.add_module(name, linear)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        shaped = []
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            delta = self.scaling * (linear.w_lora_B @ linear.w_lora_A)
            y = F.linear(x, linear.weight, linear.bias) + F.linear(F.dropout(x, self.dropout, self.training), delta)
            shaped.append(y.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        q, k, v = shaped
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        attended = (
            self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            if isinstance(self.attn, nn.MultiheadAttention)
            else self.attn(y)
        )
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


def _plain(width: int) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
    nn.init.normal_(attention.in_proj_bias, std=0.02)  # zero by default, which would hide a lost bias
    return attention


class Vision(nn.Module):
    def __init__(self, g: Geometry, lora: dict[str, Any] | None) -> None:
        super().__init__()
        scale = g.width**-0.5
        self.conv1 = nn.Conv2d(3, g.width, g.patch, g.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(g.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((g.image // g.patch) ** 2 + 1, g.width))
        self.ln_pre, self.ln_post = nn.LayerNorm(g.width), nn.LayerNorm(g.width)
        self.transformer = Transformer(
            [Block(g.width, AdaptedAttention(g.width, **lora) if lora else _plain(g.width)) for _ in range(g.layers)]
        )
        self.proj = nn.Parameter(scale * torch.randn(g.width, g.embed))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(nn.Module):
    """An OpenAI CLIP; with `lora` its vision attention carries adapters."""

    def __init__(self, g: Geometry, lora: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.visual = Vision(g, lora)
        self.transformer = Transformer([Block(g.text_width, _plain(g.text_width)) for _ in range(g.text_layers)])
        self.token_embedding = nn.Embedding(g.vocabulary, g.text_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(g.context, g.text_width))
        self.ln_final = nn.LayerNorm(g.text_width)
        self.text_projection = nn.Parameter(g.text_width**-0.5 * torch.randn(g.text_width, g.embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=self.ln_final.weight.dtype).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


class Probe(nn.Module):
    """Stage 1: a frozen CLIP and one linear layer."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.clip_model_frozen = Clip(g).requires_grad_(False)
        self.img_frozen_fc = nn.Linear(g.embed, 1)


class Release(nn.Module):
    """Stage 2. `step` is one Adam step on normalised images (B, 3, S, S), tokens (B, T) and labels (B,)."""

    def __init__(
        self, g: Geometry, rank: int = 6, alpha: float = 6.0, dropout: float = 0.8, lr: float = 1e-4, lam: float = 0.2
    ) -> None:
        super().__init__()
        self.lam = lam
        self.clip_model = Clip(g, {"rank": rank, "alpha": alpha, "dropout": dropout})
        self.clip_model_frozen = Probe(g)
        self.text_fc = nn.Linear(g.embed, 1)
        self.img_fc = nn.Linear(g.embed, 1)
        self._start_from(self.clip_model_frozen.clip_model_frozen)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora" in name or name.startswith(("text_fc", "img_fc")))
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=lr, betas=(0.9, 0.999))

    @torch.no_grad()
    def _start_from(self, frozen: Clip) -> None:
        """Student weights = the frozen copy's."""
        state = self.clip_model.state_dict()
        for name, value in frozen.state_dict().items():
            if not name.startswith("visual.transformer") or ".attn." not in name:
                state[name].copy_(value)
                continue
            block, _, last = name.rpartition("attn.")
            if last.startswith("out_proj."):
                state[f"{block}attn.proj.{last.removeprefix('out_proj.')}"].copy_(value)
            else:
                kind = "weight" if last == "in_proj_weight" else "bias"
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    state[f"{block}attn.{part}_proj.{kind}"].copy_(third)

    def logits(self, images: Tensor) -> Tensor:
        """(B,) logits of the student."""
        return self.img_fc(self.clip_model.visual(images)).squeeze(1)

    def step(self, images: Tensor, tokens: Tensor, labels: Tensor) -> None:
        self.clip_model.train()
        bce = F.binary_cross_entropy_with_logits
        f = self.clip_model.visual(images)
        with torch.no_grad():
            t = self.clip_model.encode_text(tokens)
            f_teacher = self.clip_model_frozen.clip_model_frozen.visual(images)
        t.requires_grad_()
        f_teacher.requires_grad_()
        loss_image = bce(self.img_fc(f).squeeze(1), labels)
        loss_text = bce(self.text_fc(t).squeeze(1), labels)
        loss_teacher = bce(self.clip_model_frozen.img_frozen_fc(f_teacher).squeeze(1), labels)
        g_text = torch.autograd.grad(loss_text, t, retain_graph=True)[0]
        g_image = torch.autograd.grad(loss_teacher, f_teacher)[0]
        harmful = torch.relu(g_text)
        h = harmful / (harmful.norm(dim=1, keepdim=True) + 1e-6)
        loss_prior = (f * torch.minimum(g_image, torch.zeros_like(g_image))).sum(1).mean()
        f.register_hook(lambda g: g - (g * h).sum(1, keepdim=True) * h)
        self.optimizer.zero_grad()
        (loss_image + loss_text + self.lam * loss_prior).backward()
        self.optimizer.step()

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """The file the release saves after `eval()`: s B@A is in the weights, and A and B are still there."""
        state = {name: value.clone() for name, value in self.state_dict().items()}
        for name, module in self.clip_model.named_modules():
            if isinstance(module, AdaptedAttention):
                for part in ("q_proj", "k_proj", "v_proj"):
                    linear = getattr(module, part)
                    state[f"clip_model.{name}.{part}.weight"] += module.scaling * (linear.w_lora_B @ linear.w_lora_A)
        return state


def select_patches(image: NDArray[np.uint8], order: NDArray[np.int64], size: int = 32) -> NDArray[np.uint8]:
    """Patch selection, patch by patch, of an image with at least 49; `order` (49,): the kept ones, shuffled."""
    height, width = image.shape[0] // size * size, image.shape[1] // size * size
    patches = [image[y : y + size, x : x + size] for y in range(0, height, size) for x in range(0, width, size)]
    entropies = []
    for patch in patches:
        pixels = patch.astype(np.float64)
        gray = 0.299 * pixels[..., 0] + 0.587 * pixels[..., 1] + 0.114 * pixels[..., 2]
        if patch.max() > 1:
            gray = gray / 255
        power = np.abs(np.fft.fft2(gray)) ** 2
        p = power / (power.sum() + 1e-12)
        entropies.append(-np.sum(p * np.log2(p + 1e-12)))
    ascending = np.argsort(np.round(entropies, 9), kind="stable")
    kept = [patches[i] for i in (*ascending[:24], *ascending[-25:])]
    return np.concatenate([np.concatenate([kept[i] for i in row], axis=1) for row in order.reshape(7, 7)])
