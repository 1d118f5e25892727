"""The registry of methods: what is trained, which losses on the features, which map of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dgs.errors import UserError, did_you_mean
from dgs.model.surgery import alignment_loss, split_signs, suppress
from dgs.params import Params, SurgeryParams, validate


@dataclass(frozen=True)
class Batch:
    """What a loss on the features may look at; (B, D) but for `power`, gradients scaled as params.scale says.

    features: the student's, a leaf that gradients are taken at.
    teacher: the frozen tower's features of the same views, constant.
    power: (B,), mean |fT|^2 over all training images, the unit of distances between features.
    teacher_grad: dL_T/dfT, constant.
    text_grad: dL_text/dt at the text head as it stands, constant.
    noise: standard normal, for controls.
    """

    features: Tensor
    teacher: Tensor
    power: Tensor
    teacher_grad: Tensor
    text_grad: Tensor
    noise: Tensor


Prior = Callable[[Batch, SurgeryParams], Tensor]
GradientMap = Callable[[Tensor, Tensor, Batch, SurgeryParams], Tensor]


def _zero(batch: Batch, params: SurgeryParams) -> Tensor:
    return batch.features.new_zeros(())


def _sum(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
    return task + prior


def prior_alignment(batch: Batch, params: SurgeryParams) -> Tensor:
    """lambda L_PA (paper, prior alignment)."""
    return params.lam * alignment_loss(batch.features, batch.teacher_grad)


def random_alignment(batch: Batch, params: SurgeryParams) -> Tensor:
    """Control: L_PA with the teacher gradient's lengths kept and every entry's sign drawn anew."""
    return params.lam * alignment_loss(batch.features, batch.teacher_grad.abs() * batch.noise.sign())


def distillation(batch: Batch, params: SurgeryParams) -> Tensor:
    """w mean_i |f_i - fT_i|^2 / mean |fT|^2: bounded below, whatever the scale of the features."""
    return params.distill * ((batch.features - batch.teacher).square().sum(1) / batch.power).mean()


def text_harm(batch: Batch) -> Tensor:
    """The paper's harmful direction: the non-negative part of the text gradient."""
    return split_signs(batch.text_grad)[0]


def whole_text(batch: Batch) -> Tensor:
    """Control: the text gradient with its signs, one line for both classes instead of two half-vectors."""
    return batch.text_grad


def random_harm(batch: Batch) -> Tensor:
    """Control: a random non-negative direction, as long as the harmful one."""
    direction = batch.noise.abs()
    norm = direction.norm(dim=1, keepdim=True)
    return direction / norm * text_harm(batch).norm(dim=1, keepdim=True)


def suppression(harmful: Callable[[Batch], Tensor]) -> GradientMap:
    """Project off a direction: the release's order projects task + prior, the paper's only the task."""

    def project(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
        if params.order == "release":
            return suppress(task + prior, harmful(batch), params.eps)
        return suppress(task, harmful(batch), params.eps) + prior

    return project


@dataclass(frozen=True)
class Method:
    """One method.

    reference: where it comes from, and how it differs from there.
    adapters: LoRA on the image tower learns in stage 2; without it the method is stage 1 alone.
    prior: a loss on the features beside the task's; its gradient reaches `gradient` separately.
    gradient: (task gradient, prior gradient, batch, params), all (B, D), to the gradient sent into the tower.
    expert: in training the logit of a text expert (`dgs.model.expert`) is added to the image head's, so that neither
        head nor tower is asked for what captions explain; at test time the image head stands alone.
    shuffled: captions go to other images than their own.
    settings: parameters of train.surgery that are the method's own.
    """

    name: str
    reference: str
    adapters: bool = True
    prior: Prior = _zero
    gradient: GradientMap = _sum
    expert: bool = False
    shuffled: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, params: Params) -> Params:
        """`params` with the method's own settings in train.surgery."""
        if not self.settings:
            return params
        content = params.model_dump()
        content["train"]["surgery"] |= self.settings
        return validate(content, f"the settings of {self.name}")


_CORE = (
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
        gradient=suppression(text_harm),
    ),
    Method(
        name="suppression_only",
        reference="DGS-Net's orthogonal suppression alone.",
        gradient=suppression(text_harm),
    ),
    Method(
        name="alignment_only",
        reference="DGS-Net's prior alignment alone.",
        prior=prior_alignment,
    ),
    Method(
        name="distillation",
        reference="Features held near the frozen tower's (Li & Hoiem 2016 with features for outputs).",
        prior=distillation,
    ),
    Method(
        name="poe_probe",
        reference="Product of experts (Clark et al. 2019) on frozen CLIP, with a text expert as the biased one.",
        adapters=False,
        expert=True,
    ),
    Method(
        name="product_of_experts",
        reference="Product of experts (Clark et al. 2019) with LoRA, with a text expert as the biased one.",
        expert=True,
    ),
    Method(
        name="poe_distillation",
        reference="product_of_experts and distillation together.",
        prior=distillation,
        expert=True,
    ),
)

_CONTROLS = (
    Method(
        name="random_direction",
        reference="Control of dgs: a random direction in the harmful one's place, equally long, anew in each step.",
        prior=prior_alignment,
        gradient=suppression(random_harm),
    ),
    Method(
        name="shuffled_captions",
        reference="Control of dgs: captions of other images.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        shuffled=True,
    ),
    Method(
        name="signed",
        reference="Control of dgs: the whole text gradient instead of its non-negative half.",
        prior=prior_alignment,
        gradient=suppression(whole_text),
    ),
    Method(
        name="random_alignment",
        reference="Control of dgs: alignment with random signs.",
        prior=random_alignment,
        gradient=suppression(text_harm),
    ),
    Method(
        name="per_sample",
        reference="dgs without the release's 1/B in its directions.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        settings={"scale": "per_sample"},
    ),
    Method(
        name="paper_order",
        reference="dgs in the paper's order: suppress the task gradient, then add alignment.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        settings={"order": "paper"},
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (*_CORE, *_CONTROLS)}


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
