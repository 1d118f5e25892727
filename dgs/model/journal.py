"""What training writes down: losses, and the angles between gradients that the gradient_angles stage reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

LOSS_COLUMNS = [
    "method",
    "seed",
    "epoch",
    "step",
    "loss",
    "loss_task",
    "loss_text",
    "loss_alignment",
    "val_balanced_acc",
]
Rows = dict[str, list[dict[str, Any]]]
ANGLE_COLUMNS = ["method", "seed", "step", "layer", "pair", "mean", "p05", "p95", "cos2", "n"]


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the rows of two (B, D) tensors, in degrees (B,); NaN where a row is zero."""
    a, b = a.double(), b.double()
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = torch.where(norms > 0, (a * b).sum(dim=1) / norms, torch.nan)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


class Journal:
    """Collects rows in memory; `losses` and `angles` give them as tables."""

    def __init__(self, method: str, seed: int) -> None:
        self.method, self.seed = method, seed
        self._losses: list[dict[str, Any]] = []
        self._angles: list[dict[str, Any]] = []

    def rows(self) -> Rows:
        """All that was noted, as plain numbers and text."""
        return {"losses": list(self._losses), "angles": list(self._angles)}

    def restore(self, rows: Rows) -> None:
        """Go on after what another journal's `rows` gave."""
        self._losses, self._angles = list(rows["losses"]), list(rows["angles"])

    def loss(self, epoch: int, step: int, **values: float) -> None:
        """Note the losses of one step, or a validation result."""
        self._losses.append({"method": self.method, "seed": self.seed, "epoch": epoch, "step": step, **values})

    def angle(self, step: int, layer: str, pair: str, degrees: Tensor) -> None:
        """Note a batch's angles (B,) in degrees: their mean, 5th and 95th percentile, and the mean squared cosine.

        The last is the share of a vector's energy along the other's direction. Rows with NaN (no direction, so no
        share) count for it as 0, and not for the angles.
        """
        cos2 = torch.deg2rad(degrees.double()).cos().square().nan_to_num(0.0).mean().item()
        known = degrees[~torch.isnan(degrees)].cpu().numpy()
        parts = (known.mean(), *np.percentile(known, [5, 95])) if known.size else (np.nan,) * 3
        mean, p05, p95 = map(float, parts)
        entry = {"method": self.method, "seed": self.seed, "step": step, "layer": layer, "pair": pair}
        self._angles.append({**entry, "mean": mean, "p05": p05, "p95": p95, "cos2": cos2, "n": known.size})

    @property
    def losses(self) -> pd.DataFrame:
        """One row a record; absent values are NaN."""
        return pd.DataFrame(self._losses).reindex(columns=LOSS_COLUMNS)

    @property
    def angle_table(self) -> pd.DataFrame:
        """One row a step and pair."""
        return pd.DataFrame(self._angles, columns=ANGLE_COLUMNS)
