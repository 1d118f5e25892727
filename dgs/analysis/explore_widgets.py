"""The explorer's controls: every move of a slider computes from a subject's tensors and draws anew."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from dgs.analysis.explore import Subject, Workbench, remark, surgery_plane
from dgs.analysis.figures.style import png
from dgs.errors import UserError

LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
EPSILONS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)
WIDGET = "application/vnd.jupyter.widget-view+json"
SLIDER_DPI = 90  # of a picture that is drawn anew with every move
_OWN = "a file of mine"


def bundle(panel: widgets.Widget, picture: Figure) -> dict[str, Any]:
    """A widget with a picture in its place where widgets cannot run, for `display(..., raw=True)`."""
    view = {"version_major": 2, "version_minor": 0, "model_id": panel.model_id}
    still = base64.b64encode(png(picture)).decode()
    return {WIDGET: view, "image/png": still, "text/plain": "the explorer"}


class SurgeryControls:
    """Sliders of the surgery and the picture they move: computed from the subject's tensors, without the tower."""

    def __init__(self, subject: Subject) -> None:
        start = subject.surgery
        wide = {"style": {"description_width": "70px"}, "layout": widgets.Layout(width="420px")}

        def slider(name: str, values: Sequence[float], value: float) -> widgets.SelectionSlider:
            options = [(f"{v:g}", v) for v in sorted({*values, value})]
            return widgets.SelectionSlider(options=options, value=value, description=name, **wide)

        self.controls = {
            "lam": slider("lambda", LAMBDAS, start.lam),
            "eps": slider("epsilon", EPSILONS, start.eps),
            "rank": widgets.IntSlider(value=1, min=1, max=1, description="rank", **wide),
            "order": widgets.ToggleButtons(options=["release", "paper"], value=start.order, description="order"),
            "scale": widgets.ToggleButtons(options=["release", "per_sample"], value=start.scale, description="scale"),
        }
        self.picture = widgets.Image(format="png")
        self.subject = subject
        found = widgets.interactive_output(self.draw, self.controls)
        self.show(subject)
        left = widgets.VBox([*self.controls.values(), found])
        self.box = widgets.HBox([left, self.picture], layout=widgets.Layout(flex_flow="row wrap"))

    def show(self, subject: Subject) -> None:
        """Another image or checkpoint; settings stay as they are, as far as there are directions."""
        self.subject = subject
        self.controls["rank"].max = max([1, *subject.ranks])
        self.picture.layout.display = "none" if subject.sample is None else None
        self.draw(**{name: control.value for name, control in self.controls.items()})

    def draw(self, **settings: Any) -> None:
        """The picture for these settings, where a gradient reaches the tower."""
        if self.subject.sample is not None:
            self.picture.value = png(surgery_plane(self.subject, **settings), SLIDER_DPI)


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
        controls = {
            name: getattr(self, name) for name in ("method", "seed", "group", "image", "path", "caption", "label")
        }
        self.method.observe(lambda change: setattr(self.seed, "options", bench.runs[change["new"]]), names="value")
        self.group.observe(self._new_group, names="value")
        said = widgets.interactive_output(self.look, controls)
        chosen = widgets.VBox([self.method, self.seed, self.group, self.image, self.own, self.message, said])
        top = widgets.HBox([chosen, self.portrait], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([top, self.surgery.box])

    def _new_group(self, change: Mapping[str, Any]) -> None:
        if change["new"] != _OWN:
            self.image.options = self._ids[change["new"]]

    def look(self, method: str, seed: int, group: str, image: str, path: str, caption: str, label: int) -> None:
        """Open what is chosen; a mistake is said in the panel, and the last picture stays."""
        own = group == _OWN
        try:
            if own and not path:
                raise UserError("Type the path of an image file.")
            bench = self.bench
            subject = bench.look_at_file(method, seed, path, label, caption) if own else bench.look(method, seed, image)
        except UserError as error:
            self.message.value = html.escape(str(error), quote=False)
            return
        self.own.layout.display = None if own else "none"
        self.image.layout.display = "none" if own else None
        self.portrait.value = png(subject.portrait)
        self.message.value = remark(method, subject)
        self.surgery.show(subject)
