"""From scores (one row an image) to detection rates, their table and the summary of a run.

Scores (`scores.SCORES`) are the interface: every table, interval and figure of detection is a pivot of them. `METRICS`
is the one list of what is measured: a new metric is a row of it and needs no inference. Rates are fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from dgs import stats
from dgs.conditions import NATIVE
from dgs.data.suites import SHARED_REALS, SUITES, is_pool, parted, pool_of
from dgs.errors import UserError
from dgs.stats import DECIMALS, Scored, best_threshold, rounded, seed_interval
from dgs.tables import read_table

NEEDED = ["split", "generator", "label", "condition", "applied_to", "logit", "method", "seed"]  # by `detection_table`
RUN = ["rho", "method", "seed"]
OF_EXPERT = "_expert:"  # in metrics.json: "content_expert:train", the accuracy of a method's expert on a split
VALIDATION = ("val", "val_unbiased")  # the second without the training set's shortcut, where the data has one
BLOCK = "_block:"  # in the name of a forgetting measure of a single vision block
ALIGNED = "_aligned"  # in the name of a forgetting measure whose text side was trained to the tower
AGAINST_ALIGNED = ", aligned text"  # the same in words
ORACLE = "oracle"  # the threshold rule that looks at the test scores


def paper_mean(run: pd.DataFrame) -> float:
    """The paper's mAcc of one run's rows, a row a generator: the mean of one Real column and an F.Acc column each.

    It is fake recall for the most part (n/(n+1) of it, some 95 % with 16-25 generators): a detector that calls
    everything fake scores near 1.
    """
    return float((run["r_acc"].mean() + run["f_acc"].sum()) / (len(run) + 1))


def mean_of(rate: str, seen: bool | None = None) -> Callable[[pd.DataFrame], float | None]:
    """Plain mean of a rate over all generators, over those seen in training, or over the others; None without any."""

    def mean(run: pd.DataFrame) -> float | None:
        rows = run if seen is None else run[run["seen"] == seen]
        return None if rows.empty else float(rows[rate].mean())

    return mean


def kept(prefix: str) -> Callable[[pd.DataFrame], float | None]:
    """Mean of after / before, not corrected for chance, over measures named `prefix`...; none where `before` is 0."""

    def mean(run: pd.DataFrame) -> float | None:
        ratio = (run["after"] / run["before"]).where(run["before"] != 0)[run["measure"].str.startswith(prefix)]
        return float(ratio.mean()) if ratio.notna().any() else None

    return mean


def after(measure: str) -> Callable[[pd.DataFrame], float | None]:
    """A measure's value after training."""

    def mean(run: pd.DataFrame) -> float | None:
        values = run.loc[run["measure"] == measure, "after"]
        return float(values.mean()) if values.notna().any() else None

    return mean


@dataclass(frozen=True)
class Metric:
    """One number that is reported.

    key: a column of detection.csv or a name in metrics.json, of a suite with "{suite}" in it.
    of: what `function` takes. "decisions" (Scored, threshold on the logit) and "ranking" (Scored): a column of
        detection.csv. "run" (a run's headline rows), "suite" (those of one suite) and "forgetting" (a run's rows of
        forgetting.csv): a name in metrics.json, left out where `function` gives None.
    label: in tables and figures. A run's metric that has one is compared with the baseline.
    headline: a run's metric stands in the report's first table, a rate has a table by generator.
    """

    key: str
    of: Literal["decisions", "ranking", "run", "suite", "forgetting"]
    function: Callable[..., float | None]
    label: str = ""
    headline: bool = False


METRICS: tuple[Metric, ...] = (  # columns of detection.csv, then names in metrics.json, both in this order
    Metric("acc", "decisions", stats.accuracy, "Accuracy (Acc)", headline=True),
    Metric("balanced_acc", "decisions", stats.balanced_accuracy, "Balanced accuracy", headline=True),
    Metric("r_acc", "decisions", stats.real_accuracy, "Accuracy on reals (R.Acc)", headline=True),
    Metric("f_acc", "decisions", stats.fake_accuracy, "Accuracy on fakes (F.Acc)", headline=True),
    Metric("ap", "ranking", stats.average_precision, "Average precision (AP)", headline=True),
    Metric("auroc", "ranking", stats.area_under_roc, "AUROC"),
    Metric("tpr_at_1fpr", "ranking", partial(stats.caught_at, false_alarms=0.01), "fakes caught at 1 % false alarms"),
    Metric("tpr_at_5fpr", "ranking", partial(stats.caught_at, false_alarms=0.05), "fakes caught at 5 % false alarms"),
    Metric("ece", "ranking", stats.calibration_error, "calibration error"),
    Metric("balanced_acc_unseen", "run", mean_of("balanced_acc", seen=False), "balanced acc., unseen", headline=True),
    Metric("acc_unseen", "run", mean_of("acc", seen=False)),
    Metric("ap_unseen", "run", mean_of("ap", seen=False), "AP, unseen", headline=True),
    Metric("auroc_unseen", "run", mean_of("auroc", seen=False)),
    Metric("f_acc_unseen", "run", mean_of("f_acc", seen=False)),
    Metric("balanced_acc_seen", "run", mean_of("balanced_acc", seen=True), "balanced acc., seen", headline=True),
    Metric("acc_seen", "run", mean_of("acc", seen=True)),
    Metric("ap_seen", "run", mean_of("ap", seen=True), "AP, seen", headline=True),
    Metric("auroc_seen", "run", mean_of("auroc", seen=True)),
    Metric("f_acc_seen", "run", mean_of("f_acc", seen=True)),
    Metric("r_acc", "run", mean_of("r_acc")),
    Metric("worst_generator_balanced_acc", "run", lambda run: float(run["balanced_acc"].min()), "worst generator"),
    Metric("mAcc", "run", paper_mean),
    Metric("mAcc:{suite}", "suite", paper_mean),
    Metric("balanced_acc:{suite}", "suite", mean_of("balanced_acc")),
    Metric("ap:{suite}", "suite", mean_of("ap")),
    Metric("zero_shot_kept", "forgetting", kept("zero_shot"), "zero-shot kept", headline=True),
    Metric("linear_probe_kept", "forgetting", kept("linear_probe:"), "linear probe kept"),
    Metric("retrieval_kept", "forgetting", kept("retrieval"), "retrieval kept"),
    Metric("cka_to_frozen", "forgetting", after("cka_to_frozen")),
    Metric("knn_overlap", "forgetting", after("knn_overlap")),
    Metric("cosine_drift", "forgetting", after("cosine_drift")),
    Metric("silhouette", "forgetting", after("silhouette")),
)


def metrics_of(*kinds: str) -> dict[str, Metric]:
    """The rows of `METRICS` of these kinds, by key, in order."""
    return {metric.key: metric for metric in METRICS if metric.of in kinds}


TEXT_METRICS = ("zero_shot_kept", "retrieval_kept")  # that a text side takes part in
RATES = list(metrics_of("decisions", "ranking"))
DETECTION_COLUMNS = [
    *RUN, "generator", "seen", "condition", "applied_to", "n_real", "n_fake", *RATES, "threshold_rule",
]  # fmt: skip


def _values(kind: str, *given: Any) -> dict[str, Any]:
    return {key: metric.function(*given) for key, metric in metrics_of(kind).items()}


def _fixed(images: Scored) -> dict[str, Any]:
    """What a set of images has at any threshold: counts of both labels, ranking metrics and calibration."""
    return {"n_real": len(images.reals), "n_fake": len(images.fakes), **_values("ranking", images)}


def detection_row(labels: np.ndarray, logits: np.ndarray, threshold: float = 0.0) -> dict[str, float | int]:
    """All rates of one set of images, and how many of each label there are: {key: value}.

    `labels`: (N,) 0 real, 1 fake; `logits`: (N,) floats; `threshold`: a logit. Raises UserError as `Scored.of` does.
    """
    images = Scored.of(labels, logits)
    return {**_fixed(images), **_values("decisions", images, threshold)}


def detection_table(scores: pd.DataFrame, seen: Collection[str]) -> pd.DataFrame:
    """The detection table: one row a run, generator, condition and threshold rule, over the test images.

    `scores`: columns of `scores.SCORES`; id, sha256 and profile are not needed, nor rho where the data has none;
    `seen`: names of the generators in the training set. A generator is judged against real images of its own where it
    has any, else against the shared pool named "real" or that of its suite (`suites.pool_of`). A condition other than
    "native", scored on all images (applied_to "both"), also gets rows with it applied to real or fake images alone:
    the others keep their native scores. Threshold rules: "0.5" (logit 0), "val" and "val_unbiased" (`best_threshold`
    on the run's native scores of that split, where it has any), and "oracle" (`best_threshold` on the very scores of
    the row): what no threshold can exceed, and nobody can choose. `seen` is boolean; rows are ordered by run,
    condition, seen first, generator.

    Raises UserError for missing columns, no test rows, a generator without fakes or without reals (named), and fakes
    under the name "real".
    """
    if missing := [name for name in NEEDED if name not in scores.columns]:
        raise UserError(f"The scores lack the columns {missing}; found {list(scores.columns)}.")
    if not (scores["split"] == "test").any():
        raise UserError("The scores hold no test rows (column split = 'test'): score the test images first.")
    if "rho" not in scores.columns:
        scores = scores.assign(rho=np.nan)
    rows: list[dict[str, Any]] = []
    for (rho, method, seed), run in scores.groupby(RUN, dropna=False, sort=False):
        chosen = {"0.5": 0.0, **_validation_thresholds(run)}
        for condition, applied_to, part in _conditions(run[run["split"] == "test"]):
            for generator, images in _generators(part, f"{method}, seed {seed}"):
                shared = {
                    "rho": rho, "method": method, "seed": seed, "generator": generator, "seen": generator in seen,
                    "condition": condition, "applied_to": applied_to, **_fixed(images),
                }  # fmt: skip
                thresholds = {**chosen, ORACLE: best_threshold(images.truth, images.logits)}
                rows += [
                    {**shared, **_values("decisions", images, threshold), "threshold_rule": rule}
                    for rule, threshold in thresholds.items()
                ]
    return _ordered(pd.DataFrame(rows, columns=DETECTION_COLUMNS))


def reliability(scores: pd.DataFrame, seen: Collection[str]) -> pd.DataFrame:
    """Probability against frequency, bin by bin: calibration of each run (Naeini et al. 2015, binary form).

    Over the native test images of the unseen generators, or of the seen ones where there are no others. Each generator
    comes with the reals it is judged against, as in `detection_table`, so a shared pool counts once a generator and the
    mix of real and fake stays that of one generator. Columns method, seed, bin (0 to 14, equal width), n (images),
    probability (mean sigmoid(logit)), fake (share of fakes); empty bins are left out. Raises UserError as
    `detection_table` does.
    """
    native = native_rows(scores[scores["split"] == "test"])
    unseen = {name for name in native["generator"].unique() if not is_pool(name)} - set(seen)
    parts = []
    for (method, seed), run in native.groupby(["method", "seed"], sort=False):
        found = dict(_generators(run, f"{method}, seed {seed}"))
        pooled = [images for name, images in found.items() if not unseen or name in unseen]
        images = Scored(*(np.concatenate([getattr(part, side) for part in pooled]) for side in ("truth", "logits")))
        probability = expit(images.logits)
        table = pd.DataFrame(
            {"bin": stats.probability_bins(probability), "probability": probability, "fake": images.truth}
        )
        bins = table.groupby("bin").agg(n=("fake", "size"), probability=("probability", "mean"), fake=("fake", "mean"))
        parts.append(pd.concat({(method, seed): bins}, names=["method", "seed"]))
    return pd.concat(parts).reset_index()


def native_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of scores or of a detection table that are of unperturbed images."""
    return table[(table["condition"] == NATIVE) & (table["applied_to"] == "both")]


def headline(detection: pd.DataFrame) -> pd.DataFrame:
    """A copy of the rows that headline numbers come from: unperturbed images, threshold 0.5, one value of rho.

    Raises UserError where a detection table has none, or where they mix several values of rho.
    """
    rows = native_rows(detection)
    rows = rows[rows["threshold_rule"].astype(str) == "0.5"]
    if rows.empty:
        raise UserError(
            f"The detection table has no rows with condition '{NATIVE}', applied_to 'both' and threshold_rule '0.5'."
        )
    one_rho(rows, "detection table")
    return rows.copy()


def one_rho(table: pd.DataFrame, what: str) -> None:
    """Raises UserError where `table` mixes several values of rho: a mean over them would mean nothing."""
    values = sorted(table["rho"].dropna().unique()) if "rho" in table.columns else []
    if len(values) > 1:
        raise UserError(f"The {what} mixes rho = {', '.join(map(str, values))}: select one value of rho first.")


def per_seed_values(detection: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> pd.DataFrame:
    """The numbers of each run, before any mean over seeds: columns method, seed, metric, value (float64).

    Those of `METRICS`, from the `headline` rows of the detection table and from the forgetting table (columns method,
    seed, measure, before, after). A number without rows is left out. Raises UserError as `headline` does.
    """
    rows = headline(detection)
    tables = [("run", "", rows), *(("suite", suite, part) for suite, part in by_suite(rows).items() if suite)]
    if forgetting is not None and not forgetting.empty:
        one_rho(forgetting, "forgetting table")
        tables.append(("forgetting", "", forgetting))
    found = [
        (method, seed, key.format(suite=suite), value)
        for kind, suite, table in tables
        for (method, seed), run in table.groupby(["method", "seed"], sort=False)
        for key, value in _values(kind, run).items()
    ]
    measured = [row for row in found if row[-1] is not None]
    return pd.DataFrame(measured, columns=["method", "seed", "metric", "value"])


def over_seeds(values: pd.Series) -> dict[str, Any]:
    """Values by seed (the index) as an entry of metrics.json: {mean, low, high, per_seed: {seed: value}}."""
    by_seed = values.sort_index()
    mean, low, high = (rounded(end) for end in seed_interval(by_seed.to_numpy()))
    return {"mean": mean, "low": low, "high": high, "per_seed": {str(seed): rounded(v) for seed, v in by_seed.items()}}


def summary(detection: pd.DataFrame, forgetting: pd.DataFrame | None, profile: str, data_hash: str) -> dict[str, Any]:
    """The content of metrics.json: each method's headline numbers with 95 % intervals over seeds.

    Returns {profile, data_hash, methods: {name: {metric: {mean, low, high, per_seed: {seed: value}}}}} in plain JSON
    types, rounded to 6 decimals; the metrics are those of `per_seed_values`. One seed: low and high are None. Data
    without unseen (or seen) generators has no `_unseen` (`_seen`) entries. A metric of forgetting that text takes part
    in is None where it was not measured; so is every one of a method that brings a model of its own, which has no row
    of forgetting. Raises UserError as `headline` does.
    """
    values = per_seed_values(detection, forgetting)
    methods: dict[str, dict[str, dict[str, Any] | None]] = {}
    for (method, metric), part in values.groupby(["method", "metric"], sort=False):
        methods.setdefault(str(method), {})[str(metric)] = over_seeds(part.set_index("seed")["value"])
    if forgetting is not None:
        for name, numbers in methods.items():
            expected = TEXT_METRICS if name in set(forgetting["method"]) else metrics_of("forgetting")
            numbers |= {key: None for key in expected if key not in numbers}
    return {"profile": profile, "data_hash": data_hash, "methods": methods}


def by_suite(detection: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A detection table's rows by suite of the paper, "" first for generators of none; within, the columns' names.

    In a suite, rows are in the paper's order of generators; suites in theirs, and only those with rows.
    """
    names = pd.DataFrame(list(map(parted, detection["generator"])), detection.index, ["suite", "own"])
    parts = {}
    orders = {"": [], **{suite.name: [known.column for known in suite.generators] for suite in SUITES}}
    for suite, order in orders.items():
        rows = detection.assign(generator=names["own"])[names["suite"] == suite]
        if not rows.empty:
            ranks = rows["generator"].map({column: rank for rank, column in enumerate(order)})
            parts[suite] = rows.iloc[np.argsort(ranks.to_numpy(), kind="stable")]
    return parts


def measure_words(measure: str) -> str:
    """A measure of forgetting in words: "zero_shot:shape" -> "zero-shot shape"; it says if its text side is aligned."""
    name, colon, attribute = measure.partition(":")  # the last may be any word
    note, measure = AGAINST_ALIGNED if name.endswith(ALIGNED) else "", name.removesuffix(ALIGNED) + colon + attribute
    words = measure.replace("zero_shot:", "zero-shot ").replace("linear_probe:", "linear probe, ")
    words = words.replace("retrieval_", "caption retrieval_").replace("knn_", "kNN_").replace("cka_", "CKA_")
    words = words.replace("silhouette", "silhouette, real against fake").replace(BLOCK, ", block ")
    return words.replace("principal_angle:", "principal angle, ").replace("_", " ") + note


def has_aligned_text(forgetting: pd.DataFrame) -> bool:
    """Whether the text side of a forgetting table's measures was trained to the tower."""
    return bool(forgetting["measure"].astype(str).str.split(":").str[0].str.endswith(ALIGNED).any())


def label_of(metric: str, forgetting: pd.DataFrame | None) -> str:
    """The label of a row of `METRICS`, by its key; it says if the text side in it was trained to the tower."""
    aligned = forgetting is not None and metric in TEXT_METRICS and has_aligned_text(forgetting)
    return next(each.label for each in METRICS if each.key == metric) + (AGAINST_ALIGNED if aligned else "")


def unique(names: Iterable[Any]) -> list[str]:
    """Distinct names in order of appearance."""
    return list(dict.fromkeys(map(str, names)))


def generators_in_order(detection: pd.DataFrame) -> list[str]:
    """Distinct generators, those seen in training first, each group in order of appearance."""
    return unique(detection.sort_values("seen", ascending=False, kind="stable")["generator"])


def write_detection(detection: pd.DataFrame, path: str | Path) -> None:
    """Writes detection.csv: contract columns in order, 6 decimals, lower-case booleans; parent folders are made."""
    table = detection[DETECTION_COLUMNS].copy()
    table[RATES] = table[RATES].round(DECIMALS)
    table["seen"] = table["seen"].map({True: "true", False: "false"})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, lineterminator="\n")


def read_detection(path: str | Path) -> pd.DataFrame:
    """Reads detection.csv with its types: names and threshold rules stay text ("0.5", a generator named "NA")."""
    return read_table(path).astype({"seen": bool, **dict.fromkeys(("rho", *RATES), float)})


def _conditions(test: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(condition, applied_to, rows) of one run's test rows: those scored, and those composed with native scores."""
    native = native_rows(test)
    for (condition, applied_to), part in test.groupby(["condition", "applied_to"], sort=False):
        yield str(condition), str(applied_to), part
        if condition != NATIVE and applied_to == "both" and not native.empty:
            for name, label in (("fake", 1), ("real", 0)):
                yield str(condition), name, pd.concat([part[part["label"] == label], native[native["label"] != label]])


def _validation_thresholds(run: pd.DataFrame) -> dict[str, float]:
    native = native_rows(run)
    splits = {name: native[native["split"] == name] for name in VALIDATION}
    return {
        name: best_threshold(rows["label"].to_numpy(), rows["logit"].to_numpy())
        for name, rows in splits.items()
        if not rows.empty
    }


def _generators(part: pd.DataFrame, run: str) -> Iterator[tuple[str, Scored]]:
    """(name, images) of each generator, as `rows_by_generator` parts one run and condition."""
    for name, own in rows_by_generator(part):
        yield name, Scored.of(own["label"].to_numpy(), own["logit"].to_numpy(), f" ({run}, generator {name})")


def rows_by_generator(part: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, rows) of each generator of one run and condition, with the reals it is judged against.

    Raises UserError as `detection_table` does.
    """
    present = set(part["generator"])
    pools = {name: part[part["generator"] == name] for name in sorted(present) if is_pool(name)}
    for name, pool in pools.items():
        if (pool["label"] == 1).any():
            raise UserError(f"Images of generator '{name}' are labelled fake: that name is kept for shared reals.")
    names = sorted(present - set(pools))
    if not names:
        raise UserError("The test scores hold real images only: add at least one generator's images.")
    for name in names:
        own = part[part["generator"] == name]
        if not (own["label"] == 1).any():
            raise UserError(f"Generator '{name}' has no fake test images: add some, or leave the generator out.")
        if not (own["label"] == 0).any():
            if not (shared := pool_of(name, pools)):
                raise UserError(
                    f"Generator '{name}' has no real test images, and there is no shared pool named '{SHARED_REALS}'."
                )
            own = pd.concat([own, pools[shared]])
        yield name, own


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    orders = {"method": unique(table["method"]), "condition": unique([NATIVE, *table["condition"]])}
    ranks = table.assign(
        unseen=~table["seen"], **{name: table[name].map(order.index) for name, order in orders.items()}
    )
    keys = [*RUN, "condition", "applied_to", "unseen", "generator", "threshold_rule"]
    return table.loc[ranks.sort_values(keys, kind="stable").index].reset_index(drop=True)
