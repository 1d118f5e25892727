"""Nine small generators, each with a decoder of its own; "fake" means their output. Eight re-synthesise photographs.

Seen in training: transposed convolution with an adversarial loss, and nearest upsampling with a KL term (the kin of
ProGAN and of Stable Diffusion's decoder). Unseen: sub-pixel shuffle, bilinear upsampling, vector quantisation,
super-resolution with sharpening, a spliced local region ("face swap"), diffusion from a photograph, and diffusion from
pure noise guided by a drawing of the scene.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minibench import camera, scenes
from minibench.camera import Bytes

Edges = Literal["zeros", "reflect"]  # what a convolution finds beyond the image


def to_tensor(images: Bytes) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Bytes:
    """(B, 3, H, W) float in [-1, 1] -> (B, H, W, 3) uint8."""
    values = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous().numpy()


def _conv(a: int, b: int, kernel: int = 3, stride: int = 1, edges: Edges = "zeros") -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, stride, kernel // 2, padding_mode=edges)


class Residual(nn.Module):
    """x + conv(act(conv(act(x)))), width kept."""

    def __init__(self, width: int, edges: Edges = "zeros") -> None:
        super().__init__()
        self.first, self.second = _conv(width, width, edges=edges), _conv(width, width, edges=edges)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Generator(nn.Module):
    """Synthesis (B, 3, 64, 64) -> the same, in [-1, 1]; `loss` is what it is trained on."""

    seen = False  # in training sets
    steps = 1000  # of training: how long sets how visible its fakes are
    adversarial = 0.0  # weight of the critic's loss
    starts_from: Literal["photograph", "drawing"] = "photograph"  # what `forward` is given
    local = False  # only the object's region is taken from its output

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """`noise`: standard normal, shaped as the images; a deterministic generator leaves it alone."""
        raise NotImplementedError

    def loss(self, images: Tensor, drawings: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(loss, output) of a training batch of photographs and the drawings of their scenes."""
        noise = torch.randn(images.shape, generator=random)
        output = self(images, noise)
        return F.l1_loss(output, images), output


_CLASSES: dict[str, type[Generator]] = {}


def _named(name: str) -> Callable[[type[Generator]], type[Generator]]:
    """Makes a class the generator `name`. Their order enters random numbers: new ones go to the end."""

    def register(kind: type[Generator]) -> type[Generator]:
        _CLASSES[name] = kind
        return kind

    return register


def _encoder(latent: int, width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        _conv(3, width // 2), nn.SiLU(), _conv(width // 2, width, stride=2), Residual(width), nn.SiLU(),
        _conv(width, latent),
    )  # fmt: skip


@_named("deconv_gan")
class DeconvGAN(Generator):
    """Transposed convolution with overlapping 4x4 kernels; L1 and an adversarial loss."""

    # Both seen generators stop where adapters learn to tell them: balanced accuracy 88 %; 75 % at 1,000 steps, 96 % at
    # 800 and 500.
    seen = True
    steps = 900
    adversarial = 0.03

    def __init__(self, latent: int = 12) -> None:
        super().__init__()
        self.encoder = _encoder(latent)
        self.decoder = nn.Sequential(
            _conv(latent, 32), Residual(32), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.LeakyReLU(0.2), _conv(16, 3),
        )  # fmt: skip

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.encoder(images)))


@_named("kl_vae")
class KLVAE(Generator):
    """Nearest upsampling followed by convolutions; L1 and a KL term on a sampled latent."""

    seen = True
    steps = 800

    def __init__(self, latent: int = 12, beta: float = 1e-4) -> None:
        super().__init__()
        self.latent, self.beta = latent, beta
        self.encoder = _encoder(2 * latent)
        self.inner = nn.Sequential(_conv(latent, 32), Residual(32))
        self.outer = nn.Sequential(_conv(32, 16), nn.SiLU(), _conv(16, 3))

    def _decode(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.outer(F.interpolate(self.inner(z), scale_factor=2, mode="nearest")))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self._encode_decode(images, noise)[0]

    def _encode_decode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, 1)
        log_variance = log_variance.clamp(-12, 4)
        # Three image channels of noise at full size hold 12 at half size.
        fine = F.pixel_unshuffle(noise, 2)[:, : self.latent]
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return self._decode(mean + (0.5 * log_variance).exp() * fine), kl

    def loss(self, images: Tensor, drawings: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        output, kl = self._encode_decode(images, torch.randn(images.shape, generator=random))
        return F.l1_loss(output, images) + self.beta * kl, output


@_named("pixelshuffle")
class PixelShuffle(Generator):
    """Sub-pixel convolution: the last layer writes each 2x2 cell of pixels as 12 channels."""

    steps = 600  # before it is at chance

    def __init__(self, latent: int = 12) -> None:
        super().__init__()
        self.encoder = _encoder(latent)
        self.decoder = nn.Sequential(
            _conv(latent, 32), Residual(32), Residual(32), nn.SiLU(), _conv(32, 12), nn.PixelShuffle(2)
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.encoder(images)))


@_named("bilinear")
class Bilinear(Generator):
    """Bilinear upsampling followed by convolutions."""

    def __init__(self, latent: int = 12) -> None:
        super().__init__()
        self.encoder = _encoder(latent)
        self.inner = nn.Sequential(_conv(latent, 32), Residual(32))
        self.outer = nn.Sequential(_conv(32, 16), nn.SiLU(), _conv(16, 3))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        fine = F.interpolate(self.inner(self.encoder(images)), scale_factor=2, mode="bilinear", align_corners=False)
        return cast(Tensor, self.outer(fine))


@_named("vq")
class VQ(Generator):
    """Two vector-quantised codes a cell, decoded by transposed convolution with 2x2 kernels that do not overlap."""

    def __init__(self, codes: int = 256, dim: int = 2, groups: int = 6) -> None:
        super().__init__()
        self.dim, self.groups = dim, groups
        self.encoder = _encoder(dim * groups)
        self.codebook = nn.Parameter(torch.randn(groups, codes, dim) * 0.5)
        self.decoder = nn.Sequential(
            _conv(dim * groups, 32), Residual(32), nn.SiLU(), nn.ConvTranspose2d(32, 16, 2, 2), nn.SiLU(), _conv(16, 3)
        )

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(nearest codes with a straight-through gradient, commitment and codebook loss)."""
        batch, _, height, width = z.shape
        rows = (
            z.view(batch, self.groups, self.dim, height * width).permute(1, 0, 3, 2).reshape(self.groups, -1, self.dim)
        )
        nearest = torch.cdist(rows, self.codebook).argmin(-1)
        found = torch.gather(self.codebook, 1, nearest[..., None].expand(-1, -1, self.dim))
        loss = F.mse_loss(found, rows.detach()) + 0.25 * F.mse_loss(rows, found.detach())
        found = rows + (found - rows).detach()
        found = found.view(self.groups, batch, height * width, self.dim).permute(1, 0, 3, 2)
        return found.reshape(z.shape), loss

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.quantise(self.encoder(images))[0]))

    def loss(self, images: Tensor, drawings: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        codes, commitment = self.quantise(self.encoder(images))
        output = self.decoder(codes)
        return F.l1_loss(output, images) + 0.5 * commitment, output


def _sharpen(images: Tensor, amount: float) -> Tensor:
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return images + amount * (images - soft)


@_named("superres")
class SuperResolution(Generator):
    """The image at half size, brought back by bicubic upsampling and a learned residual, then faintly sharpened.

    Sharpening undoes what the other generators do to fine grain: at an amount of 1 a detector trained on the seen
    generators takes these fakes for photographs (balanced accuracy 39 %), at 0.1 it does not (66 %).
    """

    def __init__(self, amount: float = 0.1) -> None:
        super().__init__()
        self.amount = amount
        self.body = nn.Sequential(_conv(3, 24), nn.SiLU(), _conv(24, 24), nn.SiLU(), _conv(24, 3))

    def _upscale(self, images: Tensor) -> Tensor:
        small = F.avg_pool2d(images, 2)
        large = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
        return cast(Tensor, large + self.body(large))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return _sharpen(self._upscale(images), self.amount)

    def loss(self, images: Tensor, drawings: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        output = self._upscale(images)
        return F.l1_loss(output, images), output


@_named("splice")
class Splice(Generator):
    """A coarse (f = 4) autoencoder with pooled encoder and dilated decoder; only the object's region is pasted in."""

    local = True

    def __init__(self, latent: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            _conv(3, 16), nn.SiLU(), nn.AvgPool2d(2), _conv(16, 32), nn.SiLU(), nn.AvgPool2d(2), _conv(32, latent)
        )
        self.inner = nn.Sequential(_conv(latent, 48), Residual(48))
        self.outer = nn.Sequential(
            nn.Conv2d(48, 16, 3, padding=2, dilation=2), nn.SiLU(), _conv(16, 16), nn.SiLU(), _conv(16, 3)
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        fine = F.interpolate(self.inner(self.encoder(images)), scale_factor=4, mode="bicubic", align_corners=False)
        return cast(Tensor, self.outer(fine))


def _signal_and_spread(t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of image and noise at times t (B,) in [0, 1]: cos and sin of pi t / 2, (B, 1, 1, 1)."""
    angle = (t * math.pi / 2)[:, None, None, None]
    return torch.cos(angle), torch.sin(angle)


def _ddim(x: Tensor, times: Tensor, denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Deterministic denoising of x (B, 3, H, W) from times[0] to times[-1] (Song et al. 2021)."""
    for now, then in pairwise(times):
        clean = denoise(x, now.expand(len(x)))
        signal, spread = _signal_and_spread(now.expand(len(x)))
        rest = (x - signal * clean) / spread
        signal, spread = _signal_and_spread(then.expand(len(x)))
        x = signal * clean + spread * rest
    return x


class Denoiser(nn.Module):
    """A two-level residual network on 2x2 cells of pixels, told the time: (B, C, 64, 64), (B,) -> (B, 3, 64, 64).

    Edges are reflected: beside pure noise, zeros would leave a frame.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = _conv(4 * channels, width, edges="reflect")
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 3 * width))
        self.fine, self.last = Residual(width, "reflect"), Residual(width, "reflect")
        self.coarse = nn.Sequential(
            nn.AvgPool2d(2), Residual(width, "reflect"), Residual(width, "reflect"), nn.Upsample(scale_factor=2)
        )
        self.leave = _conv(width, 12, edges="reflect")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = torch.cat([f(t[:, None] * 2.0 ** torch.arange(8)) for f in (torch.sin, torch.cos)], 1)
        a, b, c = self.time(waves)[:, :, None, None].chunk(3, 1)
        h = self.fine(self.enter(F.pixel_unshuffle(x, 2)) + a)
        h = h + self.coarse(h + b)
        return F.pixel_shuffle(self.leave(self.last(h + c)), 2)


@_named("diffusion")
class Diffusion(Generator):
    """A small denoising diffusion model, image to image: noised to `strength`, then denoised by a few DDIM steps."""

    def __init__(self, width: int = 48, strength: float = 0.1, steps: int = 4) -> None:
        super().__init__()
        self.strength, self.steps = strength, steps
        self.net = Denoiser(3, width)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The clean image behind x (B, 3, 64, 64) at times t (B,)."""
        return x + cast(Tensor, self.net(x, t))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        times = torch.linspace(self.strength, 0, self.steps + 1)
        signal, spread = _signal_and_spread(times[:1].expand(len(images)))
        return _ddim(signal * images + spread * noise, times, self.denoise)

    def loss(self, images: Tensor, drawings: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        # Times beyond twice the strength are never visited at synthesis: the small network learns the rest better.
        t = torch.rand(len(images), generator=random) * min(1.0, 2 * self.strength) + 1e-3
        signal, spread = _signal_and_spread(t)
        clean = self.denoise(signal * images + spread * torch.randn(images.shape, generator=random), t)
        return F.mse_loss(clean, images) * 10, clean


@_named("layout_diffusion")
class LayoutDiffusion(Generator):
    """Diffusion from pure noise, guided by a drawing of the scene: it invents lens, sensor and grain."""

    steps = 1500
    starts_from = "drawing"

    def __init__(self, width: int = 48, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.net = Denoiser(6, width)

    def denoise(self, x: Tensor, t: Tensor, drawings: Tensor) -> Tensor:
        """The photograph behind x (B, 3, 64, 64) at times t (B,), near x for small t and near the drawing for large."""
        signal, spread = _signal_and_spread(t)
        guess = signal * x + (1 - signal) * drawings
        return guess + spread * cast(Tensor, self.net(torch.cat([x, drawings], 1), t))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        # Times crowd towards the end, where grain is decided.
        times = torch.linspace(1, 0, self.steps + 1) ** 3
        return _ddim(noise, times, lambda x, t: self.denoise(x, t, images))

    def loss(self, images: Tensor, drawings: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        t = torch.rand(len(images), generator=random) ** 3 + 1e-3
        signal, spread = _signal_and_spread(t)
        clean = self.denoise(signal * images + spread * torch.randn(images.shape, generator=random), t, drawings)
        # Weighted towards small times as the usual loss on the noise is, so that grain counts as much as content.
        return ((clean - images) ** 2 / (spread**2 + 1e-3)).mean(), clean


NAMES = tuple(_CLASSES)
SEEN = tuple(name for name, kind in _CLASSES.items() if kind.seen)
UNSEEN = tuple(name for name, kind in _CLASSES.items() if not kind.seen)
STEPS = {name: kind.steps for name, kind in _CLASSES.items()}


def create(name: str) -> Generator:
    """An untrained generator of `NAMES`."""
    if name not in _CLASSES:
        raise ValueError(f"generator should be one of {NAMES}. Found {name!r}.")
    return _CLASSES[name]()


class Critic(nn.Module):
    """Patch discriminator: (B, 3, 64, 64) -> (B, 1, 16, 16) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(24, 48, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(48, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.body(images))


def save(models: dict[str, Generator], path: Path) -> None:
    """All generators in one safetensors file, float16, keys "name/parameter"."""
    tensors = {f"{name}/{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    save_file({key: value.to(torch.float16).contiguous() for key, value in tensors.items()}, path)


def load(path: Path) -> dict[str, Generator]:
    """{name: generator in eval mode, float32}, in the order of `NAMES`."""
    tensors = load_file(path)
    models = {}
    for name in NAMES:
        state = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        if state:
            models[name] = create(name)
            models[name].load_state_dict(state)
            models[name].eval()
    return models


@torch.no_grad()
def synthesise(
    model: Generator,
    images: Bytes,
    found: Sequence[scenes.Scene],
    noise: Sequence[np.random.Generator],
    batch: int = 25,
) -> Bytes:
    """Fakes (N, 64, 64, 3) uint8 of the scenes `found`; image i draws its noise from `noise[i]`.

    `images`: their photographs, (N, 80, 80, 3) uint8. The margin of 8 pixels is cut off, from fakes as from real
    images: what convolutions find beyond an edge would leave a frame, which a logistic regression on the outer four
    pixels alone can tell.
    """
    if model.starts_from == "drawing":
        images = np.stack([camera.draw(s, camera.MARGIN) for s in found])
    parts = []
    for start in range(0, len(images), batch):
        some = to_tensor(images[start : start + batch])
        grain = [rng.standard_normal(some.shape[1:], dtype=np.float32) for rng in noise[start : start + batch]]
        output = model(some, torch.from_numpy(np.stack(grain)))
        if model.local:
            cover = [scenes.mask(s, grow=0.08, soft=5.0) for s in found[start : start + batch]]
            weight = F.pad(torch.from_numpy(np.stack(cover))[:, None], (camera.MARGIN,) * 4)
            output = weight * output + (1 - weight) * some
        parts.append(to_bytes(output))
    return camera.crop(np.concatenate(parts))
