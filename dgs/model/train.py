"""Stage 1 (a linear probe on the frozen tower, whose head becomes the teacher's) and stage 2 (adapters, surgery).

A method that brings a model of its own has it fitted instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dgs.data.prepared import Prepared
from dgs.data.views import Contents, Inputs, Views, batch_order, batches, identity_of, worth_keeping
from dgs.device import set_determinism
from dgs.errors import UserError
from dgs.model import distributed
from dgs.model.backbone import Backbone
from dgs.model.classifier import Classifier, Fit, Fitted, Validate
from dgs.model.clip import Clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.features import (
    classify,
    content_features,
    extract_features,
    frozen_features,
    require_finite,
)
from dgs.model.methods.averaging import Averaging, wise_ft
from dgs.model.methods.base import Method, Precomputed
from dgs.model.methods.erasure import Affine
from dgs.model.methods.experts import ask_expert, cross_fitted, fit_text_head
from dgs.model.methods.registry import require_text
from dgs.model.prefix import keep_tokens, remove_tokens
from dgs.model.snapshot import Snapshot, State
from dgs.model.step import stage2_step
from dgs.model.training_log import LAYERS_EVERY, LayerGradients, TrainingLog, diverged, recorded
from dgs.params import Params
from dgs.stats import Scored, balanced_accuracy, calibrate

Head = TypeVar("Head", bound=nn.Module)
RECORDS = 200  # of stage 1's losses: its steps are many and cheap


@dataclass
class Trained:
    """A finished run: what classifies (its tower with adapters on, if it has any), and the log."""

    classifier: Classifier
    log: TrainingLog
    truth: NDArray[np.int64]  # (N,), labels of the validation images
    logits: NDArray[np.float32]  # (N,), of the same
    thresholds: dict[str, float]  # on the logit, by rule
    calibration: dict[str, Any]  # by rule: how each did on validation images


def seeded(make: Callable[[], Head], seed: int, device: torch.device) -> Head:
    """What `make` gives, with initial values from `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def new_head(width: int, seed: int, device: torch.device) -> nn.Linear:
    """A linear head (D -> 1) with torch's default initialisation, from `seed` alone."""
    return seeded(partial(nn.Linear, width, 1), seed, device)


def _nothing() -> None:
    pass


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))


def training_views(prepared: Prepared, params: Params, seed: int) -> list[Views]:
    """The views that epochs go through in turn; both stages see the same ones, kept in memory where they fit."""
    rows, count = prepared.split("train"), params.train.views
    keep = worth_keeping(count * len(rows), params)
    return [Views(rows, prepared.source, params, seed, view, prepared.patches, keep) for view in range(count)]


@torch.no_grad()
def stage1(
    features: Tensor,
    labels: Tensor,
    params: Params,
    seed: int,
    log: TrainingLog | None = None,
    on_step: Callable[[], None] = _nothing,
    expert: Tensor | None = None,
    weight: Tensor | None = None,
    feature_map: Affine | None = None,
    names: list[str] | None = None,
) -> nn.Linear:
    """Stage 1: BCE and Adam on cached frozen features.

    Args:
        features: (views, N, D), view e mod views is used in epoch e.
        labels: (N,) float, 0 real, 1 fake.
        expert: (N,) logits that are added to the head's while it learns.
        weight: (N,) of images in the loss; all alike without.
        feature_map: what the head reads features through while it learns; the head returned reads them as they are.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    head = new_head(features.shape[2], seed, features.device)
    offset = torch.zeros_like(labels) if expert is None else expert
    weights = torch.ones_like(labels) if weight is None else weight
    seen = features if feature_map is None else feature_map(features)
    optimizer = _adam(list(head.parameters()), params.train.stage1.lr)
    size, step = params.train.batch_size, 0
    steps = params.train.stage1.epochs * -(-len(labels) // size)
    records = recorded(len(labels), size, steps, max(params.train.log_every, steps // RECORDS))
    for epoch in range(params.train.stage1.epochs):
        view = seen[epoch % len(seen)]
        order = torch.tensor(batch_order(len(labels), seed, epoch), device=features.device)
        for index in order.split(size):
            x, y = view[index], labels[index]
            logits = head(x).squeeze(1) + offset[index]
            finite = bool(logits.isfinite().all())
            if not finite or (log is not None and step in records):
                loss = F.binary_cross_entropy_with_logits(logits, y, weights[index]).item()
                if not finite:
                    batch = [str(i) if names is None else names[i] for i in index.tolist()]
                    raise diverged(f"The loss became {loss}", step, batch, 1)
                assert log is not None
                log.loss(epoch, step, loss=loss, loss_task=loss)
            # The gradient in closed form: autograd would take ten times as long as these few sums.
            residual = weights[index] * (logits.sigmoid() - y) / len(index)
            head.weight.grad, head.bias.grad = (residual @ x).unsqueeze(0), residual.sum().unsqueeze(0)
            optimizer.step()
            step += 1
            on_step()
    return (head if feature_map is None else feature_map.fold_into(head)).requires_grad_(False)


def validation_logits(backbone: Backbone, head: nn.Module, views: Inputs, params: Params) -> NDArray[np.float32]:
    """Logits of the validation views, (N,)."""
    training = backbone.training
    backbone.eval()
    features = extract_features(backbone, views, params, "validation")
    backbone.train(training)
    with torch.no_grad():
        return head(features).squeeze(1).cpu().numpy()


@torch.no_grad()
def teacher_residuals(teacher: nn.Linear, frozen: Tensor, labels: Tensor) -> Tensor:
    """sigmoid(zT) - y, the derivative of the teacher's loss by its logit.

    `frozen`: (..., N, D) features of the frozen tower, `labels`: (N,); returns (..., N).
    """
    return torch.sigmoid(teacher(frozen).squeeze(-1)) - labels


def method_captions(method: Method, prepared: Prepared, seed: int, width: int = 0) -> NDArray[np.float32]:
    """(N, T) embeddings of the training images' captions, or of other images' where the method shuffles them.

    Without a text side they are zero, of CLIP's `width`.
    """
    captions = prepared.caption_embeddings[prepared.split("train").index]
    if not prepared.has_text:
        return np.zeros((len(captions), width), np.float32)
    if not method.shuffled:
        return captions
    return captions[np.random.default_rng([seed, 11]).permutation(len(captions))]


def text_side(
    known: list[Precomputed], params: Params, seed: int
) -> tuple[dict[str, nn.Linear], list[Precomputed], dict[str, float]]:
    """The text head of stage 2, by train.surgery.text_head; nothing without a text side.

    release: starts at random and learns beside the adapters. fitted: converged on all training captions, and frozen;
    its logits are cross-fitted (`cross_fitted`), so that a caption's own label does not decide its residual.

    Args:
        known: of the training images, a view each.

    Returns:
        {"text": the head}; `known` with its logits, where it is fitted; {"loss_text_floor": what a converged one has},
        NaN where none can be fitted: with one label, or with captions that are no numbers, which the first step names.

    Raises:
        UserError: it is to be fitted and cannot be.
    """
    captions, labels = known[0].captions, known[0].labels
    if not known[0].has_text:
        return {}, known, {}
    possible = bool(captions.isfinite().all()) and len(labels.unique()) == 2
    fitted, floor = fit_text_head(captions, labels) if possible else (None, math.nan)
    if params.train.surgery.text_head == "release":
        fitted = new_head(known[0].clip_dim, 2_000 + seed, captions.device)
    else:
        found = cross_fitted(captions.cpu().numpy(), labels.cpu().numpy().astype(np.int64), seed)
        logits = torch.tensor(found, dtype=labels.dtype, device=labels.device)
        known = [replace(view, text_logits=logits) for view in known]
    assert fitted is not None, "else cross_fitted has refused"
    return {"text": fitted}, known, {"loss_text_floor": floor}


def training_batches(
    views: Sequence[Inputs], params: Params, seed: int, done: int
) -> Iterator[tuple[int, list[int], Tensor, Tensor]]:
    """The batches of stage 2 after the first `done`, in the order that all methods visit them.

    Yields:
        (epoch, the whole batch's rows, and of this process's shard: what the tower takes of B images, and their rows).
    """
    size, count = params.train.batch_size, len(views[0])
    an_epoch = -(-count // size)
    for epoch in range(done // an_epoch, params.train.stage2.epochs):
        order = batch_order(count, seed, epoch)[max(0, done - epoch * an_epoch) * size :]
        loader = batches(views[epoch % len(views)], size, params.compute.workers, order, distributed.shard)
        for start, (images, chosen) in zip(range(0, len(order), size), loader, strict=True):
            yield epoch, order[start : start + size], images, chosen


def stage2(
    method: Method,
    backbone: Backbone,
    teacher: nn.Linear,
    known: list[Precomputed],
    views: Sequence[Inputs],
    params: Params,
    seed: int,
    names: list[str],
    log: TrainingLog,
    validate: Validate,
    feature_map: Affine | None,
    on_step: Callable[[], None],
    snapshot: Snapshot,
) -> tuple[dict[str, nn.Linear], NDArray[np.float32]]:
    """Stage 2: Adam on the adapters, the image head and the text head; the gradient into the features is operated on.

    Every method sees the same views in the same order, the same initial adapters and heads, and the same dropout
    masks, so that methods are compared in pairs. The text head (`text_side`) is there beside every method, also those
    that do not use it, so that angles can be compared; it does not touch them. Without a text side there is none.

    Args:
        teacher: the stage-1 head.
        known: of the training images, a view each.
        snapshot: where snapshots go, and where an earlier one may lie to go on with.

    Returns:
        heads on features as they are; logits of the validation images.
    """
    device, width = teacher.weight.device, teacher.in_features
    image = seeded(partial(method.head, width), 1_000 + seed, device)
    text, known, constants = text_side(known, params, seed)
    if method.init_head_from_probe:
        image.load_state_dict(teacher.state_dict())
    reads = image if feature_map is None else nn.Sequential(feature_map, image)
    heads = {"image": reads, **text, "teacher": teacher}
    deciding = [*backbone.adapter_parameters(), *image.parameters()]
    learned = [*deciding, *(p for head in text.values() for p in head.parameters() if p.requires_grad)]
    project = None if method.project is None else method.project(backbone)
    torch.manual_seed(seed + 1_000_003 * distributed.rank())  # dropout masks, each process's own
    random = torch.Generator().manual_seed(seed)  # of the controls, so that they leave the masks alone
    steps, an_epoch = method.steps(len(names), params), -(-len(names) // params.train.batch_size)
    averaging = Averaging(deciding, steps) if method.average == "swad" else None
    state = State(learned, _adam(learned, params.train.stage2.lr), random, log, averaging)
    snapshot.resume(state)
    for _ in range(state.step):
        on_step()
    backbone.train()
    log_gradients, layers_every = params.train.log_gradients, params.train.log_every * LAYERS_EVERY
    records = recorded(len(names), params.train.batch_size, steps, params.train.log_every)
    with tqdm(total=steps, initial=state.step, desc=f"{method.name}, seed {seed}", unit="step") as progress:
        for epoch, batch, images, chosen in training_batches(views, params, seed, state.step):
            step, facts = state.step, known[epoch % len(views)][chosen.to(device)]
            noise = torch.randn(len(batch), known[0].clip_dim, generator=random)
            noise = noise[list(distributed.shard(range(len(batch))))].to(device)
            layers = (
                LayerGradients(backbone) if log_gradients and step in records and step % layers_every == 0 else None
            )
            where = (backbone, heads, state.optimizer, images.to(device), facts, noise, params, project)
            try:
                losses, gradients = stage2_step(method, *where, batch_size=len(batch), layers=layers)
            except FloatingPointError as error:
                raise diverged(str(error), step, [names[i] for i in batch], 2) from None
            if step in records:
                log.record(
                    epoch, step, losses, gradients if log_gradients else {}, batch, known[0].labels[batch], **constants
                )
            if layers is not None:
                layers.record(log, step)
            state.count()
            progress.update()
            on_step()
            if state.step % an_epoch == 0 and not (method.average and state.step == steps):  # else once averaged
                logits = validate(reads, epoch, state.step)
            if state.step < steps and snapshot.is_due():
                snapshot.save(state)
    backbone.eval()
    if averaging is not None:
        averaging.apply()
    plain = image if feature_map is None else feature_map.fold_into(image)
    if method.average == "wise_ft":
        wise_ft(backbone, plain, teacher, params.train.surgery.mix)
    if method.average:
        logits = validate(plain, epoch, steps)
    return {"image": plain, **text, "teacher": teacher}, logits


def _train_member(
    member: Method,
    clip: Clip | None,
    prepared: Prepared,
    params: Params,
    seed: int,
    device: torch.device,
    log: TrainingLog,
    on_step: Callable[[], None],
    snapshot: Snapshot,
    fitted: Fitted,
) -> None:
    """Train a part of what `log` and `snapshot` are of."""

    def done(trained: Trained) -> None:
        log.follow(trained.log)
        fitted(trained.classifier, trained.logits)

    train(member, clip, prepared, params, seed, device, done, on_step, snapshot.of(member.name))


def _content_features(
    clip: Clip | None, params: Params, device: torch.device, snapshot: Snapshot, contents: Contents
) -> Tensor:
    """Features of contents, which no seed changes."""
    return snapshot.common(contents.identity, partial(content_features, clip, params, device, contents))


def _require_data(method: Method, prepared: Prepared, params: Params) -> None:
    require_text([method.name], params.model.text)
    if method.members and prepared.split("val").empty:
        raise UserError(
            f"Expected validation images, which bring the parts of {method.name} to one scale, found none. Set "
            "data.val_fraction above 0 or add a folder val, or train another method."
        )


def train(
    method: Method,
    clip: Clip | None,
    prepared: Prepared,
    params: Params,
    seed: int,
    device: torch.device,
    done: Callable[[Trained], None],
    on_step: Callable[[], None] = _nothing,
    snapshot: Snapshot | None = None,
) -> None:
    """Both stages of one method and seed; `done` gets the result, then the adapters come off `clip` again.

    With several processes all of them run this, and `done` is called in each.

    Args:
        clip: None for a method that needs none.

    Raises:
        UserError: the loss is NaN or infinite; captions or validation images that the method needs are missing.
    """
    snapshot = snapshot or Snapshot()
    set_determinism(params.compute.threads)
    _require_data(method, prepared, params)
    params = method.of(params)
    log, rows, val = TrainingLog(method.name, seed), prepared.split("train"), prepared.split("val")
    truth, keep = val["label"].to_numpy(), worth_keeping(len(val), params)
    validation_views = Views(val, prepared.source, params, patches=prepared.patches, keep=keep)
    names, labels = rows["id"].tolist(), torch.tensor(rows["label"].to_numpy(dtype=np.float32), device=device)

    def noted(logits: NDArray[np.float32], epoch: int, step: int) -> NDArray[np.float32]:
        log.loss(epoch, step, val_balanced_acc=balanced_accuracy(Scored.of(truth, logits)))
        return logits

    def finished(classifier: Classifier, logits: NDArray[np.float32]) -> None:
        done(Trained(classifier, log, truth, logits, *calibrate(truth, logits)))

    terms = ask_expert(
        method, prepared, params, labels, seed, log, partial(_content_features, clip, params, device, snapshot)
    )
    if method.model is not None:
        whole = (clip, prepared, params, seed, device, log, on_step, snapshot)
        given = Fit(
            views=training_views(prepared, params, seed),
            labels=labels,
            expert=terms[0],
            names=names,
            params=params,
            seed=seed,
            log=log,
            validate=lambda model, *at: noted(classify(model, validation_views, params, "validation"), *at),
            done=finished,
            members=[partial(_train_member, each, *whole) for each in method.members],
            on_step=on_step,
            snapshot=snapshot,
        )
        method.model.fit(given)
        return
    assert clip is not None, "a method without a model of its own needs one"
    clip.model.to(device)
    levels = params.model.levels if method.levels else ()
    backbone = Backbone(clip, params.model.lora if method.adapters else None, seed, levels).to(device)

    def validate(head: nn.Module, epoch: int, step: int) -> NDArray[np.float32]:
        return noted(validation_logits(backbone, head, validation, params), epoch, step)

    try:
        backbone.eval()
        sets = [*training_views(prepared, params, seed), validation_views]
        *views, validation = keep_tokens(backbone, sets, params, snapshot.folder if snapshot.is_kept else None)
        frozen = snapshot.features(
            identity_of(sets[:-1], levels), partial(frozen_features, backbone, views, params)
        ).to(device)
        require_finite(frozen, names)
        captions = torch.tensor(method_captions(method, prepared, seed, backbone.widths[0]), device=device)
        fit = method.feature_map
        feature_map = None if fit is None else fit(frozen[0], captions, params.train.surgery)
        if method.adapters:
            own: tuple[Tensor | None, Tensor | None] = terms if method.init_head_from_probe else (None, None)
            teacher = stage1(frozen, labels, params, seed, None, _nothing, *own, feature_map, names)
            residuals = teacher_residuals(teacher, frozen, labels)
            norms = frozen[..., : captions.shape[1]].square().sum(2).mean(1, keepdim=True).expand_as(residuals)
            of_view = zip(frozen, norms, residuals, strict=True)
            known = [Precomputed(labels, captions, *facts, *terms) for facts in of_view]
            rest = (params, seed, names, log, validate, feature_map, on_step, snapshot)
            heads, logits = stage2(method, backbone, teacher, known, views, *rest)
        else:
            head = stage1(frozen, labels, params, seed, log, on_step, *terms, feature_map, names)
            heads = {"image": head}
            logits = validate(head, params.train.stage1.epochs - 1, method.steps(len(labels), params))
        finished(ClipClassifier(clip, backbone, heads), logits)
        remove_tokens([*views, validation])
    finally:
        clip.model.visual = backbone.without_adapters()
