"""Stage 1 (a linear probe on the frozen tower, whose head becomes the teacher's) and stage 2 (adapters, surgery)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dgs.analysis.metrics import best_threshold, detection_row
from dgs.data.prepared import Prepared
from dgs.data.views import Views, batch_order, batches, worth_keeping
from dgs.errors import UserError
from dgs.model.backbone import Backbone, Clip
from dgs.model.device import set_determinism
from dgs.model.journal import Journal, angles
from dgs.model.methods import Batch, Method, total_steps
from dgs.model.surgery import head_gradients, residual_directions, split_signs
from dgs.params import Params

RECORDS = 200  # of stage 1's losses: its steps are many and cheap


@dataclass
class Trained:
    """A finished run: the tower (adapters on, if any), its heads, and the journal."""

    backbone: Backbone
    heads: dict[str, nn.Linear]  # "image", and "text" and "teacher" where the method has them
    journal: Journal
    thresholds: dict[str, float]  # on the logit, by rule


def new_head(width: int, seed: int, device: torch.device) -> nn.Linear:
    """A linear head (D -> 1) with torch's default initialisation, from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, 1).to(device)


def _nothing() -> None:
    pass


def _labels(rows: pd.DataFrame, device: torch.device) -> Tensor:
    return torch.tensor(rows["label"].to_numpy(dtype=np.float32), device=device)


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))


@torch.no_grad()
def extract_features(
    backbone: Backbone, views: Views, batch_size: int, workers: int, device: torch.device, label: str
) -> Tensor:
    """Features of views in the tower as it stands: (N, D) float32 on `device`."""
    parts = [
        backbone(images.to(device)).float()
        for images, _ in tqdm(batches(views, batch_size, workers), desc=label, unit="batch", leave=False)
    ]
    return torch.cat(parts)


def training_views(prepared: Prepared, params: Params, seed: int) -> list[Views]:
    """The views that epochs go through in turn; both stages see the same ones, kept in memory where they fit."""
    rows, count = prepared.split("train"), params.train.views
    keep = worth_keeping(count * len(rows), params)
    return [Views(rows, prepared.source, params, seed, view, prepared.patches, keep) for view in range(count)]


def validation_views(prepared: Prepared, params: Params) -> Views:
    """The views that thresholds are chosen on, kept in memory where they fit."""
    rows = prepared.split("val")
    keep = worth_keeping(len(rows), params)
    return Views(rows, prepared.source, params, patches=prepared.patches, keep=keep)


def frozen_features(backbone: Backbone, views: list[Views], params: Params, device: torch.device) -> Tensor:
    """The frozen tower's features of every training view, once: (views, N, D)."""
    size, workers = params.compute.batch_size, params.compute.workers
    with backbone.frozen():
        return torch.stack(
            [
                extract_features(backbone, some, size, workers, device, f"frozen features {number}/{len(views)}")
                for number, some in enumerate(views, start=1)
            ]
        )


def _diverged(loss: str, step: int, rows: pd.DataFrame, order: list[int]) -> UserError:
    files = ", ".join(rows["id"].iloc[order[:3]])
    return UserError(
        f"{loss} at step {step} (batch begins with {files}). Lower train.stage2.lr, or look at those images."
    )


def stage1(
    features: Tensor,
    labels: Tensor,
    params: Params,
    seed: int,
    journal: Journal | None = None,
    on_step: Callable[[], None] = _nothing,
) -> nn.Linear:
    """Stage 1: BCE and Adam on cached frozen features.

    Args:
        features: (views, N, D), view e mod views is used in epoch e.
        labels: (N,) float, 0 real, 1 fake.
        journal: where the losses go, if anywhere.

    Returns:
        the head, D -> 1.
    """
    head = new_head(features.shape[2], seed, features.device)
    optimizer = _adam(list(head.parameters()), params.train.stage1.lr)
    size, step = params.train.batch_size, 0
    steps = params.train.stage1.epochs * -(-len(labels) // size)
    every = max(params.train.log_every, steps // RECORDS)
    for epoch in range(params.train.stage1.epochs):
        view = features[epoch % len(features)]
        order = torch.tensor(batch_order(len(labels), seed, epoch), device=features.device)
        for index in order.split(size):
            loss = F.binary_cross_entropy_with_logits(head(view[index]).squeeze(1), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if journal is not None and (step % every == 0 or step == steps - 1):
                journal.loss(epoch, step, loss=loss.item(), loss_task=loss.item())
            step += 1
            on_step()
    return head.requires_grad_(False)


def validation_logits(
    backbone: Backbone, head: nn.Linear, views: Views, params: Params, device: torch.device
) -> NDArray[np.float32]:
    """Logits of the validation views, (N,)."""
    training = backbone.training
    backbone.eval()
    features = extract_features(
        backbone, views, params.compute.batch_size, params.compute.workers, device, "validation"
    )
    backbone.train(training)
    with torch.no_grad():
        return head(features).squeeze(1).cpu().numpy()


def surgery_step(
    method: Method,
    features: Tensor,
    heads: Mapping[str, nn.Module],
    captions: Tensor,
    teacher_residual: Tensor,
    labels: Tensor,
    params: Params,
    batch_size: int | None = None,
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """The surgery of one step, at the features: gradients of the heads are accumulated, the tower's is returned.

    Args:
        features: (B, D) of the student; only their values are used.
        heads: "image" and "text", (B, D) -> (B, 1); "teacher", linear.
        captions: (B, D), frozen caption embeddings t.
        teacher_residual: (B,), sigmoid(zT) - y, cached.
        labels: (B,) float.
        batch_size: of the whole batch, where these rows are a part of one; losses and directions are scaled by it.

    Returns:
        (gradient to send into the tower (B, D), losses by name, gradients by name for the journal).

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """
    total = batch_size or len(labels)
    share = len(labels) / total
    per = 1.0 if params.train.surgery.scale == "per_sample" else 1.0 / total
    leaf = features.detach().requires_grad_()
    task_loss = share * F.binary_cross_entropy_with_logits(heads["image"](leaf).squeeze(1), labels)
    text_logits = heads["text"](captions).squeeze(1)
    text_loss = share * F.binary_cross_entropy_with_logits(text_logits, labels)
    for name, loss in (("task", task_loss), ("text", text_loss)):
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The {name} loss became {loss.item()}")
    (task_loss + text_loss).backward()
    assert leaf.grad is not None
    task = leaf.grad.clone()

    if isinstance(heads["text"], nn.Linear):
        text_grad = residual_directions(text_logits.detach().sigmoid() - labels, heads["text"].weight.detach()[0])
    else:
        text_grad = head_gradients(heads["text"], captions, labels)
    teacher_weight = cast(nn.Linear, heads["teacher"]).weight.detach()[0]
    batch = Batch(
        features=leaf,
        teacher_grad=per * residual_directions(teacher_residual, teacher_weight),
        text_grad=per * text_grad,
    )
    prior_loss = share * method.prior(batch, params.train.surgery)
    prior = torch.autograd.grad(prior_loss, leaf)[0] if prior_loss.requires_grad else torch.zeros_like(task)
    applied = method.gradient(task, prior, batch, params.train.surgery)
    losses = {"loss_task": task_loss.item(), "loss_text": text_loss.item(), "loss_alignment": prior_loss.item()}
    harmful, _ = split_signs(batch.text_grad)
    _, beneficial = split_signs(batch.teacher_grad)
    return applied, losses, {"task": task, "applied": applied, "harmful": harmful, "beneficial": beneficial}


def stage2_step(
    method: Method,
    backbone: Backbone,
    heads: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    captions: Tensor,
    teacher_residual: Tensor,
    labels: Tensor,
    params: Params,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One optimiser step of stage 2 on a batch, in `train.accumulate` parts through the tower: losses and gradients.

    Without dropout the parts add up to the whole batch's step; with it each part draws its own masks.

    Args:
        images: (B, 3, S, S) uint8; the rest as in `surgery_step`.
    """
    total = len(labels)
    optimizer.zero_grad()
    losses: dict[str, float] = {}
    parts: list[dict[str, Tensor]] = []
    for start in range(0, total, size := -(-total // params.train.accumulate)):
        part = slice(start, start + size)
        features = backbone(images[part])
        applied, some, gradients = surgery_step(
            method, features, heads, captions[part], teacher_residual[part], labels[part], params, total
        )
        features.backward(applied)
        losses = {name: losses.get(name, 0.0) + value for name, value in some.items()}
        parts.append(gradients)
    optimizer.step()
    return losses, {name: torch.cat([gradients[name] for gradients in parts]) for name in parts[0]}


@torch.no_grad()
def teacher_residuals(teacher: nn.Linear, frozen: Tensor, labels: Tensor) -> Tensor:
    """sigmoid(zT) - y, the derivative of the teacher's loss by its logit.

    `frozen`: (..., N, D) features of the frozen tower, `labels`: (N,); returns (..., N).
    """
    return torch.sigmoid(teacher(frozen).squeeze(-1)) - labels


def stage2(
    method: Method,
    backbone: Backbone,
    prepared: Prepared,
    params: Params,
    seed: int,
    teacher: nn.Linear,
    frozen: Tensor,
    views: list[Views],
    device: torch.device,
    on_step: Callable[[], None] = _nothing,
) -> Trained:
    """Stage 2: Adam on the adapters, the image head and the text head; the gradient into the features is operated on.

    Every method sees the same views in the same order, the same initial adapters and heads, and the same dropout
    masks, so that methods are compared in pairs. The text head learns beside every method, also those that do not
    use it, so that angles can be compared; it does not touch them.

    Args:
        backbone: with adapters.
        teacher: the stage-1 head.
        frozen: (views, N, D) features of the frozen tower; only their residuals are used.
        views: what `frozen` are the features of.
    """
    rows, validation = prepared.split("train"), validation_views(prepared, params)
    labels, truth = _labels(rows, device), prepared.split("val")["label"].to_numpy()
    captions = torch.tensor(prepared.caption_embeddings[rows.index], device=device)
    residuals = teacher_residuals(teacher, frozen, labels)
    width = frozen.shape[2]
    heads = {
        "image": new_head(width, 1_000 + seed, device),
        "text": new_head(width, 2_000 + seed, device),
        "teacher": teacher,
    }
    learned = [*backbone.adapter_parameters(), *heads["image"].parameters(), *heads["text"].parameters()]
    optimizer = _adam(learned, params.train.stage2.lr)
    journal = Journal(method.name, seed)
    torch.manual_seed(seed)  # dropout masks
    backbone.train()
    step, steps = 0, total_steps(method, len(rows), params)
    with tqdm(total=steps, desc=f"{method.name}, seed {seed}", unit="step") as progress:
        for epoch in range(params.train.stage2.epochs):
            view = epoch % len(views)
            order = batch_order(len(rows), seed, epoch)
            for images, chosen in batches(views[view], params.train.batch_size, params.compute.workers, order):
                index = chosen.to(device)
                told = captions[index], residuals[view][index], labels[index]
                try:
                    losses, gradients = stage2_step(
                        method, backbone, heads, optimizer, images.to(device), *told, params
                    )
                except FloatingPointError as error:
                    raise _diverged(str(error), step, rows, index.tolist()) from None
                if step % params.train.log_every == 0 or step == steps - 1:
                    journal.loss(epoch, step, loss=sum(losses.values()), **losses)
                    for other in ("harmful", "beneficial", "applied"):
                        journal.angle(step, "features", f"task-{other}", angles(gradients["task"], gradients[other]))
                step += 1
                progress.update()
                on_step()
            logits = validation_logits(backbone, heads["image"], validation, params, device)
            journal.loss(epoch, step, val_balanced_acc=detection_row(truth, logits)["balanced_acc"])
    backbone.eval()
    return Trained(backbone, heads, journal, {"0.5": 0.0, "val": best_threshold(truth, logits)})


def train(
    method: Method,
    clip: Clip,
    prepared: Prepared,
    params: Params,
    seed: int,
    device: torch.device,
    done: Callable[[Trained], None],
    on_step: Callable[[], None] = _nothing,
) -> None:
    """Both stages of one method and seed; `done` gets the result, then the adapters come off `clip` again."""
    set_determinism(params.compute.threads)
    clip.model.to(device)
    backbone = Backbone(clip, params.model.lora if method.adapters else None, seed).to(device)
    try:
        backbone.eval()
        views = training_views(prepared, params, seed)
        frozen = frozen_features(backbone, views, params, device)
        labels = _labels(prepared.split("train"), device)
        journal = Journal(method.name, seed)
        head = stage1(frozen, labels, params, seed, journal, _nothing if method.adapters else on_step)
        if method.adapters:
            done(stage2(method, backbone, prepared, params, seed, head, frozen, views, device, on_step))
        else:
            truth = prepared.split("val")["label"].to_numpy()
            logits = validation_logits(backbone, head, validation_views(prepared, params), params, device)
            score = detection_row(truth, logits)["balanced_acc"]
            steps = total_steps(method, len(labels), params)
            journal.loss(params.train.stage1.epochs - 1, steps, val_balanced_acc=score)
            done(Trained(backbone, {"image": head}, journal, {"0.5": 0.0, "val": best_threshold(truth, logits)}))
    finally:
        clip.model.visual = backbone.without_adapters()
