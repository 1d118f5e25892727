"""Pictures of the explorer: an image with its patches, its gradients in a plane, settings swept, and mistakes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from dgs.analysis.explore import Settings, Subject, harmful_directions, measure, operate
from dgs.analysis.figures.angles import VECTOR_COLOURS, draw_plane
from dgs.analysis.figures.detection import WIDTH, put_title, short_names, style
from dgs.analysis.figures.plane import in_plane
from dgs.stats import rounded_text

_FLAT, _BUSY = "#00cfe8", "#d400d4"  # the two halves of patch selection
_SETTINGS = {
    "lam": "Alignment weight λ",
    "eps": "Epsilon",
    "rank": "Rank (directions)",
}
DRAWN_DPI = 90  # of what follows a slider: drawn anew with every move


def png(fig: Figure, dpi: int = DRAWN_DPI) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    with style():
        FigureCanvasAgg(fig)
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _picture(ax: Axes, pixels: np.ndarray, title: str) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)


def portrait(subject: Subject, patch_size: int) -> Figure:
    """The image with the patches that selection keeps outlined, what the model sees, the score and the caption."""
    with style(), mpl.rc_context({"axes.grid": False}):
        fig = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        left, right = fig.subplots(1, 2)
        _picture(left, subject.image, f"{subject.image.shape[1]} × {subject.image.shape[0]} px")
        _picture(right, subject.view, "what the model sees")
        if subject.patches is not None:
            across = subject.image.shape[1] // patch_size
            low = len(subject.patches) // 2
            for place, index in enumerate(subject.patches):
                y, x = divmod(int(index), across)
                hue = _FLAT if place < low else _BUSY
                corner = (x * patch_size, y * patch_size)
                side = patch_size - 1
                left.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=hue, linewidth=1.1))
            handles = [
                Line2D([], [], color=_FLAT, label="flattest patches"),
                Line2D([], [], color=_BUSY, label="busiest patches"),
            ]
            fig.legend(handles=handles, loc="outside lower center", ncols=2, title=f"“{subject.caption}”")
        else:
            fig.supxlabel(f"“{subject.caption}”", fontsize=10)
        kind = "fake" if subject.label == 1 else "real"
        score = rounded_text(100 * subject.probability)
        put_title(fig, f"A {kind} image, {subject.verdict}: probability of being generated {score} %")
    return fig


def surgery_plane(subject: Subject, settings: Settings) -> Figure:
    """The sample's gradients before and after surgery with some settings, in the plane of task and harm.

    Raises ValueError for a subject without gradients.
    """
    if subject.gradients is None:
        raise ValueError("expected a subject with gradients; a frozen tower has none")
    directions = harmful_directions(subject.gradients, settings)
    products, said = measure(operate(subject.gradients, settings), directions)
    with style():
        fig = Figure(figsize=(WIDTH, 5.4))
        ax = fig.add_axes((0.13, 0.34, 0.82, 0.54))
        draw_plane(ax, in_plane(products, tuple(VECTOR_COLOURS)))
        put_title(fig, sentence(said))
    return fig


def sentence(said: dict[str, float]) -> str:
    """What `explore.measure` found, in words."""
    if np.isnan(said["turned"]):
        return (
            "Nothing is left of this gradient" if not np.isnan(said["harm"]) else "There is no gradient to operate on"
        )
    against = ", against it" if said["conflict"] else ""
    return (
        f"{rounded_text(said['harm'])}° from harm{against}: {rounded_text(100 * said['removed'], 2)} % of the energy "
        f"removed, {rounded_text(100 * said['added'], 2)} % added, turned by {rounded_text(said['turned'])}°"
    )


def sweep_figure(table: pd.DataFrame) -> Figure:
    """By how much each setting alone turns the gradient (degrees): the sliders, for where they cannot be moved.

    `table`: that of `explore.sweeps`, numbers only.
    """
    names = [name for name in _SETTINGS if (table["setting"] == name).any()]
    with style():
        fig = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        for ax, name in zip(np.atleast_1d(fig.subplots(1, len(names), sharey=True)), names, strict=True):
            part = table[table["setting"] == name]
            ax.plot(range(len(part)), part["turned"], "o-", color=VECTOR_COLOURS["applied"], markersize=4)
            every = max(1, len(part) // 3)
            ticks = list(range(0, len(part), every))
            ax.set_xticks(ticks, [f"{part['value'].iloc[i]:g}" for i in ticks], fontsize=9)
            ax.set_xlabel(_SETTINGS[name])
        fig.axes[0].set_ylabel("Turned by (°)")
        fig.axes[0].set_ylim(bottom=0.0)
        spread = table.groupby("setting", sort=False)["turned"].agg(np.ptp)
        strongest = str(spread.idxmax())
        put_title(fig, f"On this image, {_SETTINGS[strongest][0].lower() + _SETTINGS[strongest][1:]} matters most")
    return fig


def mistakes_sheet(mistakes: pd.DataFrame, images: Sequence[np.ndarray]) -> Figure:
    """The most confident mistakes, a row a generator: each image with the probability that the model gave.

    `mistakes`: the table of `explore.confident_mistakes`; `images`: one a row of it.
    """
    groups = list(dict.fromkeys(mistakes["group"]))
    columns = int(mistakes.groupby("group").size().max())
    short = short_names(groups)
    with style(), mpl.rc_context({"axes.grid": False}):
        fig = Figure(figsize=(WIDTH, 0.8 + 0.98 * len(groups)), layout="constrained")
        axes = fig.subplots(len(groups), columns, squeeze=False)
        for ax in axes.ravel():
            ax.axis("off")
        filled = dict.fromkeys(groups, 0)
        for (_, row), pixels in zip(mistakes.iterrows(), images, strict=True):
            ax = axes[groups.index(row["group"]), filled[row["group"]]]
            filled[row["group"]] += 1
            ax.imshow(pixels, interpolation="nearest")
            score = 100.0 / (1.0 + np.exp(-row["logit"]))
            ax.set_title(f"{rounded_text(score, 0)} %", fontsize=9, loc="center", fontweight="normal")
        for line, group in zip(axes, groups, strict=True):
            line[0].text(-0.15, 0.5, short[group], transform=line[0].transAxes, ha="right", va="center", fontsize=10)
        surest = int(mistakes["logit"].abs().to_numpy().argmax())
        kind = short[mistakes["group"].tolist()[surest]]
        put_title(fig, f"Most confident mistakes, with the probability of being generated; the surest is of {kind}")
    return fig
