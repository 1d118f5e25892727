"""Train all generators on photographs of scenes of their own and save their weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from minibench import camera, generators, scenes
from minibench.camera import Bytes


@dataclass(frozen=True)
class Recipe:
    """Every number of the generators' training; steps by name."""

    seed: int = 0
    scenes: int = 3_000
    held_out: int = 200
    batch: int = 8
    lr: float = 2e-3
    critic_lr: float = 4e-4
    steps: dict[str, int] = field(default_factory=lambda: dict(generators.STEPS))


def train(name: str, images: Bytes, drawings: Bytes, recipe: Recipe, progress: bool = False) -> generators.Generator:
    """Train one generator on photographs and drawings, (N, 64, 64, 3) uint8, with Adam and a cosine schedule."""
    torch.manual_seed(recipe.seed * 100 + generators.NAMES.index(name))
    random = torch.Generator().manual_seed(recipe.seed * 100 + generators.NAMES.index(name))
    steps = recipe.steps[name]
    model = generators.create(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    critic = generators.Critic()
    judge = torch.optim.Adam(critic.parameters(), lr=recipe.critic_lr, betas=(0.5, 0.99))
    for _ in tqdm(range(steps), f"generator {name}", disable=not progress):
        chosen = torch.randint(len(images), (recipe.batch,), generator=random).numpy()
        real = generators.to_tensor(images[chosen])
        loss, output = model.loss(real, generators.to_tensor(drawings[chosen]), random)
        if model.adversarial:
            hinge = F.relu(1 - critic(real)).mean() + F.relu(1 + critic(output.detach())).mean()
            judge.zero_grad()
            hinge.backward()
            judge.step()
            loss = loss - model.adversarial * critic(output).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def psnr(first: Bytes, second: Bytes) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB: (N, H, W, 3) uint8 twice -> float."""
    error = ((first.astype(np.float64) - second) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))


def train_all(path: Path, recipe: Recipe, workers: int = 1, progress: bool = False) -> dict[str, float]:
    """Train and save every generator; returns the PSNR of each on held-out photographs, dB."""
    found, images = camera.photographs(recipe.seed, "generators", range(recipe.scenes), 0, workers, progress)
    drawings = np.stack([camera.draw(s) for s in found])
    held_out = range(recipe.held_out)
    held, held_images = camera.photographs(recipe.seed, "generators-val", held_out, camera.MARGIN, workers, progress)
    models = {name: train(name, images, drawings, recipe, progress) for name in generators.NAMES}
    generators.save(models, path)
    quality = {}
    for name, model in generators.load(path).items():
        noise = [scenes.stream(recipe.seed, "generators-val", i, "generator") for i in range(len(held))]
        made = generators.synthesise(model, held_images, held, noise)
        quality[name] = round(psnr(camera.crop(held_images), made), 2)
    return quality
