"""Differences to the baseline, from scores: which are shown, over what, and corrected for how many."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from dgs.analysis.differences import COLUMNS, baseline_of, difference_table, is_crossed, rate_cells
from dgs.analysis.metrics import detection_table, per_seed_values
from dgs.crossed import BLOCKS, crossed_interval, holm
from dgs.stats import paired_difference

GENERATORS = {"seen": 2.0, "a": 1.0, "b": 0.6, "c": 1.4}
ABOVE = {"lora": 0.0, "dgs": 0.05, "content": 0.8}


def make_scores(
    methods: dict[str, float] = ABOVE, seeds: int = 4, names: dict[str, float] = GENERATORS
) -> pd.DataFrame:
    """Logits of 60 photographs and 60 fakes of each generator, of which all methods and seeds share most."""
    rng = np.random.default_rng(0)
    images = pd.DataFrame({"generator": np.repeat(["real", *names], 60), "number": np.tile(range(60), 1 + len(names))})
    images["id"] = [f"test/{g}/{n:03d}" for g, n in zip(images["generator"], images["number"], strict=True)]
    images["label"] = (images["generator"] != "real").astype(int)
    middle = images["generator"].map(names).fillna(-1.0) + rng.normal(0, 1, len(images))
    parts = [
        images.assign(
            method=method, seed=seed, logit=middle * (1 + above) + rng.normal(0, 0.3, len(images)) + rng.normal(0, 0.1)
        )
        for method, above in methods.items()
        for seed in range(seeds)
    ]
    return pd.concat(parts).assign(split="test", condition="native", applied_to="both", rho=0.9)


def made(scores: pd.DataFrame, forgetting: pd.DataFrame | None = None) -> pd.DataFrame:
    detection = detection_table(scores, {"seen"})
    return difference_table(per_seed_values(detection, forgetting), detection, scores)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return made(make_scores()).set_index(["method", "rate", "pictures"])


def test_means_are_those_of_the_detection_table_and_both_intervals_are_around_them(table: pd.DataFrame) -> None:
    assert [*table.index.names, *table.columns] == [
        "method",
        "rate",
        "pictures",
        *[c for c in COLUMNS if c not in table.index.names],
    ]
    values = (
        per_seed_values(detection_table(make_scores(), {"seen"})).set_index(["method", "metric"])["value"].sort_index()
    )
    for rate in ("balanced_acc", "ap"):
        row = table.loc["content", rate, "unseen"]
        over_seeds = paired_difference(values["content", f"{rate}_unseen"], values["lora", f"{rate}_unseen"])
        assert tuple(row[["mean", "low_seeds", "high_seeds"]]) == pytest.approx(tuple(over_seeds), abs=1e-6)
        assert row["low"] < row["low_seeds"] and row["high_seeds"] < row["high"]
        assert (row["n_seeds"], row["n_generators"], row["other"]) == (4, 3, "lora")


def test_the_crossed_interval_is_of_the_scores_whatever_their_order(table: pd.DataFrame) -> None:
    scores = make_scores()
    cells = rate_cells(scores.sample(frac=1, random_state=0), "ap", ["a", "b", "c"])
    gaps = np.array([cells["content", seed] - cells["lora", seed] for seed in range(4)])
    found = crossed_interval(np.moveaxis(gaps, -1, 0))
    row = table.loc["content", "ap", "unseen"]
    assert tuple(row[["mean", "low", "high", "p"]]) == pytest.approx((*found.interval, found.p), abs=1e-6)


@pytest.mark.parametrize("rate", ["balanced_acc", "ap"])
def test_images_that_share_a_group_are_one_fact(rate: str) -> None:
    """Six copies of each image leave a jackknife's variance as it was; taken for images of their own they shrink it."""
    scores = make_scores({"lora": 0.0}, seeds=1)
    copies = pd.concat([scores.assign(id=scores["id"] + f"/{copy}") for copy in range(6)])
    grouped = copies.assign(group=copies["id"].str.rsplit("/", n=1).str[0])

    def variances(table: pd.DataFrame) -> np.ndarray:
        left_out = rate_cells(table, rate, ["a", "b", "c"])["lora", 0][:, 1:]
        return ((left_out - left_out.mean(1, keepdims=True)) ** 2).sum(1) * (1 - 1 / left_out.shape[1])

    each = variances(scores.assign(group=scores["id"]))
    assert variances(grouped) == pytest.approx(each)
    assert (variances(copies) < each / 2).all()


def test_a_side_that_is_one_group_has_no_blocks() -> None:
    """Left out, it would leave no image of that label."""
    scores = make_scores({"lora": 0.0}, seeds=1)
    for groups, blocks in ((1, 0), (2, 182)):
        group = scores["id"].where(scores["generator"] != "a", "g" + (scores["number"] % groups).astype(str))
        (cells,) = rate_cells(scores.assign(group=group), "ap", ["a", "b", "c"]).values()
        assert cells.shape == (3, 1 + blocks) and np.isfinite(cells).all()


def test_the_family_is_every_method_in_one_rate_on_unseen_generators(table: pd.DataFrame) -> None:
    for rate in ("balanced_acc", "ap"):
        family = table.xs((rate, "unseen"), level=("rate", "pictures"))
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p"]), abs=2e-6) and len(family) == 2
    others = table[~is_crossed(table.reset_index()).to_numpy()]
    assert set(others.index.get_level_values("pictures")) == {"seen", "all"}
    assert others[["low", "high", "p", "p_holm"]].isna().all(axis=None) and others["low_seeds"].notna().all()
    assert table.loc["dgs", "worst_generator_balanced_acc", "all"]["n_generators"] == 4


def test_what_was_forgotten_has_seeds_alone() -> None:
    rows = [("lora", seed, "zero_shot:shape", 1.0, 0.6) for seed in range(4)]
    rows += [("dgs", seed, "zero_shot:shape", 1.0, 0.2 + 0.01 * seed) for seed in range(4)]
    forgetting = pd.DataFrame(rows, columns=["method", "seed", "measure", "before", "after"]).assign(rho=0.9)
    (row,) = made(make_scores(), forgetting).query("method == 'dgs' and rate == 'zero_shot_kept'").to_dict("records")
    assert row["mean"] == pytest.approx(-0.385) and row["n_generators"] == 0 and np.isnan(row["p"])
    assert row["p_sign_flip"] == 0.125, "four seeds"


def test_photographs_that_all_share_are_a_sample_of_their_number() -> None:
    """All cells agree: 9 of the 60 photographs are what differs, for every seed and generator."""
    lora = make_scores({"lora": 0.0})
    lora["logit"] = np.where(lora["label"] == 1, 1.0, -1.0)
    dgs = lora.assign(method="dgs", logit=lora["logit"].where((lora["label"] == 1) | (lora["number"] % 7 > 0), 1.0))
    found = made(pd.concat([lora, dgs])).set_index(["rate", "pictures"]).loc[("balanced_acc", "unseen")]
    assert found["mean"] == found["low_seeds"] == found["high_seeds"] == -0.075
    error = (found["high"] - found["mean"]) / t.ppf(0.975, BLOCKS - 1)
    assert error == pytest.approx(np.sqrt(0.15 * 0.85 / 60) / 2, rel=0.15)


def test_without_lora_the_probe_is_the_baseline_and_without_both_there_is_no_table() -> None:
    assert (baseline_of(["dgs", "probe"]), baseline_of(["probe", "lora"]), baseline_of(["dgs"])) == (
        "probe",
        "lora",
        None,
    )
    assert set(made(make_scores({"probe": 0.0, "dgs": 0.5}))["other"]) == {"probe"}
    for alone in ("dgs", "lora"):
        found = made(make_scores({alone: 0.0}))
        assert found.empty and list(found) == COLUMNS


def test_one_seed_or_one_generator_have_no_crossed_interval() -> None:
    for scores in (make_scores(seeds=1), make_scores(names={"seen": 2.0, "a": 1.0})):
        found = made(scores)
        assert found.loc[is_crossed(found), ["low", "high", "p", "p_holm"]].isna().all(axis=None)
        assert found["mean"].notna().all()


def test_where_nothing_is_unseen_seen_generators_are_drawn() -> None:
    scores = make_scores()
    detection = detection_table(scores, set(GENERATORS))
    found = difference_table(per_seed_values(detection), detection, scores)
    drawn = found[is_crossed(found)]
    assert set(drawn["pictures"]) == {"seen"} and drawn["p_holm"].notna().all() and (drawn["n_generators"] == 4).all()


@pytest.mark.parametrize("images", [1, 2])
def test_of_too_few_images_to_leave_some_out_there_is_a_mean_and_no_crossed_interval(images: int) -> None:
    scores = make_scores()
    few = made(scores[scores["number"] < images]).set_index(["method", "rate", "pictures"]).loc["dgs", "ap", "unseen"]
    assert np.isfinite(few["mean"]) and np.isfinite(few[["low", "high", "p"]].astype(float)).all() == (images > 1)
