"""Gradient angles: what training logged as inner products, as angles, energies and ranks; and what follows from them.

Then three questions: where LoRA's updates went, what a text head's shape does to harmful directions, and whether a
logged number predicts generalisation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.linalg import subspace_angles
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.analysis.metrics import headline, unique
from dgs.errors import UserError
from dgs.model.surgery import head_gradients, split_signs
from dgs.model.training_log import angles, effective_rank
from dgs.stats import Interval, seed_interval

Array = NDArray[np.float64]
Update = tuple[Array, Array]  # A (rank, in), B (out, rank)
RUN = ["method", "seed"]
STEP = [*RUN, "step"]
COLUMNS = ["rho", *STEP, "layer", "pair", "mean", "p05", "p95"]
BATCH_MEANS = ["removed", "added", "conflict_harmful", "conflict_beneficial", "effective_rank"]
UPDATE_COLUMNS = ["rho", *RUN, "other_method", "other_seed", "layer", "side", "mean", "smallest", "random"]
RANK_COLUMNS = ["head", "step", "effective_rank", "same_class_angle", "accuracy"]
CORRELATION_COLUMNS = ["rho", "measure", "method", "generator", "runs", "seeds", "r", "low", "high"]
FEATURES = "features"  # the layer that the surgery acts on
ROUNDING = 1e-12  # of a difference of energies, as a share of them
BATCH = 32  # captions a step of a text head, the paper's
HEADS = ("linear", "MLP")
NO_HARM = "Without a text side (model.text: none) there are no harmful directions."
MAIN_PAIRS = ("task-harmful", "task-applied")  # that figures and correlations are about
UNSEEN = "all unseen"  # the mean over generators that training did not see
WITHIN = "within methods"  # all runs, each method's mean taken off first
VARIES = 1e-9  # of the largest value; less is rounding
FEWEST = 4  # seeds that an interval needs
_MATRIX = re.compile(r"blocks\.(\d+)\.attn\.(?:qkv\.)?([qkv])_proj\.lora_([AB])")


def read_logged(folders: Mapping[str, Path], seeds: Sequence[int], table: str) -> pd.DataFrame:
    """One logged table ("samples", "layers" or "batches") of all methods that train the tower.

    Args:
        folders: {method: build/<profile>/train/<method>}.

    Raises:
        UserError: a folder without that table, from a version that logged otherwise.
    """
    parts = [pd.DataFrame()]
    for method, folder in folders.items():
        file = folder / f"{table}.parquet"
        if not file.exists():
            raise UserError(f"Expected {file.name} in {folder}, found none: train {method} again, then run this again.")
        logged = pd.read_parquet(file)
        parts.append(logged[logged["seed"].isin(seeds)])
    return pd.concat([part for part in parts if not part.empty] or parts[-1:], ignore_index=True)


def product(rows: pd.DataFrame | Mapping[str, Any], a: str, b: str) -> Array:
    """Inner products <a, b> of logged rows, or of one: each pair is kept once."""
    return np.asarray(rows[f"{a}.{b}" if f"{a}.{b}" in rows else f"{b}.{a}"], dtype=np.float64)


def cosines(table: pd.DataFrame, a: str, b: str) -> Array:
    """Cosine of the angle between two gradients, a row each; NaN where one is zero."""
    lengths = np.sqrt(product(table, a, a)) * np.sqrt(product(table, b, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, np.clip(product(table, a, b) / lengths, -1.0, 1.0), np.nan)


def degrees(table: pd.DataFrame, pair: str) -> Array:
    """Angles of a pair such as "task-harmful", in degrees, a row each; NaN where one of the two is zero."""
    first, _, second = pair.partition("-")
    return np.degrees(np.arccos(cosines(table, first, second)))


def has_harm(samples: pd.DataFrame) -> bool:
    """Whether any logged sample has a harmful direction: without a text side none has."""
    return bool((product(samples, "harmful", "harmful") > 0).any())


def energies(samples: pd.DataFrame) -> pd.DataFrame:
    """What the surgery took from and gave to each task gradient g, as energies: squared lengths.

    removed: energy along the harmful direction before less after; <g, h>^2 for the exact projection, below zero where a
    method adds along it. added: energy of what came in off the harmful direction, which is the alignment's part.

    Returns:
        columns task (|g|^2), removed, added; a row a row of `samples`.
    """
    task, harm = product(samples, "task", "task"), product(samples, "harmful", "harmful")
    task_along, applied_along = product(samples, "task", "harmful"), product(samples, "applied", "harmful")
    with np.errstate(invalid="ignore", divide="ignore"):
        removed = np.where(harm > 0, (task_along**2 - applied_along**2) / harm, 0.0)
        shift = np.where(harm > 0, (applied_along - task_along) ** 2 / harm, 0.0)
    applied = product(samples, "applied", "applied")
    added = applied + task - 2 * product(samples, "task", "applied") - shift
    added[added < ROUNDING * (applied + task)] = 0.0
    return pd.DataFrame({"task": task, "removed": removed, "added": added})


def angle_table(samples: pd.DataFrame, layers: pd.DataFrame, pairs: Sequence[str], rho: float | None) -> pd.DataFrame:
    """Angles in degrees, a row a logged step, layer and pair: columns `COLUMNS`.

    At the features mean, p05 and p95 are over the samples of a step's batch. A layer's adapters get one gradient a
    batch: the three are that one angle, and pairs with the beneficial direction are not logged there.
    """
    parts = []
    for pair in pairs:
        known = pd.DataFrame() if samples.empty else samples[STEP].assign(angle=degrees(samples, pair)).dropna()
        if not known.empty:
            grouped = known.groupby(STEP, sort=False)["angle"]
            spread = grouped.quantile(np.array([0.05, 0.95])).unstack().set_axis(["p05", "p95"], axis=1)
            row = grouped.mean().rename("mean").to_frame().join(spread).reset_index()
            parts.append(row.assign(layer=FEATURES, pair=pair))
        if not layers.empty and "beneficial" not in pair:
            angle = degrees(layers, pair)
            row = layers[[*STEP, "layer"]].assign(pair=pair, mean=angle, p05=angle, p95=angle)
            parts.append(row.dropna())
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    table["rho"] = np.nan if rho is None else rho
    return table[COLUMNS].round(6)


def batch_table(samples: pd.DataFrame, batches: pd.DataFrame, rho: float | None) -> pd.DataFrame:
    """What the surgery did in each logged step: columns rho, method, seed, step and `BATCH_MEANS`.

    removed, added: `energies` of the batch as shares of the energy of its task gradients (sums by sums: confident
    samples, whose gradients are next to nothing, weigh as little as they do in training). conflict_*: share of samples
    whose task gradient is more than 90 degrees from the direction. effective_rank: of the harmful directions.
    """
    if samples.empty:
        return pd.DataFrame(columns=["rho", *STEP, *BATCH_MEANS])
    keys = samples[STEP].reset_index(drop=True)
    sums = pd.concat([keys, energies(samples)], axis=1).groupby(STEP, sort=False).sum()
    conflicts = {f"conflict_{other}": cosines(samples, "task", other) < 0 for other in ("harmful", "beneficial")}
    table = keys.assign(**conflicts).groupby(STEP, sort=False).mean()
    for name in ("removed", "added"):
        table[name] = (sums[name] / sums["task"].where(sums["task"] > 0)).fillna(0.0)
    table = table.reset_index().merge(batches[[*STEP, "effective_rank"]], on=STEP, validate="one_to_one")
    if not has_harm(samples):
        table[["removed", "conflict_harmful"]] = np.nan
    table["rho"] = np.nan if rho is None else rho
    return table[["rho", *STEP, *BATCH_MEANS]].round(6)


def over_seeds(table: pd.DataFrame, value: str) -> dict[str, Interval]:
    """{method: mean over the logged steps of a seed, then over seeds with its interval}."""
    per_seed = table.groupby(RUN, sort=False)[value].mean().dropna()
    return {str(method): seed_interval(values.to_numpy()) for method, values in per_seed.groupby("method", sort=False)}


def energy_along_harm(samples: pd.DataFrame) -> dict[str, Interval]:
    """Share of the task gradient's energy along the harmful direction, which exact suppression would remove.

    The mean over samples of cos^2(g_i, h_i), over all logged steps, then over seeds with its interval; a sample without
    a harmful direction counts as 0.
    """
    if samples.empty or not has_harm(samples):
        return {}
    shares = np.nan_to_num(cosines(samples, "task", "harmful") ** 2)
    return over_seeds(samples[STEP].assign(share=shares), "share")


def by_method(samples: pd.DataFrame, batches: pd.DataFrame) -> pd.DataFrame:
    """A row a method: `energy_along_harm` in per cent with its interval, and the mean effective rank."""
    shares, ranks = energy_along_harm(samples), over_seeds(batches, "effective_rank")
    rows = [(*(100 * value for value in shares[name]), ranks[name].mean) for name in shares]
    columns = ["along harm (%)", "low", "high", "effective rank"]
    return pd.DataFrame(rows, columns=columns, index=list(shares)).round(2)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean angle at the features in degrees, a method and pair: over the steps of a seed, then over seeds, with s.d."""
    rows = table[table["layer"] == FEATURES]
    per_seed = rows.groupby(["method", "pair", "seed"])["mean"].mean().reset_index()
    grouped = per_seed.groupby(["method", "pair"])["mean"].agg(["mean", "std"]).reset_index()
    return grouped.rename(columns={"mean": "degrees", "std": "sd_over_seeds"}).round(3)


def one_sample(samples: pd.DataFrame, method: str, seed: int) -> dict[str, Any]:
    """The row to draw of a method: of the step in the middle, the sample that is nearest both medians of the batch,
    that of the angle to harm and that of the turn.

    A logged sample, neither the best nor the worst of the batch. Raises UserError where the method logged none.
    """
    rows = samples[(samples["method"] == method) & (samples["seed"] == seed)]
    if rows.empty:
        raise UserError(f"Expected logged gradients of {method} with seed {seed}, found none.")
    steps = np.sort(rows["step"].unique())
    batch = rows[rows["step"] == steps[len(steps) // 2]]
    harm, turn = (pd.Series(degrees(batch, pair), index=batch.index) for pair in ("task-harmful", "task-applied"))
    apart = (harm - harm.median()).abs().dropna() + (turn - turn.median()).abs().fillna(0.0)
    chosen = apart.idxmin() if apart.notna().any() else batch.index[0]
    return {str(name): value for name, value in batch.loc[chosen].items()}


def orthonormal(columns: Array) -> Array:
    """Orthonormal basis of the columns' span, (D, k) to (D, at most k); directions of no length are left out."""
    if not columns.any():
        return columns[:, :0]
    left, lengths, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, lengths > 1e-6 * lengths[0]]


def principal_angles(a: Array, b: Array) -> Array:
    """Principal angles between the spans of two sets of columns, in degrees, ascending (Bjorck & Golub 1973).

    Args:
        a, b: (D, k) and (D, l).

    Returns:
        (min of the two ranks,); empty where one is all zero. 0: a direction in both, 90: none shared.
    """
    spans = orthonormal(a), orthonormal(b)
    if not all(span.size for span in spans):
        return np.zeros(0)
    return np.degrees(subspace_angles(*spans))[::-1]


def random_mean_angle(size: int, rank: int) -> float:
    """Mean principal angle in degrees between two random subspaces of `rank` in `size` dimensions, by simulation."""
    rng = np.random.default_rng([size, rank])
    return float(np.mean([principal_angles(*rng.normal(size=(2, size, rank))).mean() for _ in range(200)]))


def depth(layer: str) -> tuple[int, int]:
    """Where a layer stands in the tower, to sort by: its block, then its projection."""
    block, _, projection = layer.partition(".")
    return int(block), "qkv".index(projection)


def read_updates(checkpoint: Path) -> dict[str, Update]:
    """LoRA matrices of a checkpoint folder by layer, "<block>.<q, k or v>"; empty for a method without adapters."""
    if not json.loads((checkpoint / "dgs.json").read_text()).get("adapter"):
        return {}
    matrices: dict[str, dict[str, Array]] = {}
    for name, value in load_file(checkpoint / "adapter_model.safetensors").items():
        if found := _MATRIX.search(name):
            matrices.setdefault(f"{found[1]}.{found[2]}", {})[found[3]] = value.astype(np.float64)
    return {layer: (matrices[layer]["A"], matrices[layer]["B"]) for layer in sorted(matrices, key=depth)}


def compare_updates(runs: Mapping[tuple[str, int], Mapping[str, Update]], rho: float | None) -> pd.DataFrame:
    """Principal angles between update subspaces (B A) of runs, layer by layer: columns `UPDATE_COLUMNS`.

    Of each seed, the first method with adapters against every other one; and as a yardstick the first method's first
    seed against its other seeds. Sides: "output", what an update writes (columns of B), and "input", what it reads
    (rows of A; runs of one seed start from the same A). mean, smallest: over the principal angles, in degrees; random:
    the mean for random subspaces of that size.

    Args:
        runs: {(method, seed): updates by layer}.
    """
    adapted = {run: layers for run, layers in runs.items() if layers}
    methods, seeds = (list(dict.fromkeys(names)) for names in zip(*adapted, strict=True)) if adapted else ([], [])
    pairs = [((methods[0], seed), (other, seed)) for other in methods[1:] for seed in seeds]
    pairs += [((method, seeds[0]), (method, seed)) for method in methods[:1] for seed in seeds[1:]]
    random = cache(random_mean_angle)
    rows = []
    for first, second in pairs:
        layers, others = adapted.get(first, {}), adapted.get(second, {})
        for layer in (name for name in layers if name in others):
            (a, b), (other_a, other_b) = layers[layer], others[layer]
            for side, x, y in (("input", a.T, other_a.T), ("output", b, other_b)):
                if len(found := principal_angles(x, y)):
                    expected = random(len(x), len(found))
                    rows.append((*first, *second, layer, side, found.mean(), found[0], expected))
    table = pd.DataFrame(rows, columns=UPDATE_COLUMNS[1:])
    table.insert(0, "rho", np.nan if rho is None else rho)
    return table.round(6)


def text_head_ranks(
    captions: NDArray[np.float32], labels: NDArray[np.int64], seed: int, steps: int = 100
) -> pd.DataFrame:
    """Harmful directions under a linear and an MLP text head that learn the same captions: columns `RANK_COLUMNS`.

    A linear head gives two directions, a non-linear one (64 GELUs) one a sample. The heads are this analysis' own,
    trained here by Adam on the caption embeddings in the same batches; no run's text head is touched.
    same_class_angle: between samples of one class, in degrees; 0 means one direction a class.

    Args:
        captions: (N, D) embeddings, brought to unit variance for this; without columns the table is empty.
        labels: (N,) 0 real, 1 fake.
    """
    if not captions.shape[1]:
        return pd.DataFrame(columns=RANK_COLUMNS)
    given = torch.from_numpy(captions - captions.mean(0)) / float(captions.std() or 1.0)
    truth = torch.from_numpy(labels.astype(np.float32))
    rng = np.random.default_rng(seed)
    order = [torch.from_numpy(rng.permutation(len(given))[:BATCH]) for _ in range(steps + 1)]
    rows = []
    for kind in HEADS:
        head = _new_text_head(kind, given.shape[1], seed)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for step, index in enumerate(order):
            x, y = given[index], truth[index]
            if step % max(steps // 10, 1) == 0:
                harmful, _ = split_signs(head_gradients(head, x, y))
                with torch.no_grad():
                    right = ((head(x).squeeze(1) > 0) == y.bool()).float().mean().item()
                rows.append((kind, step, effective_rank(harmful), _same_class_angle(harmful, y), right))
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(x).squeeze(1), y).backward()
            optimizer.step()
    return pd.DataFrame(rows, columns=RANK_COLUMNS)


def _new_text_head(kind: str, width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(width, 1)
        return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))


def _same_class_angle(harmful: Tensor, labels: Tensor) -> float:
    """Mean angle in degrees between the harmful directions of neighbouring samples of one class."""
    found = [angles(rows[:-1], rows[1:]) for y in (0, 1) if len(rows := harmful[labels == y]) > 1]
    known = torch.cat(found) if found else torch.zeros(0)
    return float(known[~known.isnan()].mean())


def correlation(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None, seeds: np.ndarray | None = None
) -> Interval:
    """Pearson's r with Fisher's 95 % z interval; with groups, r of the deviations from each group's mean.

    Groups keep a difference between methods (dgs turns gradients and lora does not) from passing for a correlation; one
    whose x does not vary says nothing and is left out. Runs of one seed share weights to begin with, captions and the
    order of images, so that an interval counts seeds, not runs: z has standard error 1 / sqrt(seeds - 3).

    Args:
        x, y: (n,).
        groups, seeds: (n,) labels; without seeds every run is one of its own.

    Returns:
        r as `mean` and its ends; all NaN where x or y does not vary, NaN ends for fewer than `FEWEST` seeds.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"expected two 1-D arrays of one length, found shapes {x.shape} and {y.shape}")
    own = {"group": 0 if groups is None else groups, "seed": np.arange(len(x)) if seeds is None else seeds}
    table = pd.DataFrame({"x": x, "y": y, **own})
    varied = table.groupby("group")["x"].transform(lambda own: np.ptp(own) > VARIES * np.abs(own).max())
    table = table[varied.astype(bool)]
    a, b = (table[name] - table.groupby("group")[name].transform("mean") for name in "xy")
    first, second = a.to_numpy(dtype=np.float64), b.to_numpy(dtype=np.float64)
    spread = math.sqrt(float(first @ first) * float(second @ second))
    if spread == 0.0:
        return Interval(math.nan, math.nan, math.nan)
    r = float(np.clip(float(first @ second) / spread, -1.0, 1.0))
    count = table["seed"].nunique()
    if count < FEWEST or abs(r) == 1.0:
        return Interval(r, math.nan, math.nan)
    z, half = math.atanh(r), float(norm.ppf((1.0 + 0.95) / 2.0)) / math.sqrt(count - 3)
    return Interval(r, math.tanh(z - half), math.tanh(z + half))


def _logged_means(batches: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """One row a run (method, seed): means over its logged steps."""
    rows = table[(table["layer"] == FEATURES) & table["pair"].isin(["task-harmful", "task-applied"])]
    by_pair = rows.pivot_table(index=RUN, columns="pair", values="mean").add_prefix("angle ")
    shares = batches.groupby(RUN)[BATCH_MEANS[:-1]].mean()
    return by_pair.join(shares.rename(columns=lambda name: name.replace("_", " ")))


def _accuracies(detection: pd.DataFrame) -> pd.DataFrame:
    """Balanced accuracy of `headline` rows, a row a run and a column a generator, and the mean over unseen ones."""
    rows = headline(detection)
    table = rows.pivot_table(index=RUN, columns="generator", values="balanced_acc", sort=False)
    unseen = unique(rows.loc[~rows["seen"], "generator"])
    table = table[unique(rows["generator"])]
    if unseen:
        table.insert(0, UNSEEN, table[unseen].mean(axis=1))
    return table


def correlations(table: pd.DataFrame, batches: pd.DataFrame, detection: pd.DataFrame) -> pd.DataFrame:
    """Correlation of each logged number with balanced accuracy over runs, by generator: columns `CORRELATION_COLUMNS`.

    For each method alone (over its seeds) and within methods (over all runs, each method's mean taken off). Rows whose
    measure does not vary (nothing is removed without surgery) are left out.

    Args:
        table, batches: as from `angle_table` and `batch_table`.
        detection: the table of the evaluate stage; images as they are, threshold 0.5.
    """
    if batches.empty:
        return pd.DataFrame(columns=CORRELATION_COLUMNS)
    accuracies = _accuracies(detection)
    joined = _logged_means(batches, table).join(accuracies, how="inner")
    methods = joined.index.get_level_values("method")
    rows = []
    for measure in (name for name in joined if name not in accuracies):
        for method in [*unique(methods), WITHIN]:
            runs = joined if method == WITHIN else joined[methods == method]
            groups, seeds = (runs.index.get_level_values(level).to_numpy() for level in RUN)
            for generator in accuracies:
                r = correlation(runs[measure].to_numpy(), runs[generator].to_numpy(), groups, seeds)
                if not math.isnan(r.mean):
                    rows.append((measure, method, generator, len(runs), len(np.unique(seeds)), *r))
    found = pd.DataFrame(rows, columns=CORRELATION_COLUMNS[1:])
    found.insert(0, "rho", batches["rho"].iloc[0])
    return found.round(6)
