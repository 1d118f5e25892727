"""What training records: losses, and the geometry of its gradients that the gradient_angles stage reads.

Lengths, angles, energies and pictures in a plane follow from inner products alone, so that nothing else is kept of a
step. What is recorded changes no bit of a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model.distributed import all_gather_rows, all_reduce, all_reduce_sum

Rows = dict[str, list[dict[str, Any]]]
LAYERS_EVERY = 5  # records at the features to one of the layers, which costs two more backward passes
AT_FEATURES = ("task", "harmful", "beneficial", "applied")  # gradients at the features, a row a sample
AT_LAYERS = ("task", "harmful", "applied")  # gradients of a layer's adapters, one a batch
_LAYER = re.compile(r"blocks\.(\d+)\.attn\.(?:qkv\.)?([qkv])_proj\.lora_")


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of names once, a name with itself too: the upper triangle of a Gram matrix, row by row."""
    return [(a, b) for i, a in enumerate(names) for b in names[i:]]


_LOSSES = [
    *("epoch", "step", "loss", "loss_task", "loss_text", "loss_text_floor", "text_acc"),
    *("loss_alignment", "val_balanced_acc"),
]
_SAMPLES = ["step", "image", "label", *(f"{a}.{b}" for a, b in pairs_of(AT_FEATURES))]
_LAYERS = ["step", "layer", *(f"{a}.{b}" for a, b in pairs_of(AT_LAYERS))]
TABLES = {
    "losses": _LOSSES,
    "samples": _SAMPLES,
    "layers": _LAYERS,
    "batches": ["step", "effective_rank"],
    "experts": ["reads", "split", "images", "accuracy"],
}


def recorded(images: int, size: int, steps: int, every: int) -> frozenset[int]:
    """The steps to record: of those with a whole batch every `every`-th, and the last.

    The rest of an epoch, a batch of fewer than `size`, is trained on and not recorded: its 1/B weighs alignment more
    than in any other step. Where `images` are fewer than `size`, every batch is whole.
    """
    an_epoch = -(-images // size)
    rest = an_epoch - 1 if an_epoch > 1 and images % size else -1
    whole = [step for step in range(steps) if step % an_epoch != rest]
    return frozenset(step for step in whole if step % every == 0 or step == whole[-1])


def inner_products(vectors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    """All inner products of named (B, D) gradients by sample: {"a.b": (B,) float64}, "a.a" the squared length."""
    names = list(vectors)
    stacked = torch.stack([vectors[name].detach().double() for name in names], dim=1)
    gram = (stacked @ stacked.mT).cpu().numpy()
    return {f"{a}.{b}": gram[:, names.index(a), names.index(b)] for a, b in pairs_of(names)}


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the rows of two (B, D) tensors, in degrees (B,); NaN where a row is zero."""
    a, b = a.double(), b.double()
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = torch.where(norms > 0, (a * b).sum(dim=1) / norms, torch.nan)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def spectrum_rank(spectrum: Tensor) -> float:
    """How many directions share a spectrum: exp of its entropy (Roy & Vetterli 2007, eq. 3-4); NaN if all are zero."""
    return float(torch.special.entr(spectrum / spectrum.sum()).sum().exp())


def effective_rank(directions: Tensor) -> float:
    """How many directions a batch's rows really take: `spectrum_rank` of their squared singular values.

    Rows are brought to unit length first, since suppression does so; zero rows are left out. 1: all on one line, k: k
    orthogonal directions equally often. Rows of a linear head (two orthogonal half-vectors) have at most 2. Of (B, D)
    directions, between 1 and min(B, D); NaN where every row is zero.
    """
    rows = directions.detach().double()
    norms = rows.norm(dim=1)
    rows = rows[norms > 0] / norms[norms > 0, None]
    if not len(rows):
        return float("nan")
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return spectrum_rank(torch.linalg.eigvalsh(gram).clamp(min=0))


class TrainingLog:
    """Collects rows in memory; `losses`, `samples`, `layers`, `batches` and `experts` give them as tables.

    losses: a row a logged step, and one a validation. `loss` is the sum of the task's, the text head's and the
        prior's; `loss_text_floor` is what a converged text head has on all training images, the same in every row.
    samples: inner products of the gradients at the features, a row a logged step and image.
    layers: inner products of the gradients of a layer's adapters, a row a logged step and layer.
    batches: effective rank of a logged step's harmful directions.
    experts: how well the method's expert reads labels, a row a split.
    """

    def __init__(self, method: str, seed: int) -> None:
        self.method, self.seed = method, seed
        self._rows: Rows = {name: [] for name in TABLES}

    def rows(self) -> Rows:
        """All records as plain numbers and text, by table."""
        return {name: list(rows) for name, rows in self._rows.items()}

    def restore(self, rows: Rows) -> None:
        """Go on after the records that another log's `rows` gave."""
        self._rows = {name: list(rows[name]) for name in TABLES}

    def loss(self, epoch: int, step: int, **values: float) -> None:
        """Record the losses of one step, or a validation result."""
        self._rows["losses"].append({"epoch": epoch, "step": step, **values})

    def record(
        self,
        epoch: int,
        step: int,
        losses: Mapping[str, float],
        gradients: Mapping[str, Tensor],
        images: Sequence[int],
        labels: Tensor,
        **facts: float,
    ) -> None:
        """Record a step: this process's losses and gradients, joined with those of the others.

        Args:
            losses: parts of the batch's losses and of `text_acc`, which add up.
            gradients: {name: (b, D)} of this process's rows, those of `AT_FEATURES`; empty: not recorded.
            images: the whole batch's B row numbers among the training images.
            labels: (B,) of them.
            facts: of the whole run, recorded beside the losses.
        """
        losses = all_reduce_sum(losses)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        self.loss(epoch, step, loss=total, **losses, **facts)
        if gradients:
            self.gradients(step, images, labels, {name: all_gather_rows(part) for name, part in gradients.items()})

    def gradients(self, step: int, images: Sequence[int], labels: Tensor, vectors: Mapping[str, Tensor]) -> None:
        """Record a whole batch's gradients at the features: {name: (B, D)}."""
        products = inner_products({name: vectors[name] for name in AT_FEATURES})
        columns = {name: values.tolist() for name, values in products.items()}
        self._rows["samples"].append({"step": step, "image": list(images), "label": labels.int().tolist(), **columns})
        self._rows["batches"].append({"step": step, "effective_rank": effective_rank(vectors["harmful"])})

    def layer(self, step: int, layer: str, vectors: Mapping[str, Tensor]) -> None:
        """Record a step's gradients of one layer's adapters: {name: (1, P)}, those of `AT_LAYERS`."""
        products = inner_products({name: vectors[name] for name in AT_LAYERS})
        row = {name: value.item() for name, value in products.items()}
        self._rows["layers"].append({"step": step, "layer": layer, **row})

    def expert(self, reads: str, split: str, right: NDArray[np.bool_]) -> None:
        """Record which images of a split, (N,), an expert that reads captions ("text") or "content" decides rightly."""
        row = {"reads": reads, "split": split, "images": len(right), "accuracy": float(np.mean(right))}
        self._rows["experts"].append(row)

    def follow(self, other: TrainingLog) -> None:
        """Append another training's losses, as steps after this one's, and what its expert reads."""
        own = self._rows["losses"]
        epoch, step = (1 + max((row[name] for row in own), default=-1) for name in ("epoch", "step"))
        own += [{**row, "epoch": row["epoch"] + epoch, "step": row["step"] + step} for row in other._rows["losses"]]
        self._rows["experts"] += other._rows["experts"]

    def table(self, name: str) -> pd.DataFrame:
        """One of `TABLES`, with columns method and seed before its own; absent values are NaN."""
        run, rows = {"method": self.method, "seed": self.seed}, self._rows[name]
        if name != "samples" or not rows:
            return pd.DataFrame([{**run, **row} for row in rows], columns=[*run, *TABLES[name]])
        steps = [pd.DataFrame({**run, **row}) for row in rows]  # a step's images each
        return pd.concat(steps, ignore_index=True).astype({"label": np.int8})

    losses = property(lambda self: self.table("losses"))
    samples = property(lambda self: self.table("samples"))
    layers = property(lambda self: self.table("layers"))
    batches = property(lambda self: self.table("batches"))
    experts = property(lambda self: self.table("experts"))


def diverged(loss: str, step: int, names: list[str], stage: int) -> UserError:
    """That training cannot go on: `loss` says which became what, `names` are the batch's images."""
    some = 8
    files = ", ".join(names[:some]) + (f" and {len(names) - some} more" if len(names) > some else "")
    return UserError(
        f"{loss} at step {step} of stage {stage}; the batch was {files}. Lower train.stage{stage}.lr, or look at those "
        f"images and their captions."
    )


def write_logs(folder: Path, logs: Sequence[TrainingLog]) -> None:
    """Every table of a method's runs, all seeds in one: `folder`/<table>.parquet."""
    for name in TABLES:
        parts = [table for log in logs if not (table := log.table(name)).empty]
        table = pd.concat(parts, ignore_index=True) if parts else logs[0].table(name)
        table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")


def read_losses(folders: Iterable[Path], rho: float | None) -> pd.DataFrame:
    """The losses that `write_logs` wrote into each of `folders`, one table; column rho first, NaN for None."""
    table = pd.concat([pd.read_parquet(folder / "losses.parquet") for folder in folders], ignore_index=True)
    table.insert(0, "rho", np.nan if rho is None else rho)
    return table


def read_experts(folders: Iterable[Path]) -> pd.DataFrame:
    """What `write_logs` wrote of experts into those of `folders` that have it: method, seed, and what `TABLES` says."""
    files = [file for folder in folders if (file := folder / "experts.parquet").exists()]
    tables = [TrainingLog("", 0).experts, *map(pd.read_parquet, files)]
    return pd.concat([table for table in tables if not table.empty] or tables[:1], ignore_index=True)


def layer_of(parameter: str) -> str:
    """The layer an adapter's parameter belongs to, "<block>.<q, k or v>": resblocks.3.attn.q_proj... -> "3.q"."""
    found = _LAYER.search(parameter)
    if found is None:
        raise ValueError(f"`{parameter}` should be a LoRA matrix on q, k or v of a vision block.")
    return f"{found[1]}.{found[2]}"


class LayerGradients:
    """What each layer's adapters would get from the task's gradient alone or from harm, and what they get.

    A backward pass is linear in the gradient that is sent in, so the first two are two more passes through the same
    graph.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._parameters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        self._sums: dict[str, list[Tensor]] = {}

    def take(self, features: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Before the real backward pass of (B, D) features, whose graph is kept; parts of a batch add up."""
        wanted = list(self._parameters.values())
        for name in AT_LAYERS[:-1]:  # "applied" is what the real pass leaves in .grad
            found = torch.autograd.grad(features, wanted, gradients[name], retain_graph=True)
            earlier = self._sums.get(name)
            self._sums[name] = list(found) if earlier is None else [a + b for a, b in zip(earlier, found, strict=True)]

    def record(self, log: TrainingLog, step: int) -> None:
        """Into the log, after the real backward pass and before gradients are set to zero."""
        parameters = self._parameters.values()
        none = [torch.zeros_like(p) for p in parameters]  # of a process without rows in this batch
        taken = {name: all_reduce(self._sums.get(name, none)) for name in AT_LAYERS[:-1]}
        taken["applied"] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        by_layer: dict[str, list[int]] = {}
        for number, name in enumerate(self._parameters):
            by_layer.setdefault(layer_of(name), []).append(number)
        for layer, numbers in by_layer.items():
            log.layer(
                step, layer, {name: torch.cat([g[i].flatten() for i in numbers])[None] for name, g in taken.items()}
            )
