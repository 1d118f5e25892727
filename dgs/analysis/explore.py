"""One image at one checkpoint: its score, its three gradients, and what surgery with other settings would make of them.

A `Workbench` opens images and checkpoints; a `Subject` is what it found, tensors that everything else is computed from
at once, so that a slider can be moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.analysis.angles import ROUNDING, cosines, degrees, orthonormal
from dgs.analysis.evaluate import check_fits
from dgs.data.images import decode, read
from dgs.data.manifest import open_image
from dgs.data.patches import patch_entropy, select_indices
from dgs.data.prepared import Prepared, load_prepared
from dgs.data.views import EVALUATION, make_view
from dgs.errors import UserError, did_you_mean
from dgs.model.backbone import Backbone
from dgs.model.checkpoint import load_checkpoint, load_heads
from dgs.model.clip import encode_texts, load_clip
from dgs.model.detector import probability
from dgs.model.surgery import head_gradients, split_signs, suppress
from dgs.model.training_log import inner_products
from dgs.params import Params, SurgeryParams
from dgs.workspace import Workspace

Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """Of the surgery. rank: how many harmful directions are projected off, 1 in the paper; the rest: train.surgery."""

    lam: float
    eps: float
    rank: int
    order: Literal["release", "paper"]
    scale: Literal["release", "per_sample"]

    @classmethod
    def of(cls, params: SurgeryParams) -> Settings:
        """Those of a run."""
        return cls(params.lam, params.eps, 1, params.order, params.scale)


@dataclass(frozen=True)
class Gradients:
    """Of one sample, sum-reduced (without the batch's 1/B), (1, D) float32 each.

    task: dL_img/df at the student's features. teacher: dL_T/dfT at the frozen tower's.
    texts: (K, D), dL_text/dt: the sample's own first; then that of the other class, with which a linear head's batch is
        complete; then the sample's own under the text heads of other seeds.
    batch_size: B of the run, which scales them.
    """

    task: Tensor
    teacher: Tensor
    texts: Tensor
    batch_size: int


@dataclass(frozen=True)
class Subject:
    """What one image is to one checkpoint.

    image: (H, W, 3) uint8. view: (S, S, 3) uint8, what the model sees. patches: indices of the patches that selection
    keeps, whether or not the model uses it; None for an image too small to have any.
    gradients: None for a method whose tower stays frozen: no gradient reaches it.
    """

    name: str
    label: int
    caption: str
    image: Array
    view: Array
    patches: NDArray[np.int32] | None
    logit: float
    threshold: float
    gradients: Gradients | None
    settings: Settings

    @property
    def probability(self) -> float:
        """That the image is generated."""
        return float(probability(np.array(self.logit)))

    @property
    def verdict(self) -> str:
        """In words, at the threshold of the validation images, with whether it is right."""
        found = int(self.logit > self.threshold)
        return f"called {('real', 'generated')[found]}, {'rightly' if found == self.label else 'wrongly'}"


def suppress_all(grad: Tensor, harmful: Tensor, eps: float) -> Tensor:
    """Suppression of rank K: off the first direction as in training, then exactly off what the others add to it.

    Args:
        grad: (1, D).
        harmful: (K, D) directions of any length, in the order they count.
        eps: as in `surgery.suppress`, for the first.

    Returns:
        (1, D); with eps = 0 orthogonal to all K.
    """
    basis: list[Tensor] = []
    for number, direction in enumerate(harmful):
        rest = direction
        for known in basis:
            rest = rest - (rest @ known) * known
        length = rest.norm()
        if length <= 1e-6 * direction.norm():
            continue  # lies in the span of those before it
        grad = suppress(grad, rest[None], eps if number == 0 else 0.0)
        basis.append(rest / length)
    return grad


def _scale(gradients: Gradients, settings: Settings) -> float:
    return 1.0 / gradients.batch_size if settings.scale == "release" else 1.0


def harmful_directions(gradients: Gradients, settings: Settings) -> Tensor:
    """The directions that surgery of this rank takes the gradient off: (K, D), in their order, as long as they are."""
    harmful, _ = split_signs(_scale(gradients, settings) * gradients.texts[: settings.rank])
    return harmful


def operate(gradients: Gradients, settings: Settings) -> dict[str, Tensor]:
    """DGS-Net's surgery on one sample, as a training step with B samples does it: (1, D) vectors by name.

    task, harmful, beneficial, applied: what `dgs.model.step.surgery_step` gives for that row, at rank 1. At a higher
    rank harmful is still the sample's own direction, the first of `harmful_directions`.
    """
    size = gradients.batch_size
    per = _scale(gradients, settings)
    task = gradients.task / size
    harmful = harmful_directions(gradients, settings)
    _, beneficial = split_signs(per * gradients.teacher)
    prior = settings.lam * beneficial / size
    if settings.order == "release":
        applied = suppress_all(task + prior, harmful, settings.eps)
    else:
        applied = suppress_all(task, harmful, settings.eps) + prior
    return {"task": task, "harmful": harmful[:1], "beneficial": beneficial, "applied": applied}


def measure(vectors: dict[str, Tensor], directions: Tensor | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Inner products of `operate`'s vectors, and what they say.

    Args:
        directions: (K, D), all that the surgery takes the gradient off, whose span "removed" and "added" are told by;
            None: the harmful direction alone. With K = 1 they are those of `angles.energies`.

    Returns:
        ({"a.b": <a, b>}, {"harm": angle of task and harmful direction, "turned": of task and applied, both in degrees,
        "conflict": 1 where the first is over 90, "removed", "added": shares of the task gradient's energy}).
    """
    frame = pd.DataFrame(inner_products(vectors))
    task, applied = (vectors[name][0].double().numpy() for name in ("task", "applied"))
    given = vectors["harmful"] if directions is None else directions
    basis = orthonormal(F.normalize(given.double(), dim=1, eps=1e-300).numpy().T)
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
    rows = scores[(scores["method"] == method) & (scores["seed"] == seed) & (scores["split"] == "test")]
    rows = rows[rows["condition"] == "native"]
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
    found: dict[str, list[int]] = {}
    for method in methods:
        try:
            folder = workspace.find("train", method, made_by=f"train@{method}")
        except UserError:
            continue
        seeds = sorted(int(path.parent.name.removeprefix("seed-")) for path in folder.glob("seed-*/dgs.json"))
        if seeds:
            found[method] = seeds
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

    def scores(self) -> pd.DataFrame | None:
        """The table of the evaluate stage; None where nothing was evaluated yet."""
        try:
            return pd.read_parquet(self.workspace.find("evaluate", made_by="evaluate") / "scores.parquet")
        except UserError:
            return None

    def _folder(self, method: str, seed: int) -> Path:
        if method not in self.runs:
            hint = did_you_mean(str(method), self.runs)
            raise UserError(f"No checkpoint of '{method}'.{hint} There are: {', '.join(self.runs)}.")
        if seed not in self.runs[method]:
            there = ", ".join(map(str, self.runs[method]))
            raise UserError(f"No checkpoint of {method} with seed {seed}. There are seeds {there}.")
        return self.workspace.find("train", method, made_by=f"train@{method}") / f"seed-{seed}"

    def _open_checkpoint(self, method: str, seed: int) -> tuple[Backbone, dict[str, nn.Linear], Settings, float, int]:
        folder = self._folder(method, seed)
        clip = load_clip(self.params.model, self.workspace.root, self.params.image_size, text=False)
        backbone, heads, info = load_checkpoint(folder, clip)
        check_fits(method, folder, info, self.prepared, self.params, clip)
        own = self.params.model_copy(deep=True)
        given = info["params"]["train"]
        surgery = SurgeryParams.model_validate({**own.train.surgery.model_dump(), **given["surgery"]})
        return backbone, heads, Settings.of(surgery), info["thresholds"].get("val", 0.0), int(given["batch_size"])

    def _texts(self, method: str, seed: int, embedding: Tensor, label: Tensor) -> Tensor:
        own = load_heads(self._folder(method, seed))["text"]
        others = [load_heads(self._folder(method, other))["text"] for other in self.runs[method] if other != seed]
        rows = [head_gradients(own, embedding, label), head_gradients(own, embedding, 1 - label)]
        return torch.cat([*rows, *(head_gradients(head, embedding, label) for head in others)])

    def choose(self, method: str | None, seed: int | None, image: str | None) -> tuple[str, int, str]:
        """What to open first: what is given, else dgs or the last method, its first seed, and its surest mistake."""
        method = method or ("dgs" if "dgs" in self.runs else list(self.runs)[-1])
        if seed is None:
            seed = self.runs.get(method, [0])[0]
        if image is None:
            scores = self.scores()
            mistakes = None if scores is None else confident_mistakes(scores, method, seed)
            if mistakes is None or mistakes.empty:
                image = str(self.images["id"].iloc[-1])
            else:
                image = str(mistakes["id"].iloc[int(mistakes["logit"].abs().to_numpy().argmax())])
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
        embedding = self.prepared.caption_embeddings[rows.index[0]]
        return self._subject(
            method, seed, pixels, row["sha256"], int(row["label"]), row["caption"], embedding, str(image_id)
        )

    def look_at_file(self, method: str, seed: int, path: str, label: int, caption: str = "a photo") -> Subject:
        """A file of one's own: its label is the user's word, its caption too.

        Raises:
            UserError: no such checkpoint, or an image that cannot be read.
        """
        data = read(Path(path))
        pixels = decode(data, path)
        clip = load_clip(self.params.model, self.workspace.root, self.params.image_size)
        embedding = encode_texts(clip, [caption])[0]
        sha = hashlib.sha256(data).hexdigest()
        return self._subject(method, seed, pixels, sha, label, caption, embedding, Path(path).name)

    def _subject(
        self,
        method: str,
        seed: int,
        pixels: Array,
        sha256: str,
        label: int,
        caption: str,
        embedding: NDArray[np.float32],
        name: str,
    ) -> Subject:
        backbone, heads, settings, threshold, batch_size = self._open(method, seed)
        size, count = self.params.patches.size, self.params.patches.count
        chosen = self.params.patches.enabled or min(pixels.shape[:2]) >= size
        kept = select_indices(patch_entropy(pixels, size), count) if chosen else None
        view = make_view(pixels, sha256, self.params, 0, EVALUATION, kept)
        batch = torch.from_numpy(np.ascontiguousarray(view)).permute(2, 0, 1)[None]
        with torch.no_grad():
            features = backbone(batch)
        with backbone.frozen():
            frozen = backbone(batch)
        logit = float(heads["image"](features).item())
        gradients = None
        if "text" in heads:
            truth = torch.tensor([float(label)])
            texts = self._texts(method, seed, torch.from_numpy(embedding)[None], truth)
            gradients = Gradients(
                task=head_gradients(heads["image"], features, truth),
                teacher=head_gradients(heads["teacher"], frozen, truth),
                texts=F.pad(texts, (0, features.shape[1] - texts.shape[1])),  # features of levels have no text side
                batch_size=batch_size,
            )
        return Subject(name, label, caption, pixels, view, kept, logit, threshold, gradients, settings)


def remark(method: str, subject: Subject) -> str:
    """What to know of the surgery shown, where it is not what trained this checkpoint; "" for dgs."""
    if subject.gradients is None:
        return f"{method} trains no tower: no gradient reaches it, so there is nothing to operate on."
    if method == "dgs":
        return ""
    return f"{method} was trained in its own way. Shown is what DGS-Net's surgery would make of its task gradient."


def ranks(subject: Subject) -> list[int]:
    """Ranks there are directions for; none without gradients."""
    return [] if subject.gradients is None else list(range(1, len(subject.gradients.texts) + 1))


def sweeps(subject: Subject, values: dict[str, Sequence[float]]) -> pd.DataFrame:
    """What one setting at a time changes, the others as the run had them.

    Columns setting, value, turned (degrees), removed, added (shares); empty for a subject without gradients.
    """
    if subject.gradients is None:
        return pd.DataFrame(columns=["setting", "value", "turned", "removed", "added"])
    rows = []
    for name, options in values.items():
        for value in options:
            chosen = replace(subject.settings, **{name: value})  # type: ignore[arg-type]
            _, said = measure(operate(subject.gradients, chosen), harmful_directions(subject.gradients, chosen))
            rows.append({"setting": name, "value": value, **{k: said[k] for k in ("turned", "removed", "added")}})
    return pd.DataFrame(rows)
