"""Figures of detection: by generator, as a table of colours, paired with lora, of a study, scores, robustness."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgs.analysis.differences import intervals, is_crossed, key_of
from dgs.analysis.figures import style as look
from dgs.analysis.figures.style import (
    CHANCE,
    colour,
    marker,
    plain,
    short_names,
    style,
    subject_of,
    takeaway,
)
from dgs.analysis.metrics import (
    by_suite,
    generators_in_order,
    headline,
    label_of,
    native_rows,
    one_rho,
    reliability,
    unique,
)
from dgs.analysis.robustness import MATERIAL, changes, conditions_of, means_over_generators
from dgs.analysis.verdicts import risk_by_coverage, verdict_table
from dgs.conditions import KINDS, NATIVE, parse_condition
from dgs.errors import UserError
from dgs.stats import BINS, Interval, interval_text, rounded_text, seed_interval

WIDE = 9  # generators beside each other in a heat map; more are drawn below each other
FEWEST = 50  # images of a bin, over all seeds, that make a point of a reliability diagram
NARROWEST = 2.0  # points that a panel of a forest plot spans at least
BESIDE = ("worst_generator_balanced_acc", "zero_shot_kept")  # in a forest plot, beside what has crossed intervals
_LINES = {"both": ("-", "real and fake changed"), "fake": (":", "fake alone changed")}


def by_suites(name: str, draw: Callable[..., Figure], detection: pd.DataFrame, *told: Any) -> dict[str, Figure]:
    """What `draw` makes of the table, {name: figure}, or of each suite of the paper apart, {"<name>-<suite>": figure}.

    One figure of all of the paper's suites could not be read: they have 50 generators. `draw` is given the rows, the
    suite's name and `told`.
    """
    suites = by_suite(detection).items()
    return {f"{name}-{suite}" if suite else name: draw(part, suite, *told) for suite, part in suites}


@style()
def detection_by_generator(detection: pd.DataFrame, suite: str = "", differences: pd.DataFrame | None = None) -> Figure:
    """Balanced accuracy (%) of each method on each generator, seen and unseen apart, from the `headline` rows.

    Dots are means over seeds with 95 % intervals, cut at 0 and 100 %; faint ones are single seeds. `suite`: named in
    the title where the rows are one's. `differences`: as `differences.difference_table` gives them; the title goes by
    their crossed intervals, by those over seeds without. Raises UserError as `headline` does.
    """
    rows = headline(detection)
    short = short_names(rows["generator"].unique())
    rows = rows.assign(value=100.0 * rows["balanced_acc"], generator=rows["generator"].map(short))
    methods = list(rows["method"].unique())
    groups = {("Seen in training", "Unseen")[unseen]: part for unseen, part in rows.groupby(~rows["seen"])}
    counts = [part["generator"].nunique() for part in groups.values()]
    height = 0.9 + 0.35 * len(groups) + max(0.4, 0.12 * len(methods)) * sum(counts)
    x = "Balanced accuracy (%); dashed: chance"
    fig, axes = look.panels(len(groups), height, columns=1, x=x, sharex=True, height_ratios=counts)
    for ax, (title, part) in zip(axes, groups.items(), strict=True):
        look.dots(ax, part, "generator", methods)
        ax.set_title(title)
        ax.axvline(CHANCE, **look.LINE)
    where, part = list(groups.items())[-1]
    what = f"{suite}: {where.split()[0].lower()} generators" if suite else f"{where.split()[0]} generators"
    found = [] if differences is None or suite else list(intervals(differences[differences["rate"] == "balanced_acc"]))
    own = [(row, gap) for row, gap, *_ in found if gap.known and row.pictures == where.split()[0].lower()]
    if own:
        claim = f"{what}: {_counted([gap for _, gap in own], plain(own[0][0].other))}"
    else:
        claim = takeaway(what, part.groupby(["method", "seed"], sort=False)["value"].mean())
    return look.finish(fig, claim, look.SEEDS, methods)


def _counted(gaps: Sequence[Interval], baseline: str) -> str:
    above, below = (sum(gap.mean * sign > 0 and not gap.spans_zero for gap in gaps) for sign in (1, -1))
    return f"{above} of {len(gaps)} shown above {baseline}, {below} below"


@style(axes__grid=False)
def detection_heatmap(detection: pd.DataFrame, suite: str = "") -> Figure:
    """Balanced accuracy (%) as methods x generators: mean over seeds, and half the 95 % interval where there is one.

    From the `headline` rows; a line parts seen from unseen generators. More than 9 generators are drawn as rows, so
    that the figure keeps its width. `suite`: named in the title where the rows are one's.
    Raises UserError as `headline` does.
    """
    rows = headline(detection)
    methods, generators = list(rows["method"].unique()), generators_in_order(rows)
    names = {method: plain(method) for method in methods} | short_names(generators)
    n_seen, n_all = rows.loc[rows["seen"], "generator"].nunique(), len(generators)
    tall = n_all > WIDE
    grouped = (100.0 * rows["balanced_acc"]).groupby([rows["method"], rows["generator"]], sort=False)
    cells = {cell: seed_interval(values.to_numpy()) for cell, values in grouped}
    table = pd.DataFrame(cells.values(), pd.MultiIndex.from_tuples(cells))  # columns mean, low, high
    means, highs = (table[end].unstack().loc[methods, generators] for end in ("mean", "high"))
    if tall:
        means, highs = means.T, highs.T
    spread = highs - means
    notes = means.map(rounded_text) + spread.map(lambda half: f"\n±{rounded_text(half)}" if np.isfinite(half) else "")
    x = "Balanced accuracy (%)" + ("; ± half the 95 % interval" if spread.notna().any(axis=None) else "")
    fig, (ax,) = look.panels(1, 3.1 + 0.42 * n_all if tall else 2.6 + 0.5 * len(methods))
    sns.heatmap(
        means, ax=ax, annot=notes, fmt="", annot_kws={"fontsize": 10, "linespacing": 1.05}, cmap="YlGnBu",
        vmin=min(CHANCE, float(np.floor(means.min().min()))), vmax=100.0, linewidths=1.0, linecolor="white", cbar=False,
        xticklabels=True, yticklabels=True,
    )  # fmt: skip
    ax.set(xlabel=x, ylabel="")
    ax.tick_params(length=0)
    ax.set_yticks(ax.get_yticks(), [names[name] for name in means.index], rotation=0)
    ax.set_xticks(ax.get_xticks(), [names[name] for name in means], rotation=40, ha="right", rotation_mode="anchor")
    if 0 < n_seen < n_all:
        (ax.axhline if tall else ax.axvline)(n_seen, color="black", linewidth=2.5)
    for title, first, last in (("seen", 0, n_seen), ("unseen", n_seen, n_all)):
        middle = (first + last) / 2
        if last > first and tall:
            ax.text(means.shape[1] + 0.05, middle, title, ha="left", va="center", rotation=270)
        elif last > first:
            ax.text(middle, -0.08, title, ha="center", va="bottom")
    weakest = 100.0 * rows.groupby(["method", "seed"], sort=False)["balanced_acc"].min()
    return look.finish(fig, takeaway(f"{suite}: weakest generator" if suite else "Weakest generator", weakest))


def difference_forest(differences: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> Figure:
    """Each method minus the baseline (`forest`): a panel for balanced accuracy, AP, the worst generator and memory.

    Args:
        differences: as `differences.difference_table` gives them; measures that it lacks are left out.
        forgetting: says if the text side in a measure was trained to the tower.
    """
    shown = is_crossed(differences) | differences["rate"].isin(BESIDE)
    labels = {
        measure: (label := label_of(key_of(*measure), forgetting))[:1].upper() + label[1:]
        for measure in zip(differences["rate"], differences["pictures"], strict=True)
    }
    return forest([(labels[row.rate, row.pictures], row, *of) for row, *of in intervals(differences[shown])])


def condition_forest(differences: Mapping[str, pd.DataFrame], rate: str = "balanced_acc") -> Figure:
    """Each method minus the baseline (`forest`) in one rate with crossed intervals: a panel a condition.

    `differences`: as `differences.difference_table` gives them, by condition.
    """
    return forest(
        [
            (name, row, *of)
            for name, table in differences.items()
            for row, *of in intervals(table[is_crossed(table) & (table["rate"] == rate)])
        ]
    )


@style()
def forest(gaps: Sequence[tuple[str, Any, Interval, Interval, Interval]]) -> Figure:
    """Differences to a baseline in points: a row a method, a panel a measure or a condition, zero as a line.

    Markers are means; thick bars 95 % crossed intervals (seeds, generators and test images as random), thin ones over
    seeds alone; a hollow marker: no difference shown. A method that a panel lacks leaves its row empty.

    Args:
        gaps: (panel, row of the table of differences, and of `differences.intervals` the crossed interval, that over
            seeds, and the one that the reading goes by).
    """
    if not gaps:
        return look.nothing("No method can be compared with lora or the probe here.")
    panels, methods = unique(panel for panel, *_ in gaps), unique(row.method for _, row, *_ in gaps)
    baseline = plain(gaps[0][1].other)
    fig, axes = look.panels(len(panels), 1.3, 0.75 + 0.3 * len(methods), sharey=True)
    for panel, row, crossed, seeds, decisive in gaps:
        ax, y, its = axes[panels.index(panel)], methods.index(row.method), look.method_look(row.method)
        ax.plot(crossed[1:], [y, y], color=its["color"], linewidth=7, alpha=0.3, solid_capstyle="butt", zorder=2)
        ax.plot(seeds[1:], [y, y], color=its["color"], linewidth=1.6, zorder=3)
        filled = "white" if decisive.spans_zero else its["color"]
        ax.plot([seeds.mean], [y], **its, markersize=8, markerfacecolor=filled, markeredgewidth=1.4, zorder=4)
    for ax, panel in zip(axes, panels, strict=True):
        ax.axvline(0.0, **look.LINE | {"linestyle": "-"})
        ax.set_yticks(range(len(methods)), [plain(method) for method in methods])
        ax.set(ylim=(len(methods) - 0.5, -0.5), title=panel)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        low, high = ax.get_xlim()
        room = max(0.0, NARROWEST - (high - low)) / 2.0  # closer up, rounding would look like a difference
        ax.set_xlim(low - room, high + room)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    bars = (
        "thick: 95 % over seeds, generators and\nimages; thin: over seeds"
        if gaps[0][2].known
        else "bars: 95 % over seeds"
    )
    fig.supxlabel(f"Points above {baseline}; {bars}; hollow: no difference shown", fontsize=11)
    first = [decisive for panel, *_, decisive in gaps if panel == panels[0]]
    known = "" if any(gap.known for gap in first) else " (no interval)"
    return look.finish(fig, f"{panels[0]}: {_counted(first, baseline)}{known}")


@style()
def reliability_diagram(scores: pd.DataFrame, seen: Collection[str]) -> Figure:
    """Share of fakes (%) among images of about one predicted probability (%), a line a method; their number below.

    From `metrics.reliability`: unseen generators (else the seen ones), half of the images fake, 15 bins of equal width;
    seeds pooled in a bin, bins of fewer than 50 images left out. On the diagonal probabilities mean what they say;
    below it there are fewer fakes than announced. The legend has the expected calibration error of the pooled images,
    mean over seeds [95 % interval]. Raises UserError as `metrics.detection_table` does.
    """
    bins = reliability(scores, seen)
    unseen = set(scores.loc[scores["label"] == 1, "generator"]) - set(seen)
    methods = list(bins["method"].unique())
    sums = bins.assign(probability=bins["n"] * bins["probability"], fake=bins["n"] * bins["fake"])
    pooled = sums.groupby(["method", "bin"], sort=False)[["n", "probability", "fake"]].sum().reset_index()
    pooled[["probability", "fake"]] = 100.0 * pooled[["probability", "fake"]].div(pooled["n"], axis=0)
    sums["off"] = 100.0 * (sums["probability"] - sums["fake"]).abs()
    per_seed = sums.groupby(["method", "seed"], sort=False)[["off", "n"]].sum()
    errors = {m: seed_interval((own["off"] / own["n"]).to_numpy()) for m, own in per_seed.groupby("method", sort=False)}
    fig, (top, below) = look.panels(2, 4.5, columns=1, sharex=True, height_ratios=[3.2, 1.0])
    top.plot([0, 100], [0, 100], **look.LINE)
    handles = []
    for method in methods:
        own = pooled[pooled["method"] == method].sort_values("bin")
        shown = own[own["n"] >= FEWEST]
        its = look.method_look(method)
        top.plot(shown["probability"], shown["fake"], linewidth=2.0, zorder=3, **its)
        counts = own.set_index("bin")["n"].reindex(range(BINS), fill_value=0)
        seeds = bins.loc[bins["method"] == method, "seed"].nunique()
        below.stairs(counts / seeds, np.linspace(0.0, 100.0, BINS + 1), color=colour(method), linewidth=1.8)
        handles.append(look.handle(f"{plain(method)}: {interval_text(errors[method], sign=False)}", **its))
    top.set(ylabel="Share of fakes (%);\ndashed: calibrated", xlim=(0, 100), ylim=(0, 100))
    below.set(ylabel="Images\na bin", xlabel="Predicted probability of fake (%)")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    named = subject_of(methods)
    surest = pooled[(pooled["method"] == named) & (pooled["bin"] == BINS - 1)]
    text = f"{plain(named)} is off by {rounded_text(errors[named].mean)} points"
    if not surest.empty:
        said, found = (rounded_text(surest[column].iloc[0], 0) for column in ("probability", "fake"))
        text = f"where {plain(named)} says {said} % fake, {found} % are"
    note = "calibration error in points, mean [95 % interval] over seeds"
    return look.finish(fig, f"{'Unseen' if unseen else 'Seen'} generators: {text}", note, more=handles, columns=1)


@style()
def risk_coverage(scores: pd.DataFrame, seen: Collection[str]) -> Figure:
    """Wrong decisions (%) among the surest images against the share (%) of images that are decided, a line a method.

    From `verdicts.risk_by_coverage`: unseen generators (else the seen ones), the threshold chosen on validation images;
    means over seeds and generators. A detector that knows when it is unsure falls to the left; a flat line is as wrong
    where it is sure. The legend has the mean of the curve (AURC) over seeds [95 % interval].

    Raises:
        UserError: no run has enough validation images.
    """
    table = risk_by_coverage(scores, seen)
    if table.empty:
        raise UserError("Expected validation images of both labels among the scores, found too few.")
    table = table[table["seen"] == table["seen"].all()]
    verdicts = verdict_table(scores, seen)
    areas = 100 * verdicts[verdicts["seen"] == verdicts["seen"].all()].groupby(["method", "seed"])["aurc"].mean()
    methods = list(table["method"].unique())
    curves = 100.0 * table.groupby(["method", "coverage"], sort=False)["risk"].mean()
    fig, (ax,) = look.panels(1, 1.2, 3.0)
    handles = []
    for method in methods:
        its = look.method_look(method)
        own = curves[method]
        ax.plot(100.0 * own.index.to_numpy(), own, linewidth=2.0, markersize=4, zorder=3, **its)
        area = interval_text(seed_interval(areas[method].to_numpy()), sign=False)
        handles.append(look.handle(f"{plain(method)}: {area}", **its))
    ax.set(xlabel="Images decided, the surest first (%)", ylabel="Wrong among them (%)", xlim=(0, 102))
    ax.set_ylim(bottom=0)
    named = subject_of(methods)
    half, whole = (rounded_text(float(curves[named][at])) for at in (0.5, 1.0))
    text = f"{plain(named)} is wrong on {half} % of its surer half, {whole} % of all"
    where = "Seen" if table["seen"].all() else "Unseen"
    return look.finish(
        fig, f"{where} generators: {text}", "AURC, per cent, mean [95 % interval] over seeds", more=handles, columns=1
    )


def probabilities(scores: pd.DataFrame, seen: Collection[str]) -> dict[str, Figure]:
    """`reliability_diagram` as "calibration", and `risk_coverage` where validation images allow it."""
    found = {"calibration": reliability_diagram(scores, seen)}
    if not verdict_table(scores, seen).empty:
        found["risk_coverage"] = risk_coverage(scores, seen)
    return found


@style()
def score_histograms(scores: pd.DataFrame, seen: Collection[str]) -> Figure:
    """Densities of logits of real images, of fakes by seen and by unseen generators: a panel a method, zero dashed.

    Seeds pooled, test images as they are; the outermost half per cent on each side is left out. Methods have scales of
    their own: what counts is how far the kinds lie apart, and what lies on the wrong side of zero.
    """
    rows = native_rows(scores[scores["split"] == "test"])
    fake = rows["label"] == 1
    kinds = {
        "real": (~fake, "#000000"),
        "fake, generator seen": (fake & rows["generator"].isin(seen), "#999999"),
        "fake, unseen": (fake & ~rows["generator"].isin(seen), "#B2182B"),
    }
    drawn = {name: (chosen, hue) for name, (chosen, hue) in kinds.items() if chosen.any()}
    methods, (last, last_hue) = unique(rows["method"]), list(drawn.values())[-1]
    fig, axes = look.panels(len(methods), 0.6, 1.7, x="Logit; above 0: called generated", y="Density")
    missed, alarms = {}, {}
    for ax, method in zip(axes, methods, strict=True):
        own = rows["method"] == method
        low, high = np.percentile(rows.loc[own, "logit"], [0.5, 99.5])
        bins = np.linspace(low, high, 41) if high > low else np.linspace(low - 0.5, low + 0.5, 41)
        for chosen, hue in drawn.values():
            heights, _ = np.histogram(rows.loc[own & chosen, "logit"], bins, density=True)
            ax.stairs(np.nan_to_num(heights), bins, color=hue, linewidth=1.6)
        ax.axvline(0.0, **look.LINE)
        called = rows["logit"] > 0
        alarms[method], missed[method] = (100.0 * float(of.mean()) for of in (called[own & ~fake], ~called[own & last]))
        ax.set(title=plain(method), yticks=[], ylim=(0.0, 1.25 * ax.get_ylim()[1]))
        for x, side, share, what, hue in (
            (0.01, "left", missed, "missed", last_hue),
            (0.99, "right", alarms, "alarms", "k"),
        ):
            ax.text(
                x,
                0.97,
                f"{rounded_text(share[method], 0)} % {what}",
                color=hue,
                ha=side,
                va="top",
                transform=ax.transAxes,
            )
    handles = [look.handle(name, color=hue) for name, (_, hue) in drawn.items()]
    what = "unseen" if "fake, unseen" in drawn else "seen"
    said = [f"{_range(alarms)} of reals called generated", f"{_range(missed)} of {what} fakes called real"]
    return look.finish(fig, "; ".join(said), more=handles)


def _range(shares: Mapping[str, float]) -> str:
    """The least and the greatest of shares (%) by method: "12 % (dgs plus) to 34 % (lora)"."""
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    return " to ".join(f"{rounded_text(shares[one], 0)} % ({plain(one)})" for one in dict.fromkeys((least, most)))


def robustness(detection: pd.DataFrame) -> dict[str, Figure]:
    """{"robustness": `robustness_curves`}, or nothing where no images were changed."""
    changed = any(condition.kind in KINDS for condition in conditions_of(detection))
    return {"robustness": robustness_curves(detection)} if changed else {}


@style()
def robustness_curves(detection: pd.DataFrame) -> Figure:
    """Balanced accuracy (%, threshold 0.5) of each method against the strength of a change, a panel a kind.

    Means over unseen generators (seen ones where there are no others) and seeds. Solid: all images changed. Dotted:
    fakes alone; where it leaves the solid line the detector reads the change itself. Raises UserError where the table
    has no condition with a strength, or mixes values of rho.
    """
    one_rho(detection, "detection table")
    means, where = means_over_generators(detection)
    conditions = conditions_of(means)
    kinds = [kind for kind in KINDS if any(condition.kind == kind for condition in conditions)]
    if not kinds:
        raise UserError("The detection table has no changed images: set evaluate.robustness.conditions first.")
    methods = list(means.loc[means["condition"] != NATIVE, "method"].unique())
    rates = 100.0 * means.groupby(["condition", "applied_to", "method"])["balanced_acc"].mean()
    fig, axes = look.panels(len(kinds), 1.2, 2.3, sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        places = {condition.name: f"{condition.strength:g}" for condition in conditions if condition.kind == kind}
        finer = sum(condition.severity < 0 for condition in conditions if condition.kind == kind)  # enlarged: before
        at = [*[*places][:finer], NATIVE, *[*places][finer:]]
        for method in methods:
            for applied_to, (line, _) in _LINES.items():
                values = [rates.get((n, "both" if n == NATIVE else applied_to, method), np.nan) for n in at]
                mark = marker(method) if applied_to == "both" else ""
                ax.plot(values, line, color=colour(method), marker=mark, markersize=6, linewidth=1.8, zorder=3)
        ax.axhline(CHANCE, **look.LINE)
        ax.set_xticks(range(len(at)), [places.get(name, "none") for name in at])
        ax.set_xlabel(KINDS[kind].axis)
        ax.grid(axis="x", visible=False)
    fig.supylabel(f"Balanced accuracy (%), {where} generators", fontsize=11)
    lines = [look.handle(label, color="#333333", linestyle=line) for line, label in _LINES.values()]
    note = "means over seeds and generators; dashed: chance"
    return look.finish(fig, _harshest(means), note, methods, lines)


def _harshest(means: pd.DataFrame) -> str:
    """The harshest loss of accuracy and the strongest shift, each of the method it happened to."""
    cells = changes(means).groupby(["measure", "method", "condition"], sort=False)["value"].mean()
    method, condition = cells["accuracy"].idxmin()
    points = rounded_text(-100 * cells["accuracy"].min())
    text = f"{parse_condition(condition).words} costs {plain(method)} {points} points"
    if "shift" in cells.index.get_level_values("measure"):
        shift = cells["shift"]
        who, what = shift.abs().idxmax()
        if abs(shift[who, what]) >= MATERIAL:
            side = "real" if shift[who, what] > 0 else "fake"
            text += f"; {parse_condition(what).words} makes images look {side} to {plain(who)}"
    return text[0].upper() + text[1:]
