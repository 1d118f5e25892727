"""The oracle ladder: surgery that is helped more from rung to rung, and what changes residuals instead.

`python -m studies.oracle_ladder` trains, and tests on fresh images. A linear head has g_i = r_i w, and no projection
off directions of a class changes r_i (docs/findings.md): if that is why surgery does not help, then no rung of
directions does, however true they are, and those that change r_i do. Each rung has its method's tuned rate
(`Rung.method`); LoRA is trained with those of the rungs that change r_i as well (`RATE_OF`), to tell rate from rung.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.data.prepared import Prepared
from dgs.model.backbone import Backbone
from dgs.model.features import extract_features
from dgs.model.methods.base import Batch, Method
from dgs.model.methods.registry import get_method
from dgs.model.train import training_views
from dgs.params import Params, SurgeryParams
from minibench.splits import SHORTCUTS
from studies.sweep import Arm, Reading, command

RHOS = (0.9,)
RANKS = (1, 2, 4, 8, 16)  # of the plane
HIDDEN = 64  # units of the MLP head


@dataclass(frozen=True)
class Rung:
    """A method of the registry, with its tuned settings, and what is put in place of parts of it.

    rank: of the shortcut's plane that the gradient into the features is projected off; 0: as the method has it.
    head_too: the image head is kept off that plane as well.
    random: the plane has random directions instead, as many: the control of the true ones.
    mlp: the image head has a hidden layer, so that a sample's gradient is more than r_i w.
    """

    method: str
    text_head: str = "release"
    rank: int = 0
    head_too: bool = False
    random: bool = False
    mlp: bool = False


RUNGS: dict[str, Rung] = {
    "lora": Rung("lora"),
    "release": Rung("dgs"),
    "fitted": Rung("dgs", text_head="fitted"),
    "signed": Rung("signed"),
    "signed_fitted": Rung("signed", text_head="fitted"),
    **{f"plane_{rank}": Rung("lora", rank=rank) for rank in RANKS},
    **{f"random_plane_{rank}": Rung("lora", rank=rank, random=True) for rank in (2, 16)},
    **{f"plane_{rank}_head": Rung("lora", rank=rank, head_too=True) for rank in (2, 16)},
    **{f"random_plane_{rank}_head": Rung("lora", rank=rank, head_too=True, random=True) for rank in (2, 16)},
    "weights": Rung("weighed_lora"),
    "expert": Rung("product_of_experts"),
    "lora_at_rate_of_weights": Rung("lora"),
    "lora_at_rate_of_expert": Rung("lora"),
    "mlp": Rung("lora", mlp=True),
    "mlp_release": Rung("dgs", mlp=True),
    "mlp_fitted": Rung("dgs", text_head="fitted", mlp=True),
    "mlp_plane_2": Rung("lora", rank=2, mlp=True),
}
RATE_OF = {f"lora_at_rate_of_{rung}": RUNGS[rung].method for rung in ("weights", "expert")}  # whose settings


class MLPHead(nn.Linear):
    """An image head with one hidden layer of GELUs: (B, D) to (B, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__(HIDDEN, 1)
        self.hidden = nn.Linear(width, HIDDEN)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.gelu(self.hidden(features)))


@dataclass(frozen=True)
class Truth:
    """What is known of N training images and no method is told.

    group: (N,) whether the shortcut goes with "fake"; value: (N,) number of the attribute's value; given: (N,) number
    of label and the other attribute together.
    """

    group: Tensor
    value: Tensor
    given: Tensor

    @classmethod
    def of(cls, rows: pd.DataFrame, shortcut: str) -> Truth:
        """Of the benchmark's rows, with `shortcut` one of `SHORTCUTS`."""
        chosen = SHORTCUTS[shortcut]
        others = [other.attribute for name, other in SHORTCUTS.items() if name != shortcut]
        values, given = rows.groupby(chosen.attribute), rows.groupby(["label", *others])
        columns = (rows[chosen.attribute].isin(chosen.fake), values.ngroup(), given.ngroup())
        return cls(*(torch.tensor(column.to_numpy()) for column in columns))


def _means(rows: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Means of (N, D) rows by cell, (C, D), and how many rows each has, (C, 1); cells: (N,) numbers from 0."""
    members = F.one_hot(cells).to(rows.dtype)
    counts = members.sum(0)[:, None]
    return members.T @ rows / counts.clamp_min(1), counts


def shortcut_plane(features: Tensor, truth: Truth, rank: int) -> Tensor:
    """The directions along which the shortcut's attribute moves (N, D) features: an orthonormal (D, at most rank).

    From the covariance of features and attribute among images alike in label and the other attribute: first the
    difference of the two groups, then what single values do beside it, the strongest first.
    """
    means, _ = _means(features.double(), truth.given)
    rows = features.double() - means[truth.given]
    group = truth.group.double()[:, None]
    first = F.normalize(rows.T @ (group - _means(group, truth.given)[0][truth.given]), dim=0)
    cells = truth.value * len(means) + truth.given
    beside, counts = _means(rows - rows @ first @ first.T, cells)
    _, lengths, directions = torch.linalg.svd(beside * counts.sqrt(), full_matrices=False)
    further = directions[lengths > 1e-6 * lengths[0]][: rank - 1]
    return torch.cat([first, further.T], 1).to(features.dtype)


class ShortcutPlane:
    """`shortcut_plane` of the training images in the tower as it is, estimated anew at the start of every epoch.

    `gradient` and `project` are a method's.
    """

    basis: Tensor
    head: nn.Module

    def __init__(self, prepared: Prepared, params: Params, seed: int, rung: Rung) -> None:
        self.views = training_views(prepared, params, seed)
        self.truth = Truth.of(prepared.split("train"), params.data.shortcut)
        self.params, self.seed, self.rung = params, seed, rung

    def gradient(self, task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
        """(B, D) off the plane exactly, with its signs and without an epsilon."""
        self.head = batch.head
        return off(task + prior, self.basis)

    def project(self, backbone: nn.Module) -> Callable[[], None]:
        """Estimates the plane; returns what is to be called after every step."""
        an_epoch, steps = -(-len(self.views[0]) // self.params.train.batch_size), 0
        last = an_epoch * self.params.train.stage2.epochs  # after it nothing is trained beside another plane

        def after_step() -> None:
            nonlocal steps
            steps += 1
            if steps % an_epoch == 0 and steps < last:
                self._estimate(cast(Backbone, backbone), steps // an_epoch)
            if self.rung.head_too:
                weight = cast(nn.Linear, self.head).weight.data
                weight.copy_(off(weight, self.basis))

        self._estimate(cast(Backbone, backbone), 0)
        return after_step

    @torch.no_grad()
    def _estimate(self, backbone: Backbone, epoch: int) -> None:
        training = backbone.training
        views = self.views[epoch % len(self.views)]
        features = extract_features(backbone.eval(), views, self.params, "shortcut plane")
        backbone.train(training)
        if self.rung.random:
            drawn = torch.randn(features.shape[1], self.rung.rank, generator=torch.Generator().manual_seed(self.seed))
            self.basis = torch.linalg.qr(drawn)[0].to(features)
            return
        truth = Truth(*(part.to(features.device) for part in vars(self.truth).values()))
        self.basis = shortcut_plane(features, truth, self.rung.rank)


def off(rows: Tensor, basis: Tensor) -> Tensor:
    """(B, D) rows without their part in the span of an orthonormal (D, k)."""
    return rows - rows @ basis @ basis.T


def build(rung: Rung, prepared: Prepared, params: Params, seed: int) -> Method:
    """The method that a rung trains; `params`: with its settings."""
    changes: dict[str, Any] = {"head": MLPHead} if rung.mlp else {}
    if rung.rank:
        plane = ShortcutPlane(prepared, params, seed, rung)
        changes |= {"gradient": plane.gradient, "project": plane.project}
    return replace(get_method(rung.method), **changes)


def read(name: str) -> Reading:
    """What an arm's name stands for: a rung."""
    rung = RUNGS[name]
    return Reading(RATE_OF.get(name, rung.method), partial(build, rung), str(rung))


def arms() -> list[Arm]:
    """Every rung, at every one of `RHOS`."""
    return [
        Arm(name, {"data.rho": rho, "train.surgery.text_head": rung.text_head})
        for rho in RHOS
        for name, rung in RUNGS.items()
    ]


if __name__ == "__main__":
    command("oracle_ladder", arms, read=read)
