"""From scores (one row an image) to detection rates, their table and the summary of a run.

Every number is computed from stored scores, so a new metric needs no new inference. A logit is the detector's output
before the sigmoid: an image is called generated where logit > threshold, and the threshold 0 is sigmoid(logit) > 0.5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.metrics import auc, average_precision_score, roc_curve

from dgs.data.conditions import NATIVE
from dgs.data.layout import SHARED_REALS
from dgs.data.suites import SUITES, is_pool, parted, pool_of
from dgs.errors import UserError
from dgs.stats import seed_interval, share_interval

RUN = ["rho", "method", "seed"]
RATES = ["acc", "balanced_acc", "r_acc", "f_acc", "ap", "auroc", "tpr_at_1fpr", "tpr_at_5fpr", "ece"]
DETECTION_COLUMNS = [
    *RUN, "generator", "seen", "condition", "applied_to", "n_real", "n_fake", *RATES, "threshold_rule",
]  # fmt: skip
SCORE_COLUMNS = ["split", "generator", "label", "condition", "applied_to", "logit", "method", "seed"]
CELL_METRICS = ("acc", "balanced_acc", "r_acc", "f_acc", "ap")
ECE_BINS = 15
VALIDATION = ("val", "val_unbiased")  # the second without the training set's shortcut, where the data has one
ORACLE = "oracle"  # the threshold rule that looks at the test scores
AS_THEY_ARE = ("cka_to_frozen", "knn_overlap", "cosine_drift", "silhouette")  # forgetting measures for metrics.json
DECIMALS = 6  # what files keep: far below what any test set can resolve, far above the noise of summation order


def detection_row(labels: np.ndarray, logits: np.ndarray, threshold: float = 0.0) -> dict[str, float | int]:
    """All rates of one set of images: accuracies at `threshold` (a logit), ranking metrics and calibration.

    `labels`: (N,) 0 real, 1 fake; `logits`: (N,) floats. All rates are fractions:
    r_acc, f_acc = accuracy on reals and on fakes; balanced_acc = their mean; acc = over all images;
    ap, auroc = average precision of "fake" and area under the ROC curve (scikit-learn);
    tpr_at_1fpr, tpr_at_5fpr = largest share of fakes caught at a false-alarm rate of at most 1 % and 5 %;
    ece = |mean probability - share of fakes| over 15 equal-width bins of sigmoid(logit), weighted by their images
    (Naeini et al. 2015, binary form). Raises UserError where a class is missing or a logit is not finite.
    """
    truth, score = _checked(labels, logits)
    return {**_counts(truth), **_decisions(truth, score, threshold), **_ranking(truth, score)}


def best_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """The logit threshold that maximises balanced accuracy.

    Choose by it on validation scores; on test scores it gives an upper bound (the rule "oracle"), never a choice.

    `labels`: (N,) 0/1; `logits`: (N,). All thresholds between two neighbouring scores decide alike, so the answer is
    the middle of such an interval; of several best intervals the one nearest to 0 counts. Where "everything is fake"
    or "everything is real" is best, the answer lies 1 outside the scores. Raises UserError as `detection_row` does.
    """
    truth, score = _checked(labels, logits)
    values, position = np.unique(score, return_inverse=True)
    fakes = np.bincount(position, weights=truth, minlength=len(values)).astype(np.int64)
    reals = np.bincount(position, weights=1 - truth, minlength=len(values)).astype(np.int64)
    n_fake, n_real = int(fakes.sum()), int(reals.sum())
    below_fake, below_real = np.append(0, np.cumsum(fakes)), np.append(0, np.cumsum(reals))
    # 2 * n_fake * n_real * balanced accuracy, as integers: ties are exact.
    quality = (n_fake - below_fake) * n_real + below_real * n_fake
    low, high = np.append(-np.inf, values), np.append(values, np.inf)
    distance = np.where(low > 0, low, np.where(high <= 0, -high, 0.0))
    best = np.flatnonzero(quality == quality.max())
    chosen = best[np.argmin(distance[best])]
    if chosen == 0:
        return float(values[0] - 1.0)
    if chosen == len(values):
        return float(values[-1] + 1.0)
    return float((low[chosen] + high[chosen]) / 2.0)


def calibrate(labels: np.ndarray, logits: np.ndarray) -> tuple[dict[str, float], dict[str, Any]]:
    """Thresholds on the logit by rule ("0.5", "val"), and by rule how each does on these validation images.

    `labels`: (N,) 0/1; `logits`: (N,). The second is {rule: {"false_alarm", "caught"}} of the shares of real and of
    fake images that are called fake, each {count, of, rate, low, high} with a 95 % Wilson interval, in JSON types. For
    "val", which was chosen on the same images, they are a little too good. Raises UserError as `detection_row` does.
    """
    truth, score = _checked(labels, logits)
    thresholds = {"0.5": 0.0, "val": best_threshold(truth, score)}
    measured = {
        rule: {
            "false_alarm": _share(score[truth == 0] > threshold),
            "caught": _share(score[truth == 1] > threshold),
        }
        for rule, threshold in thresholds.items()
    }
    return thresholds, measured


def _share(chosen: np.ndarray) -> dict[str, Any]:
    count, of = int(chosen.sum()), len(chosen)
    rate, low, high = (_rounded(end) for end in share_interval(count, of))
    return {"count": count, "of": of, "rate": rate, "low": low, "high": high}


def detection_table(scores: pd.DataFrame, seen: Collection[str]) -> pd.DataFrame:
    """The detection table: one row a run, generator, condition and threshold rule, over the test images.

    `scores`: one row an image and condition (columns split, generator, label, condition, applied_to, logit, method,
    seed, and rho where the data has one); `seen`: names of the generators in the training set. A generator is judged
    against real images of its own where it has any, else against the shared pool named "real" or that of its suite
    (`suites.pool_of`). A condition other than
    "native", scored on all images (applied_to "both"), also gets rows with it applied to real or fake images alone:
    the others keep their native scores. Threshold rules: "0.5"
    (logit 0), "val" and "val_unbiased" (`best_threshold` on the run's native scores of that split, where it has any),
    and "oracle" (`best_threshold` on the very scores of the row): what no threshold can exceed, and nobody can choose.
    Rates are fractions, `seen` is boolean; rows are ordered by run, condition, seen first, generator.

    Raises UserError for missing columns, no test rows, a generator without fakes or without reals (named), and fakes
    under the name "real".
    """
    missing = [name for name in SCORE_COLUMNS if name not in scores.columns]
    if missing:
        raise UserError(f"The scores lack the columns {missing}; found {list(scores.columns)}.")
    if not (scores["split"] == "test").any():
        raise UserError("The scores hold no test rows (column split = 'test'): score the test images first.")
    if "rho" not in scores.columns:
        scores = scores.assign(rho=np.nan)
    rows: list[dict[str, Any]] = []
    for (rho, method, seed), run in scores.groupby(RUN, dropna=False, sort=False):
        thresholds = {"0.5": 0.0, **_validation_thresholds(run)}
        test = run[run["split"] == "test"]
        for condition, applied_to, part in _conditions(test):
            for generator, labels, logits in _generators(part):
                truth, score = _checked(labels, logits, f" ({method}, seed {seed}, generator {generator})")
                shared = {
                    "rho": rho, "method": method, "seed": seed, "generator": generator,
                    "seen": generator in seen, "condition": condition, "applied_to": applied_to,
                    **_counts(truth), **_ranking(truth, score),
                }  # fmt: skip
                bound = {ORACLE: best_threshold(truth, score)}
                rows += [
                    {**shared, **_decisions(truth, score, threshold), "threshold_rule": rule}
                    for rule, threshold in (thresholds | bound).items()
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
    native = scores[(scores["split"] == "test") & (scores["condition"] == "native") & (scores["applied_to"] == "both")]
    unseen = {name for name in native["generator"].unique() if not is_pool(name)} - set(seen)
    parts = []
    for (method, seed), run in native.groupby(["method", "seed"], sort=False):
        pooled = [(truth, score) for name, truth, score in _generators(run) if not unseen or name in unseen]
        labels, logits = (np.concatenate(column) for column in zip(*pooled, strict=True))
        truth, score = _checked(labels, logits, f" ({method}, seed {seed})")
        probability = expit(score)
        table = pd.DataFrame({"bin": _bins(probability), "probability": probability, "fake": truth})
        found = table.groupby("bin").agg(n=("fake", "size"), probability=("probability", "mean"), fake=("fake", "mean"))
        parts.append(pd.concat({(method, seed): found}, names=["method", "seed"]))
    return pd.concat(parts).reset_index()


def headline(
    detection: pd.DataFrame, condition: str = "native", applied_to: str = "both", threshold_rule: str = "0.5"
) -> pd.DataFrame:
    """The rows that headline numbers come from: unperturbed images, threshold 0.5, one value of rho.

    Returns a copy of the matching rows of a detection table. Raises UserError where none match, or where they mix
    several values of rho.
    """
    rows = detection[
        (detection["condition"] == condition)
        & (detection["applied_to"] == applied_to)
        & (detection["threshold_rule"].astype(str) == threshold_rule)
    ]
    if rows.empty:
        raise UserError(
            f"The detection table has no rows with condition '{condition}', applied_to '{applied_to}' and "
            f"threshold_rule '{threshold_rule}'."
        )
    one_rho(rows, "detection table")
    return rows.copy()


def one_rho(table: pd.DataFrame, what: str) -> None:
    """Raises UserError where `table` mixes several values of rho: a mean over them would mean nothing."""
    values = sorted(table["rho"].dropna().unique()) if "rho" in table.columns else []
    if len(values) > 1:
        raise UserError(f"The {what} mixes rho = {', '.join(map(str, values))}: select one value of rho first.")


def per_seed_values(detection: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> pd.DataFrame:
    """Headline numbers of each run, before any mean over seeds: columns method, seed, metric, value (float64).

    Detection (over `headline` rows; plain means over generators, `_seen` and `_unseen` apart):
    balanced_acc, acc, ap, auroc, f_acc; over all generators r_acc and worst_generator_balanced_acc (the minimum).
    mAcc is the paper's mean over one Real column (r_acc) and one F.Acc column a generator. It is fake recall for the
    most part (n/(n+1) of it, some 95 % with 16-25 generators): a detector that calls everything fake scores near 1.
    Of each suite of the paper that was tested, over its own generators: mAcc:<suite>, balanced_acc:<suite>, ap:<suite>.

    Forgetting (columns method, seed, measure, before, after): zero_shot_kept, linear_probe_kept and retrieval_kept =
    mean of after/before over the measures named zero_shot:*, linear_probe:* and retrieval*; cka_to_frozen, knn_overlap,
    cosine_drift and silhouette = their after. Ratios are not corrected for chance. A measure whose `before` is 0 has no
    ratio and is left out; so is each number without rows.
    """
    found: list[tuple[Any, Any, str, float]] = []
    for (method, seed), run in headline(detection).groupby(["method", "seed"], sort=False):
        numbers: dict[str, float] = {}
        for suffix, part in (("unseen", run[~run["seen"]]), ("seen", run[run["seen"]])):
            for metric in ("balanced_acc", "acc", "ap", "auroc", "f_acc"):
                if not part.empty:
                    numbers[f"{metric}_{suffix}"] = part[metric].mean()
        numbers["r_acc"] = run["r_acc"].mean()
        numbers["worst_generator_balanced_acc"] = run["balanced_acc"].min()
        numbers["mAcc"] = paper_mean(run)
        for suite, part in by_suite(run).items():
            if suite:
                numbers[f"mAcc:{suite}"] = paper_mean(part)
                numbers |= {f"{metric}:{suite}": part[metric].mean() for metric in ("balanced_acc", "ap")}
        found += [(method, seed, metric, float(value)) for metric, value in numbers.items()]
    if forgetting is not None and not forgetting.empty:
        one_rho(forgetting, "forgetting table")
        for (method, seed), run in forgetting.groupby(["method", "seed"], sort=False):
            found += [(method, seed, metric, value) for metric, value in _kept(run).items()]
    return pd.DataFrame(found, columns=["method", "seed", "metric", "value"])


def summary(detection: pd.DataFrame, forgetting: pd.DataFrame | None, profile: str, data_hash: str) -> dict[str, Any]:
    """The content of metrics.json: each method's headline numbers with 95 % intervals over seeds.

    Returns {profile, data_hash, methods: {name: {metric: {mean, low, high, per_seed: {seed: value}}}}} in plain JSON
    types, rounded to 6 decimals; the metrics are those of `per_seed_values`. One seed: low and high are None. Data
    without unseen (or seen) generators has no `_unseen` (`_seen`) entries. Raises UserError as `headline` does.
    """
    values = per_seed_values(detection, forgetting)
    methods: dict[str, dict[str, Any]] = {}
    for (method, metric), part in values.groupby(["method", "metric"], sort=False):
        by_seed = part.sort_values("seed")
        mean, low, high = (_rounded(end) for end in seed_interval(by_seed["value"].to_numpy()))
        methods.setdefault(str(method), {})[str(metric)] = {
            "mean": mean,
            "low": low,
            "high": high,
            "per_seed": {str(seed): _rounded(v) for seed, v in zip(by_seed["seed"], by_seed["value"], strict=True)},
        }
    return {"profile": profile, "data_hash": data_hash, "methods": methods}


def paper_mean(run: pd.DataFrame) -> float:
    """The paper's mAcc of one run's rows, a row a generator: the mean of one Real column and an F.Acc column each."""
    return float((run["r_acc"].mean() + run["f_acc"].sum()) / (len(run) + 1))


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


def cells_table(detection: pd.DataFrame, metrics: Sequence[str] = CELL_METRICS) -> pd.DataFrame:
    """Each method on each generator: mean and 95 % interval over seeds of the `headline` rows.

    Columns method, generator, seen, metric, n_seeds, mean, low, high (fractions; low and high NaN for one seed); rows
    by metric, method as in `detection`, seen generators first. Raises UserError as `headline` does.
    """
    rows = headline(detection)
    cells: list[dict[str, Any]] = []
    for metric in metrics:
        for method in in_order(rows["method"]):
            of_method = rows[rows["method"] == method]
            for generator in generators_in_order(rows):
                cell = of_method[of_method["generator"] == generator]
                if cell.empty:
                    continue
                interval = seed_interval(cell[metric].to_numpy())
                key = {"method": method, "generator": generator, "seen": bool(cell["seen"].iloc[0]), "metric": metric}
                cells.append({**key, "n_seeds": len(cell), **interval._asdict()})
    return pd.DataFrame(cells)


def in_order(names: Iterable[Any]) -> list[str]:
    """Distinct names in order of appearance."""
    return list(dict.fromkeys(str(name) for name in names))


def generators_in_order(detection: pd.DataFrame) -> list[str]:
    """Distinct generators, those seen in training first, each group in order of appearance."""
    return in_order(detection.loc[detection["seen"], "generator"]) + in_order(
        detection.loc[~detection["seen"], "generator"]
    )


def write_detection(detection: pd.DataFrame, path: str | Path) -> None:
    """Writes detection.csv: contract columns in order, 6 decimals, lower-case booleans; parent folders are made."""
    table = detection[DETECTION_COLUMNS].copy()
    table[RATES] = table[RATES].round(DECIMALS)
    table["seen"] = table["seen"].map({True: "true", False: "false"})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, lineterminator="\n")


def read_detection(path: str | Path) -> pd.DataFrame:
    """Reads detection.csv with its types: names and threshold rules stay text ("0.5", a generator named "NA")."""
    numbers: Mapping[Any, list[str]] = {name: [""] for name in ("rho", *RATES)}
    text = dict.fromkeys(("method", "generator", "condition", "applied_to", "threshold_rule"), str)
    table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=numbers)
    return table.astype({"seen": bool, **dict.fromkeys(("rho", *RATES), float)})


def _checked(labels: np.ndarray, logits: np.ndarray, where: str = "") -> tuple[np.ndarray, np.ndarray]:
    truth, score = np.asarray(labels), np.asarray(logits, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != score.shape:
        raise UserError(f"Expected one label a logit, found labels {truth.shape} and logits {score.shape}.")
    if not np.isin(truth, (0, 1)).all():
        raise UserError(f"Expected labels 0 (real) and 1 (fake), found {np.unique(truth).tolist()}.")
    if truth.size == 0 or truth.min() == truth.max():
        raise UserError(
            f"Expected real and fake images, found {int((truth == 0).sum())} real and {int((truth == 1).sum())} fake."
        )
    bad = int((~np.isfinite(score)).sum())
    if bad:
        raise UserError(
            f"{bad} of {score.size} logits are not finite{where}: did training diverge? Try a lower learning rate."
        )
    return truth.astype(np.int64), score


def _counts(truth: np.ndarray) -> dict[str, int]:
    return {"n_real": int((truth == 0).sum()), "n_fake": int((truth == 1).sum())}


def _decisions(truth: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float]:
    called_fake = score > threshold
    r_acc, f_acc = float(np.mean(~called_fake[truth == 0])), float(np.mean(called_fake[truth == 1]))
    return {
        "acc": float(np.mean(called_fake == (truth == 1))),
        "balanced_acc": (r_acc + f_acc) / 2.0,
        "r_acc": r_acc,
        "f_acc": f_acc,
    }


def _ranking(truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
    false_alarms, caught, _ = roc_curve(truth, score, drop_intermediate=False)
    return {
        "ap": float(average_precision_score(truth, score)),
        "auroc": float(auc(false_alarms, caught)),
        "tpr_at_1fpr": float(caught[false_alarms <= 0.01].max()),
        "tpr_at_5fpr": float(caught[false_alarms <= 0.05].max()),
        "ece": _calibration_error(truth, expit(score)),
    }


def _calibration_error(truth: np.ndarray, probability: np.ndarray) -> float:
    gap = np.bincount(_bins(probability), weights=probability - truth, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / truth.size)


def _bins(probability: np.ndarray) -> np.ndarray:
    return np.minimum((probability * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def _conditions(test: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(condition, applied_to, rows) of one run's test rows: those scored, and those composed with native scores."""
    native = test[(test["condition"] == NATIVE) & (test["applied_to"] == "both")]
    for (condition, applied_to), part in test.groupby(["condition", "applied_to"], sort=False):
        yield str(condition), str(applied_to), part
        if condition != NATIVE and applied_to == "both" and not native.empty:
            for name, label in (("fake", 1), ("real", 0)):
                yield str(condition), name, pd.concat([part[part["label"] == label], native[native["label"] != label]])


def _validation_thresholds(run: pd.DataFrame) -> dict[str, float]:
    native = run[(run["condition"] == "native") & (run["applied_to"] == "both")]
    splits = {name: native[native["split"] == name] for name in VALIDATION}
    return {
        name: best_threshold(rows["label"].to_numpy(), rows["logit"].to_numpy())
        for name, rows in splits.items()
        if not rows.empty
    }


def _generators(part: pd.DataFrame) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """(name, labels, logits) of each generator of one run and condition, with the reals it is judged against."""
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
        yield name, own["label"].to_numpy(), own["logit"].to_numpy()


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    conditions = in_order(["native", *table["condition"]])
    ranks = pd.DataFrame(
        {
            "rho": table["rho"],
            "method": table["method"].map({name: i for i, name in enumerate(in_order(table["method"]))}),
            "seed": table["seed"],
            "condition": table["condition"].map({name: i for i, name in enumerate(conditions)}),
            "applied_to": table["applied_to"],
            "unseen": ~table["seen"],
            "generator": table["generator"],
            "threshold_rule": table["threshold_rule"],
        }
    )
    return table.loc[ranks.sort_values(list(ranks.columns), kind="stable").index].reset_index(drop=True)


def _kept(run: pd.DataFrame) -> dict[str, float]:
    """Forgetting numbers of one run; the measure's name says which."""
    name = run["measure"].astype(str)
    ratio = (run["after"] / run["before"]).where(run["before"] != 0)
    chosen = {
        "zero_shot_kept": ratio[name.str.startswith("zero_shot:")],
        "linear_probe_kept": ratio[name.str.startswith("linear_probe:")],
        "retrieval_kept": ratio[name.str.startswith("retrieval")],
        **{measure: run["after"][name == measure] for measure in AS_THEY_ARE},
    }
    return {metric: float(part.mean()) for metric, part in chosen.items() if part.notna().any()}


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), DECIMALS)
