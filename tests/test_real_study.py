"""The study's own table: whose pictures count, and what an interval is over."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dgs.analysis.differences import rate_cells
from dgs.analysis.metrics import detection_table
from dgs.analysis.scores import write_scores
from dgs.crossed import crossed_interval
from dgs.errors import UserError
from dgs.params import dotted, load_params
from dgs.stats import paired_difference, seed_interval
from real.manifest import read_manifest
from real.study import LEFT_OUT, PROFILES, by_generator, intervals, over_pictures, shown, study

OTHERS = ("b", "c", "d")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Two methods, three seeds; the prompts of half of glid3_xl's pictures were trained on, and those are easy."""
    rng, scores = np.random.default_rng(0), []
    for method in ("probe", "lora"):
        for seed in range(3):
            cells = [("real", 0, 0.0), ("glid3_xl", 1, 0.5), ("known", 1, 2.0)]
            cells += [(name, 1, 1.0) for name in OTHERS]
            for generator, label, shift in cells:
                for number in range(20):
                    easy = 9.0 if generator == "glid3_xl" and number < 10 else 0.0
                    name = f"test/{generator}/{label}/{number}.jpg"
                    logit = rng.normal() + 2 * shift - 1 + easy + 0.1 * seed
                    scores.append((name, "test", generator, label, logit, method, seed))
    columns = ["id", "split", "generator", "label", "logit", "method", "seed"]
    return pd.DataFrame(scores, columns=columns).assign(condition="native", applied_to="both", rho=np.nan)


@pytest.fixture(scope="module")
def manifest() -> pd.DataFrame:
    """Two pictures of glid3_xl share a prompt each; the others are not in it, so each is a group of its own."""
    return pd.DataFrame(
        {
            "path": [f"test/glid3_xl/1/{number}.png" for number in range(20)],
            "prompt_trained_on": ["1"] * 10 + ["0"] * 10,
            "group": [f"prompt {number // 2}" for number in range(20)],
        }
    )


@pytest.fixture(scope="module")
def rows(scores: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    return by_generator(scores, {"known"}, manifest)


def test_pictures_of_trained_prompts_are_left_out_of_a_row_of_their_own(rows: pd.DataFrame) -> None:
    counts = rows.groupby("generator")["n_fake"].unique().map(list).to_dict()
    assert counts == {"glid3_xl": [20], LEFT_OUT: [10], "known": [20]} | {name: [20] for name in OTHERS}
    means = rows.groupby("generator")["balanced_acc"].mean()
    assert means[LEFT_OUT] < means["glid3_xl"] - 0.1, "suffixes differ, and the pictures are found all the same"


def test_intervals_are_over_seeds_and_over_generators_and_the_extra_row_counts_in_no_mean(rows: pd.DataFrame) -> None:
    table = pd.DataFrame(intervals(rows))
    unseen = rows[rows["generator"].isin(["glid3_xl", *OTHERS]) & (rows["method"] == "lora")]
    for over, group in (("seeds", "seed"), ("generators", "generator")):
        one = (table["method"] == "lora") & (table["pictures"] == "unseen") & (table["over"] == over)
        (found,) = table[one & (table["rate"] == "balanced_acc")].itertuples()
        expected = seed_interval(unseen.groupby(group)["balanced_acc"].mean().to_numpy())
        assert (found.n, found.mean, found.low) == pytest.approx((3 if over == "seeds" else 4, *expected[:2]))
    seen = table[(table["pictures"] == "seen")]
    assert set(seen["over"]) == {"seeds"}, "one generator has no interval over generators"


def test_a_difference_is_paired_by_seed_and_generator(rows: pd.DataFrame) -> None:
    table = pd.DataFrame(intervals(rows)).set_index(["method", "pictures", "rate", "over"])
    values = rows[rows["generator"].isin(["glid3_xl", *OTHERS])].groupby(["method", "seed"])["auroc"].mean()
    expected = paired_difference(values["lora"].to_numpy(), values["probe"].to_numpy())
    found = table.loc[("lora minus probe", "unseen", "auroc", "seeds")]
    assert tuple(found[["mean", "low", "high"]]) == pytest.approx(tuple(expected))
    assert {name for name in table.index.get_level_values(0) if "minus" in name} == {
        "lora minus probe",
        "probe minus lora",
    }


class TestOverPictures:
    def test_means_are_those_over_seeds_and_differences_theirs(
        self, scores: pd.DataFrame, rows: pd.DataFrame, manifest: pd.DataFrame
    ) -> None:
        found = pd.DataFrame(over_pictures(scores, {"known"}, manifest)).set_index(["pictures", "method"])
        means = rows.groupby(["generator", "method"])["balanced_acc"].mean().unstack()
        for (pictures, method), row in found.iterrows():
            names = {"seen": ["known"], "unseen": ["glid3_xl", *OTHERS]}.get(pictures, [pictures])
            plain = means.loc[names].mean()
            plain["lora minus probe"] = plain["lora"] - plain["probe"]
            plain["probe minus lora"] = -plain["lora minus probe"]
            assert row["mean"] == pytest.approx(plain[method]) and row["low"] < row["mean"] < row["high"]
        assert found.loc[("b", "lora"), "n"] == 40 and found.loc[("glid3_xl", "lora"), "n"] == 30

    def test_an_interval_is_as_wide_as_independent_pictures_make_it(self) -> None:
        """One side all right, half of the other: a binomial share over 100 pictures, or over 10 groups of 10 alike."""
        numbers = np.arange(100)
        table = pd.DataFrame(
            {
                "id": [f"test/{kind}/{n}" for kind in ("real", "g") for n in numbers],
                "generator": ["real"] * 100 + ["g"] * 100,
                "label": [0] * 100 + [1] * 100,
                "logit": [-1.0] * 150 + [1.0] * 50,
            }
        ).assign(split="test", method="probe", seed=0)
        for size in (1, 10):
            known = pd.DataFrame({"path": table["id"][100:], "group": [f"group {n // size}" for n in numbers]})
            (found,) = [row for row in over_pictures(table, set(), known) if row["pictures"] == "g"]
            half = 1.96 * np.sqrt(0.25 / (100 / size)) / 2  # of a mean of two sides, of which one is certain
            assert found["mean"] == 0.75 and (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.15)


@pytest.mark.parametrize("rate", ["balanced_acc", "ap"])
def test_what_is_shown_has_seeds_unseen_generators_and_groups_as_random(
    scores: pd.DataFrame, rows: pd.DataFrame, manifest: pd.DataFrame, rate: str
) -> None:
    found = pd.DataFrame(shown(scores, {"known"}, manifest)).set_index(["method", "rate"]).loc["lora minus probe", rate]
    groups = scores["id"].str.replace(r"glid3_xl/1/(\d+).jpg", lambda at: f"prompt {int(at[1]) // 2}", regex=True)
    cells = rate_cells(scores.assign(group=groups), rate, ["glid3_xl", *OTHERS])
    gaps = np.array([cells["lora", seed] - cells["probe", seed] for seed in range(3)])
    expected = crossed_interval(np.moveaxis(gaps, -1, 0)).interval
    assert tuple(found[["mean", "low", "high"]]) == pytest.approx(tuple(expected)) and found["n"] == 12
    means = rows[rows["generator"].isin(["glid3_xl", *OTHERS])].groupby("method")[rate].mean()
    assert found["mean"] == pytest.approx(means["lora"] - means["probe"])


def test_profiles_differ_in_pictures_alone_and_fewer_get_as_many_steps() -> None:
    whole, images = load_params("real", ROOT), int((read_manifest()["split"] == "train").sum())
    own = {
        "profile",
        "methods",
        "data.root",
        "data.captions",
        "train.images",
        "train.stage1.epochs",
        "train.stage2.epochs",
    }
    for name in PROFILES:
        params = load_params(name, ROOT)
        assert not params.data.show_images and params.seeds == whole.seeds
        changed = {
            key for key, value in dotted(params.model_dump()).items() if value != dotted(whole.model_dump())[key]
        }
        assert changed <= own and set(params.methods) <= set(whole.methods)
        trained, every = params.for_method("dgs").train, whole.for_method("dgs").train
        for stage in ("stage1", "stage2"):
            steps = getattr(trained, stage).epochs * -(-(params.train.images or images) // 32)
            assert steps == pytest.approx(getattr(every, stage).epochs * -(-images // 32), rel=0.03)


def test_the_table_is_made_again_from_kept_scores_alone(scores: pd.DataFrame, tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles", ignore=shutil.ignore_patterns("*.lock", "dvc.yaml"))
    with pytest.raises(UserError, match=r"^Expected scores of real, .* below results/, found none\. Run make real\.$"):
        study(tmp_path)
    for name, shift in (("real", 0.0), ("real-unmatched", 0.5)):
        kept = tmp_path / "results" / name
        kept.mkdir(parents=True)
        own = scores.assign(logit=scores["logit"] + shift * (scores["label"] - 0.5), sha256="", profile=name)
        write_scores(own, kept / "scores.parquet")
        detection_table(own, {"known"}).to_csv(kept / "detection.csv", index=False)
    table = study(tmp_path)
    assert set(table["profile"]) == {"real", "real-unmatched", "real-unmatched minus real"}
    assert set(table["training_images"].dropna()) == {549}
    more = table[(table["profile"] == "real-unmatched minus real") & (table["rate"] == "auroc")]
    assert (more.set_index(["method", "pictures"]).sort_index().loc[("lora", "unseen"), "mean"] > 0).all()
    known = table[(table["pictures"] == "known") & (table["profile"] == "real") & (table["method"] == "lora")]
    seen = table[(table["pictures"] == "seen") & (table["profile"] == "real") & (table["method"] == "lora")]
    assert known.set_index(["rate", "over"])["mean"].equals(seen.set_index(["rate", "over"])["mean"])
