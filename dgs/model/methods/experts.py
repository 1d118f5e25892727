"""Biased experts: what content alone says about real and fake, to be added to logits, or to weight images by.

The text expert reads captions; the content expert reads frozen CLIP on pictures whose traces are destroyed, in two ways
side by side (`dgs.data.views.Contents`), and needs none. Both are fitted alike.
"""

from __future__ import annotations

from collections.abc import Callable
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
from dgs.data.views import Contents, Views
from dgs.errors import UserError
from dgs.model.methods.base import Method
from dgs.model.training_log import TrainingLog
from dgs.params import Params

FOLDS = 5
UNBIASED = "val_unbiased"  # images of which content tells nothing, where the data have such a split


def _model() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))


def cross_fitted(evidence: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Cross-fitted logits of a logistic regression on what an expert reads: each image's from folds without it.

    Cross-fitting keeps an expert that could learn images by heart from explaining every label away.

    Args:
        evidence: (N, D) embeddings of captions or contents.
        labels: (N,) 0 real, 1 fake.
        seed: of the folds.

    Returns:
        (N,) logits; above 0 means that the evidence goes with fakes.

    Raises:
        UserError: fewer images of a label than folds, or embeddings that are not finite.
    """
    if not np.isfinite(evidence).all():
        raise UserError(
            "Expected finite embeddings for an expert to read, found others. Prepare again, or look at captions and "
            "images."
        )
    fewest = int(np.bincount(labels, minlength=2).min())
    if fewest < FOLDS:
        raise UserError(
            f"Expected at least {FOLDS} training images of each label for an expert, found {fewest}. Add images."
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return cross_val_predict(_model(), evidence, labels, cv=folds, method="decision_function")


@torch.no_grad()
def fit_text_head(captions: Tensor, labels: Tensor) -> tuple[nn.Linear, float]:
    """The converged text head: an expert's logistic regression as a linear layer on captions as they are.

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
    """Weights under which the evidence tells nothing of labels: 1 / P(label | evidence), at most 20.

    Inverse propensity weighting with the expert's propensity: images that contradict the shortcut count for more, and
    nobody needs to know what the shortcut is. `probability`: (N,) of a fake, from the evidence alone.
    """
    return 1 / np.clip(np.where(labels == 1, probability, 1 - probability), 0.05, 1)


def expert_terms(
    use: Literal["add", "reweight"] | None, found: NDArray[np.float64], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """What an expert brings into a method's loss, from its (N,) logits and (N,) float labels.

    Returns:
        (N,) logits to add, zero unless `use` is "add"; (N,) weights of images, 1 on average, all 1 unless it is
        "reweight". On `labels`' device.
    """
    logits, weights = torch.zeros_like(labels), torch.ones_like(labels)
    if use == "add":
        logits = torch.tensor(found, dtype=labels.dtype, device=labels.device)
    if use == "reweight":
        balanced = ipw_weights(expit(found), labels.cpu().numpy().astype(np.int64))
        weights = torch.tensor(balanced / balanced.mean(), dtype=labels.dtype, device=labels.device)
    return logits, weights


def ask_expert(
    method: Method,
    prepared: Prepared,
    params: Params,
    labels: Tensor,
    seed: int,
    log: TrainingLog,
    frozen: Callable[[Contents], Tensor],
) -> tuple[Tensor, Tensor]:
    """`expert_terms` of the method's expert; how well it reads labels is logged.

    Out of fold on training images; where there is a split that is free of the shortcut, on that too, learned on all
    training images.

    Args:
        labels: (N,) float, of the training images.
        frozen: (N, D) features of the frozen tower; called for a content expert alone.
    """
    if method.expert is None:
        return expert_terms(None, np.zeros(0), labels)

    def evidence(split: str) -> NDArray[np.float32]:
        rows = prepared.split(split)
        if method.expert == "text":
            return prepared.caption_embeddings[rows.index]
        views = Views(rows, prepared.source, params, patches=prepared.patches)
        side = params.train.surgery.content_side
        return np.concatenate([frozen(Contents(views, side, blurred)).cpu().numpy() for blurred in (False, True)], 1)

    truth, known = labels.cpu().numpy().astype(np.int64), evidence("train")
    found = cross_fitted(known, truth, seed)
    log.expert(method.expert, "train", (found > 0) == truth)
    if len(free := prepared.split(UNBIASED)):
        told = _model().fit(known, truth).predict(evidence(UNBIASED))
        log.expert(method.expert, UNBIASED, told == free["label"].to_numpy())
    return expert_terms(method.expert_use, found, labels)


def caption_probability(prepared: Prepared, split: str) -> NDArray[np.float64]:
    """P(fake) of a split's images by their captions alone, (N,), learned on the training images."""
    train, rows = prepared.split("train"), prepared.split(split)
    model = _model().fit(prepared.caption_embeddings[train.index], train["label"].to_numpy())
    return model.predict_proba(prepared.caption_embeddings[rows.index])[:, 1]
