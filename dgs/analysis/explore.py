"""One image at one checkpoint: its score, its gradients, and what the surgery with other settings makes of them.

A `Workbench` opens images and checkpoints; a `Subject` is what it found, tensors from which everything else is computed
without the tower, so that a slider can be moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.analysis.angles import ROUNDING, cosines, degrees, orthonormal
from dgs.analysis.evaluate import check_fits
from dgs.analysis.figures.images import portrait
from dgs.analysis.figures.plane import plane_figure
from dgs.analysis.figures.style import subject_of
from dgs.analysis.scores import FILE, read_scores
from dgs.data.images import decode, read
from dgs.data.manifest import open_image
from dgs.data.patches import patch_indices
from dgs.data.prepared import Prepared, load_prepared
from dgs.data.views import EVALUATION, make_view
from dgs.errors import UserError, did_you_mean
from dgs.model.checkpoint import load_checkpoint
from dgs.model.classifier import Classifier
from dgs.model.clip import load_clip
from dgs.model.clip_classifier import ClipClassifier, load_heads
from dgs.model.detector import probability
from dgs.model.methods.base import Batch, GradientMap, Precomputed, text_harm
from dgs.model.methods.registry import get_method
from dgs.model.step import surgery_step
from dgs.model.surgery import head_gradients, split_signs, suppress
from dgs.model.text import reopen_text_side
from dgs.model.training_log import inner_products
from dgs.params import Params, SurgeryParams
from dgs.stats import rounded_text
from dgs.workspace import Workspace

Array = NDArray[np.uint8]
Row = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """What `surgery_step` takes of one image, and further text gradients.

    features: (1, D), of the student. heads: "image", "text" and "teacher". known: of this image, one row.
    further: (K - 1, D), dL_text/dt beside the sample's own: first that of the other class, with which a linear head's
        batch is complete; then the sample's own under the text heads of other seeds.
    params: of the run; its batch size scales losses and directions.
    """

    features: Tensor
    heads: Mapping[str, nn.Module]
    known: Precomputed
    further: Tensor
    params: Params


@dataclass(frozen=True)
class Subject:
    """What one image is to one checkpoint.

    image: (H, W, 3) uint8. view: (S, S, 3) uint8, what the model sees. patches: indices of the patches that selection
    keeps, whether or not the model uses it; None for an image too small to have any.
    show_images: data.show_images. surgery: train.surgery of the run.
    sample: None for a method whose tower stays frozen: no gradient reaches it.
    """

    name: str
    label: int
    caption: str
    image: Array
    view: Array
    patches: NDArray[np.int32] | None
    patch_size: int
    logit: float
    threshold: float
    show_images: bool
    surgery: SurgeryParams
    sample: Sample | None

    @property
    def probability(self) -> float:
        """That the image is generated."""
        return float(probability(np.array(self.logit)))

    @property
    def verdict(self) -> str:
        """In words, at the threshold of the validation images, with whether it is right."""
        found = int(self.logit > self.threshold)
        return f"called {('real', 'generated')[found]}, {'rightly' if found == self.label else 'wrongly'}"

    @property
    def portrait(self) -> Figure:
        """The image with its patches, what the model sees, the score and the caption."""
        kind, score = "fake" if self.label == 1 else "real", rounded_text(100 * self.probability)
        title = f"A {kind} image, {self.verdict}: probability of being generated {score} %"
        seen = (self.image, self.view, title, self.caption, self.patches, self.patch_size)
        return portrait(self.show_images, *seen)

    @property
    def ranks(self) -> list[int]:
        """Ranks there are directions for; none without gradients."""
        return [] if self.sample is None else list(range(1, 2 + len(self.sample.further)))


def suppress_all(grad: Tensor, harmful: Tensor, eps: float) -> Tensor:
    """Suppression of rank K: off the first of (K, D) directions as in training, then exactly off what the others add.

    `eps` as in `surgery.suppress`, for the first; with 0 the (1, D) result is orthogonal to all K.
    """
    first, others = harmful[:1], F.normalize(harmful[1:], dim=1)
    others = F.normalize(suppress(others, first.expand_as(others), 0.0), dim=1)
    _, lengths, basis = torch.linalg.svd(others, full_matrices=False)
    basis = basis[lengths > 1e-6 * lengths.sum()]
    grad = suppress(grad, first, eps)
    return grad - (grad @ basis.mT) @ basis


def suppression_of(further: Tensor) -> GradientMap:
    """DGS-Net's map of the gradient with (K - 1, D) further harmful directions projected off."""

    def project(task: Tensor, prior: Tensor, batch: Batch, params: SurgeryParams) -> Tensor:
        harmful = torch.cat([text_harm(batch), further])
        if params.order == "release":
            return suppress_all(task + prior, harmful, params.eps)
        return suppress_all(task, harmful, params.eps) + prior

    return project


def operate(sample: Sample, rank: int = 1, **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
    """DGS-Net's step on one sample, by the function that training calls, as in a batch of the run's size.

    Args:
        rank: how many harmful directions are projected off; 1 in the paper.
        settings: of train.surgery, in place of the run's.

    Returns:
        (task, harmful, beneficial, applied: (1, D) vectors by name; (rank, D) harmful directions that are projected
        off, of which `harmful` is the first).
    """
    method, train = get_method("dgs"), sample.params.train
    further = split_signs(sample.further[: rank - 1])[0]
    if len(further):
        method = replace(method, gradient=suppression_of(further))
    train = train.model_copy(update={"surgery": train.surgery.model_copy(update=settings)})
    params = sample.params.model_copy(update={"train": train})
    unused = torch.zeros_like(sample.features)  # noise, of the controls
    _, _, vectors = surgery_step(method, sample.features, sample.heads, sample.known, unused, params, train.batch_size)
    return vectors, torch.cat([vectors["harmful"], further])


def measure(vectors: Mapping[str, Tensor], directions: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Inner products of `operate`'s vectors, and what they say.

    Args:
        directions: (K, D), all that the surgery takes the gradient off, inside and outside whose span "removed" and
            "added" are energies. With K = 1 they are those of `angles.energies`.

    Returns:
        ({"a.b": <a, b>}, {"harm": angle of task and harmful direction, "turned": of task and applied, both in degrees,
        "conflict": 1 where the first is over 90, "removed", "added": shares of the task gradient's energy}).
    """
    frame = pd.DataFrame(inner_products(vectors))
    task, applied = (vectors[name][0].double().numpy() for name in ("task", "applied"))
    basis = orthonormal(F.normalize(directions.double(), dim=1, eps=1e-300).numpy().T)
    whole = float(task @ task) or np.nan
    shift = applied - task
    removed = ((task @ basis) ** 2).sum() - ((applied @ basis) ** 2).sum()
    added = shift @ shift - ((shift @ basis) ** 2).sum()
    said = {
        "harm": degrees(frame, "task-harmful")[0],
        "turned": degrees(frame, "task-applied")[0],
        "conflict": float(cosines(frame, "task", "harmful")[0] < 0),
        "removed": removed / whole,
        "added": (added if added > ROUNDING * (task @ task + applied @ applied) else 0.0) / whole,
    }
    return {str(name): float(value) for name, value in frame.iloc[0].items()}, {k: float(v) for k, v in said.items()}


def confident_mistakes(scores: pd.DataFrame, method: str, seed: int, most: int = 5) -> pd.DataFrame:
    """The test images that a checkpoint is surest about and wrong, up to `most` a generator (real images apart).

    Args:
        scores: the table of the evaluate stage.

    Returns:
        columns group (a generator's name, or "real"), id, label, logit; the most confident first.
    """
    rows = scores.query("method == @method and seed == @seed and split == 'test' and condition == 'native'")
    wrong = rows[(rows["logit"] > 0) != (rows["label"] == 1)]
    wrong = wrong.assign(group=wrong["generator"].where(wrong["label"] == 1, "real"), sure=wrong["logit"].abs())
    chosen = wrong.sort_values(["sure", "id"], ascending=[False, True]).groupby("group").head(most)
    chosen = chosen.sort_values(["group", "sure"], ascending=[True, False])
    return chosen[["group", "id", "label", "logit"]].reset_index(drop=True)


def trained(workspace: Workspace, methods: Sequence[str]) -> dict[str, list[int]]:
    """Seeds of the checkpoints there are, by method.

    Raises:
        UserError: none at all; says how to make some.
    """
    checkpoints = {method: folder.glob("seed-*/dgs.json") for method, folder in workspace.trained(methods).items()}
    seeds = {m: sorted(int(path.parent.name.removeprefix("seed-")) for path in own) for m, own in checkpoints.items()}
    found = {method: own for method, own in seeds.items() if own}
    if not found:
        how = workspace.to_make(f"train@{methods[0]}")
        raise UserError(
            f"Expected a checkpoint of {', '.join(methods)}, found none: nothing is trained yet. Run {how}."
        )
    return found


class Workbench:
    """Images and checkpoints of a profile, opened when they are asked for."""

    def __init__(self, workspace: Workspace, params: Params) -> None:
        self.workspace = workspace
        self.runs = trained(workspace, params.methods)
        self.prepared: Prepared = load_prepared(workspace.find("prepare", made_by="prepare"), workspace.root)
        self.params = self.prepared.with_prepared(params)
        self.images = self.prepared.split("test")
        # Few are kept: each holds a CLIP of its own.
        self._open = lru_cache(maxsize=3)(self._open_checkpoint)

    def mistakes(self, method: str, seed: int) -> pd.DataFrame:
        """`confident_mistakes` in the scores of the evaluate stage; empty where nothing was evaluated yet."""
        try:
            scores = read_scores(self.workspace.find("evaluate", made_by="evaluate") / FILE)
        except UserError:
            return pd.DataFrame(columns=["group", "id", "label", "logit"])
        return confident_mistakes(scores, method, seed)

    def _folder(self, method: str, seed: int) -> Path:
        if method not in self.runs:
            hint = did_you_mean(str(method), self.runs)
            raise UserError(f"No checkpoint of '{method}'.{hint} There are: {', '.join(self.runs)}.")
        if seed not in self.runs[method]:
            there = ", ".join(map(str, self.runs[method]))
            raise UserError(f"No checkpoint of {method} with seed {seed}. There are seeds {there}.")
        return self.workspace.find("train", method, made_by=f"train@{method}") / f"seed-{seed}"

    def _open_checkpoint(self, method: str, seed: int) -> tuple[Classifier, Params, float, list[nn.Linear]]:
        """(what classifies, parameters of the run, threshold of validation, text heads of other seeds)."""
        folder = self._folder(method, seed)
        clip = load_clip(self.params.model, self.workspace.root, self.params.image_size, text=False)
        classifier, info = load_checkpoint(folder, clip)
        check_fits(method, folder, info, self.prepared, self.params, clip)
        given, train = info["params"]["train"], self.params.train
        surgery = SurgeryParams.model_validate({**train.surgery.model_dump(), **given["surgery"]})
        own = train.model_copy(update={"surgery": surgery, "batch_size": int(given["batch_size"])})
        seeds = self.runs[method] if isinstance(classifier, ClipClassifier) else []
        others = [load_heads(self._folder(method, other)) for other in seeds if other != seed]
        params = self.params.model_copy(update={"train": own})
        threshold = info["thresholds"].get("val", 0.0)
        return classifier, params, threshold, [found["text"] for found in others if "text" in found]

    def choose(self, method: str | None, seed: int | None, image: str | None) -> tuple[str, int, str]:
        """What to open first: what is given, else dgs or the last method, its first seed, and its surest mistake."""
        method = method or subject_of(self.runs)
        if seed is None:
            seed = self.runs.get(method, [0])[0]
        if image is None:
            mistakes = self.mistakes(method, seed)
            surest = self.images[-1:] if mistakes.empty else mistakes.loc[[mistakes["logit"].abs().idxmax()]]
            image = str(surest["id"].iloc[0])
        return method, seed, image

    def pictures(self, ids: Sequence[str]) -> list[Array]:
        """Test images by id, (H, W, 3) uint8."""
        rows = self.images.set_index("id").loc[list(ids)]
        return [
            open_image(self.prepared.source, file, row) for file, row in zip(rows["file"], rows["row"], strict=True)
        ]

    def open(self, method: str, seed: int, image: str, label: int | None = None, caption: str | None = None) -> Subject:
        """A test image by its id, or else a file by its path."""
        if Path(image).is_file() and image not in set(self.images["id"]):
            if label not in (0, 1):
                raise UserError(f"Expected label = 0 (real) or 1 (fake) for the file {image}, found {label!r}.")
            return self.look_at_file(method, seed, image, label, caption or "a photo")
        return self.look(method, seed, image)

    def look(self, method: str, seed: int, image_id: str) -> Subject:
        """A test image of the profile's data.

        Raises:
            UserError: no such checkpoint or image.
        """
        rows = self.images[self.images["id"] == image_id]
        if rows.empty:
            hint = did_you_mean(str(image_id), self.images["id"])
            raise UserError(f"No test image or file '{image_id}'.{hint} There are {len(self.images)} test images.")
        row = rows.iloc[0]
        pixels = open_image(self.prepared.source, row["file"], row["row"])
        caption = row["caption"], self.prepared.caption_embeddings[rows.index[0]]
        return self._subject(method, seed, str(image_id), pixels, row["sha256"], int(row["label"]), *caption)

    def look_at_file(self, method: str, seed: int, path: str, label: int, caption: str = "a photo") -> Subject:
        """A file of one's own: its label is the user's word, its caption too.

        Raises:
            UserError: no such checkpoint, or an image that cannot be read.
        """
        data = read(Path(path))
        pixels, sha = decode(data, path), hashlib.sha256(data).hexdigest()
        folder = self.workspace.find("prepare", made_by="prepare")
        embedding = reopen_text_side(self.params, self.workspace.root, folder)([caption])[0]
        return self._subject(method, seed, Path(path).name, pixels, sha, label, caption, embedding)

    def _subject(
        self, method: str, seed: int, name: str, pixels: Array, sha256: str, label: int, caption: str, embedding: Row
    ) -> Subject:
        classifier, params, threshold, others = self._open(method, seed)
        size, count = params.patches.size, params.patches.count
        chosen = params.patches.enabled or min(pixels.shape[:2]) >= size
        kept = patch_indices(pixels, size, count) if chosen else None
        view = make_view(pixels, sha256, params, 0, EVALUATION, kept)
        batch = torch.from_numpy(np.ascontiguousarray(view)).permute(2, 0, 1)[None]
        with torch.no_grad():
            features = classifier.features(batch)
            logit = float(classifier.decide(features).item())
        sample = None
        if isinstance(classifier, ClipClassifier) and "text" in classifier.heads:
            heads = classifier.heads
            with torch.no_grad(), classifier.backbone.frozen():
                frozen = classifier.backbone(batch)
                residual = heads["teacher"](frozen).squeeze(1).sigmoid() - label
            truth, text = torch.tensor([float(label)]), torch.from_numpy(embedding)[None]
            known = Precomputed(truth, text, frozen, torch.ones(1), residual, torch.zeros(1), torch.ones(1))
            further = [head_gradients(heads["text"], text, 1 - truth)]
            further += [head_gradients(head, text, truth) for head in others]
            # The text side knows nothing of levels: its gradients lie in the space it shares with CLIP's features.
            wide = F.pad(torch.cat(further), (0, features.shape[1] - text.shape[1]))
            sample = Sample(features, heads, known, wide, params)
        shown, surgery = params.data.show_images, params.train.surgery
        return Subject(name, label, caption, pixels, view, kept, size, logit, threshold, shown, surgery, sample)


def remark(method: str, subject: Subject) -> str:
    """What to know of the surgery shown, where it is not what trained this checkpoint; "" for dgs."""
    if members := get_method(method).members:
        return f"{method} is composed of {' and '.join(member.name for member in members)}: look at one of them."
    if subject.sample is None and get_method(method).adapters:
        return (
            f"Without a text side (model.text: none) {method} has no harmful direction: there is nothing to suppress."
        )
    if subject.sample is None:
        return f"{method} tunes no CLIP: no gradient reaches a tower, so there is nothing to operate on."
    if method == "dgs":
        return ""
    return f"{method} was trained in its own way. Shown is what DGS-Net's surgery would make of its task gradient."


def sweeps(subject: Subject, values: dict[str, Sequence[float]]) -> pd.DataFrame:
    """What one setting at a time changes, the others as the run had them.

    Columns setting, value, turned (degrees), removed, added (shares); empty for a subject without gradients.
    """
    columns, sample = ["setting", "value", "turned", "removed", "added"], subject.sample
    tried = [(name, value) for name, options in values.items() for value in options] if sample is not None else []
    rows = [
        {"setting": name, "value": value, **measure(*operate(sample, **{name: value}))[1]}  # type: ignore[arg-type]
        for name, value in tried
    ]
    return pd.DataFrame(rows, columns=columns)


def surgery_plane(subject: Subject, **settings: Any) -> Figure:
    """The sample's gradients before and after surgery, in the plane of task and harm; `settings` as in `operate`.

    Raises ValueError for a subject without gradients.
    """
    if subject.sample is None:
        raise ValueError("expected a subject with gradients; a frozen tower has none")
    products, found = measure(*operate(subject.sample, **settings))
    return plane_figure(products, sentence(found))


def sentence(found: Mapping[str, float]) -> str:
    """What `measure` found, in words."""
    if np.isnan(found["turned"]):
        return "There is no gradient to operate on" if np.isnan(found["harm"]) else "Nothing is left of this gradient"
    harm, turned = (rounded_text(found[name]) for name in ("harm", "turned"))
    removed, added = (rounded_text(100 * found[name], 2) for name in ("removed", "added"))
    against = ", against it" if found["conflict"] else ""
    return f"{harm}° from harm{against}: {removed} % of the energy removed, {added} % added, turned by {turned}°"
