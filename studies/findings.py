"""The tables of docs/findings.md, docs/study.md and docs/tables.md, drawn from the results; `dgs study` renews them.

Differences are paired by seed; those of `drawn_gap` have seeds, generators and images as random.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dgs.analysis.figures.style import save
from dgs.analysis.metrics import unique
from dgs.analysis.study import (
    UNSEEN,
    Condition,
    crossed_gap,
    finished_conditions,
    keep_runs,
    read_condition,
    read_scores_of,
    read_tables,
    unseen_cells,
    write_params,
    write_study,
)
from dgs.model.methods.registry import METHODS
from dgs.params import load_params
from dgs.stats import Interval, paired_difference, seed_interval
from dgs.tables import read_table
from dgs.workspace import MAIN, find_root
from studies.content_strength import OUT, SIDES, WAYS
from studies.figures import regime_map
from studies.sweep_tables import sweep_tables
from studies.tables import Cell, Table, current, number, told

DOCUMENTS = ("docs/findings.md", "docs/study.md", "docs/tables.md")
PRECISION, WORST, SEEN = "ap_unseen", "worst_generator_balanced_acc", "balanced_acc_seen"
ZERO_SHOT, PROBED = "zero_shot_kept", "linear_probe_kept"
SETS = {"mini": "`mini`", "second-study": "second study", "third-90": "`third-90`",
        "third-networks": "`third-networks`", "first-study": "first study"}  # fmt: skip
DRAWN = {"mini": "`mini`", "study-90": "rho 0.9", "study-50": "rho 0.5", "study-object": "rho 0.9, by the object"}
PAIRS = (
    ("lora", "probe"), ("dgs", "lora"), ("poe_distillation", "lora"), ("content_poe_distillation", "lora"),
    ("content_poe_distillation", "poe_distillation"), ("pixel_cnn", "lora"), ("pixel_cnn", "content_poe_distillation"),
    ("late_fusion", "lora"), ("late_fusion", "content_poe_distillation"), ("late_fusion", "pixel_cnn"),
)  # fmt: skip
PLAIN = {"lora": "LoRA", "dgs": "DGS", "probe": "probe"}  # names of methods in running text
EXPERT = {name for name, method in METHODS.items() if method.expert}
SURGERY = {name for name, method in METHODS.items() if method.reference.startswith("Control of dgs")} | {
    "dgs", "suppression_only", "alignment_only", "per_sample", "paper_order",
}  # fmt: skip
GROUPS = {
    "all": set(METHODS),
    "without an expert": set(METHODS) - EXPERT,
    "without an expert or parts of DGS": set(METHODS) - EXPERT - SURGERY,
    "with an expert": EXPERT,
}


_condition = cache(read_condition)


def condition(name: str) -> Condition:
    """A profile's results, or an earlier study's."""
    return _condition(find_root(), name)


def gap(name: str, methods: str | tuple[str, str], other: str = "", metric: str = UNSEEN) -> str:
    """A method minus another, one or both named by `methods`: points, whole ones of abilities kept.

    Its own value where no other is named, nothing for a method minus itself, "not run" where one is missing.
    """
    method, other = (methods, other) if isinstance(methods, str) else methods
    if method == other or not other:
        return "" if other else mean(name, metric, method)
    if not {method, other} <= set(condition(name).methods):
        return "not run"
    return told(condition(name).gap(method, other, metric), 0 if metric == ZERO_SHOT else 1)


def mean(name: str, metric: str, method: str, digits: int = 1) -> str:
    """Per cent; a dash where a method has no such measure."""
    values = condition(name).of(method, metric).to_numpy()
    return told(seed_interval(100 * values), digits, sign=False) if len(values) else "–"


def change(name: str, other: str, method: str) -> str:
    """`method` under one condition minus itself under another: balanced accuracy, points, paired by seed."""
    both = pd.concat([condition(each).of(method) for each in (name, other)], axis=1, join="inner")
    return told(paired_difference(*(100 * both.to_numpy(dtype=float).T)))


def means(name: str, metric: str = UNSEEN) -> pd.Series:
    """Of each method, over seeds."""
    return condition(name).values.query("metric == @metric").groupby("method")["value"].mean()


def rank_correlation(first: pd.Series, second: pd.Series, group: str) -> str:
    """Spearman's over methods, with its p value and their number."""
    both = pd.concat([first, second], axis=1, join="inner")
    both = both[both.index.isin(GROUPS[group])]
    found = spearmanr(both.iloc[:, 0], both.iloc[:, 1])
    p = f"p {found.pvalue:.2f}" if found.pvalue >= 0.005 else "p < 0.005"
    return f"{found.statistic:.2f} ({p}, n {len(both)})"


def kept_and_detected(name: str, metric: str, group: str) -> str:
    """What methods keep against what they detect."""
    return rank_correlation(means(name, metric), means(name), group)


def validated(group: str, row: tuple[str, str]) -> str:
    """By a rule, all settings tried against those without the shortcut, or each method's best against a study."""
    rule, study = row
    tried = read_table(find_root() / "results/mini/tuning.csv").set_index("method")
    if study:
        return rank_correlation(tried.groupby("method")[rule].max(), means(study), group)
    part = tried[tried.index.isin(GROUPS[group])]
    return f"{spearmanr(part[rule], part['val_unbiased']).statistic:.2f} (n {len(part)})"


@cache
def _cells(name: str, rate: str) -> dict[str, dict[int, NDArray[np.float64]]]:
    """`unseen_cells` of a profile; none where it has no scores."""
    root = find_root()
    scores = read_scores_of(root, name)
    if scores is None:
        return {}
    detection = read_tables(root, name)["detection"]
    needed = scores[scores["method"].isin({method for pair in PAIRS for method in pair})]
    return unseen_cells(needed, unique(detection.loc[detection["seen"], "generator"]), rate)


def drawn_gap(name: str, row: tuple[tuple[str, str], str]) -> str:
    """A method minus another on unseen generators, points [95 %, seeds, generators and images as random]; "not run".

    `row`: a pair of `PAIRS`, and a rate of `crossed.RATES`.
    """
    pair, rate = row
    cells = _cells(name, rate)
    if not set(pair) <= set(cells):
        return "not run"
    interval = crossed_gap(*(cells[method] for method in pair)).interval
    return told(Interval(*(100 * end for end in interval)))


def strength(row: tuple[str, float], rho: float | None = None) -> str:
    """Accuracy of a content expert by way, side and strength of the shortcut (per cent); its rise from 0.5 to 0.9."""
    table = read_table(find_root() / OUT).astype({"rho": float, "side": float})
    of = table.set_index(["rho", "way", "side"])["accuracy"]
    return number(100 * (of[0.9, *row] - of[0.5, *row] if rho is None else of[rho, *row]))


def labelled(*methods: str) -> dict[str, str]:
    """{label: method}, in code type but for those of running text."""
    return {PLAIN.get(method, f"`{method}`"): method for method in methods}


def against(name: str, other: str) -> dict[str, Cell]:
    """Columns of methods minus `other` under one condition."""
    metrics = {"balanced accuracy": UNSEEN, "AP": PRECISION, "zero-shot kept": ZERO_SHOT}
    return {label: partial(gap, name, other=other, metric=metric) for label, metric in metrics.items()}


def over_sets(method: str, other: str) -> dict[str, Cell]:
    """Columns of metrics, `method` minus `other`, under each condition of `SETS`."""
    return {label: partial(gap, name, method, other) for name, label in SETS.items()}


def minus_lora(name: str, methods: str) -> Table:
    """Methods minus LoRA under one condition."""
    return "minus LoRA, unseen", labelled(*methods.split()), against(name, "lora")


TABLES: dict[str, Table] = {
    "headline": (
        "method",
        {f"`{name}`": name for name in load_params(MAIN).methods},
        {
            "balanced acc., seen": partial(mean, "mini", SEEN),
            "balanced acc., unseen": partial(mean, "mini", UNSEEN),
            "AP, unseen": partial(mean, "mini", PRECISION),
            "zero-shot kept": partial(mean, "mini", ZERO_SHOT),
        },
    ),
    "lora-minus-probe": (
        "LoRA minus probe, unseen",
        {"balanced accuracy": UNSEEN, "average precision": PRECISION, "worst generator": WORST},
        over_sets("lora", "probe"),
    ),
    "dgs-minus-lora": (
        "DGS minus LoRA, unseen",
        {"balanced accuracy": UNSEEN, "average precision": PRECISION, "zero-shot kept": ZERO_SHOT},
        over_sets("dgs", "lora"),
    ),
    "controls": (
        "control minus `dgs`",
        {
            "`random_direction`: a random one, equally long, for the harmful one": "random_direction",
            "`shuffled_captions`: captions of other images": "shuffled_captions",
            "`signed`: the whole text gradient for its non-negative half": "signed",
            "`random_alignment`: alignment with random signs": "random_alignment",
            "`alignment_only`": "alignment_only",
            "`suppression_only`": "suppression_only",
            "`paper_order`: suppress, then align": "paper_order",
            "`per_sample`: without the release's 1/B": "per_sample",
        },
        against("third-90", "dgs") | {"balanced accuracy, rho 0.75": partial(gap, "third-75", other="dgs")},
    ),
    "parts": (
        "",
        {
            f"{what} (`{pair[0]}` minus `{pair[1]}`)": pair
            for what, pair in {
                "the expert alone, tower frozen": ("poe_probe", "lora"),
                "adapters that are held, besides": ("poe_distillation", "poe_probe"),
                "the probe's head and averaging, besides": ("dgs_plus", "poe_distillation"),
                "holding the output": ("dgs_plus", "poe_swad"),
                "distillation without an expert": ("distillation", "lora"),
            }.items()
        },
        {"balanced accuracy": partial(gap, "third-90"), "AP": partial(gap, "third-90", metric=PRECISION)},
    ),
    "neighbours": (
        "unseen",
        {"`null_space` (frozen tower)": "null_space"}
        | labelled("wise_ft", "pcgrad", "l2_sp", "swad", "effort", "prograd", "lp_ft"),
        {
            "minus probe": partial(gap, "third-90", other="probe"),
            "minus LoRA": partial(gap, "third-90", other="lora"),
            "AP minus LoRA": partial(gap, "third-90", other="lora", metric=PRECISION),
            "zero-shot kept, minus LoRA": partial(gap, "third-90", other="lora", metric=ZERO_SHOT),
            "minus LoRA, rho 0.75": partial(gap, "third-75", other="lora"),
        },
    ),
    "kept-and-detected": (
        "methods",
        {group: group for group in GROUPS},
        {
            f"`{name}`, {label}": partial(kept_and_detected, name, metric)
            for name in ("third-90", "third-75")
            for label, metric in (("zero-shot kept", ZERO_SHOT), ("linear probe kept", PROBED))
        },
    ),
    "milder": minus_lora(
        "third-75",
        "levels_poe poe_distillation weighed_lora product_of_experts poe_swad dgs_plus levels_poe_probe poe_probe "
        "weighed_probe paper_order random_direction dgs levels_probe suppression_only probe leace distillation "
        "per_sample",
    ),
    "no-shortcut": minus_lora(
        "third-50",
        "dgs poe_distillation product_of_experts dgs_plus suppression_only leace poe_probe probe distillation",
    ),
    "other-shortcut": minus_lora(
        "third-object",
        "product_of_experts poe_distillation dgs_plus poe_probe dgs suppression_only leace probe distillation",
    ),
    "other-rules": (
        "unseen",
        {
            "probe": "probe",
            "LoRA minus probe": ("lora", "probe"),
            "DGS minus probe": ("dgs", "probe"),
            "DGS minus LoRA": ("dgs", "lora"),
            "`dgs_plus` minus LoRA": ("dgs_plus", "lora"),
            "`dgs_plus` minus `poe_distillation`": ("dgs_plus", "poe_distillation"),
        },
        {
            "weighed validation (`third-90`)": partial(gap, "third-90"),
            "with the shortcut (`third-90-val`)": partial(gap, "third-90-val"),
            "without it (`third-90-unbiased`)": partial(gap, "third-90-unbiased"),
        },
    ),
    "patches": (
        "unseen",
        labelled("dgs_plus", "distillation", "lora", "dgs", "probe"),
        {
            "balanced accuracy": partial(mean, "third-patches", UNSEEN),
            "against whole images": partial(change, "third-patches", "third-90"),
            "minus LoRA": partial(gap, "third-patches", other="lora"),
            "zero-shot kept": partial(mean, "third-patches", ZERO_SHOT, digits=0),
        },
    ),
    "validation": (
        "validation images",
        {
            f"{rule}, against {f'`{study}`' if study else 'those without the shortcut'}": (column, study)
            for study in ("", "third-90", "third-75")
            for rule, column in {
                "weighed": "val_balanced",
                "as they are": "val",
                "without the shortcut": "val_unbiased",
            }.items()
            if study or column != "val_unbiased"
        },
        {group: partial(validated, group) for group in ("all", "without an expert", "with an expert")},
    ),
    "differences": (
        "unseen generators",
        {
            f"{label}: {' minus '.join(next(iter(labelled(name))) for name in pair)}": (pair, rate)
            for label, rate in {"balanced accuracy": "balanced_acc", "AP": "ap"}.items()
            for pair in PAIRS
        },
        {label: partial(drawn_gap, name) for name, label in DRAWN.items()},
    ),
    "content-strength": (
        "pictures, share of the side",
        {f"{way}, {side:g}": (way, side) for way in WAYS for side in SIDES},
        {
            "rho 0.5: traces": partial(strength, rho=0.5),
            "rho 0.9: traces and content": partial(strength, rho=0.9),
            "difference": strength,
        },
    ),
    "compared": (
        "",
        {
            "text expert and held adapters (`poe_distillation` minus `lora`)": ("poe_distillation", "lora"),
            "own design (`dgs_plus` minus `lora`)": ("dgs_plus", "lora"),
            "LoRA, images weighed by the text expert (`weighed_lora` minus `lora`)": ("weighed_lora", "lora"),
            "text expert alone, tower frozen (`poe_probe` minus `lora`)": ("poe_probe", "lora"),
            "DGS minus LoRA": ("dgs", "lora"),
            "DGS minus probe": ("dgs", "probe"),
        },
        {
            "rho 0.9": partial(gap, "third-90"),
            "generators retrained": partial(gap, "third-networks"),
            "shortcut by the object": partial(gap, "third-object"),
            "rho 0.75": partial(gap, "third-75"),
            "rho 0.5 (no shortcut)": partial(gap, "third-50"),
        },
    ),
}


def tables(root: Path) -> dict[str, Table]:
    """All tables of the documents, those of `sweep_tables` among them; `root`: the repository's."""
    return TABLES | sweep_tables(root)


def refresh(root: Path) -> None:
    """Brings the tables of those `DOCUMENTS` that are there up to date; `root`: the repository's."""
    for path in [root / name for name in DOCUMENTS if (root / name).exists()]:
        path.write_text(current(path.read_text(encoding="utf-8"), tables(root)), encoding="utf-8", newline="\n")


def write_study_and_findings(root: Path, profiles: Sequence[str]) -> Path:
    """What `dgs study` writes; its report.

    Args:
        profiles: to compare in results/<the first of them>/study/; empty: every finished one in results/study/, whose
            rows are kept there too, and the tables of `DOCUMENTS` follow.
    """
    folder = root / "results" / profiles[0] / "study" if profiles else root / "results" / "study"
    if not profiles:
        keep_runs(root)
    named = list(profiles) or finished_conditions(root)
    report = write_study(root, named, folder)
    write_params(root, named, folder)
    if not profiles:
        if (regimes := folder / "regimes.csv").exists():
            save(regime_map(read_table(regimes)), folder / "regimes.png")
        refresh(root)
    return report
