"""Figures that compare methods in what one number does not say: calibration, paired differences, forgetting by block.

As those of `figures`, whose look and helpers they share: tables in, a Figure out, a takeaway title computed from them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dgs.analysis.figures.detection import (
    BASELINE,
    SUBJECT,
    WIDTH,
    bracket,
    colour,
    comparison,
    marker,
    mean_line,
    method_legend,
    paired_gap,
    plain,
    put_title,
    signed_text,
    style,
    title_lines,
    to_baseline,
    verdict,
)
from dgs.analysis.metrics import in_order, one_rho, per_seed_values, reliability
from dgs.errors import UserError
from dgs.stats import BINS, Interval, rounded_text, seed_interval

FEWEST = 50  # images of a bin, over all seeds, that make a point of a reliability diagram
NARROWEST = 2.0  # points that a panel of a forest plot spans at least
# What a forest plot compares, left to right and down: metric of `per_seed_values`, title of its panel.
COMPARED = {
    "balanced_acc_unseen": "Balanced acc., unseen",
    "worst_generator_balanced_acc": "Worst generator",
    "ap_unseen": "AP, unseen",
    "zero_shot_kept": "Zero-shot kept",
}


def reliability_diagram(scores: pd.DataFrame, seen: Collection[str]) -> Figure:
    """Share of fakes (%) among images of about one predicted probability (%), a line a method; their number below.

    From `metrics.reliability`: unseen generators (else the seen ones), half of the images fake, 15 bins of equal width;
    seeds pooled in a bin, bins of fewer than 50 images left out. On the diagonal probabilities mean what they say;
    below it there are fewer fakes than announced. The legend has the expected calibration error of the pooled images,
    mean over seeds [95 % interval]. Raises UserError as `metrics.detection_table` does.
    """
    bins = reliability(scores, seen)
    unseen = bool(set(scores.loc[scores["label"] == 1, "generator"]) - set(seen))
    methods = in_order(bins["method"])
    errors = {method: seed_interval(_errors(bins[bins["method"] == method])) for method in methods}
    with style():
        fig = Figure(figsize=(WIDTH, 5.6 + 0.27 * len(methods)), layout="constrained")
        top, below = fig.subplots(2, 1, sharex=True, height_ratios=[3.2, 1.0])
        top.plot([0, 100], [0, 100], color="#333333", linewidth=1.0, linestyle="--", zorder=1)
        for method in methods:
            own = bins[bins["method"] == method]
            line = _pooled(own)
            shown = line[line["n"] >= FEWEST]
            look = {"color": colour(method), "marker": marker(method), "markersize": 6}
            top.plot(100 * shown["probability"], 100 * shown["fake"], linewidth=2.0, zorder=3, **look)
            counts = line["n"].reindex(range(BINS), fill_value=0) / own["seed"].nunique()
            edges = np.linspace(0.0, 100.0, BINS + 1)
            below.stairs(counts, edges, color=colour(method), linewidth=1.8)
        top.set_ylabel("Share of fakes (%);\ndashed: calibrated")
        top.set_xlim(0, 100)
        top.set_ylim(0, 100)
        below.set_ylabel("Images\na bin")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        below.set_xlabel("Predicted probability of fake (%)")
        handles = [
            Line2D(
                [], [], color=colour(method), marker=marker(method), linewidth=2,
                label=f"{plain(method)}: {rounded_text(error.mean)}{bracket(error)}",
            )
            for method, error in errors.items()
        ]  # fmt: skip
        fig.legend(
            handles=handles,
            loc="outside lower center",
            title="calibration error in points, mean [95 % interval] over seeds",
            title_fontsize=10,
        )
        put_title(fig, _calibration_takeaway(bins, "unseen" if unseen else "seen"))
    return fig


def difference_forest(detection: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> Figure:
    """Each method minus lora, paired by seed, in percentage points: a row a method, a panel a measure, zero as a line.

    Markers are means, bars 95 % Student t intervals over the seeds that both have, faint dots single seeds; a hollow
    marker = the interval spans zero: no difference shown. Measures that the data do not have are left out, as is a bar
    where there is one seed. Without lora, or with nothing else, a sentence takes the place of panels. Raises UserError
    as `metrics.headline` does.
    """
    values = per_seed_values(detection, forgetting)
    table = 100.0 * values.pivot(index=["method", "seed"], columns="metric", values="value")
    methods = [method for method in in_order(values["method"]) if method != BASELINE]
    shown = [metric for metric in COMPARED if metric in table]
    gaps: dict[tuple[str, str], Interval] = {}
    if BASELINE in in_order(values["method"]):
        for metric in shown:
            for method in methods:
                gap = paired_gap(table[metric], method, BASELINE)
                if gap is not None:
                    gaps[metric, method] = gap
    if not gaps:
        with style():
            fig = Figure(figsize=(WIDTH, 1.2), layout="constrained")
            fig.text(0.5, 0.5, f"No method can be compared with {BASELINE} here.", ha="center")
            put_title(fig, f"Differences to {BASELINE}: none")
        return fig
    shown = [metric for metric in shown if any(metric == of for of, _ in gaps)]
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    with style():
        height = 1.15 + lines * (0.75 + 0.3 * len(methods))
        fig = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = fig.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        for ax, metric in zip(axes, shown, strict=False):
            ax.axvline(0.0, color="#333333", linewidth=1.2, zorder=1)
            for i, method in enumerate(methods):
                if (metric, method) in gaps:
                    both = pd.concat([table[metric][method], table[metric][BASELINE]], axis=1).dropna()
                    _forest_row(ax, i, method, gaps[metric, method], (both.iloc[:, 0] - both.iloc[:, 1]).to_numpy())
            ax.set_title(COMPARED[metric])
            ax.set_yticks(range(len(methods)), [plain(method) for method in methods])
            ax.set_ylim(len(methods) - 0.5, -0.5)
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="y", visible=False)
            low, high = ax.get_xlim()
            room = max(0.0, NARROWEST - (high - low)) / 2.0  # closer up, rounding would look like a difference
            ax.set_xlim(low - room, high + room)
            ax.xaxis.set_major_locator(MaxNLocator(4))
        fig.supxlabel(
            f"Percentage points above {BASELINE}; bars: 95 % interval;\nhollow: no difference shown; dots: seeds",
            fontsize=11,
        )
        put_title(fig, _forest_takeaway(gaps, shown[0]))
    return fig


def _forest_row(ax: Axes, row: int, method: str, gap: Interval, seeds: np.ndarray) -> None:
    ax.scatter(seeds, np.full(len(seeds), row), s=12, color=colour(method), alpha=0.45, linewidths=0, zorder=2)
    ax.errorbar(
        gap.mean,
        row,
        xerr=[[gap.mean - gap.low], [gap.high - gap.mean]] if gap.known else None,
        fmt=marker(method),
        markersize=8,
        color=colour(method),
        markerfacecolor="white" if gap.spans_zero else colour(method),
        markeredgewidth=1.6,
        elinewidth=1.8,
        capsize=3,
        zorder=4,
    )


def _forest_takeaway(gaps: Mapping[tuple[str, str], Interval], metric: str) -> str:
    """How many methods are shown to differ in `metric`, and dgs by how much (else the one that differs most)."""
    own = {method: gap for (of, method), gap in gaps.items() if of == metric}
    what = COMPARED[metric].lower().replace("ap,", "AP,")
    named = SUBJECT if SUBJECT in own else max(own, key=lambda method: abs(own[method].mean))
    gap = own[named]
    if not gap.known:
        return f"{plain(named)} to {plain(BASELINE)}: {what} {signed_text(gap)}"
    text = f"{plain(named)}: {verdict(gap)} {plain(BASELINE)} in {what}, {signed_text(gap)}"
    if len(own) == 1:
        return text
    higher = sum(gap.mean > 0 and not gap.spans_zero for gap in own.values())
    lower = sum(gap.mean < 0 and not gap.spans_zero for gap in own.values())
    longer = f"{text}; {higher} of {len(own)} methods higher, {lower} lower"
    return longer if len(title_lines(longer)) <= 2 else text


def forgetting_blocks(forgetting: pd.DataFrame) -> Figure:
    """Where in the tower it changes: CKA (%) and cosine drift (%) of the mean token after each block, a line a method.

    From the measures cka_block:<k> and cosine_drift_block:<k>, means over seeds with 95 % bands cut at 0 and 100 %.
    Raises UserError where there are none, or for mixed rho.
    """
    one_rho(forgetting, "forgetting table")
    name = forgetting["measure"].astype(str)
    rows = forgetting[name.str.contains("_block:")]
    if rows.empty:
        raise UserError("The forgetting table has no measures of single blocks (cka_block:1, ...) to draw.")
    kind = rows["measure"].str.split(":").str[0]
    rows = rows.assign(kind=kind, block=rows["measure"].str.split(":").str[1].astype(int))
    methods, blocks = in_order(rows["method"]), sorted(rows["block"].unique())
    with style():
        fig = Figure(figsize=(WIDTH, 3.7 + 0.25 * (len(methods) // 3)), layout="constrained")
        axes = fig.subplots(1, 2, sharex=True)
        for ax, (measure, label) in zip(
            axes, {"cka_block": "CKA to frozen (%)", "cosine_drift_block": "Cosine drift (%)"}.items(), strict=True
        ):
            for method in methods:
                own = rows[(rows["kind"] == measure) & (rows["method"] == method)].rename(columns={"block": "step"})
                mean_line(ax, own, "after", 100.0, method, dots=len(blocks) <= 12, top=100.0)
            ax.set_ylim(-3.0, 103.0)
            ax.set_ylabel(label)
            ax.set_xlabel("Vision block")
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        method_legend(fig, methods, bars=False, title="mean over seeds; band or bar: 95 % interval")
        last = rows[(rows["kind"] == "cka_block") & (rows["block"] == blocks[-1])]
        after = 100.0 * last.set_index(["method", "seed"])["after"]
        # A frozen tower would always be the best; in float32 its CKA is 100 % but for the last digits.
        moved = after.groupby("method").transform("min").round(2) < 100.0
        after = after[moved] if moved.any() else after
        text = to_baseline(after, f"CKA after block {blocks[-1]}")
        put_title(fig, text or comparison(f"After block {blocks[-1]}", after, "CKA to frozen"))
    return fig


def _pooled(own: pd.DataFrame) -> pd.DataFrame:
    """One method's bins with the seeds pooled: index bin; n, probability and fake as in `metrics.reliability`."""
    sums = own.assign(probability=own["n"] * own["probability"], fake=own["n"] * own["fake"])
    sums = sums.groupby("bin")[["n", "probability", "fake"]].sum()
    return sums.assign(probability=sums["probability"] / sums["n"], fake=sums["fake"] / sums["n"])


def _errors(own: pd.DataFrame) -> np.ndarray:
    """Calibration error of each seed in percentage points."""
    gap = (own["n"] * (own["probability"] - own["fake"]).abs()).groupby(own["seed"], sort=False).sum()
    return (100.0 * gap / own.groupby("seed", sort=False)["n"].sum()).to_numpy()


def _calibration_takeaway(bins: pd.DataFrame, where: str) -> str:
    """What the images that a method is surest about turn out to be: of dgs where it is there, else of the last."""
    methods = in_order(bins["method"])
    named = SUBJECT if SUBJECT in methods else methods[-1]
    last = bins[(bins["method"] == named) & (bins["bin"] == BINS - 1)]
    if last.empty:
        own = seed_interval(_errors(bins[bins["method"] == named]))
        off = f"{rounded_text(own.mean)} points{bracket(own)}"
        return f"{where.capitalize()} generators: {plain(named)} is off by {off}"
    said, found = (float(_pooled(last)[column].iloc[0]) for column in ("probability", "fake"))
    words = f"where {plain(named)} says {rounded_text(100 * said, 0)} % fake, {rounded_text(100 * found, 0)} % are"
    return f"{where.capitalize()} generators: {words}"
