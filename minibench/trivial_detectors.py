"""Trivial detectors: how far is "fake" told by colour, file size, quantisation, caption, border, grain or a probe?

Each is fitted on one training set and judged on others at probability 0.5. What these find, no method may claim as its
own; what `CUES` find when labels are independent of content is a flaw of the benchmark and not a trace of a generator.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dgs.data.checks import jpeg_quality as quality_of_table
from dgs.errors import UserError
from dgs.model.classifier import Learner
from dgs.model.pixel_cnn import PixelCNN
from dgs.stats import Interval, Scored, balanced_accuracy, rounded
from minibench.camera import Bytes
from minibench.degradations import decode
from minibench.splits import REAL

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

DRAWS = 10_000  # of the bootstrap
BLOCK = 500  # images handled at once where float copies would fill memory
EDGE = 4  # outer rings of pixels
BANDS = (0.125, 0.25, 0.375, 0.5, 0.75)  # edges of the spectrum's rings, cycles a pixel


@dataclass(frozen=True)
class Samples:
    """Images of a benchmark with what a detector may see of them, row by row.

    `table`: the columns of a pack (id, scene, generator, label, caption, image: the JPEG file, ...); `images`:
    (N, H, W, 3) uint8; `features`: (N, D) float32 frozen CLIP embeddings, D = 0 where none were made.
    """

    table: pd.DataFrame
    images: Bytes
    features: Floats

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> Labels:
        """(N,) int64, 0 real and 1 fake."""
        return self.table["label"].to_numpy(np.int64)

    def where(self, mask: NDArray[np.bool_]) -> Samples:
        """The rows where `mask` (N,) is true."""
        return Samples(self.table[mask].reset_index(drop=True), self.images[mask], self.features[mask])

    def blocks(self) -> Iterator[Bytes]:
        """The images, some at a time."""
        return (self.images[start : start + BLOCK] for start in range(0, len(self), BLOCK))


def samples(table: pd.DataFrame, embed: Callable[[Bytes], Floats] | None = None) -> Samples:
    """A pack's rows with decoded images and, by `embed`, their features."""
    table = table.reset_index(drop=True)
    images = np.stack([decode(file) for file in table["image"]])
    return Samples(table, images, embed(images) if embed else np.empty((len(table), 0), np.float32))


def join(parts: Sequence[Samples]) -> Samples:
    """Samples one after the other."""
    return Samples(
        pd.concat([part.table for part in parts], ignore_index=True),
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.features for part in parts]),
    )


def ends(interval: Interval) -> dict[str, float | None]:
    """An interval as {"mean", "low", "high"}, rounded."""
    return {name: rounded(value) for name, value in interval._asdict().items()}


# A detector learns from a training set and a seed and returns a scorer; a scorer gives logits (N,): fake where > 0.
Scorer = Callable[[Samples], Floats]
Detector = Callable[[Samples, int], Scorer]


# --- features ----------------------------------------------------------------------------------------------------


def mean_colour(some: Samples) -> Floats:
    """Mean of red, green and blue over pixels: (N, 3), levels 0 to 255."""
    return some.images.mean((1, 2))


def colour_spread(some: Samples) -> Floats:
    """Standard deviation of red, green and blue over pixels: (N, 3), levels."""
    return np.concatenate([block.std((1, 2)) for block in some.blocks()])


def file_size(some: Samples) -> Floats:
    """Size of the JPEG file: (N, 1), bytes."""
    return np.array([[len(file)] for file in some.table["image"]], np.float64)


def jpeg_quality(some: Samples) -> Floats:
    """The quality whose standard luminance table is nearest to the file's: (N, 1), 1 to 100.

    Raises UserError for a file that is not a JPEG.
    """
    qualities = []
    for file in some.table["image"]:
        found: Any = Image.open(io.BytesIO(file))
        if found.format != "JPEG":
            raise UserError(f"Expected JPEG files in the packs, found {found.format}. Build the benchmark anew.")
        qualities.append([quality_of_table(list(found.quantization[0]))])
    return np.array(qualities, np.float64)


def _residual(images: Floats) -> Floats:
    """Second difference in both directions (1 -2 1)^T (1 -2 1): blind to planes and to straight upright edges."""
    rows = images[:, :-2] - 2 * images[:, 1:-1] + images[:, 2:]
    return rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]


def _grain(images: Floats) -> Floats:
    residual = np.abs(_residual(images)).reshape(len(images), -1, 3)
    # The mean is led by outlines, the median by the noise between them.
    return np.log(np.concatenate([residual.mean(1), np.median(residual, 1)], 1) + 0.5)


def _spectrum(images: Floats) -> Floats:
    grey = images.mean(-1)
    rows, columns = grey.shape[1:]
    window = np.hanning(rows)[:, None] * np.hanning(columns)
    power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns))
    rings = [(radius >= low) & (radius < high) for low, high in pairwise(BANDS)]
    return np.log(np.stack([power[:, ring].mean(1) for ring in rings], 1) + 1.0)


def high_frequency(some: Samples) -> Floats:
    """Grain: log mean and log median of a high-pass residual per channel, log power of 4 outer rings: (N, 10)."""
    blocks = (block.astype(np.float32) for block in some.blocks())
    return np.concatenate([np.concatenate([_grain(block), _spectrum(block)], 1) for block in blocks])


def _edge(images: Floats) -> Floats:
    height, width = images.shape[1:3]
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in (height, width))
    rings = np.minimum(rows[:, None], columns)  # how many pixels lie between each pixel and the nearest edge
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    soft = sum((padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)), np.zeros_like(images))
    rest = np.abs(images - soft / 9)
    inside = np.log(rest[:, rings >= EDGE].mean((1, 2)) + 0.5)
    grain = [np.log(rest[:, rings == k].mean((1, 2)) + 0.5) - inside for k in range(EDGE)]
    steps = [images[:, rings == k].mean(1) - images[:, rings == EDGE].mean(1) for k in range(EDGE)]
    return np.concatenate([np.stack(grain, 1), *steps], 1)


def border(some: Samples) -> Floats:
    """What sets the 4 outermost rings of pixels off from the inside, as padding does: (N, 16).

    Log grain of each ring over that of the inside, and the step of each channel from the ring to the inside, levels.
    """
    return np.concatenate([_edge(block.astype(np.float32)) for block in some.blocks()])


def clip_features(some: Samples) -> Floats:
    """The frozen CLIP embeddings: (N, D). Raises UserError where none were made."""
    if not some.features.shape[1]:
        raise UserError("Expected frozen features for the probe, found none. Give `samples` a function that embeds.")
    return some.features


# --- detectors ---------------------------------------------------------------------------------------------------


def linear(feature: Callable[[Samples], Any], preprocess: Callable[[], Any] = StandardScaler) -> Detector:
    """Logistic regression (L2, C = 1, to convergence) on a feature, preprocessed as the training set alone says."""

    def fit(train: Samples, seed: int) -> Scorer:
        model = make_pipeline(preprocess(), LogisticRegression(tol=1e-8, max_iter=10_000))
        model.fit(feature(train), train.labels)
        return lambda some: cast(Floats, model.decision_function(feature(some)))

    return fit


def _pixels(images: Bytes) -> Tensor:
    """(B, H, W, 3) to (B, 3, H, W), uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def tiny_cnn(train: Samples, seed: int, epochs: int = 6, batch: int = 32, lr: float = 5e-3) -> Scorer:
    """`dgs.model.pixel_cnn` trained from scratch on pixels.

    The same seed gives the same weights on one thread; torch's global generator is left as it was.
    """
    model, order = PixelCNN.new(seed), torch.Generator().manual_seed(seed)
    steps = -(-len(train) // batch)
    learner, target = Learner(model, lr, epochs * steps), torch.from_numpy(train.labels).float()
    for _ in range(epochs):
        for part in torch.randperm(len(train), generator=order).tensor_split(steps):
            learner.step(_pixels(train.images[part.numpy()]), target[part])
    model.eval()

    @torch.no_grad()
    def score(some: Samples) -> Floats:
        return torch.cat([model(_pixels(block)) for block in some.blocks()]).numpy()

    return score


CUES: dict[str, Detector] = {  # a fair benchmark leaves all of these at chance
    "mean_colour": linear(mean_colour),
    "colour_spread": linear(colour_spread),
    "file_size": linear(file_size),
    "jpeg_quality": linear(jpeg_quality),
    # Which words a caption holds, of those in the training captions.
    "caption_only": linear(lambda some: some.table["caption"].tolist(), partial(CountVectorizer, binary=True)),
    "border": linear(border),  # padding is how small networks meet small images, not how images are made
}
TRACES: dict[str, Detector] = {  # may find what a generator leaves behind
    "high_frequency": linear(high_frequency),
    "tiny_cnn": tiny_cnn,
    "probe": linear(clip_features),
}
DETECTORS: dict[str, Detector] = CUES | TRACES


# --- judging -----------------------------------------------------------------------------------------------------


def by_generator(table: pd.DataFrame, logits: Floats, seed: int = 0) -> tuple[dict[str, Interval], Interval]:
    """Balanced accuracy of each generator against the shared reals, and their mean, with 95 % bootstrap intervals.

    `logits`: (N,), of the rows of `table`. Reals and each generator's fakes are drawn anew within themselves; the reals
    drawn are shared by all generators, as in the point estimate. The intervals cover the draw of test images and not
    the training, and have no width where answers are all right or all alike.
    """
    rng = np.random.default_rng(seed)
    right = np.where(table["label"] == 1, logits > 0, logits <= 0)

    def drawn(name: str) -> Floats:
        """(1 + DRAWS,): the share of right answers, and that of each draw."""
        # n draws with replacement from n yes-or-no answers hold a binomial number of yeses.
        mask = (table["generator"] == name).to_numpy()
        count, share = int(mask.sum()), float(right[mask].mean())
        return np.append(share, rng.binomial(count, share, DRAWS) / count)

    def interval(shares: Floats) -> Interval:
        low, high = np.quantile(shares[1:], [0.025, 0.975])
        return Interval(float(shares[0]), float(low), float(high))

    reals = drawn(REAL)
    shares = {name: (reals + drawn(name)) / 2 for name in table["generator"].unique() if name != REAL}
    return {name: interval(own) for name, own in shares.items()}, interval(np.mean(list(shares.values()), axis=0))


def judge(
    detector: Detector, train: Samples, others: Mapping[str, Samples], test: Samples, seed: int = 0
) -> dict[str, Any]:
    """Fit a detector on one training set and judge it at probability 0.5. Raises UserError for a missing class.

    Returns:
        balanced accuracies, fractions: "train", each of `others`, "test" ({generator: {mean, low, high}}) and
        "test_mean", over the generators.
    """
    sets = {"train": train, **others}
    for name, some in {**sets, "test": test}.items():
        if len(np.unique(some.labels)) < 2:
            raise UserError(f"Expected real and fake images in {name}, found one class. Build a larger benchmark.")
    score = detector(train, seed)
    generators, mean = by_generator(test.table, score(test), seed)
    return {
        **{name: rounded(balanced_accuracy(Scored.of(some.labels, score(some)))) for name, some in sets.items()},
        "test": {name: ends(value) for name, value in generators.items()},
        "test_mean": ends(mean),
    }
