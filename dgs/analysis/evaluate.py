"""Scores of every checkpoint on every image, and what each forgot; everything later is computed from these tables."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dgs.analysis import own_detectors
from dgs.analysis.differences import difference_table
from dgs.analysis.forgetting import Tower, measure_all, spread_out
from dgs.analysis.metrics import (
    AGAINST_ALIGNED,
    OF_EXPERT,
    detection_table,
    over_seeds,
    per_seed_values,
    summary,
    write_detection,
)
from dgs.analysis.scores import FILE, as_scores, write_scores
from dgs.analysis.tuning import weighted_balanced_accuracy
from dgs.analysis.verdicts import FILE as VERDICTS
from dgs.analysis.verdicts import verdict_table
from dgs.atomic import replacing
from dgs.conditions import NATIVE, parse_condition
from dgs.data.prepared import OWN_TEXT, Prepared, load_prepared
from dgs.data.views import Inputs, Views, worth_keeping
from dgs.device import choose_device, set_determinism
from dgs.errors import UserError
from dgs.model import distributed as processes
from dgs.model.backbone import Backbone
from dgs.model.checkpoint import load_checkpoint, read_info
from dgs.model.classifier import Classifier
from dgs.model.clip import Clip, load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.features import over_views
from dgs.model.gemm import resolve
from dgs.model.methods.experts import caption_probability, ipw_weights
from dgs.model.methods.registry import METHODS, get_method
from dgs.model.prefix import keep_tokens
from dgs.model.training_log import read_experts, read_losses
from dgs.params import Params
from dgs.stats import effective_size
from dgs.workspace import Workspace, external_checkpoints

Features = NDArray[np.float32]
Runs = Mapping[tuple[str, int], Path]  # checkpoint folders by method and seed
Panels = dict[str, tuple[Features, pd.DataFrame]]
TRAINED_WITH = ("data", "patches", "model", "train")  # parameter groups that a checkpoint's training depends on
# Test images that blocks are compared on: an eighth, within these. More would not be cheap, fewer would flatter CKA.
OF_BLOCKS = (500, 2000)


def checkpoints(workspace: Workspace, methods: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], Path]:
    """Checkpoint folders by (method, seed), in the order asked for; a method that was not trained is left out.

    In the pipeline all are there; by hand one may look at what has been trained so far.

    Raises:
        UserError: none of the methods is trained, or a trained one lacks a seed.
    """
    found: dict[tuple[str, int], Path] = {}
    for method, folder in workspace.trained([get_method(method).name for method in methods]).items():
        for seed in seeds:
            path = folder / f"seed-{seed}"
            if not path.exists():
                trained = sorted(p.name.removeprefix("seed-") for p in folder.glob("seed-*"))
                raise UserError(
                    f"Expected a checkpoint of {method} with seed {seed}, found seeds {', '.join(trained)}. "
                    f"Train it, or set seeds to those."
                )
            found[method, seed] = path
    if not found:
        raise UserError(
            f"Expected checkpoints of {', '.join(methods)}, found none. Run {workspace.to_make(f'train@{methods[0]}')}."
        )
    return found


def described(found: Runs, workspace: Workspace, params: Params) -> str:
    """Which checkpoints were found and which methods are not trained, a line each."""
    folders = _method_folders(found, params)
    lines = [f"{name}: seeds {params.seeds} of {workspace.shown(folder)}" for name, folder in folders.items()]
    if absent := [name for name in params.methods if name not in folders]:
        lines.append(f"not trained, left out: {', '.join(absent)}")
    lines += [f"{name}: predict of {file}" for name, file in params.evaluate.detectors.items()]
    if conditions := params.evaluate.robustness.conditions:
        lines.append(f"test images also under {', '.join(conditions)}")
    return "\n".join(lines)


def _method_folders(found: Runs, params: Params) -> dict[str, Path]:
    """{method: build/<profile>/train/<method>} of what was trained here."""
    return {method: folder.parent for (method, _), folder in found.items() if method in params.methods}


def settings(found: Runs, params: Params) -> dict[str, dict[str, Any]]:
    """What each method was really run with: {method: parameters}.

    Those of training come from the checkpoint (a method may have been trained by hand, with others), those of
    evaluation from `params`, with what "auto" stands for on this machine and the hashes of detectors' files.
    """
    auto = {"device": choose_device(params.compute.device).type, "gemm": resolve(params.compute.gemm)}
    evaluation = {**params.evaluate.model_dump(), "detectors": own_detectors.told(params)}
    asked = {**params.model_dump(), "compute": {**params.compute.model_dump(), **auto}, "evaluate": evaluation}
    chosen: dict[str, dict[str, Any]] = {}
    for (method, _), folder in found.items():
        trained = read_info(folder)["params"]
        own = {group: trained[group] for group in TRAINED_WITH if group in trained}
        chosen.setdefault(method, {**asked, **own})
    return chosen


def check_fits(
    method: str, folder: Path, info: Mapping[str, Any], prepared: Prepared, params: Params, clip: Clip
) -> None:
    """Raise UserError, naming both sides, unless a checkpoint sees images as prepared, if of a CLIP with its constants.

    It must have been trained on what is prepared too, unless `method` is of evaluate.checkpoints.
    """
    # In the pipeline DVC sees to it; by hand, prepare may have been run again since.
    again = "Train on this (notebooks/train.ipynb), or remove scratch/ to go on with what the pipeline prepared."
    if method in params.evaluate.checkpoints:  # of other data it may be, but it must see images as those here do
        again = "Evaluate it in a profile with its settings, or leave it out of evaluate.checkpoints."
    elif info["data_hash"] != prepared.info["training_hash"]:
        raise UserError(
            f"The checkpoint {folder} was trained on other data ({info['data_hash'][:12]}) than what was prepared last "
            f"({prepared.info['training_hash'][:12]}). {again}"
        )
    now = {"image_size": params.image_size, "patches": params.patches.model_dump(), "fit": params.data.fit}
    trained_in = info["params"].get("model", {}).get("precision", "fp32")
    if "clip" in info:
        now |= {"mean": list(clip.mean), "std": list(clip.std)}
    if "clip" in info and trained_in != params.model.precision:
        raise UserError(
            f"The checkpoint {folder} was trained in {trained_in}, model.precision is {params.model.precision}: "
            f"scores would differ by rounding. Set it to {trained_in}."
        )
    for name, value in now.items():
        if info["preprocessing"].get(name) != value:
            raise UserError(
                f"The checkpoint {folder} saw images with {name} {info['preprocessing'].get(name)}, "
                f"prepared is {value}. {again}"
            )


def image_features(classifier: Classifier, views: Inputs, params: Params, label: str) -> Features:
    """Features of evaluation views: (N, D)."""
    return over_views(classifier.features, classifier.width, classifier.device, views, params, label).cpu().numpy()


def block_means(
    classifier: ClipClassifier, views: Inputs, params: Params, label: str, below: Sequence[Features] = ()
) -> list[Features]:
    """The mean patch token of each image after each vision block: `depth` arrays (N, W), the first block's first.

    below: those of the blocks under the adapted ones, where they are known: then `views` may be tokens.
    """
    backbone = classifier.backbone
    levels, depth = backbone.levels, len(backbone.visual.blocks)
    backbone.levels = tuple(range(len(below) + 1, depth + 1))
    try:
        found = image_features(classifier, views, params, label)
    finally:
        backbone.levels = levels
    own = np.split(found[:, backbone.widths[0] :], 2 * (depth - len(below)), axis=1)[::2]  # others: deviations
    return [*below, *own]


def tsne_rows(rows: pd.DataFrame, per_cell: int) -> pd.DataFrame:
    """Test rows for the t-SNE figure: two seen and two unseen generators, `per_cell` fakes each, and as many reals."""
    fakes = rows[rows["label"] == 1]
    chosen = [
        name for seen in (True, False) for name in sorted(fakes.loc[fakes["seen"] == seen, "generator"].unique())[:2]
    ]
    pick = fakes[fakes["generator"].isin(chosen)].groupby("generator").head(per_cell)
    reals = rows[rows["label"] == 0]
    own = reals[reals["generator"].isin(chosen)].groupby("generator").head(per_cell)
    shared = reals.head(per_cell * len(chosen)) if own.empty else own
    return pd.concat([shared, pick])


class _Job(NamedTuple):
    clip: Clip
    prepared: Prepared
    params: Params
    device: torch.device


@contextmanager
def _opened(method: str, folder: Path, job: _Job) -> Iterator[Classifier]:
    """What a checkpoint holds; afterwards the CLIP is as it was."""
    classifier, info = load_checkpoint(folder, job.clip)
    try:
        check_fits(method, folder, info, job.prepared, job.params, job.clip)
        yield classifier.to(job.device)
    finally:
        classifier.close()


class _Reader:
    """Features and scores of one set of images under one condition.

    What checkpoints share is computed once: a frozen tower's features, and the tokens below adapters (`keep_tokens`).

    keep: the views stay in memory, if they fit.
    """

    def __init__(self, rows: pd.DataFrame, job: _Job, condition: str = NATIVE, keep: bool = True) -> None:
        self.rows, self.job, self.condition = rows, job, condition
        change = None if condition == NATIVE else parse_condition(condition)
        keep = keep and worth_keeping(len(rows), job.params)
        source, patches = job.prepared.source, job.prepared.patches
        self.views = Views(rows, source, job.params, patches=patches, keep=keep, condition=change)
        self._shared: dict[Hashable, Features] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="dgs-tokens-")
        self._tokens = Path(processes.broadcast(self._scratch.name))

    def inputs(self, classifier: Classifier) -> Inputs:
        """The views, or where `classifier` has blocks under its adapters and disk is allowed, the tokens after them."""
        if not (isinstance(classifier, ClipClassifier) and classifier.is_tuned):
            return self.views
        own = classifier.backbone
        (found,) = keep_tokens(own, [self.views], self.job.params, self._tokens / f"below-{own.depth}")
        return found

    def features(self, classifier: Classifier, label: str) -> Features:
        """(N, D): what `classifier` decides on."""
        if classifier.shared in self._shared:
            return self._shared[classifier.shared]
        found = image_features(classifier, self.inputs(classifier), self.job.params, label)
        if classifier.shared is not None:
            self._shared[classifier.shared] = found
        return found

    @torch.no_grad()
    def scores(self, method: str, seed: int, classifier: Classifier, features: Features) -> pd.DataFrame:
        """One row an image, columns `scores.SCORES`."""
        table = self.rows.reset_index(drop=True)
        table["method"], table["seed"], table["profile"] = method, seed, self.job.params.profile
        table["condition"], table["applied_to"], table["rho"] = self.condition, "both", self.job.prepared.info["rho"]
        table["logit"] = classifier.decide(torch.from_numpy(features).to(classifier.device)).cpu().numpy()
        return as_scores(table)


def _changed_scores(found: Runs, job: _Job) -> Iterator[pd.DataFrame]:
    """Scores of changed test images, condition by condition: all checkpoints share the views, one set at a time."""
    asked = job.params.evaluate.robustness
    if not asked.conditions:
        return
    chosen = {
        (method, seed): folder
        for (method, seed), folder in found.items()
        if method in (asked.methods or [method]) and seed in (asked.seeds or [seed])
    }
    if not chosen:
        here = ", ".join(f"{method} seed {seed}" for method, seed in found)
        raise UserError(
            f"Expected evaluate.robustness.methods and seeds to name a checkpoint among {here}; found methods "
            f"{asked.methods}, seeds {asked.seeds}. Mend them, or set evaluate.robustness.conditions: []."
        )
    for condition in asked.conditions:
        reader = _Reader(job.prepared.split("test"), job, condition, keep=len(chosen) > 1)
        for (method, seed), folder in chosen.items():
            with _opened(method, folder, job) as classifier:
                features = reader.features(classifier, f"{condition}: {method}, seed {seed}")
                scores = reader.scores(method, seed, classifier, features)
            yield scores


def evaluate(
    found: Runs, clip: Clip, prepared: Prepared, params: Params, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame, Panels]:
    """Every checkpoint on the validation and test images, and on changed test images where asked for.

    Returns:
        scores (one row an image, checkpoint and condition, columns `scores.SCORES`), forgetting (rho, method, seed,
        measure, before, after; none of a method without a CLIP), and for the t-SNE {"frozen", method...: (features,
        rows)} of the first seed.

    Raises:
        UserError: a checkpoint does not fit (`check_fits`) or has features that are not finite, or
            evaluate.robustness names none.
    """
    clip.model.to(device)
    job = _Job(clip, prepared, params, device)
    for (method, _), folder in found.items():
        if method in params.evaluate.checkpoints:  # an error that can be known now should not come at the end
            with _opened(method, folder, job):
                pass
    rows = prepared.manifest[prepared.manifest["split"] != "train"]
    test = (rows["split"] == "test").to_numpy()
    tested = rows[test]
    reader = _Reader(rows, job)
    few = _Reader(tested.iloc[spread_out(len(tested), int(np.clip(len(tested) // 8, *OF_BLOCKS)))], job)
    plain = ClipClassifier(clip, Backbone(clip), {}).to(device).eval()
    features = reader.features(plain, "frozen features")
    width, captions = features.shape[1], prepared.caption_embeddings[tested.index]
    blocks = block_means(plain, few.views, params, "frozen blocks")
    pool, text = params.evaluate.retrieval_pool, params.model.text
    frozen = Tower(tested, captions, prepared.prompts, pool, features[test], blocks, text=text)
    shown = tsne_rows(tested, params.evaluate.tsne_images)
    at = tested.index.get_indexer(shown.index)
    panels: Panels = {"frozen": (features[test][at], shown)}
    scores: list[pd.DataFrame] = []
    forgetting: list[tuple[Any, ...]] = []
    for (method, seed), folder in found.items():
        label = f"{method}, seed {seed}"
        with _opened(method, folder, job) as classifier:
            features = reader.features(classifier, label)
            scores.append(reader.scores(method, seed, classifier, features))
            first = classifier.parts[0]  # whose features come first
            tuned = first if isinstance(first, ClipClassifier) and first.is_tuned else None
            if tuned is not None:
                inputs = few.inputs(tuned)
                below = () if inputs is few.views else frozen.blocks[: tuned.backbone.depth]
                blocks = block_means(tuned, inputs, params, f"{label}, blocks", below)
        if not np.isfinite(features).all():
            raise UserError(
                f"Features of {method}, seed {seed}, are not finite: did training diverge? Try a lower learning rate."
            )
        if classifier.clip is None:
            continue
        own = features[test, :width]
        tower = replace(frozen, features=own, blocks=frozen.blocks if tuned is None else blocks, untuned=frozen)
        forgetting += [(prepared.info["rho"], method, seed, name, *both) for name, both in measure_all(tower).items()]
        if method not in panels and tuned is not None:
            panels[method] = (own[at], shown)
    del reader  # and with it the views in memory
    scores += _changed_scores(found, job)
    columns = ["rho", "method", "seed", "measure", "before", "after"]
    table = pd.DataFrame(forgetting, columns=columns).astype({"rho": float})
    return pd.concat(scores, ignore_index=True), table, panels


def evaluate_from_disk(
    found: dict[tuple[str, int], Path], root: Path, prepared_folder: Path, params: Params
) -> tuple[pd.DataFrame, pd.DataFrame, Panels]:
    """`evaluate`, in `train.processes` processes with a share of the images each; the rows are the same, in order.

    The checkpoints of evaluate.checkpoints are added to `found`, the rows of evaluate.detectors to the scores. `root`:
    of relative paths in `params`.
    """
    found |= external_checkpoints(params.evaluate.checkpoints, METHODS, root)
    own = list(own_detectors.scores(load_prepared(prepared_folder, root), params, root))
    share = (_evaluate_share, found, root, prepared_folder, params)
    scores, forgetting, panels = processes.run(params.train.processes, *share)
    return pd.concat([scores, *own], ignore_index=True), forgetting, panels


def _evaluate_share(
    found: Runs, root: Path, prepared_folder: Path, params: Params
) -> tuple[pd.DataFrame, pd.DataFrame, Panels]:
    set_determinism(max(1, params.compute.threads * params.compute.jobs // processes.count()))
    clip = load_clip(params.model, root, params.image_size, text=False, gemm=resolve(params.compute.gemm))
    device = processes.own_device(choose_device(params.compute.device))
    return evaluate(found, clip, load_prepared(prepared_folder, root), params, device)


class Tables(NamedTuple):
    """What results/<profile> holds of an evaluation: its tables, and what metrics.json says."""

    detection: pd.DataFrame
    differences: pd.DataFrame
    forgetting: pd.DataFrame
    training: pd.DataFrame
    verdicts: pd.DataFrame
    summary: dict[str, Any]


def write_tables(
    workspace: Workspace,
    found: Runs,
    scores: pd.DataFrame,
    forgetting: pd.DataFrame,
    prepared: Prepared,
    params: Params,
) -> Tables:
    """Write scores.parquet, also among the results, then metrics.json and the tables of what was evaluated."""
    results, info = workspace.results, prepared.info
    results.mkdir(parents=True, exist_ok=True)
    with replacing(workspace.build("evaluate")) as folder:
        write_scores(scores, folder / FILE)
        shutil.copyfile(folder / FILE, results / FILE)  # what `dgs report --from-scores` needs, without build/
    detection = detection_table(scores, set(info["seen"]))
    differences = difference_table(per_seed_values(detection, forgetting), detection, scores)
    training = read_losses(_method_folders(found, params).values(), info["rho"])
    write_detection(detection, results / "detection.csv")
    differences.to_csv(results / "differences.csv", index=False)
    forgetting.round(6).to_csv(results / "forgetting.csv", index=False)
    training.round(6).to_csv(results / "training.csv", index=False)
    verdicts = verdict_table(scores, set(info["seen"]))
    verdicts.round(6).to_csv(results / VERDICTS, index=False)
    said = summary(detection, forgetting, params.profile, info["data_hash"])
    experts = read_experts(_method_folders(found, params).values())
    for (method, reads, split), rows in experts.groupby(["method", "reads", "split"], sort=False):
        accuracy = rows.groupby("seed")["accuracy"].mean()
        said["methods"][method][f"{reads}{OF_EXPERT}{split}"] = over_seeds(accuracy)
    if cautions := prepared.cautions:
        said["cautions"] = cautions
    (results / "metrics.json").write_text(json.dumps(said, indent=1) + "\n")
    return Tables(detection, differences, forgetting, training, verdicts, said)


def final_validation(scores: pd.DataFrame, prepared: Prepared) -> pd.DataFrame:
    """Balanced accuracy (a fraction, threshold 0.5) of each checkpoint on validation images, by kind of image.

    Kinds, each where the data has it: "as in training"; the same "reweighted" by 1 / P(label | caption), so that
    captions tell nothing of labels; and those "without shortcut". A kind without images of both labels is left out,
    "reweighted" without a text side too; of an aligned one its name says so.

    Returns:
        columns method, seed, images (the kind), balanced_acc, n_effective (as how many images of both labels together
        the weighed ones count: `stats.effective_size`).
    """
    aligned = prepared.info.get("text", OWN_TEXT)["side"] == "aligned"
    reweighted = "reweighted" + (AGAINST_ALIGNED if aligned else "")
    kinds = {"as in training": "val", reweighted: "val", "without shortcut": "val_unbiased"}
    rows = []
    for kind, split in kinds.items():
        own, known = scores[scores["split"] == split], prepared.split(split)
        if known["label"].nunique() < 2 or own.empty or (kind == reweighted and not prepared.has_text):
            continue
        labels = known["label"].to_numpy()
        weights = np.ones(len(known))
        if kind == reweighted:
            weights = ipw_weights(caption_probability(prepared, split), labels)
        own = own.assign(weight=own["id"].map(dict(zip(known["id"], weights, strict=True))))
        effective = sum(effective_size(weights[labels == label]) for label in (0, 1))
        for (method, seed), run in own.groupby(["method", "seed"], sort=False):
            columns = [run[name].to_numpy() for name in ("label", "logit", "weight")]
            rows.append((method, seed, kind, weighted_balanced_accuracy(*columns), effective))
    return pd.DataFrame(rows, columns=["method", "seed", "images", "balanced_acc", "n_effective"])
