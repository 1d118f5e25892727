"""What training writes down: losses, and the geometry of its gradients that the gradient_angles stage reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from dgs.model.geometry import effective_rank, inner_products, pairs_of

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
AT_FEATURES = ("task", "harmful", "beneficial", "applied")  # gradients at the features, a row a sample
AT_LAYERS = ("task", "harmful", "applied")  # gradients of a layer's adapters, one a batch
SAMPLE_COLUMNS = ["method", "seed", "step", "image", "label", *(f"{a}.{b}" for a, b in pairs_of(AT_FEATURES))]
LAYER_COLUMNS = ["method", "seed", "step", "layer", *(f"{a}.{b}" for a, b in pairs_of(AT_LAYERS))]
BATCH_COLUMNS = ["method", "seed", "step", "effective_rank"]
TABLES = ("losses", "samples", "layers", "batches")
LAYERS_EVERY = 5  # records at the features to one of the layers, which costs two more backward passes


class Journal:
    """Collects rows in memory; `losses`, `samples`, `layers` and `batches` give them as tables.

    samples: inner products of the gradients at the features, a row a logged step and image.
    layers: inner products of the gradients of a layer's adapters, a row a logged step and layer.
    batches: effective rank of a logged step's harmful directions.
    """

    def __init__(self, method: str, seed: int) -> None:
        self.method, self.seed = method, seed
        self._losses: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []  # a step each: columns of equal length
        self._layers: list[dict[str, Any]] = []
        self._batches: list[dict[str, Any]] = []

    @property
    def _run(self) -> dict[str, Any]:
        return {"method": self.method, "seed": self.seed}

    def rows(self) -> Rows:
        """All that was noted, as plain numbers and text."""
        return {name: list(getattr(self, f"_{name}")) for name in TABLES}

    def restore(self, rows: Rows) -> None:
        """Go on after what another journal's `rows` gave."""
        for name in TABLES:
            setattr(self, f"_{name}", list(rows[name]))

    def loss(self, epoch: int, step: int, **values: float) -> None:
        """Note the losses of one step, or a validation result."""
        self._losses.append({**self._run, "epoch": epoch, "step": step, **values})

    def gradients(self, step: int, images: Sequence[int], labels: Tensor, vectors: Mapping[str, Tensor]) -> None:
        """Note a step's gradients at the features.

        Args:
            images: B row numbers among the training images.
            labels: (B,).
            vectors: {name: (B, D)}, those of `AT_FEATURES`.
        """
        products = inner_products({name: vectors[name] for name in AT_FEATURES})
        columns = {name: values.tolist() for name, values in products.items()}
        self._samples.append({"step": step, "image": list(images), "label": labels.int().tolist(), **columns})
        self._batches.append({**self._run, "step": step, "effective_rank": effective_rank(vectors["harmful"])})

    def layer(self, step: int, layer: str, vectors: Mapping[str, Tensor]) -> None:
        """Note a step's gradients of one layer's adapters: {name: (1, P)}, those of `AT_LAYERS`."""
        products = inner_products({name: vectors[name] for name in AT_LAYERS})
        row = {name: value.item() for name, value in products.items()}
        self._layers.append({**self._run, "step": step, "layer": layer, **row})

    @property
    def losses(self) -> pd.DataFrame:
        """One row a record; absent values are NaN."""
        return pd.DataFrame(self._losses).reindex(columns=LOSS_COLUMNS)

    @property
    def samples(self) -> pd.DataFrame:
        """One row a logged step and image."""
        if not self._samples:
            return pd.DataFrame(columns=SAMPLE_COLUMNS)
        steps = pd.concat([pd.DataFrame({**self._run, **columns}) for columns in self._samples], ignore_index=True)
        return steps.astype({"label": np.int8})

    @property
    def layers(self) -> pd.DataFrame:
        """One row a logged step and layer."""
        return pd.DataFrame(self._layers, columns=LAYER_COLUMNS)

    @property
    def batches(self) -> pd.DataFrame:
        """One row a logged step."""
        return pd.DataFrame(self._batches, columns=BATCH_COLUMNS)


def write_journals(folder: Path, journals: Sequence[Journal]) -> None:
    """Every table of a method's runs, all seeds in one: `folder`/<table>.parquet."""
    for name in TABLES:
        parts = [table for journal in journals if not (table := getattr(journal, name)).empty]
        table = pd.concat(parts, ignore_index=True) if parts else getattr(journals[0], name)
        table.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")
