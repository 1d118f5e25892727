"""A sample's gradients in the plane of its task gradient and its harmful direction, and what settings make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from dgs.analysis.angles import cosines, degrees, one_sample
from dgs.analysis.figures import style as look
from dgs.analysis.figures.style import plain, style
from dgs.stats import rounded_text

# Of the gradients in a plane: no method's colours.
VECTOR_COLOURS = {"task": "#000000", "harmful": "#b2182b", "beneficial": "#1b7837", "applied": "#d400d4"}
_VECTOR_NAMES = {
    "task": "task gradient",
    "harmful": "harmful direction (text)",
    "beneficial": "beneficial direction (image)",
    "applied": "applied gradient",
}
_SETTINGS = {"lam": "Alignment weight λ", "eps": "Epsilon", "rank": "Rank (directions)"}


class Point(NamedTuple):
    """A gradient in the plane, lengths in those of the task gradient.

    x: along the harmful direction. y: across it, the task gradient's side is above. off: length out of the plane.
    """

    x: float
    y: float
    off: float

    @property
    def inside(self) -> float:
        """Share of the gradient's energy that lies in the plane; 1 for none at all."""
        whole = self.x**2 + self.y**2 + self.off**2
        return (self.x**2 + self.y**2) / whole if whole > 0 else 1.0

    @property
    def unit(self) -> Point:
        """The same direction with length 1, as directions are drawn."""
        whole = math.hypot(self.x, self.y, self.off)
        return Point(self.x / whole, self.y / whole, self.off / whole) if whole > 0 else self


def product(row: Mapping[str, Any], a: str, b: str) -> float:
    """<a, b> of a row that keeps each pair once."""
    return float(row[f"{a}.{b}"] if f"{a}.{b}" in row else row[f"{b}.{a}"])


def project_to_plane(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Point]:
    """Where a sample's gradients lie in the plane of "task" and "harmful", from their inner products alone.

    Without a harmful direction x is 0 for all; without a part of the task across it, y is. A task gradient of length 0
    leaves nothing to draw: every point is the origin.

    Args:
        row: {"a.b": <a, b>} for all pairs of names, each pair once.
        names: which to place.
    """
    task, harm = product(row, "task", "task"), product(row, "harmful", "harmful")
    if task <= 0:
        return {name: Point(0.0, 0.0, 0.0) for name in names}
    unit = math.sqrt(task)
    along = product(row, "task", "harmful") / math.sqrt(harm) if harm > 0 else 0.0
    across = math.sqrt(max(task - along**2, 0.0))
    points = {}
    for name in names:
        x = product(row, name, "harmful") / math.sqrt(harm) if harm > 0 else 0.0
        y = (product(row, name, "task") - x * along) / across if across > 1e-9 * unit else 0.0
        off = math.sqrt(max(product(row, name, name) - x**2 - y**2, 0.0))
        points[name] = Point(x / unit, y / unit, off / unit)
    return points


@style()
def plane_figure(row: Mapping[str, Any], title: str) -> Figure:
    """A sample's gradients as arrows: x along harm, y across it, unit: the task gradient's length.

    Directions are drawn dashed with length 1; what lies out of the plane is left out of an arrow and named in its
    label. The axes are placed by hand: it is drawn anew with every move of a slider.

    Args:
        row: inner products {"a.b": <a, b>} of "task", "harmful", "applied" and, where there is one, "beneficial".
    """
    names = [name for name in VECTOR_COLOURS if f"{name}.{name}" in row]
    points = project_to_plane(row, names)
    shown = {name: point.unit if name in ("harmful", "beneficial") else point for name, point in points.items()}
    fig = Figure(figsize=(look.WIDTH, 5.4))
    ax = fig.add_axes((0.13, 0.34, 0.82, 0.54))
    handles = []
    for name, point in shown.items():
        its = {"color": VECTOR_COLOURS[name], "linestyle": "--" if name in ("harmful", "beneficial") else "-"}
        arrow = {"arrowstyle": "-|>", "lw": 2.2, "shrinkA": 0, "shrinkB": 0, **its}
        ax.annotate("", (point.x, point.y), (0, 0), arrowprops=arrow)
        inside = points[name].inside
        note = "" if inside > 0.995 else f", {rounded_text(100 * inside, 0)} % in this plane"
        handles.append(look.handle(_VECTOR_NAMES[name] + note, **its))
    ends = [(shown[name].x, shown[name].y) for name in ("task", "applied")]
    ax.plot(*zip(*ends, strict=True), color="#666666", linewidth=1.0, linestyle=":")
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
    ax.set(xlabel="along the harmful direction (task length = 1)", ylabel="across it")
    return look.finish(fig, title)


def surgery_sketch(samples: pd.DataFrame, seed: int) -> Figure:
    """The surgery on one logged sample of dgs (else of the last method), as `angles.one_sample` chooses it."""
    if samples.empty:
        return look.nothing("No method here trains the tower: there is no gradient to draw.")
    row = one_sample(samples, look.subject_of(samples["method"].unique()), seed)
    frame = pd.DataFrame([row])
    apart, turned = (rounded_text(degrees(frame, pair)[0], 0) for pair in ("task-harmful", "task-applied"))
    removed = rounded_text(100.0 * cosines(frame, "task", "harmful")[0] ** 2)
    kind = "fake" if row["label"] == 1 else "real"
    return plane_figure(
        row,
        f"A {kind} image ({plain(row['method'])}, step {row['step']}): {apart}° from harm, {removed} % of its energy "
        f"along it; turned by {turned}°",
    )


@style()
def sweep_figure(table: pd.DataFrame) -> Figure:
    """By how much each setting alone turns the gradient (degrees): the sliders, for where they cannot be moved.

    `table`: that of `explore.sweeps`, numbers only.
    """
    if table.empty:
        return look.nothing("No gradient reaches this tower: settings of the surgery change nothing.")
    names = [name for name in _SETTINGS if (table["setting"] == name).any()]
    fig, axes = look.panels(len(names), 2.9, columns=len(names), y="Turned by (°)", sharey=True)
    for ax, name in zip(axes, names, strict=True):
        part = table[table["setting"] == name]
        ax.plot(range(len(part)), part["turned"], "o-", color=VECTOR_COLOURS["applied"], markersize=4)
        ticks = list(range(0, len(part), max(1, len(part) // 3)))
        ax.set_xticks(ticks, [f"{part['value'].iloc[i]:g}" for i in ticks], fontsize=9)
        ax.set_xlabel(_SETTINGS[name])
    axes[0].set_ylim(bottom=0.0)
    name = _SETTINGS[str(table.groupby("setting", sort=False)["turned"].agg(np.ptp).idxmax())]
    return look.finish(fig, f"On this image, {name[0].lower()}{name[1:]} matters most")
