"""Gradients of one sample in the plane of its harmful direction and its task gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


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


def product(row: Mapping[str, float], a: str, b: str) -> float:
    """<a, b> of a row that keeps each pair once."""
    return float(row[f"{a}.{b}"] if f"{a}.{b}" in row else row[f"{b}.{a}"])


def in_plane(row: Mapping[str, float], names: tuple[str, ...]) -> dict[str, Point]:
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
