"""One step of stage 2: heads learn, and the gradient into the features is operated on before the tower gets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.model.backbone import Backbone
from dgs.model.distributed import rank, sum_gradients
from dgs.model.methods.base import Batch, Method, Precomputed
from dgs.model.surgery import head_gradients, residual_directions, split_signs
from dgs.model.training_log import AT_FEATURES, LayerGradients
from dgs.params import Params


def surgery_step(
    method: Method,
    features: Tensor,
    heads: Mapping[str, nn.Module],
    known: Precomputed,
    noise: Tensor,
    params: Params,
    batch_size: int | None = None,
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """The surgery of one step, at the features: gradients of the heads are accumulated, the tower's is returned.

    Args:
        features: (B, D) of the student; only their values are used.
        heads: "image", (B, D) -> (B, 1); "text", (B, T) -> (B, 1), if there is a text side; "teacher", linear.
        known: of the B images; with `text_logits`, which a fitted text head has, the residuals of the text gradients
            are theirs. A text head that is not linear is differentiated as it stands, whatever they are.
        noise: (B, T) standard normal, for controls.
        batch_size: of the whole batch, where these rows are a part of one; losses and directions are scaled by it.

    Returns:
        (gradient to send into the tower (B, D), losses by name and the text head's accuracy "text_acc", gradients by
        name (`AT_FEATURES`) for the log); losses and accuracy are this part's share of the whole batch's.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """
    total = batch_size or len(known)
    share = len(known) / total
    surgery = params.train.surgery
    per = 1.0 if surgery.scale == "per_sample" else 1.0 / total
    leaf = features.detach().requires_grad_()
    image_logits = heads["image"](leaf).squeeze(1) + known.expert
    task_loss = share * F.binary_cross_entropy_with_logits(image_logits, known.labels, known.weight)
    text_loss, text_grad = torch.zeros_like(task_loss), torch.zeros_like(known.captions)
    if "text" in heads:
        text_logits = heads["text"](known.captions).squeeze(1) if known.text_logits is None else known.text_logits
        text_loss = share * F.binary_cross_entropy_with_logits(text_logits, known.labels)
    for name, loss in (("task", task_loss), ("text", text_loss)):
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The {name} loss became {loss.item()}")
    (task_loss + text_loss).backward()
    assert leaf.grad is not None
    task = leaf.grad.clone()

    if "text" in heads and isinstance(heads["text"], nn.Linear):
        text_residual = text_logits.detach().sigmoid() - known.labels
        text_grad = residual_directions(text_residual, heads["text"].weight.detach()[0])
    elif "text" in heads:
        text_grad = head_gradients(heads["text"], known.captions, known.labels)
    # The text side knows nothing of levels: its gradient lies in the space it shares with CLIP's features.
    text_grad = F.pad(text_grad, (0, leaf.shape[1] - text_grad.shape[1]))
    teacher_weight = cast(nn.Linear, heads["teacher"]).weight.detach()[0]
    teacher_grad = residual_directions(known.residual, teacher_weight)
    batch = Batch(leaf, known, per * teacher_grad, per * text_grad, heads["image"], noise)
    prior_loss = share * method.prior(batch, surgery)
    prior = torch.autograd.grad(prior_loss, leaf)[0] if prior_loss.requires_grad else torch.zeros_like(task)
    applied = method.gradient(task, prior, batch, surgery)
    tensors = {"loss_task": task_loss, "loss_text": text_loss, "loss_alignment": prior_loss}
    losses = {name: loss.item() for name, loss in tensors.items() if name != "loss_text" or "text" in heads}
    if "text" in heads:
        losses["text_acc"] = ((text_logits > 0) == (known.labels == 1)).sum().item() / total
    harmful, _ = split_signs(batch.text_grad)
    _, beneficial = split_signs(batch.teacher_grad)
    return applied, losses, {"task": task, "applied": applied, "harmful": harmful, "beneficial": beneficial}


def stage2_step(
    method: Method,
    backbone: Backbone,
    heads: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    known: Precomputed,
    noise: Tensor,
    params: Params,
    project: Callable[[], None] | None = None,
    batch_size: int | None = None,
    layers: LayerGradients | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One optimiser step of stage 2 on a batch, in `train.accumulate` parts through the tower: losses and gradients.

    Without dropout the parts add up to the whole batch's step; with it each part draws its own masks. The same holds
    for the shards of several processes: their gradients are summed before the step.

    Args:
        images: (B, 3, S, S) uint8; the rest as in `surgery_step`. B may be 0 where another process has rows.
        project: called after the optimiser's step.
        layers: takes the gradients of each layer, where they are to be logged.
    """
    count = len(known)
    total = batch_size or count
    optimizer.zero_grad()
    losses: dict[str, float] = {}
    parts: list[dict[str, Tensor]] = []
    for start in range(0, count, size := max(1, -(-count // params.train.accumulate))):
        part = slice(start, start + size)
        features = backbone(images[part])
        applied, some, gradients = surgery_step(method, features, heads, known[part], noise[part], params, total)
        if layers is not None:
            layers.take(features, gradients)
        features.backward(applied)
        losses = {name: losses.get(name, 0.0) + value for name, value in some.items()}
        parts.append(gradients)
    if method.penalty is not None and rank() == 0:  # of the weights, which all processes share: once in the sum
        penalty = params.train.surgery.decay * method.penalty(backbone)
        penalty.backward()
        losses["loss_alignment"] = losses.get("loss_alignment", 0.0) + penalty.item()
    sum_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.step()
    if project is not None:
        project()
    none = noise.new_zeros(0, cast(nn.Linear, heads["teacher"]).in_features)  # all of a process without rows
    return losses, {name: torch.cat([none, *(gradients[name] for gradients in parts)]) for name in AT_FEATURES}
