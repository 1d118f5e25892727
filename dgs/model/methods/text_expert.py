"""The text expert: what captions alone say about real and fake, to be added to logits, or to weight images by."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.data.prepared import Prepared
from dgs.errors import UserError

FOLDS = 5


def _model() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))


def text_expert(captions: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Cross-fitted logits of a logistic regression on caption embeddings: each image's from folds without it.

    Cross-fitting keeps an expert that could learn captions by heart from explaining every label away.

    Args:
        captions: (N, D) embeddings.
        labels: (N,) 0 real, 1 fake.
        seed: of the folds.

    Returns:
        (N,) logits; above 0 means that the caption goes with fakes.

    Raises:
        UserError: fewer images of a label than folds, or embeddings that are not finite.
    """
    if not np.isfinite(captions).all():
        raise UserError("Expected finite caption embeddings, found others. Prepare again, or look at the captions.")
    fewest = int(np.bincount(labels, minlength=2).min())
    if fewest < FOLDS:
        raise UserError(
            f"Expected at least {FOLDS} training images of each label for a text expert, found {fewest}. Add images."
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return cross_val_predict(_model(), captions, labels, cv=folds, method="decision_function")


@torch.no_grad()
def fit_text_head(captions: Tensor, labels: Tensor) -> tuple[nn.Linear, float]:
    """The converged text head: the expert's logistic regression as a linear layer on captions as they are.

    Fitted on all of (N, T) captions and (N,) float labels. With means m and deviations s of the standardisation, and
    weight v and bias c of the regression on it, w = v / s and b = c - <w, m>.

    Returns:
        the frozen head, and its mean BCE on these captions: what a head that learns from them comes down to.
    """
    scaler, regression = (step for _, step in _model().fit(captions.cpu().numpy(), labels.cpu().numpy()).steps)
    weight = regression.coef_ / scaler.scale_
    head = nn.Linear(captions.shape[1], 1, device=captions.device)
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(regression.intercept_ - weight @ scaler.mean_))
    loss = F.binary_cross_entropy_with_logits(head(captions).squeeze(1), labels)
    return head.requires_grad_(False), loss.item()


def ipw_weights(probability: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights under which captions tell nothing of labels: 1 / P(label | caption), at most 20.

    Inverse propensity weighting with the text expert's propensity: images that contradict the shortcut count for
    more, and nobody needs to know what the shortcut is. `probability`: (N,) of a fake, from captions alone.
    """
    return 1 / np.clip(np.where(labels == 1, probability, 1 - probability), 0.05, 1)


def expert_terms(
    use: Literal["add", "reweight"] | None, captions: NDArray[np.float32], labels: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """What a `text_expert` brings into a method's loss, from (N, D) captions and (N,) float labels.

    Returns:
        (N,) logits to add, zero unless `use` is "add"; (N,) weights of images, 1 on average, all 1 unless it is
        "reweight". On `labels`' device.
    """
    logits, weights = torch.zeros_like(labels), torch.ones_like(labels)
    if use is None:
        return logits, weights
    truth = labels.cpu().numpy().astype(np.int64)
    found = text_expert(captions, truth, seed)
    if use == "add":
        return torch.tensor(found, dtype=labels.dtype, device=labels.device), weights
    balanced = ipw_weights(expit(found), truth)
    return logits, torch.tensor(balanced / balanced.mean(), dtype=labels.dtype, device=labels.device)


def caption_probability(prepared: Prepared, split: str) -> NDArray[np.float64]:
    """P(fake) of a split's images by their captions alone, (N,), learned on the training images."""
    train, rows = prepared.split("train"), prepared.split(split)
    model = _model().fit(prepared.caption_embeddings[train.index], train["label"].to_numpy())
    return model.predict_proba(prepared.caption_embeddings[rows.index])[:, 1]
