"""Distillation-guided gradient surgery (arXiv 2511.13108): the equations, as pure functions on (B, D) gradients.

    g = dL_img/df   task gradient at the student's features f       (B, D)
    g_text = dL_text/dt   gradient at the caption embedding t       (B, D)
    g_img = dL_T/dfT   gradient at the frozen teacher's features    (B, D)

Rows are samples. dtype and device are kept; a NaN is refused, since a projection would spread it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _check(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"`{name}` should be (B, D), one row a sample. Found `{name}.shape = {shapes[name]}`.")
        if torch.isnan(tensor).any():
            raise ValueError(f"`{name}` holds NaN; lower the learning rate or look at the batch that made it.")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Gradients should have one shape. Found {shapes}.")


def split_signs(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposition by sign: g+ = max(g, 0), harmful (moving along it raises the loss), and g- = min(g, 0), beneficial.

    Args:
        grad: (B, D).

    Returns:
        (harmful, beneficial), each (B, D); they sum to `grad` and are orthogonal row by row.
    """
    _check(grad=grad)
    return grad.clamp(min=0), grad.clamp(max=0)


def suppress(grad: Tensor, harmful: Tensor, eps: float = 1e-6) -> Tensor:
    """Orthogonal suppression: g~_i = g_i - <g_i, h_i> h_i with h_i = harmful_i / (|harmful_i| + eps).

    A row whose harmful direction is zero is left as it is. With eps > 0 a share s^2 of the harmful component is
    removed, s = |harmful_i| / (|harmful_i| + eps): the release's 1e-6 lets confident samples, whose gradients are
    small, escape. eps = 0 is the exact projection.

    Args:
        grad: (B, D), the gradient to project.
        harmful: (B, D), the harmful directions, of any length: `split_signs(g_text)[0]`.
        eps: added to the norm; >= 0.

    Returns:
        (B, D), the projected gradient.
    """
    _check(grad=grad, harmful=harmful)
    if eps < 0:
        raise ValueError(f"`eps` should be >= 0. Found {eps}.")
    norm = harmful.norm(dim=1, keepdim=True)
    direction = torch.where(norm > 0, harmful / torch.where(norm > 0, norm + eps, 1), 0)
    return grad - (grad * direction).sum(dim=1, keepdim=True) * direction


def alignment_loss(features: Tensor, teacher_grad: Tensor) -> Tensor:
    """Prior alignment: L_PA = mean_i <f_i, g_img_i->, the teacher's beneficial part detached.

    It is linear in f: its gradient is g_img- / B, whatever f is, and it has no lower bound.

    Args:
        features: (B, D), the student's features f.
        teacher_grad: (B, D), the whole teacher gradient g_img.

    Returns:
        scalar; 0 for an empty batch.
    """
    _check(features=features, teacher_grad=teacher_grad)
    _, beneficial = split_signs(teacher_grad.detach())
    return (features * beneficial).sum() / max(len(features), 1)


def head_gradients(head: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of any head's BCE by its inputs, sum-reduced: for linear heads equal to `residual_directions`.

    Args:
        head: (B, D) -> (B, 1) logits, sample by sample (no batch statistics).
        inputs: (B, D), detached here.
        labels: (B,), 0 real, 1 fake.

    Returns:
        (B, D), detached; the head's own gradients are not touched.
    """
    at = inputs.detach().requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.binary_cross_entropy_with_logits(head(at).squeeze(1), labels, reduction="sum")
    return torch.autograd.grad(loss, at)[0]


def residual_directions(residual: Tensor, weight: Tensor) -> Tensor:
    """Gradients of a linear head with BCE in closed form, sum-reduced: g_i = (sigmoid(z_i) - y_i) w.

    After normalisation they take two values only, +w and -w: a caption affects its sample's direction through the
    sign of its residual alone, and suppression is rank 2. Divide by B for a mean-reduced loss.

    Args:
        residual: (B,), sigmoid(logit) - label.
        weight: (D,), the head's weight.

    Returns:
        (B, D).
    """
    if residual.ndim != 1 or weight.ndim != 1:
        raise ValueError(
            f"`residual` should be (B,) and `weight` (D,). Found {tuple(residual.shape)} and {tuple(weight.shape)}."
        )
    return torch.outer(residual, weight)
