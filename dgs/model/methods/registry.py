"""The registry of methods: what is trained, which losses on the features, which map of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dgs.errors import UserError, did_you_mean
from dgs.model.methods.aggregation import pcgrad, prograd, upgrad
from dgs.model.methods.constraints import hold_principal, squared_update
from dgs.model.methods.erasure import Affine, leace, null_space, standardise
from dgs.model.surgery import alignment_loss, split_signs, suppress
from dgs.params import Params, SurgeryParams, validate


@dataclass(frozen=True)
class Batch:
    """What a loss on the features may look at; (B, D) if nothing else is said, gradients scaled as params.scale says.

    features: the student's, a leaf that gradients are taken at.
    teacher: the frozen tower's features of the same views, constant.
    shared: how many of the D columns, from the first, are CLIP's features; the rest are statistics of levels.
    power: (B,), mean |fT|^2 of those columns over all training images, the unit of distances between features.
    teacher_grad: dL_T/dfT, constant.
    opinion: (B,), the teacher's probability of a fake, constant.
    text_grad: dL_text/dt at the text head as it stands, constant.
    head: the image head as it stands.
    noise: standard normal, for controls.
    """

    features: Tensor
    teacher: Tensor
    shared: int
    power: Tensor
    teacher_grad: Tensor
    opinion: Tensor
    text_grad: Tensor
    head: nn.Module
    noise: Tensor


Prior = Callable[[Batch, SurgeryParams], Tensor]
GradientMap = Callable[[Tensor, Tensor, Batch, SurgeryParams], Tensor]
Lens = Callable[[Tensor, Tensor, SurgeryParams], Affine]


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
    """w mean_i |f_i - fT_i|^2 / mean |fT|^2: bounded below, whatever the scale of the features; levels are free."""
    moved = (batch.features - batch.teacher)[:, : batch.shared]
    return params.distill * (moved.square().sum(1) / batch.power).mean()


def agreement(batch: Batch, params: SurgeryParams) -> Tensor:
    """KL(teacher's opinion || student's), but for a constant: ProGrad's general knowledge, of a probe for zero-shot."""
    return F.binary_cross_entropy_with_logits(batch.head(batch.features).squeeze(1), batch.opinion)


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


def combined(rule: Callable[[Tensor, Tensor], Tensor]) -> GradientMap:
    """A map of (task gradient, prior gradient) alone."""

    def combine(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
        return rule(task, prior)

    return combine


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
    expert: in training the logit of a text expert (`dgs.model.methods.text_expert`) is added to the image head's, so
        that neither head nor tower is asked for what captions explain; at test time the image head stands alone.
    weighed: in training the text expert weighs images, so that captions tell nothing of labels.
    shuffled: captions go to other images than their own.
    levels: the head reads statistics of earlier tokens (`model.levels`) beside the tower's output.
    lens: the map that the image head reads features through, fitted on the frozen tower's.
    warm: the image head starts as stage 1's, not at random; stage 1 then has the text expert too, where there is one.
    penalty: a loss on the adapters, weighed by train.surgery.decay.
    confine: given the backbone, a function that puts the adapters back where they may be, called after every step.
    mix: the tuned tower and head are averaged with the frozen ones at the end, train.surgery.mix of the tuned.
    tail: weights and head are their means over the last two thirds of stage 2's steps (`dgs.model.methods.averaging`).
    settings: parameters of train.surgery that are the method's own.
    knob: the parameter of train.surgery that sets the method's strength, tuned beside the learning rate.
    like: the method whose tuned settings this one takes, since it is to differ from it in one thing.
    """

    name: str
    reference: str
    adapters: bool = True
    prior: Prior = _zero
    gradient: GradientMap = _sum
    expert: bool = False
    weighed: bool = False
    shuffled: bool = False
    levels: bool = False
    lens: Lens | None = None
    warm: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None
    confine: Callable[[nn.Module], Callable[[], None]] | None = None
    mix: bool = False
    tail: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None
    like: str | None = None

    @property
    def averages(self) -> bool:
        """Whether what is kept is a mean of weights rather than those of the last step."""
        return self.mix or self.tail

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
        knob="lam",
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
        knob="lam",
    ),
    Method(
        name="distillation",
        reference="Features held near the frozen tower's (Li & Hoiem 2016 with features for outputs).",
        prior=distillation,
        knob="distill",
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
        knob="distill",
    ),
    Method(
        name="leace",
        reference="LEACE (Belrose et al. 2023) on frozen CLIP: what features tell of captions is erased, then a probe.",
        adapters=False,
        lens=leace,
        knob="directions",
    ),
    Method(
        name="dgs_plus",
        reference="DGS-Net's idea with other means: a text expert takes over what captions explain; the frozen tower's "
        "output is held, its probe is where the head starts; weights are averaged along the way.",
        prior=distillation,
        expert=True,
        warm=True,
        tail=True,
        knob="distill",
    ),
)

_CONTROLS = (
    Method(
        name="random_direction",
        reference="Control of dgs: a random direction in the harmful one's place, equally long, anew in each step.",
        prior=prior_alignment,
        gradient=suppression(random_harm),
        like="dgs",
    ),
    Method(
        name="shuffled_captions",
        reference="Control of dgs: captions of other images.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        shuffled=True,
        like="dgs",
    ),
    Method(
        name="signed",
        reference="Control of dgs: the whole text gradient instead of its non-negative half.",
        prior=prior_alignment,
        gradient=suppression(whole_text),
        like="dgs",
    ),
    Method(
        name="random_alignment",
        reference="Control of dgs: alignment with random signs.",
        prior=random_alignment,
        gradient=suppression(text_harm),
        like="dgs",
    ),
    Method(
        name="per_sample",
        reference="dgs without the release's 1/B in its directions.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        settings={"scale": "per_sample"},
        like="dgs",
    ),
    Method(
        name="paper_order",
        reference="dgs in the paper's order: suppress the task gradient, then add alignment.",
        prior=prior_alignment,
        gradient=suppression(text_harm),
        settings={"order": "paper"},
        like="dgs",
    ),
)

_PARTS = (
    Method(
        name="poe_swad",
        reference="dgs_plus without holding the tower's output: SWAD with a text expert.",
        expert=True,
        warm=True,
        tail=True,
    ),
    Method(
        name="levels_probe",
        reference="Frozen CLIP, a linear layer on tokens of several depths (RINE, Koutlis & Papadopoulos 2024), here "
        "on their mean and spread.",
        adapters=False,
        levels=True,
        lens=standardise,
    ),
    Method(
        name="levels_poe_probe",
        reference="levels_probe with poe_probe's text expert.",
        adapters=False,
        levels=True,
        lens=standardise,
        expert=True,
    ),
    Method(
        name="levels_distillation",
        reference="Reading levels, and distillation of the tower's output.",
        prior=distillation,
        levels=True,
        lens=standardise,
        knob="distill",
    ),
    Method(
        name="levels_poe",
        reference="Reading levels, with a text expert.",
        levels=True,
        lens=standardise,
        expert=True,
    ),
    Method(
        name="levels_poe_distillation",
        reference="poe_distillation that reads levels: what dgs_plus was in the first study.",
        prior=distillation,
        expert=True,
        levels=True,
        lens=standardise,
        knob="distill",
    ),
)

_NEIGHBOURS = (
    Method(
        name="weighed_probe",
        reference="Frozen CLIP, a linear layer that learns from images weighed by 1 / P(label given caption), the text "
        "expert giving P (inverse propensity weighting, Horvitz & Thompson 1952).",
        adapters=False,
        weighed=True,
    ),
    Method(
        name="weighed_lora",
        reference="LoRA whose images are weighed by 1 / P(label given caption), as weighed_probe's are.",
        weighed=True,
    ),
    Method(
        name="lp_ft",
        reference="LP-FT (Kumar et al. 2022) with LoRA: fine-tuning starts from the probe's head.",
        warm=True,
    ),
    Method(
        name="wise_ft",
        reference="WiSE-FT (Wortsman et al. 2022) with LoRA: tuned weights and head averaged with the frozen tower and "
        "the probe.",
        warm=True,
        mix=True,
        knob="mix",
    ),
    Method(
        name="swad",
        reference="SWAD (Cha et al. 2021) with LoRA: weights and head are averaged over the last two thirds of steps.",
        tail=True,
    ),
    Method(
        name="l2_sp",
        reference="L2-SP (Li et al. 2018) with LoRA: the squared distance to the pre-trained weights as a penalty.",
        penalty=squared_update,
        knob="decay",
    ),
    Method(
        name="pcgrad",
        reference="PCGrad (Yu et al. 2020) of the task's and distillation's gradients, at the features.",
        prior=distillation,
        gradient=combined(pcgrad),
        knob="distill",
    ),
    Method(
        name="upgrad",
        reference="UPGrad (Quinton & Rey 2024) of the task's and distillation's gradients, at the features.",
        prior=distillation,
        gradient=combined(upgrad),
        knob="distill",
    ),
    Method(
        name="prograd",
        reference="ProGrad (Zhu et al. 2023) at the features, with the frozen probe's opinion as general knowledge.",
        prior=agreement,
        gradient=combined(prograd),
    ),
    Method(
        name="effort",
        reference="Effort (Yan et al. 2025) with LoRA: updates stay in the weights' smallest singular directions.",
        confine=hold_principal,
    ),
    Method(
        name="null_space",
        reference="A probe on frozen CLIP off the principal directions of caption embeddings.",
        adapters=False,
        lens=null_space,
        knob="directions",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (*_CORE, *_PARTS, *_CONTROLS, *_NEIGHBOURS)}


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
