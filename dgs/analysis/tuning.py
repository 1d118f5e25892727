"""Settings of every method by one budget and one rule: six candidates each, chosen on validation images alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from numpy.typing import NDArray

from dgs.data.prepared import Prepared, load_training
from dgs.errors import UserError
from dgs.model.methods.experts import caption_probability, ipw_weights
from dgs.model.methods.registry import METHODS, Method, get_method
from dgs.params import Params
from dgs.stats import effective_size
from dgs.tables import read_table

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


def candidates(method: Method, rates_alone: Sequence[float] = ()) -> list[Candidate]:
    """The six settings tried: learning rate by strength, or six learning rates where a method has no strength.

    On the frozen tower, where a step costs nothing, epochs take the strength's place; so they do for a model of a
    method's own, which says what is tried. With `rates_alone` those learning rates are tried, and all else is as in
    force.
    """
    if rates_alone:
        return [{LR if method.adapters else LR_FROZEN: rate} for rate in rates_alone]
    if method.tuned_param is not None:
        rates: Sequence[float] = (1e-3, 3e-3, 1e-2) if method.adapters else (3e-3, 1e-2, 3e-2)
        name = LR if method.adapters else LR_FROZEN
        pairs = product(rates, STRENGTHS[method.tuned_param])
        return [{name: rate, f"train.surgery.{method.tuned_param}": strength} for rate, strength in pairs]
    if method.adapters:
        return [{LR: rate} for rate in (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)]
    own = method.model
    pairs = product(*((own.rates, own.epochs) if own else ((3e-3, 1e-2, 3e-2), (20, 60))))
    return [{LR_FROZEN: rate, EPOCHS: epochs} for rate, epochs in pairs]


def weighted_balanced_accuracy(
    labels: NDArray[np.int64], logits: NDArray[np.float32], weights: NDArray[np.float64] | None = None
) -> float:
    """Mean over both labels of the weighted share decided rightly at logit 0; all (N,). None: all weigh the same."""
    weights = np.ones(len(labels)) if weights is None else weights
    right = (logits > 0) == (labels == 1)
    return float(np.mean([np.average(right[labels == label], weights=weights[labels == label]) for label in (0, 1)]))


def with_candidate(params: Params, name: str, candidate: Candidate) -> Params:
    """The parameters of one trial: the candidate stands above whatever a profile or the parameter file say."""
    return params.replaced(candidate, "candidate").for_method(name)


def train_and_score(
    method: Method, prepared: Prepared, params: Params, seed: int, root: Path, splits: Sequence[str]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Train a method once: {split: (labels, logits), each (N,)} for those of `splits` that have images."""
    # Imported here: the parent only waits, and should not spend seconds on loading CLIP's libraries.
    from dgs.data.views import Views
    from dgs.device import choose_device
    from dgs.model.clip import load_clip
    from dgs.model.features import classify
    from dgs.model.snapshot import Snapshot
    from dgs.model.train import Trained, train

    clip = load_clip(params.model, root, params.image_size, text=False) if method.needs_clip else None
    device = choose_device(params.compute.device)
    found = {}

    def done(trained: Trained) -> None:
        for split in splits:
            rows = prepared.split(split)
            if not rows.empty:
                views = Views(rows, prepared.source, params, patches=prepared.patches)
                found[split] = (rows["label"].to_numpy(), classify(trained.classifier, views, params, split))

    with tempfile.TemporaryDirectory(prefix="dgs-tokens-") as tokens:  # of blocks below the adapters: no snapshots
        train(method, clip, prepared, params, seed, device, done, snapshot=Snapshot(Path(tokens)))
    return found


def _score(_: str, name: str, candidate: str, seed: int, params: Params, root: Path, folder: Path) -> dict[str, float]:
    own = with_candidate(params, name, json.loads(candidate))
    prepared = load_training(folder, root).with_training_images(own.train.images, seed)
    found = train_and_score(get_method(name), prepared, own, seed, root, ("val", "val_unbiased"))
    row = {split: weighted_balanced_accuracy(*of) for split, of in found.items()}
    if "val" in found and prepared.has_text:
        weights = ipw_weights(caption_probability(prepared, "val"), found["val"][0])
        row["val_balanced"] = weighted_balanced_accuracy(*found["val"], weights)
    return row


def weighed_note(prepared: Prepared) -> str:
    """As how many images the weighed validation images count (`effective_size`), by label; "" if none are weighed."""
    labels = prepared.split("val")["label"].to_numpy()
    if not len(labels) or not prepared.has_text:
        return ""
    weights = ipw_weights(caption_probability(prepared, "val"), labels)
    counts = [
        f"{(labels == label).sum()} {name} as {effective_size(weights[labels == label]):.0f}"
        for label, name in ((0, "real"), (1, "fake"))
        if (labels == label).any()
    ]
    return f"validation images, weighed so that captions tell nothing, count as fewer (Kish): {', '.join(counts)}"


def trials(
    run: Callable[..., dict[str, Any]],
    todo: Sequence[dict[str, Any]],
    rest: tuple[Any, ...],
    jobs: int,
    out: Path,
    columns: list[str],
) -> Iterator[dict[str, Any]]:
    """Call `run` for each of `todo` in `jobs` processes; a row is written to `out`, and yielded, as it is found.

    What the table holds already is not tried again, so that a broken search goes on.

    Args:
        run: (values of one of todo, then `rest`) to what was found; the row is both together.
        todo: what identifies a row, each with the same keys, which are columns of `out`.
        out: a table (CSV) with `columns`; made where it is not there.
    """
    done: list[list[str]] = []
    if out.exists() and todo:
        done = read_table(out, str)[list(todo[0])].to_numpy().tolist()
    left = [what for what in todo if [str(value) for value in what.values()] not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    trial = delayed(lambda what: {**what, **run(*what.values(), *rest)})
    for row in Parallel(jobs, return_as="generator_unordered")(map(trial, left)):
        pd.DataFrame([row]).reindex(columns=columns).to_csv(out, mode="a", header=not out.exists(), index=False)
        yield row


def tune(
    names: Iterable[str],
    params: Params,
    root: Path,
    folder: Path,
    out: Path,
    seeds: Sequence[int],
    rates_alone: Sequence[float] = (),
) -> Iterator[dict[str, Any]]:
    """Try every candidate (`candidates`) of every method, as `trials` does; of one that takes others' settings, theirs.

    Columns of `out`: data_hash (of training and validation images: settings found on them hold whatever the test images
    are), method, candidate (JSON), seed, and a balanced accuracy for each of `RULES`. `folder`: what prepare made.
    """
    images = load_training(folder, root).info["training_hash"]
    searched = dict.fromkeys(other for name in names for other in get_method(name).settings_of or (name,))
    todo = [
        {"data_hash": images, "method": name, "candidate": json.dumps(candidate), "seed": seed}
        for name in searched
        for candidate in candidates(get_method(name), rates_alone)
        for seed in seeds
    ]
    yield from trials(_score, todo, (params, root, folder), params.compute.jobs, out, COLUMNS)


def rows_of(out: Path, root: Path, folder: Path) -> pd.DataFrame:
    """What a table of trials holds for the images that are prepared in `folder`; its other rows are of other images."""
    table = read_table(out)
    return table[table["data_hash"] == load_training(folder, root).info["training_hash"]]


def chosen(table: pd.DataFrame, rule: str) -> dict[str, Candidate]:
    """The best candidate of each method by its mean over seeds under `rule`, and for those that take another's, that.

    Of equal ones the first listed by `candidates`; those that it does not list come last, as in the table.

    Raises:
        UserError: nothing was measured by that rule.
    """
    if len(table) and table[rule].isna().all():
        raise UserError(f"Expected values by the rule {rule}, found none: no such images. Choose another rule.")
    best: dict[str, Candidate] = {}
    for name, rows in table[table["method"].isin(METHODS)].groupby("method", sort=False):  # without those that ended
        means = rows.groupby("candidate", sort=False)[rule].mean()
        first = [text for c in candidates(get_method(str(name))) if (text := json.dumps(c)) in means.index]
        best[str(name)] = json.loads(max([*first, *means.index], key=lambda text: means[text]))
    for name, method in METHODS.items():
        if method.settings_of and all(other in best for other in method.settings_of):
            best[name] = {key: value for other in method.settings_of for key, value in best[other].items()}
    return {name: best[name] for name in METHODS if name in best}


def settings_text(candidate: Candidate) -> str:
    """A candidate in short: {"train.stage2.lr": 0.003, "train.surgery.lam": 1.0} to "lr 0.003, lam 1"."""
    return ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in candidate.items())


def choices(table: pd.DataFrame) -> dict[str, list[str]]:
    """What each rule of `RULES` chooses for each method that was searched, with the value it had: "lr 0.003 (83.3)"."""
    means = table.groupby(["method", "candidate"])[list(RULES)].mean().to_dict()
    best = {rule: chosen(table, rule) for rule in RULES}
    return {
        name: [
            f"{settings_text(of[name])} ({100 * means[rule][name, json.dumps(of[name])]:.1f})"
            for rule, of in best.items()
        ]
        for name in METHODS
        if name in set(table["method"])
    }
