"""How well a linear head on the frozen tower does when it has seen every generator: a reference, no detector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dgs.atomic import replacing_file
from dgs.data.prepared import load_prepared
from dgs.data.views import Views
from dgs.device import choose_device
from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.features import extract_features
from dgs.model.methods.experts import caption_probability, ipw_weights
from dgs.model.train import training_views
from dgs.params import Params
from dgs.stats import share_interval

FOLDS = 5
STRENGTHS = (1e-3, 1e-2, 1e-1)  # 1 / regularisation; the best counts: a reference may choose on what it is judged on
REAL = "real"

Floats = NDArray[np.floating]


def by_label(labels: NDArray[np.int64], weights: Floats) -> Floats:
    """Weights (N,) scaled so that both labels weigh the same in all."""
    sums = np.bincount(labels, weights, minlength=2)
    return weights / sums[labels]


def cross_validated(
    known: Floats,
    known_labels: NDArray[np.int64],
    known_weights: Floats,
    test: Floats,
    generators: NDArray[np.object_],
    strength: float,
) -> Floats:
    """Logits (N,) of test images, each from a logistic regression on the known images and the other folds of the test.

    Args:
        known: (M, D) features of training images, known_labels and known_weights (M,).
        test: (N, D) features, generators (N,) with "real" among them: folds hold a like share of each.
        strength: C of the regression.

    Raises:
        UserError: a generator with fewer test images than folds.
    """
    labels = (generators != REAL).astype(np.int64)
    names, counts = np.unique(generators.astype(str), return_counts=True)
    if counts.min() < FOLDS:
        rare = f"{counts.min()} of {names[counts.argmin()]}"
        raise UserError(f"Expected at least {FOLDS} test images of every generator, found {rare}. Add images.")
    logits = np.zeros(len(test))
    for kept, left in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(test, generators.astype(str)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2_000))
        weights = np.concatenate(
            [by_label(known_labels, known_weights), by_label(labels[kept], np.ones(len(kept)))]
        ) * (len(known) + len(kept)) / 4  # so that C means what it means without weights  # fmt: skip
        model.fit(
            np.concatenate([known, test[kept]]),
            np.concatenate([known_labels, labels[kept]]),
            logisticregression__sample_weight=weights,
        )
        logits[left] = model.decision_function(test[left])
    return logits


def accuracy_rows(generators: NDArray[np.object_], logits: Floats, seen: set[str]) -> pd.DataFrame:
    """Balanced accuracy at logit 0 of each generator against the real images.

    Columns generator, seen, n_real, n_fake, balanced_acc, low, high: 95 %, from Wilson intervals of both shares.
    """
    real = logits[generators == REAL]
    right = share_interval(int((real <= 0).sum()), len(real))
    rows = []
    for name in sorted(set(generators) - {REAL}):
        fake = logits[generators == name]
        found = share_interval(int((fake > 0).sum()), len(fake))
        middle = (right.mean + found.mean) / 2
        below = np.hypot(right.mean - right.low, found.mean - found.low) / 2
        above = np.hypot(right.high - right.mean, found.high - found.mean) / 2
        rows.append((name, name in seen, len(real), len(fake), middle, middle - below, middle + above))
    columns = ["generator", "seen", "n_real", "n_fake", "balanced_acc", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def ceiling(params: Params, root: Path, folder: Path) -> pd.DataFrame:
    """Rows of `accuracy_rows` for two heads: on the tower's output, and on levels (`model.levels`) beside it.

    Column head before them: "output" or "levels". Training images are weighed so that captions tell nothing of labels.
    All photographs of the test split are what each generator is judged against. No bound: adapters pass it on single
    generators. No contender either: it is trained on labelled images of the very generators it is judged on.

    Args:
        folder: what the prepare stage made.
    """
    prepared = load_prepared(folder, root)
    params = prepared.with_prepared(params)
    device = choose_device(params.compute.device)
    clip = load_clip(params.model, root, params.image_size, text=False)
    backbone = Backbone(clip, None, 0, params.model.levels).to(device)
    train, test = prepared.split("train"), prepared.split("test")
    views = {
        "train": training_views(prepared, params, seed=0)[0],
        "test": Views(test, prepared.source, params, patches=prepared.patches),
    }
    with torch.inference_mode():
        features: Mapping[str, Floats] = {
            name: extract_features(backbone, some, params, f"features of {name}").cpu().numpy()
            for name, some in views.items()
        }
    labels = train["label"].to_numpy(dtype=np.int64)
    weights = ipw_weights(caption_probability(prepared, "train"), labels)
    generators = test["generator"].where(test["label"] == 1, REAL).to_numpy(dtype=object)
    seen = set(test.loc[test["seen"], "generator"])
    parts = []
    for head, width in (("output", backbone.widths[0]), ("levels", backbone.widths[1])):
        found = []
        for strength in STRENGTHS:
            logits = cross_validated(
                features["train"][:, :width], labels, weights, features["test"][:, :width], generators, strength
            )
            found.append(accuracy_rows(generators, logits, seen))
        best = max(found, key=lambda rows: rows.loc[~rows["seen"], "balanced_acc"].mean())
        parts.append(best.assign(head=head)[["head", *best.columns]])
    return pd.concat(parts, ignore_index=True)


def write_ceiling(params: Params, root: Path, folder: Path, out: Path) -> dict[str, float]:
    """`ceiling` as a table; returns each head's mean balanced accuracy over unseen generators."""
    rows = ceiling(params, root, folder)
    with replacing_file(out) as draft:
        rows.round(6).to_csv(draft, index=False)
    means = rows[~rows["seen"]].groupby("head", sort=False)["balanced_acc"].mean().round(4)
    return {str(head): float(mean) for head, mean in means.items()}
