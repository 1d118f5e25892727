"""The study: methods under several conditions, compared in pairs; read from the tables of its profiles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import kendalltau

from dgs.analysis.metrics import headline, in_order, per_seed_values, read_detection
from dgs.analysis.report import markdown_table
from dgs.analysis.tuning import RULES, choices
from dgs.errors import UserError
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
from dgs.workspace import MAIN

SUBJECT, BASELINE, PAPERS = "dgs_plus", "lora", "dgs"
PARTS = ("poe_swad",)  # of the subject, so no rivals of it
GOALS = {0.9: 15.0, 0.75: 6.6, 0.5: 0.0}  # points above lora on unseen generators that were asked of the subject
KEPT = 0.95  # share of the frozen tower's abilities that was asked of it
SHOWN = {
    "balanced_acc_unseen": "unseen",
    "worst_generator_balanced_acc": "worst generator",
    "balanced_acc_seen": "seen",
    "ap_unseen": "AP, unseen",
    "zero_shot_kept": "zero-shot kept",
    "retrieval_kept": "retrieval kept",
}


@dataclass(frozen=True)
class Condition:
    """One profile's results.

    values: columns method, seed, metric, value, as `metrics.per_seed_values` gives them.
    cells: {method: (seeds, generators) balanced accuracy on unseen generators}, the seeds in order.
    left_out: parts of it that have other data.
    """

    name: str
    rho: float
    data_hash: str
    values: pd.DataFrame
    cells: Mapping[str, np.ndarray]
    left_out: Sequence[str] = ()

    def of(self, method: str, metric: str) -> pd.Series:
        """Values by seed."""
        rows = self.values[(self.values["method"] == method) & (self.values["metric"] == metric)]
        return rows.set_index("seed")["value"].sort_index()

    def gap(self, method: str, other: str, metric: str = "balanced_acc_unseen") -> Interval:
        """`method` minus `other` in points, paired by seed."""
        both = pd.concat([self.of(method, metric), self.of(other, metric)], axis=1, join="inner")
        return paired_difference(*(100 * both.to_numpy(dtype=float).T))

    @property
    def methods(self) -> list[str]:
        return in_order(self.values["method"])


def _data_hash(root: Path, profile: str) -> str:
    file = root / "results" / profile / "metrics.json"
    if not file.exists():
        raise UserError(f"Expected results of the profile {profile}, found none. Run make repro PROFILE={profile}.")
    return json.loads(file.read_text(encoding="utf-8"))["data_hash"]


def parts_of(root: Path, name: str) -> tuple[list[str], list[str]]:
    """The profiles with results that make up a condition, and those that cannot be read as one with them.

    Returns:
        `name` and, for its other methods, `name`-part2 and so on; those of them that have other data.
    """
    more = sorted(path.parent.name for path in root.glob(f"results/{name}-part*/metrics.json"))
    others = [part for part in more if _data_hash(root, part) != _data_hash(root, name)]
    return [name, *(part for part in more if part not in others)], others


def read_condition(root: Path, name: str) -> Condition:
    """The tables of results/<name>/ and of its further parts on the same data (`parts_of`), as one.

    Raises:
        UserError: they are not there, or parts have the same methods.
    """
    data_hash = _data_hash(root, name)
    parts, others = parts_of(root, name)
    folders = [root / "results" / part for part in parts]
    detections = [read_detection(folder / "detection.csv") for folder in folders]
    forgettings = [pd.read_csv(folder / "forgetting.csv") for folder in folders]
    methods = pd.concat([rows["method"].drop_duplicates() for rows in detections])
    if methods.duplicated().any():
        twice = ", ".join(methods[methods.duplicated()].unique())
        raise UserError(f"Expected each method in one part of {name}, found {twice} in several. Leave it in one.")
    detection, forgetting = pd.concat(detections), pd.concat(forgettings)
    native = headline(detection)
    unseen = native[~native["seen"]]
    cells = {
        str(method): rows.pivot_table(index="seed", columns="generator", values="balanced_acc").to_numpy()
        for method, rows in unseen.groupby("method", sort=False)
    }
    values = per_seed_values(detection, forgetting)
    return Condition(name, float(native["rho"].iloc[0]), data_hash, values, cells, others)


def comparison_table(conditions: Sequence[Condition]) -> pd.DataFrame:
    """Every method, condition and measure: mean and 95 % interval over seeds, and the difference to lora and dgs.

    Columns condition, rho, method, metric, n_seeds, mean, low, high (fractions), then for versus in lora, dgs:
    minus_<versus>, minus_<versus>_low, minus_<versus>_high (points, Student's t, paired by seed); for
    balanced_acc_unseen also iqm, and minus_<versus>_boot_low, _boot_high (stratified bootstrap of seeds within
    generators).
    """
    rows: list[dict[str, Any]] = []
    for condition in conditions:
        for method in condition.methods:
            for metric in SHOWN:
                values = condition.of(method, metric)
                if values.empty:
                    continue
                row: dict[str, Any] = {
                    "condition": condition.name, "rho": condition.rho, "method": method, "metric": metric,
                    "n_seeds": len(values), **seed_interval(values.to_numpy())._asdict(),
                }  # fmt: skip
                for other in (BASELINE, PAPERS):
                    if other in condition.methods and other != method:
                        gap = condition.gap(method, other, metric)
                        row |= {
                            f"minus_{other}": gap.mean,
                            f"minus_{other}_low": gap.low,
                            f"minus_{other}_high": gap.high,
                        }
                if metric == "balanced_acc_unseen":
                    row["iqm"] = iqm(condition.cells[method])
                    for other in (BASELINE, PAPERS):
                        if other in condition.methods and other != method:
                            apart = 100 * (condition.cells[method] - condition.cells[other])
                            boot = stratified_bootstrap(apart)
                            row |= {f"minus_{other}_boot_low": boot.low, f"minus_{other}_boot_high": boot.high}
                rows.append(row)
    return pd.DataFrame(rows)


def best_rival(condition: Condition) -> str:
    """The best method on unseen generators that is neither the subject nor a part of it."""
    rivals = [name for name in condition.methods if name not in (SUBJECT, *PARTS)]
    return max(rivals, key=lambda name: condition.of(name, "balanced_acc_unseen").mean())


def agreement(first: Condition, second: Condition) -> float:
    """Kendall's tau between two conditions of the order of methods by mean balanced accuracy on unseen generators."""
    shared = [name for name in first.methods if name in second.methods]
    means = [[c.of(name, "balanced_acc_unseen").mean() for name in shared] for c in (first, second)]
    return float(kendalltau(*means).statistic)


def _ranking(condition: Condition) -> str:
    order = sorted(condition.methods, key=lambda name: -condition.of(name, "balanced_acc_unseen").mean())
    rows = []
    for name in order:
        cells = [f"`{name}`"]
        for metric in SHOWN:
            values = condition.of(name, metric)
            interval = seed_interval(values.to_numpy()) if not values.empty else None
            half = f" ±{percent_text(interval.high - interval.mean)}" if interval and interval.known else ""
            cells.append(f"{percent_text(interval.mean)}{half}" if interval else "–")
        cells.insert(2, percent_text(iqm(condition.cells[name])))
        cells += [interval_text(condition.gap(name, other)) if name != other else "–" for other in (BASELINE, PAPERS)]
        rows.append(cells)
    header = ["method", "unseen", "IQM", *list(SHOWN.values())[1:], f"minus `{BASELINE}`", f"minus `{PAPERS}`"]
    return markdown_table(header, rows)


def _goals(conditions: Sequence[Condition]) -> str:
    rows = []
    for condition in conditions:
        goal, rival = GOALS.get(condition.rho), best_rival(condition)
        gaps = {other: condition.gap(SUBJECT, other) for other in dict.fromkeys((BASELINE, PAPERS, rival))}
        measured = [condition.of(SUBJECT, metric) for metric in ("zero_shot_kept", "retrieval_kept")]
        kept = min((values.mean() for values in measured if not values.empty), default=None)
        wanted = "–" if goal is None else rounded_text(goal, sign=True)
        reached = goal is not None and min(gaps[other].mean for other in (BASELINE, PAPERS)) >= goal
        rows.append(
            [
                f"`{condition.name}`", wanted, interval_text(gaps[BASELINE]), interval_text(gaps[PAPERS]),
                "yes" if reached else "no",
                f"`{rival}`", interval_text(gaps[rival]), "yes" if gaps[rival].low > 0 else "no",
                *(("–", "–") if kept is None else (percent_text(kept), "yes" if kept >= KEPT else "no")),
            ]
        )  # fmt: skip
    header = [
        "condition", "asked", f"minus `{BASELINE}`", f"minus `{PAPERS}`", "reached", "best rival", "minus it",
        "shown above it", "least kept (%)", f"≥ {100 * KEPT:.0f}",
    ]  # fmt: skip
    return markdown_table(header, rows)


def _orders(conditions: Sequence[Condition]) -> str:
    rows = [[f"`{one.name}`", *(rounded_text(agreement(one, other), 2) for other in conditions)] for one in conditions]
    return markdown_table(["", *(f"`{condition.name}`" for condition in conditions)], rows)


def _settings(tuning: pd.DataFrame) -> str:
    rows = [[f"`{name}`", *by_rule] for name, by_rule in choices(tuning).items()]
    return markdown_table(["method", *(f"`{rule}`" for rule in RULES)], rows)


def study_report(conditions: Sequence[Condition], tuning: pd.DataFrame | None = None) -> str:
    """The study's REPORT.md; `tuning`: the table of `dgs tune` that the settings were chosen from.

    Raises:
        UserError: a condition without lora, dgs or dgs_plus.
    """
    for condition in conditions:
        if missing := {SUBJECT, BASELINE, PAPERS} - set(condition.methods):
            raise UserError(f"Expected {', '.join(sorted(missing))} among the methods of {condition.name}. Train them.")
    parts = [
        "# Study",
        "Balanced accuracy and abilities kept in per cent, differences in points; mean over seeds with 95 % intervals "
        "(Student's t, paired by seed for differences). IQM: interquartile mean over seeds and unseen generators. "
        "Bootstrap intervals stand in table.csv.",
        f"## What was asked of `{SUBJECT}`",
        "Points above `lora` and `dgs` on unseen generators, and against the best method that is no part of it; that "
        "rival is picked on these same test images, which flatters it.",
        _goals(conditions),
        "## Does the order of methods carry over?",
        "Kendall's tau of the order on unseen generators (1 the same, 0 unrelated, −1 reversed).",
        _orders(conditions),
    ]
    for condition in conditions:
        facts = f"Data hash `{condition.data_hash[:12]}`"
        if not math.isnan(condition.rho):
            facts += f", rho {condition.rho:g}"
        if condition.left_out:
            facts += f". Left out, since of other data: {', '.join(condition.left_out)}"
        parts += [f"## {condition.name}", f"{facts}.", _ranking(condition)]
    if tuning is not None:
        parts += [
            "## Settings",
            "What each rule chooses of the six candidates a method has, and the balanced accuracy (%) it chose by: "
            + "; ".join(f"`{rule}`, {about}" for rule, about in RULES.items())
            + ". Methods that are not listed take those of another.",
            _settings(tuning),
        ]
    return "\n\n".join(parts) + "\n"


def finished_conditions(root: Path) -> list[str]:
    """The conditions study-* that have results: those with most methods first, then by the strength of their shortcut.

    Raises:
        UserError: there is none.
    """
    names = [path.parent.name for path in root.glob("results/study-*/metrics.json") if "-part" not in path.parent.name]
    if not names:
        raise UserError("Expected results of a profile study-*, found none. Run make study, or name profiles.")
    conditions = [read_condition(root, name) for name in names]
    return [c.name for c in sorted(conditions, key=lambda c: (-len(c.methods), -c.rho, c.name))]


def write_study(root: Path, names: Sequence[str], folder: Path) -> Path:
    """`folder` with what the results of the profiles `names` say: table.csv and REPORT.md; returns the report.

    Settings are read from results/mini/tuning.csv, where there is one.
    """
    conditions = [read_condition(root, name) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    comparison_table(conditions).round(6).to_csv(folder / "table.csv", index=False)
    search = root / "results" / MAIN / "tuning.csv"
    tuning = pd.read_csv(search) if search.exists() else None
    (folder / "REPORT.md").write_text(study_report(conditions, tuning), encoding="utf-8")
    return folder / "REPORT.md"


def write_params(root: Path, names: Sequence[str], folder: Path) -> Path:
    """`folder`/params.yaml: each profile's parameters, as they stand now, with the methods it has results of."""
    parts = [part for name in names for part in parts_of(root, name)[0]]
    content = {part: load_params(part, root).model_dump(mode="json") for part in parts}
    for part, params in content.items():
        metrics = root / "results" / part / "metrics.json"
        if metrics.is_file():  # a broken-off run has some of them
            params["methods"] = list(json.loads(metrics.read_text(encoding="utf-8"))["methods"])
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "params.yaml"
