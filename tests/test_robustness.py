"""Fragile or biased: what is read off changed images, by hand and from a model of a detector's scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_figures import make_changed, make_detection, title
from test_report import report

from dgs.analysis.figures.detection import robustness, robustness_curves
from dgs.analysis.metrics import detection_table, summary
from dgs.analysis.report import write_report
from dgs.analysis.robustness import (
    change,
    changes,
    conditions_of,
    format_conditions,
    means_over_generators,
    readings,
    tier,
)
from dgs.conditions import parse_condition
from dgs.errors import UserError


def scores_of(condition: str, real: float, fake: float, seeds: int = 3) -> pd.DataFrame:
    """Scores of a detector whose logits are N(-1, 1) on reals and N(1, 1) on fakes; under `condition` the means are
    `real` and `fake`."""
    parts = []
    for seed in range(seeds):
        grain = np.random.default_rng(seed).normal(size=(2, 2, 2000))
        for row, name, means in ((0, "native", (-1.0, 1.0)), (1, condition, (real, fake))):
            for label, mean in enumerate(means):
                logits = mean + grain[row, label]
                parts.append(pd.DataFrame({"logit": logits, "label": label, "condition": name, "seed": seed}))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(split="test", generator="vq", applied_to="both", method="dgs", rho=0.9)


@pytest.mark.parametrize(
    ("means", "ranking", "shift", "shown"),
    [
        ((-0.3, 0.3), (-0.5, -0.2), (-0.01, 0.01), {"fragile"}),  # evidence is lost
        ((-2.0, 0.0), (-0.01, 0.01), (0.05, 0.5), {"looks real"}),  # all scores move
        ((0.0, 2.0), (-0.01, 0.01), (-0.5, -0.05), {"looks fake"}),
        ((-1.2, -0.6), (-0.5, -0.01), (0.01, 0.5), {"fragile", "looks real"}),
        ((-1.0, 1.0), (-0.01, 0.01), (-0.01, 0.01), {"none shown"}),
    ],
)
def test_bias_and_fragility_are_told_apart(
    means: tuple[float, float], ranking: tuple[float, float], shift: tuple[float, float], shown: set[str]
) -> None:
    table = changes(means_over_generators(detection_table(scores_of("jpeg:75", *means), set()))[0])
    for measure, (low, high) in (("ranking", ranking), ("shift", shift)):
        interval = change(table, "dgs", "jpeg:75", measure)
        assert interval is not None and low < interval.mean < high
    found = readings(table, "dgs", [parse_condition("jpeg:75")])
    assert found == {
        name: ["jpeg:75"] * (name in shown) for name in ("fragile", "looks real", "looks fake", "none shown")
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("native png", "clean"),
        ("jpeg:75 jpeg:90 jpeg:95 resize:0.5 resize:0.75 resize:1.5", "web"),
        ("jpeg:74 jpeg:30 resize:0.49 blur:1 noise:2 crop:0.9", "hard"),
    ],
)
def test_each_condition_is_in_one_tier(names: str, expected: str) -> None:
    assert {tier(name) for name in names.split()} == {expected}


class TestComposition:
    """One pass over changed images gives three rows: all changed, fakes alone, reals alone."""

    def test_the_label_that_is_not_changed_keeps_its_native_scores_and_the_two_parts_add_up(self) -> None:
        table = detection_table(scores_of("blur:1", -3.0, -0.5, seeds=1), set())
        table = table[table["threshold_rule"] == "0.5"].set_index(["condition", "applied_to"])
        native, both = table.loc[("native", "both")], table.loc[("blur:1", "both")]
        fake, real = table.loc[("blur:1", "fake")], table.loc[("blur:1", "real")]
        assert fake["r_acc"] == native["r_acc"] != both["r_acc"] == real["r_acc"]
        assert real["f_acc"] == native["f_acc"] != both["f_acc"] == fake["f_acc"]
        assert (table[["n_real", "n_fake"]] == 2000).all(axis=None)
        lost = table["balanced_acc"]["blur:1"] - table["balanced_acc"]["native", "both"]
        assert lost["both"] == pytest.approx(lost["fake"] + lost["real"])

    def test_thresholds_come_from_native_validation_alone(self) -> None:
        scores = scores_of("noise:8", 3.0, 5.0, seeds=1)
        validation = scores[scores["condition"] == "native"].assign(split="val")
        changed = scores[scores["condition"] == "noise:8"].assign(split="val")
        with_changed = detection_table(pd.concat([scores, validation, changed]), set())
        pd.testing.assert_frame_equal(with_changed, detection_table(pd.concat([scores, validation]), set()))
        rows = with_changed[(with_changed["condition"] == "noise:8") & (with_changed["applied_to"] == "both")]
        assert rows.loc[rows["threshold_rule"] == "val", "r_acc"].item() < 0.05, "no threshold was chosen for noise"


class TestTables:
    def test_changes_by_hand(self) -> None:
        table = changes(means_over_generators(make_changed(fragile=0.05, shift=0.08))[0])
        found = table.groupby(["condition", "measure"])["value"].agg(["min", "max"])
        for measure, value in (("accuracy", -0.05), ("ranking", -0.05), ("shift", 0.08)):
            assert found.xs(measure, level="measure").to_numpy() == pytest.approx(value)

    def test_seeds_are_paired(self) -> None:
        table = changes(means_over_generators(make_changed(noise=0.2))[0])
        interval = change(table, "lora", "blur:4", "accuracy")
        assert interval is not None and interval.high - interval.low == pytest.approx(0.0, abs=1e-9)

    def test_conditions_go_from_mild_to_harsh(self) -> None:
        mixed = make_changed(names="jpeg:30 blur:4 jpeg:95 png blur:1")
        assert [c.name for c in conditions_of(mixed)] == ["jpeg:95", "jpeg:30", "blur:1", "blur:4", "png"]

    def test_unseen_generators_count_where_there_are_any(self) -> None:
        made = make_changed(seeds=1)
        means, where = means_over_generators(made)
        assert where == "unseen" and means["balanced_acc"].max() < made["balanced_acc"].max()
        assert means_over_generators(make_changed(seeds=1, generators=("mine",), n_seen=1))[1] == "seen"

    def test_one_seed_is_read_by_its_mean_and_a_small_change_is_none(self) -> None:
        table = changes(means_over_generators(make_changed(seeds=1, fragile=0.02, shift=0.009))[0])
        found = readings(table, "dgs", [parse_condition("jpeg:95")])
        assert found["fragile"] == ["jpeg:95"] and not found["looks real"]

    def test_what_seeds_disagree_about_is_not_shown(self) -> None:
        made = make_changed(seeds=2, names="jpeg:95")
        made.loc[(made["seed"] == 1) & (made["condition"] == "jpeg:95"), "auroc"] += 0.2
        found = readings(changes(means_over_generators(made)[0]), "dgs", [parse_condition("jpeg:95")])
        assert found["fragile"] == []

    def test_formats_have_their_usual_names_and_the_mildest_quality(self) -> None:
        conditions = [parse_condition(name) for name in ("blur:1", "jpeg:30", "jpeg:95", "png")]
        assert format_conditions(conditions) == {
            "native": ("native", "both"),
            "fakes re-encoded (jpeg:95)": ("jpeg:95", "fake"),
            "reals re-encoded (jpeg:95)": ("jpeg:95", "real"),
            "all re-encoded (jpeg:95)": ("jpeg:95", "both"),
            "all PNG": ("png", "both"),
        }
        assert format_conditions([parse_condition("blur:1")]) == {}


class TestReport:
    def test_it_tells_what_is_lost_and_what_is_read(self, tmp_path: Path) -> None:
        text = report(tmp_path, make_changed(names="jpeg:95 blur:4 png", fragile=0.05, shift=0.08))
        section = text.split("\n## Robustness\n")[1].split("\n## ")[0]
        assert "| native | 57.5 ±0.0 | 67.5 ±0.0 | 69.5 ±0.0 |" in section
        assert section.count("| `jpeg:95` | −5.0 ±0.0 | −5.0 ±0.0 | −5.0 ±0.0 |") == 2
        assert "| `blur:4` | +8.0 ±0.0 | +8.0 ±0.0 | +8.0 ±0.0 |" in section
        assert (
            "- `lora`: fragile under jpeg:95, blur:4, png; takes images for real after jpeg:95, blur:4, png." in section
        )
        assert "| native | 57.5 / 57.5 | 67.5 / 67.5 | 69.5 / 69.5 |" in section
        assert "| all re-encoded (jpeg:95) | 52.5 / 52.5 | 62.5 / 62.5 | 64.5 / 64.5 |" in section

    def test_methods_and_seeds_that_were_not_changed_are_left_out(self, tmp_path: Path) -> None:
        made = make_changed()
        some = made[(made["condition"] == "native") | ((made["method"] == "lora") & (made["seed"] < 2))]
        section = report(tmp_path, some).split("\n## Robustness\n")[1].split("\n## ")[0]
        assert "| condition | `lora` |" in section and "nan" not in section


class TestFigure:
    def test_a_panel_a_kind_with_native_where_it_belongs(self) -> None:
        fig = robustness_curves(make_changed(names="resize:0.5 jpeg:30 resize:1.5 jpeg:95"))
        ticks = [[label.get_text() for label in ax.get_xticklabels()] for ax in fig.axes]
        assert ticks == [["none", "95", "30"], ["1.5", "none", "0.5"]]

    def test_solid_is_all_changed_and_dotted_fakes_alone(self) -> None:
        ax = robustness_curves(make_changed(("dgs",), names="blur:1", fragile=0.05, shift=0.08)).axes[0]
        solid, dotted, _ = ax.lines
        assert solid.get_linestyle() == "-" and dotted.get_linestyle() == ":"
        assert np.asarray(solid.get_ydata()) == pytest.approx([69.5, 64.5])
        assert np.asarray(dotted.get_ydata()) == pytest.approx([69.5, 59.0])

    def test_the_title_says_what_cost_most_and_what_is_read(self) -> None:
        made = make_changed(names="jpeg:30 blur:4", fragile=0.02, shift=0.0)
        hit = (made["method"] == "lora") & (made["condition"] == "blur:4")
        made.loc[hit, "balanced_acc"] -= 0.1
        made.loc[hit & (made["applied_to"] == "fake"), "auroc"] += 0.3
        assert title(robustness_curves(made)) == (
            "Blur of 4 px costs lora 12.0 points; blur of 4 px makes images look fake to lora"
        )

    def test_the_notebook_shows_curves_where_images_were_changed(self) -> None:
        assert list(robustness(make_changed(names="resize:0.5 jpeg:30"))) == ["robustness"]
        assert robustness(make_detection()) == {}

    def test_without_strengths_there_is_nothing_to_draw(self) -> None:
        with pytest.raises(UserError, match=r"set evaluate\.robustness\.conditions"):
            robustness_curves(make_detection())
        with pytest.raises(UserError, match="mixes rho"):
            robustness_curves(pd.concat([make_changed(rho=0.5), make_changed(rho=0.9)]))


def test_the_report_has_a_mean_for_each_tier(tmp_path: Path) -> None:
    made = make_changed(("dgs",), names="jpeg:75 jpeg:90 blur:2", fragile=0.05)
    text = write_report(tmp_path / "R.md", summary(made, None, "p", "x"), made, None, {"dgs": {}}).read_text()
    section = text.split("### Balanced accuracy by tier")[1].split("###")[0]
    rows = {line.split("**")[1]: line.split(" | ")[1] for line in section.splitlines() if line.startswith("| **")}
    assert list(rows) == ["clean", "web", "hard"]
    means, _ = means_over_generators(made)
    whole = means[means["applied_to"] == "both"].groupby("condition")["balanced_acc"].mean()
    assert rows["web"].startswith(f"{100 * whole[['jpeg:75', 'jpeg:90']].mean():.1f}")
    assert rows["hard"].startswith(f"{100 * whole['blur:2']:.1f}")
