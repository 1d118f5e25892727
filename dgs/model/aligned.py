"""A small text tower for an image tower without one, by contrast to its locked features (LiT, Zhai et al. 2022).

Differs from LiT: the text tower starts from nothing, and learns from the captions of the training split alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from numpy.typing import NDArray
from open_clip.transformer import TextTransformer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dgs.atomic import replacing_file
from dgs.data.manifest import ImageSource
from dgs.data.views import Views, batches
from dgs.device import choose_device
from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.clip import Clip
from dgs.model.identity import tensors_hash
from dgs.params import Params
from dgs.stats import share_interval

PAD, UNKNOWN, FIRST = 0, 1, 2  # numbers of the vocabulary; the tokens of training captions follow
TEXTS = 256  # a batch, where nothing is learned
FEWEST = 2  # captions that a contrast needs


@dataclass(frozen=True)
class Recipe:
    """What the text tower is, and how it is trained: AdamW, a cosine schedule, a learned temperature.

    unknown: share of a caption's tokens that are learned as unknown ones, for those that training does not have.
    """

    width: int = 128
    heads: int = 4
    layers: int = 2
    longest: int = 77
    steps: int = 400
    batch: int = 256
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.1
    unknown: float = 0.1
    temperature: float = 0.07
    coldest: float = 0.01
    seed: int = 0


RECIPE = Recipe()


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


class AlignedText(nn.Module):
    """open_clip's text transformer over the tokens of training captions; all others are one unknown token.

    Args:
        vocabulary: (V,) ascending token numbers of open_clip's tokenizer.
        length: tokens of a text; longer ones are cut.
        recipe: of which the tower's size is looked at.
        norm: length of an embedding, that of the tower's features.
    """

    vocabulary: Tensor
    norm: Tensor

    def __init__(self, vocabulary: Tensor, length: int, dim: int, recipe: Recipe, norm: float = 1.0) -> None:
        super().__init__()
        self.length, self.dim, self.recipe = length, dim, recipe
        self.register_buffer("vocabulary", vocabulary)
        self.register_buffer("norm", torch.tensor(norm))
        self.tower = TextTransformer(
            context_length=length, vocab_size=FIRST + len(vocabulary), width=recipe.width, heads=recipe.heads,
            layers=recipe.layers, output_dim=dim,
        )  # fmt: skip

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(N, length) numbers of the vocabulary; the end token is the highest, so that the tower finds it."""
        found = _tokenizer()(list(texts), context_length=self.length).to(self.vocabulary.device)
        at = torch.searchsorted(self.vocabulary, found).clamp(max=len(self.vocabulary) - 1)
        known = torch.where(self.vocabulary[at] == found, at + FIRST, UNKNOWN)
        return torch.where(found == 0, PAD, known)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, length) tokens to (N, D) embeddings of unit length."""
        return F.normalize(self.tower(tokens), dim=1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N texts to (N, D) float32 embeddings, as long as the tower's features are on average."""
        parts = [self(self.tokens(texts[i : i + TEXTS])) * self.norm for i in range(0, len(texts), TEXTS)]
        return torch.cat(parts).cpu().numpy()

    def save(self, file: Path, about: dict[str, Any]) -> None:
        """Write the tower, whole or not at all, with what is known of it."""
        said = {"length": self.length, "dim": self.dim, "recipe": asdict(self.recipe), "about": about}
        with replacing_file(file) as draft:
            save_file(self.state_dict(), draft, {name: json.dumps(value) for name, value in said.items()})

    @classmethod
    def load(cls, file: Path) -> tuple[AlignedText, dict[str, Any]]:
        """What `save` wrote.

        Raises:
            UserError: no such file, or a damaged one.
        """
        try:
            with safe_open(file, "pt") as opened:
                said = {name: json.loads(value) for name, value in opened.metadata().items()}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            text = cls(state["vocabulary"], said["length"], said["dim"], Recipe(**said["recipe"]))
            text.load_state_dict(state)
            return text.eval().requires_grad_(False), said["about"]
        except Exception as error:  # a damaged file fails in many ways
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"Cannot read the text side {file} ({reason}). Remove it, and run prepare again.") from None


def contrast(images: Tensor, texts: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE both ways (CLIP, Radford et al. 2021), in which equal captions are no negatives of each other.

    Args:
        images, texts: (B, D) of unit length, row i of both is a pair.
        captions: (B,) numbers of the captions.
        scale: 1 / temperature.
    """
    own = torch.arange(len(captions), device=captions.device)
    twins = (captions[:, None] == captions) & (own[:, None] != own)
    logits = (scale * images @ texts.T).masked_fill(twins, -math.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def align(features: Tensor, captions: Sequence[str], recipe: Recipe) -> AlignedText:
    """Train a text tower to (N, D) locked image features and the N captions of these images; the same bits each time.

    Raises:
        UserError: fewer than two distinct captions.
    """
    distinct, numbers = np.unique(np.asarray(captions, dtype=object).astype(str), return_inverse=True)
    if len(distinct) < FEWEST:
        raise UserError(
            f"Expected training images with different captions for model.text: aligned, found {len(distinct)}. "
            f"Give captions (data.captions), or set model.text: none."
        )
    device, whole = features.device, _tokenizer()(distinct.tolist(), context_length=recipe.longest)
    images, of_image = F.normalize(features, dim=1), torch.from_numpy(numbers).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        norm = float(features.norm(dim=1).mean())
        text = AlignedText(whole[whole > 0].unique(), int((whole > 0).sum(1).max()), features.shape[1], recipe, norm)
        scale = nn.Parameter(torch.tensor(-math.log(recipe.temperature)))
        text, scale = text.to(device), nn.Parameter(scale.detach().to(device))
    random = torch.Generator().manual_seed(recipe.seed)
    tokens, end = text.tokens(distinct.tolist())[of_image], FIRST + len(text.vocabulary) - 2  # its start and end tokens
    flat = [parameter for parameter in text.parameters() if parameter.ndim < 2]
    groups = [
        {"params": [parameter for parameter in text.parameters() if parameter.ndim > 1], "weight_decay": recipe.decay},
        {"params": [*flat, scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / recipe.warmup) * (1 + math.cos(math.pi * step / recipe.steps)) / 2,
    )
    order = torch.empty(0, dtype=torch.int64)
    for _ in tqdm(range(recipe.steps), desc="text side", unit="step"):
        if len(order) < min(recipe.batch, len(images)):
            order = torch.randperm(len(images), generator=random)
        rows, order = order[: recipe.batch], order[recipe.batch :]
        hidden = torch.rand(len(rows), text.length, generator=random) < recipe.unknown
        seen, rows = tokens[rows.to(device)], rows.to(device)
        seen = seen.masked_fill(hidden.to(device) & (seen != PAD) & (seen < end), UNKNOWN)
        loss = contrast(images[rows], text(seen), of_image[rows], scale.exp().clamp(max=1 / recipe.coldest))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return text.eval().requires_grad_(False)


def retrieval(features: Tensor, captions: Sequence[str], text: AlignedText) -> dict[str, float | int]:
    """How often an image's own caption is among the 1 or 5 nearest of all distinct ones: with Wilson's intervals.

    Every caption counts once, by the mean over its images; (N, D) features of N captions. Of captions that are equally
    near, such as two of the same known words, either is as likely to come first.

    Returns:
        pool (distinct captions), images, and of k = 1, 5: r{k}, r{k}_low, r{k}_high, chance{k}, all fractions.
    """
    distinct, numbers = np.unique(np.asarray(captions, dtype=object).astype(str), return_inverse=True)
    near = F.normalize(features, dim=1).cpu() @ torch.from_numpy(text.encode(distinct.tolist())).T
    own = near.gather(1, torch.from_numpy(numbers)[:, None])
    nearer, as_near = (near > own).sum(1).numpy(), (near == own).sum(1).numpy()
    found: dict[str, float | int] = {"pool": len(distinct), "images": len(numbers)}
    for k in (1, 5):
        share = float(pd.Series(((k - nearer) / as_near).clip(0, 1)).groupby(numbers).mean().mean())
        low, high = share_interval(round(share * len(distinct)), len(distinct))[1:]
        found |= {f"r{k}": share, f"r{k}_low": low, f"r{k}_high": high, f"chance{k}": min(1.0, k / len(distinct))}
    return found


@torch.no_grad()
def locked_features(clip: Clip, views: Views, params: Params) -> Tensor:
    """(N, D) features of views in the frozen tower, on the device that computes."""
    device = choose_device(params.compute.device)
    backbone = Backbone(clip).to(device).eval()
    loader = batches(views, params.compute.batch_size, params.compute.workers)
    return torch.cat([backbone(images.to(device)) for images, _ in tqdm(loader, desc="image features", unit="batch")])


def pairs_of(manifest: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training rows, validation rows whose caption no training image has); test rows are looked at by neither."""
    train = manifest[manifest["split"] == "train"]
    held_out = manifest[(manifest["split"] == "val") & ~manifest["caption"].isin(train["caption"])]
    return train, held_out


def key_of(rows: Sequence[pd.DataFrame], clip: Clip, params: Params) -> str:
    """A hash of all that an aligned text side depends on: tower, views, images, captions, recipe, code, libraries."""
    said = [
        clip.identity, params.model.model_dump(exclude={"clip", "lora", "levels"}),
        params.patches.model_dump(), params.data.fit, choose_device(params.compute.device).type, params.compute.threads,
        params.compute.batch_size, asdict(RECIPE), [version(name) for name in ("torch", "open_clip_torch", "timm")],
        [part[["sha256", "caption"]].to_numpy().tolist() for part in rows],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:20]


def aligned_text(
    clip: Clip,
    manifest: pd.DataFrame,
    source: ImageSource,
    params: Params,
    patches: dict[str, NDArray[np.int32]] | None,
    folder: Path,
) -> tuple[AlignedText, dict[str, Any]]:
    """The text tower aligned to `clip` on the training split, and what is known of it; kept in `folder`.

    Known: "held_out", its `retrieval` on validation captions that training does not have; None with fewer than two.
    And "weights", sha256 of its tensors.
    """
    train, held_out = pairs_of(manifest)
    file = folder / f"{key_of((train, held_out), clip, params)}.safetensors"
    if not file.exists():
        rows = pd.concat([train, held_out])
        features = locked_features(clip, Views(rows, source, params, patches=patches), params)
        text = align(features[: len(train)], train["caption"].tolist(), RECIPE)
        others = held_out["caption"].tolist()
        known = retrieval(features[len(train) :], others, text) if len(set(others)) >= FEWEST else None
        about = {"images": len(train), "captions": int(train["caption"].nunique()), "held_out": known}
        text.save(file, {**about, "weights": tensors_hash(text.state_dict())})
    return AlignedText.load(file)
