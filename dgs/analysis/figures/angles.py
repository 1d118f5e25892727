"""Figures of the gradient-angle analysis, from the tables of `angles`, `heads`, `correlation` and `subspaces`.

The rules are those of `figures`: no inference, no files; titles computed from the data; one colour a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator

from dgs.analysis.angles import HEADS, UNSEEN, WITHIN, cosines, degrees
from dgs.analysis.figures.detection import (
    TURNED,
    WIDTH,
    colour,
    mean_line,
    method_legend,
    plain,
    put_title,
    short_names,
    style,
)
from dgs.analysis.figures.plane import Point, in_plane
from dgs.analysis.metrics import in_order
from dgs.stats import rounded_text, seed_interval

RIDGES = 6  # stretches of training, one below the other
_GRID = np.linspace(0.0, 180.0, 361)
_KERNEL = 3.0  # degrees, of the smoothing
_HEAD_COLOURS = {"linear": "#333333", "MLP": "#d400d4"}
# Of the gradients in a plane: no method's colours.
VECTOR_COLOURS = {"task": "#000000", "harmful": "#b2182b", "beneficial": "#1b7837", "applied": "#d400d4"}
_VECTOR_NAMES = {
    "task": "task gradient",
    "harmful": "harmful direction (text)",
    "beneficial": "beneficial direction (image)",
    "applied": "applied gradient",
}
_BATCH_PANELS = {
    "removed": ("Energy removed\n(% of the task's)", 100.0),
    "added": ("Energy added\n(% of the task's)", 100.0),
    "conflict_harmful": ("Samples beyond 90°\nof harm (%)", 100.0),
    "effective_rank": ("Effective rank of\nharmful directions", 1.0),
}


def nothing(why: str) -> Figure:
    """A figure that says in a sentence why there is nothing to draw."""
    with style():
        fig = Figure(figsize=(WIDTH, 1.2), layout="constrained")
        fig.text(0.5, 0.5, why, ha="center")
    return fig


def _density(angles: np.ndarray) -> np.ndarray:
    counts, edges = np.histogram(angles, bins=360, range=(0.0, 180.0))
    middles = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * ((_GRID[:, None] - middles[None]) / _KERNEL) ** 2)
    return kernel @ counts / max(counts.sum(), 1)


def angle_ridges(samples: pd.DataFrame, pair: str = "task-harmful") -> Figure:
    """Distribution of an angle (degrees) over samples as training goes on: a panel a method, a ridge some steps.

    Real images filled, fakes outlined: under linear heads each class has one direction a step. All seeds together,
    smoothed by 3 degrees; ridges have equal heights. `samples`: the logged table.
    """
    if samples.empty:
        return nothing("No gradients were logged: there are no angles.")
    rows = samples[["method", "seed", "step", "label"]].assign(angle=degrees(samples, pair)).dropna()
    methods = in_order(rows["method"])
    steps = np.sort(rows["step"].unique())
    parts = np.array_split(steps, min(RIDGES, len(steps)))
    first, _, second = pair.partition("-")
    columns = len(methods) if len(methods) <= 3 else 2 if len(methods) == 4 else 3
    lines = -(-len(methods) // columns)
    with style():
        fig = Figure(figsize=(WIDTH, 1.7 + 2.7 * lines), layout="constrained")
        axes = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.ravel()[len(methods) :]:
            ax.set_axis_off()
        for ax, method in zip(axes.ravel(), methods, strict=False):
            own = rows[rows["method"] == method]
            for number, part in enumerate(parts):
                here = own[own["step"].isin(part)]
                real, fake = (_density(here.loc[here["label"] == y, "angle"].to_numpy()) for y in (0, 1))
                top = max(real.max(), fake.max(), 1e-9)
                ax.fill_between(
                    _GRID, -number, 0.9 * real / top - number, color=colour(method), alpha=0.55, linewidth=0
                )
                ax.plot(_GRID, 0.9 * fake / top - number, color="#222222", linewidth=1.2)
                ax.axhline(-number, color="#bbbbbb", linewidth=0.7, zorder=0)
            ax.axvline(90.0, color="#333333", linewidth=1.0, linestyle="--", zorder=1)
            ax.set_title(plain(method), fontsize=10)
            ax.grid(visible=False)
            spans = [f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts]
            ax.set_yticks(-np.arange(len(parts)), spans)
        span = rows["angle"].quantile([0.001, 0.999]).to_numpy()
        axes[0, 0].set_xlim(max(0.0, min(span[0], 90.0) - 12.0), min(180.0, max(span[1], 90.0) + 12.0))
        for ax in axes[:, 0]:
            ax.set_ylabel("Optimiser steps")
        for column in range(columns):
            lowest = axes[(len(methods) - 1 - column) // columns, column]
            lowest.tick_params(labelbottom=True)
            lowest.set_xlabel(f"{first} to {second} (°)")
        handles = [
            Patch(color="#999999", label="real images"),
            Line2D([], [], color="#222222", linewidth=1.2, label="fake images"),
            Line2D([], [], color="#333333", linestyle="--", linewidth=1.0, label="orthogonal"),
        ]
        smoothing = f"all seeds, smoothed by {_KERNEL:.0f}° (standard deviation)"
        fig.legend(handles=handles, loc="outside lower center", ncols=3, title=smoothing, title_fontsize=10)
        named = "dgs" if "dgs" in methods else methods[0]
        own = rows[rows["method"] == named]
        means = [rounded_text(own.loc[own["label"] == y, "angle"].mean(), 0) for y in (0, 1)]
        text = f"In {plain(named)}, {first} and {second} are {means[0]}° apart for real images, {means[1]}° for fakes"
        put_title(fig, text)
    return fig


def _arrow(ax: Axes, point: Point, hue: str, **look: Any) -> None:
    ax.annotate(
        "",
        xy=(point.x, point.y),
        xytext=(0, 0),
        # Without shrinking, tips are where the numbers are.
        arrowprops={"arrowstyle": "-|>", "color": hue, "lw": 2.2, "shrinkA": 0, "shrinkB": 0, **look},
    )


def draw_plane(ax: Axes, points: Mapping[str, Point]) -> None:
    """A sample's gradients into `ax`: x along harm, y across it, unit: the task gradient's length.

    Directions are drawn with length 1; what lies out of the plane is left out of an arrow and named in its label.
    """
    shown = {name: point.unit if name in ("harmful", "beneficial") else point for name, point in points.items()}
    for name in ("harmful", "beneficial", "task", "applied"):
        dashed = {"linestyle": "--"} if name in ("harmful", "beneficial") else {}
        _arrow(ax, shown[name], VECTOR_COLOURS[name], **dashed)
    task, applied = shown["task"], shown["applied"]
    ax.plot([task.x, applied.x], [task.y, applied.y], color="#666666", linewidth=1.0, linestyle=":")
    handles = []
    for name in ("task", "harmful", "beneficial", "applied"):
        inside = points[name].inside
        note = "" if inside > 0.995 else f", {rounded_text(100 * inside, 0)} % in this plane"
        handle = Line2D([], [], color=VECTOR_COLOURS[name], linewidth=2.2, label=f"{_VECTOR_NAMES[name]}{note}")
        handle.set_linestyle("--" if name in ("harmful", "beneficial") else "-")
        handles.append(handle)
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
    xs, ys = ([getattr(point, axis) for point in shown.values()] for axis in "xy")
    ax.set_xlim(min(-0.3, *xs) - 0.1, max(1.0, *xs) + 0.15)
    ax.set_ylim(min(-0.3, *ys) - 0.1, max(1.0, *ys) + 0.15)
    ax.set_aspect("equal")
    widest = max(np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim()))
    step = float(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(0.0, widest)[1])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(step))  # one unit both ways
    ax.axhline(0, color="#999999", linewidth=0.8)
    ax.axvline(0, color="#999999", linewidth=0.8)
    ax.set_xlabel("along the harmful direction (task length = 1)")
    ax.set_ylabel("across it")


def surgery_sketch(row: Mapping[str, Any]) -> Figure:
    """The surgery on one real sample, in the plane of its task gradient and its harmful direction.

    `row`: a row of the logged samples, as `angles.one_sample` chooses it.
    """
    points = in_plane(row, tuple(VECTOR_COLOURS))
    frame = pd.DataFrame([row])
    apart, turned = (degrees(frame, pair)[0] for pair in ("task-harmful", "task-applied"))
    removed = 100.0 * cosines(frame, "task", "harmful")[0] ** 2
    with style():
        fig = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        draw_plane(fig.subplots(), points)
        kind = "fake" if row["label"] == 1 else "real"
        text = (
            f"A {kind} image ({plain(row['method'])}, step {row['step']}): {rounded_text(apart, 0)}° from harm, "
            f"{rounded_text(removed)} % of its energy along it; turned by {rounded_text(turned, 0)}°"
        )
        put_title(fig, text)
    return fig


def layer_heatmap(angles: pd.DataFrame) -> Figure:
    """By how many degrees the surgery turns the gradient of each layer's adapters: layers x logged steps.

    A panel a method that turns it at all; mean over seeds. `angles`: the table gradient_angles.csv.
    """
    rows = angles[(angles["layer"] != "features") & (angles["pair"] == "task-applied")]
    turned = [m for m in in_order(rows["method"]) if rows.loc[rows["method"] == m, "mean"].max() > TURNED]
    rows = rows[rows["method"].isin(turned)]
    if rows.empty:
        return nothing("No method here turns the gradient of a layer (or layers were not logged).")
    layers = sorted(rows["layer"].unique(), key=lambda name: (int(name.split(".")[0]), "qkv".index(name[-1])))
    tables = {m: rows[rows["method"] == m].pivot_table(index="layer", columns="step", values="mean") for m in turned}
    top = max(float(table.max().max()) for table in tables.values())
    with style():
        fig = Figure(figsize=(WIDTH, 1.2 + (0.9 + 0.2 * len(layers)) * len(turned)), layout="constrained")
        axes = fig.subplots(len(turned), 1, squeeze=False)[:, 0]
        for ax, (method, table) in zip(axes, tables.items(), strict=True):
            values = table.reindex(layers)
            mesh = ax.pcolormesh(values.to_numpy(), cmap="viridis", vmin=0.0, vmax=top)
            ax.set_yticks(np.arange(len(layers)) + 0.5, [name.replace(".", " ") for name in layers])
            every = max(1, len(values.columns) // 8)
            ax.set_xticks(np.arange(len(values.columns))[::every] + 0.5, values.columns[::every])
            ax.invert_yaxis()
            ax.grid(visible=False)
            ax.tick_params(length=0)
            ax.set_title(plain(method), fontsize=10)
            ax.set_ylabel("Block and projection")
        axes[-1].set_xlabel("Optimiser steps")
        fig.colorbar(mesh, ax=list(axes), label="Turned by (°)", shrink=0.9)
        named = "dgs" if "dgs" in turned else turned[0]
        at = angles[(angles["layer"] == "features") & (angles["pair"] == "task-applied") & (angles["method"] == named)]
        inside, feature = tables[named].mean().mean(), at["mean"].mean()
        steepest = tables[named].mean(axis=1)
        text = (
            f"{plain(named)} turns the adapters' gradients by {rounded_text(inside, 0)}° on average "
            f"({rounded_text(feature, 0)}° at the features), most in block {str(steepest.idxmax()).replace('.', ' ')}"
        )
        put_title(fig, text)
    return fig


def surgery_over_training(batches: pd.DataFrame) -> Figure:
    """Energy removed and added (%), conflicts (%) and effective rank of harmful directions, over optimiser steps.

    Mean over seeds with a 95 % band; peaks of what was added are cut, and its axis says how high they go. `batches`:
    the table of `angles.batch_table`.
    """
    if batches.empty:
        return nothing("No gradients were logged: there is no surgery to show.")
    methods = in_order(batches["method"])
    with style():
        fig = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        axes = fig.subplots(2, 2, sharex=True).ravel()
        for ax, (column, (label, scale)) in zip(axes, _BATCH_PANELS.items(), strict=True):
            for method in methods:
                part = batches[batches["method"] == method]
                smooth = part.assign(step=part["step"] // _width(part) * _width(part))
                mean_line(ax, smooth, column, scale, method, top=100.0 if "conflict" in column else np.inf)
            ax.set_ylabel(label)
        # A batch that is already right has next to no task gradient: its share would hide all others.
        top = max(1.0, 150.0 * float(batches["added"].quantile(0.95)))
        highest = max(float(np.nanmax(line.get_ydata())) for line in axes[1].lines)
        axes[1].set_ylim(-0.02 * top, top)
        if highest > top:
            axes[1].set_title(f"cut: peaks reach {rounded_text(highest, 0)} %", fontsize=10, fontweight="normal")
        axes[3].set_ylim(0.9, max(2.15, 1.1 * batches["effective_rank"].max()))
        axes[3].axhline(2.0, color="#333333", linewidth=1.0, linestyle="--")
        for ax in axes[2:]:
            ax.set_xlabel("Optimiser steps")
        method_legend(
            fig, methods, bars=False, lines=True, title="mean over seeds; band: 95 % interval; dashed: rank 2"
        )
        named = "dgs" if "dgs" in methods else methods[0]
        own = batches[batches["method"] == named]
        removed, added = (100.0 * own.groupby("seed")[c].median().mean() for c in ("removed", "added"))
        text = (
            f"In its median step, {plain(named)} removes {rounded_text(removed)} % of the task gradients' energy and "
            f"adds {rounded_text(added)} %; rank of harm {rounded_text(own['effective_rank'].mean())}"
        )
        put_title(fig, text)
    return fig


def _width(part: pd.DataFrame, points: int = 40) -> int:
    reach = int(part["step"].max() - part["step"].min() + 1)
    return max(1, -(-reach // points))


def rank_figure(ranks: pd.DataFrame) -> Figure:
    """Linear and MLP text head: effective rank of a batch's harmful directions, and angle within a class (degrees).

    The title's ranks are means over the steps. `ranks`: the table of `heads.rank_by_head`, of one seed.
    """
    with style():
        fig = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = fig.subplots(1, 2, sharex=True)
        for ax, column, label in (
            (axes[0], "effective_rank", "Effective rank"),
            (axes[1], "same_class_angle", "Angle within\na class (°)"),
        ):
            for kind in HEADS:
                part = ranks[ranks["head"] == kind]
                ax.plot(part["step"], part[column], color=_HEAD_COLOURS[kind], linewidth=2.2, label=f"{kind} head")
            ax.set_xlabel("Steps of the text head")
            ax.set_ylabel(label)
            highest = float(ranks[column].max())
            ax.set_ylim(-0.03 * highest, 1.05 * highest)  # a line at 0 is a finding: not hidden by the axis
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        mean = ranks.groupby("head")["effective_rank"].mean()
        text = (
            f"Effective rank of a batch's harmful directions: {rounded_text(mean['linear'])} under a linear head "
            f"(2 at most), {rounded_text(mean['MLP'])} under an MLP"
        )
        put_title(fig, text)
    return fig


def correlation_forest(table: pd.DataFrame, measure: str = "angle task-harmful") -> Figure:
    """Correlation of a measure with balanced accuracy over runs, a row a generator, with 95 % intervals.

    Runs of all methods, each method's mean taken off. `table`: that of `correlation.predicts`.
    """
    rows = table[(table["measure"] == measure) & (table["method"] == WITHIN)]
    if rows.empty or rows["low"].isna().all():
        return nothing("Too few runs for a correlation with an interval: train more seeds.")
    names = rows["generator"].tolist()
    short = short_names(names)
    with style():
        fig = Figure(figsize=(WIDTH, 1.5 + 0.33 * len(rows)), layout="constrained")
        ax = fig.subplots()
        for y, (_, row) in enumerate(rows.iterrows()):
            hue = "#000000" if row["generator"] == UNSEEN else "#777777"
            ax.plot([row["low"], row["high"]], [y, y], color=hue, linewidth=2.0)
            ax.plot(row["r"], y, "o", color=hue, markersize=7)
        ax.axvline(0.0, color="#333333", linewidth=1.0, linestyle="--")
        ax.set_yticks(range(len(rows)), [short[name] for name in names])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlim(-1.0, 1.0)
        ax.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
        runs, seeds = (int(rows[name].iloc[0]) for name in ("runs", "seeds"))
        ax.set_xlabel(f"Correlation with balanced accuracy\n({runs} runs of {seeds} seeds, within methods)")
        known = rows.dropna(subset=["low"])
        sure = ((known["low"] > 0) | (known["high"] < 0)).sum()
        whole = rows[rows["generator"] == UNSEEN]
        said = measure.removeprefix("angle ").replace("-", " to ")
        subject = f"The {said} angle" if measure.startswith("angle ") else said.capitalize()
        head = f"{subject}: {sure} of {len(known)} intervals exclude zero"
        if not whole.empty and not np.isnan(whole["low"].iloc[0]):
            one = whole.iloc[0]
            ends = f"[{rounded_text(one['low'], 2)}, {rounded_text(one['high'], 2)}]"
            head += f"; on all unseen r = {rounded_text(one['r'], 2)} {ends}"
        put_title(fig, head)
    return fig


def subspace_figure(table: pd.DataFrame) -> Figure:
    """Mean principal angle (degrees) between update subspaces by layer, what updates write (output side).

    Each method against the first one at equal seeds (95 % interval over seeds); in the first one's colour: itself at
    other seeds; dashed: random subspaces. `table`: that of `subspaces.compare`.
    """
    rows = table[table["side"] == "output"]
    if rows.empty:
        return nothing("Fewer than two runs with adapters: there are no update subspaces to compare.")
    base = str(rows["method"].iloc[0])
    layers = list(dict.fromkeys(rows["layer"]))
    others = [name for name in in_order(rows["other_method"]) if name != base]
    kinds = [*others, base] if (rows["other_method"] == base).any() else others
    at = {name: i for i, name in enumerate(layers)}
    means = {}
    with style():
        fig = Figure(figsize=(WIDTH, 3.7), layout="constrained")
        ax = fig.subplots()
        for j, kind in enumerate(kinds):
            part = rows[rows["other_method"] == kind]
            hue = colour(kind)
            shift = (j - (len(kinds) - 1) / 2) * 0.14
            found = {name: seed_interval(own["mean"].to_numpy()) for name, own in part.groupby("layer", sort=False)}
            label = f"{plain(base)}, other seeds" if kind == base else f"{plain(kind)} to {plain(base)}, same seed"
            xs = [at[str(name)] + shift for name in found]
            ax.plot(xs, [i.mean for i in found.values()], "o-", color=hue, markersize=5, linewidth=1.4, label=label)
            known = [(x, i) for x, i in zip(xs, found.values(), strict=True) if i.known]
            ax.vlines([x for x, _ in known], [i.low for _, i in known], [i.high for _, i in known], color=hue)
            means[kind] = part["mean"].mean()
        chance = rows.groupby("layer")["random"].first().reindex(layers)
        ax.plot(range(len(layers)), chance, color="#333333", linestyle="--", linewidth=1.0, label="random subspaces")
        ax.set_xticks(range(len(layers)), [name.replace(".", " ") for name in layers], rotation=40)
        ax.set_xlabel("Block and projection")
        ax.set_ylabel("Mean principal\nangle (°)")
        ax.set_ylim(0.0, 95.0)
        fig.legend(loc="outside lower center", ncols=2)
        named = "dgs" if "dgs" in others else (others or [base])[0]
        how = f"{plain(named)} and {plain(base)}" if named != base else f"Seeds of {plain(base)}"
        text = (
            f"{how} write into subspaces {rounded_text(means[named], 0)}° apart on average; "
            f"random ones are {rounded_text(float(chance.mean()), 0)}° apart"
        )
        put_title(fig, text)
    return fig
