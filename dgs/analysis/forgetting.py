"""What a fine-tuned image tower still knows, measured on features alone (no model is run here).

First the measures in general, then what is reported of a tower: a function decorated with `@measure` each. Features are
float arrays or CPU tensors of shape (N, D), one row an image; all sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from scipy.linalg import subspace_angles
from sklearn.metrics import silhouette_samples

from dgs.analysis.metrics import ALIGNED
from dgs.model.training_log import spectrum_rank

Features: TypeAlias = np.ndarray | torch.Tensor
DIRECTIONS = 10  # principal directions that stand for a feature space
NEIGHBOURS = 10
PAIRED = 2000  # test images for measures that compare each image with each
RIDGE = 0.1  # of the linear probe, in units of a standardised feature's variance


def linear_cka(x: Features, y: Features) -> float:
    """Linear centred kernel alignment, |Y'X|^2 / (|X'X| |Y'Y|) on centred features (Kornblith et al. 2019, eq. 3-5).

    `x`: (N, D1), `y`: (N, D2), rows of the same images. 1 = equal up to rotation, shift and uniform scale; 0 = nothing
    in common, which is also the value for features collapsed to one point. Raises ValueError for unequal N.
    """
    a, b = _matrix(x, "x"), _matrix(y, "y")
    if len(a) != len(b):
        raise ValueError(f"expected features of the same images, found {a.shape} and {b.shape}")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    if max(a.shape[1], b.shape[1]) <= len(a):
        shared, own_a, own_b = np.sum((b.T @ a) ** 2), np.linalg.norm(a.T @ a), np.linalg.norm(b.T @ b)
    else:  # the same three numbers from the N x N kernels, cheaper where features outnumber images
        kernel_a, kernel_b = a @ a.T, b @ b.T
        shared, own_a, own_b = np.sum(kernel_a * kernel_b), np.linalg.norm(kernel_a), np.linalg.norm(kernel_b)
    scale = float(own_a * own_b)
    return float(shared) / scale if scale > 0.0 else 0.0


def zero_shot_accuracy(image_features: Features, prompt_features: Features, labels: Sequence[int] | Features) -> float:
    """Fraction of images whose most similar prompt (cosine) is their class (CLIP, Radford et al. 2021, sec. 3.1).

    `image_features`: (N, D), `prompt_features`: (C, D), one a class, `labels`: (N,) integers in [0, C). A tie goes to
    the lower class. Raises ValueError for shapes or labels that do not fit.
    """
    images, prompts = _unit_rows(image_features, "image_features"), _unit_rows(prompt_features, "prompt_features")
    truth = np.asarray(labels)
    if images.shape[1] != prompts.shape[1] or truth.shape != (len(images),):
        raise ValueError(f"expected (N, D), (C, D) and (N,), found {images.shape}, {prompts.shape} and {truth.shape}")
    if truth.min() < 0 or truth.max() >= len(prompts):
        raise ValueError(f"expected labels in [0, {len(prompts)}), found {truth.min()} to {truth.max()}")
    return float(np.mean(np.argmax(images @ prompts.T, axis=1) == truth))


def retrieval_at_1(
    image_features: Features, text_features: Features, captions: Sequence[str], pool: int = 200, seed: int = 0
) -> float:
    """Image-to-text recall@1: how often an image's most similar caption in a random pool is one of its own words.

    `image_features`, `text_features`: (N, D), row i of both is pair i. The pairs are shuffled by `seed` and cut into
    pools of `pool` pairs; the rest that fills no pool is left out, and fewer than `pool` pairs make one pool of all.
    Two pairs with the same of `captions` (N strings) are interchangeable. Raises ValueError for shapes that do not fit
    or a pool below 2.
    """
    images, texts = _unit_rows(image_features, "image_features"), _unit_rows(text_features, "text_features")
    if images.shape != texts.shape:
        raise ValueError(f"expected one text an image, found {images.shape} and {texts.shape}")
    if pool < 2:
        raise ValueError(f"expected a pool of at least 2 pairs, found {pool}")
    if len(captions) != len(images):
        raise ValueError(f"expected {len(images)} captions, found {len(captions)}")
    same, size = np.asarray(captions, dtype=object).astype(str), min(pool, len(images))
    shuffled = np.random.default_rng(seed).permutation(len(images))
    hits: list[np.ndarray] = []
    for start in range(0, len(images) - size + 1, size):
        members = shuffled[start : start + size]
        found = members[np.argmax(images[members] @ texts[members].T, axis=1)]
        hits.append(same[found] == same[members])
    return float(np.mean(np.concatenate(hits)))


def linear_probe_accuracy(features: Features, labels: Sequence[int] | Features, seed: int = 0) -> float:
    """Accuracy of a linear classifier on frozen features: fitted on one half of the images, scored on the other.

    What is still there to be read, wherever the text tower would look for it (Alain & Bengio 2017). Ridge regression to
    one-hot classes, in closed form; features are standardised by the fitted half, the penalty is 0.1 times its size.
    `features`: (N, D), `labels`: (N,) integers. The halves are drawn by `seed` from the images alone, so all towers
    meet the same split. Raises ValueError for unequal N and for fewer than 2 images.
    """
    matrix, truth = _matrix(features, "features"), np.asarray(labels)
    if truth.shape != (len(matrix),) or len(matrix) < 2:
        raise ValueError(f"expected (N, D) and (N,) with N >= 2, found {matrix.shape} and {truth.shape}")
    order = np.random.default_rng(seed).permutation(len(matrix))
    fitted, scored = order[: len(order) // 2], order[len(order) // 2 :]
    x = matrix - matrix[fitted].mean(axis=0)
    spread = x[fitted].std(axis=0)
    x = x / np.where(spread > 0.0, spread, 1.0)
    classes, of_image = np.unique(truth[fitted], return_inverse=True)
    wanted = np.eye(len(classes))[of_image]
    shift = wanted.mean(axis=0)
    inner = x[fitted].T @ x[fitted] + RIDGE * len(fitted) * np.eye(x.shape[1])
    weights = np.linalg.solve(inner, x[fitted].T @ (wanted - shift))
    return float(np.mean(classes[np.argmax(x[scored] @ weights + shift, axis=1)] == truth[scored]))


def principal_angles(x: Features, y: Features, k: int = DIRECTIONS) -> np.ndarray:
    """Angles in radians between the spaces of the `k` first principal directions (Bjorck & Golub 1973), largest first.

    `x`, `y`: (N, D) and (M, D). All 0 = features vary along the same directions, pi/2 = along one that the other never
    uses. Where D is below k, D directions are taken. Raises ValueError for unequal widths.
    """
    a, b = _matrix(x, "x"), _matrix(y, "y")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features of one width, found {a.shape} and {b.shape}")
    spaces = [np.linalg.eigh(_covariance(matrix))[1][:, -min(k, matrix.shape[1]) :] for matrix in (a, b)]
    return np.asarray(subspace_angles(*spaces))


def effective_rank(features: Features) -> float:
    """How many directions the features use: `spectrum_rank` of their singular values, after centring.

    `features`: (N, D). 1 to D; 0 for features collapsed to one point.
    """
    power = np.linalg.eigvalsh(_covariance(_matrix(features, "features")))
    rank = spectrum_rank(torch.from_numpy(np.sqrt(np.clip(power, 0.0, None))))
    return 0.0 if np.isnan(rank) else rank


def knn_overlap(before: Features, after: Features, k: int = NEIGHBOURS) -> float:
    """Share of an image's `k` nearest neighbours (cosine) that stay among them, averaged over images.

    `before`, `after`: (N, D1) and (N, D2), rows of the same images; about k / (N - 1) for unrelated features. N x N
    similarities are held in memory. Raises ValueError for unequal N and for N <= k.
    """
    a, b = _unit_rows(before, "before"), _unit_rows(after, "after")
    if len(a) != len(b) or len(a) <= k:
        raise ValueError(f"expected the same images, more than {k}, found {a.shape} and {b.shape}")
    near = np.zeros((2, len(a), len(a)), dtype=bool)
    for mark, rows in zip(near, (a, b), strict=True):
        similarity = rows @ rows.T
        np.fill_diagonal(similarity, -np.inf)
        np.put_along_axis(mark, np.argpartition(similarity, -k, axis=1)[:, -k:], True, axis=1)
    return float((near[0] & near[1]).sum() / (k * len(a)))


def class_silhouette(features: Features, labels: Sequence[int] | Features) -> float:
    """How far apart two classes lie: silhouette width (Rousseeuw 1987), averaged over each class, then over both.

    `features`: (N, D), `labels`: (N,) of two values or more. 1 = tight and far apart, 0 = mixed, below = nearer to
    another class; Euclidean. Raises ValueError for one class alone.
    """
    matrix, truth = _matrix(features, "features"), np.asarray(labels)
    width = silhouette_samples(matrix, truth)
    return float(np.mean([width[truth == value].mean() for value in np.unique(truth)]))


def spread_out(count: int, size: int) -> np.ndarray:
    """Positions of at most `size` of `count` rows at even distances: a fixed sample that follows the table's order."""
    return np.unique(np.linspace(0, count - 1, min(size, count)).round().astype(np.int64))


def cosine_drift(before: Features, after: Features) -> float:
    """Mean over images of 1 - cos(before, after): 0 = no image moved, 1 = on average orthogonal to where it was.

    `before`, `after`: (N, D), rows of the same images; a zero row counts as orthogonal. Raises ValueError for unequal
    shapes.
    """
    a, b = _unit_rows(before, "before"), _unit_rows(after, "after")
    if a.shape != b.shape:
        raise ValueError(f"expected the same images and width, found {a.shape} and {b.shape}")
    return max(0.0, float(np.mean(1.0 - np.sum(a * b, axis=1))))  # rounding may end just below zero


def _matrix(features: Features, name: str) -> np.ndarray:
    plain = features.detach().cpu().double().numpy() if isinstance(features, torch.Tensor) else features
    matrix = np.asarray(plain, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) == 0:
        raise ValueError(f"expected `{name}` of shape (N, D) with N >= 1, found {matrix.shape}")
    return matrix


def _covariance(matrix: np.ndarray) -> np.ndarray:
    centred = matrix - matrix.mean(axis=0)
    return centred.T @ centred / len(matrix)


def _unit_rows(features: Features, name: str) -> np.ndarray:
    matrix = _matrix(features, name)
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(length > 0.0, length, 1.0)


@dataclass(frozen=True, eq=False)
class Tower:
    """One image tower, by its features of the N test images; what a measure of forgetting is a function of.

    rows: of the manifest. captions: (N, D) text embeddings. prompts: {attribute: (values, (C, D) text embeddings)}.
    pool: captions that an image's own is looked for among. features: (N, D). blocks: of M of the images the mean patch
    token after each vision block, (M, W) each. untuned: the tower before training; None for that one itself. text: what
    made the text embeddings (model.text); with "none" they have no columns, and prompts only name the attributes.
    """

    rows: pd.DataFrame
    captions: np.ndarray
    prompts: Mapping[str, tuple[Sequence[str], np.ndarray]]
    pool: int
    features: np.ndarray
    blocks: Sequence[np.ndarray]
    untuned: Tower | None = None
    text: str = "own"

    @property
    def frozen(self) -> Tower:
        """The tower before training."""
        return self.untuned or self

    @property
    def real(self) -> np.ndarray:
        """Which images are real: (N,) booleans."""
        return (self.rows["label"] == 0).to_numpy()

    @property
    def sample(self) -> np.ndarray:
        """Positions of at most `PAIRED` images."""
        return spread_out(len(self.rows), PAIRED)


Measure: TypeAlias = Callable[[Tower], float | dict[str, float] | None]
MEASURES: dict[str, tuple[Measure, float | None]] = {}  # in the order of forgetting.csv
OF_TEXT: set[str] = set()  # those that a text side takes part in


def measure(name: str, unmoved: float | None = None, of_text: bool = False) -> Callable[[Measure], Measure]:
    """A decorator: the function's number is the row `name` of forgetting.csv, a dictionary's are "name:key".

    None and what is not in the dictionary are left out: the data cannot give them. unmoved: what a comparison with the
    frozen tower gives for a tower that did not move; without it the frozen tower is measured too. of_text: a text side
    takes part: its rows are left out where there is none, and are named otherwise (`ALIGNED`) where it was trained to
    the tower.
    """

    def register(function: Measure) -> Measure:
        MEASURES[name] = function, unmoved
        OF_TEXT.update([name] if of_text else [])
        return function

    return register


def measure_all(tower: Tower) -> dict[str, tuple[float, float]]:
    """Every measure of a tuned tower: {measure: (before, after)}."""
    found: dict[str, tuple[float, float]] = {}
    for name, (function, unmoved) in MEASURES.items():
        if name in OF_TEXT and tower.text == "none":
            continue
        name += ALIGNED if name in OF_TEXT and tower.text == "aligned" else ""  # noqa: PLW2901
        after = _by_row(name, function(tower))
        before = _by_row(name, function(tower.frozen)) if unmoved is None else dict.fromkeys(after, unmoved)
        found |= {row: (before[row], value) for row, value in after.items()}
    return found


def _by_row(name: str, value: float | dict[str, float] | None) -> dict[str, float]:
    if isinstance(value, dict):
        return {f"{name}:{key}": number for key, number in value.items()}
    return {} if value is None else {name: value}


@measure("zero_shot", of_text=True)
def _(tower: Tower) -> dict[str, float]:
    found = {}
    for attribute, (values, prompts) in tower.prompts.items():
        truth = tower.rows.loc[tower.real, attribute].map({value: i for i, value in enumerate(values)}).to_numpy()
        found[attribute] = zero_shot_accuracy(tower.features[tower.real], prompts, truth)
    return found


@measure("linear_probe")
def _(tower: Tower) -> dict[str, float]:
    rows, features = tower.rows[tower.real], tower.features[tower.real]
    attributes = tower.prompts if len(rows) > 1 else ()
    return {name: linear_probe_accuracy(features, rows[name].factorize(sort=True)[0]) for name in attributes}


@measure("retrieval_at_1", of_text=True)
def _(tower: Tower) -> float | None:
    own = tower.real & (tower.rows["caption_source"] == "file").to_numpy()
    if own.sum() < tower.pool:
        return None
    words = tower.rows.loc[own, "caption"].tolist()
    return retrieval_at_1(tower.features[own], tower.captions[own], words, tower.pool)


@measure("cka_to_frozen", unmoved=1.0)
def _(tower: Tower) -> float:
    return linear_cka(tower.frozen.features, tower.features)


@measure("knn_overlap", unmoved=1.0)
def _(tower: Tower) -> float | None:
    at = tower.sample
    return knn_overlap(tower.frozen.features[at], tower.features[at]) if len(at) > NEIGHBOURS else None


@measure("effective_rank")  # as a share of the dimensions
def _(tower: Tower) -> float:
    return effective_rank(tower.features) / tower.features.shape[1]


@measure("cosine_drift", unmoved=0.0)
def _(tower: Tower) -> float:
    return cosine_drift(tower.frozen.features, tower.features)


@measure("principal_angle", unmoved=0.0)  # as a share of a right angle
def _(tower: Tower) -> dict[str, float]:
    angles = principal_angles(tower.frozen.features, tower.features) / (np.pi / 2)
    return {"mean": float(angles.mean()), "max": float(angles.max())}


@measure("silhouette")  # of real against fake: no memory, it says how far the classes are apart
def _(tower: Tower) -> float:
    return class_silhouette(tower.features[tower.sample], tower.rows["label"].to_numpy()[tower.sample])


def _by_block(compare: Callable[[Features, Features], float], tower: Tower) -> dict[str, float]:
    pairs = zip(tower.frozen.blocks, tower.blocks, strict=True)
    return {str(k): compare(*pair) for k, pair in enumerate(pairs, 1)}


measure("cka_block", unmoved=1.0)(partial(_by_block, linear_cka))  # after how many blocks
measure("cosine_drift_block", unmoved=0.0)(partial(_by_block, cosine_drift))
