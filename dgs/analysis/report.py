"""REPORT.md of a run: what was run, what came out, how sure it is, and how to read it.

Every table is a pivot of detection.csv or forgetting.csv; the text around them is REPORT.md.j2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dgs.analysis.differences import COMPARED, intervals, is_crossed, key_of
from dgs.analysis.metrics import (
    BLOCK,
    OF_EXPERT,
    ORACLE,
    generators_in_order,
    headline,
    label_of,
    measure_words,
    metrics_of,
    native_rows,
    unique,
)
from dgs.analysis.robustness import (
    TIERS,
    changes,
    conditions_of,
    format_conditions,
    means_over_generators,
    readings,
    tier,
)
from dgs.conditions import NATIVE
from dgs.errors import printable
from dgs.params import dotted
from dgs.stats import (
    Interval,
    interval_text,
    iqm,
    percent_text,
    rounded_text,
    seed_interval,
)

# Settings that may differ between checkpoints without making their training differ.
NOT_OF_TRAINING = (
    "methods", "train.log_every", "train.log_gradients", "compute.batch_size", "compute.jobs", "compute.workers",
    "evaluate.", "gradient_angles.", "data.show_images",
)  # fmt: skip
RUN = ["method", "seed"]
OF_METHODS = ("settings", "tuned")  # groups of settings that have a method's own below its name
FEW_SEEDS = 3  # fewer say next to nothing about how far a number would move
WORDS = {"train": "training images, out of fold", "val_unbiased": "images without the shortcut"}
READINGS = {
    "fragile": "fragile under",
    "looks real": "takes images for real after",
    "looks fake": "takes images for fake after",
    "none shown": "nothing shown for",
}
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    detection: pd.DataFrame,
    forgetting: pd.DataFrame | None,
    settings: Mapping[str, Mapping[str, Any]],
    figures: Sequence[str | PurePath] = (),
    suites: Sequence[str] = (),
    text: str = "",
    differences: pd.DataFrame | None = None,
    verdicts: pd.DataFrame | None = None,
) -> Path:
    """Writes REPORT.md; the same input gives the same bytes. Returns the path, whose parent folders are made.

    `summary`: as `metrics.summary` returns it; `detection`, `forgetting`: the tables it was made from; `settings`:
    method -> the settings its checkpoints were trained with, nested or flat, in method order: one that methods share is
    printed once, and a line at the top warns of others; `figures`: image paths relative to the report's folder;
    `suites`: sections on the paper's suites (`paper.suite_sections`); `text`: a sentence on what embedded captions, if
    that was not CLIP's own text tower; `differences`, `verdicts`: as `differences.difference_table` and
    `verdicts.verdict_table` give them; None: a report without them. Raises UserError as `metrics.headline` does,
    ValueError for an absolute figure path and for settings that are not one mapping a method.
    """
    for figure in figures:
        if PurePath(figure).is_absolute() or os.fspath(figure).startswith("/"):
            raise ValueError(f"expected figure paths relative to the report, found {figure}")
    rows, methods = headline(detection), summary["methods"]
    seeds_of = rows.groupby("method", sort=False)["seed"].nunique()
    seeds = int(seeds_of.max())
    by_setting, rates = _by_setting(settings), metrics_of("decisions", "ranking").values()
    sides = zip(settings, by_setting.get("train.surgery.content_side", ()), strict=False)
    content = sorted({side for name, side in sides if f"content{OF_EXPERT}train" in methods.get(name, ())})
    equal = np.allclose(rows["acc"], rows["balanced_acc"], rtol=0, atol=1e-9)
    text = render(
        "REPORT.md.j2",
        seeds=seeds,
        few_seeds=FEW_SEEDS,
        fewer=", ".join(f"`{method}` ({count})" for method, count in seeds_of.items() if count < seeds),
        differ=any(len(set(of)) > 1 and not key.startswith(NOT_OF_TRAINING) for key, of in by_setting.items()),
        headline=_headline(methods, forgetting),
        text=text,
        macc=", ".join(f"`{name}` {_entry(numbers['mAcc'])}" for name, numbers in methods.items() if "mAcc" in numbers),
        without_clip=[name for name in methods if forgetting is not None and name not in set(forgetting["method"])],
        differences={} if differences is None or differences.empty else _differences(differences, forgetting),
        spread=_over_generators(rows[~rows["seen"]]),
        where="seen" if rows["seen"].all() else "unseen",
        experts=_experts(methods),
        sides=content,
        free=any(key.endswith(f"{OF_EXPERT}val_unbiased") for numbers in methods.values() for key in numbers),
        oracle=(detection["threshold_rule"].astype(str) == ORACLE).any(),
        operating_points=_operating_points(detection),
        verdicts={} if verdicts is None or verdicts.empty else _verdicts(verdicts),
        suites="\n\n".join(suites),
        equal=equal,
        by_generator=[
            (m.label, _by_generator(rows, m.key)) for m in rates if m.headline and not (equal and m.key == "acc")
        ],
        robustness=_robustness(detection),
        forgetting="" if forgetting is None else _measures(forgetting, list(methods), blocks=False),
        blocks="" if forgetting is None else _measures(forgetting, list(methods), blocks=True),
        figures=[PurePath(figure) for figure in figures],
        alone=min((len(e["per_seed"]) for numbers in methods.values() for e in numbers.values() if e), default=0) == 1,
        summary=summary,
        rows=rows,
        seen=unique(rows.loc[rows["seen"], "generator"]),
        unseen=unique(rows.loc[~rows["seen"], "generator"]),
        span=_span,
        settings=_settings(settings, by_setting),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8", newline="\n")
    return target


def summary_sections(text: str) -> str:
    """The top of a report's text: its title, the cautions below it, Headline and, if there is one, Differences."""
    top, *sections = ("\n" + text).split("\n## ")
    chosen = [f"## {part}" for part in sections if part.startswith(("Headline", "Differences"))]
    return "\n\n".join(part.strip() for part in (top, *chosen) if part.strip()) + "\n"


def render(template: str, **values: Any) -> str:
    """A template beside this module with `values`; blank lines that its blocks leave are drawn together."""
    text = _TEMPLATES.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _cell(content: object) -> str:
    return "".join(printable(sign) if sign < " " else sign for sign in str(content)).replace("|", "\\|")


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]], left: bool = False) -> str:
    """A Markdown table; a pipe inside a cell is escaped.

    The first column stands to the left, the others to the right, or with `left` to the left too. Empty without rows.
    """
    top, *lines = ([_cell(cell) for cell in line] for line in (header, *rows))
    aligned = ["---", *["---" if left else "---:"] * (len(top) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (top, aligned, *lines) if lines)


def plus_minus(values: pd.Series, sign: bool = False) -> str:
    """Mean of fractions as per cent, with half its interval where there are several seeds; "–" for no values."""
    if values.empty:
        return "–"
    interval = seed_interval(values.to_numpy())
    spread = f" ±{percent_text(interval.high - interval.mean)}" if interval.known else ""
    return f"{percent_text(interval.mean, sign=sign)}{spread}"


def cells(values: pd.Series, methods: Sequence[str], sign: bool = False) -> list[str]:
    """Fractions by method and seed (the index) as a cell a method."""
    of = values.index.get_level_values("method")
    return [plus_minus(values[of == method], sign) for method in methods]


def _entry(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    low, high = (np.nan if entry[end] is None else 100 * entry[end] for end in ("low", "high"))
    return interval_text(Interval(100 * entry["mean"], low, high), sign=False)


def _headline(methods: Mapping[str, Mapping[str, Any]], forgetting: pd.DataFrame | None) -> str:
    measured = {key for numbers in methods.values() for key, entry in numbers.items() if entry is not None}
    shown = {key: label_of(key, forgetting) for key, metric in COMPARED.items() if metric.headline and key in measured}
    rows = [[f"`{name}`", *(_entry(numbers.get(key)) for key in shown)] for name, numbers in methods.items()]
    return markdown_table(["method", *shown.values()], rows)


def _differences(differences: pd.DataFrame, forgetting: pd.DataFrame | None) -> dict[str, Any]:
    """The two tables of differences, points: those with crossed intervals, and those over seeds alone."""
    crossed, seeds_alone = [], []
    for row, drawn, seeds, decisive in intervals(differences):
        first = [f"`{row.method}`", label_of(key_of(row.rate, row.pictures), forgetting)]
        count, reading = str(row.n_seeds), _verdict(decisive, row.n_seeds)
        if decisive is drawn:
            p = [_p_text(value) for value in (row.p, row.p_holm, row.p_sign_flip)]
            ends = interval_text(seeds).partition(" ")[2] or "–"
            crossed.append([*first, interval_text(drawn), ends, *p, f"{count} × {row.n_generators}", reading])
        else:
            seeds_alone.append([*first, interval_text(seeds), count, reading])
    baseline = differences["other"].iloc[0]
    head, minus = ["method", "measure"], f"minus `{baseline}`"
    p = ["p", "p (Holm)", "p (signs of seeds)"]
    return {
        "baseline": baseline,
        "crossed": markdown_table([*head, minus, "over seeds", *p, "seeds × generators", "reading"], crossed),
        "seeds": markdown_table([*head, minus, "seeds", "reading"], seeds_alone),
        "family": differences.loc[is_crossed(differences), "method"].nunique(),
    }


def _p_text(p: float) -> str:
    return "–" if np.isnan(p) else "< 0.001" if p < 0.001 else rounded_text(p, 3)


def _experts(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """What each method's expert reads of labels: a row an expert, a column a split."""
    found = {
        (name, *key.split(OF_EXPERT)): _entry(entry)
        for name, numbers in methods.items()
        for key, entry in numbers.items()
        if OF_EXPERT in key
    }
    splits, experts = unique(key[2] for key in found), dict.fromkeys(key[:2] for key in found)
    rows = [
        [f"`{name}`", reads, *(found.get((name, reads, split), "–") for split in splits)] for name, reads in experts
    ]
    return markdown_table(["method", "its expert reads", *(WORDS.get(split, split) for split in splits)], rows)


def _verdict(gap: Interval, seeds: int) -> str:
    if not gap.known:
        return "one seed: no interval" if seeds == 1 else "too few generators or images: no interval"
    if gap.spans_zero:
        return "no difference shown"
    return "higher" if gap.mean > 0 else "lower"


def _over_generators(rows: pd.DataFrame) -> str:
    """How far one mean over seeds and unseen generators stands for them: mean, IQM and the worst generator."""
    lines = []
    for method, part in rows.groupby("method", sort=False):
        rates = part.pivot(index="seed", columns="generator", values="balanced_acc")
        values = 100 * rates.to_numpy()
        middle = rounded_text(iqm(values[np.isfinite(values)]))
        lines.append([f"`{method}`", rounded_text(float(np.nanmean(values))), middle, plus_minus(rates.min(axis=1))])
    return markdown_table(["method", "mean", "IQM", "worst generator"], lines)


def _operating_points(detection: pd.DataFrame) -> str:
    """Threshold 0.5 against the validation threshold, and the rates that no threshold enters."""
    native = native_rows(detection)
    native = native[native["seen"] == native["seen"].all()]
    by_rule = dict(list(native.groupby(native["threshold_rule"].astype(str))))
    columns = {
        "balanced acc. at 0.5": ("0.5", "balanced_acc"),
        "at the validation threshold": ("val", "balanced_acc"),
        "at that of unbiased validation": ("val_unbiased", "balanced_acc"),
        "at each generator's best (oracle)": (ORACLE, "balanced_acc"),
        "fakes caught at 1 % false alarms": ("0.5", "tpr_at_1fpr"),
        "at 5 %": ("0.5", "tpr_at_5fpr"),
        "AUROC": ("0.5", "auroc"),
        "calibration error": ("0.5", "ece"),
    }
    methods = unique(by_rule["0.5"]["method"])
    found = {"method": [f"`{method}`" for method in methods]}
    for name, (rule, rate) in columns.items():
        if rule in by_rule:
            found[name] = cells(by_rule[rule].groupby(RUN)[rate].mean(), methods)
    return markdown_table(found, zip(*found.values(), strict=True))


def _verdicts(table: pd.DataFrame) -> dict[str, Any]:
    """Means over seen and over unseen generators, and the calibration error of each before and after the map."""
    methods, columns = unique(table["method"]), ["aurc", "false_alarm", "miss", "unsure_real", "unsure_fake"]
    names = ["AURC", "real called generated", "generated called real", "real unsure", "generated unsure"]
    lines = []
    for method in methods:
        for seen, word in ((True, "seen"), (False, "unseen")):
            own = table[(table["method"] == method) & (table["seen"] == seen)]
            if not own.empty:
                of_seeds = own.groupby("seed")[["ece_before", "ece_after", *columns]].mean()
                error, *rest = (plus_minus(of_seeds[name]) for name in of_seeds)
                lines.append([f"`{method}`", word, error, *rest])
    generators = []
    for name in generators_in_order(table):
        own = table[table["generator"] == name].groupby("method", sort=False)[["ece_before", "ece_after"]].mean()
        pairs = {str(method): " → ".join(map(percent_text, pair)) for method, *pair in own.itertuples()}
        known = "seen" if table.loc[table["generator"] == name, "seen"].any() else "unseen"
        generators.append([name, known, *(pairs.get(method, "–") for method in methods)])
    head = ["method", "generators", "calibration error", "after the map", *names]
    by_method = ["generator", "in training", *(f"`{method}`" for method in methods)]
    return {"means": markdown_table(head, lines), "generators": markdown_table(by_method, generators)}


def _by_generator(rows: pd.DataFrame, rate: str) -> str:
    """A rate of each generator and its means; one row where all generators share it, as they share photographs."""
    methods, generators, by_run = unique(rows["method"]), generators_in_order(rows), rows.set_index(RUN)[rate]
    if rate == "r_acc" and len(generators) > 1 and by_run.groupby(level=RUN).nunique().max() == 1:
        lines = [["each", "", *cells(by_run.groupby(level=RUN).first(), methods)]]
    else:
        of, seen = rows["generator"].to_numpy(), rows["seen"].to_numpy()
        lines = [
            [name, "seen" if seen[of == name].any() else "unseen", *cells(by_run[of == name], methods)]
            for name in generators
        ]
        for word, chosen in (("seen", seen), ("unseen", ~seen)):
            if len(set(of[chosen])) > 1:
                lines.append(["**mean**", word, *cells(by_run[chosen].groupby(level=RUN, sort=False).mean(), methods)])
    return markdown_table(["generator", "in training", *(f"`{method}`" for method in methods)], lines)


def _robustness(detection: pd.DataFrame) -> dict[str, Any]:
    """What changes to the test images cost, and whether a method is fragile or reads the change itself."""
    means, _ = means_over_generators(detection)
    conditions = conditions_of(means)
    if not conditions:
        return {}
    methods, table = unique(means.loc[means["condition"] != NATIVE, "method"]), changes(means)
    names, by_run = [f"`{method}`" for method in methods], table.set_index(RUN)

    def of(measure: str, *first: list[str]) -> str:
        own = by_run[by_run["measure"] == measure]
        rows = [
            [f"`{c.name}`", *cells(own.loc[own["condition"] == c.name, "value"], methods, True)] for c in conditions
        ]
        return markdown_table(["condition", *names], [*first, *rows] if len(own) else ())

    native = means[means["condition"] == NATIVE].set_index(RUN)["balanced_acc"]
    changed = means[(means["applied_to"] == "both") & means["method"].isin(methods)]
    by_tier = changed.assign(tier=changed["condition"].map(tier)).groupby([*RUN, "tier"])["balanced_acc"].mean()
    tiers = [
        [f"**{name}**: {words}", *cells(by_tier.xs(name, level="tier"), methods)]
        for name, words in TIERS.items()
        if name in by_tier.index.get_level_values("tier")
    ]
    formats = []
    for name, (condition, applied_to) in format_conditions(conditions).items():
        part = means[(means["condition"] == condition) & (means["applied_to"] == applied_to)]
        rates = [part.loc[part["method"] == method, ["r_acc", "f_acc"]] for method in methods]
        formats.append([name, *(" / ".join(map(percent_text, own.mean())) if len(own) else "–" for own in rates)])
    return {
        "tiers": markdown_table(["tier", *names], tiers),
        "accuracy": of("accuracy", ["native", *cells(native, methods)]),
        "ranking": of("ranking"),
        "shift": of("shift"),
        "readings": [
            (method, [f"{READINGS[kind]} {', '.join(found)}" for kind, found in kinds.items() if found])
            for method in methods
            for kinds in [readings(table, method, conditions)]
        ],
        "formats": markdown_table(["format", *names], formats),
    }


def _measures(forgetting: pd.DataFrame, methods: Sequence[str], blocks: bool) -> str:
    """What the tower knows before and after, of single vision blocks or of the whole; a dash for who has none."""
    rows = []
    for measure in unique(forgetting["measure"]):
        if (BLOCK in measure) == blocks:
            own = forgetting[forgetting["measure"] == measure].set_index(RUN)
            before, words = percent_text(own["before"].mean()), f"{measure_words(measure)} (`{measure}`)"
            rows.append([words, before, *cells(own["after"], methods)])
    return markdown_table(["measure", "before", *(f"`{method}`" for method in methods)], rows)


def _span(counts: pd.Series) -> str:
    return " to ".join(map(str, sorted({int(counts.min()), int(counts.max())})))


def _by_setting(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """{setting: its value for each method, in order}, "–" where a method lacks it."""
    for method, own in settings.items():
        if not isinstance(own, Mapping):
            raise ValueError(f"expected the settings of each method, {{method: {{setting: value}}}}, found {method!r}")
    flat = [dotted(own) for own in settings.values()]
    return {key: [str(own.get(key, "–")) for own in flat] for key in unique(key for own in flat for key in own)}


def _settings(settings: Mapping[str, Mapping[str, Any]], by_setting: Mapping[str, Sequence[str]]) -> str:
    """One value where all methods agree, else each method's own; none of methods that did not run."""
    rows = []
    for key, values in by_setting.items():
        group, _, rest = key.partition(".")
        if group in OF_METHODS and rest.partition(".")[0] not in (*settings, "default"):
            continue
        named = "; ".join(f"{method}: {value}" for method, value in zip(settings, values, strict=True))
        rows.append((f"`{key}`", f"`{values[0] if len(set(values)) == 1 else named}`"))
    return markdown_table(("setting", "value"), rows, left=True)
