"""The page that scores pictures: those dropped into it, or those of a folder. Nothing of them is written or sent on."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from scipy.special import logit

from dgs.data.images import files_under, read
from dgs.data.prepared import Prepared, load_training
from dgs.data.views import Views
from dgs.errors import UserError
from dgs.model.checkpoint import read_info
from dgs.model.detector import Detector, TorchTower, newest_checkpoint
from dgs.model.hub import located
from dgs.model.judge import Judge, Promise, judge
from dgs.model.scoring import Upload, score_batches
from dgs.params import Params
from dgs.stats import percent_text, share_interval
from dgs.workspace import MAIN, Workspace, find_root

MOST_BYTES = 20_000_000  # of a picture; and of all that are dropped at once, ten times as much
MOST_PICTURES = 100  # at once
ALIKE = 50  # validation images that score most like a picture
LOOKED_AT = 2000  # training images, at most, among which the nearest are looked for
NEAREST = 3
SUREST = 500.0  # a logit beyond it counts as this
SHOWN = 128  # px at least, of a picture on the page
NOT_MEANT = (
    "A verdict says what the picture resembles, not where it comes from. It holds for pictures like the validation "
    "images; editing, other cameras and generators that training never saw can turn it. It is no proof, and no "
    "decision about a person should rest on it."
)


@dataclass(frozen=True)
class Card:
    """What is told of one picture. row: as `dgs score --stability --json`. alike: share of fakes among the validation
    images that score most like it, its 95 % interval and their number. nearest: (view, what it is) of training images.
    """

    row: dict[str, Any]
    view: NDArray[np.uint8] | None = None
    alike: tuple[float, float, float, int] | None = None
    nearest: Sequence[tuple[NDArray[np.uint8], str]] = ()


class Scorer:
    """A checkpoint, how it is read, and what it was trained on, where that is here."""

    def __init__(self, checkpoint: str | Path | None, promise: Promise) -> None:
        made_by_hand = Workspace.of(MAIN).out
        folder = newest_checkpoint(find_root(), made_by_hand) if checkpoint is None else located(_found(checkpoint))
        self.detector = Detector.load(folder)
        self.reader: Judge = judge(read_info(folder), folder, promise)
        kept = self.detector.info.get("validation_logits") or {}
        self.validation = [(score, label) for label in ("real", "fake") for score in kept.get(label, ())]
        self.training: tuple[Views, pd.DataFrame] | None = self._training_images()
        self._features: torch.Tensor | None = None

    def _training_images(self) -> tuple[Views, pd.DataFrame] | None:
        """Views and rows of the images that it was trained on; None where they are not here, or are not to be shown."""
        said = self.detector.info["params"]
        workspace = Workspace.of(str(said.get("profile", "")))
        try:
            prepared: Prepared = load_training(workspace.find("prepare", made_by="prepare"), workspace.root)
        except (UserError, OSError):
            return None
        hidden = not said.get("data", {}).get("show_images", True)
        if hidden or prepared.info["training_hash"] != self.detector.info["data_hash"]:
            return None
        rows = prepared.split("train")
        rows = rows.iloc[np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int)]
        # What a view is made by is all that `Views` asks of parameters.
        return Views(rows, prepared.source, cast(Params, self.detector.params), patches=prepared.patches), rows

    @torch.no_grad()
    def _features_of(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        classifier = cast(TorchTower, self.detector.tower).classifier
        parts = [torch.stack(list(views[start : start + 32])) for start in range(0, len(views), 32)]
        found = torch.cat([classifier.features(part.to(classifier.device)).float() for part in parts])
        return torch.nn.functional.normalize(found, dim=1).cpu()

    def nearest(self, view: NDArray[np.uint8]) -> list[tuple[NDArray[np.uint8], str]]:
        """The training images with the most similar features (cosine), and what they are."""
        if self.training is None:
            return []
        views, rows = self.training
        if self._features is None:
            self._features = self._features_of([views[index][0] for index in range(len(views))])
        own = self._features_of([torch.from_numpy(view).permute(2, 0, 1)])
        chosen = (self._features @ own[0]).topk(min(NEAREST, len(rows))).indices.tolist()
        kinds = [f"generated, {rows['generator'].iloc[i]}" if rows["label"].iloc[i] else "real" for i in chosen]
        return [(views[i][0].permute(1, 2, 0).numpy(), kind) for i, kind in zip(chosen, kinds, strict=True)]

    def alike(self, score: float) -> tuple[float, float, float, int] | None:
        """Share of fakes among the `ALIKE` validation images with the nearest logits, its interval, their number."""
        if not self.validation:
            return None
        near = sorted(self.validation, key=lambda each: abs(each[0] - score))[:ALIKE]
        return *share_interval(sum(label == "fake" for _, label in near), len(near)), len(near)

    def cards(self, pictures: Iterable[Path | Upload]) -> Iterator[Card]:
        """One picture after another."""
        for batch in score_batches(self.detector, self.reader, pictures, 1, stability=self.reader.band is not None):
            for row, view in batch:
                if view is None:
                    yield Card(row)
                    continue
                score = float(np.clip(logit(row["probability"]), -SUREST, SUREST))
                yield Card(row, view, self.alike(score), self.nearest(view))


def _found(path: str | Path) -> str | Path:
    """A path as it is, or, where nothing is there, relative to the repository: a notebook's own folder is another."""
    beside = find_root() / path
    return beside if not Path(path).exists() and beside.exists() else path


def uploads_of(folder: str | Path) -> Iterator[Upload | Card]:
    """The files of a folder as if they had been dropped into the page, or why one cannot be.

    Raises:
        UserError: no such folder.
    """
    top = Path(_found(folder))
    if not top.is_dir():
        raise UserError(f"Expected a folder of pictures at {folder}, found none. Mend the path.")
    for file in files_under([top]):
        name = file.relative_to(top).as_posix()
        try:
            yield Upload(name, read(file, MOST_BYTES))
        except UserError as error:
            yield Card({"path": name, "error": str(error).replace(str(file), name)})


def told(card: Card) -> str:
    """A card as HTML that asks for nothing outside; names and errors are escaped."""
    return _CARD.render(
        row=card.row,
        picture=None if card.view is None else _address(card.view),
        nearest=[(_address(view), kind) for view, kind in card.nearest],
        alike=card.alike,
        per_cent=percent_text,
    )


def _address(view: NDArray[np.uint8]) -> str:
    """A picture as an address that holds all of it."""
    buffer, image = io.BytesIO(), Image.fromarray(view)
    factor = max(1, SHOWN // max(image.size))
    image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_CARD = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
).get_template("score_card.html.j2")


class ScorePage:
    """A place to drop pictures into, a bar of progress, and a card for each picture, the last ones first."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        own = {"description": "Choose pictures", "layout": widgets.Layout(width="auto")}
        self.upload = widgets.FileUpload(accept="image/*", multiple=True, **own)
        self.progress = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(visibility="hidden"))
        self.said = widgets.HTML()
        self.cards = widgets.VBox([])
        most = f"At most {MOST_PICTURES} at once, each up to {MOST_BYTES // 1_000_000} MB."
        limits = widgets.HTML(_paragraphs(f"{most} They stay in this machine's memory."))
        about = widgets.HTML(_paragraphs(f"{scorer.reader.note}.", NOT_MEANT))
        self.rows: list[dict[str, Any]] = []
        self.box = widgets.VBox([limits, self.upload, self.progress, self.said, self.cards, about])
        self.upload.observe(self._dropped, names="value")

    def _dropped(self, change: Any) -> None:
        if not change["new"]:
            return
        given = [Upload(str(file["name"]), bytes(file["content"])) for file in change["new"]]
        self.upload.value = ()
        self.show(given)

    def show(self, given: Iterable[Upload | Card]) -> str:
        """Score what was given and put a card for each on the page; the new cards as HTML, in order.

        What cannot be scored is one sentence in its card.
        """
        chosen = list(islice(given, MOST_PICTURES + 1))
        left_out = f"Pictures after the first {MOST_PICTURES} were left out." if len(chosen) > MOST_PICTURES else ""
        chosen = chosen[:MOST_PICTURES]
        self.said.value = _paragraphs(left_out)
        self.progress.max, self.progress.value, self.progress.layout.visibility = max(1, len(chosen)), 0, "visible"
        found = []
        for one in chosen:
            card = self._card(one)
            self.rows.append(card.row)
            found.append(told(card))
            self.cards.children = (widgets.HTML(found[-1]), *self.cards.children)
            self.progress.value += 1
        self.progress.layout.visibility = "hidden"
        return "".join([*found, self.said.value])

    @property
    def table(self) -> pd.DataFrame:
        """What was said of each picture so far."""
        names = ["path", "probability", "calibrated", "verdict", "stable", "error"]
        return pd.DataFrame(self.rows).reindex(columns=names).rename(columns={"path": "picture"})

    def _card(self, one: Upload | Card) -> Card:
        if isinstance(one, Card):
            return one
        if len(one.content) > MOST_BYTES:
            return Card(
                {"path": one.name, "error": f"It is larger than {MOST_BYTES // 1_000_000} MB. Make it smaller."}
            )
        try:
            (card,) = self.scorer.cards([one])
        except Exception as error:  # whatever a picture does to a decoder or a model, the page goes on
            return Card({"path": one.name, "error": f"It could not be scored ({type(error).__name__}). Try another."})
        return card


def _paragraphs(*texts: str) -> str:
    return "".join(f"<p>{text}</p>" for text in texts)
