"""REPORT.md of a run: what was run, what came out, how sure it is, and how to read it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from dgs.analysis.deviations import deviations
from dgs.analysis.metrics import (
    CELL_METRICS,
    ORACLE,
    cells_table,
    generators_in_order,
    headline,
    in_order,
    per_seed_values,
)
from dgs.analysis.robustness import (
    change,
    changes,
    conditions_of,
    format_conditions,
    means_over_generators,
    readings,
)
from dgs.data.conditions import NATIVE, Condition
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

BASELINE = "lora"
METRIC_NAMES = {
    "balanced_acc_seen": "balanced acc., seen",
    "balanced_acc_unseen": "balanced acc., unseen",
    "worst_generator_balanced_acc": "worst generator",
    "ap_seen": "AP, seen",
    "ap_unseen": "AP, unseen",
    "zero_shot_kept": "zero-shot kept",
    "linear_probe_kept": "linear probe kept",
    "retrieval_kept": "retrieval kept",
}
HEADLINE = ("balanced_acc_seen", "balanced_acc_unseen", "ap_seen", "ap_unseen", "zero_shot_kept")
DIFFERENCES = (
    "balanced_acc_seen",
    "balanced_acc_unseen",
    "worst_generator_balanced_acc",
    "ap_seen",
    "ap_unseen",
    "zero_shot_kept",
    "linear_probe_kept",
    "retrieval_kept",
)
CELL_NAMES = {
    "acc": "Accuracy (Acc)",
    "balanced_acc": "Balanced accuracy",
    "r_acc": "Accuracy on reals (R.Acc)",
    "f_acc": "Accuracy on fakes (F.Acc)",
    "ap": "Average precision (AP)",
}
# By the evaluate notebook's names.
CAPTIONS = {
    "detection": "Balanced accuracy by generator",
    "heatmap": "Balanced accuracy, methods by generators",
    "plane": "Detection against zero-shot accuracy kept",
    "forgetting": "What each method still knows",
    "tsne": "t-SNE of image features",
    "training": "Training loss and validation accuracy",
    "differences": "Differences to lora, paired by seed",
    "calibration": "Calibration on unseen generators",
    "blocks": "Forgetting after each vision block",
    "robustness": "Balanced accuracy on changed images",
}
# Settings that may differ between checkpoints without making their training differ.
NOT_OF_TRAINING = (
    "methods", "train.log_every", "train.log_gradients", "compute.batch_size", "compute.jobs", "compute.workers",
    "evaluate.", "gradient_angles.",
)  # fmt: skip
DIFFERENT_SETTINGS = (
    "**Methods were trained with different settings** (named below): their differences are not of the method alone."
)
_TEMPLATES = Environment(loader=PackageLoader("dgs.analysis"), undefined=StrictUndefined, trim_blocks=True)
BLOCK = "_block:"  # in the name of a measure of a single vision block
FEW_SEEDS = 3  # fewer say next to nothing about how far a number would move


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    detection: pd.DataFrame,
    forgetting: pd.DataFrame | None,
    settings: Mapping[str, Mapping[str, Any]],
    figures: Sequence[str | PurePath] = (),
    suites: Sequence[str] = (),
) -> Path:
    """Writes REPORT.md: headline numbers with intervals, differences to lora, tables, figures, a guide, the settings.

    `summary`: as `metrics.summary` returns it; `detection`, `forgetting`: the tables it was made from; `settings`:
    method -> the settings its checkpoints were trained with, nested or flat, in method order; `figures`: image paths
    relative to the report's folder, shown in that order; `suites`: sections on the paper's suites
    (`suite_tables.suite_sections`). A setting that methods share is printed once; where they
    differ each method's value is, and a line at the top warns that methods differ by more than the method; another
    warns of fewer than 3 seeds. Rates are printed in
    per cent, and equal ones alike (`intervals.rounded_text`). The same input gives the same bytes: no time, no
    machine. Returns the path; parent folders are made. Raises UserError as `metrics.headline` does, ValueError for an
    absolute figure path and for settings that are not one mapping a method.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        part
        for part in (
            "# Report",
            *_cautions(detection, settings),
            _headline_section(summary),
            _difference_section(detection, forgetting),
            _operating_points(detection),
            *suites,
            _generator_section(detection),
            _robustness_section(detection),
            _forgetting_section(forgetting),
            _figure_section(figures),
            _how_to_read(summary),
            _what_was_run(summary, detection, settings),
            _deviations_section(detection, settings),
        )
        if part
    )
    target.write_text(text + "\n", encoding="utf-8", newline="\n")
    return target


def summary_sections(text: str) -> str:
    """The top of a report's text: its title, the cautions below it, Headline and, if there is one, Differences."""
    top, *sections = ("\n" + text).split("\n## ")
    chosen = [f"## {part}" for part in sections if part.startswith(("Headline", "Differences"))]
    return "\n\n".join(part.strip() for part in (top, *chosen) if part.strip()) + "\n"


def render(template: str, **values: Any) -> str:
    """A template of dgs/analysis/templates/ with `values`; blank lines that its blocks leave are drawn together."""
    text = _TEMPLATES.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right; a pipe inside a cell is escaped."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _what_was_run(
    summary: Mapping[str, Any], detection: pd.DataFrame, settings: Mapping[str, Mapping[str, Any]]
) -> str:
    rows = headline(detection)
    seeds = sorted(rows["seed"].unique())
    generators = generators_in_order(rows)
    seen = in_order(rows.loc[rows["seen"], "generator"])
    facts = [
        ("profile", f"`{summary['profile']}`"),
        ("data hash", f"`{summary['data_hash']}`"),
        ("methods", ", ".join(f"`{method}`" for method in in_order(rows["method"]))),
        ("seeds", ", ".join(str(seed) for seed in seeds)),
        ("generators seen in training", ", ".join(seen) or "none"),
        ("unseen generators", ", ".join(name for name in generators if name not in seen) or "none"),
        ("test images a generator", _test_images(rows)),
    ]
    rho = rows["rho"].dropna().unique()
    if len(rho):
        facts.append(("rho, the semantic shortcut in training (0.5 = none)", f"{rho[0]:g}"))
    parts = ["## What was run", markdown_table(("", ""), facts).replace("---:", "---")]
    return "\n\n".join([*parts, *_settings_section(settings)])


def _cautions(detection: pd.DataFrame, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before the first number."""
    seeds_of = headline(detection).groupby("method", sort=False)["seed"].nunique()
    seeds, found = int(seeds_of.max()), []
    if seeds == 1:
        found.append("**One seed only:** numbers without an interval, and no difference between methods can be shown.")
    elif seeds < FEW_SEEDS:
        found.append(
            f"**Only {seeds} seeds:** intervals over so few are very wide; run {FEW_SEEDS} or more to compare."
        )
    if fewer := [f"`{method}` ({count})" for method, count in seeds_of.items() if count < seeds]:
        found.append(
            f"**Fewer seeds than the others' {seeds}** of {', '.join(fewer)}: intervals over few are very wide, "
            f"and one has none."
        )
    different = any(
        len(set(values)) > 1 and not key.startswith(NOT_OF_TRAINING) for key, values in _by_setting(settings).items()
    )
    return [*found, DIFFERENT_SETTINGS] if different else found


def _by_setting(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """{setting: its value for each method, in order}, "–" where a method lacks it."""
    for method, own in settings.items():
        if not isinstance(own, Mapping):
            raise ValueError(f"expected the settings of each method, {{method: {{setting: value}}}}, found {method!r}")
    flat = [dict(_flat(own)) for own in settings.values()]
    return {key: [str(own.get(key, "–")) for own in flat] for key in dict.fromkeys(key for own in flat for key in own)}


def _settings_section(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of settings: one value where all methods agree, else each method's own."""
    rows = []
    for key, values in _by_setting(settings).items():
        named = "; ".join(f"{method}: {value}" for method, value in zip(settings, values, strict=True))
        rows.append((f"`{key}`", f"`{values[0] if len(set(values)) == 1 else named}`"))
    if not rows:
        return []
    return ["Settings:", markdown_table(("setting", "value"), rows).replace("---:", "---")]


def _deviations_section(detection: pd.DataFrame, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the method the paper is about, or else of the first one; nothing for settings that are not a whole run's."""
    chosen = settings.get("dgs") or next(iter(settings.values()), {})
    if not {"data", "patches", "model", "train"} <= set(chosen):
        return ""
    rows = deviations(chosen, detection["seed"].nunique())
    note = "The last column is read off the settings above; – is not known from the sources the project was built from."
    table = markdown_table(["what", "paper", "release", "here"], rows)
    return "\n\n".join(["## Where this differs from the paper and the release", note, table])


def _test_images(rows: pd.DataFrame) -> str:
    def span(column: str) -> str:
        low, high = int(rows[column].min()), int(rows[column].max())
        return str(low) if low == high else f"{low} to {high}"

    return f"{span('n_real')} real, {span('n_fake')} fake"


def _headline_section(summary: Mapping[str, Any]) -> str:
    methods = summary["methods"]
    metrics = [metric for metric in HEADLINE if any(metric in numbers for numbers in methods.values())]
    rows = [
        [f"`{name}`", *(_entry(numbers[metric]) if metric in numbers else "–" for metric in metrics)]
        for name, numbers in methods.items()
    ]
    table = markdown_table(["method", *(METRIC_NAMES[metric] for metric in metrics)], rows)
    note = "Per cent: mean over seeds [95 % interval]; plain means over generators, unperturbed images, threshold 0.5."
    macc = [f"`{name}` {_entry(numbers['mAcc'])}" for name, numbers in methods.items() if "mAcc" in numbers]
    paper = (
        f"The paper's mean accuracy (mAcc, per cent, mean [95 % interval]; one Real column and one F.Acc column a "
        f"generator, so for the most part fake recall): {', '.join(macc)}."
    )
    return "\n\n".join(["## Headline", note, table, paper])


def _difference_section(detection: pd.DataFrame, forgetting: pd.DataFrame | None) -> str:
    """Paired differences to the baseline, from `per_seed_values` (not from metrics.json, whose seeds are rounded)."""
    values = per_seed_values(detection, forgetting)
    methods = in_order(values["method"])
    if BASELINE not in methods or len(methods) < 2:
        return ""
    by_seed = values.set_index(["method", "metric", "seed"])["value"].sort_index()
    rows = []
    for name in methods:
        for metric in DIFFERENCES:
            if name == BASELINE or (name, metric) not in by_seed or (BASELINE, metric) not in by_seed:
                continue
            both = pd.concat([by_seed[name, metric], by_seed[BASELINE, metric]], axis=1, join="inner")
            if both.empty:
                continue
            gap = paired_difference(*(100 * both.to_numpy(dtype=float).T))
            rows.append([f"`{name}`", METRIC_NAMES[metric], interval_text(gap), str(len(both)), _verdict(gap)])
    note = (
        f"Percentage points above `{BASELINE}`, seed by seed: mean [95 % interval]. An interval that spans zero reads "
        f'"no difference shown", which is not "no difference".'
    )
    header = ("method", "measure", f"minus `{BASELINE}`", "seeds", "reading")
    parts = [f"## Differences to {BASELINE}", note, markdown_table(header, rows)]
    return "\n\n".join([*parts, *_seeds_and_generators(detection)])


def _seeds_and_generators(detection: pd.DataFrame) -> list[str]:
    """Unseen generators as a table of seeds x generators: mean, IQM, worst, and a second interval of the difference."""
    rows = headline(detection)
    rows = rows[~rows["seen"]]
    if rows.empty or rows["seed"].nunique() < 2:
        return []
    tables = {
        str(method): 100 * part.pivot(index="seed", columns="generator", values="balanced_acc").dropna()
        for method, part in rows.groupby("method", sort=False)
    }
    table = []
    for method, own in tables.items():
        worst = rows[rows["method"] == method].groupby("seed")["balanced_acc"].min()
        middle = stratified_bootstrap(own.to_numpy(), iqm)
        line = [
            f"`{method}`",
            rounded_text(own.to_numpy().mean()),
            interval_text(middle, sign=False),
            plus_minus(worst),
        ]
        gaps = (own - tables[BASELINE]).dropna().to_numpy()
        if method == BASELINE or len(gaps) == 0:
            table.append([*line, "–", "–", "–"])
            continue
        by_seed = seed_interval(gaps.mean(axis=1))
        intervals = [by_seed, stratified_bootstrap(gaps, np.mean), stratified_bootstrap(gaps, iqm)]
        table.append([*line, *map(interval_text, intervals)])
    note = (
        f"Balanced accuracy over all seeds and unseen generators, per cent. IQM: the mean of the middle half of these "
        f"numbers. Its interval, and the second of the difference to `{BASELINE}`, are 95 % bootstrap intervals that "
        f"resample seeds within each generator: they take the generators of a seed for independent, though one "
        f"checkpoint is tested on all, so they are too narrow. Readings go by the t intervals."
    )
    minus = ("difference [t]", "difference [bootstrap]", "IQM of differences")
    header = ("method", "mean", "IQM", "worst generator", *minus)
    return ["### Over seeds and generators", note, markdown_table(header, table)]


def _operating_points(detection: pd.DataFrame) -> str:
    """Threshold 0.5 against the validation threshold, and the rates that no threshold enters."""
    rows = headline(detection)
    unseen = bool((~rows["seen"]).any())
    native = detection[(detection["condition"] == "native") & (detection["applied_to"] == "both")]
    native = native[native["seen"] != unseen]
    rule = native["threshold_rule"].astype(str)
    columns = [("balanced acc. at 0.5", "balanced_acc", "0.5")]
    for split, name in (("val", "at the validation threshold"), ("val_unbiased", "at that of unbiased validation")):
        if (rule == split).any():
            columns.append((name, "balanced_acc", split))
    if (rule == ORACLE).any():
        columns.append(("at each generator's best (oracle)", "balanced_acc", ORACLE))
    columns += [
        ("fakes caught at 1 % false alarms", "tpr_at_1fpr", "0.5"),
        ("at 5 %", "tpr_at_5fpr", "0.5"),
        ("AUROC", "auroc", "0.5"),
        ("calibration error", "ece", "0.5"),
    ]
    table = []
    for method in in_order(rows["method"]):
        line = [f"`{method}`"]
        for _, metric, which in columns:
            cell = native[(native["method"] == method) & (rule == which)]
            line.append(plus_minus(cell.groupby("seed")[metric].mean()))
        table.append(line)
    where = "unseen" if unseen else "seen"
    note = (
        f"Means over {where} generators, per cent ± half the 95 % interval. The validation threshold is chosen on "
        f"validation images alone."
    )
    if (rule == ORACLE).any():
        note += (
            " The oracle's is the best on each generator's own test scores: an upper bound, which nobody could choose, "
            "and which chance lifts above 50 % where there is nothing to tell."
        )
    return "\n\n".join(["## Operating points", note, markdown_table(["method", *(c[0] for c in columns)], table)])


def _generator_section(detection: pd.DataFrame) -> str:
    rows = headline(detection)
    methods = in_order(rows["method"])
    cells = {
        (cell["metric"], cell["generator"], cell["method"]): Interval(cell["mean"], cell["low"], cell["high"])
        for cell in cells_table(detection).to_dict("records")
    }
    parts = ["## By generator", "Per cent, mean over seeds ± half the 95 % interval; the means are plain means."]
    for metric in CELL_METRICS:
        table = []
        for generator in generators_in_order(rows):
            seen = bool(rows.loc[rows["generator"] == generator, "seen"].iloc[0])
            line = [generator, "seen" if seen else "unseen"]
            for method in methods:
                cell = cells.get((metric, generator, method))
                line.append("–" if cell is None else _interval_pm(cell))
            table.append(line)
        for part in (rows[rows["seen"]], rows[~rows["seen"]]):
            if part["generator"].nunique() > 1:
                by_seed = part.groupby(["method", "seed"], sort=False)[metric].mean()
                means = [plus_minus(by_seed[method]) if method in by_seed else "–" for method in methods]
                table.append(["**mean**", "seen" if part["seen"].iloc[0] else "unseen", *means])
        header = ["generator", "in training", *(f"`{method}`" for method in methods)]
        parts += [f"### {CELL_NAMES[metric]}", markdown_table(header, table)]
    return "\n\n".join(parts)


def _robustness_section(detection: pd.DataFrame) -> str:
    """What changes to the test images cost, and whether a method is fragile or reads the change itself."""
    means, where = means_over_generators(detection)
    conditions = conditions_of(means)
    if not conditions:
        return ""
    methods = in_order(means.loc[means["condition"] != NATIVE, "method"])
    table, header = changes(means), ["condition", *(f"`{method}`" for method in methods)]
    native = means[means["condition"] == NATIVE].groupby("method")["balanced_acc"]

    def rows(measure: str) -> list[list[str]]:
        return [
            [f"`{condition.name}`", *(_change(change(table, m, condition.name, measure)) for m in methods)]
            for condition in conditions
        ]

    parts = [
        "## Robustness",
        f"Changed test images, {where} generators; means ± half the 95 % interval. What each condition is, and how to "
        f"tell bias from fragility: docs/robustness.md.",
        "### Balanced accuracy: native, and what a change to all images does to it",
        "Threshold 0.5; per cent, then points above native.",
        markdown_table(header, [["native", *(plus_minus(native.get_group(m)) for m in methods)], *rows("accuracy")]),
        "### Fragile: AUROC with all images changed, minus native",
        "Points. Below 0, evidence of what is fake was destroyed.",
        markdown_table(header, rows("ranking")),
    ]
    if (table["measure"] == "shift").any():
        parts += [
            "### Reads the change: where it moves all scores",
            "Half of (AUROC with reals alone changed − AUROC with fakes alone changed), points. Above 0, changed "
            "images look real to the method; below 0, fake.",
            markdown_table(header, rows("shift")),
            "\n".join(f"- {_reading(method, readings(table, method, conditions))}" for method in methods),
        ]
    return "\n\n".join([*parts, *_format_section(means, conditions, methods)])


def _reading(method: str, found: Mapping[str, Sequence[str]]) -> str:
    words = {
        "fragile": "fragile under",
        "looks real": "takes images for real after",
        "looks fake": "takes images for fake after",
        "none shown": "nothing shown for",
    }
    said = [f"{words[kind]} {', '.join(names)}" for kind, names in found.items() if names]
    return f"`{method}`: {'; '.join(said)}."


def _format_section(means: pd.DataFrame, conditions: Sequence[Condition], methods: Sequence[str]) -> list[str]:
    rows = []
    for name, (condition, applied_to) in format_conditions(conditions).items():
        part = means[(means["condition"] == condition) & (means["applied_to"] == applied_to)]
        cells = []
        for method in methods:
            rates = part.loc[part["method"] == method, ["r_acc", "f_acc"]]
            cells.append(" / ".join(percent_text(float(rate)) for rate in rates.mean()) if len(rates) else "–")
        rows.append([name, *cells])
    if not rows:
        return []
    note = (
        "Accuracy on reals / on fakes, per cent, mean over seeds. All PNG decodes and stores without loss: as native."
    )
    return ["### File format", note, markdown_table(["format", *(f"`{m}`" for m in methods)], rows)]


def _change(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    spread = f" ±{percent_text(interval.high - interval.mean)}" if interval.known else ""
    return f"{percent_text(interval.mean, sign=True)}{spread}"


def _forgetting_section(forgetting: pd.DataFrame | None) -> str:
    if forgetting is None or forgetting.empty:
        return ""
    whole = [name for name in in_order(forgetting["measure"]) if BLOCK not in name]
    blocks = [name for name in in_order(forgetting["measure"]) if BLOCK in name]
    note = (
        "The image tower before and after fine-tuning, times 100: mean over seeds ± half the 95 % interval. Higher is "
        "better, except for drifts and angles (before = 0; an angle of 100 is a right angle). A linear probe is fitted "
        "on one half of the real test images and scored on the other; the effective rank is a share of the features' "
        "dimensions. The silhouette of real against fake is no memory: 100 = the two lie apart, 0 = mixed."
    )
    parts = ["## Forgetting", note, _measures_table(forgetting, whole)]
    if blocks:
        where = "The mean patch token of an image after each vision block, tuned against frozen, as above."
        parts += ["### By vision block", where, _measures_table(forgetting, blocks)]
    return "\n\n".join(parts)


def _measures_table(forgetting: pd.DataFrame, measures: Sequence[str]) -> str:
    methods = in_order(forgetting["method"])
    table = []
    for measure in measures:
        of_measure = forgetting[forgetting["measure"] == measure]
        line = [_measure_text(measure), percent_text(of_measure["before"].mean())]
        line += [plus_minus(of_measure.loc[of_measure["method"] == method, "after"]) for method in methods]
        table.append(line)
    return markdown_table(["measure", "before", *(f"`{method}`" for method in methods)], table)


def _measure_text(measure: str) -> str:
    """A measure in words, with its key: "zero-shot shape (`zero_shot:shape`)"."""
    words = measure.replace("zero_shot:", "zero-shot ").replace("linear_probe:", "linear probe, ")
    words = words.replace("retrieval_", "caption retrieval_").replace("knn_", "kNN_").replace("cka_", "CKA_")
    words = words.replace("silhouette", "silhouette, real against fake").replace(BLOCK, ", block ")
    return f"{words.replace('principal_angle:', 'principal angle, ').replace('_', ' ')} (`{measure}`)"


def _figure_section(figures: Sequence[str | PurePath]) -> str:
    if not figures:
        return ""
    parts = ["## Figures"]
    for figure in figures:
        link = PurePath(figure)
        if link.is_absolute() or os.fspath(figure).startswith("/"):
            raise ValueError(f"expected figure paths relative to the report, found {figure}")
        name, _, suite = link.stem.partition("-")
        caption = CAPTIONS.get(name, name.replace("_", " ").capitalize()) + (f", {suite}" if suite else "")
        parts += [f"![{caption}]({link.as_posix().replace(' ', '%20')})"]
    return "\n\n".join(parts)


def _how_to_read(summary: Mapping[str, Any]) -> str:
    counts = [len(entry["per_seed"]) for numbers in summary["methods"].values() for entry in numbers.values()]
    lines = [
        "**Balanced accuracy** is the mean of the accuracies on reals and on fakes: 50 % is chance, whatever the mix.",
        "**Seen** generators made training images; **unseen** ones did not, and say how a detector generalises.",
        "**Intervals** are 95 % Student t intervals over seeds: they cover training again with other seeds, not other "
        "test images, generators or data. With few seeds they are wide, and may reach beyond 0 or 100 %.",
        "**Differences** are paired by seed, so an interval of a difference can exclude zero where two methods' own "
        'intervals overlap. Where it spans zero the reading is "no difference shown": the run can tell neither which '
        "is better nor that they are equal.",
        "Each interval stands alone: of 20 comparisons without any true difference, one is expected to exclude zero.",
        "**Kept** is after / before, not corrected for chance: a model that guesses does not reach 0 %.",
    ]
    if min(counts, default=0) == 1:
        lines.append("A number without an interval comes from one seed: nothing here says how far it would move.")
    return "\n\n".join(["## How to read this", "\n".join(f"- {line}" for line in lines)])


def _entry(entry: Mapping[str, Any]) -> str:
    if entry["low"] is None:
        return percent_text(entry["mean"])
    return f"{percent_text(entry['mean'])} [{percent_text(entry['low'])}, {percent_text(entry['high'])}]"


def plus_minus(values: pd.Series) -> str:
    """Mean of fractions as per cent, with half its interval where there are several seeds."""
    if values.empty:
        return "–"
    return _interval_pm(seed_interval(values.to_numpy()))


def _interval_pm(interval: Interval) -> str:
    spread = f" ±{percent_text(interval.high - interval.mean)}" if interval.known else ""
    return f"{percent_text(interval.mean)}{spread}"


def _verdict(gap: Interval) -> str:
    if not gap.known:
        return "one seed: no interval"
    if gap.spans_zero:
        return "no difference shown"
    return "higher" if gap.mean > 0 else "lower"


def _flat(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in params.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs
