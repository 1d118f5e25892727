"""docs/findings.md, docs/study.md and the README say what the committed results say, cell by cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import pytest
from scipy.stats import kendalltau, spearmanr
from told import (
    ACCURACY,
    PRECISION,
    ROOT,
    SEEN,
    WORST,
    ZERO_SHOT,
    change,
    condition,
    ends,
    gap,
    number,
    section,
    tables,
    text,
    told,
    value,
)

from dgs.analysis.study import agreement
from dgs.model.methods.registry import METHODS
from dgs.stats import Interval

FINDINGS = "docs/findings.md"
METRICS = {
    "balanced accuracy": ACCURACY,
    "average precision": PRECISION,
    "AP": PRECISION,
    "worst generator": WORST,
    "zero-shot kept": ZERO_SHOT,
}
STUDIES = {"first study": "first-study", "second study": "second-study"}
Column = Callable[[str], str]


def name(cell: str) -> str:
    """The method or folder that a cell begins with."""
    word = re.split(r"[:,(]", cell)[0].strip("` ").lower()
    return STUDIES.get(word, word)


def pair(cell: str) -> tuple[str, str]:
    """The two that a cell compares: "... `a` minus `b` ..."."""
    found = re.search(r"`?(\w+)`? minus `?(\w+)`?", cell)
    assert found is not None, cell
    return found[1].lower(), found[2].lower()


def minus(condition: str, other: str, metric: str = ACCURACY) -> Column:
    """Of a table that has a method a row: the method minus `other`; whole points for abilities kept."""
    return lambda cell: told(gap(condition, name(cell), other, metric), 0 if metric == ZERO_SHOT else 1)


def mean(condition: str, metric: str = ACCURACY) -> Column:
    return lambda cell: told(value(condition, name(cell), metric), 0 if metric == ZERO_SHOT else 1, sign=False)


def against(condition: str, other: str) -> Sequence[Column]:
    """Accuracy, precision and abilities kept, minus one method."""
    return [minus(condition, other, metric) for metric in (ACCURACY, PRECISION, ZERO_SHOT)]


def compared(condition: str, *metrics: str) -> Sequence[Column]:
    """Of a table that has two methods a row."""
    return [lambda cell, metric=metric: told(gap(condition, *pair(cell), metric)) for metric in metrics]  # type: ignore[misc]


BY_METHOD: dict[tuple[str, str], Sequence[Column]] = {
    ("## The release's surgery did not help here", "control minus `dgs`"): [
        *against("study-90", "dgs"),
        minus("study-75", "dgs"),
    ],
    ("## What helped", ""): compared("study-90", ACCURACY, PRECISION),
    ("## Neighbours from the literature", "unseen"): [
        minus("study-90", "probe"),
        minus("study-90", "lora"),
        *against("study-90", "lora")[1:],
        minus("study-75", "lora"),
    ],
    ("## A milder shortcut", "minus LoRA, unseen"): against("study-75", "lora"),
    ("## No shortcut", "minus LoRA, unseen"): against("study-50", "lora"),
    ("## Another shortcut", "minus LoRA, unseen"): against("study-object", "lora"),
    ("## Patch selection", "unseen"): [
        mean("study-patches"),
        lambda cell: told(change("study-patches", "study-90", name(cell))),
        minus("study-patches", "lora"),
        mean("study-patches", ZERO_SHOT),
    ],
}


def table(heading: str, first: str, document: str = FINDINGS) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table below a heading whose first cell that is."""
    (found,) = [rows for rows in tables(document, heading) if rows[0][0] == first]
    return found[0], found[1:]


@pytest.mark.parametrize(("heading", "first"), BY_METHOD)
def test_methods_of_one_condition(heading: str, first: str) -> None:
    columns = BY_METHOD[heading, first]
    _, rows = table(heading, first)
    for label, *cells in rows:
        empty = [not cell for cell in cells]  # a method minus itself
        expected = ["" if left else column(label) for column, left in zip(columns, empty, strict=True)]
        assert cells == expected, label


@pytest.mark.parametrize(
    ("heading", "first", "methods"),
    [
        ("## LoRA forgets, and what it gains for it", "LoRA minus probe, unseen", ("lora", "probe")),
        ("## The release's surgery did not help here", "DGS minus LoRA, unseen", ("dgs", "lora")),
    ],
)
def test_two_methods_on_several_sets_of_images(heading: str, first: str, methods: tuple[str, str]) -> None:
    (_, *folders), rows = table(heading, first)
    for label, *cells in rows:
        digits = 0 if label == "zero-shot kept" else 1
        expected = [told(gap(name(folder), *methods, METRICS[label]), digits) for folder in folders]
        assert cells == expected, label


def test_settings_by_other_rules() -> None:
    (_, *header), rows = table("## Settings chosen by other rules", "unseen")
    folders = [found[1] for column in header if (found := re.search(r"`([\w-]+)`", column))]
    for label, *cells in rows:
        shown = [cell.removesuffix(", the same runs") for cell in cells]
        if label == "probe":
            assert shown == [told(value(folder, "probe"), sign=False) for folder in folders]
        else:
            assert shown == [told(gap(folder, *pair(label))) for folder in folders], label


EXPERT = {name for name, method in METHODS.items() if method.expert or method.weighed}
CONTROLS = {name for name, method in METHODS.items() if method.reference.startswith("Control of dgs")}
SURGERY = CONTROLS | {"dgs", "suppression_only", "alignment_only", "per_sample", "paper_order"}
GROUPS = {
    "all": set(METHODS),
    "without an expert": set(METHODS) - EXPERT,
    "without an expert or parts of DGS": set(METHODS) - EXPERT - SURGERY,
    "with an expert": EXPERT,
}


def means(folder: str, metric: str) -> pd.Series:
    """Of each method, over seeds."""
    return condition(folder).values.query("metric == @metric").groupby("method")["value"].mean()


def rank_correlation(first: pd.Series, second: pd.Series, group: str) -> str:
    """Spearman's, with its p value and the number of methods, as the documents print it."""
    both = pd.concat([first, second], axis=1, join="inner")
    both = both[both.index.isin(GROUPS[group])]
    found = spearmanr(both.iloc[:, 0], both.iloc[:, 1])
    p = f"p {found.pvalue:.2f}" if found.pvalue >= 0.005 else "p < 0.005"
    return f"{found.statistic:.2f} ({p}, n {len(both)})"


def kept_and_detected(folder: str, metric: str, group: str) -> str:
    return rank_correlation(means(folder, metric), means(folder, ACCURACY), group)


def validated(rule: str, against: str, group: str) -> str:
    """Of all settings that were tried with validation without the shortcut, or of each method's best with a study."""
    tried = pd.read_csv(ROOT / "results/mini/tuning.csv").set_index("method")
    if against == "val_unbiased":
        part = tried[tried.index.isin(GROUPS[group])]
        return f"{spearmanr(part[rule], part[against]).statistic:.2f} (n {len(part)})"
    return rank_correlation(tried.groupby("method")[rule].max(), means(against, ACCURACY), group)


KEPT: list[tuple[str, str]] = [
    ("study-90", ZERO_SHOT),
    ("study-90", "linear_probe_kept"),
    ("study-75", ZERO_SHOT),
    ("study-75", "linear_probe_kept"),
]
RULES = {"weighed": "val_balanced", "as they are": "val", "without the shortcut": "val_unbiased"}


def test_what_is_kept_beside_what_is_detected() -> None:
    _, rows = table("## Does what is kept say how well it detects?", "methods")
    assert [row[0] for row in rows] == list(GROUPS)
    for group, *cells in rows:
        assert cells == [kept_and_detected(*each, group) for each in KEPT], group


def test_what_validation_says() -> None:
    (_, *groups), rows = table("## The shortcut", "validation images")
    for label, *cells in rows:
        rule, _, against = label.partition(", against ")
        folder = "val_unbiased" if against == "those without the shortcut" else name(against)
        assert cells == [validated(RULES[rule], folder, group) for group in groups], label


README_COLUMNS = {
    "rho 0.9": "study-90",
    "generators retrained": "study-networks",
    "shortcut by the object": "study-object",
    "rho 0.75": "study-75",
    "rho 0.5 (no shortcut)": "study-50",
}


def test_the_readmes_comparisons() -> None:
    (_, *header), rows = table("## All methods, compared", "", "README.md")
    for label, *cells in rows:
        for column, cell in zip(header, cells, strict=True):
            folder = README_COLUMNS[column]
            if pair(label)[0] in condition(folder).methods:
                assert cell == told(gap(folder, *pair(label))), (label, column)
            else:
                assert cell == "not run", (label, column)


def said(template: str, interval: Interval, digits: int = 1) -> str:
    """{mean} with its sign, {size} without, {ends}."""
    mean, size = number(interval.mean, digits, sign=True), number(abs(interval.mean), digits)
    return template.format(mean=mean, size=size, ends=ends(interval, digits))


SENTENCES: list[tuple[str, Callable[[], Interval]]] = [
    ("Minus DGS: {mean} (`mini`)",
     partial(gap, "mini", "dgs_plus", "dgs")),
    ("{mean} {ends} (`study-90`). On the generator that is worst",
     partial(gap, "study-90", "dgs_plus", "dgs")),
    ("on unseen generators {mean} {ends} (`mini`)",
     partial(gap, "mini", "dgs_plus", "lora")),
    ("{mean} {ends} (`study-90`, test images nobody had looked at)",
     partial(gap, "study-90", "dgs_plus", "lora")),
    ("{mean} {ends} (`study-networks`); AP",
     partial(gap, "study-networks", "dgs_plus", "lora")),
    ("not in `study-networks` ({mean} {ends}; AP",
     partial(gap, "study-networks", "poe_distillation", "poe_probe")),
    ("(`levels_poe`, the highest, {mean} {ends})",
     partial(gap, "study-90", "levels_poe", "dgs_plus")),
    ("It beats `poe_probe` in `study-90` ({mean} {ends})",
     partial(gap, "study-90", "dgs_plus", "poe_probe")),
    ("is worth {size} points of AP {ends} in `study-90`",
     partial(gap, "study-90", "poe_distillation", "product_of_experts", PRECISION)),
    ("of balanced accuracy {size} {ends}",
     partial(gap, "study-90", "poe_distillation", "product_of_experts")),
    ("`levels_probe` is {size} points {ends} above LoRA",
     partial(gap, "study-90", "levels_probe", "lora")),
    ("and {size} {ends} above the probe (AP",
     partial(gap, "study-90", "levels_probe", "probe")),
    ("between them but in AP ({mean} {ends})",
     partial(gap, "study-90", "levels_probe", "null_space", PRECISION)),
    ("`levels_poe_probe` minus `poe_probe` is {mean} {ends}",
     partial(gap, "study-90", "levels_poe_probe", "poe_probe", PRECISION)),
    ("in balanced accuracy ({mean} {ends}) that is not shown",
     partial(gap, "study-90", "levels_poe_probe", "poe_probe")),
    ("(`levels_poe` minus `product_of_experts` {mean} {ends})",
     partial(gap, "study-90", "levels_poe", "product_of_experts")),
    ("`weighed_lora`, is {size} points {ends} above LoRA",
     partial(gap, "study-90", "weighed_lora", "lora")),
    ("`weighed_probe` and `poe_probe` ({mean} {ends})",
     partial(gap, "study-90", "weighed_probe", "poe_probe")),
    ("(`swad`) is worth {size} points {ends}",
     partial(gap, "study-90", "swad", "lora")),
    ("(`dgs`, which tunes besides) is {size} points {ends} lower",
     partial(gap, "study-90", "null_space", "dgs")),
    ("is below the probe here ({mean} {ends})",
     partial(gap, "study-90", "leace", "probe")),
    ("under the object's shortcut ({mean} {ends})",
     partial(gap, "study-object", "leace", "probe")),
    ("(AP {mean} {ends} and +1.3 [0.4, 2.3]), and that",
     partial(gap, "study-90", "upgrad", "probe", PRECISION)),
    ("no difference is shown (AP {mean} {ends} and",
     partial(gap, "study-90", "upgrad", "distillation", PRECISION)),
    ("`dgs_plus` is {size} points {ends} above `null_space`",
     partial(gap, "study-90", "dgs_plus", "null_space")),
    ("an expert is {size} {ends} above `null_space`",
     partial(gap, "study-90", "poe_probe", "null_space")),
    ("in ranking (AP {mean} {ends}) or in decisions",
     partial(gap, "study-networks", "dgs_plus", "poe_distillation", PRECISION)),
    ("on seen ({mean} {ends}) or unseen",
     partial(gap, "study-networks", "dgs_plus", "poe_distillation", SEEN)),
    ("it decides better on seen ones ({mean} {ends})",
     partial(gap, "study-networks", "dgs_plus", "poe_probe", SEEN)),
    ("`null_space` is not ({mean} {ends})", partial(gap, "study-75", "null_space", "probe")),
    ("is below `poe_distillation`**, by {size} points {ends}",
     partial(gap, "study-75", "poe_distillation", "dgs_plus")),
    ("below `weighed_lora`, by {size} {ends}", partial(gap, "study-75", "weighed_lora", "dgs_plus")),
    ("nothing shows ({mean} {ends} and", partial(gap, "study-75", "dgs_plus", "poe_distillation", PRECISION)),
    ("and {mean} {ends}). The goal here", partial(gap, "study-75", "dgs_plus", "weighed_lora", PRECISION)),
    ("Held adapters add {size} points {ends}", partial(gap, "study-75", "poe_distillation", "poe_probe")),
    ("the expert adds {size} {ends} to the probe", partial(gap, "study-75", "poe_probe", "probe")),
    ("where it added {size} {ends} at rho 0.9", partial(gap, "study-90", "poe_probe", "probe")),
    ("`paper_order` ({mean} {ends})", partial(gap, "study-75", "paper_order", "lora")),
    ("its control ({mean} {ends})", partial(gap, "study-75", "random_direction", "lora")),
    ("ranks better (AP {mean} {ends})", partial(gap, "study-75", "random_direction", "dgs", PRECISION)),
    ("Against DGS its decisions are worse, barely ({mean} {ends})",
     partial(gap, "study-50", "dgs_plus", "dgs")),
    ("it is {size} points {ends} below LoRA, with 64.0 %",
     partial(gap, "study-50", "lora", "dgs_plus", WORST)),
    ("than with the shortcut**, by {size} points {ends}",
     partial(change, "study-50", "study-90", "lora", "probe")),
    ("and by {size} {ends} on the worst generator (`study-50`",
     partial(change, "study-50", "study-90", "lora", "probe", WORST)),
    ("the probe DGS has {mean} {ends} here",
     partial(gap, "study-object", "dgs", "probe")),
    ("gain {size} {ends} and 2.9",
     partial(change, "study-object", "study-90", "dgs", "probe")),
    ("`dgs_plus` and `poe_distillation` ({mean} {ends}); it is",
     partial(gap, "study-object", "dgs_plus", "poe_distillation")),
    ("to be below the probe here ({mean} {ends})",
     partial(gap, "study-patches", "dgs", "probe")),
    ("(from DGS {size} {ends}",
     partial(change, "study-50", "study-90", "dgs")),
    ("from the probe {size} {ends})",
     partial(change, "study-50", "study-90", "probe")),
]  # fmt: skip


@pytest.mark.parametrize(("template", "interval"), SENTENCES, ids=[template for template, _ in SENTENCES])
def test_sentences(template: str, interval: Callable[[], Interval]) -> None:
    assert said(template, interval()) in text(FINDINGS)


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        ("of the 24 without, {tau:.2f} of all", "study-90", "study-75"),
        ("with `study-75` {tau:.2f})", "study-object", "study-75"),
        ("(Kendall's tau of all ten {tau:.2f}", "study-object", "study-90"),
        ("is nearly that of `study-90` (Kendall's tau {tau:.2f})", "study-networks", "study-90"),
        ("is not that of `study-90` (Kendall's tau {tau:.2f})", "study-50", "study-90"),
    ],
)
def test_how_far_the_order_of_methods_carries(template: str, first: str, second: str) -> None:
    assert template.format(tau=agreement(condition(first), condition(second))) in text(FINDINGS)


def test_of_the_other_methods_only_those_named_are_not_shown_to_be_below_dgs_plus() -> None:
    """Experts with adapters, images weighed by an expert, levels read with one."""
    others = [method for method in condition("study-90").methods if method != "dgs_plus"]
    level = {method for method in others if gap("study-90", "dgs_plus", method).low <= 0}
    assert level == EXPERT - {"dgs_plus", "poe_probe"}
    assert not [method for method in others if gap("study-90", method, "dgs_plus").low > 0]


def test_at_rho_075_only_those_named_are_shown_to_be_above_lora_without_an_expert() -> None:
    methods = set(condition("study-75").methods) - {"lora"}
    above = {method for method in methods if gap("study-75", method, "lora").low > 0}
    assert above - EXPERT == {"paper_order", "random_direction"}
    assert len([method for method in methods if gap("study-75", "dgs_plus", method).low > 0]) == 18


@pytest.mark.parametrize(("group", "tau"), [("with an expert", "0.91"), ("without an expert", "0.08")])
def test_the_order_of_methods_with_an_expert_carries_over_that_of_the_others_does_not(group: str, tau: str) -> None:
    both = pd.concat([means(folder, ACCURACY) for folder in ("study-90", "study-75")], axis=1)
    both = both[both.index.isin(GROUPS[group])]
    assert f"{kendalltau(both.iloc[:, 0], both.iloc[:, 1]).statistic:.2f}" == tau
    assert tau in " ".join(section(FINDINGS, "## A milder shortcut"))
