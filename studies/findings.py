"""The tables of docs/findings.md and docs/study.md, drawn from the results; `dgs study` renews them.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function here. Differences are paired by
seed; "[0.3, 1.2]" has signs where zero lies between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from dgs.analysis.report import markdown_table
from dgs.analysis.study import (
    UNSEEN,
    Condition,
    finished_conditions,
    keep_runs,
    read_condition,
    write_params,
    write_study,
)
from dgs.model.methods.registry import METHODS
from dgs.stats import Interval, paired_difference, rounded_text, seed_interval
from dgs.workspace import find_root

DOCUMENTS = ("docs/findings.md", "docs/study.md")
BLOCK = re.compile(r"(?<=<!-- table: )([\w-]+) -->\n.*?(?=\n *<!-- end -->)", re.DOTALL)
PRECISION, WORST, SEEN = "ap_unseen", "worst_generator_balanced_acc", "balanced_acc_seen"
ZERO_SHOT, PROBED = "zero_shot_kept", "linear_probe_kept"
SETS = {"mini": "`mini`", "second-study": "second study", "study-90": "`study-90`",
        "study-networks": "`study-networks`", "first-study": "first study"}  # fmt: skip
PLAIN = {"lora": "LoRA", "dgs": "DGS", "probe": "probe"}  # names of methods in running text
TABLES: dict[str, Callable[[], str]] = {}
Cell = Callable[[Any], str]


def table(make: Callable[[], str]) -> Callable[[], str]:
    """Registers a table under its function's name, "_" written as "-"."""
    TABLES[make.__name__.replace("_", "-")] = make
    return make


_condition = cache(read_condition)


def condition(name: str) -> Condition:
    """A profile's results, or an earlier study's."""
    return _condition(find_root(), name)


def value(name: str, method: str, metric: str = UNSEEN) -> Interval:
    """Per cent, over seeds."""
    return seed_interval(100 * condition(name).of(method, metric).to_numpy())


def change(name: str, other: str, method: str) -> Interval:
    """`method` under one condition minus itself under another: balanced accuracy, points, paired by seed."""
    both = pd.concat([condition(each).of(method) for each in (name, other)], axis=1, join="inner")
    return paired_difference(*(100 * both.to_numpy(dtype=float).T))


def number(amount: float, digits: int = 1, sign: bool = False) -> str:
    """As `rounded_text` rounds, with a plain minus; what prints as zero has no sign."""
    shown = rounded_text(amount, digits, sign).replace("−", "-")
    return shown.lstrip("+-") if float(shown) == 0 else shown


def told(interval: Interval, digits: int = 1, sign: bool = True) -> str:
    """ "+0.8 [0.3, 1.2]"; an end has as many digits as tell it from zero."""
    ends = []
    for end in interval[1:]:
        needed = digits
        while end and float(number(end, needed)) == 0 and needed < 4:
            needed += 1
        ends.append(number(end, needed, sign=interval.spans_zero))
    return f"{number(interval.mean, digits, sign)} [{', '.join(ends)}]"


def gap(name: str, method: str, other: str, metric: str = UNSEEN) -> str:
    """`method` minus `other`: points, whole ones of abilities kept; nothing for a method minus itself."""
    if method == other:
        return ""
    return told(condition(name).gap(method, other, metric), 0 if metric == ZERO_SHOT else 1)


def mean(name: str, metric: str, method: str, digits: int = 1) -> str:
    """Per cent."""
    return told(value(name, method, metric), digits, sign=False)


def drawn(first: str, rows: Mapping[str, Any], columns: Mapping[str, Cell]) -> str:
    """A table: `rows` are label -> what each column's function is given."""
    lines = [[label, *(cell(row) for cell in columns.values())] for label, row in rows.items()]
    return markdown_table([first, *columns], lines)


def labelled(*methods: str) -> dict[str, str]:
    """{label: method}, in code type but for those of running text."""
    return {PLAIN.get(method, f"`{method}`"): method for method in methods}


def against(name: str, other: str) -> dict[str, Cell]:
    """Columns of methods minus `other` under one condition."""
    metrics = {"balanced accuracy": UNSEEN, "AP": PRECISION, "zero-shot kept": ZERO_SHOT}
    return {label: partial(gap, name, other=other, metric=metric) for label, metric in metrics.items()}


def pair(name: str, metric: str = UNSEEN) -> Cell:
    """A column of two methods a row: the first minus the second."""
    return lambda both: gap(name, both[0], both[1], metric)


@table
def headline() -> str:
    metrics = {
        "balanced acc., seen": SEEN, "balanced acc., unseen": UNSEEN, "AP, unseen": PRECISION,
        "zero-shot kept": ZERO_SHOT,
    }  # fmt: skip
    rows = {name: name for name in ("probe", "lora", "dgs", "distillation", "dgs_plus")}
    return drawn("method", rows, {label: partial(mean, "mini", metric) for label, metric in metrics.items()})


@table
def lora_minus_probe() -> str:
    metrics = {"balanced accuracy": UNSEEN, "average precision": PRECISION, "worst generator": WORST}
    columns = {label: partial(gap, name, "lora", "probe") for name, label in SETS.items()}
    return drawn("LoRA minus probe, unseen", metrics, columns)


@table
def dgs_minus_lora() -> str:
    metrics = {"balanced accuracy": UNSEEN, "average precision": PRECISION, "zero-shot kept": ZERO_SHOT}
    columns = {label: partial(gap, name, "dgs", "lora") for name, label in SETS.items()}
    return drawn("DGS minus LoRA, unseen", metrics, columns)


@table
def controls() -> str:
    rows = {
        "`random_direction`: a random one, equally long, for the harmful one": "random_direction",
        "`shuffled_captions`: captions of other images": "shuffled_captions",
        "`signed`: the whole text gradient for its non-negative half": "signed",
        "`random_alignment`: alignment with random signs": "random_alignment",
        "`alignment_only`": "alignment_only",
        "`suppression_only`": "suppression_only",
        "`paper_order`: suppress, then align": "paper_order",
        "`per_sample`: without the release's 1/B": "per_sample",
    }
    milder = {"balanced accuracy, rho 0.75": partial(gap, "study-75", other="dgs")}
    return drawn("control minus `dgs`", rows, against("study-90", "dgs") | milder)


@table
def parts() -> str:
    told_by = {
        "the expert alone, tower frozen": ("poe_probe", "lora"),
        "adapters that are held, besides": ("poe_distillation", "poe_probe"),
        "the probe's head and averaging, besides": ("dgs_plus", "poe_distillation"),
        "holding the output": ("dgs_plus", "poe_swad"),
        "distillation without an expert": ("distillation", "lora"),
    }
    rows = {f"{what} (`{pair[0]}` minus `{pair[1]}`)": pair for what, pair in told_by.items()}
    return drawn("", rows, {"balanced accuracy": pair("study-90"), "AP": pair("study-90", PRECISION)})


@table
def neighbours() -> str:
    methods = ("null_space", "wise_ft", "upgrad", "pcgrad", "l2_sp", "swad", "effort", "prograd", "lp_ft")
    rows = {f"`{name}`" + (" (frozen tower)" if name == "null_space" else ""): name for name in methods}
    columns = {
        "minus probe": partial(gap, "study-90", other="probe"),
        "minus LoRA": partial(gap, "study-90", other="lora"),
        "AP minus LoRA": partial(gap, "study-90", other="lora", metric=PRECISION),
        "zero-shot kept, minus LoRA": partial(gap, "study-90", other="lora", metric=ZERO_SHOT),
        "minus LoRA, rho 0.75": partial(gap, "study-75", other="lora"),
    }
    return drawn("unseen", rows, columns)


EXPERT = {name for name, method in METHODS.items() if method.text_expert}
SURGERY = {name for name, method in METHODS.items() if method.reference.startswith("Control of dgs")} | {
    "dgs", "suppression_only", "alignment_only", "per_sample", "paper_order",
}  # fmt: skip
GROUPS = {
    "all": set(METHODS),
    "without an expert": set(METHODS) - EXPERT,
    "without an expert or parts of DGS": set(METHODS) - EXPERT - SURGERY,
    "with an expert": EXPERT,
}


def _means(name: str, metric: str) -> pd.Series:
    """Of each method, over seeds."""
    return condition(name).values.query("metric == @metric").groupby("method")["value"].mean()


def _rank_correlation(first: pd.Series, second: pd.Series, group: str) -> str:
    """Spearman's, with its p value and the number of methods."""
    both = pd.concat([first, second], axis=1, join="inner")
    both = both[both.index.isin(GROUPS[group])]
    found = spearmanr(both.iloc[:, 0], both.iloc[:, 1])
    p = f"p {found.pvalue:.2f}" if found.pvalue >= 0.005 else "p < 0.005"
    return f"{found.statistic:.2f} ({p}, n {len(both)})"


@table
def kept_and_detected() -> str:
    def cell(name: str, metric: str, group: str) -> str:
        return _rank_correlation(_means(name, metric), _means(name, UNSEEN), group)

    columns = {
        f"`{name}`, {label}": partial(cell, name, metric)
        for name in ("study-90", "study-75")
        for label, metric in (("zero-shot kept", ZERO_SHOT), ("linear probe kept", PROBED))
    }
    return drawn("methods", {group: group for group in GROUPS}, columns)


@table
def milder() -> str:
    methods = labelled(
        "levels_poe", "poe_distillation", "weighed_lora", "product_of_experts", "poe_swad", "dgs_plus",
        "levels_poe_probe", "poe_probe", "weighed_probe", "paper_order", "random_direction", "dgs", "levels_probe",
        "suppression_only", "probe", "leace", "distillation", "per_sample",
    )  # fmt: skip
    return drawn("minus LoRA, unseen", methods, against("study-75", "lora"))


@table
def no_shortcut() -> str:
    methods = labelled(
        "dgs", "poe_distillation", "product_of_experts", "dgs_plus", "suppression_only", "leace", "poe_probe", "probe",
        "distillation",
    )  # fmt: skip
    return drawn("minus LoRA, unseen", methods, against("study-50", "lora"))


@table
def other_shortcut() -> str:
    methods = labelled(
        "product_of_experts", "poe_distillation", "dgs_plus", "poe_probe", "dgs", "suppression_only", "leace", "probe",
        "distillation",
    )  # fmt: skip
    return drawn("minus LoRA, unseen", methods, against("study-object", "lora"))


@table
def other_rules() -> str:
    def cell(name: str, both: tuple[str, str | None]) -> str:
        return mean(name, UNSEEN, both[0]) if both[1] is None else gap(name, both[0], both[1])

    rows = {
        "probe": ("probe", None),
        "LoRA minus probe": ("lora", "probe"),
        "DGS minus probe": ("dgs", "probe"),
        "DGS minus LoRA": ("dgs", "lora"),
        "`dgs_plus` minus LoRA": ("dgs_plus", "lora"),
        "`dgs_plus` minus `poe_distillation`": ("dgs_plus", "poe_distillation"),
    }
    rules = {"weighed validation": "study-90", "with the shortcut": "study-90-val", "without it": "study-90-unbiased"}
    return drawn("unseen", rows, {f"{rule} (`{name}`)": partial(cell, name) for rule, name in rules.items()})


@table
def patches() -> str:
    columns: dict[str, Cell] = {
        "balanced accuracy": partial(mean, "study-patches", UNSEEN),
        "against whole images": lambda method: told(change("study-patches", "study-90", method)),
        "minus LoRA": partial(gap, "study-patches", other="lora"),
        "zero-shot kept": partial(mean, "study-patches", ZERO_SHOT, digits=0),
    }
    return drawn("unseen", labelled("dgs_plus", "distillation", "lora", "dgs", "probe"), columns)


@table
def validation() -> str:
    """Of all settings tried, or of each method's best with what it has in a study."""
    tried = pd.read_csv(find_root() / "results/mini/tuning.csv").set_index("method")
    rules = {"weighed": "val_balanced", "as they are": "val", "without the shortcut": "val_unbiased"}

    def cell(group: str, row: tuple[str, str | None]) -> str:
        rule, study = row
        if study is not None:
            return _rank_correlation(tried.groupby("method")[rule].max(), _means(study, UNSEEN), group)
        part = tried[tried.index.isin(GROUPS[group])]
        return f"{spearmanr(part[rule], part['val_unbiased']).statistic:.2f} (n {len(part)})"

    rows: dict[str, tuple[str, str | None]] = {
        f"{rule}, against those without the shortcut": (rules[rule], None) for rule in ("weighed", "as they are")
    }
    for study in ("study-90", "study-75"):
        rows |= {f"{rule}, against `{study}`": (column, study) for rule, column in rules.items()}
    groups = ("all", "without an expert", "with an expert")
    return drawn("validation images", rows, {group: partial(cell, group) for group in groups})


@table
def compared() -> str:
    def cell(name: str, both: tuple[str, str]) -> str:
        return gap(name, *both) if both[0] in condition(name).methods else "not run"

    rows = {
        "text expert and held adapters (`poe_distillation` minus `lora`)": ("poe_distillation", "lora"),
        "own design (`dgs_plus` minus `lora`)": ("dgs_plus", "lora"),
        "LoRA, images weighed by the text expert (`weighed_lora` minus `lora`)": ("weighed_lora", "lora"),
        "text expert alone, tower frozen (`poe_probe` minus `lora`)": ("poe_probe", "lora"),
        "DGS minus LoRA": ("dgs", "lora"),
        "DGS minus probe": ("dgs", "probe"),
    }
    columns = {
        "rho 0.9": "study-90",
        "generators retrained": "study-networks",
        "shortcut by the object": "study-object",
        "rho 0.75": "study-75",
        "rho 0.5 (no shortcut)": "study-50",
    }
    return drawn("", rows, {label: partial(cell, name) for label, name in columns.items()})


def current(text: str) -> str:
    """A document's text with its tables made anew; they stand as deep as the line of their mark.

    Raises:
        KeyError: a mark names no table.
    """

    def made(found: re.Match[str]) -> str:
        indent = text[text.rfind("\n", 0, found.start()) + 1 : found.start()].partition("<")[0]
        lines = ["", *TABLES[found[1]]().splitlines(), ""]
        return f"{found[1]} -->" + "".join(f"\n{indent}{line}".rstrip(" ") for line in lines)

    return BLOCK.sub(made, text)


def refresh(root: Path) -> None:
    """Brings the tables of those `DOCUMENTS` that are there up to date; `root`: the repository's."""
    for path in [root / name for name in DOCUMENTS if (root / name).exists()]:
        path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


def write_study_and_findings(root: Path, profiles: Sequence[str]) -> Path:
    """What `dgs study` writes; its report.

    Args:
        profiles: to compare in results/<the first of them>/study/; empty: every finished one in results/study/, whose
            rows are kept there too, and the tables of `DOCUMENTS` follow.
    """
    folder = root / "results" / profiles[0] / "study" if profiles else root / "results" / "study"
    named = list(profiles) or finished_conditions(root)
    report = write_study(root, named, folder)
    write_params(root, named, folder)
    if not profiles:
        keep_runs(root)
        refresh(root)
    return report
