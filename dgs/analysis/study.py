"""The study: methods under several conditions, compared in pairs; every table is a pivot of three long ones.

results/study/detection.parquet and forgetting.parquet hold the rows of each profile's detection.csv and forgetting.csv
behind two columns more, profile and data_hash; scores.parquet the scores (`scores.SCORES`) of the runs that have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from scipy.stats import kendalltau

from dgs.analysis.differences import difference_table, rate_cells
from dgs.analysis.metrics import (
    AGAINST_ALIGNED,
    headline,
    label_of,
    native_rows,
    per_seed_values,
    read_detection,
    unique,
)
from dgs.analysis.report import markdown_table, plus_minus, render
from dgs.analysis.scores import FILE, as_scores, read_scores, write_scores
from dgs.analysis.tuning import RULES, choices
from dgs.atomic import replacing_file
from dgs.crossed import Crossed, crossed_interval
from dgs.errors import UserError
from dgs.model.methods.registry import ENDED
from dgs.params import load_params
from dgs.stats import (
    Interval,
    interval_text,
    iqm,
    paired_difference,
    percent_text,
    rounded_text,
    seed_interval,
    stratified_bootstrap,
)
from dgs.tables import read_table
from dgs.workspace import MAIN

SUBJECT, BASELINE, PAPERS = "dgs_plus", "lora", "dgs"
PARTS = ("poe_swad",)  # of the subject, so no rivals of it
GOALS = {0.9: 15.0, 0.75: 6.6, 0.5: 0.0}  # points above lora on unseen generators that were asked of the subject
KEPT = 0.95  # share of the frozen tower's abilities that was asked of it
UNSEEN, ABILITIES = "balanced_acc_unseen", ("zero_shot_kept", "retrieval_kept")
SHOWN = (UNSEEN, "worst_generator_balanced_acc", "balanced_acc_seen", "ap_unseen", *ABILITIES)
STORE = Path("results/study")  # the tables of all conditions, whose own results folders are not committed
TABLES = ("detection", "forgetting")


@dataclass(frozen=True)
class Condition:
    """One profile's results.

    values: columns method, seed, metric, value, as `metrics.per_seed_values` gives them.
    cells: {method: balanced accuracy on unseen generators, a row a seed and a column a generator}.
    labels: of `SHOWN`, in its order; they say if the text side in a measure was trained to the tower.
    """

    name: str
    rho: float
    data_hash: str
    values: pd.DataFrame
    cells: Mapping[str, pd.DataFrame]
    labels: Mapping[str, str]

    def of(self, method: str, metric: str = UNSEEN) -> pd.Series:
        """Values by seed."""
        rows = self.values[(self.values["method"] == method) & (self.values["metric"] == metric)]
        return rows.set_index("seed")["value"].sort_index()

    def gap(self, method: str, other: str, metric: str = UNSEEN) -> Interval:
        """`method` minus `other` in points, paired by seed."""
        both = pd.concat([self.of(method, metric), self.of(other, metric)], axis=1, join="inner")
        return paired_difference(*(100 * both.to_numpy(dtype=float).T))

    def cell_gaps(self, method: str, other: str) -> pd.DataFrame:
        """`method` minus `other` in points by seed and unseen generator."""
        return 100 * (self.cells[method] - self.cells[other]).dropna()

    @property
    def methods(self) -> list[str]:
        return unique(self.values["method"])


def read_tables(root: Path, profile: str) -> dict[str, pd.DataFrame]:
    """{"detection", "forgetting": table} of a profile: from results/<profile>/, and of methods that it lacks from the
    study's tables, where these are of the same images.

    Raises:
        UserError: neither has it.
    """
    stored = {name: table[table["profile"] == profile] for name, table in _stored(root).items()}
    run = _run(root, profile)
    if not run and (not stored or stored["detection"].empty):
        raise UserError(f"Expected results of the profile {profile}, found none. Run make repro PROFILE={profile}.")
    if not run or not stored:
        return run or stored
    again = _replaced(stored["detection"], run["detection"])
    both = {name: [table[~again(table)], run[name]] for name, table in stored.items()}
    full = {name: [part for part in parts if len(part)] or parts[:1] for name, parts in both.items()}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in full.items()}


def _run(root: Path, profile: str) -> dict[str, pd.DataFrame]:
    """The tables of results/<profile>/; none without a run."""
    folder = root / "results" / profile
    if not (folder / "metrics.json").exists():
        return {}
    data_hash = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["data_hash"]
    labels = pd.DataFrame({"profile": profile, "data_hash": data_hash}, index=[0])
    detection, forgetting = read_detection(folder / "detection.csv"), read_table(folder / "forgetting.csv")
    return {"detection": labels.merge(detection, how="cross"), "forgetting": labels.merge(forgetting, how="cross")}


def _replaced(stored: pd.DataFrame, run: pd.DataFrame) -> Callable[[pd.DataFrame], pd.Series]:
    """Which rows of a profile's table a run takes the place of: of its methods, or all where images are others."""
    methods = set(run["method"])
    others = set(stored["data_hash"]) != set(run["data_hash"])
    return lambda table: table["method"].isin(methods) | others


def read_scores_of(root: Path, profile: str) -> pd.DataFrame | None:
    """The scores of a profile, by the rule of `read_tables`; None where no run has any."""
    file, kept, run = root / "results" / profile / FILE, root / STORE / FILE, _run(root, profile)
    parts = []
    if kept.exists():
        stored = as_scores(pd.read_parquet(kept, filters=[("profile", "==", profile)]))
        before = _stored(root)["detection"].query("profile == @profile")
        parts.append(stored[~_replaced(before, run["detection"])(stored)] if run else stored)
    if run and file.exists():
        parts.append(read_scores(file))
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return None if found.empty else found


def _stored(root: Path) -> dict[str, pd.DataFrame]:
    """The study's tables; none before the first study."""
    files = {name: root / STORE / f"{name}.parquet" for name in TABLES}
    return {name: pd.read_parquet(file) for name, file in files.items() if file.exists()}


def keep_runs(root: Path) -> None:
    """Put what results/study-*/ hold into the study's tables, in place of the rows of their methods."""
    profiles = sorted(path.parent.name for path in root.glob("results/study-*/metrics.json"))
    if not profiles:
        return
    runs, stored = [read_tables(root, profile) for profile in profiles], _stored(root)
    scores = [found for profile in profiles if (found := read_scores_of(root, profile)) is not None]
    kept = root / STORE / FILE
    if scores:
        before = [pd.read_parquet(kept).query("profile not in @profiles")] if kept.exists() else []
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(kept) as draft:
            write_scores(pd.concat([*before, *scores], ignore_index=True), draft)
    for name in TABLES:
        before = [stored[name].query("profile not in @profiles")] if name in stored else []
        (root / STORE).mkdir(parents=True, exist_ok=True)
        with replacing_file(root / STORE / f"{name}.parquet") as draft:
            whole = pd.concat([*before, *(run[name] for run in runs)], ignore_index=True)
            whole.to_parquet(draft, compression="zstd", index=False)


def differences_of(root: Path, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """`difference_table` of each condition that has scores of lora, of the methods that have them.

    Where some have none, p is not adjusted: the family that was named beforehand is not whole.
    """
    found = {}
    for name in names:
        scores, tables = read_scores_of(root, name), read_tables(root, name)
        if scores is None or BASELINE not in set(scores["method"]):
            continue
        methods = set(scores["method"])
        own = {kind: table[table["method"].isin(methods)] for kind, table in tables.items()}
        table = difference_table(per_seed_values(own["detection"], own["forgetting"]), own["detection"], scores)
        whole = set(tables["detection"]["method"]) - set(ENDED) <= methods
        found[name] = table if whole else table.assign(p_holm=np.nan)
    return found


def unseen_cells(
    scores: pd.DataFrame, seen: Collection[str], rate: str = "balanced_acc"
) -> dict[str, dict[int, NDArray[np.float64]]]:
    """{method: {seed: `rate_cells` on the unseen generators}}.

    `scores`: of one condition; `rate`: of `crossed.RATES`.
    """
    native = native_rows(scores[scores["split"] == "test"])
    fakes = native.loc[native["label"] == 1, "generator"]
    cells: dict[str, dict[int, NDArray[np.float64]]] = {}
    for (method, seed), own in rate_cells(native, rate, [name for name in unique(fakes) if name not in seen]).items():
        cells.setdefault(method, {})[seed] = own
    return cells


def crossed_gap(first: Mapping[int, NDArray[np.float64]], second: Mapping[int, NDArray[np.float64]]) -> Crossed:
    """A method minus another, both of `unseen_cells`, as a fraction: seeds, generators and test images as random."""
    gaps = [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]
    return crossed_interval(np.moveaxis(np.array(gaps), -1, 0))


def read_condition(root: Path, name: str) -> Condition:
    """The results of one profile; raises UserError as `read_tables` does."""
    tables = read_tables(root, name)
    detection = tables["detection"]
    native = headline(detection)
    cells = {
        str(method): rows.pivot(index="seed", columns="generator", values="balanced_acc")
        for method, rows in native[~native["seen"]].groupby("method", sort=False)
    }
    values = per_seed_values(detection, tables["forgetting"])
    labels = {key: label_of(key, tables["forgetting"]).removeprefix("balanced acc., ") for key in SHOWN}
    return Condition(name, float(native["rho"].iloc[0]), str(detection["data_hash"].iloc[0]), values, cells, labels)


def comparison_table(conditions: Sequence[Condition]) -> pd.DataFrame:
    """Every method, condition and measure: mean and 95 % interval over seeds, and the difference to lora and dgs.

    Columns condition, rho, method, metric, n_seeds, mean, low, high (fractions), then for versus in lora, dgs:
    minus_<versus>, minus_<versus>_low, minus_<versus>_high (points, Student's t, paired by seed); for
    balanced_acc_unseen also iqm, and minus_<versus>_boot_low, _boot_high (stratified bootstrap of seeds within
    generators).
    """
    rows: list[dict[str, Any]] = []
    for condition in conditions:
        for method, metric in product(condition.methods, SHOWN):
            values = condition.of(method, metric)
            if values.empty:
                continue
            others = [other for other in (BASELINE, PAPERS) if other in condition.methods and other != method]
            row: dict[str, Any] = {
                "condition": condition.name, "rho": condition.rho, "method": method, "metric": metric,
                "n_seeds": len(values), **seed_interval(values.to_numpy())._asdict(),
            }  # fmt: skip
            for other in others:
                gap = condition.gap(method, other, metric)
                row |= {f"minus_{other}": gap.mean, f"minus_{other}_low": gap.low, f"minus_{other}_high": gap.high}
            if metric == UNSEEN:
                row["iqm"] = iqm(condition.cells[method].to_numpy())
                for other in others:
                    boot = stratified_bootstrap(condition.cell_gaps(method, other).to_numpy())
                    row |= {f"minus_{other}_boot_low": boot.low, f"minus_{other}_boot_high": boot.high}
            rows.append(row)
    return pd.DataFrame(rows)


def best_rival(condition: Condition) -> str:
    """The best method on unseen generators that is neither the subject nor a part of it."""
    rivals = [name for name in condition.methods if name not in (SUBJECT, *PARTS)]
    return max(rivals, key=lambda name: condition.of(name).mean())


def agreement(first: Condition, second: Condition) -> float:
    """Kendall's tau between two conditions of the order of methods by mean balanced accuracy on unseen generators."""
    shared = [name for name in first.methods if name in second.methods]
    means = [[condition.of(name).mean() for name in shared] for condition in (first, second)]
    return float(kendalltau(*means).statistic)


def _ranking(condition: Condition) -> str:
    rows = []
    for name in sorted(condition.methods, key=lambda name: -condition.of(name).mean()):
        unseen, *others = (plus_minus(condition.of(name, metric)) for metric in SHOWN)
        middle = percent_text(iqm(condition.cells[name].to_numpy()))
        gaps = [interval_text(condition.gap(name, other)) if name != other else "–" for other in (BASELINE, PAPERS)]
        rows.append([f"`{name}`", unseen, middle, *others, *gaps])
    unseen, *others = condition.labels.values()
    return markdown_table(["method", unseen, "IQM", *others, f"minus `{BASELINE}`", f"minus `{PAPERS}`"], rows)


def _goals(conditions: Sequence[Condition]) -> str:
    rows = []
    for condition in conditions:
        goal, rival = GOALS.get(condition.rho), best_rival(condition)
        gaps = {other: condition.gap(SUBJECT, other) for other in dict.fromkeys((BASELINE, PAPERS, rival))}
        measured = [condition.of(SUBJECT, metric) for metric in ABILITIES]
        kept = min((values.mean() for values in measured if not values.empty), default=None)
        note = AGAINST_ALIGNED if condition.labels[ABILITIES[0]].endswith(AGAINST_ALIGNED) else ""
        wanted = "–" if goal is None else rounded_text(goal, sign=True)
        reached = goal is not None and min(gaps[other].mean for other in (BASELINE, PAPERS)) >= goal
        rows.append(
            [
                f"`{condition.name}`", wanted, interval_text(gaps[BASELINE]), interval_text(gaps[PAPERS]),
                "yes" if reached else "no",
                f"`{rival}`", interval_text(gaps[rival]), "yes" if gaps[rival].low > 0 else "no",
                *(("–", "–") if kept is None else (percent_text(kept) + note, "yes" if kept >= KEPT else "no")),
            ]
        )  # fmt: skip
    header = [
        "condition", "asked", f"minus `{BASELINE}`", f"minus `{PAPERS}`", "reached", "best rival", "minus it",
        "shown above it, over seeds", "least kept (%)", f"≥ {100 * KEPT:.0f}",
    ]  # fmt: skip
    return markdown_table(header, rows)


def _orders(conditions: Sequence[Condition]) -> str:
    rows = [[f"`{one.name}`", *(rounded_text(agreement(one, other), 2) for other in conditions)] for one in conditions]
    return markdown_table(["", *(f"`{condition.name}`" for condition in conditions)], rows)


def study_report(conditions: Sequence[Condition], tuning: pd.DataFrame | None = None, drawn: bool = False) -> str:
    """The study's REPORT.md.

    Args:
        tuning: the table of `dgs tune` that the settings were chosen from.
        drawn: whether differences.png lies beside it.

    Raises:
        UserError: a condition without lora or dgs.
    """
    for condition in conditions:
        if missing := {BASELINE, PAPERS} - set(condition.methods):
            raise UserError(f"Expected {', '.join(sorted(missing))} among the methods of {condition.name}. Train them.")
    chosen = {} if tuning is None else choices(tuning)
    asked = [condition for condition in conditions if SUBJECT in condition.methods]
    return render(
        "study.md.j2",
        subject=SUBJECT,
        drawn=drawn,
        goals=asked and _goals(asked),
        orders=_orders(conditions),
        rankings=[(condition, _ranking(condition)) for condition in conditions],
        rules=RULES,
        settings=chosen
        and markdown_table(
            ["method", *(f"`{rule}`" for rule in RULES)], [[f"`{name}`", *told] for name, told in chosen.items()]
        ),
    )


def finished_conditions(root: Path) -> list[str]:
    """The conditions study-* that have results: those with most methods first, then by the strength of their shortcut.

    Raises:
        UserError: there is none.
    """
    names = {path.parent.name for path in root.glob("results/study-*/metrics.json")}
    names |= {name for name in _stored(root).get("detection", {"profile": ()})["profile"] if name.startswith("study-")}
    if not names:
        raise UserError("Expected results of a profile study-*, found none. Run make study, or name profiles.")
    rows = {name: read_tables(root, name)["detection"] for name in names}
    return sorted(names, key=lambda name: (-rows[name]["method"].nunique(), -rows[name]["rho"].iloc[0], name))


def write_study(root: Path, names: Sequence[str], folder: Path) -> Path:
    """`folder` with what the results of the profiles `names` say: table.csv and REPORT.md; returns the last.

    Also differences.csv (`differences.COLUMNS` behind the condition) and differences.png, of those that have scores.
    Settings are read from results/mini/tuning.csv, where there is one.
    """
    from dgs.analysis.figures.detection import condition_forest  # drawing libraries take seconds to load
    from dgs.analysis.figures.style import save

    conditions = [read_condition(root, name) for name in names]
    search = root / "results" / MAIN / "tuning.csv"
    compared = differences_of(root, names)
    report = study_report(conditions, read_table(search) if search.exists() else None, bool(compared))
    folder.mkdir(parents=True, exist_ok=True)
    comparison_table(conditions).round(6).to_csv(folder / "table.csv", index=False)
    if compared:
        whole = pd.concat(compared, names=["condition", None]).reset_index("condition")
        whole.to_csv(folder / "differences.csv", index=False)
        save(condition_forest(compared), folder / "differences.png")
    (folder / "REPORT.md").write_text(report, encoding="utf-8")
    return folder / "REPORT.md"


def write_params(root: Path, names: Sequence[str], folder: Path) -> Path:
    """`folder`/params.yaml: each profile's parameters, as they stand now, with the methods it has results of."""
    content = {name: load_params(name, root).model_dump(mode="json") for name in names}
    for name, params in content.items():
        params["methods"] = unique(read_tables(root, name)["detection"]["method"])
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "params.yaml"
