"""A sample's gradients in the plane of its task gradient and its harmful direction, and what settings make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import NDArray

from dgs.analysis.angles import NO_HARM, cosines, degrees, has_harm, one_sample, product
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
_DIRECTIONS = ("harmful", "beneficial")  # drawn dashed, with length 1
_SETTINGS = {"lam": "Alignment weight λ", "eps": "Epsilon", "rank": "Rank (directions)"}


def project_to_plane(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Where a sample's gradients lie in the plane of "task" and "harmful", from their inner products alone.

    Without a harmful direction x is 0 for all; without a part of the task across it, y is. A task gradient of length 0
    leaves nothing to draw: every point is the origin.

    Args:
        row: {"a.b": <a, b>} for all pairs of names, each pair once.
        names: which to place.

    Returns:
        by name (x, y, off): along the harmful direction, across it with the task gradient's side above, and the length
        out of the plane; in lengths of the task gradient.
    """
    task, harm = (float(product(row, name, name)) for name in ("task", "harmful"))
    if task <= 0:
        return {name: np.zeros(3) for name in names}
    along = float(product(row, "task", "harmful")) / math.sqrt(harm) if harm > 0 else 0.0
    across = math.sqrt(max(task - along**2, 0.0))
    points = {}
    for name in names:
        x = float(product(row, name, "harmful")) / math.sqrt(harm) if harm > 0 else 0.0
        y = (product(row, name, "task") - x * along) / across if across > 1e-9 * math.sqrt(task) else 0.0
        off = math.sqrt(max(float(product(row, name, name)) - x**2 - y**2, 0.0))
        points[name] = np.array([x, y, off]) / math.sqrt(task)
    return points


def share_inside(point: NDArray[np.float64]) -> float:
    """Share of the gradient's energy that lies in the plane; 1 for none at all."""
    whole = float(point @ point)
    return 1.0 - float(point[2]) ** 2 / whole if whole > 0 else 1.0


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
    drawn = {
        name: point / (np.linalg.norm(point) or 1.0) if name in _DIRECTIONS else point for name, point in points.items()
    }
    fig = Figure(figsize=(look.WIDTH, 5.4))
    ax = fig.add_axes((0.13, 0.34, 0.82, 0.54))
    handles = []
    for name, (x, y, _) in drawn.items():
        its = {"color": VECTOR_COLOURS[name], "linestyle": "--" if name in _DIRECTIONS else "-"}
        arrow = {"arrowstyle": "-|>", "lw": 2.2, "shrinkA": 0, "shrinkB": 0, **its}
        ax.annotate("", (x, y), (0, 0), arrowprops=arrow)
        inside = share_inside(points[name])
        note = "" if inside > 0.995 else f", {rounded_text(100 * inside, 0)} % in this plane"
        handles.append(look.handle(_VECTOR_NAMES[name] + note, **its))
    xs, ys, _ = np.stack([drawn["task"], drawn["applied"]], axis=1)
    ax.plot(xs, ys, color="#666666", linewidth=1.0, linestyle=":")
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
    (left, low), (right, high) = (end([*drawn.values()], axis=0)[:2] for end in (np.min, np.max))
    ax.set(xlim=(min(-0.3, left) - 0.1, max(1.0, right) + 0.15), ylim=(min(-0.3, low) - 0.1, max(1.0, high) + 0.15))
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
    if not has_harm(samples):
        return look.nothing(NO_HARM)
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
