"""Figures of gradient angles: over training, sample by sample, layer by layer, in subspaces, and against accuracy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter1d

from dgs.analysis.angles import HEADS, NO_HARM, UNSEEN, WITHIN, degrees, depth, has_harm, over_seeds
from dgs.analysis.figures import style as look
from dgs.analysis.figures.style import colour, marker, plain, short_names, style, subject_of
from dgs.analysis.metrics import one_rho
from dgs.stats import Interval, rounded_text

HARMFUL = "task-harmful"  # the pair whose angle says what suppression can remove
APPLIED = "task-applied"  # by how much a method turned the gradient: 0 without surgery
TURNED = 0.01  # degrees; less is the noise of arccos near 1
RIDGES = 6  # stretches of training, one below the other
POINTS = 40  # of a curve; longer logs are averaged in bins
KERNEL = 3.0  # degrees, of the smoothing
_GRID = np.arange(0.25, 180.0, 0.5)  # degrees: middles of bins
_PAIR_TITLES = {APPLIED: "task vs applied:\nhow far it was turned"}
_HEAD_COLOURS = {"linear": "#333333", "MLP": "#d400d4"}
_BATCH_PANELS = {
    "removed": "Energy removed\n(% of the task's)",
    "added": "Energy added\n(% of the task's)",
    "conflict_harmful": "Samples beyond 90°\nof harm (%)",
    "effective_rank": "Effective rank of\nharmful directions",
}


@style()
def angles_over_training(angles: pd.DataFrame) -> Figure:
    """Angle between two gradients (degrees) over optimiser steps, a panel a pair: mean line, 5-95 % band of samples.

    `angles`: columns rho, method, seed, step, layer, pair, mean, p05, p95 (degrees); seeds and layers are averaged,
    the band's ends too. The title's mean is over all logged steps of a seed, then over seeds. 90 degrees = the
    gradients do not touch each other, more = they oppose.
    An empty table gives a sentence in place of curves. Raises UserError for mixed rho.
    """
    if angles.empty:
        return look.nothing("No method here trains the tower: there are no gradient angles.")
    one_rho(angles, "table of gradient angles")
    pairs, methods = list(angles["pair"].unique()), list(angles["method"].unique())
    table = angles.groupby(["pair", "method", "step"])[["mean", "p05", "p95"]].mean()
    known = {(pair, method) for pair, method, _ in table.index}
    steps = np.sort(angles["step"].unique())
    reach = max(1.0, float(steps[-1] - steps[0]))  # of the x axis
    few = len(steps) < look.CURVE
    labels = {"x": "Optimiser steps", "y": "Angle (degrees)"}
    fig, axes = look.panels(len(pairs), 1.35, 2.4, 3 if len(pairs) <= 3 else 2, **labels, sharex=True, sharey=True)
    for ax, pair in zip(axes, pairs, strict=True):
        for j, method in enumerate(methods):
            if (pair, method) not in known:
                continue
            line, hue = table.loc[pair, method], colour(method)
            its = {**look.method_look(method), "markersize": 7}
            if few:  # side by side, with the percentiles as bars: a band of one step has no width
                at = line.index + (j - (len(methods) - 1) / 2) * 0.3 * reach / len(methods)
                ax.vlines(at, line["p05"], line["p95"], color=hue, linewidth=1.5, zorder=3)
                ax.plot(at, line["mean"], linestyle="", zorder=4, **its)
                continue
            # Broad below narrow: methods whose angles agree are all seen.
            width = 1.8 if j == len(methods) - 1 else 4.5 - 2.7 * j / (len(methods) - 1)
            every = (j * len(line) // (4 * len(methods)), max(1, len(line) // 4))
            ax.plot(line["mean"], linewidth=width, markevery=every, zorder=3, **its)
            band = min(0.18, 0.36 / len(methods))  # many bands on top of each other would hide the lines' colours
            ax.fill_between(line.index, line["p05"], line["p95"], color=hue, alpha=band, linewidth=0)
        ax.axhline(90.0, **look.LINE)
        ax.set_title(_PAIR_TITLES.get(pair, _pair_name(pair)), fontsize=10)
        if few:
            ax.set(xticks=steps, xlim=(steps[0] - 0.6 * reach, steps[-1] + 0.6 * reach))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    note = f"{'bar' if few else 'band'}: 5th to 95th percentile of samples, mean over seeds\ndashed: orthogonal"
    return look.finish(fig, _angles_takeaway(angles), note, methods)


@style(axes__grid=False)
def angle_ridges(samples: pd.DataFrame) -> Figure:
    """Angles to harm (degrees) of samples as training goes on: a panel a method, a ridge some steps.

    Real images filled, fakes outlined: under linear heads each class has one direction a step. All seeds together,
    smoothed by 3 degrees; ridges have equal heights. `samples`: the logged table.
    """
    if samples.empty:
        return look.nothing("No gradients were logged: there are no angles.")
    if not has_harm(samples):
        return look.nothing(NO_HARM)
    rows = samples[["method", "seed", "step", "label"]].assign(angle=degrees(samples, HARMFUL)).dropna()
    methods, steps = list(rows["method"].unique()), np.sort(rows["step"].unique())
    parts = np.array_split(steps, min(RIDGES, len(steps)))
    spans = [f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts]
    labels = {"x": "task to harmful (°)", "y": "Optimiser steps"}
    columns = 2 if len(methods) == 4 else 3
    fig, axes = look.panels(len(methods), 1.0, 2.7, columns, **labels, sharex=True, sharey=True)
    for ax, method in zip(axes, methods, strict=True):
        own = rows[rows["method"] == method]
        for number, part in enumerate(parts):
            here = own[own["step"].isin(part)]
            real, fake = (_density(here.loc[here["label"] == y, "angle"].to_numpy()) for y in (0, 1))
            unit = 0.9 / max(real.max(), fake.max(), 1e-9)
            ax.fill_between(_GRID, -number, unit * real - number, color=colour(method), alpha=0.55, linewidth=0)
            ax.plot(_GRID, unit * fake - number, color="#222222", linewidth=1.2)
            ax.axhline(-number, color="#bbbbbb", linewidth=0.7, zorder=0)
        ax.axvline(90.0, **look.LINE)
        ax.set_title(plain(method), fontsize=10)
        ax.set_yticks(-np.arange(len(parts)), spans)
    low, high = rows["angle"].quantile([0.001, 0.999])
    axes[0].set_xlim(max(0.0, min(low, 90.0) - 12.0), min(180.0, max(high, 90.0) + 12.0))
    handles = [
        Patch(color="#999999", label="real images"),
        look.handle("fake images", color="#222222", linewidth=1.2),
        look.handle("orthogonal", **look.LINE),
    ]
    named = subject_of(methods)
    means = rows[rows["method"] == named].groupby("label")["angle"].mean().reindex([0, 1])
    apart = (rounded_text(mean, 0) + "°" if np.isfinite(mean) else "unknown" for mean in means)
    text = "In {}, task and harmful are {} apart for real images, {} for fakes".format(plain(named), *apart)
    return look.finish(fig, text, f"all seeds, smoothed by {KERNEL:.0f}° (standard deviation)", more=handles)


@style(axes__grid=False)
def layer_heatmap(angles: pd.DataFrame) -> Figure:
    """By how many degrees the surgery turns the gradient of each layer's adapters: layers x logged steps.

    A panel a method that turns it at all; mean over seeds. `angles`: the table gradient_angles.csv.
    """
    turned = angles[angles["pair"] == APPLIED]
    rows = turned[turned["layer"] != "features"]
    methods = [m for m in rows["method"].unique() if rows.loc[rows["method"] == m, "mean"].max() > TURNED]
    if not methods:
        return look.nothing("No method here turns the gradient of a layer (or layers were not logged).")
    layers = sorted(rows["layer"].unique(), key=depth)
    means = rows.pivot_table(index=["method", "layer"], columns="step", values="mean")
    tables = {m: means.loc[m].reindex(layers).rename(lambda name: name.replace(".", " ")) for m in methods}
    top = max(float(table.max().max()) for table in tables.values())
    fig, axes = look.panels(len(methods), 1.2, 0.9 + 0.2 * len(layers), columns=1)
    for ax, (method, table) in zip(axes, tables.items(), strict=True):
        every = max(1, table.shape[1] // 8)
        sns.heatmap(
            table, ax=ax, cmap="viridis", vmin=0.0, vmax=top, cbar=False, xticklabels=every, yticklabels=True
        )  # fmt: skip
        ax.tick_params(length=0, labelrotation=0)
        ax.set_title(plain(method), fontsize=10)
        ax.set(xlabel="", ylabel="Block and projection")
    axes[-1].set_xlabel("Optimiser steps")
    fig.colorbar(axes[0].collections[0], ax=axes, label="Turned by (°)", shrink=0.9)
    named = subject_of(methods)
    at = turned[(turned["layer"] == "features") & (turned["method"] == named)]["mean"].mean()
    inside, steepest = tables[named].mean().mean(), tables[named].mean(axis=1).idxmax()
    text = f"{plain(named)} turns the adapters' gradients by {rounded_text(inside, 0)}° on average "
    return look.finish(fig, f"{text}({rounded_text(at, 0)}° at the features), most in block {steepest}")


@style()
def surgery_over_training(batches: pd.DataFrame) -> Figure:
    """Energy removed and added (%), conflicts (%) and effective rank of harmful directions, over optimiser steps.

    Mean over seeds with a 95 % band; peaks of what was added are cut, and its axis says how high they go. `batches`:
    the table of `angles.batch_table`.
    """
    if batches.empty:
        return look.nothing("No gradients were logged: there is no surgery to show.")
    if batches["effective_rank"].isna().all():
        return look.nothing(NO_HARM)
    methods = list(batches["method"].unique())
    width = max(1, -(-int(batches["step"].max() - batches["step"].min() + 1) // POINTS))
    percent = batches.assign(step=batches["step"] // width * width)
    percent[["removed", "added", "conflict_harmful"]] *= 100.0
    table = percent.groupby(["method", "seed", "step"], sort=False)[list(_BATCH_PANELS)].mean().reset_index()
    fig, panels = look.panels(len(_BATCH_PANELS), 5.0, x="Optimiser steps", sharex=True)
    axes = dict(zip(_BATCH_PANELS, panels, strict=True))
    for column, ax in axes.items():
        look.curves(ax, table, "step", column, methods, top=100.0 if "conflict" in column else np.inf)
        ax.set_ylabel(_BATCH_PANELS[column])
    # A batch that is already right has next to no task gradient: its share would hide all others.
    top = max(1.0, 1.5 * float(percent["added"].quantile(0.95)))
    highest = float(table.groupby(["method", "step"])["added"].mean().max())
    axes["added"].set_ylim(-0.02 * top, top)
    if highest > top:
        axes["added"].set_title(f"cut: peaks reach {rounded_text(highest, 0)} %", fontsize=10, fontweight="normal")
    axes["effective_rank"].set_ylim(0.9, max(2.15, 1.1 * batches["effective_rank"].max()))
    axes["effective_rank"].axhline(2.0, **look.LINE)
    named = subject_of(methods)
    own = percent[percent["method"] == named]
    removed, added = (rounded_text(own.groupby("seed")[c].median().mean()) for c in ("removed", "added"))
    text = (
        f"In its median step, {plain(named)} removes {removed} % of the task gradients' energy and adds {added} %; "
        f"rank of harm {rounded_text(own['effective_rank'].mean())}"
    )
    return look.finish(fig, text, "mean over seeds; band: 95 % interval; dashed: rank 2", methods)


@style()
def rank_figure(ranks: pd.DataFrame) -> Figure:
    """Linear and MLP text head: effective rank of a batch's harmful directions, and angle within a class (degrees).

    The title's ranks are means over the steps. `ranks`: the table of `angles.text_head_ranks`, of one seed.
    """
    if ranks.empty:
        return look.nothing(NO_HARM)
    fig, axes = look.panels(2, 2.7, x="Steps of the text head", sharex=True)
    labels = {"effective_rank": "Effective rank", "same_class_angle": "Angle within\na class (°)"}
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        its = {"hue": "head", "palette": _HEAD_COLOURS, "linewidth": 2.2, "legend": False}
        sns.lineplot(ranks, x="step", y=column, ax=ax, **its)
        highest = float(ranks[column].max())
        ax.set(ylabel=label, ylim=(-0.03 * highest, 1.05 * highest))  # a line at 0 is a finding: it is seen
    means = ranks.groupby("head")["effective_rank"].mean()
    under = "{} under a linear head (2 at most), {} under an MLP".format(*(rounded_text(means[kind]) for kind in HEADS))
    handles = [look.handle(f"{kind} head", color=hue) for kind, hue in _HEAD_COLOURS.items()]
    return look.finish(fig, f"Effective rank of a batch's harmful directions: {under}", more=handles)


@style()
def correlation_forest(table: pd.DataFrame) -> Figure:
    """Correlation of the angle to harm with balanced accuracy over runs, a row a generator, with 95 % intervals.

    Runs of all methods, each method's mean taken off. `table`: that of `angles.correlations`.
    """
    rows = table[(table["measure"] == f"angle {HARMFUL}") & (table["method"] == WITHIN)].reset_index(drop=True)
    known = rows.dropna(subset=["low"])
    if known.empty:
        return look.nothing("Too few runs for a correlation with an interval: train more seeds.")
    fig, (ax,) = look.panels(1, 1.5, 0.33 * len(rows))
    hues = ["#000000" if name == UNSEEN else "#777777" for name in rows["generator"]]
    ax.hlines(rows.index, rows["low"], rows["high"], hues, linewidth=2.0)
    ax.scatter(rows["r"], rows.index, s=49, c=hues, zorder=3)
    ax.axvline(0.0, **look.LINE)
    ax.set_yticks(rows.index, list(short_names(rows["generator"]).values()))
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-1.0, 1.0), xticks=[-1.0, -0.5, 0.0, 0.5, 1.0])
    runs, seeds = (int(rows[name].iloc[0]) for name in ("runs", "seeds"))
    ax.set_xlabel(f"Correlation with balanced accuracy\n({runs} runs of {seeds} seeds, within methods)")
    sure = ((known["low"] > 0) | (known["high"] < 0)).sum()
    whole = known.loc[known["generator"] == UNSEEN, "r"]
    average = "" if whole.empty else f"; on all unseen r = {rounded_text(whole.iloc[0], 2)}"
    return look.finish(fig, f"The task to harmful angle: {sure} of {len(known)} intervals exclude zero{average}")


@style()
def subspace_figure(table: pd.DataFrame) -> Figure:
    """Mean principal angle (degrees) between update subspaces by layer, what updates write (output side).

    Each method against the first one at equal seeds (95 % interval over seeds); in the first one's colour: itself at
    other seeds; dashed: random subspaces. `table`: that of `angles.compare_updates`.
    """
    rows = table[table["side"] == "output"]
    if rows.empty:
        return look.nothing("Fewer than two runs with adapters: there are no update subspaces to compare.")
    base, layers = str(rows["method"].iloc[0]), list(rows["layer"].unique())
    others = [name for name in rows["other_method"].unique() if name != base]
    kinds = [*others, base] if (rows["other_method"] == base).any() else others
    chance = rows.groupby("layer")["random"].first().reindex(layers)
    fig, (ax,) = look.panels(1, 3.0)
    sns.pointplot(
        rows, x="layer", y="mean", order=layers, **look.by_method(kinds, "other_method"), errorbar=look.ends(),
        markers=[marker(kind) for kind in kinds], dodge=0.14 * (len(kinds) - 1), markersize=5, linewidth=1.4, ax=ax,
    )  # fmt: skip
    ax.plot(range(len(layers)), chance, **look.LINE)
    ax.set_xticks(range(len(layers)), [name.replace(".", " ") for name in layers], rotation=40)
    ax.set(xlabel="Block and projection", ylabel="Mean principal\nangle (°)", ylim=(0.0, 95.0))
    handles = [
        look.handle(
            f"{plain(base)}, other seeds" if kind == base else f"{plain(kind)} to {plain(base)}, same seed",
            **look.method_look(kind),
        )
        for kind in kinds
    ]  # fmt: skip
    handles.append(look.handle("random subspaces", **look.LINE))
    named = subject_of(others or [base])
    apart = rounded_text(rows.loc[rows["other_method"] == named, "mean"].mean(), 0)
    how = f"{plain(named)} and {plain(base)}" if named != base else f"Seeds of {plain(base)}"
    random = rounded_text(float(chance.mean()), 0)
    text = f"{how} write into subspaces {apart}° apart on average; random ones are {random}° apart"
    return look.finish(fig, text, more=handles, columns=2)


def _density(angles: np.ndarray) -> np.ndarray:
    counts, _ = np.histogram(angles, bins=len(_GRID), range=(0.0, 180.0))
    return gaussian_filter1d(counts / max(counts.sum(), 1), KERNEL / (_GRID[1] - _GRID[0]), mode="constant")


def _angles_takeaway(angles: pd.DataFrame) -> str:
    """One sentence on mean angles in degrees: over the logged steps of each seed, then over seeds."""
    pairs = {str(pair): over_seeds(part, "mean") for pair, part in angles.groupby("pair", sort=False)}
    if HARMFUL in pairs:
        applied = pairs.get(APPLIED, {})
        operated = [method for method in pairs[HARMFUL] if method in applied and applied[method].mean > TURNED]
        named = subject_of(operated or pairs[HARMFUL])
        angle = _degrees(pairs[HARMFUL][named])
        return f"Over training, task and harmful gradient are {angle} apart in {plain(named)}"
    found = {(pair, method): mean for pair, own in pairs.items() for method, mean in own.items()}
    (pair, method), farthest = max(found.items(), key=lambda item: abs(item[1].mean - 90.0))
    if abs(farthest.mean - 90.0) < 1.0:
        return "Over training, the gradients are orthogonal to within 1° on average"
    return f"Over training, {_pair_name(pair)} is farthest from orthogonal in {plain(method)}: {_degrees(farthest)}"


def _degrees(interval: Interval) -> str:
    return f"{rounded_text(interval.mean)}°" + ("" if interval.known else " (one seed)")


def _pair_name(pair: str) -> str:
    return pair.replace("_", " ").replace("-", " vs ")
