"""Settings of every method by one budget and one rule: six candidates each, chosen on validation images alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgs.analysis.trials import trials
from dgs.data.prepared import load_training
from dgs.errors import UserError
from dgs.model.methods.registry import METHODS, Method, get_method
from dgs.model.methods.text_expert import caption_probability, ipw_weights
from dgs.params import Params, validate

Candidate = dict[str, float]
LR, EPOCHS, LR_FROZEN = "train.stage2.lr", "train.stage1.epochs", "train.stage1.lr"
STRENGTHS: dict[str, tuple[float, float]] = {
    "lam": (0.2, 1.0),
    "distill": (0.3, 3.0),
    "decay": (0.001, 0.1),
    "mix": (0.5, 0.8),
    "directions": (4, 16),
}
RULES = {
    "val": "validation images with the shortcut",
    "val_balanced": "validation images with the shortcut, weighed so that captions tell nothing",
    "val_unbiased": "validation images without the shortcut",
}
COLUMNS = ["data_hash", "method", "candidate", "seed", *RULES]


def candidates(method: Method) -> list[Candidate]:
    """The six settings tried: learning rate by strength, or six learning rates where a method has no strength.

    On the frozen tower, where a step costs nothing, epochs take the strength's place.
    """
    if method.tuned_param is not None:
        rates: Sequence[float] = (1e-3, 3e-3, 1e-2) if method.adapters else (3e-3, 1e-2, 3e-2)
        name = LR if method.adapters else LR_FROZEN
        pairs = product(rates, STRENGTHS[method.tuned_param])
        return [{name: rate, f"train.surgery.{method.tuned_param}": strength} for rate, strength in pairs]
    if method.adapters:
        return [{LR: rate} for rate in (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)]
    return [{LR_FROZEN: rate, EPOCHS: epochs} for rate, epochs in product((3e-3, 1e-2, 3e-2), (20, 60))]


def weighted_balanced_accuracy(
    labels: NDArray[np.int64], logits: NDArray[np.float32], weights: NDArray[np.float64]
) -> float:
    """Mean over both labels of the weighted share decided rightly at logit 0; all (N,)."""
    right = (logits > 0) == (labels == 1)
    return float(np.mean([np.average(right[labels == label], weights=weights[labels == label]) for label in (0, 1)]))


def with_candidate(params: Params, name: str, candidate: Candidate) -> Params:
    """The parameters of one trial: the candidate stands above whatever a profile or the parameter file say."""
    tried = {"settings": {name: candidate}, "settings_instead_of": {}}
    return validate({**params.model_dump(), **tried}, "candidate").tuned(name)


def _score(_: str, name: str, candidate: str, seed: int, params: Params, root: Path, folder: Path) -> dict[str, float]:
    # Imported here: the parent only waits, and should not spend seconds on loading CLIP's libraries.
    from dgs.data.views import Views
    from dgs.device import choose_device
    from dgs.model.clip import load_clip
    from dgs.model.train import Trained, train, validation_logits

    prepared = load_training(folder, root)
    clip = load_clip(params.model, root, params.image_size, text=False)
    device = choose_device(params.compute.device)
    own = with_candidate(params, name, json.loads(candidate))
    row: dict[str, float] = {}

    def done(trained: Trained) -> None:
        for split in ("val", "val_unbiased"):
            rows = prepared.split(split)
            if rows.empty:
                continue
            views = Views(rows, prepared.source, own, patches=prepared.patches)
            logits = validation_logits(trained.backbone, trained.heads["image"], views, own, device)
            labels = rows["label"].to_numpy()
            row[split] = weighted_balanced_accuracy(labels, logits, np.ones(len(rows)))
            if split == "val":
                weights = ipw_weights(caption_probability(prepared, split), labels)
                row["val_balanced"] = weighted_balanced_accuracy(labels, logits, weights)

    train(get_method(name), clip, prepared, own, seed, device, done)
    return row


def tune(
    names: Iterable[str], params: Params, root: Path, folder: Path, out: Path, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Try every candidate of every method, `compute.jobs` at a time; a row is written to `out` as it is found.

    What `out` already holds for the same data is not tried again, so that a broken search goes on.

    Args:
        names: methods; those that take another's settings are passed over.
        folder: what the prepare stage made.
        out: the table, columns data_hash (of training and validation images: settings found on them hold whatever the
            test images are), method, candidate (JSON), seed, and a balanced accuracy for
            each of `RULES`.

    Yields:
        the new rows.
    """
    images = load_training(folder, root).info["training_hash"]
    todo = [
        {"data_hash": images, "method": name, "candidate": json.dumps(candidate), "seed": seed}
        for name in names
        if get_method(name).settings_of is None
        for candidate in candidates(get_method(name))
        for seed in seeds
    ]
    yield from trials(_score, todo, (params, root, folder), params.compute.jobs, out, COLUMNS)


def chosen(table: pd.DataFrame, rule: str) -> dict[str, Candidate]:
    """The best candidate of each method by its mean over seeds under `rule`, and for those that take another's, that.

    Of equal ones the first listed.

    Raises:
        UserError: nothing was measured by that rule.
    """
    if len(table) and table[rule].isna().all():
        raise UserError(f"Expected values by the rule {rule}, found none: no such images. Choose another rule.")
    best: dict[str, Candidate] = {}
    for name, rows in table.groupby("method", sort=False):
        means = rows.groupby("candidate")[rule].mean()
        listed = [text for c in candidates(get_method(str(name))) if (text := json.dumps(c)) in means.index]
        best[str(name)] = json.loads(max(listed, key=lambda text: means[text]))
    for name, method in METHODS.items():
        if method.settings_of in best:
            best[name] = best[method.settings_of]
    return {name: best[name] for name in METHODS if name in best}


def settings_text(candidate: Candidate) -> str:
    """A candidate in short: {"train.stage2.lr": 0.003, "train.surgery.lam": 1.0} to "lr 0.003, lam 1"."""
    return ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in candidate.items())


def choices(table: pd.DataFrame) -> dict[str, list[str]]:
    """What each rule of `RULES` chooses for each method that was searched, with the value it had: "lr 0.003 (83.3)"."""
    found: dict[str, list[str]] = {}
    for rule in RULES:
        best = chosen(table, rule)
        for name, rows in table.groupby("method", sort=False):
            candidate = best[str(name)]
            value = rows.loc[rows["candidate"] == json.dumps(candidate), rule].mean()
            found.setdefault(str(name), []).append(f"{settings_text(candidate)} ({100 * value:.1f})")
    return {name: found[name] for name in METHODS if name in found}
