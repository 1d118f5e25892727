"""Stage 1 (a linear probe on the frozen tower, whose head becomes the teacher's) and stage 2 (adapters, surgery)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dgs.data.prepared import Prepared
from dgs.data.views import Views, batch_order, batches, worth_keeping
from dgs.device import set_determinism
from dgs.errors import UserError
from dgs.model import distributed as processes
from dgs.model.backbone import Backbone, Clip
from dgs.model.layers import LayerGradients
from dgs.model.methods.averaging import Tail
from dgs.model.methods.constraints import shrink
from dgs.model.methods.erasure import Affine, Through
from dgs.model.methods.registry import Method, total_steps
from dgs.model.methods.text_expert import balance_weights, text_expert
from dgs.model.snapshot import State, Unfinished
from dgs.model.step import Known, stage2_step
from dgs.model.training_log import LAYERS_EVERY, Journal
from dgs.params import Params
from dgs.stats import Scored, balanced_accuracy, calibrate

RECORDS = 200  # of stage 1's losses: its steps are many and cheap


@dataclass
class Trained:
    """A finished run: the tower (adapters on, if any), its heads, and the journal."""

    backbone: Backbone
    heads: dict[str, nn.Linear]  # "image", and "text" and "teacher" where the method has them
    journal: Journal
    thresholds: dict[str, float]  # on the logit, by rule
    calibration: dict[str, Any]  # by rule: how each did on validation images


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
    """Features of views in the tower as it stands: (N, D) float32 on `device`; processes share the work."""
    mine = batches(views, batch_size, workers, processes.share(range(len(views))))
    parts = [backbone(images.to(device)).float() for images, _ in tqdm(mine, desc=label, unit="batch", leave=False)]
    return processes.whole(torch.cat(parts) if parts else torch.zeros(0, backbone.widths[1], device=device))


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


def _diverged(loss: str, step: int, rows: pd.DataFrame, order: list[int], stage: int) -> UserError:
    some = 8
    files = ", ".join(rows["id"].iloc[order[:some]]) + (f" and {len(order) - some} more" if len(order) > some else "")
    return UserError(
        f"{loss} at step {step} of stage {stage}; the batch was {files}. Lower train.stage{stage}.lr, or look at those "
        f"images and their captions."
    )


def _known_finite(features: Tensor, rows: pd.DataFrame) -> Tensor:
    """(views, N, D) as given, if no number in it is NaN or infinite: such an image would spoil every weight."""
    bad = (~features.isfinite()).any(2).any(0).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"Expected finite features from CLIP, found others for {len(bad)} images, {rows['id'].iloc[bad[0]]} first. "
            f"Look at those images; with model.precision: bf16 try fp32; else CLIP's weights are damaged."
        )
    return features


@torch.no_grad()
def stage1(
    features: Tensor,
    labels: Tensor,
    params: Params,
    seed: int,
    journal: Journal | None = None,
    on_step: Callable[[], None] = _nothing,
    expert: Tensor | None = None,
    lens: Affine | None = None,
    rows: pd.DataFrame | None = None,
    weight: Tensor | None = None,
) -> nn.Linear:
    """Stage 1: BCE and Adam on cached frozen features.

    Args:
        features: (views, N, D), view e mod views is used in epoch e.
        labels: (N,) float, 0 real, 1 fake.
        journal: where the losses go, if anywhere.
        expert: (N,) logits that are added to the head's while it learns.
        lens: what the head reads features through while it learns; the head returned reads them as they are.
        rows: of the manifest, so that an error can name images.
        weight: (N,) of images in the loss; all alike without.

    Returns:
        the head, D -> 1.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    plain = new_head(features.shape[2], seed, features.device)
    offset = torch.zeros_like(labels) if expert is None else expert
    weights = torch.ones_like(labels) if weight is None else weight
    seen = features if lens is None else lens(features)
    optimizer = _adam(list(plain.parameters()), params.train.stage1.lr)
    size, step = params.train.batch_size, 0
    steps = params.train.stage1.epochs * -(-len(labels) // size)
    every = max(params.train.log_every, steps // RECORDS)
    for epoch in range(params.train.stage1.epochs):
        view = seen[epoch % len(seen)]
        order = torch.tensor(batch_order(len(labels), seed, epoch), device=features.device)
        for index in order.split(size):
            x, y = view[index], labels[index]
            logits = plain(x).squeeze(1) + offset[index]
            if not logits.isfinite().all():
                named = pd.DataFrame({"id": map(str, range(len(labels)))}) if rows is None else rows
                loss = F.binary_cross_entropy_with_logits(logits, y, weights[index]).item()
                raise _diverged(f"The loss became {loss}", step, named, index.tolist(), 1)
            # The gradient in closed form: autograd would take ten times as long as these few sums.
            residual = weights[index] * (logits.sigmoid() - y) / len(index)
            plain.weight.grad, plain.bias.grad = (residual @ x).unsqueeze(0), residual.sum().unsqueeze(0)
            optimizer.step()
            if journal is not None and (step % every == 0 or step == steps - 1):
                loss = F.binary_cross_entropy_with_logits(logits, y, weights[index]).item()
                journal.loss(epoch, step, loss=loss, loss_task=loss)
            step += 1
            on_step()
    return (plain if lens is None else lens.before(plain)).requires_grad_(False)


def validation_logits(
    backbone: Backbone, head: nn.Module, views: Views, params: Params, device: torch.device
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


@torch.no_grad()
def teacher_residuals(teacher: nn.Linear, frozen: Tensor, labels: Tensor) -> Tensor:
    """sigmoid(zT) - y, the derivative of the teacher's loss by its logit.

    `frozen`: (..., N, D) features of the frozen tower, `labels`: (N,); returns (..., N).
    """
    return torch.sigmoid(teacher(frozen).squeeze(-1)) - labels


def known_before(method: Method, prepared: Prepared, teacher: nn.Linear, frozen: Tensor, seed: int) -> list[Known]:
    """What stage 2 knows of the training images, a view each.

    Args:
        frozen: (views, N, D) features of the frozen tower.
        seed: of the shuffling of captions and of the expert's folds, where a method has them.
    """
    rows = prepared.split("train")
    labels = _labels(rows, frozen.device)
    captions = prepared.caption_embeddings[rows.index]
    if method.shuffled:
        captions = captions[np.random.default_rng([seed, 11]).permutation(len(captions))]
    expert = expert_logits(method, captions, labels, seed)
    given = torch.tensor(captions, device=frozen.device)
    residuals = teacher_residuals(teacher, frozen, labels)
    powers = frozen[..., : given.shape[1]].square().sum(2).mean(1, keepdim=True).expand_as(residuals)
    weight = image_weights(method, captions, labels, seed)
    return [Known(labels, given, *view, expert, weight) for view in zip(frozen, powers, residuals, strict=True)]


def fitted_lens(method: Method, frozen: Tensor, captions: NDArray[np.float32], params: Params) -> Affine | None:
    """What the method's head reads features through, fitted on the first view (N, D) of frozen ones."""
    if method.lens is None:
        return None
    return method.lens(frozen[0], torch.tensor(captions, device=frozen.device), params.train.surgery)


def expert_logits(method: Method, captions: NDArray[np.float32], labels: Tensor, seed: int) -> Tensor:
    """(N,) logits of the method's text expert on `labels`' device; zeros where it has none."""
    if not method.expert:
        return torch.zeros_like(labels)
    found = text_expert(captions, labels.cpu().numpy().astype(np.int64), seed)
    return torch.tensor(found, dtype=labels.dtype, device=labels.device)


def image_weights(method: Method, captions: NDArray[np.float32], labels: Tensor, seed: int) -> Tensor:
    """(N,) weights of training images on `labels`' device, 1 on average; all 1 where the method does not weigh."""
    if not method.weighed:
        return torch.ones_like(labels)
    told = labels.cpu().numpy().astype(np.int64)
    weights = balance_weights(expit(text_expert(captions, told, seed)), told)
    return torch.tensor(weights / weights.mean(), dtype=labels.dtype, device=labels.device)


def training_batches(
    views: list[Views], params: Params, seed: int, done: int
) -> Iterator[tuple[int, list[int], Tensor, Tensor]]:
    """The batches of stage 2 after the first `done`, in the order that all methods visit them.

    Yields:
        (epoch, the whole batch's rows, and of this process's share: (B, 3, S, S) uint8 images and their rows).
    """
    size, count = params.train.batch_size, len(views[0])
    an_epoch = -(-count // size)
    for epoch in range(done // an_epoch, params.train.stage2.epochs):
        order = batch_order(count, seed, epoch)[max(0, done - epoch * an_epoch) * size :]
        loader = batches(views[epoch % len(views)], size, params.compute.workers, order, processes.share)
        for start, (images, chosen) in zip(range(0, len(order), size), loader, strict=True):
            yield epoch, order[start : start + size], images, chosen


def note(
    journal: Journal,
    epoch: int,
    step: int,
    losses: Mapping[str, float],
    gradients: Mapping[str, Tensor],
    batch: list[int],
    labels: Tensor,
) -> None:
    """A step into the journal: this process's losses and gradients, joined with those of the others.

    Args:
        gradients: of this process's rows; none: they are not logged.
        batch: the whole batch's rows.
        labels: (B,) of them.
    """
    losses = processes.total(losses)
    journal.loss(epoch, step, loss=sum(losses.values()), **losses)
    if gradients:
        journal.gradients(step, batch, labels, {name: processes.whole(part) for name, part in gradients.items()})


@torch.no_grad()
def average(backbone: Backbone, head: nn.Linear, teacher: nn.Linear, share: float) -> None:
    """Weight averaging (WiSE-FT), in place: `share` of the tuned adapters and head, the rest of tower and probe."""
    shrink(backbone, share)
    for mine, frozen in zip(head.parameters(), teacher.parameters(), strict=True):
        mine.lerp_(frozen, 1 - share)


def averaged(
    method: Method,
    backbone: Backbone,
    image: nn.Linear,
    lens: Affine | None,
    teacher: nn.Linear,
    tail: Tail | None,
    params: Params,
) -> nn.Linear:
    """The head that decides, on features as they are; tower and head averaged in place, where the method does so."""
    if tail is not None:
        tail.settle()
    decides = image if lens is None else lens.before(image)
    if method.mix:
        average(backbone, decides, teacher, params.train.surgery.mix)
    return decides


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
    unfinished: Unfinished | None = None,
) -> Trained:
    """Stage 2: Adam on the adapters, the image head and the text head; the gradient into the features is operated on.

    Every method sees the same views in the same order, the same initial adapters and heads, and the same dropout
    masks, so that methods are compared in pairs. The text head learns beside every method, also those that do not
    use it, so that angles can be compared; it does not touch them. What is logged changes no bit of a run.

    Args:
        backbone: with adapters.
        teacher: the stage-1 head.
        frozen: (views, N, D) features of the frozen tower.
        views: what `frozen` are the features of.
        unfinished: where snapshots go, and where an earlier one may lie to go on with.
    """
    unfinished = unfinished or Unfinished()
    rows, validation = prepared.split("train"), validation_views(prepared, params)
    truth = prepared.split("val")["label"].to_numpy()
    known = known_before(method, prepared, teacher, frozen, seed)
    width, lens = frozen.shape[2], fitted_lens(method, frozen, prepared.caption_embeddings[rows.index], params)
    image, text = new_head(width, 1_000 + seed, device), new_head(known[0].captions.shape[1], 2_000 + seed, device)
    if method.warm:
        image.load_state_dict(teacher.state_dict())
    heads = {"image": image if lens is None else Through(lens, image), "text": text, "teacher": teacher}
    learned = [*backbone.adapter_parameters(), *image.parameters(), *text.parameters()]
    confine = method.confine(backbone) if method.confine is not None else None
    torch.manual_seed(seed + 1_000_003 * processes.rank())  # dropout masks, each process's own
    random = torch.Generator().manual_seed(seed)  # of the controls, so that they leave the masks alone
    journal = Journal(method.name, seed)
    steps, an_epoch = total_steps(method, len(rows), params), -(-len(rows) // params.train.batch_size)
    tail = Tail([*backbone.adapter_parameters(), *image.parameters()], steps) if method.tail else None
    state = State(learned, _adam(learned, params.train.stage2.lr), random, journal, tail=tail)
    unfinished.resume(state)
    for _ in range(state.step):
        on_step()
    backbone.train()
    log_gradients, layers_every = params.train.log_gradients, params.train.log_every * LAYERS_EVERY
    with tqdm(total=steps, initial=state.step, desc=f"{method.name}, seed {seed}", unit="step") as progress:
        for epoch, batch, images, chosen in training_batches(views, params, seed, state.step):
            step, index = state.step, chosen.to(device)
            noise = torch.randn(len(batch), text.in_features, generator=random)
            own = noise[list(processes.share(range(len(batch))))].to(device)
            facts = known[epoch % len(views)][index]
            layers = LayerGradients(backbone) if log_gradients and step % layers_every == 0 else None
            try:
                losses, gradients = stage2_step(
                    method,
                    backbone,
                    heads,
                    state.optimizer,
                    images.to(device),
                    facts,
                    own,
                    params,
                    confine,
                    len(batch),
                    layers,
                )
            except FloatingPointError as error:
                raise _diverged(str(error), step, rows, batch, 2) from None
            if step % params.train.log_every == 0 or step == steps - 1:
                note(journal, epoch, step, losses, gradients if log_gradients else {}, batch, known[0].labels[batch])
            if layers is not None:
                layers.note(journal, step)
            state.count()
            progress.update()
            on_step()
            if state.step % an_epoch == 0 and not (method.averages and state.step == steps):  # else noted when averaged
                logits = validation_logits(backbone, heads["image"], validation, params, device)
                journal.loss(epoch, state.step, val_balanced_acc=balanced_accuracy(Scored.of(truth, logits)))
            if state.step < steps and unfinished.is_due():
                unfinished.save(state)
    backbone.eval()
    decides = averaged(method, backbone, image, lens, teacher, tail, params)
    if method.averages:
        logits = validation_logits(backbone, decides, validation, params, device)
        journal.loss(epoch, steps, val_balanced_acc=balanced_accuracy(Scored.of(truth, logits)))
    plain = {"image": decides, "text": text, "teacher": teacher}
    return Trained(backbone, plain, journal, *calibrate(truth, logits))


def train(
    method: Method,
    clip: Clip,
    prepared: Prepared,
    params: Params,
    seed: int,
    device: torch.device,
    done: Callable[[Trained], None],
    on_step: Callable[[], None] = _nothing,
    unfinished: Unfinished | None = None,
) -> None:
    """Both stages of one method and seed; `done` gets the result, then the adapters come off `clip` again.

    With several processes all of them run this, and `done` is called in each.
    """
    unfinished = unfinished or Unfinished()
    set_determinism(params.compute.threads)
    params = method.of(params)
    clip.model.to(device)
    levels = params.model.levels if method.levels else ()
    backbone = Backbone(clip, params.model.lora if method.adapters else None, seed, levels).to(device)
    try:
        backbone.eval()
        views = training_views(prepared, params, seed)
        rows = prepared.split("train")
        frozen = unfinished.features(lambda: frozen_features(backbone, views, params, device)).to(device)
        frozen = _known_finite(frozen, rows)
        labels = _labels(rows, device)
        journal = Journal(method.name, seed)
        captions = prepared.caption_embeddings[rows.index]
        lens = fitted_lens(method, frozen, captions, params)
        if method.adapters:
            expert = expert_logits(method, captions, labels, seed) if method.warm else None
            head = stage1(frozen, labels, params, seed, expert=expert, lens=lens, rows=rows)
            done(stage2(method, backbone, prepared, params, seed, head, frozen, views, device, on_step, unfinished))
        else:
            expert = expert_logits(method, captions, labels, seed)
            weight = image_weights(method, captions, labels, seed)
            head = stage1(frozen, labels, params, seed, journal, on_step, expert, lens, rows, weight)
            truth = prepared.split("val")["label"].to_numpy()
            logits = validation_logits(backbone, head, validation_views(prepared, params), params, device)
            score = balanced_accuracy(Scored.of(truth, logits))
            steps = total_steps(method, len(labels), params)
            journal.loss(params.train.stage1.epochs - 1, steps, val_balanced_acc=score)
            done(Trained(backbone, {"image": head}, journal, *calibrate(truth, logits)))
    finally:
        clip.model.visual = backbone.without_adapters()
