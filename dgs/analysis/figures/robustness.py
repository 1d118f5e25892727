"""The figure of changed test images: balanced accuracy against the strength of each kind of change."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dgs.analysis.figures.detection import CHANCE, WIDTH, colour, marker, plain, put_title, style
from dgs.analysis.metrics import in_order, one_rho
from dgs.analysis.robustness import MATERIAL, changes, conditions_of, means_over_generators
from dgs.data.conditions import KINDS, NATIVE, Condition, parse_condition
from dgs.errors import UserError
from dgs.stats import rounded_text

_AXES = {
    "jpeg": "JPEG quality",
    "blur": "Blur, σ (px)",
    "resize": "Resize and back, factor",
    "noise": "Noise, σ (8-bit levels)",
}
_WORDS = {
    "jpeg": "JPEG {:g}",
    "blur": "blur of {:g} px",
    "resize": "resizing by {:g}",
    "noise": "noise of {:g} levels",
    "png": "PNG",
}
_LINES: dict[str, Literal["-", ":"]] = {"both": "-", "fake": ":"}
_NOTE = "means over seeds and generators; dashed: chance"
_LABELS = {"both": "real and fake changed", "fake": "fake alone changed"}


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
    methods = in_order(means.loc[means["condition"] != NATIVE, "method"])
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    with style():
        fig = Figure(figsize=(WIDTH, 1.6 + 0.25 * -(-len(methods) // 3) + 2.3 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for ax, kind in zip(axes, kinds, strict=False):
            _panel(ax, kind, [condition for condition in conditions if condition.kind == kind], means, methods)
        for ax in axes[len(kinds) :]:
            ax.remove()
        fig.supylabel(f"Balanced accuracy (%), {where} generators", fontsize=11)
        _legend(fig, methods)
        put_title(fig, _takeaway(means))
    return fig


def _panel(ax: Axes, kind: str, conditions: list[Condition], means: pd.DataFrame, methods: list[str]) -> None:
    finer = sum(condition.severity < 0 for condition in conditions)  # enlarged images come before native ones
    names = [condition.name for condition in conditions]
    names.insert(finer, NATIVE)
    ticks = [f"{condition.strength:g}" for condition in conditions]
    ticks.insert(finer, "none")
    for method in methods:
        for applied_to, line in _LINES.items():
            own = means[(means["method"] == method) & means["applied_to"].isin((applied_to, "both"))]
            own = own[(own["condition"] == NATIVE) | (own["applied_to"] == applied_to)]
            values = [100.0 * own.loc[own["condition"] == name, "balanced_acc"].mean() for name in names]
            ax.plot(
                range(len(names)),
                values,
                line,
                color=colour(method),
                marker=marker(method) if applied_to == "both" else None,
                markersize=5,
                linewidth=2.0 if applied_to == "both" else 1.6,
                zorder=3,
            )
    ax.axhline(CHANCE, color="#333333", linewidth=1.0, linestyle="--", zorder=1)
    ax.set_xticks(range(len(names)), ticks)
    ax.set_xlabel(_AXES[kind])
    ax.grid(axis="x", visible=False)


def _legend(fig: Figure, methods: list[str]) -> None:
    handles = [
        Line2D([], [], color=colour(method), marker=marker(method), markersize=5, linewidth=2, label=plain(method))
        for method in methods
    ]
    handles += [
        Line2D([], [], color="#333333", linestyle=line, linewidth=1.8, label=_LABELS[applied_to])
        for applied_to, line in _LINES.items()
    ]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=2 if len(handles) < 5 else 3, title=_NOTE, title_fontsize=10
    )


def _takeaway(means: pd.DataFrame) -> str:
    """The harshest loss of accuracy and the strongest shift, each of the method it happened to."""
    table = changes(means)
    cells = table.groupby(["measure", "method", "condition"], sort=False)["value"].mean()
    method, condition = cells["accuracy"].idxmin()
    lost = -100 * cells["accuracy"].min()
    text = f"{_words(condition)} costs {plain(method)} {rounded_text(lost)} points"
    if "shift" in cells.index.get_level_values("measure"):
        shift = cells["shift"]
        who, what = shift.abs().idxmax()
        if abs(shift[who, what]) >= MATERIAL:
            text += f"; {_words(what)} makes images look {'real' if shift[who, what] > 0 else 'fake'} to {plain(who)}"
    return text[0].upper() + text[1:]


def _words(name: str) -> str:
    condition = parse_condition(name)
    return _WORDS[condition.kind].format(condition.strength)
