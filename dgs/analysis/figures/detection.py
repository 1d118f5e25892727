"""Figures of a run: each takes tables and returns a matplotlib Figure; no inference, no files, no pyplot state.

Titles state what the data show and are computed from them. A method has one colour and one marker everywhere, and no
kind of image has a method's colour. Sizes suit a README column: at half width (some 400 px) the smallest text is still
about 9 px high; names longer than 20 characters are shortened in the middle. In a notebook, `%matplotlib inline` once
makes a returned figure show.
"""

from __future__ import annotations

import re
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from dgs.analysis.metrics import by_suite, generators_in_order, headline, in_order, one_rho, per_seed_values
from dgs.data.suites import abbreviated
from dgs.errors import UserError
from dgs.stats import Interval, paired_difference, rounded_text, seed_interval

WIDTH = 6.0  # inches; at 150 dpi 900 px, shown at half of it or less
DPI = 150
# What the memory axis shows, the first that was measured: its name in a title, its axis label.
_MEMORY = {
    "zero_shot_kept": ("zero-shot kept", "Zero-shot accuracy kept (% of the frozen model's)"),
    "cka_to_frozen": ("CKA to frozen", "Similarity to the frozen features (CKA, %)"),
}
SUBJECT, BASELINE = "dgs", "lora"  # what titles compare where both are there
CHANCE = 50.0  # per cent balanced accuracy
HARMFUL = "task-harmful"  # the pair whose angle says what suppression can remove
APPLIED = "task-applied"  # by how much a method turned the gradient: 0 without surgery
_PAIR_TITLES = {
    HARMFUL: "task vs harmful",
    "task-beneficial": "task vs beneficial",
    APPLIED: "task vs applied:\nhow far it was turned",
}
TURNED = 0.01  # degrees; less is the noise of arccos near 1
NEIGHBOURS = 10  # of a point in a t-SNE panel
FEWEST = 5  # images that make a t-SNE map
LONGEST = 20  # characters of a name in a figure
CURVE = 3  # points that make a curve; fewer get markers
WIDE = 9  # generators beside each other in a heat map; more are drawn below each other

# Okabe & Ito's colours and three more of similar spacing; told apart under red-green blindness, and by marker besides.
METHOD_COLOURS: dict[str, str] = {
    "probe": "#7f7f7f",
    "lora": "#e69f00",
    "dgs": "#0072b2",
    "suppression_only": "#56b4e9",
    "alignment_only": "#cc79a7",
    "distillation": "#009e73",
    "product_of_experts": "#d55e00",
    "leace": "#8c6d31",
    "dgs_plus": "#332288",
}
METHOD_MARKERS: dict[str, str] = dict(zip(METHOD_COLOURS, "sDoP^vX<>", strict=True))
_SPARE_COLOURS = ("#882255", "#117733", "#999933", "#44aa99", "#aa4466", "#8a5cff")
# Kinds of image (real, generators) are no methods: black and eight colours that no method has, and other markers.
_REAL_COLOUR = "#000000"
_REAL_MARKER = "o"
_GENERATOR_COLOURS = ("#d400d4", "#a8b400", "#7a0000", "#00cfe8", "#ff7f86", "#144729", "#6b0f5b", "#5c7000")
_GENERATOR_MARKERS = "^vD<>PX"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the same glyphs on every machine
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.2,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "svg.hashsalt": "dgs",
}


def style() -> AbstractContextManager[None]:
    """The look of all figures as a context: `with style(): ...` for a plot of one's own; settings end with it."""
    return mpl.rc_context(_RC)


def colour(method: str) -> str:
    """The method's colour as "#rrggbb"; an unlisted name always gets the same spare colour."""
    return METHOD_COLOURS.get(method, _SPARE_COLOURS[zlib.crc32(method.encode()) % len(_SPARE_COLOURS)])


def marker(method: str) -> str:
    """The method's marker (matplotlib code); an unlisted name gets a pentagon."""
    return METHOD_MARKERS.get(method, "p")


def save(fig: Figure, path: str | Path) -> Path:
    """Writes `fig` as PNG at 150 dpi, with bytes that repeat (no software or date entry); parent folders are made.

    Returns the path. The figure is dropped from pyplot where it was made there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with style():
        fig.savefig(target, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(fig)  # no-op for the figures of this module, which pyplot does not know
    return target


def detection_figures(detection: pd.DataFrame) -> dict[str, Figure]:
    """`detection_bars` and `detection_heatmap` by file name: {"detection", "heatmap"}, and "...-<suite>" of each suite.

    One figure of all of the paper's suites could not be read: they have 50 generators.
    """
    drawn = {}
    for suite, part in by_suite(detection).items():
        for name, draw in (("detection", detection_bars), ("heatmap", detection_heatmap)):
            drawn[f"{name}-{suite}" if suite else name] = draw(part, suite)
    return drawn


def detection_bars(detection: pd.DataFrame, suite: str = "") -> Figure:
    """Balanced accuracy (%) of each method on each generator, seen and unseen apart, from the `headline` rows.

    `suite`: named in the title where the rows are one's.

    Bars start at chance and end at the mean over seeds; whiskers are 95 % intervals over seeds, cut at 0 and 100 %,
    dots single seeds. The title is about dgs against lora where both are there, else about the best two. Raises
    UserError as `headline` does.
    """
    rows = headline(detection)
    methods = in_order(rows["method"])
    groups = [
        (title, part)
        for title, part in (("Seen in training", rows[rows["seen"]]), ("Unseen", rows[~rows["seen"]]))
        if not part.empty
    ]
    counts = [part["generator"].nunique() for _, part in groups]
    row_height = max(0.42, 0.13 * len(methods) + 0.12)
    with style():
        fig = Figure(figsize=(WIDTH, 1.75 + 0.35 * len(groups) + row_height * sum(counts)), layout="constrained")
        axes = fig.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
        intervals = []
        for ax, (title, part) in zip(axes, groups, strict=True):
            generators = in_order(part["generator"])
            intervals += _horizontal_bars(
                ax,
                {
                    (generator, method): 100.0
                    * part.loc[(part["generator"] == generator) & (part["method"] == method), "balanced_acc"].to_numpy()
                    for generator in generators
                    for method in methods
                },
                generators,
                methods,
                start=CHANCE,
            )
            short = short_names(rows["generator"])
            ax.set_yticks(range(len(generators)), [short[name] for name in generators])
            ax.set_title(title)
            ax.axvline(CHANCE, color="#333333", linewidth=1.0, linestyle="--", zorder=3)
        values = [*(100.0 * rows["balanced_acc"]), *(end for interval in intervals for end in _ends_drawn(interval))]
        axes[0].set_xlim(max(0.0, min(CHANCE, *values) - 3.0), min(101.0, max(values) + 4.0))
        axes[-1].set_xlabel("Balanced accuracy (%); dashed line: chance")
        method_legend(fig, methods, bars=True, title=_whisker_note(intervals))
        put_title(fig, f"{suite}: {_detection_takeaway(rows)}" if suite else _detection_takeaway(rows))
    return fig


def detection_heatmap(detection: pd.DataFrame, suite: str = "") -> Figure:
    """Balanced accuracy (%) as methods x generators: mean over seeds, and half the 95 % interval where there is one.

    From the `headline` rows; a line parts seen from unseen generators. More than 9 generators are drawn as rows, so
    that the figure keeps its width. `suite`: named in the title where the rows are one's.
    Raises UserError as `headline` does.
    """
    rows = headline(detection)
    methods, generators = in_order(rows["method"]), generators_in_order(rows)
    means = pd.DataFrame(np.nan, index=methods, columns=generators)
    notes = pd.DataFrame("", index=methods, columns=generators, dtype=object)
    for (method, generator), cell in rows.groupby(["method", "generator"], sort=False):
        interval = seed_interval(100.0 * cell["balanced_acc"].to_numpy())
        means.loc[method, generator] = interval.mean
        spread = f"\n±{rounded_text(interval.high - interval.mean)}" if interval.known else ""
        notes.loc[method, generator] = f"{rounded_text(interval.mean)}{spread}"
    n_seen = rows.loc[rows["seen"], "generator"].nunique()
    weakest = 100.0 * rows.groupby(["method", "seed"], sort=False)["balanced_acc"].min()
    names, short = [plain(method) for method in methods], short_names(generators)
    labels = [short[name] for name in generators]
    tall = len(generators) > WIDE
    with style(), mpl.rc_context({"axes.grid": False}):
        height = 3.1 + 0.42 * len(generators) if tall else 2.6 + 0.5 * len(methods)
        fig = Figure(figsize=(WIDTH, height), layout="constrained")
        ax = fig.subplots()
        sns.heatmap(
            means.T if tall else means,
            ax=ax,
            annot=notes.T if tall else notes,
            fmt="",
            annot_kws={"fontsize": 10, "linespacing": 1.05},
            cmap="YlGnBu",
            vmin=min(CHANCE, float(np.floor(means.min().min()))),
            vmax=100.0,
            linewidths=1.0,
            linecolor="white",
            cbar=False,  # the cells name their values
        )
        down, across = (labels, names) if tall else (names, labels)
        ax.set_yticks(np.arange(len(down)) + 0.5, down, rotation=0)
        ax.set_xticks(np.arange(len(across)) + 0.5, across, rotation=40, ha="right", rotation_mode="anchor")
        spreads = notes.stack().str.contains("±").any()
        ax.set_xlabel("Balanced accuracy (%)" + ("; ± half the 95 % interval" if spreads else ""))
        ax.tick_params(length=0)
        if 0 < n_seen < len(generators):
            (ax.axhline if tall else ax.axvline)(n_seen, color="black", linewidth=2.5)
        for title, first, last in (("seen", 0, n_seen), ("unseen", n_seen, len(generators))):
            middle = (first + last) / 2
            if last > first and tall:
                ax.text(len(methods) + 0.05, middle, title, ha="left", va="center", rotation=270, fontsize=11)
            elif last > first:
                ax.text(middle, -0.08, title, ha="center", va="bottom", fontsize=11)
        where = f"{suite}: on its weakest generator" if suite else "On its weakest generator"
        put_title(fig, comparison(where, weakest, "balanced accuracy"))
    return fig


def forgetting_plane(detection: pd.DataFrame, forgetting: pd.DataFrame) -> Figure:
    """Detection against memory: balanced accuracy (%) on unseen generators over the share of zero-shot accuracy kept.

    One marker a method (mean over seeds) with 95 % intervals both ways, cut at 0 and 100 %, and a faint dot a seed.
    The title gives paired differences, dgs to lora where both are there, else between the two that keep most. Without
    unseen generators the seen ones are used, and without zero_shot:* measures (data without named classes) the
    similarity to the frozen features; the axes say so. Methods that were not measured are named in the axis label.
    Raises UserError where no method has either.
    """
    values = per_seed_values(detection, forgetting)
    metric = "balanced_acc_unseen" if (values["metric"] == "balanced_acc_unseen").any() else "balanced_acc_seen"
    where = "unseen" if metric.endswith("unseen") else "seen"
    table = 100.0 * values.pivot(index=["method", "seed"], columns="metric", values="value")
    memory = next((name for name in _MEMORY if name in table), None)
    if memory is None:
        raise UserError("The forgetting table has no zero_shot:* measures and no CKA: there is no share kept to draw.")
    table = table[[metric, memory]].dropna()
    measured = [method for method in in_order(values["method"]) if method in table.index.get_level_values("method")]
    absent = [plain(method) for method in in_order(values["method"]) if method not in measured]
    with style():
        fig = Figure(figsize=(WIDTH, 4.9 + 0.25 * (len(measured) // 3)), layout="constrained")
        ax = fig.subplots()
        intervals = []
        for method in measured:
            part = table.loc[method]
            kept, detected = part[memory].to_numpy(), part[metric].to_numpy()
            x, y = seed_interval(kept), seed_interval(detected)
            intervals += [x, y]
            ax.scatter(kept, detected, s=14, color=colour(method), alpha=0.45, linewidths=0, zorder=2)
            ax.errorbar(
                x.mean,
                y.mean,
                xerr=_whisker(x),
                yerr=_whisker(y),
                fmt=marker(method),
                markersize=9,
                color=colour(method),
                markeredgecolor="white",
                capsize=3,
                zorder=4,
            )
        ax.axvline(100.0, color="#333333", linewidth=1.0, linestyle=":", zorder=1)
        ax.margins(0.08)
        low, high = ax.get_ylim()
        room = max(0.0, 5.0 - (high - low)) / 2.0  # points: closer up, noise would look like a gap
        ax.set_ylim(max(low - room, -3.0), min(high + room, 103.0))
        low, high = ax.get_xlim()
        ax.set_xlim(max(low, -3.0), min(high, max(103.0, table[memory].max() + 3.0)))
        note = f"\nnot measured: {', '.join(absent)}" if absent else ""
        what, axis = _MEMORY[memory]
        ax.set_xlabel(f"{axis}{note}")
        ax.set_ylabel(f"Balanced accuracy,\n{where} generators (%)")
        method_legend(fig, measured, bars=False, title=_whisker_note(intervals))
        put_title(fig, _plane_takeaway(table[memory], table[metric], where, what))
    return fig


def forgetting_bars(forgetting: pd.DataFrame) -> Figure:
    """What each method still knows: every measure before (black tick) and after fine-tuning (bar), in per cent.

    Bars are means over seeds, whiskers 95 % intervals cut at 0 and 100 %, dots single seeds. The title compares as that
    of `detection_bars`. Left out is what is no memory of the tower's output: measures whose `before` is 0 everywhere
    (drifts, angles), those of single blocks, and the silhouette of real against fake. Raises UserError where no measure
    is left, or for mixed rho.
    """
    one_rho(forgetting, "forgetting table")
    known = forgetting.groupby("measure", sort=False)["before"].transform(lambda before: (before != 0).any())
    name = forgetting["measure"].astype(str)
    rows = forgetting[known.astype(bool) & ~name.str.contains("_block:") & (name != "silhouette")]
    if rows.empty:
        raise UserError("The forgetting table has no measure to draw: `before` is 0 or there are no rows.")
    methods, measures = in_order(rows["method"]), in_order(rows["measure"])
    row_height = max(0.42, 0.13 * len(methods) + 0.12)
    with style():
        fig = Figure(figsize=(WIDTH, 2.1 + row_height * len(measures)), layout="constrained")
        ax = fig.subplots()
        cells = {
            (measure, method): 100.0
            * rows.loc[(rows["measure"] == measure) & (rows["method"] == method), "after"].to_numpy()
            for measure in measures
            for method in methods
        }
        intervals = _horizontal_bars(ax, cells, measures, methods, start=0.0)
        for i, measure in enumerate(measures):
            before = 100.0 * rows.loc[rows["measure"] == measure, "before"].mean()
            ax.plot([before, before], [i - 0.45, i + 0.45], color="black", linewidth=2.2, zorder=5)
        ax.set_yticks(range(len(measures)), [_measure_name(measure) for measure in measures])
        ax.set_xlim(0.0, max(101.0, float(100.0 * rows["before"].max()) + 1.0))
        ax.set_xlabel("After fine-tuning (%); black: before")
        method_legend(fig, methods, bars=True, title=_whisker_note(intervals))
        put_title(fig, _forgetting_takeaway(rows))
    return fig


def tsne(features_by_method: Mapping[str, tuple[np.ndarray, pd.DataFrame]], seed: int) -> pd.DataFrame:
    """Points of a t-SNE map a method (van der Maaten & Hinton 2008; scikit-learn, PCA start).

    `features_by_method`: method -> (features, rows), (N, D) floats and a table of the same N images with the columns
    generator and label (0 real, 1 fake). Returns columns method, generator, label, x, y (float64, arbitrary units).
    Fewer than 5 images make no map: their rows are kept with NaN for x and y, and `tsne_panels` says so in their
    place. One thread and one seed: the same points each time. Raises ValueError for lengths that differ.
    """
    parts = []
    for method, (features, rows) in features_by_method.items():
        data = np.asarray(features, dtype=np.float64)
        if data.ndim != 2 or len(data) != len(rows):
            raise ValueError(f"expected (N, D) features of {len(rows)} rows, found {data.shape}")
        place = np.full((len(data), 2), np.nan)
        if len(data) >= FEWEST and (data == data[0]).all():
            place[:] = 0.0  # a collapsed tower: the PCA start would divide by a variance of 0
        elif len(data) >= FEWEST:
            with threadpool_limits(limits=1):  # sums over threads depend on their number
                perplexity = min(30.0, (len(data) - 1) / 3.0)
                map_of = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
                place = map_of.fit_transform(data).astype(np.float64)
        points = rows[["generator", "label"]].reset_index(drop=True)
        parts.append(points.assign(method=method, x=place[:, 0], y=place[:, 1]))
    return pd.concat(parts, ignore_index=True)[["method", "generator", "label", "x", "y"]]


def tsne_panels(points: pd.DataFrame, seed: int | None = None) -> Figure:
    """t-SNE maps side by side, a panel a method (the paper's figure 1): reals black dots, each generator its own look.

    `points`: columns method, generator, label (0 real, 1 fake), x, y, as `tsne` returns them; `seed`: that of the
    checkpoints whose features they are, named in the title ("one seed" where it is not given). A panel's number is the
    share of the 10 nearest neighbours in the map that are of a point's own class, averaged over reals and over fakes:
    50 % = mixed, 100 % = apart. A method without a map (NaN: fewer than 5 images) gets a panel that says so. Colours
    and markers of kinds are no method's, so that a colour means one thing in all figures.
    """
    methods = in_order(points["method"])
    generators = in_order(points.loc[points["label"] == 1, "generator"])
    short = short_names(generators)
    mapped = points.dropna(subset=["x", "y"])
    apart = {method: _neighbour_agreement(mapped[mapped["method"] == method]) for method in in_order(mapped["method"])}
    columns = min(3, len(methods))
    lines = -(-len(methods) // columns)
    in_legend = 3 if max(map(len, short.values()), default=0) < 16 else 2
    with style(), mpl.rc_context({"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        legend_lines = -(-(len(generators) + 1) // in_legend)
        fig = Figure(
            figsize=(WIDTH, 0.95 + (2.2 if columns == 3 else 2.8) * lines + 0.24 * legend_lines), layout="constrained"
        )
        axes = fig.subplots(lines, columns, squeeze=False).ravel()
        for ax in axes[len(methods) :]:
            ax.set_axis_off()
        for ax, method in zip(axes, methods, strict=False):
            part = mapped[mapped["method"] == method]
            real = part[part["label"] == 0]
            ax.scatter(real["x"], real["y"], s=5, c=_REAL_COLOUR, marker=_REAL_MARKER, alpha=0.7, linewidths=0)
            for i, generator in enumerate(generators):
                fake = part[(part["label"] == 1) & (part["generator"] == generator)]
                ax.scatter(fake["x"], fake["y"], s=13, alpha=0.75, linewidths=0, **generator_look(i))
            if method in apart:
                ax.set_title(f"{plain(method)}: {rounded_text(apart[method], 0)} %", loc="center")
            else:
                ax.set_title(plain(method), loc="center")
                ax.text(0.5, 0.5, f"fewer than\n{FEWEST} images", transform=ax.transAxes, ha="center", va="center")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_box_aspect(1.0)
        handles = [Line2D([], [], linestyle="", marker=_REAL_MARKER, markersize=4, color=_REAL_COLOUR, label="real")]
        for i, generator in enumerate(generators):
            look = generator_look(i)
            handles.append(
                Line2D([], [], linestyle="", marker=look["marker"], color=look["color"], label=short[generator])
            )
        fig.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(in_legend, len(handles)),
            title="t-SNE axes have no unit",
            title_fontsize=10,
        )
        put_title(fig, _neighbours_takeaway(apart, "one seed" if seed is None else f"seed {seed}"))
    return fig


def training_curves(training: pd.DataFrame, points: int = 60) -> Figure:
    """Training loss and validation balanced accuracy (%) over optimiser steps, mean over seeds with 95 % intervals.

    `training`: columns method, seed, step, loss_task, val_balanced_acc (NaN but at epoch ends), and where known
    loss_text and rho. The task's loss alone: totals hold other terms for other methods. A method whose loss_text was
    never logged trained the head alone (stage 1); where others trained adapters, it has panels with steps of its own.
    Logs of more than `points` steps are averaged to at most that many bins; the axis says how wide one is. The second
    row is left out where nothing was validated. The title says that validation images are of seen generators and,
    for a rho above 0.5, carry the shortcut of the training set.
    """
    methods = in_order(training["method"])
    text = training.groupby("method")["loss_text"].count() if "loss_text" in training else None
    head_only = [method for method in methods if text is not None and text[method] == 0]
    validated = training.dropna(subset=["val_balanced_acc"])
    losses = training.dropna(subset=["loss_task"])
    stages = {"Stage 1: head": head_only, "Stage 2: adapters": [m for m in methods if m not in head_only]}
    stages = {stage: members for stage, members in stages.items() if members}
    panels = 1 if validated.empty else 2
    with style():
        fig = Figure(figsize=(WIDTH, 1.7 + 1.9 * panels + 0.25 * (len(methods) // 3)), layout="constrained")
        axes = fig.subplots(
            panels,
            len(stages),
            sharex="col",
            sharey="row",
            squeeze=False,
            width_ratios=[1.0, 1.6] if len(stages) == 2 else None,
        )
        for column, (stage, members) in zip(axes.T, stages.items(), strict=True):
            own, width = _binned(losses[losses["method"].isin(members)], points)
            for method in members:
                mean_line(column[0], own[own["method"] == method], "loss_task", 1.0, method)
                if panels == 2:
                    rates = validated[validated["method"] == method]
                    mean_line(column[1], rates, "val_balanced_acc", 100.0, method, dots=True, top=100.0)
            column[0].set_title(stage)
            column[-1].set_xlabel("Optimiser steps" + (f"\n(loss: means over {width})" if width > 1 else ""))
            column[-1].xaxis.set_major_locator(MaxNLocator(4 if len(stages) == 2 else 6, integer=True))
        axes[0, 0].set_ylabel("Training loss\nof the task")
        method_legend(fig, methods, bars=False, lines=True)
        if panels == 2:
            axes[1, 0].set_ylabel("Validation bal.\naccuracy (%)")
            final = validated.sort_values("step", kind="stable").groupby(["method", "seed"], sort=False).last()
            shortcut = "rho" in training and bool((training["rho"] > 0.5).any())
            where = "Final validation (seen generators" + (", training's shortcut)" if shortcut else ")")
            put_title(fig, comparison(where, 100.0 * final["val_balanced_acc"], "balanced accuracy"))
        else:
            last = losses.sort_values("step", kind="stable").groupby(["method", "seed"], sort=False)["loss_task"].last()
            means = last.groupby("method").mean()
            low, high = str(means.idxmin()), str(means.idxmax())
            span = f"{means.min():.3f} ({plain(low)})" + (
                "" if low == high else f" to {means.max():.3f} ({plain(high)})"
            )
            put_title(fig, f"Training loss ends at {span}")
    return fig


def angles_over_training(angles: pd.DataFrame) -> Figure:
    """Angle between two gradients (degrees) over optimiser steps, a panel a pair: mean line, 5-95 % band of samples.

    `angles`: columns rho, method, seed, step, layer, pair, mean, p05, p95 (degrees); seeds and layers are averaged,
    the band's ends too. The title's mean is over all logged steps of a seed, then over seeds, with the 95 % interval
    over seeds. 90 degrees = the gradients do not touch each other, more = they oppose.
    An empty table gives a sentence in place of curves. Raises UserError for mixed rho.
    """
    if angles.empty:
        with style():
            fig = Figure(figsize=(WIDTH, 1.2), layout="constrained")
            fig.text(0.5, 0.5, "No method here trains the tower: there are no gradient angles.", ha="center")
        return fig
    one_rho(angles, "table of gradient angles")
    pairs, methods = in_order(angles["pair"]), in_order(angles["method"])
    columns = len(pairs) if len(pairs) <= 3 else 2
    lines = -(-len(pairs) // columns)
    band = min(0.18, 0.36 / len(methods))  # many bands on top of each other would hide the lines' colours
    steps = np.sort(angles["step"].unique())
    reach = max(1.0, float(steps[-1] - steps[0]))  # of the x axis
    few = len(steps) < CURVE
    with style():
        fig = Figure(figsize=(WIDTH, 1.9 + 2.4 * lines + 0.25 * (len(methods) // 3)), layout="constrained")
        axes = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.ravel()[len(pairs) :]:
            ax.set_axis_off()
        for ax, pair in zip(axes.ravel(), pairs, strict=False):
            for j, (method, linewidth) in enumerate(zip(methods, np.linspace(4.5, 1.8, len(methods)), strict=True)):
                part = angles[(angles["pair"] == pair) & (angles["method"] == method)]
                line = part.groupby("step")[["mean", "p05", "p95"]].mean()
                if few:  # side by side, with the percentiles as bars: a band of one step has no width
                    at = line.index + (j - (len(methods) - 1) / 2) * 0.3 * reach / len(methods)
                    ax.vlines(at, line["p05"], line["p95"], color=colour(method), linewidth=1.5, zorder=3)
                    ax.plot(at, line["mean"], marker(method), color=colour(method), markersize=7, zorder=4)
                    continue
                # Broad below narrow: methods whose angles agree are all seen.
                ax.plot(line.index, line["mean"], color=colour(method), linewidth=linewidth, zorder=3)
                ax.fill_between(line.index, line["p05"], line["p95"], color=colour(method), alpha=band, linewidth=0)
            ax.axhline(90.0, color="#333333", linewidth=1.0, linestyle="--", zorder=2)
            ax.set_title(_PAIR_TITLES.get(pair, _pair_name(pair)), fontsize=10)
            if few:
                ax.set_xticks(steps)
            else:
                ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        if few:
            axes[0, 0].set_xlim(steps[0] - 0.6 * reach, steps[-1] + 0.6 * reach)
        for column in range(columns):
            lowest = axes[(len(pairs) - 1 - column) // columns, column]
            lowest.tick_params(labelbottom=True)  # shared axes hide it above an empty place
            lowest.set_xlabel("Optimiser steps")
        for ax in axes[:, 0]:
            ax.set_ylabel("Angle (degrees)")
        note = f"{'bar' if few else 'band'}: 5th to 95th percentile of samples, mean over seeds\ndashed: orthogonal"
        method_legend(fig, methods, bars=False, lines=not few, title=note)
        put_title(fig, _angles_takeaway(angles))
    return fig


def patches_figure(image: np.ndarray, canvas: np.ndarray) -> Figure:
    """Patch selection before and after: the image with its patch grid, and the 7 x 7 canvas a model sees.

    `image`: (H, W, 3) uint8; `canvas`: (7 * size, 7 * size, 3) uint8, as `dgs.data.patches.select_patches` returns it.
    Raises ValueError for a canvas that is not 7 x 7 patches.
    """
    if canvas.ndim != 3 or canvas.shape[0] != canvas.shape[1] or canvas.shape[0] % 7 or canvas.shape[0] == 0:
        raise ValueError(f"expected a canvas of shape (7 * size, 7 * size, 3), found {canvas.shape}")
    size = canvas.shape[0] // 7
    down, across = image.shape[0] // size, image.shape[1] // size
    with style(), mpl.rc_context({"axes.grid": False}):
        fig = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        left, right = fig.subplots(1, 2)
        for ax, pixels, title, rows, columns in (
            (left, image, "Before", down, across),
            (right, canvas, "After", 7, 7),
        ):
            ax.imshow(pixels, interpolation="nearest")
            for k in range(rows + 1):
                ax.plot([-0.5, columns * size - 0.5], [k * size - 0.5] * 2, color="white", linewidth=0.6)
            for k in range(columns + 1):
                ax.plot([k * size - 0.5] * 2, [-0.5, rows * size - 0.5], color="white", linewidth=0.6)
            ax.set_title(title)
            ax.set_xlabel(f"{pixels.shape[1]} × {pixels.shape[0]} px")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlim(-0.5, pixels.shape[1] - 0.5)
            ax.set_ylim(pixels.shape[0] - 0.5, -0.5)
        patches = f"patches of {size} × {size} px"
        if down * across >= 49:
            put_title(fig, f"Patch selection shows the model 49 of {down * across} {patches}, in a new order")
        else:
            put_title(fig, f"Patch selection fills 49 cells from only {down * across} {patches}")
    return fig


def contact_sheet(images: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """A row of examples a kind of image, named at its left: `images` = {name: (H, W, 3) uint8 arrays}.

    Names are those of `manifest.examples`: "real", "<generator>, real", and "<generator>, seen" or "..., unseen" fakes.
    """
    columns = max(len(row) for row in images.values())
    short = short_names(images)
    short |= {name: abbreviated(name).replace(", ", "\n") for name in images if abbreviated(name) != name}  # of suites
    with style(), mpl.rc_context({"axes.grid": False}):
        fig = Figure(figsize=(WIDTH, 0.5 + 0.68 * len(images)), layout="constrained")
        axes = fig.subplots(len(images), columns, squeeze=False)
        for line, (name, row) in zip(axes, images.items(), strict=True):
            for ax in line:
                ax.axis("off")
            for ax, pixels in zip(line, row, strict=False):
                ax.imshow(pixels, interpolation="nearest")
            line[0].text(-0.15, 0.5, short[name], transform=line[0].transAxes, ha="right", va="center", fontsize=10)
        counts = {kind: sum(name.endswith(f", {kind}") for name in images) for kind in ("seen", "unseen")}
        said = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        plural = "s" if sum(counts.values()) > 1 else ""
        put_title(fig, f"Test images: real ones, and fakes of {said} generator{plural}" if said else "Test images")
    return fig


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names as figures print them: {name: at most 20 characters}, long ones cut in the middle ("…"), all distinct.

    Suites are abbreviated ("AIGI/SDXL"). Names alike at both ends are numbered in order: "diffusion-model-…2".
    """
    given = {name: abbreviated(name) for name in in_order(names)}
    short = {name: label for name, label in given.items() if len(label) <= LONGEST}
    for name, whole in given.items():
        if name in short:
            continue
        label, number = f"{whole[:12]}…{whole[-7:]}", 1
        while label in short.values():
            number += 1
            label = f"{whole[: LONGEST - 1 - len(str(number))]}…{number}"
        short[name] = label
    return {name: short[name] for name in given}


def _horizontal_bars(
    ax: Axes, cells: Mapping[tuple[str, str], np.ndarray], rows: Sequence[str], methods: Sequence[str], start: float
) -> list[Interval]:
    """Grouped bars from `start` to the mean of each cell's seeds, first row on top, with whiskers and seed dots.

    Returns the intervals of the whiskers, as they are before `_whisker` cuts them.
    """
    height = 0.84 / len(methods)
    intervals = []
    for i, row in enumerate(rows):
        for j, method in enumerate(methods):
            values = cells[row, method]
            if len(values) == 0:
                continue
            y = i + (j - (len(methods) - 1) / 2) * height
            interval = seed_interval(values)
            intervals.append(interval)
            ax.barh(y, interval.mean - start, left=start, height=height * 0.92, color=colour(method), zorder=2)
            if interval.known:
                ax.errorbar(
                    interval.mean, y, xerr=_whisker(interval), color="#222222", linewidth=1.3, capsize=2, zorder=4
                )
            ax.scatter(
                values, np.full(len(values), y), s=7, color="white", edgecolors="#222222", linewidths=0.5, zorder=5
            )
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    return intervals


def _binned(losses: pd.DataFrame, points: int) -> tuple[pd.DataFrame, int]:
    """The log with steps moved to the middles of at most `points` bins, and a bin's width; short logs as they are."""
    if losses["step"].nunique() <= points:
        return losses, 1
    width = int(np.ceil((losses["step"].max() - losses["step"].min() + 1) / points))
    return losses.assign(step=(losses["step"] // width) * width + (width - 1) / 2), width


def mean_line(
    ax: Axes, part: pd.DataFrame, column: str, scale: float, method: str, dots: bool = False, top: float = np.inf
) -> None:
    """Mean over seeds at each step with a 95 % band within [0, top]; one seed alone gets no band.

    Fewer than 3 points are marked, with the interval as a bar.
    """
    if part.empty:
        return
    by_seed = part.groupby(["step", "seed"])[column].mean() * scale
    line = pd.DataFrame(
        {step: seed_interval(values.to_numpy())._asdict() for step, values in by_seed.groupby("step")}
    ).T.sort_index()
    low, high = line["low"].clip(lower=0.0), line["high"].clip(upper=top)
    few = len(line) < CURVE
    ax.plot(
        line.index,
        line["mean"],
        color=colour(method),
        linewidth=2.0,
        marker=marker(method) if dots or few else None,
        markersize=6,
        zorder=3,
    )
    if few:
        ax.vlines(line.index, low, high, color=colour(method), linewidth=1.5, zorder=2)
    else:
        ax.fill_between(line.index, low, high, color=colour(method), alpha=0.18, linewidth=0)


def method_legend(
    fig: Figure, methods: Sequence[str], bars: bool, lines: bool = False, title: str | None = None
) -> None:
    """A legend of methods below the panels: patches for bars, lines, or else markers; `title` says what is drawn."""
    handles: list[Patch | Line2D] = []
    for method in methods:
        if bars:
            handles.append(Patch(color=colour(method), label=plain(method)))
        elif lines:
            handles.append(Line2D([], [], color=colour(method), linewidth=3, label=plain(method)))
        else:
            handles.append(
                Line2D(
                    [], [], linestyle="", marker=marker(method), markersize=8, color=colour(method), label=plain(method)
                )
            )
    if title is None:
        title = "dots: seeds; whiskers: 95 % interval" if not lines else "mean over seeds; band or bar: 95 % interval"
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(3, len(handles)),
        title=title,
        title_fontsize=10,
    )


def put_title(fig: Figure, text: str) -> None:
    """The figure's takeaway, at its left edge, in lines that fit its width."""
    fig.suptitle("\n".join(title_lines(text, fig.get_figwidth())), x=0.01, ha="left")


def title_lines(text: str, inches: float = WIDTH) -> list[str]:
    """A title's lines in a figure of that width; units stay with their numbers, methods' names in one piece."""
    per_line = int(inches * 9.0)  # characters of the bold title font that fit into an inch
    unbroken = re.sub(r" (%|points|px|×)", "\u00a0\\1", text).replace("× ", "×\u00a0")  # no unit on a line of its own
    return textwrap.wrap(unbroken, per_line)


def _detection_takeaway(rows: pd.DataFrame) -> str:
    unseen = rows[~rows["seen"]]
    part, where = (unseen, "unseen") if not unseen.empty else (rows, "seen")
    values = 100.0 * part.groupby(["method", "seed"], sort=False)["balanced_acc"].mean()
    return to_baseline(values, where) or comparison(f"On {where} generators", values, "balanced accuracy")


def to_baseline(values: pd.Series, what: str) -> str:
    """One sentence on dgs and the best other method, each minus lora; "" where dgs or lora is absent.

    `values`: per cent, index (method, seed). Differences are paired by seed. The other is left out where it would take
    a third line.
    """
    methods = in_order(values.index.get_level_values("method"))
    gap = paired_gap(values, SUBJECT, BASELINE) if {SUBJECT, BASELINE} <= set(methods) else None
    if gap is None:
        return ""
    subject, baseline = plain(SUBJECT), plain(BASELINE)
    text = f"{subject}: {verdict(gap)} {baseline} ({what} {signed_text(gap, ' points')})"
    if not gap.known:
        text = f"{subject} to {baseline}: {what} {rounded_text(gap.mean, sign=True)} points (one seed: no interval)"
    others = {
        method: other
        for method in methods
        if method not in (SUBJECT, BASELINE)
        if (other := paired_gap(values, method, BASELINE)) is not None
    }
    if others:
        best = max(others, key=lambda method: others[method].mean)
        longer = f"{text}; {plain(best)} {signed_text(others[best])}"
        text = longer if len(title_lines(longer)) <= 2 else text
    return text


def paired_gap(values: pd.Series, first: str, second: str) -> Interval | None:
    """The paired difference over the seeds that both methods have; None without any."""
    both = pd.concat([values[first], values[second]], axis=1, keys=["a", "b"]).dropna()
    return None if both.empty else paired_difference(both["a"].to_numpy(), both["b"].to_numpy())


def verdict(gap: Interval) -> str:
    """How one method compares to another, in words that stand before the other's name."""
    if gap.spans_zero:
        return "no difference shown to"
    return "higher than" if gap.mean > 0 else "lower than"


def signed_text(gap: Interval, unit: str = "") -> str:
    """A difference with its sign and interval: "+1.2 points [+0.3, +2.1]" with unit " points"."""
    return f"{rounded_text(gap.mean, sign=True)}{unit}{bracket(gap, sign=True)}"


def comparison(where: str, values: pd.Series, what: str) -> str:
    """One sentence on the best method and the next, from per-seed values in per cent (index: method, seed)."""
    means = values.groupby("method", sort=False).mean().sort_values(ascending=False, kind="stable")
    best = str(means.index[0])
    if len(means) == 1:
        interval = seed_interval(values.to_numpy())
        return f"{where}, {plain(best)} reaches {rounded_text(interval.mean)} % {what}{bracket(interval)}"
    second = str(means.index[1])
    gap = paired_gap(values, best, second)
    if gap is None:
        first, other = rounded_text(means.iloc[0]), rounded_text(means.iloc[1])
        return f"{where}, {plain(best)} {first} % and {plain(second)} {other} % {what} share no seed"
    points = rounded_text(gap.mean)
    if not gap.known:
        return f"{where}, {plain(best)} is {points} points above {plain(second)} in {what} (one seed: no interval)"
    if gap.spans_zero:
        pair = f"{plain(best)} over {plain(second)} {signed_text(gap, ' points')}"
        return f"{where}, no difference shown in {what}: {pair}"
    return f"{where}, {plain(best)} leads {plain(second)} by {points} points{bracket(gap, sign=True)} of {what}"


def bracket(interval: Interval, sign: bool = False) -> str:
    """The interval in brackets, unbroken, after a space."""
    if not interval.known:
        return " (one seed)"
    return f" [{rounded_text(interval.low, sign=sign)},\u00a0{rounded_text(interval.high, sign=sign)}]"


def _plane_takeaway(kept: pd.Series, detected: pd.Series, where: str, what: str) -> str:
    """Paired differences of dgs to lora, else of the two that keep most, from per-seed per cent (method, seed)."""
    means = kept.groupby("method", sort=False).mean().sort_values(ascending=False, kind="stable")
    first, *others = [str(method) for method in means.index]
    if not others:
        memory, found = (seed_interval(values.to_numpy()) for values in (kept, detected))
        texts = [f"{rounded_text(interval.mean)} %{bracket(interval)}" for interval in (memory, found)]
        return f"{plain(first)}: {what} {texts[0]}, balanced accuracy on {where} {texts[1]}"
    second = others[0]
    if {SUBJECT, BASELINE} <= {first, *others}:
        first, second = SUBJECT, BASELINE
    parts = []
    for name, values in ((what, kept), (where, detected)):
        gap = paired_gap(values, first, second)
        if gap is None:
            return f"{plain(first)} and {plain(second)} share no seed"
        none_shown = "no difference shown, " if gap.known and gap.spans_zero else ""
        parts.append(f"{name} {none_shown}{signed_text(gap, ' points')}")
    return f"{plain(first)} to {plain(second)}: {'; '.join(parts)}"


def _forgetting_takeaway(rows: pd.DataFrame) -> str:
    zero_shot = rows[rows["measure"].astype(str).str.startswith("zero_shot:")]
    part, what = (zero_shot, "zero-shot kept") if not zero_shot.empty else (rows, "share kept")
    ratio = 100.0 * (part["after"] / part["before"]).where(part["before"] != 0)
    kept = ratio.groupby([part["method"], part["seed"]], sort=False).mean()
    if kept.index.get_level_values("method").nunique() == 1:
        interval = seed_interval(kept.to_numpy())
        return f"{plain(str(kept.index[0][0]))}: {what} {rounded_text(interval.mean)} %{bracket(interval)}"
    return to_baseline(kept, what) or comparison("After fine-tuning", kept, what)


def _neighbours_takeaway(apart: Mapping[str, float], seed: str) -> str:
    """One sentence on the shares (%) of neighbours of the same class, {method: share}: numbers, no winner."""
    if not apart:
        return f"No map of features: fewer than {FEWEST} images"
    shares = [f"{plain(method)}\u00a0{rounded_text(value, 0)}\u00a0%" for method, value in apart.items()]
    text = f"Neighbours of the same class: {', '.join(shares)} ({seed})"
    if len(title_lines(text)) <= 2:
        return text  # else the panels name them
    low, high = (rounded_text(end, 0) for end in (min(apart.values()), max(apart.values())))
    return f"Neighbours of the same class: {low} to {high} % in {len(shares)} maps ({seed})"


def _angles_takeaway(angles: pd.DataFrame) -> str:
    """One sentence on mean angles in degrees: over the logged steps of each seed, then over seeds."""
    per_seed = {
        (str(pair), str(method)): seed_interval(part.groupby("seed")["mean"].mean().to_numpy())
        for (pair, method), part in angles.groupby(["pair", "method"], sort=False)
    }
    methods = [method for pair, method in per_seed if pair == HARMFUL]
    if methods:
        none = Interval(0.0, 0.0, 0.0)
        operated = [method for method in methods if per_seed.get((APPLIED, method), none).mean > TURNED]
        named = "dgs" if "dgs" in (operated or methods) else [*operated, *methods][0]
        angle = _degrees(per_seed[HARMFUL, named])
        return f"Over training, task and harmful gradient are {angle} apart in {plain(named)}"
    (pair, method), farthest = max(per_seed.items(), key=lambda item: abs(item[1].mean - 90.0))
    if abs(farthest.mean - 90.0) < 1.0:
        return "Over training, the gradients are orthogonal to within 1° on average"
    return f"Over training, {_pair_name(pair)} is farthest from orthogonal in {plain(method)}: {_degrees(farthest)}"


def _degrees(interval: Interval) -> str:
    return f"{rounded_text(interval.mean)}°{bracket(interval)}"


def _neighbour_agreement(part: pd.DataFrame) -> float:
    label = part["label"].to_numpy()
    count = min(NEIGHBOURS, len(part) - 1)
    place = part[["x", "y"]].to_numpy(dtype=np.float64)
    nearest = NearestNeighbors(n_neighbors=count).fit(place).kneighbors(return_distance=False)
    same = (label[nearest] == label[:, None]).mean(axis=1)
    return float(100.0 * np.mean([same[label == value].mean() for value in np.unique(label)]))


def generator_look(i: int) -> dict[str, str]:
    """Colour and marker of the i-th generator, as matplotlib's keywords."""
    return {
        "color": _GENERATOR_COLOURS[i % len(_GENERATOR_COLOURS)],
        "marker": _GENERATOR_MARKERS[i % len(_GENERATOR_MARKERS)],
    }


def _ends_drawn(interval: Interval) -> tuple[float, float]:
    """Where the whisker of a per cent ends: the interval cut to [0, 100], and never short of the mean itself."""
    if not interval.known:
        return interval.mean, interval.mean
    low, high = max(interval.low, 0.0), min(interval.high, 100.0)
    return min(low, interval.mean), max(high, interval.mean)


def _whisker(interval: Interval) -> list[list[float]]:
    low, high = _ends_drawn(interval)
    return [[interval.mean - low], [high - interval.mean]]


def _whisker_note(intervals: Iterable[Interval]) -> str:
    ends = [(interval, *_ends_drawn(interval)) for interval in intervals if interval.known]
    past = any(low - interval.low > 0.01 or interval.high - high > 0.01 for interval, low, high in ends)
    return "dots: seeds; whiskers: 95 % interval" + (", cut at 0 and 100 %" if past else "")


def plain(method: str) -> str:
    """A method's name as figures print it; its words are not parted at the end of a line."""
    return method.replace("_", "\u00a0")


def _measure_name(measure: str) -> str:
    kind, _, attribute = measure.rpartition(":")
    shown = f"{kind}:{short_names([attribute])[attribute]}"
    return (
        shown.removeprefix(":")
        .replace("zero_shot:", "zero-shot\n")
        .replace("linear_probe:", "linear probe\n")
        .replace("knn_", "kNN ")
        .replace("retrieval_", "caption\nretrieval_")
        .replace("cka_", "CKA ")
        .replace("_", " ")
    )


def _pair_name(pair: str) -> str:
    return pair.replace("_", " ").replace("-", " vs ")
