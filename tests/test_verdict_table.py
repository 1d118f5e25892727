"""results/<profile>/verdicts.csv: what dgs score would say of test images, by a run's own validation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_figures import make_detection, make_forgetting

from dgs.analysis.figures.detection import probabilities
from dgs.analysis.metrics import summary
from dgs.analysis.report import write_report
from dgs.analysis.verdicts import COLUMNS, risk_by_coverage, selective_risk, verdict_table
from dgs.stats import Scored, best_threshold
from dgs.verdicts import wrong_allowed


def images(split: str, generator: str, apart: float, seed: int, count: int = 400) -> pd.DataFrame:
    """Real images around -apart / 2 and fakes around +apart / 2, logits three times as sure as they should be."""
    label = np.repeat([0, 1], count)
    logit = 6 * np.random.default_rng(seed).normal((label - 0.5) * apart, 1)
    return pd.DataFrame({"split": split, "generator": generator, "label": label, "logit": logit})


def scores(unseen: float = 0.5, validation: int = 400, methods: tuple[str, ...] = ("lora", "dgs")) -> pd.DataFrame:
    """A seen generator like the validation images, and one on which real and fake lie closer together."""
    parts = [
        pd.concat(
            [
                images("val", "seen", 2.0, 10 * seed, validation),
                images("test", "seen", 2.0, 10 * seed + 1),
                images("test", "new", unseen, 10 * seed + 2),
            ]
        ).assign(method=method, seed=seed)
        for method in methods
        for seed in (0, 1)
    ]
    return pd.concat(parts, ignore_index=True).assign(condition="native", applied_to="both", rho=0.9)


class TestSelectiveRisk:
    def test_by_hand(self) -> None:
        found = selective_risk(Scored.of(np.array([1, 0, 1, 0]), np.array([5.0, -4.0, -3.0, -0.5])), 0.0)
        assert found.tolist() == [0, 0, 1 / 3, 1 / 4]

    def test_distances_are_from_the_threshold(self) -> None:
        found = selective_risk(Scored.of(np.array([1, 0]), np.array([3.0, 0.0])), 2.0)
        assert found.tolist() == [0.0, 0.0]
        assert selective_risk(Scored.of(np.array([0, 1]), np.array([3.0, 0.0])), 2.0).tolist() == [1.0, 1.0]

    def test_a_sure_detector_has_less_of_it_than_a_guess(self) -> None:
        one, other = (
            Scored.of(part["label"].to_numpy(), part["logit"].to_numpy())
            for part in (
                images("test", "a", 2.0, 0),
                images("test", "a", 0.0, 1).assign(logit=lambda of: of.index % 7.0),
            )
        )
        assert selective_risk(one, 0.0).mean() < 0.08 and 0.4 < selective_risk(other, 3.0).mean() < 0.6


class TestTable:
    table = verdict_table(scores(), {"seen"}).set_index(["method", "seed", "generator"])

    def test_it_has_a_row_a_run_and_generator(self) -> None:
        found = verdict_table(scores(), {"seen"})
        assert list(found.columns) == COLUMNS and len(found) == 2 * 2 * 2
        assert found.groupby("seen")["generator"].unique().map(list).to_dict() == {False: ["new"], True: ["seen"]}
        assert (found["n_real"] == 400).all() and (found["n_fake"] == 400).all() and (found["rho"] == 0.9).all()

    def test_the_map_mends_what_validation_images_tell_and_not_what_shift_does(self) -> None:
        seen, new = (self.table.xs(name, level="generator") for name in ("seen", "new"))
        assert (seen["ece_before"] > 0.08).all() and (seen["ece_after"] < 0.05).all()
        assert (new["ece_after"] > 0.1).all()

    def test_the_promise_holds_where_images_are_alike_and_breaks_where_they_are_not(self) -> None:
        seen, new = (self.table.xs(name, level="generator")[["false_alarm", "miss"]] for name in ("seen", "new"))
        assert seen.to_numpy().max() <= 0.06 and new.to_numpy().min() > 0.06
        assert (self.table.xs("seen", level="generator")[["unsure_real", "unsure_fake"]] > 0.05).all(axis=None)

    def test_shares_are_of_the_runs_own_band(self) -> None:
        rows = scores()
        own = rows[(rows["method"] == "dgs") & (rows["seed"] == 1)]
        val = own[own["split"] == "val"]
        real, fake = (np.sort(val.loc[val["label"] == label, "logit"]) for label in (0, 1))
        allowed = wrong_allowed(400, 0.05)
        high, low = real[::-1][allowed], fake[allowed]
        test = own[(own["split"] == "test") & (own["generator"] == "new")]
        said = self.table.loc["dgs", 1, "new"]
        assert low < high
        assert said["false_alarm"] == (test.loc[test["label"] == 0, "logit"] > high).mean()
        assert said["miss"] == (test.loc[test["label"] == 1, "logit"] < low).mean()
        assert said["unsure_fake"] == test.loc[test["label"] == 1, "logit"].between(low, high).mean()
        threshold = best_threshold(val["label"].to_numpy(), val["logit"].to_numpy())
        whole = Scored.of(test["label"].to_numpy(), test["logit"].to_numpy())
        assert said["aurc"] == pytest.approx(selective_risk(whole, threshold).mean())

    def test_runs_without_enough_validation_images_have_no_rows(self) -> None:
        assert verdict_table(scores(validation=4), {"seen"}).empty
        assert verdict_table(scores().query("split == 'test'"), {"seen"}).empty
        assert list(probabilities(scores(validation=4), {"seen"})) == ["calibration"]
        assert list(probabilities(scores(), {"seen"})) == ["calibration", "risk_coverage"]

    def test_coverage_goes_from_the_surest_to_all(self) -> None:
        found = risk_by_coverage(scores(), {"seen"})
        whole = found[found["coverage"] == 1.0].set_index(["method", "seed", "generator"])["risk"]
        assert len(whole) == 8 and found["coverage"].min() == pytest.approx(0.05)
        assert (
            found[found["coverage"] < 0.2].groupby("generator")["risk"].mean() < whole.groupby("generator").mean()
        ).all()


def test_the_report_has_verdicts_and_the_error_of_each_generator(tmp_path: Path) -> None:
    detection = make_detection(("lora", "dgs"))
    told = (summary(detection, None, "p", "x"), detection, make_forgetting(("lora", "dgs")), {"lora": {}, "dgs": {}})
    text = write_report(tmp_path / "R.md", *told, verdicts=verdict_table(scores(), {"seen"})).read_text()
    section = text.split("## Verdicts")[1].split("\n## ")[0]
    assert [line.split(" | ")[:2] for line in section.splitlines() if line.startswith("| `")] == [
        ["| `lora`", "seen"], ["| `lora`", "unseen"], ["| `dgs`", "seen"], ["| `dgs`", "unseen"]
    ]  # fmt: skip
    assert section.count(" → ") == 4 and "| seen | seen |" in section and "| new | unseen |" in section
    assert "## Verdicts" not in write_report(tmp_path / "P.md", *told).read_text()
