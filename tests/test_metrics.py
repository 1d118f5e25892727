"""What the detection rates, their table and the summary mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgs.analysis import metrics
from dgs.analysis.metrics import (
    DETECTION_COLUMNS,
    Metric,
    detection_row,
    detection_table,
    headline,
    per_seed_values,
    read_detection,
    reliability,
    summary,
    write_detection,
)
from dgs.errors import UserError
from dgs.stats import best_threshold, calibrate

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
LOGITS = np.array([-3.0, -2.0, -1.0, 1.0, -0.5, 0.5, 2.0, 3.0])


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes and logits on a coarse grid, so that ties occur."""
    labels = draw(st.lists(st.integers(0, 1), min_size=2, max_size=30).filter(lambda v: 0 < sum(v) < len(v)))
    logits = draw(st.lists(st.integers(-12, 12), min_size=len(labels), max_size=len(labels)))
    return np.array(labels), np.array(logits) / 4.0


def scores_of(runs: list[tuple[str, int]], reals: str = "shared", rho: float = 0.9) -> pd.DataFrame:
    """Scores of generators a (seen) and b: logits fall with the seed, so that every run differs."""
    rows = []
    for method, seed in runs:
        for split in ("val", "test"):
            for generator, shift in (("a", 1.0), ("b", 0.0)):
                own = [(generator if reals == "own" else "real", 0, z) for z in LOGITS[:4]]
                fakes = [(generator, 1, z + shift - 0.3 * seed) for z in LOGITS[4:]]
                kept = own if reals == "own" or generator == "a" else []
                rows += [(split, *row, method, seed) for row in kept + fakes]
    table = pd.DataFrame(rows, columns=["split", "generator", "label", "logit", "method", "seed"])
    table["logit"] = table["logit"].astype(np.float32)
    return table.assign(id=[f"{i}" for i in range(len(table))], condition="native", applied_to="both", rho=rho)


class TestRow:
    def test_by_hand(self) -> None:
        row = detection_row(LABELS, LOGITS)
        assert (row["n_real"], row["n_fake"]) == (4, 4)
        assert (row["r_acc"], row["f_acc"]) == (0.75, 0.75)
        assert row["balanced_acc"] == row["acc"] == 0.75
        # 16 real-fake pairs; fakes at -0.5 and 0.5 lie below the real at 1.
        assert row["auroc"] == pytest.approx(14 / 16)
        # fakes come at ranks 1, 2, 4, 5 from the top
        assert row["ap"] == pytest.approx((1 / 1 + 2 / 2 + 3 / 4 + 4 / 5) / 4)
        assert row["tpr_at_1fpr"] == row["tpr_at_5fpr"] == 0.5

    def test_balanced_accuracy_does_not_see_the_mix_and_accuracy_does(self) -> None:
        row = detection_row(np.array([0, 1, 1, 1]), np.array([-1.0, -1.0, -1.0, -1.0]))
        assert (row["acc"], row["balanced_acc"]) == (0.25, 0.5)

    def test_a_logit_at_the_threshold_is_real(self) -> None:
        row = detection_row(np.array([0, 1]), np.array([0.0, 0.0]))
        assert (row["r_acc"], row["f_acc"]) == (1.0, 0.0)

    def test_calibration_error_by_hand(self) -> None:
        logits = np.log(np.array([0.28, 0.32, 0.9]) / np.array([0.72, 0.68, 0.1]))
        # 15 bins: 0.28 and 0.32 share [4/15, 5/15), 0.9 is alone
        expected = (2 * abs(0.30 - 0.5) + abs(0.9 - 1.0)) / 3
        assert detection_row(np.array([0, 1, 1]), logits)["ece"] == pytest.approx(expected)

    def test_catching_fakes_at_a_false_alarm_rate_never_exceeds_it(self) -> None:
        labels = np.repeat([0, 1], [200, 10])
        logits = np.append(np.arange(200.0), [300.0, 198.5, 196.5, 190.5, 189.5, 188.5, 1.5, 0.5, 0.5, 0.5])
        row = detection_row(labels, logits)
        assert row["tpr_at_1fpr"] == 0.2  # 2 of 200 reals above: 198, 199 allow a threshold above 197
        assert row["tpr_at_5fpr"] == 0.5  # 10 of 200: reals from 190 up

    @given(scored())
    @settings(deadline=None)
    def test_rates_hang_together_and_rankings_follow_the_order_alone(self, case: tuple[np.ndarray, np.ndarray]) -> None:
        labels, logits = case
        row = detection_row(labels, logits)
        assert all(0.0 <= row[name] <= 1.0 for name in row if not name.startswith("n_"))
        assert row["balanced_acc"] == pytest.approx((row["r_acc"] + row["f_acc"]) / 2)
        weighted = (row["n_real"] * row["r_acc"] + row["n_fake"] * row["f_acc"]) / (row["n_real"] + row["n_fake"])
        assert row["acc"] == pytest.approx(weighted)
        assert row["tpr_at_1fpr"] <= row["tpr_at_5fpr"]
        bent = detection_row(labels, np.exp(logits) - 2.0)
        for name in ("ap", "auroc", "tpr_at_1fpr", "tpr_at_5fpr"):
            assert bent[name] == pytest.approx(row[name])
        assert detection_row(labels, -logits)["auroc"] == pytest.approx(1.0 - row["auroc"])

    @pytest.mark.parametrize(
        ("labels", "logits", "message"),
        [
            ([1, 1], [0.0, 1.0], "0 real and 2 fake"),
            ([], [], "0 real and 0 fake"),
            ([0, 1], [0.0, np.nan], "1 of 2 logits are not finite"),
            ([0, 2], [0.0, 1.0], "labels 0"),
            ([0, 1], [0.0], "one label a logit"),
        ],
    )
    def test_mistakes_are_named(self, labels: list[int], logits: list[float], message: str) -> None:
        with pytest.raises(UserError, match=message):
            detection_row(np.array(labels), np.array(logits))


class TestThreshold:
    def test_the_middle_of_the_gap(self) -> None:
        assert best_threshold(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 5.0, 6.0])) == 3.5

    def test_of_equally_good_gaps_the_one_nearest_to_zero(self) -> None:
        # any threshold in [1, 2) or [3, 4) gives 0.75 balanced accuracy
        assert best_threshold(np.array([0, 1, 0, 1]), np.array([1.0, 2.0, 3.0, 4.0])) == 1.5
        assert best_threshold(np.array([0, 1, 0, 1]), -np.array([4.0, 3.0, 2.0, 1.0])) == -1.5

    def test_a_useless_detector_gets_a_finite_threshold(self) -> None:
        assert best_threshold(np.array([1, 0]), np.array([1.0, 2.0])) in (0.0, 3.0)
        assert np.isfinite(best_threshold(np.array([1, 0]), np.array([2.0, 2.0])))

    @given(scored(), st.integers(-5, 5))
    @settings(deadline=None)
    def test_no_threshold_does_better_wherever_logits_lie(
        self, case: tuple[np.ndarray, np.ndarray], shift: int
    ) -> None:
        labels, logits = case
        best, moved = (
            detection_row(labels, z, best_threshold(labels, z))["balanced_acc"] for z in (logits, logits + shift)
        )
        fakes, reals = logits[labels == 1], logits[labels == 0]
        tried = [(np.mean(fakes > t) + np.mean(reals <= t)) / 2 for t in np.arange(-4.0, 4.0, 0.125)]
        assert best >= max(tried) - 1e-12
        assert moved == pytest.approx(best)

    def test_calibration_says_how_often_each_rule_was_wrong(self) -> None:
        labels, logits = np.array([0, 0, 0, 0, 1, 1]), np.array([-2.0, -1.0, 0.5, 1.0, 2.0, 3.0])
        thresholds, measured = calibrate(labels, logits)
        assert thresholds == {"0.5": 0.0, "val": 1.5}
        assert [measured[rule]["false_alarm"]["count"] for rule in ("0.5", "val")] == [2, 0]
        assert measured["0.5"]["false_alarm"] == {"count": 2, "of": 4, "rate": 0.5, "low": 0.150039, "high": 0.849961}
        assert measured["val"]["false_alarm"]["high"] > 0.4, "none of four real images says little"
        assert measured["val"]["caught"]["rate"] == 1.0
        assert json.loads(json.dumps(measured)) == measured


@pytest.fixture(scope="module")
def lora() -> pd.DataFrame:
    """Scores of one run; not to be changed."""
    return scores_of([("lora", 0)])


class TestReliability:
    def test_by_hand(self, lora: pd.DataFrame) -> None:
        table = reliability(lora, {"a"}).set_index("bin")
        # b's fakes at -0.5, 0.5, 2, 3 beside the reals at -3, -2, -1, 1; 15 bins of sigmoid
        assert table["n"].to_dict() == {0: 1, 1: 1, 4: 1, 5: 1, 9: 1, 10: 1, 13: 1, 14: 1}
        assert table["fake"].to_dict() == {0: 0, 1: 0, 4: 0, 5: 1, 9: 1, 10: 0, 13: 1, 14: 1}
        assert table.loc[10, "probability"] == pytest.approx(1 / (1 + np.exp(-1.0)))

    def test_its_error_is_that_of_the_detection_table(self) -> None:
        scores = scores_of([("lora", 0), ("dgs", 1)])
        bins = reliability(scores, {"a"})
        error = (bins["n"] * (bins["probability"] - bins["fake"]).abs()).groupby(bins["method"]).sum() / 8
        expected = headline(detection_table(scores, {"a"})).query("generator == 'b'").set_index("method")["ece"]
        assert error.to_dict() == pytest.approx(expected.to_dict())

    def test_each_generator_brings_its_reals_and_the_seen_ones_stand_in_where_none_is_unseen(
        self, lora: pd.DataFrame
    ) -> None:
        both = reliability(lora, set())
        assert both["n"].sum() == 16 and (both["n"] * both["fake"]).sum() == 8
        assert reliability(lora, {"a", "b"}).equals(both)


class TestTable:
    def test_contract(self) -> None:
        table = detection_table(scores_of([("lora", 0), ("lora", 1), ("dgs", 0)]), seen={"a"})
        assert list(table.columns) == DETECTION_COLUMNS
        assert ",".join(DETECTION_COLUMNS) == (
            "rho,method,seed,generator,seen,condition,applied_to,n_real,n_fake,acc,balanced_acc,r_acc,f_acc,ap,auroc,"
            "tpr_at_1fpr,tpr_at_5fpr,ece,threshold_rule"
        )
        assert len(table) == 3 * 2 * 3
        assert set(table["generator"]) == {"a", "b"}, "the shared reals are no generator"
        assert table.groupby("generator")["seen"].first().to_dict() == {"a": True, "b": False}
        assert set(zip(table["n_real"], table["n_fake"], strict=True)) == {(4, 4)}

    def test_rows_are_those_of_detection_row(self, lora: pd.DataFrame) -> None:
        row = headline(detection_table(lora, seen={"a"})).set_index("generator").loc["b"]
        for name, value in detection_row(LABELS, LOGITS.astype(np.float32)).items():
            assert row[name] == value, name

    def test_the_same_images_give_the_same_rates_as_own_or_shared_reals_in_any_order_with_or_without_rho(
        self, lora: pd.DataFrame
    ) -> None:
        table = detection_table(lora, {"a"})
        own = detection_table(scores_of([("lora", 0)], "own"), {"a"})
        pd.testing.assert_frame_equal(table.drop(columns="seen"), own.drop(columns="seen"))
        pd.testing.assert_frame_equal(table, detection_table(lora.sample(frac=1.0, random_state=0), {"a"}))
        without = detection_table(lora.assign(rho=np.nan), {"a"})
        assert len(without) == 6 and without["rho"].isna().all()
        pd.testing.assert_frame_equal(without, detection_table(lora.drop(columns="rho"), {"a"}))

    def test_the_validation_threshold_comes_from_validation_scores(self) -> None:
        scores = scores_of([("lora", 0)])
        scores.loc[scores["split"] == "val", "logit"] += 100.0
        table = detection_table(scores, {"a"})
        assert (table.loc[table["threshold_rule"] == "val", "f_acc"] == 0.0).all()
        by_rule = [table.loc[table["threshold_rule"] == rule, ["ap", "auroc", "ece"]] for rule in ("0.5", "val")]
        np.testing.assert_array_equal(*by_rule)
        assert set(detection_table(scores[scores["split"] == "test"], {"a"})["threshold_rule"]) == {"0.5", "oracle"}

    def test_the_oracle_is_the_best_on_each_generators_own_test_scores(self) -> None:
        scores = scores_of([("lora", 0)])
        scores.loc[(scores["generator"] == "b") & (scores["split"] == "test"), "logit"] -= 100.0
        by_rule = detection_table(scores, {"a"}).pivot(
            index="generator", columns="threshold_rule", values="balanced_acc"
        )
        # a's fakes lie at 0.5 and up, one real at 1; b's lie below all reals: nothing tells them, and 0 does harm
        assert by_rule["oracle"].to_dict() == {"a": 0.875, "b": 0.5}
        assert by_rule.loc["b", "0.5"] == 0.375 and by_rule.loc["a", "0.5"] == 0.875

    def test_nothing_does_better_than_the_oracle_and_headlines_do_not_see_it(self) -> None:
        scores = scores_of([("lora", 0), ("dgs", 3)])
        scores.loc[scores["split"] == "val", "logit"] += 2.0
        table = detection_table(scores, {"a"})
        by_rule = table.pivot(index=["method", "generator"], columns="threshold_rule", values="balanced_acc")
        assert (by_rule["oracle"] >= by_rule[["0.5", "val"]].max(axis=1)).all()
        assert (by_rule["oracle"] > by_rule["val"]).any(), "else the test says little"
        assert set(headline(table)["threshold_rule"]) == {"0.5"}

    def test_other_conditions_have_rows_of_their_own(self, lora: pd.DataFrame) -> None:
        blurred = lora[lora["split"] == "test"].assign(condition="blur", logit=0.0)
        table = detection_table(pd.concat([blurred, lora]), {"a"})
        assert list(dict.fromkeys(table["condition"])) == ["native", "blur"]
        assert set(headline(table)["condition"]) == {"native"}
        assert (table.query("condition == 'blur' and applied_to == 'both'")["auroc"] == 0.5).all()

    @pytest.mark.parametrize(
        ("message", "rows", "values"),
        [
            ("'a' has no real", "label == 1 and split == 'test'", {}),
            ("'b' has no fake", "label == 0 and split == 'test'", {"generator": "b"}),
            ("real images only", "label == 0 and split == 'test'", {}),
            ("labelled fake", "split == 'test'", {"generator": "real"}),
            ("no test rows", "split == 'val'", {}),
            ("lora, seed 0, generator a", "split == 'test'", {"logit": np.nan}),
        ],
    )
    def test_mistakes_are_named(self, lora: pd.DataFrame, message: str, rows: str, values: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=message):
            detection_table(lora.query(rows).assign(**values), {"a"})

    def test_missing_columns_are_named(self, lora: pd.DataFrame) -> None:
        with pytest.raises(UserError, match=r"lack the columns \['logit'\]"):
            detection_table(lora.drop(columns="logit"), {"a"})

    def test_a_file_keeps_types_and_booleans_are_lower_case(self, tmp_path: Path) -> None:
        table = detection_table(scores_of([("lora", 0)], rho=np.nan), {"a"}).replace({"generator": {"b": "NA"}})
        table = table[table["threshold_rule"] == "0.5"].reset_index(drop=True)
        path = tmp_path / "deep" / "detection.csv"
        write_detection(table, path)
        assert ",true,native,both,4,4," in path.read_text() and "True" not in path.read_text()
        back = read_detection(path)
        pd.testing.assert_frame_equal(back, table, atol=1e-6, check_exact=False)
        assert len(headline(back)) == 2


def forgetting_of(runs: list[tuple[str, int]]) -> pd.DataFrame:
    measures = {
        "zero_shot:shape": (0.8, 0.4), "zero_shot:colour": (1.0, 0.9), "zero_shot:dead": (0.0, 0.1),
        "retrieval_at_1": (0.5, 0.4), "cka_to_frozen": (1.0, 0.6), "cosine_drift": (0.0, 0.3),
    }  # fmt: skip
    rows = [(0.9, *run, name, *values) for run in runs for name, values in measures.items()]
    return pd.DataFrame(rows, columns=["rho", "method", "seed", "measure", "before", "after"])


class TestSummary:
    runs = (("lora", 0), ("lora", 1), ("lora", 2))

    @pytest.fixture(scope="class")
    def detection(self) -> pd.DataFrame:
        return detection_table(scores_of(list(self.runs)), {"a"})

    def test_numbers_by_hand(self, detection: pd.DataFrame) -> None:
        values = per_seed_values(detection, forgetting_of(list(self.runs)))
        first = values[values["seed"] == 0].set_index("metric")["value"]
        # generator a: 4 of 4 fakes; generator b: 3 of 4; reals 3 of 4
        assert first["f_acc_seen"] == 1.0 and first["f_acc_unseen"] == 0.75 and first["r_acc"] == 0.75
        assert first["balanced_acc_seen"] == 0.875
        assert first["worst_generator_balanced_acc"] == first["balanced_acc_unseen"] == 0.75
        assert first["mAcc"] == pytest.approx((0.75 + 1.0 + 0.75) / 3)
        assert first["zero_shot_kept"] == pytest.approx((0.5 + 0.9) / 2), "a measure that starts at 0 has no ratio"
        assert first["retrieval_kept"] == pytest.approx(0.8)
        assert first["cka_to_frozen"] == 0.6 and first["cosine_drift"] == 0.3

    def test_a_new_metric_is_one_row(self, detection: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
        worst = Metric("worst_f_acc", "run", lambda run: float(run["f_acc"].min()))
        monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, worst))
        made = summary(detection, None, "mini", "abc")["methods"]["lora"]
        assert made["worst_f_acc"]["mean"] == made["f_acc_unseen"]["mean"]

    def test_contract_and_plain_json(self, detection: pd.DataFrame) -> None:
        made = summary(detection, forgetting_of(list(self.runs)), "mini", "abc")
        assert (made["profile"], made["data_hash"]) == ("mini", "abc")
        entry = made["methods"]["lora"]["balanced_acc_unseen"]
        assert list(entry) == ["mean", "low", "high", "per_seed"]
        assert list(entry["per_seed"]) == ["0", "1", "2"]
        assert entry["low"] < entry["mean"] < entry["high"]
        assert json.loads(json.dumps(made, allow_nan=False)) == made
        assert all(value == round(value, 6) for value in entry["per_seed"].values())

    def test_one_seed_has_null_ends_and_what_the_data_lack_has_no_entry(self, lora: pd.DataFrame) -> None:
        made = summary(detection_table(lora.assign(seed=7), {"a", "b"}), None, "mini", "abc")["methods"]["lora"]
        entry = made["balanced_acc_seen"]
        assert entry["low"] is None and entry["high"] is None and list(entry["per_seed"]) == ["7"]
        assert "zero_shot_kept" not in made and not [name for name in made if name.endswith("_unseen")]

    def test_mixed_rho_is_refused(self) -> None:
        both = pd.concat([scores_of([("lora", 0)], rho=rho) for rho in (0.5, 0.9)])
        with pytest.raises(UserError, match=r"rho = 0\.5, 0\.9"):
            summary(detection_table(both, {"a"}), None, "mini", "abc")
