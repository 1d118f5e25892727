"""Figures that compare methods: they keep their text inside, say what the data say, and draw what was computed."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_figures import MANY, make_detection, make_forgetting, title

from dgs.analysis.figures import detection as figures
from dgs.analysis.figures.comparison import difference_forest, forgetting_blocks, reliability_diagram
from dgs.errors import UserError


def make_scores(methods: tuple[str, ...] = ("probe", "lora", "dgs"), seeds: int = 3, sure: float = 3.0) -> pd.DataFrame:
    """Scores of a seen and an unseen generator; the logits of images that are right half the time grow with `sure`."""
    rng = np.random.default_rng(0)
    parts = []
    for i, method in enumerate(methods):
        for seed in range(seeds):
            for name in ("a", "b"):
                label = np.repeat([0, 1], 100)
                logit = sure * (1 + i) * rng.normal(size=200) + label
                part = pd.DataFrame({"generator": name, "label": label, "logit": logit})
                parts.append(part.assign(method=method, seed=seed))
    return pd.concat(parts, ignore_index=True).assign(split="test", condition="native", applied_to="both", rho=0.9)


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "calibration": lambda: reliability_diagram(make_scores(), {"a"}),
    "calibration, nine methods": lambda: reliability_diagram(make_scores(MANY, 1), {"a"}),
    "calibration, one method and seed, nothing unseen": lambda: reliability_diagram(
        make_scores(("dgs",), 1), {"a", "b"}
    ),
    "calibration, never sure": lambda: reliability_diagram(make_scores(sure=0.1), {"a"}),
    "forest": lambda: difference_forest(make_detection(), make_forgetting()),
    "forest, nine methods": lambda: difference_forest(make_detection(MANY, 2), make_forgetting(MANY, 2)),
    "forest, one seed, nothing forgotten": lambda: difference_forest(make_detection(("lora", "dgs"), 1)),
    "forest, nothing unseen": lambda: difference_forest(make_detection(("lora", "dgs"), 2, ("mine",), 1)),
    "forest, no lora": lambda: difference_forest(make_detection(("dgs",)), make_forgetting(("dgs",))),
    "blocks": lambda: forgetting_blocks(make_forgetting()),
    "blocks, nine methods": lambda: forgetting_blocks(make_forgetting(MANY, 2)),
    "blocks, one method and seed": lambda: forgetting_blocks(make_forgetting(("dgs",), 1)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_figure_keeps_its_text_inside_apart_and_legible(name: str) -> None:
    fig = DRAWINGS[name]()
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert len(title(fig)) > 10 and fig.get_suptitle().count("\n") < 2
    whole, (width, height) = fig.get_tightbbox(renderer), fig.get_size_inches()
    assert whole.x0 > -0.01 and whole.y0 > -0.01 and whole.x1 < width + 0.01 and whole.y1 < height + 0.01
    heading = fig._suptitle.get_window_extent(renderer)  # type: ignore[attr-defined]
    panels = [ax.get_tightbbox(renderer) for ax in fig.axes if ax.axison]
    for extent in (heading, *(legend.get_window_extent(renderer) for legend in fig.legends)):
        assert all(extent.y0 >= panel.y1 - 1 or extent.y1 <= panel.y0 + 1 for panel in panels)
    sizes = [text.get_fontsize() for text in fig.findobj(mpl.text.Text) if text.get_text()]
    assert min(sizes) * 400 / fig.get_figwidth() / 72 >= 9.0


def points(fig: Figure, method: str) -> np.ndarray:
    lines = [line for line in fig.axes[0].lines if line.get_color() == figures.colour(method)]
    return np.asarray(lines[0].get_xydata())


class TestReliabilityDiagram:
    def test_a_calibrated_detector_lies_on_the_diagonal(self) -> None:
        rng = np.random.default_rng(0)
        scores = make_scores(("dgs",), 1, sure=1.0)
        scores = pd.concat([scores] * 50, ignore_index=True)
        scores["logit"] = rng.normal(0, 2, len(scores))
        scores["label"] = (rng.random(len(scores)) < 1 / (1 + np.exp(-scores["logit"]))).astype(int)
        line = points(reliability_diagram(scores, {"a"}), "dgs")
        assert np.abs(line[:, 0] - line[:, 1]).max() < 7.0 and len(line) == 15

    def test_one_that_is_too_sure_is_said_to_be(self) -> None:
        fig = reliability_diagram(make_scores(sure=50.0), {"a"})
        assert title(fig).startswith("Unseen generators: where dgs says 100 % fake, 5")
        labels = [text.get_text() for text in fig.legends[0].texts]
        assert [label.split(":")[0] for label in labels] == ["probe", "lora", "dgs"]
        assert all("[" in label for label in labels), "the error has its interval"

    def test_without_sure_images_the_title_is_about_the_error(self) -> None:
        assert "dgs is off by" in title(reliability_diagram(make_scores(sure=0.01), {"a", "b"}))
        assert title(reliability_diagram(make_scores(), {"a", "b"})).startswith("Seen generators")


class TestForest:
    def test_a_row_a_method_and_a_panel_a_measure(self) -> None:
        fig = difference_forest(make_detection(noise=0.0), make_forgetting(noise=0.0))
        assert [ax.get_title(loc="left") for ax in fig.axes] == [
            "Balanced acc., unseen", "Worst generator", "AP, unseen", "Zero-shot kept",
        ]  # fmt: skip
        assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["probe", "dgs"]
        assert points(fig, "dgs").tolist() == [[pytest.approx(2.0), 1]]
        assert title(fig) == (
            "dgs: higher than lora in balanced acc., unseen, +2.0 [+2.0, +2.0]; 1 of 2 methods higher, 1 lower"
        )

    def test_a_hollow_marker_says_that_no_difference_is_shown(self) -> None:
        sure, unsure = (difference_forest(make_detection(("lora", "dgs"), noise=noise)) for noise in (0.0, 0.3))
        faces = [fig.axes[0].lines[1].get_markerfacecolor() for fig in (sure, unsure)]
        assert faces == [figures.colour("dgs"), "white"]
        assert "no difference shown to lora" in title(unsure)

    def test_one_seed_shows_nothing(self) -> None:
        fig = difference_forest(make_detection(("lora", "dgs"), 1, noise=0.0))
        assert title(fig) == "dgs to lora: balanced acc., unseen +2.0 (one seed)"
        assert fig.axes[0].lines[1].get_markerfacecolor() == "white"

    def test_equal_methods_are_not_blown_up(self) -> None:
        fig = difference_forest(make_detection(noise=0.0).assign(ap=0.5))
        low, high = fig.axes[2].get_xlim()
        assert fig.axes[2].get_title(loc="left") == "AP, unseen" and high - low >= 2.0

    def test_without_lora_it_says_so(self) -> None:
        assert title(difference_forest(make_detection(("probe", "dgs")))) == "Differences to lora: none"


class TestBlocks:
    def test_a_line_a_method_over_the_blocks(self) -> None:
        fig = forgetting_blocks(make_forgetting())
        line = points(fig, "lora")
        assert line[:, 0].tolist() == [1, 2, 3, 4] and line[-1, 1] == pytest.approx(60.0)
        assert title(fig).startswith("dgs: lower than lora (CKA after block 4 −10.0 points [")

    def test_the_title_compares_towers_that_moved_not_a_frozen_one(self) -> None:
        made = make_forgetting()
        frozen = made["method"] == "probe"
        made.loc[frozen & made["measure"].str.startswith("cka_block:"), "after"] = 1.0 - 1e-6
        assert "probe" not in title(forgetting_blocks(made))

    def test_a_table_without_blocks_is_refused(self) -> None:
        with pytest.raises(UserError, match="no measures of single blocks"):
            forgetting_blocks(make_forgetting().query("measure == 'cka_to_frozen'"))
