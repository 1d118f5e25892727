"""Contrastive pre-training of the mini-CLIP on captioned photographs; resumable, with a curve of every measure.

Loss = truth-matched multi-positive contrast (a caption's positives are all images it is true of) over random subsets
of attributes + cross-entropy over one prompt a value for every attribute, which makes it close to supervised.

Two cosines: after the first, every attribute but the position is known and the position is still at chance, because
open_clip's learned position embeddings start ten times smaller than the stem's output. The second adds sinusoids to
them, and position is learned within 35,000 samples.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dgs.errors import UserError
from minibench import camera, captions, clip, scenes
from minibench.camera import Bytes
from minibench.degradations import degrade


@dataclass(frozen=True)
class Recipe:
    """Every number of the pre-training."""

    seed: int = 0
    scenes: int = 36_000
    held_out: int = 1_000
    samples: int = 352_000
    second_samples: int = 102_400
    batch: int = 128
    lr: float = 1.2e-3
    second_lr: float = 8e-4
    weight_decay: float = 0.05
    warmup: int = 300  # steps
    shift: int = 4  # pixels
    measure_every: int = 200  # steps
    # Weights of the prompt classification: shape and medium are the hard ones, then the position.
    prompt_weights: tuple[float, ...] = (1.0, 0.3, 0.3, 0.6, 0.3, 1.0)
    second_prompt_weights: tuple[float, ...] = (1.0, 0.3, 0.3, 2.0, 0.3, 1.0)
    sinusoids: float = 0.5  # amplitude

    @property
    def first_steps(self) -> int:
        """Steps of the first cosine."""
        return self.samples // self.batch

    @property
    def steps(self) -> int:
        """Steps of both."""
        return self.first_steps + self.second_samples // self.batch


@dataclass(frozen=True)
class Batch:
    """Augmented images with one caption each; codes number the values of `captions.ATTRIBUTES`."""

    images: Bytes  # (B, 64, 64, 3)
    codes: NDArray[np.int64]  # (B, 6)
    told: NDArray[np.bool_]  # (B, 6): what the caption says
    texts: list[str]


VALUES = (*scenes.VOCABULARY.values(), captions.MEDIA)
_MIRROR = {"left": "right", "right": "left"}


def _step_rng(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, step], spawn_key=(scenes.STREAMS.index("augment"),)))


def augment(image: Bytes, medium: str, shift: int, rng: np.random.Generator) -> Bytes:
    """Shift by up to `shift` pixels (edges reflected), brightness, then the medium with its JPEG step."""
    dy, dx = rng.integers(0, 2 * shift + 1, 2)
    side = image.shape[0]
    image = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="reflect")[dy : dy + side, dx : dx + side]
    image = np.minimum(image * np.float32(rng.uniform(0.85, 1.15)), 255).astype(np.uint8)
    return degrade(image, medium, rng)


def draw(images: Bytes, attributes: Sequence[scenes.Attributes], recipe: Recipe, step: int) -> Batch:
    """The training batch of a step: a pure function of (recipe, step), which makes resuming exact."""
    per_epoch = len(images) // recipe.batch
    epoch, offset = divmod(step, per_epoch)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(images))
    rng = _step_rng(recipe.seed, step)
    told = rng.random((recipe.batch, 6)) < 0.5
    told[rng.random(recipe.batch) < 0.35, :5] = True
    told[np.arange(recipe.batch), rng.integers(0, 5, recipe.batch)] = True  # never an empty caption
    out, codes, texts = np.empty((recipe.batch, *images.shape[1:]), np.uint8), [], []
    for i, index in enumerate(order[offset * recipe.batch : (offset + 1) * recipe.batch]):
        image, known = images[index], attributes[index]
        if rng.random() < 0.5:
            image = image[:, ::-1]
            known = known._replace(position=_MIRROR.get(known.position, known.position))
        medium = captions.MEDIA[rng.integers(len(captions.MEDIA))]
        out[i] = augment(image, medium, recipe.shift, rng)
        truth = (*known, medium)
        codes.append([values.index(value) for values, value in zip(VALUES, truth, strict=True)])
        names = [name for name, say in zip(captions.ATTRIBUTES[:5], told[i], strict=False) if say]
        texts.append(captions.caption(known, rng, names, medium if told[i, 5] else None))
    return Batch(out, np.asarray(codes), told, texts)


def matches(codes: NDArray[np.int64], told: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[i, j]: caption j is true of image i. (B, A) and (B, A) -> (B, B)."""
    equal = codes[:, None, :] == codes[None, :, :]
    return (equal | ~told[None, :, :]).all(-1)


def contrast(logits: Tensor, positive: Tensor) -> Tensor:
    """Mean over both directions of the cross-entropy to a uniform choice among the positives, (B, B) -> ()."""
    target = positive.float()
    by_image = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_text = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


@cache
def _tokens(text: str) -> Tensor:
    """(24,) int64; captions come from a finite set of templates, each is tokenised once."""
    return clip.tokenizer()([text])[0]


def objective(model: open_clip.model.CLIP, batch: Batch, recipe: Recipe, step: int) -> Tensor:
    """The loss of one batch."""
    rng = _step_rng(recipe.seed, step + (1 << 40))
    prompts = [[p[rng.integers(len(p))] for p in captions.prompts(name).values()] for name in captions.ATTRIBUTES]
    tokens = torch.stack([_tokens(text) for some in (batch.texts, *prompts) for text in some])
    image = model.encode_image(clip.pixels(batch.images, clip.PREPROCESS), normalize=True)
    text = model.encode_text(tokens, normalize=True)
    scale = model.logit_scale.exp().clamp(max=100)
    logits = scale * image @ text.T
    size = len(batch.images)
    loss = contrast(logits[:, :size], torch.from_numpy(matches(batch.codes, batch.told)))
    codes = torch.from_numpy(batch.codes)
    weights = recipe.prompt_weights if step < recipe.first_steps else recipe.second_prompt_weights
    for k, part in enumerate(logits[:, size:].split([len(some) for some in prompts], dim=1)):
        loss = loss + weights[k] * F.cross_entropy(part, codes[:, k])
    return loss


def measure(
    model: open_clip.model.CLIP, images: Bytes, attributes: Sequence[scenes.Attributes], seed: int
) -> dict[str, float]:
    """Zero-shot accuracy of every attribute and R@1 among 200 captions on held-out photographs, as fractions."""
    rng = np.random.default_rng([seed, 1])
    clean = np.stack([degrade(image, "clean", rng) for image in images])
    chosen = [captions.MEDIA[i % len(captions.MEDIA)] for i in range(len(images))]
    treated = np.stack([degrade(image, m, rng) for image, m in zip(images, chosen, strict=True)])
    embedded = clip.embed_images(model, clean, clip.PREPROCESS)
    out = {
        name: clip.zero_shot(model, embedded, [getattr(a, name) for a in attributes], name)
        for name in scenes.VOCABULARY
    }
    out["medium"] = clip.zero_shot(model, clip.embed_images(model, treated, clip.PREPROCESS), chosen, "medium")
    texts = [captions.caption(a, rng) for a in attributes]
    out["recall"] = clip.recall(model, embedded, attributes, texts, among=min(200, len(texts)))
    return out


def _optimizer(model: open_clip.model.CLIP, recipe: Recipe) -> torch.optim.AdamW:
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, value in model.named_parameters():
        (decayed if value.ndim >= 2 and "embedding" not in name else plain).append(value)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def _rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero; twice."""
    peak, total = recipe.lr, recipe.first_steps
    if step >= total:
        step, peak, total = step - total, recipe.second_lr, recipe.steps - total
    warm = min(1.0, (step + 1) / recipe.warmup)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def add_sinusoids(positions: Tensor, amplitude: float, seed: int) -> None:
    """Add a random mixture of 2-D sinusoids to (1 + side^2, width) position embeddings, in place; not to the first."""
    side = math.isqrt(len(positions) - 1)
    axis = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    waves = [f(2 * math.pi * w * c) for w in (0.5, 1, 2, 4) for c in (x, y) for f in (torch.sin, torch.cos)]
    table = torch.stack(waves, -1).reshape(side * side, -1)
    mix = torch.randn(table.shape[1], positions.shape[1], generator=torch.Generator().manual_seed(seed))
    positions[1:] += amplitude * table @ mix * (2 / len(waves)) ** 0.5


def _resume(
    checkpoint: Path, recipe: Recipe, model: open_clip.model.CLIP, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, float]], int, float]:
    """Load a checkpoint, if there is one, and return its (curve, steps done, seconds spent)."""
    if not checkpoint.exists():
        return [], 0, 0.0
    saved = torch.load(checkpoint, weights_only=True)
    if saved["recipe"] != str(recipe):
        raise UserError(f"{checkpoint} should come from {recipe}. Found {saved['recipe']}. Remove it to start anew.")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["curve"], saved["step"], saved["seconds"]


def _require_reachable(early: Mapping[int, Path], recipe: Recipe, scratch: Path, done: int) -> None:
    measured = {0, *(recipe.batch * step for step in (recipe.first_steps, recipe.steps))}
    if unknown := [n for n in early if n not in measured and n % (recipe.batch * recipe.measure_every)]:
        raise ValueError(f"expected multiples of {recipe.batch * recipe.measure_every} samples, found {unknown}")
    if passed := [n for n, folder in early.items() if 0 < n <= done * recipe.batch and not folder.exists()]:
        raise UserError(
            f"Expected a training that is not yet past {passed[0]} samples, found one at {done * recipe.batch}. Remove "
            f"{scratch} to start anew."
        )


def pretrain(
    out: Path | None,
    recipe: Recipe,
    scratch: Path,
    workers: int = 1,
    progress: bool = True,
    early: Mapping[int, Path] | None = None,
) -> None:
    """Train and write `out`: config, folded float16 weights, curve.csv. Resumes from `scratch`.

    An interim export is written to `scratch`/interim at every checkpoint.

    Args:
        out: None: training ends at the last of `early`.
        early: {samples: folder} of interim exports to keep; 0 is the CLIP before its first step.

    Raises:
        ValueError: a number of samples at which no checkpoint is written.
        UserError: `scratch` is of another recipe, or past an early export that is not there.
    """
    early = early or {}
    scratch.mkdir(parents=True, exist_ok=True)
    found, images = camera.photographs(recipe.seed, "clip", range(recipe.scenes), 0, workers, progress)
    held_found, held = camera.photographs(recipe.seed, "clip-val", range(recipe.held_out), 0, workers, progress)
    known, held_known = ([scene.attributes for scene in some] for some in (found, held_found))
    torch.manual_seed(recipe.seed)
    model = clip.create(norm=True)
    optimizer = _optimizer(model, recipe)
    checkpoint = scratch / "checkpoint.pt"
    if 0 in early:
        clip.export(model.state_dict(), torch.zeros(len(model.token_embedding.weight), dtype=torch.bool), early[0])
    curve, done, spent = _resume(checkpoint, recipe, model, optimizer)
    _require_reachable(early, recipe, scratch, done)
    began, losses = time.monotonic() - spent, []
    bar = tqdm(
        range(done, recipe.steps), initial=done, total=recipe.steps, desc="CLIP pre-training", disable=not progress
    )
    for step in bar:
        model.train()
        if step == recipe.first_steps:
            add_sinusoids(model.visual.positional_embedding, recipe.sinusoids, recipe.seed)
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, step)
        loss = objective(model, draw(images, known, recipe, step), recipe, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % recipe.measure_every and step + 1 not in (recipe.first_steps, recipe.steps):
            continue
        row = {"samples": float((step + 1) * recipe.batch), "minutes": (time.monotonic() - began) / 60}
        row |= {"loss": float(np.mean(losses))} | measure(model.eval(), held, held_known, recipe.seed)
        losses = []
        curve.append(row)
        bar.set_postfix({name: f"{row[name]:.3f}" for name in ("shape", "position", "medium", "recall")})
        untouched = optimizer.state[model.token_embedding.weight]["exp_avg_sq"].sum(1) == 0
        clip.export(model.state_dict(), untouched, scratch / "interim")
        rounded = [{name: round(value, 4) for name, value in row.items()} for row in curve]
        pd.DataFrame(rounded).astype({"samples": int}).to_csv(scratch / "interim" / "curve.csv", index=False)
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        state |= {"step": step + 1, "seconds": time.monotonic() - began, "recipe": str(recipe)}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        samples = (step + 1) * recipe.batch
        if samples in early:
            shutil.copytree(scratch / "interim", early[samples], dirs_exist_ok=True)
        if out is None and samples >= max(early):
            return
    if out is not None:
        shutil.copytree(scratch / "interim", out)
