"""What changed test images say of a detector: does it lose its evidence, or read the change itself?

A change to both labels that lowers AUROC has destroyed evidence: the detector is fragile. A change that moves all
scores one way, real and fake alike, leaves AUROC as it was where both are changed, and moves it where one is: the
detector reads the change. If real and fake images differ in it, as in file format, that is a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dgs.analysis.metrics import unique
from dgs.conditions import NATIVE, PNG, Condition, parse_condition
from dgs.stats import Interval, seed_interval

MATERIAL = 0.01  # smaller changes are no reading, however sure
MEASURES = ("accuracy", "ranking", "shift")


def conditions_of(detection: pd.DataFrame) -> list[Condition]:
    """Conditions of a detection table other than native, kind by kind in order of appearance, mild ones first."""
    found = [parse_condition(name) for name in unique(detection["condition"]) if name != NATIVE]
    kinds = unique(condition.kind for condition in found)
    return sorted(found, key=lambda condition: (kinds.index(condition.kind), condition.severity))


def means_over_generators(detection: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Rates at threshold 0.5 of each run, condition and label it is applied to, and over which generators.

    Returns:
        columns method, seed, condition, applied_to, balanced_acc, r_acc, f_acc, auroc: plain means over the unseen
        generators, where there are any; and "unseen" or "seen".
    """
    rows = detection[detection["threshold_rule"].astype(str) == "0.5"]
    unseen = bool((~rows["seen"]).any())
    rows = rows[rows["seen"] != unseen]
    keys, rates = ["method", "seed", "condition", "applied_to"], ["balanced_acc", "r_acc", "f_acc", "auroc"]
    return rows.groupby(keys, sort=False)[rates].mean().reset_index(), "unseen" if unseen else "seen"


def changes(means: pd.DataFrame) -> pd.DataFrame:
    """What each condition did to each run: columns method, seed, condition, measure, value (fractions).

    accuracy: balanced accuracy at 0.5 with both labels changed, minus native. ranking: the same of AUROC; below 0 the
    detector is fragile. shift: half of (AUROC with reals alone changed - AUROC with fakes alone changed), above 0 where
    changed images look real to the detector, below 0 where they look fake. Measures without rows are left out.

    `means`: as `means_over_generators` gives them.
    """
    run, auroc = ["method", "seed"], ["method", "seed", "condition", "auroc"]
    changed = means[means["condition"] != NATIVE]
    native = means.loc[means["condition"] == NATIVE, [*run, "balanced_acc", "auroc"]]
    both = changed[changed["applied_to"] == "both"].merge(native, on=run, suffixes=("", "_native"))
    fake, real = (changed.loc[changed["applied_to"] == label, auroc] for label in ("fake", "real"))
    alone = fake.merge(real, on=[*run, "condition"], suffixes=("_fake", "_real"))
    table = both.merge(alone, on=[*run, "condition"], how="left")
    table["accuracy"] = table["balanced_acc"] - table["balanced_acc_native"]
    table["ranking"] = table["auroc"] - table["auroc_native"]
    table["shift"] = (table["auroc_real"] - table["auroc_fake"]) / 2
    return table.melt([*run, "condition"], list(MEASURES), "measure", "value").dropna(subset="value")


def change(table: pd.DataFrame, method: str, condition: str, measure: str) -> Interval | None:
    """One cell of `changes`: mean over seeds with its interval; None where it was not measured."""
    values = table.loc[
        (table["method"] == method) & (table["condition"] == condition) & (table["measure"] == measure), "value"
    ]
    return None if values.empty else seed_interval(values.to_numpy())


def _shown(interval: Interval | None) -> float:
    """The mean, or 0 where it is less than `MATERIAL` or its interval spans zero (one seed has none)."""
    if interval is None or abs(interval.mean) < MATERIAL or (interval.known and interval.spans_zero):
        return 0.0
    return interval.mean


def readings(table: pd.DataFrame, method: str, conditions: Sequence[Condition]) -> dict[str, list[str]]:
    """Which conditions show what of a method: {"fragile", "looks real", "looks fake", "none shown": [condition]}.

    A condition may be both fragile and shifted. Shown is what exceeds 1 point and whose interval excludes zero.
    """
    found: dict[str, list[str]] = {"fragile": [], "looks real": [], "looks fake": [], "none shown": []}
    for condition in conditions:
        ranking, moved = (change(table, method, condition.name, measure) for measure in ("ranking", "shift"))
        if ranking is None:
            continue
        lost, shift = _shown(ranking), _shown(moved)
        if lost < 0:
            found["fragile"].append(condition.name)
        if shift:
            found["looks real" if shift > 0 else "looks fake"].append(condition.name)
        if lost >= 0 and not shift:
            found["none shown"].append(condition.name)
    return found


TIERS = {
    "clean": "as it is, or stored without loss",
    "web": "JPEG of quality 75 and above, scaled to no less than half its size and back",
    "hard": "stronger than web; blur, noise, crops",
}
HARSHEST_OF_WEB = {"jpeg": 75.0, "resize": 0.5}


def tier(condition: str) -> str:
    """Of `TIERS`, that of a condition by its name."""
    if condition in (NATIVE, PNG):
        return "clean"
    parsed = parse_condition(condition)
    return "web" if parsed.strength >= HARSHEST_OF_WEB.get(parsed.kind, float("inf")) else "hard"


def format_conditions(conditions: Sequence[Condition]) -> dict[str, tuple[str, str]]:
    """Conditions of the file format by their usual names: {name: (condition, applied_to)}.

    Re-encoding is the mildest JPEG among `conditions`, one quality for all. Native and, where it was run, all PNG.
    """
    rows = {"native": (NATIVE, "both")}
    if jpegs := [condition for condition in conditions if condition.kind == "jpeg"]:
        mildest = min(jpegs, key=lambda condition: condition.severity).name
        rows |= {f"{label}s re-encoded ({mildest})": (mildest, label) for label in ("fake", "real")}
        rows[f"all re-encoded ({mildest})"] = (mildest, "both")
    if any(condition.kind == "png" for condition in conditions):
        rows["all PNG"] = ("png", "both")
    return rows if len(rows) > 1 else {}
