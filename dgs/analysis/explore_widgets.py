"""The explorer's controls: every move of a slider computes from cached tensors and draws anew."""

from __future__ import annotations

import base64
from typing import Any

import ipywidgets as widgets

from dgs.analysis.explore import Settings, Subject, Workbench, remark
from dgs.analysis.figures.explore import png, portrait, surgery_plane
from dgs.errors import UserError

LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
EPSILONS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)
WIDGET = "application/vnd.jupyter.widget-view+json"
_OWN = "a file of mine"


def bundle(panel: widgets.Widget, picture: bytes) -> dict[str, Any]:
    """A widget with a picture in its place where widgets cannot run, for `display(..., raw=True)`."""
    view = {"version_major": 2, "version_minor": 0, "model_id": panel.model_id}
    return {WIDGET: view, "image/png": base64.b64encode(picture).decode(), "text/plain": "the explorer"}


def _with(options: tuple[float, ...], value: float) -> list[float]:
    return sorted({*options, value})


class SurgeryControls:
    """Sliders of the surgery and the picture they move."""

    def __init__(self, subject: Subject) -> None:
        start = subject.settings
        wide = {"style": {"description_width": "70px"}, "layout": widgets.Layout(width="420px")}
        self.lam = widgets.SelectionSlider(
            options=[(f"{v:g}", v) for v in _with(LAMBDAS, start.lam)], value=start.lam, description="lambda", **wide
        )
        self.eps = widgets.SelectionSlider(
            options=[(f"{v:g}", v) for v in _with(EPSILONS, start.eps)], value=start.eps, description="epsilon", **wide
        )
        self.rank = widgets.IntSlider(value=1, min=1, max=1, description="rank", **wide)
        self.order = widgets.ToggleButtons(options=["release", "paper"], value=start.order, description="order")
        self.scale = widgets.ToggleButtons(options=["release", "per_sample"], value=start.scale, description="scale")
        self.picture = widgets.Image(format="png")
        self.subject = subject
        for control in (self.lam, self.eps, self.rank, self.order, self.scale):
            control.observe(lambda _: self.draw(), names="value")
        self.show(subject)
        self.box = widgets.HBox(
            [widgets.VBox([self.lam, self.eps, self.rank, self.order, self.scale]), self.picture],
            layout=widgets.Layout(flex_flow="row wrap"),
        )

    @property
    def settings(self) -> Settings:
        """As the controls stand."""
        return Settings(self.lam.value, self.eps.value, self.rank.value, self.order.value, self.scale.value)

    def show(self, subject: Subject) -> None:
        """Another image or checkpoint; settings stay as they are, as far as there are directions."""
        self.subject = subject
        if subject.gradients is not None:
            self.rank.max = len(subject.gradients.texts)
        self.draw()

    def draw(self) -> None:
        """The picture for the settings as they stand; hidden where no gradient reaches the tower."""
        shown = self.subject.gradients is not None
        self.picture.layout.display = None if shown else "none"
        if shown:
            self.picture.value = png(surgery_plane(self.subject, self.settings))


class Explorer:
    """Choose an image, a method and a checkpoint; below, what the model sees of it, and the surgery's sliders."""

    def __init__(self, bench: Workbench, method: str, seed: int, image: str) -> None:
        self.bench = bench
        subject = bench.look(method, seed, image)
        rows = bench.images
        groups = rows["generator"].where(rows["label"] == 1, "real")
        self._ids = {str(name): part["id"].tolist() for name, part in rows.groupby(groups, sort=True)}
        group = str(groups[rows["id"] == image].iloc[0])
        self.method = widgets.Dropdown(options=list(bench.runs), value=method, description="method")
        self.seed = widgets.Dropdown(options=bench.runs[method], value=seed, description="seed")
        self.group = widgets.Dropdown(options=[*self._ids, _OWN], value=group, description="images")
        self.image = widgets.Dropdown(options=self._ids[group], value=image, description="image")
        self.path = widgets.Text(placeholder="path of an image file", description="file", continuous_update=False)
        self.caption = widgets.Text(value="a photo", description="caption", continuous_update=False)
        self.label = widgets.ToggleButtons(options=[("real", 0), ("fake", 1)], value=1, description="it is")
        self.message = widgets.HTML()
        self.portrait = widgets.Image(format="png")
        self.own = widgets.VBox([self.path, self.caption, self.label])
        self.surgery = SurgeryControls(subject)
        self.method.observe(self._new_method, names="value")
        self.group.observe(self._new_group, names="value")
        for control in (self.seed, self.image, self.path, self.caption, self.label):
            control.observe(lambda _: self.look(), names="value")
        self._show(subject)
        chosen = widgets.VBox([self.method, self.seed, self.group, self.image, self.own, self.message])
        top = widgets.HBox([chosen, self.portrait], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([top, self.surgery.box])

    def _new_method(self, change: dict[str, Any]) -> None:
        self.seed.options = self.bench.runs[change["new"]]  # sets a seed, which looks
        self.look()

    def _new_group(self, change: dict[str, Any]) -> None:
        if change["new"] != _OWN:
            self.image.options = self._ids[change["new"]]  # sets an image, which looks
        self.look()

    def _find(self) -> Subject:
        if self.group.value != _OWN:
            return self.bench.look(self.method.value, self.seed.value, self.image.value)
        if not self.path.value:
            raise UserError("Type the path of an image file.")
        rest = (self.label.value, self.caption.value)
        return self.bench.look_at_file(self.method.value, self.seed.value, self.path.value, *rest)

    def look(self) -> None:
        """Open what is chosen; a mistake is said in the panel, and the last picture stays."""
        try:
            subject = self._find()
        except UserError as error:
            self._say(str(error))
            return
        self._show(subject)

    def _say(self, text: str) -> None:
        self.message.value = text.replace("<", "&lt;")

    def _show(self, subject: Subject) -> None:
        own = self.group.value == _OWN
        self.own.layout.display = None if own else "none"
        self.image.layout.display = "none" if own else None
        self.portrait.value = png(portrait(subject, self.bench.params.patches.size))
        self._say(remark(self.method.value, subject))
        self.surgery.show(subject)
