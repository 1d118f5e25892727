"""What a method is made of: `Method`, what its losses may look at, and the losses and gradient maps to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.errors import UserError
from dgs.model.classifier import OwnModel
from dgs.model.methods.erasure import Affine
from dgs.model.surgery import alignment_loss, split_signs, suppress
from dgs.params import Params, SurgeryParams


@dataclass(frozen=True)
class Precomputed:
    """What is known of N images before stage 2, row by row; indexing takes rows.

    labels: (N,) float, 0 real, 1 fake.
    captions: (N, T), frozen caption embeddings t, of the width of CLIP's features; zero without a text side.
    teacher: (N, D), the frozen tower's features fT of the view at hand; D > T where the head reads levels too.
    feature_norm2: (N,), in every row the mean of |fT|^2 over all training images, of the first T columns.
    residual: (N,), sigmoid(zT) - y, of the teacher's logit.
    expert: (N,), logits of the biased expert; zero where a method adds none.
    weight: (N,), of the image in the task's loss, 1 on average; 1 where a method does not reweight.
    text_logits: (N,), of the fitted text head (train.surgery.text_head); None: the text head at hand is asked.
    """

    labels: Tensor
    captions: Tensor
    teacher: Tensor
    feature_norm2: Tensor
    residual: Tensor
    expert: Tensor
    weight: Tensor
    text_logits: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> Precomputed:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if value is not None})

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_text(self) -> bool:
        """False without a text side, where all captions are zero."""
        return bool(self.captions.any())

    @property
    def clip_dim(self) -> int:
        """T: how many columns of features, from the first, are CLIP's; the rest are statistics of levels."""
        return self.captions.shape[1]

    @property
    def teacher_prob(self) -> Tensor:
        """(N,), the teacher's probability of a fake."""
        return self.residual + self.labels


@dataclass(frozen=True)
class Batch:
    """What a loss on the features may look at; gradients are scaled as train.surgery.scale says.

    features: (B, D), the student's, a leaf that gradients are taken at.
    known: of the B images.
    teacher_grad: (B, D), dL_T/dfT, constant.
    text_grad: (B, D), dL_text/dt at the current text head, constant.
    head: the current image head.
    noise: (B, T) standard normal, for controls.
    """

    features: Tensor
    known: Precomputed
    teacher_grad: Tensor
    text_grad: Tensor
    head: nn.Module
    noise: Tensor


Prior = Callable[[Batch, SurgeryParams], Tensor]
GradientMap = Callable[[Tensor, Tensor, Batch, SurgeryParams], Tensor]


def no_prior(batch: Batch, params: SurgeryParams) -> Tensor:
    """No loss beside the task's."""
    return batch.features.new_zeros(())


def prior_alignment(batch: Batch, params: SurgeryParams) -> Tensor:
    """lambda L_PA (paper, prior alignment)."""
    return params.lam * alignment_loss(batch.features, batch.teacher_grad)


def random_alignment(batch: Batch, params: SurgeryParams) -> Tensor:
    """Control: L_PA with the teacher gradient's lengths kept and every entry's sign drawn anew."""
    return params.lam * alignment_loss(batch.features, batch.teacher_grad.abs() * batch.noise.sign())


def distillation(batch: Batch, params: SurgeryParams) -> Tensor:
    """w mean_i |f_i - fT_i|^2 / mean |fT|^2: bounded below, whatever the scale of the features; levels are free."""
    moved = (batch.features - batch.known.teacher)[:, : batch.known.clip_dim]
    return params.distill * (moved.square().sum(1) / batch.known.feature_norm2).mean()


def agreement(batch: Batch, params: SurgeryParams) -> Tensor:
    """KL(teacher || student), but for a constant: ProGrad's general knowledge, with a probe in place of zero-shot."""
    return F.binary_cross_entropy_with_logits(batch.head(batch.features).squeeze(1), batch.known.teacher_prob)


def add(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
    """The plain sum of both gradients."""
    return task + prior


def aggregated(rule: Callable[[Tensor, Tensor], Tensor]) -> GradientMap:
    """A map of (task gradient, prior gradient) alone, each taken as one vector over the batch."""

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


def text_harm(batch: Batch) -> Tensor:
    """The paper's harmful direction: the non-negative part of the text gradient."""
    return split_signs(batch.text_grad)[0]


def signed_text(batch: Batch) -> Tensor:
    """Control: the text gradient with its signs, one line for both classes instead of two half-vectors."""
    return batch.text_grad


def random_harm(batch: Batch) -> Tensor:
    """Control: a random non-negative direction, as long as the harmful one."""
    direction = batch.noise.abs()
    norm = direction.norm(dim=1, keepdim=True)
    return direction / norm * text_harm(batch).norm(dim=1, keepdim=True)


def linear_head(width: int) -> nn.Linear:
    """An image head on so many features, with torch's default initialisation."""
    return nn.Linear(width, 1)


_ASKED = {
    **{"lam": 1, "distill": 1, "eps": 1, "decay": 1, "mix": 1, "directions": 2},
    **{"order": "release", "scale": "release", "text_head": "release", "content_side": 1},
}


def _rows(seed: int, count: int) -> Tensor:
    """So many sets of 8 random rows of width 4."""
    return torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Method:
    """One method.

    reference: where it comes from, and how it differs from there.
    adapters: LoRA on the image tower learns in stage 2; without it the method is stage 1 alone.
    prior: a loss on the features beside the task's; its gradient reaches `gradient` separately.
    gradient: (task gradient, prior gradient, batch, params), all (B, D), to the gradient sent into the tower.
    whole_batch: `gradient` takes a batch as one vector, so that a batch cannot be split into parts.
    expert: what the biased expert (`dgs.model.methods.experts`) reads. "text": captions. "content": frozen CLIP's
        features of pictures whose traces are destroyed.
    expert_use: "add": in training the expert's logit is added to the method's, so that neither head nor tower is asked
        for what the expert explains; at test time the method stands alone. "reweight": the expert weights training
        images, so that what it reads tells nothing of labels; not with a `model`.
    shuffled: captions go to other images than their own.
    levels: the head reads statistics of earlier tokens (`model.levels`) beside the tower's output.
    head: makes stage 2's image head for so many features. A checkpoint holds a linear one, which all methods of the
        registry have; a subclass may put hidden units before its last layer.
    feature_map: (features, captions, params) to the map that the image head reads features through, fitted on the
        frozen tower's.
    init_head_from_probe: the image head starts as stage 1's, which then has the expert too, not at random.
    penalty: a loss on the adapters, weighted by train.surgery.decay.
    project: given the backbone, a function that projects the adapters onto where they may be, called after every step.
    average: weights of tower and head are averaged at the end (`dgs.model.methods.averaging`). "wise_ft": tuned with
        frozen ones, train.surgery.mix of the tuned. "swad": over the last two thirds of stage 2's steps.
    model: a network of the method's own in place of a CLIP (`dgs.model.classifier.OwnModel`), fitted in stage 1; then
        nothing above but an expert is looked at, and adapters must be False.
    members: methods that the `model` is composed of, trained with this one's numbers and seed.
    settings: parameters of train.surgery that are the method's own.
    tuned_param: the parameter of train.surgery that sets the method's strength, tuned beside the learning rate.
    settings_of: the methods whose tuned settings this one takes: one that it is to differ from in one thing, or those
        of its members.
    """

    name: str
    reference: str
    adapters: bool = True
    prior: Prior = no_prior
    gradient: GradientMap = add
    whole_batch: bool = False
    expert: Literal["text", "content"] | None = None
    expert_use: Literal["add", "reweight"] = "add"
    shuffled: bool = False
    levels: bool = False
    head: Callable[[int], nn.Linear] = linear_head
    feature_map: Callable[[Tensor, Tensor, SurgeryParams], Affine] | None = None
    init_head_from_probe: bool = False
    penalty: Callable[[nn.Module], Tensor] | None = None
    project: Callable[[nn.Module], Callable[[], None]] | None = None
    average: Literal["wise_ft", "swad"] | None = None
    model: type[OwnModel] | None = None
    members: tuple[Method, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned_param: str | None = None
    settings_of: tuple[str, ...] = ()

    def of(self, params: Params) -> Params:
        """`params` with the method's own settings in train.surgery.

        Raises:
            UserError: the method needs whole batches, and `params` split them.
        """
        parts = (params.train.accumulate, params.train.processes)
        if self.whole_batch and parts != (1, 1):
            raise UserError(
                f"Expected train.accumulate and train.processes to be 1 for {self.name}, which takes the gradients of "
                f"a batch as one vector, found {parts[0]} and {parts[1]}. Set both to 1."
            )
        own = {f"train.surgery.{name}": value for name, value in self.settings.items()}
        return params.replaced(own, f"the settings of {self.name}") if own else params

    @cached_property
    def needs_text(self) -> bool:
        """Whether it learns from captions; asked of its functions, by what they make of random rows with two sets."""
        answers = zip(*(self._answers(captions) for captions in _rows(1, 2)), strict=True)
        reads = self.expert == "text" or self.shuffled or any(member.needs_text for member in self.members)
        return reads or not all(torch.equal(*pair) for pair in answers)

    @property
    def needs_clip(self) -> bool:
        """Whether a CLIP takes part in its training."""
        of_members = any(member.needs_clip for member in self.members)
        return of_members or self.expert == "content" or self.model is None

    @property
    def tunes_clip(self) -> bool:
        """Whether adapters learn, its own or a member's."""
        return self.adapters or any(member.tunes_clip for member in self.members)

    def _answers(self, captions: Tensor) -> list[Tensor]:
        """Prior, gradient and feature map of random rows whose captions, and gradients at them, are `captions`."""
        features, task, teacher, noise = _rows(0, 4)
        labels, ones, surgery = torch.tensor([0.0, 1.0]).repeat(4), torch.ones(8), SurgeryParams.model_validate(_ASKED)
        known = Precomputed(labels, captions, teacher, ones, ones / 2, labels, ones)
        batch = Batch(features, known, teacher, captions, nn.AdaptiveAvgPool1d(1), noise)
        found = [self.prior(batch, surgery), self.gradient(task, teacher, batch, surgery)]
        fitted = None if self.feature_map is None else self.feature_map(features, captions, surgery)
        return found if fitted is None else [*found, fitted.matrix, fitted.bias]

    def steps(self, images: int, params: Params) -> int:
        """Optimiser steps of a run: of stage 2, or of stage 1 where no tower is tuned; of all members."""
        if self.members:
            return sum(member.steps(images, params) for member in self.members)
        epochs = params.train.stage2.epochs if self.adapters else params.train.stage1.epochs
        return epochs * -(-images // params.train.batch_size)
