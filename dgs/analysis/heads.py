"""What a text head's shape does to harmful directions: two for a linear head, one a sample for a non-linear one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.model.surgery import head_gradients, split_signs
from dgs.model.training_log import angles, effective_rank

HEADS = ("linear", "MLP")
COLUMNS = ["head", "step", "effective_rank", "same_class_angle", "accuracy"]
HIDDEN, LR = 64, 1e-2
BATCH = 32  # the paper's


def new_text_head(kind: str, width: int, seed: int) -> nn.Module:
    """A head (B, D) -> (B, 1): "linear", or an "MLP" with one hidden layer of 64 GELUs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            return nn.Linear(width, 1)
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


def _same_class_angle(harmful: Tensor, labels: Tensor) -> float:
    """Mean angle in degrees between the harmful directions of neighbouring samples of one class."""
    found = [angles(rows[:-1], rows[1:]) for y in (0, 1) if len(rows := harmful[labels == y]) > 1]
    known = torch.cat(found) if found else torch.zeros(0)
    return float(known[~known.isnan()].mean())


def rank_by_head(
    captions: NDArray[np.float32], labels: NDArray[np.int64], seed: int, batch_size: int = BATCH, steps: int = 100
) -> pd.DataFrame:
    """Harmful directions under a linear and an MLP text head that learn the same captions: columns `COLUMNS`.

    The heads are this analysis' own, trained here by Adam on the caption embeddings in the same batches; no run's text
    head is touched. same_class_angle: between samples of one class, in degrees; 0 means one direction a class.

    Args:
        captions: (N, D) embeddings, brought to unit variance for this.
        labels: (N,) 0 real, 1 fake.
        batch_size: samples a step, and in the batch that is looked at.
    """
    given = torch.from_numpy(captions - captions.mean(0)) / float(captions.std() or 1.0)
    truth = torch.from_numpy(labels.astype(np.float32))
    rng = np.random.default_rng(seed)
    order = [torch.from_numpy(rng.permutation(len(given))[:batch_size]) for _ in range(steps + 1)]
    rows = []
    for kind in HEADS:
        head = new_text_head(kind, given.shape[1], seed)
        optimizer = torch.optim.Adam(head.parameters(), lr=LR)
        for step, index in enumerate(order):
            if step % max(steps // 10, 1) == 0:
                harmful, _ = split_signs(head_gradients(head, given[index], truth[index]))
                with torch.no_grad():
                    right = ((head(given[index]).squeeze(1) > 0) == truth[index].bool()).float().mean().item()
                apart = _same_class_angle(harmful, truth[index])
                rows.append((kind, step, effective_rank(harmful), apart, right))
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(given[index]).squeeze(1), truth[index]).backward()
            optimizer.step()
    return pd.DataFrame(rows, columns=COLUMNS)
