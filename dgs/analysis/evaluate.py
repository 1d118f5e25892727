"""Scores of every checkpoint on every image, and what each forgot; everything later is computed from these tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from dgs.analysis.forgetting import (
    NEIGHBOURS,
    class_silhouette,
    cosine_drift,
    effective_rank,
    knn_overlap,
    linear_cka,
    linear_probe_accuracy,
    principal_angles,
    retrieval_at_1,
    spread_out,
    zero_shot_accuracy,
)
from dgs.analysis.metrics import SCORES
from dgs.analysis.outside import outside
from dgs.data.conditions import NATIVE, parse_condition
from dgs.data.prepared import Prepared, load_prepared
from dgs.data.views import Views, worth_keeping
from dgs.device import choose_device, set_determinism
from dgs.errors import UserError
from dgs.model import distributed as processes
from dgs.model.backbone import Backbone, Clip, load_clip
from dgs.model.checkpoint import load_checkpoint, read_info
from dgs.model.methods.registry import get_method
from dgs.model.train import extract_features
from dgs.params import Params
from dgs.workspace import Workspace

Features = NDArray[np.float32]
Panels = dict[str, tuple[Features, pd.DataFrame]]
TRAINED_WITH = ("data", "patches", "model", "train")  # parameter groups that a checkpoint's training depends on
PAIRED = 2000  # test images for what compares each with each
# Test images that blocks are compared on: an eighth, within these. More would not be cheap, fewer would flatter CKA.
OF_BLOCKS = (500, 2000)


def checkpoints(workspace: Workspace, methods: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], Path]:
    """Checkpoint folders by (method, seed), in the order asked for; a method that was not trained is left out.

    In the pipeline all are there; by hand one may look at what has been trained so far.

    Raises:
        UserError: none of the methods is trained, or a trained one lacks a seed.
    """
    found: dict[tuple[str, int], Path] = {}
    for method in methods:
        get_method(method)
        try:
            folder = workspace.find("train", method, made_by=f"train@{method}")
        except UserError:
            continue
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


def settings(found: Mapping[tuple[str, int], Path], params: Params) -> dict[str, dict[str, Any]]:
    """What each method was really run with: {method: parameters}.

    Those of training come from the checkpoint (a method may have been trained by hand, with others), those of
    evaluation from `params`.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for (method, _), folder in found.items():
        trained = read_info(folder)["params"]
        own = {group: trained[group] for group in TRAINED_WITH if group in trained}
        chosen.setdefault(method, {**params.model_dump(), **own})
    return chosen


def check_fits(
    method: str, folder: Path, info: Mapping[str, Any], prepared: Prepared, params: Params, clip: Clip
) -> None:
    """Raise UserError, naming both sides, unless a checkpoint sees images as prepared, with this CLIP's constants.

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
    trained_in = info["params"].get("model", {}).get("precision", "fp32")
    if trained_in != params.model.precision:
        raise UserError(
            f"The checkpoint {folder} was trained in {trained_in}, model.precision is {params.model.precision}: "
            f"scores would differ by rounding. Set it to {trained_in}."
        )
    now = {
        "image_size": params.image_size,
        "mean": list(clip.mean),
        "std": list(clip.std),
        "patches": params.patches.model_dump(),
        "fit": params.data.fit,
    }
    for name, value in now.items():
        if info["preprocessing"].get(name) != value:
            raise UserError(
                f"The checkpoint {folder} saw images with {name} {info['preprocessing'].get(name)}, "
                f"prepared is {value}. {again}"
            )


def image_features(backbone: Backbone, views: Views, params: Params, device: torch.device, label: str) -> Features:
    """Features of evaluation views: (N, D)."""
    with torch.no_grad():
        size, workers = params.compute.batch_size, params.compute.workers
        return extract_features(backbone, views, size, workers, device, label).cpu().numpy()


def block_means(backbone: Backbone, views: Views, params: Params, device: torch.device, label: str) -> list[Features]:
    """The mean patch token of each image after each vision block: `depth` arrays (N, W), the first block's first."""
    levels, depth = backbone.levels, len(backbone.visual.transformer.resblocks)
    backbone.levels = tuple(range(1, depth + 1))
    try:
        found = image_features(backbone, views, params, device, label)
    finally:
        backbone.levels = levels
    return np.split(found[:, backbone.widths[0] :], 2 * depth, axis=1)[::2]  # the others are standard deviations


def score_rows(
    rows: pd.DataFrame, logits: NDArray[np.float32], method: str, seed: int, prepared: Prepared, params: Params,
    condition: str = NATIVE,
) -> pd.DataFrame:  # fmt: skip
    """The scores of one checkpoint under one condition: one row an image, columns `metrics.SCORES`."""
    scores = rows[["id", "sha256", "split", "generator", "label"]].reset_index(drop=True)
    scores["rho"], scores["condition"], scores["applied_to"], scores["logit"] = (
        _rho(prepared),
        condition,
        "both",
        logits,
    )
    scores["logit"], scores["method"], scores["seed"], scores["profile"] = logits, method, seed, params.profile
    return scores.astype({name: kind for name, kind in SCORES.items() if kind != "str"})[list(SCORES)]


def forgetting_measures(
    before: Features, after: Features, rows: pd.DataFrame, prepared: Prepared, params: Params
) -> dict[str, tuple[float, float]]:
    """What the tuned tower still knows, against the frozen one: {measure: (before, after)}.

    On real test images, of each attribute that prompts name: zero_shot:<attribute> against the frozen text tower and
    linear_probe:<attribute> without it; retrieval_at_1 (caption among `retrieval_pool`). On all test images:
    cka_to_frozen; knn_overlap (10 neighbours, 2,000 images); effective_rank, as a share of the D dimensions;
    cosine_drift; principal_angle:mean and :max (10 directions), as a share of a right angle; silhouette of real against
    fake (2,000 images), which is no memory but says how far the classes are apart. Measures the data cannot give are
    left out. `block_measures` has those of single blocks.

    Args:
        before, after: (N, D) features of the test rows `rows`, frozen and tuned.
    """
    measures: dict[str, tuple[float, float]] = {}
    real = (rows["label"] == 0).to_numpy()
    for attribute, (values, prompt) in prepared.prompts.items():
        truth = rows.loc[real, attribute].map({value: i for i, value in enumerate(values)}).to_numpy()
        measures[f"zero_shot:{attribute}"] = (
            zero_shot_accuracy(before[real], prompt, truth),
            zero_shot_accuracy(after[real], prompt, truth),
        )
    for attribute in prepared.prompts if real.sum() > 1 else ():
        truth = rows.loc[real, attribute].factorize(sort=True)[0]
        measures[f"linear_probe:{attribute}"] = (
            linear_probe_accuracy(before[real], truth),
            linear_probe_accuracy(after[real], truth),
        )
    captioned = real & (rows["caption_source"] == "file").to_numpy()
    pool = params.evaluate.retrieval_pool
    if captioned.sum() >= pool:
        texts = prepared.caption_embeddings[rows.index[captioned]]
        captions = rows.loc[captioned, "caption"].tolist()
        measures["retrieval_at_1"] = (
            retrieval_at_1(before[captioned], texts, pool, captions=captions),
            retrieval_at_1(after[captioned], texts, pool, captions=captions),
        )
    measures["cka_to_frozen"] = (1.0, linear_cka(before, after))
    sample = spread_out(len(rows), PAIRED)
    if len(sample) > NEIGHBOURS:
        measures["knn_overlap"] = (1.0, knn_overlap(before[sample], after[sample]))
    width = before.shape[1]
    measures["effective_rank"] = (effective_rank(before) / width, effective_rank(after) / width)
    measures["cosine_drift"] = (0.0, cosine_drift(before, after))
    angles = principal_angles(before, after) / (np.pi / 2)
    measures["principal_angle:mean"], measures["principal_angle:max"] = (0.0, angles.mean()), (0.0, angles.max())
    labels = rows["label"].to_numpy()[sample]
    measures["silhouette"] = (class_silhouette(before[sample], labels), class_silhouette(after[sample], labels))
    return measures


def block_measures(before: Sequence[Features], after: Sequence[Features]) -> dict[str, tuple[float, float]]:
    """Where in the tower it happens: cka_block:<k> and cosine_drift_block:<k> of the mean tokens after k blocks.

    Args:
        before, after: `block_means` of the frozen and of the tuned tower, on the same images.
    """
    pairs = list(enumerate(zip(before, after, strict=True), 1))
    similar = {f"cka_block:{k}": (1.0, linear_cka(frozen, tuned)) for k, (frozen, tuned) in pairs}
    return similar | {f"cosine_drift_block:{k}": (0.0, cosine_drift(frozen, tuned)) for k, (frozen, tuned) in pairs}


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


@contextmanager
def _opened(
    method: str, folder: Path, clip: Clip, prepared: Prepared, params: Params, device: torch.device
) -> Iterator[tuple[Backbone, nn.Linear, bool]]:
    """A checkpoint's tower, its head, and whether the tower was tuned; afterwards the CLIP is as it was."""
    backbone, heads, info = load_checkpoint(folder, clip)
    try:
        check_fits(method, folder, info, prepared, params, clip)
        yield backbone.to(device), heads["image"], bool(info["adapter"])
    finally:
        clip.model.visual = backbone.without_adapters()


class _Reader:
    """Features of one set of views; what frozen towers make of it is computed once."""

    def __init__(self, views: Views, params: Params, device: torch.device) -> None:
        self.views, self.params, self.device = views, params, device
        self._frozen: dict[tuple[int, ...], Features] = {}  # by the levels that are read beside the tower's output

    def features(self, backbone: Backbone, tuned: bool, label: str) -> Features:
        """(N, D): what the head of `backbone` reads."""
        if tuned:
            return image_features(backbone, self.views, self.params, self.device, label)
        if backbone.levels not in self._frozen:
            self._frozen[backbone.levels] = image_features(backbone, self.views, self.params, self.device, label)
        return self._frozen[backbone.levels]


def _logits(head: nn.Linear, features: Features) -> NDArray[np.float32]:
    return head(torch.from_numpy(features)).squeeze(1).detach().numpy()


def robustness_scores(
    found: Mapping[tuple[str, int], Path], clip: Clip, prepared: Prepared, params: Params, device: torch.device
) -> list[pd.DataFrame]:
    """Scores of changed test images, a table for each of evaluate.robustness.conditions and checkpoint asked for.

    Condition by condition, so that one set of changed views is in memory at a time and all checkpoints share it.

    Raises:
        UserError: none of the checkpoints is asked for.
    """
    asked = params.evaluate.robustness
    if not asked.conditions:
        return []
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
    rows = prepared.split("test")
    keep = len(chosen) > 1 and worth_keeping(len(rows), params)
    scores = []
    for name in asked.conditions:
        condition = parse_condition(name)
        views = Views(rows, prepared.source, params, patches=prepared.patches, keep=keep, condition=condition)
        reader = _Reader(views, params, device)
        for (method, seed), folder in chosen.items():
            with _opened(method, folder, clip, prepared, params, device) as (backbone, head, tuned):
                logits = _logits(head, reader.features(backbone, tuned, f"{name}: {method}, seed {seed}"))
            scores.append(score_rows(rows, logits, method, seed, prepared, params, name))
    return scores


def _rho(prepared: Prepared) -> float:
    return np.nan if prepared.info["rho"] is None else prepared.info["rho"]


def evaluate(
    found: dict[tuple[str, int], Path], clip: Clip, prepared: Prepared, params: Params, device: torch.device
) -> tuple[pd.DataFrame, pd.DataFrame, Panels]:
    """Every checkpoint on the validation and test images, and on changed test images where asked for.

    Returns:
        scores (one row an image, checkpoint and condition), forgetting (rho, method, seed, measure, before, after), and
        for the t-SNE {"frozen", method...: (features, rows)} of the first seed.
    """
    clip.model.to(device)
    for (method, _), folder in found.items():
        if method in params.evaluate.checkpoints:  # whether it fits is not to be known at the end only
            with _opened(method, folder, clip, prepared, params, device):
                pass
    rows = prepared.manifest[prepared.manifest["split"] != "train"]
    test = (rows["split"] == "test").to_numpy()
    rho, keep = _rho(prepared), worth_keeping(len(rows), params)
    reader = _Reader(Views(rows, prepared.source, params, patches=prepared.patches, keep=keep), params, device)
    tower = Backbone(clip).to(device).eval()
    frozen = reader.features(tower, False, "frozen features")
    few = rows[test].iloc[spread_out(int(test.sum()), int(np.clip(test.sum() // 8, *OF_BLOCKS)))]
    few_views = Views(few, prepared.source, params, patches=prepared.patches, keep=worth_keeping(len(few), params))
    frozen_blocks = block_means(tower, few_views, params, device, "frozen blocks")
    width = frozen.shape[1]
    shown = tsne_rows(rows[test], params.evaluate.tsne_images)
    at = pd.Series(range(len(rows)), index=rows.index)[shown.index].to_numpy()
    panels = {"frozen": (frozen[at], shown)}
    scores: list[pd.DataFrame] = []
    forgetting: list[dict[str, Any]] = []
    for (method, seed), folder in found.items():
        label = f"{method}, seed {seed}"
        with _opened(method, folder, clip, prepared, params, device) as (backbone, head, tuned):
            known = reader.features(backbone, tuned, label)
            logits, features = _logits(head, known), known[:, :width]
            blocks = block_means(backbone, few_views, params, device, f"{label}, blocks") if tuned else frozen_blocks
        scores.append(score_rows(rows, logits, method, seed, prepared, params))
        if not np.isfinite(known).all():
            raise UserError(
                f"Features of {method}, seed {seed}, are not finite: did training diverge? Try a lower learning rate."
            )
        measures = forgetting_measures(frozen[test], features[test], rows[test], prepared, params)
        measures |= block_measures(frozen_blocks, blocks)
        forgetting += [
            {"rho": rho, "method": method, "seed": seed, "measure": name, "before": before, "after": after}
            for name, (before, after) in measures.items()
        ]
        if method not in panels and tuned:
            panels[method] = (features[at], shown)
    del reader  # and with it the views in memory
    scores += robustness_scores(found, clip, prepared, params, device)
    return pd.concat(scores, ignore_index=True), pd.DataFrame(forgetting), panels


def evaluate_from_disk(
    found: dict[tuple[str, int], Path], root: Path, prepared_folder: Path, params: Params
) -> tuple[pd.DataFrame, pd.DataFrame, Panels]:
    """`evaluate`, in `train.processes` processes with a share of the images each; the rows are the same, in order.

    Args:
        found: what was trained here; the checkpoints of evaluate.checkpoints are added to it.
        root: repository, for a relative model.clip and data.root.
        prepared_folder: what the prepare stage made.
    """
    found |= outside(params, root)
    return processes.run(params.train.processes, _evaluate_share, found, root, prepared_folder, params)


def _evaluate_share(
    found: dict[tuple[str, int], Path], root: Path, prepared_folder: Path, params: Params
) -> tuple[pd.DataFrame, pd.DataFrame, Panels]:
    set_determinism(max(1, params.compute.threads * params.compute.jobs // processes.count()))
    clip = load_clip(params.model, root, params.image_size, text=False)
    device = processes.own_device(choose_device(params.compute.device))
    return evaluate(found, clip, load_prepared(prepared_folder, root), params, device)
