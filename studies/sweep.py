"""Trainings beside the pipeline: each differs in parameters or in a part of its method, and is one row of a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from numpy.typing import NDArray

from dgs.analysis.angles import STEP, degrees, energy_along_harm, has_harm
from dgs.analysis.evaluate import image_features
from dgs.analysis.forgetting import MEASURES as FORGETTING
from dgs.analysis.forgetting import Tower
from dgs.analysis.metrics import detection_table, headline, kept, metrics_of
from dgs.analysis.scores import read_scores, write_scores
from dgs.analysis.tuning import trials
from dgs.atomic import alone, replacing, replacing_file
from dgs.commands import for_users, say
from dgs.conditions import NATIVE
from dgs.data import manifest as manifests
from dgs.data.prepared import PREPARED_WITH, Prepared, compute_patches, load_prepared, save_prepared
from dgs.data.tree import MINIBENCH
from dgs.data.views import Views, identity_of
from dgs.device import choose_device
from dgs.errors import UserError, did_you_mean
from dgs.model.clip import load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.features import extract_features
from dgs.model.methods.base import Method
from dgs.model.methods.registry import get_method
from dgs.model.snapshot import FREE, Snapshot, run_key
from dgs.model.text import open_text_side
from dgs.model.train import Trained, train
from dgs.model.training_log import TrainingLog
from dgs.params import Params, load_params
from dgs.tables import read_table
from dgs.workspace import MAIN, Workspace, find_root
from studies.going_on import GoingOn

FRESH = {"data.root": "build/fresh"}  # test images that no setting was chosen after: `make study` makes them
TO_MAKE_FRESH = "dgs minibench build --out build/fresh --seed 20261130 --training shipped"
KEPT = "build/sweep"  # what was prepared, and scores until a study's table is complete
EPOCHS = "train.stage2.epochs"
DETECTION = ["balanced_acc_unseen", "ap_unseen", "balanced_acc_seen"]
SURGERY = ["angle_task_harmful", "along_harm", "text_acc", "loss_text"]  # what the text side gave: `surgery_facts`
MEASURES = [*DETECTION, "zero_shot_kept", *SURGERY]
KEY = ["recipe", "settings", "method", "seed"]  # recipe: digest of all parameters, the images and the CLIP
FAILED = "failed"  # why there are no measures, as when training diverges


@dataclass(frozen=True)
class Arm:
    """What is trained: a name, and the parameters (by dotted names) that differ from mini's."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The settings as a column of the table."""
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Reading:
    """What an arm's name stands for: whose settings of the registry it has, and the method itself.

    build: (data, parameters, seed) to the method; None: the registry's. about: what else a repeat must have equal.
    """

    method: str
    build: Callable[[Prepared, Params, int], Method] | None = None
    about: str = ""


Read = Callable[[str], Reading]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _inputs(params: Params, root: Path) -> list[str]:
    """Hashes of what is prepared from: the benchmark's record of its images, and the CLIP's files."""
    clip = root / params.model.clip
    files = [root / params.data.root / MINIBENCH, *(sorted(clip.iterdir()) if clip.is_dir() else ())]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def prepare(params: Params, root: Path, kept_in: Path) -> Path:
    """What the prepare stage would leave of `params`, in a folder of `kept_in`; made once for the same images and CLIP.

    Raises:
        UserError: no images there.
    """
    if not (root / params.data.root).exists():
        how = f" Make them first: {TO_MAKE_FRESH}." if params.data.root == FRESH["data.root"] else ""
        raise UserError(f"Expected images at {params.data.root}, found none.{how}")
    settled = {group: getattr(params, group).model_dump(exclude=without) for group, without in PREPARED_WITH.items()}
    folder = kept_in / _digest([settled, _inputs(params, root)])
    if not folder.exists():
        workspace = Workspace(root, kept_in, params.profile)
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


def surgery_facts(log: TrainingLog) -> dict[str, float]:
    """What the text side gave in a run, means over the recorded steps; empty where there was none.

    angle_task_harmful: degrees at the features. along_harm: `energy_along_harm`, a fraction. text_acc and loss_text:
    accuracy and BCE of the text head, over the second half of the steps.
    """
    samples, losses = log.samples, log.losses.dropna(subset=["loss_text"])
    if samples.empty or not has_harm(samples):
        return {}
    late = losses[losses["step"] >= losses["step"].max() / 2]
    angle = samples[STEP].assign(angle=degrees(samples, "task-harmful")).groupby(STEP)["angle"].mean().mean()
    (along,) = energy_along_harm(samples).values()
    values = (angle, along.mean, late["text_acc"].mean(), late["loss_text"].mean())
    return dict(zip(SURGERY, map(float, values), strict=True))


def measured(
    method: Method, prepared: Prepared, params: Params, seed: int, root: Path, snapshot: Snapshot
) -> tuple[dict[str, float | None], pd.DataFrame]:
    """Train once, test once: `MEASURES`, fractions but for `SURGERY`, and the test images with their logits.

    `snapshot`: its `common` folder keeps what the frozen tower makes of images, for other methods and seeds.

    Without zero_shot_kept where no CLIP is a part of the detector, without `SURGERY` where there is no text head.
    """
    device = choose_device(params.compute.device)
    clip = load_clip(params.model, root, params.image_size, text=False) if method.needs_clip else None
    rows = prepared.split("test")
    real, width = (rows["label"] == 0).to_numpy(), prepared.caption_embeddings.shape[1]
    found: list[tuple[dict[str, float | None], pd.DataFrame]] = []

    def zero_shot(features: NDArray[Any]) -> dict[str, float]:
        own = rows[real], prepared.caption_embeddings[rows.index[real]], prepared.prompts, 0, features[:, :width]
        accuracies = FORGETTING["zero_shot"][0](Tower(*own, []))
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
        row = {name: metrics_of("run")[name].function(run) for name in DETECTION} | surgery_facts(trained.log)
        first = classifier.parts[0]
        if isinstance(first, ClipClassifier):
            few = Views(rows[real], prepared.source, params, patches=prepared.patches)
            with first.backbone.frozen():
                make = partial(extract_features, first.backbone, few, params, "frozen")
                before = zero_shot(snapshot.common(identity_of([few], first.backbone.levels), make).cpu().numpy())
            both = pd.DataFrame({"before": before, "after": zero_shot(features[real])})
            row["zero_shot_kept"] = kept("")(both.rename_axis("measure").reset_index())
        found.append((row, scores.assign(rho=prepared.info["rho"])))

    train(method, clip, prepared, params, seed, device, done, snapshot=snapshot)
    return found[0]


def _frozen_folder(prepared: Path, params: Params) -> Path:
    """Beside what was prepared, for features of this tower as it computes; the files' names say of which images."""
    tower = {**params.model.model_dump(exclude={"lora", "levels"}), **params.compute.model_dump(exclude=FREE)}
    return prepared.with_name(f"{prepared.name}-{_digest(tower)}")


def _snapshot(
    arm: str, settings: str, method: Method, prepared: Prepared, folder: Path, params: Params, seed: int
) -> Snapshot:
    """Of one run; where the settings have epochs, it goes on from the same arm with fewer.

    Not where the method counts its steps from the end, or keeps what no snapshot has.
    """
    frozen = _frozen_folder(folder, params)
    if not method.adapters or method.average or method.project or EPOCHS not in json.loads(settings):
        return Snapshot(common=frozen)
    device, steps = choose_device(params.compute.device), method.steps(len(prepared.split("train")), params)
    same = run_key(arm, seed, params.replaced({EPOCHS: 1}, "epochs"), folder, prepared.info["clip"], device)
    return GoingOn(folder.with_name(f"{folder.name}-{same}"), steps, frozen)


def registered(name: str) -> Reading:
    """A method of the registry; how an arm's name is read where a study says nothing else."""
    return Reading(name)


def _row(
    recipe: str, settings: str, name: str, seed: int,
    params: Params, root: Path, folders: Mapping[str, Path], read: Read, scored: Path,
) -> dict[str, Any]:  # fmt: skip
    reading, own = read(name), params.replaced(json.loads(settings), "settings")
    own, prepared = own.for_method(reading.method), load_prepared(folders[settings], root)
    try:
        prepared = prepared.with_training_images(own.train.images, seed)
        method = reading.build(prepared, own, seed) if reading.build else get_method(reading.method)
        of = _snapshot(name + reading.about, settings, method, prepared, folders[settings], own, seed)
        row, scores = measured(method, prepared, own, seed, root, of)
    except UserError as error:  # as of a rate that diverges: the others go on
        return {FAILED: str(error)}
    scored.mkdir(parents=True, exist_ok=True)
    with replacing_file(scored / f"{_digest([recipe, settings, name, seed])}.parquet") as draft:
        write_scores(scores.assign(method=name, profile=settings), draft)
    return dict(row)


def sweep(
    arms: Sequence[Arm], seeds: Sequence[int], params: Params, root: Path, kept_in: Path, out: Path,
    read: Read = registered,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train and test every arm with every seed, as `tuning.trials` does; columns of `out`: `KEY`, `MEASURES`, `FAILED`.

    What `out` holds is not run again, unless parameters, images or CLIP have changed since, or its scores are gone;
    after a change of code remove it. Scores go to the file beside it (.parquet), an arm's settings where a profile's
    name would stand.

    Args:
        kept_in: what is prepared, and scores until all are there.
        read: what an arm's name stands for.

    Raises:
        UserError: as `prepare`; another process is at the same table.
    """
    with alone(out.with_suffix(".lock"), f"the study {out.stem}"):
        todo, folders = [], {}
        for arm in arms:
            reading, own = read(arm.method), params.replaced(dict(arm.settings), "settings")
            folders[arm.text] = prepare(own, root, kept_in)
            info = load_prepared(folders[arm.text], root).info
            content = own.for_method(reading.method).model_dump(
                mode="json", include={"data", "patches", "model", "train"}
            )
            recipe = _digest([content, reading.about, info["data_hash"], info["clip"]])
            todo += [dict(zip(KEY, (recipe, arm.text, arm.method, seed), strict=True)) for seed in seeds]
        scored = kept_in / out.stem
        _keep_current(out, scored, todo)
        yield from trials(
            _row, todo, (params, root, folders, read, scored), params.compute.jobs, out, [*KEY, *MEASURES, FAILED]
        )
        _collect(out, scored)


def _keep_current(out: Path, scored: Path, todo: Sequence[Mapping[str, Any]]) -> None:
    """Drop from `out` the rows of runs in `todo` that have another recipe now, or whose scores are gone."""
    if not out.exists():
        return
    table, run = read_table(out, str), ["settings", "method", "seed"]
    wanted = {(str(each["settings"]), each["method"], str(each["seed"])): each["recipe"] for each in todo}
    known = set()
    if out.with_suffix(".parquet").exists():
        runs = read_scores(out.with_suffix(".parquet"))[["profile", "method", "seed"]].drop_duplicates()
        known = {(profile, method, str(seed)) for profile, method, seed in runs.itertuples(index=False)}

    def stays(row: Mapping[Any, Any]) -> bool:
        key = (row["settings"], row["method"], row["seed"])
        file = scored / f"{_digest([row['recipe'], row['settings'], row['method'], int(row['seed'])])}.parquet"
        has_scores = key in known or file.exists() or pd.notna(row[FAILED])
        return key not in wanted or (wanted[key] == row["recipe"] and has_scores)

    left = [stays(row) for row in table[[*run, "recipe", FAILED]].to_dict("records")]
    if not all(left):
        with replacing_file(out) as draft:
            table[left].to_csv(draft, index=False)


def _collect(out: Path, scored: Path) -> None:
    """Put the scores of runs in `out` that lie in `scored` into the file beside `out`, in place of older ones."""
    table, file = read_table(out), out.with_suffix(".parquet")
    names = [f"{_digest([getattr(row, name) for name in KEY])}.parquet" for row in table[KEY].itertuples()]
    found = [read_scores(scored / name) for name in names if (scored / name).exists()]
    before = read_scores(file) if file.exists() else None
    if not found:
        return
    new, run = pd.concat(found, ignore_index=True), ["profile", "method", "seed"]
    if before is not None:
        again = before[run].merge(new[run].drop_duplicates(), how="left", indicator=True)["_merge"] == "both"
        new = pd.concat([before[~again.to_numpy()], new], ignore_index=True)
    with replacing_file(file) as draft:
        write_scores(new.sort_values(run, kind="stable"), draft)


def command(
    name: str,
    arms: Callable[[], Sequence[Arm]],
    seeds: Sequence[int] | None = None,
    read: Read = registered,
    first: Callable[[Sequence[Arm]], None] = lambda _: None,
) -> None:
    """`python -m studies.<name> [--only ARM] [--seed N]`: runs the arms into results/study/<name>.csv and .parquet.

    `seeds`: the default ones; None: those of params.yaml. `read`: as in `sweep`. `first`: is called with the arms that
    are chosen, to make their images.
    """

    def main(
        only: Annotated[list[str] | None, typer.Option(help="an arm's name; may be repeated; default all")] = None,
        seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated")] = None,
    ) -> None:
        params, root, every = load_params(MAIN).replaced(FRESH), find_root(), arms()
        known = list(dict.fromkeys(arm.method for arm in every))
        if unknown := [one for one in only or () if one not in known]:
            raise UserError(f"Unknown arm '{unknown[0]}'.{did_you_mean(unknown[0], known)} Known: {', '.join(known)}.")
        chosen = [arm for arm in every if arm.method in (only or known)]
        first(chosen)
        where = (params, root, root / KEPT, root / "results/study" / f"{name}.csv")
        for row in sweep(chosen, seed or seeds or params.seeds, *where, read):
            rates = row.get(FAILED) or ", ".join(f"{measure} {row[measure] or 0:.3f}" for measure in DETECTION)
            say(f"{row['settings']}, {row['method']}, seed {row['seed']}: {rates}")

    with for_users():
        typer.run(main)
