"""Trainings beside the pipeline: each differs in parameters or in a part of its method, and is one row of a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray

from dgs.analysis.evaluate import image_features
from dgs.analysis.forgetting import MEASURES as FORGETTING
from dgs.analysis.forgetting import Tower
from dgs.analysis.metrics import detection_table, headline, metrics_of
from dgs.analysis.scores import read_scores, write_scores
from dgs.analysis.tuning import trials
from dgs.atomic import replacing, replacing_file
from dgs.commands import for_users, say
from dgs.conditions import NATIVE
from dgs.data import manifest as manifests
from dgs.data.prepared import PREPARED_WITH, Prepared, compute_patches, load_prepared, save_prepared
from dgs.data.views import Views
from dgs.device import choose_device
from dgs.errors import UserError, did_you_mean
from dgs.model.clip import load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.features import extract_features
from dgs.model.methods.base import Method
from dgs.model.methods.registry import get_method
from dgs.model.text import open_text_side
from dgs.model.train import Trained, train
from dgs.params import Params, load_params
from dgs.workspace import Workspace, find_root

FRESH = {"data.root": "build/fresh"}  # test images that no setting was chosen after: `make study` makes them
KEPT = "build/sweep"  # what was prepared
DETECTION = ["balanced_acc_unseen", "ap_unseen", "balanced_acc_seen"]
MEASURES = [*DETECTION, "zero_shot_kept"]
KEY = ["data_hash", "settings", "method", "seed"]


@dataclass(frozen=True)
class Arm:
    """What is trained, by a method's name or what a study reads as one, and its parameters that differ from mini's."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The settings as a column of the table."""
        return json.dumps(self.settings, sort_keys=True)


Read = Callable[[str, Prepared, Params, int], tuple[Method, Params]]  # (name, data, parameters, seed)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def prepare(params: Params, root: Path, kept: Path) -> Path:
    """What the prepare stage would leave of `params`, in `kept`/<hash of what it settles>; made once.

    Raises:
        UserError: no images there.
    """
    if not (root / params.data.root).exists():
        raise UserError(f"Expected images at {params.data.root}, found none. Make them first: make study.")
    settled = {group: getattr(params, group).model_dump(exclude=without) for group, without in PREPARED_WITH.items()}
    folder = kept / _digest(settled)
    if not folder.exists():
        workspace = Workspace(root, kept, params.profile)
        manifest, source = manifests.open_manifest(workspace, params.data)
        patches = compute_patches(manifest, source, params)
        side = open_text_side(params, workspace, manifest, source, patches)
        captions, prompts = side.embed(manifest, manifests.read_prompts(source.root, manifest))
        info = {**manifests.facts(manifest, params.data), **side.facts}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as draft:
            save_prepared(draft, manifest, info, captions, prompts, patches, params)
            side.save(draft)
    return folder


def measured(
    method: Method, prepared: Prepared, params: Params, seed: int, root: Path
) -> tuple[dict[str, float | None], pd.DataFrame]:
    """Train once, test once: `MEASURES`, fractions, and the test images with their logits.

    Without zero_shot_kept where no CLIP is a part of the detector.
    """
    device = choose_device(params.compute.device)
    clip = load_clip(params.model, root, params.image_size, text=False) if method.needs_clip else None
    rows = prepared.split("test")
    real = (rows["label"] == 0).to_numpy()
    found: list[tuple[dict[str, float | None], pd.DataFrame]] = []

    def zero_shot(features: NDArray[Any]) -> dict[str, float]:
        tower = Tower(rows[real], prepared.caption_embeddings[rows.index[real]], prepared.prompts, 0, features, [])
        accuracies = FORGETTING["zero_shot"][0](tower)
        assert isinstance(accuracies, dict)
        return accuracies

    def done(trained: Trained) -> None:
        classifier = trained.classifier
        views = Views(rows, prepared.source, params, patches=prepared.patches)
        features = image_features(classifier, views, params, "test")
        with torch.no_grad():
            logits = classifier.decide(torch.from_numpy(features).to(device)).cpu().numpy()
        scores = rows.assign(logit=logits, condition=NATIVE, applied_to="both", method=method.name, seed=seed)
        run = headline(detection_table(scores, prepared.info["seen"]))
        row = {name: metrics_of("run")[name].function(run) for name in DETECTION}
        first = classifier.parts[0]
        if isinstance(first, ClipClassifier):
            few = Views(rows[real], prepared.source, params, patches=prepared.patches)
            with first.backbone.frozen():
                before = zero_shot(extract_features(first.backbone, few, params, "frozen").cpu().numpy())
            after = zero_shot(features[real][:, : prepared.caption_embeddings.shape[1]])
            row["zero_shot_kept"] = float(np.mean([after[name] / before[name] for name in before]))
        found.append((row, scores.assign(rho=prepared.info["rho"])))

    train(method, clip, prepared, params, seed, device, done)
    return found[0]


def registered(name: str, prepared: Prepared, params: Params, seed: int) -> tuple[Method, Params]:
    """A method of the registry with its settings; how an arm's name is read where a study says nothing else."""
    return get_method(name), params.for_method(name)


def _row(
    _: str, settings: str, name: str, seed: int,
    params: Params, root: Path, folders: Mapping[str, Path], read: Read, kept: Path,
) -> dict[str, float | None]:  # fmt: skip
    own, prepared = params.replaced(json.loads(settings), "settings"), load_prepared(folders[settings], root)
    method, own = read(name, prepared, own, seed)
    row, scores = measured(method, prepared.with_training_images(own.train.images, seed), own, seed, root)
    kept.mkdir(parents=True, exist_ok=True)
    with replacing_file(kept / f"{_digest([settings, name, seed])}.parquet") as draft:
        write_scores(scores.assign(method=name, profile=settings), draft)
    return row


def sweep(
    arms: Sequence[Arm], seeds: Sequence[int], params: Params, root: Path, kept: Path, out: Path,
    read: Read = registered,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train and test every arm with every seed, as `tuning.trials` does; columns of `out`: `KEY` and `MEASURES`.

    What `out` holds is not run again: after a change of code remove it. Scores go to the file beside it (.parquet), the
    settings of an arm where a profile's name would stand.

    Args:
        kept: what is prepared, and scores until all are there.
        read: what an arm's `method` names.

    Raises:
        UserError: as `prepare`, or a setting that there is not.
    """
    folders = {arm.text: prepare(params.replaced(dict(arm.settings), "settings"), root, kept) for arm in arms}
    hashes = {text: load_prepared(folder, root).info["data_hash"] for text, folder in folders.items()}
    todo = [
        dict(zip(KEY, (hashes[arm.text], arm.text, arm.method, seed), strict=True)) for arm in arms for seed in seeds
    ]
    own = kept / out.stem
    yield from trials(_row, todo, (params, root, folders, read, own), params.compute.jobs, out, [*KEY, *MEASURES])
    _collect(own, out.with_suffix(".parquet"))


def _collect(folder: Path, out: Path) -> None:
    """Put the scores in `folder` into `out`, beside those of other runs that it has."""
    found = [read_scores(file) for file in sorted(folder.glob("*.parquet"))]
    if not found:
        return
    new = pd.concat(found, ignore_index=True)
    if out.exists():
        old, run = read_scores(out), ["profile", "method", "seed"]
        again = old[run].merge(new[run].drop_duplicates(), how="left", indicator=True)["_merge"] == "both"
        new = pd.concat([old[~again.to_numpy()], new], ignore_index=True)
    with replacing_file(out) as draft:
        write_scores(new.sort_values(["profile", "method", "seed"], kind="stable"), draft)


def command(
    name: str, arms: Callable[[], Sequence[Arm]], seeds: Sequence[int] | None = None, read: Read = registered
) -> None:
    """`python -m studies.<name> [--only ARM] [--seed N]`: runs the arms on fresh images, into results/study/<name>.*.

    `seeds`: the default ones; None: those of params.yaml. `read`: as in `sweep`.
    """

    def main(
        only: Annotated[list[str] | None, typer.Option(help="an arm's name; may be repeated; default all")] = None,
        seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated")] = None,
    ) -> None:
        params, root = load_params().replaced(FRESH), find_root()
        every = arms()
        known = list(dict.fromkeys(arm.method for arm in every))
        if unknown := [one for one in only or () if one not in known]:
            raise UserError(f"Unknown arm '{unknown[0]}'.{did_you_mean(unknown[0], known)} Known: {', '.join(known)}.")
        chosen = [arm for arm in every if arm.method in (only or known)]
        where = (params, root, root / KEPT, root / "results/study" / f"{name}.csv")
        for row in sweep(chosen, seed or seeds or params.seeds, *where, read):
            rates = ", ".join(f"{measure} {row[measure]:.3f}" for measure in DETECTION)
            say(f"{row['settings']}, {row['method']}, seed {row['seed']}: {rates}")

    with for_users():
        typer.run(main)
