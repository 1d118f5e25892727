"""How well a method tells fakes of a generator it was not trained on, from training images alone.

Leave-one-domain-out validation (Gulrajani & Lopez-Paz 2021), a generator a domain: no test image is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sklearn.metrics import roc_auc_score

from dgs.analysis.tuning import train_and_score, trials, weighted_balanced_accuracy
from dgs.data.prepared import Prepared, load_training
from dgs.errors import UserError
from dgs.model.methods.experts import caption_probability, ipw_weights
from dgs.model.methods.registry import get_method
from dgs.params import Params

SPLIT = "left_out"
COLUMNS = ["data_hash", "method", "generator", "seed", "balanced_acc", "auroc", "balanced_acc_trained_on"]


def generators_to_leave_out(prepared: Prepared) -> list[str]:
    """The generators of training fakes.

    Raises:
        UserError: there is only one, so that nothing would be left to train on.
    """
    rows = prepared.split("train")
    found = sorted(rows.loc[rows["label"] == 1, "generator"].unique())
    if len(found) < 2:
        raise UserError(
            f"Expected training fakes of two generators or more, to leave one out; found {', '.join(found)}. "
            f"Add images of another."
        )
    return found


def without(prepared: Prepared, generator: str) -> Prepared:
    """The data without a generator's fakes in training and validation; `SPLIT` gets those and half of the photographs.

    The same photographs are left out whichever generator it is: every second one, in the manifest's order.
    """
    manifest = prepared.manifest.copy()
    train = manifest["split"] == "train"
    fakes = (manifest["label"] == 1) & (manifest["generator"] == generator)
    photographs = manifest.index[train & (manifest["label"] == 0)][1::2]
    manifest.loc[manifest["split"].str.startswith("val") & fakes, "split"] = "unused"
    manifest.loc[train & fakes, "split"] = SPLIT
    manifest.loc[photographs, "split"] = SPLIT
    return replace(prepared, manifest=manifest)


def _score(_: str, name: str, generator: str, seed: int, params: Params, root: Path, folder: Path) -> dict[str, float]:
    prepared = without(load_training(folder, root), generator)
    found = train_and_score(get_method(name), prepared, params.for_method(name), seed, root, (SPLIT, "val"))
    weights = {split: ipw_weights(caption_probability(prepared, split), of[0]) for split, of in found.items()}
    return {
        "balanced_acc": weighted_balanced_accuracy(*found[SPLIT], weights[SPLIT]),
        "auroc": float(roc_auc_score(*found[SPLIT], sample_weight=weights[SPLIT])),
        "balanced_acc_trained_on": weighted_balanced_accuracy(*found["val"], weights["val"]),
    }


def leave_one_generator_out(
    names: Iterable[str], params: Params, root: Path, folder: Path, out: Path, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Train each method without each generator in turn, with its settings in `params`, as `tuning.trials` does.

    Columns of `out`: balanced_acc (threshold 0.5) and auroc on the fakes of the generator left out and photographs not
    trained on, balanced_acc_trained_on on validation images of the other generators, all weighed so that captions tell
    nothing (`ipw_weights`). After a change of settings or code remove `out`. `folder`: what prepare made.

    Raises:
        UserError: training fakes are of one generator.
    """
    prepared = load_training(folder, root)
    images = prepared.info["training_hash"]
    todo = [
        {"data_hash": images, "method": name, "generator": generator, "seed": seed}
        for name in names
        for generator in generators_to_leave_out(prepared)
        for seed in seeds
    ]
    yield from trials(_score, todo, (params, root, folder), params.compute.jobs, out, COLUMNS)
