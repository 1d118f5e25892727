"""The registry of methods: what is trained, which losses on the features, which map of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dgs.errors import UserError, did_you_mean
from dgs.model.surgery import alignment_loss, split_signs, suppress
from dgs.params import Params, SurgeryParams


@dataclass(frozen=True)
class Batch:
    """What a loss on the features may look at; all (B, D), gradients scaled as params.scale says.

    features: the student's, a leaf that gradients are taken at.
    teacher_grad: dL_T/dfT, constant.
    text_grad: dL_text/dt at the text head as it stands, constant.
    """

    features: Tensor
    teacher_grad: Tensor
    text_grad: Tensor


def _zero(batch: Batch, params: SurgeryParams) -> Tensor:
    return batch.features.new_zeros(())


def _task_alone(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
    return task


def prior_alignment(batch: Batch, params: SurgeryParams) -> Tensor:
    """lambda L_PA (paper, prior alignment)."""
    return params.lam * alignment_loss(batch.features, batch.teacher_grad)


def orthogonal_suppression(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
    """Project off the harmful text direction: the release's order projects task + prior, the paper's only the task."""
    harmful, _ = split_signs(batch.text_grad)
    if params.order == "release":
        return suppress(task + prior, harmful, params.eps)
    return suppress(task, harmful, params.eps) + prior


@dataclass(frozen=True)
class Method:
    """One method.

    reference: where it comes from, and how it differs from there.
    adapters: LoRA on the image tower learns in stage 2; without it the method is stage 1 alone.
    prior: a loss on the features beside the task's; its gradient reaches `gradient` separately.
    gradient: (task gradient, prior gradient, batch, params), all (B, D), to the gradient sent into the tower.
    """

    name: str
    reference: str
    adapters: bool = True
    prior: Callable[[Batch, SurgeryParams], Tensor] = _zero
    gradient: Callable[[Tensor, Tensor, Batch, SurgeryParams], Tensor] = _task_alone


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="probe",
            reference="Frozen CLIP, one linear layer: stage 1 of DGS-Net; UniversalFakeDetect (Ojha et al. 2023).",
            adapters=False,
        ),
        Method(
            name="lora",
            reference="LoRA on q, k, v and a linear head (Hu et al. 2021); DGS-Net's stage 2 without its surgery.",
        ),
        Method(
            name="dgs",
            reference="DGS-Net (arXiv 2511.13108): orthogonal suppression and prior alignment, the release's formulas.",
            prior=prior_alignment,
            gradient=orthogonal_suppression,
        ),
    )
}


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        UserError: no such method; the message lists those there are.
    """
    if not isinstance(name, str) or name not in METHODS:  # a notebook's `method` may be anything
        raise UserError(f"Unknown method '{name}'.{did_you_mean(str(name), METHODS)} Known: {', '.join(METHODS)}.")
    return METHODS[name]


def total_steps(method: Method, images: int, params: Params) -> int:
    """Optimiser steps of a run: of stage 2, or of stage 1 where the tower stays frozen."""
    epochs = params.train.stage2.epochs if method.adapters else params.train.stage1.epochs
    return epochs * -(-images // params.train.batch_size)
