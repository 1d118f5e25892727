"""The search for settings: one budget, one rule, validation images alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from settings import validate

from dgs.analysis import tuning
from dgs.analysis.tuning import RULES, candidates, chosen, weighted_balanced_accuracy, with_candidate
from dgs.data.prepared import load_training
from dgs.errors import UserError
from dgs.model.methods.experts import ipw_weights
from dgs.model.methods.registry import METHODS
from dgs.params import TUNABLE, dotted, load_params
from dgs.stats import effective_size

ROOT = Path(__file__).parents[1]


SEARCHED = [name for name, method in METHODS.items() if not method.settings_of]  # the others take theirs


@pytest.mark.parametrize("name", SEARCHED)
def test_every_method_gets_six_different_settings_that_are_parameters(name: str) -> None:
    tried = candidates(METHODS[name])
    assert len(tried) == 6 == len({json.dumps(candidate) for candidate in tried})
    assert all(name in TUNABLE for candidate in tried for name in candidate)
    knob = METHODS[name].tuned_param
    assert all((f"train.surgery.{knob}" in candidate) == (knob is not None) for candidate in tried)


def test_the_parameter_file_has_settings_for_every_method_and_a_control_has_those_of_dgs() -> None:
    given = yaml.safe_load((ROOT / "params.yaml").read_text())["tuned"]
    assert list(given) == ["default", *METHODS]
    for own in given.values():
        assert set(own) <= set(given["default"])
    for name, method in METHODS.items():
        if method.settings_of:
            assert given[name] == {key: of for other in method.settings_of for key, of in given[other].items()}


def test_committed_settings_are_those_that_the_committed_search_chose() -> None:
    """By `val_balanced` in params.yaml; by the other two rules in the study's profiles of their names."""
    search = pd.read_csv(ROOT / "results/mini/tuning.csv")
    assert search.groupby("method").size().eq(6).all()
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())["tuned"]
    assert {name: committed[name] for name in METHODS} == chosen(search, "val_balanced")
    for profile, rule in (("study-90-val", "val"), ("study-90-unbiased", "val_unbiased")):
        given = yaml.safe_load((ROOT / f"profiles/{profile}.yaml").read_text())
        assert given["tuned"] == {name: chosen(search, rule)[name] for name in given["methods"]}


def test_balanced_weights_make_captions_tell_nothing() -> None:
    """9 of 10 fakes on one background: weighed, backgrounds are half fake, and a caption reader is at chance."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, 20_000)
    labels = np.where(rng.random(20_000) < 0.9, group, 1 - group)
    weights = ipw_weights(np.where(group == 1, 0.9, 0.1), labels)
    for value in (0, 1):
        share = np.average(labels[group == value], weights=weights[group == value])
        assert share == pytest.approx(0.5, abs=0.02)
    reader = (2.0 * group - 1).astype(np.float32)
    assert weighted_balanced_accuracy(labels, reader, np.ones(20_000)) == pytest.approx(0.9, abs=0.01)
    assert weighted_balanced_accuracy(labels, reader, weights) == pytest.approx(0.5, abs=0.02)
    assert ipw_weights(np.array([0.0, 1.0]), np.array([1, 0])).tolist() == [20, 20]


def test_weighed_validation_images_count_as_fewer_by_kish(tiny_prepared: Path) -> None:
    assert effective_size(np.ones(7)) == pytest.approx(7)
    assert effective_size(np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2), "weights of 0 are no images"
    assert effective_size(np.array([20.0, 1.0, 1.0])) == pytest.approx(22**2 / 402)
    prepared = load_training(tiny_prepared, ROOT)
    said = tuning.weighed_note(prepared)
    for label, name in ((0, "real"), (1, "fake")):
        count, effective = re.search(rf"(\d+) {name} as (\d+)", said).groups()
        assert int(count) == (prepared.split("val")["label"] == label).sum() and 1 <= int(effective) <= int(count)


def table(scores: dict[str, list[float]], name: str = "lora") -> pd.DataFrame:
    tried = [json.dumps(candidate) for candidate in candidates(METHODS[name])]
    return pd.DataFrame({"data_hash": "d", "method": name, "candidate": tried, "seed": 0, **scores})


def test_each_rule_chooses_by_its_own_column_and_the_first_of_equals() -> None:
    found = table({"val": [0.1, 0.2, 0.9, 0.3, 0.9, 0.4], "val_balanced": [0.5] * 6, "val_unbiased": [0.1] * 5 + [0.2]})
    tried = candidates(METHODS["lora"])
    assert chosen(found, "val") == {"lora": tried[2]}
    assert chosen(found, "val_balanced") == {"lora": tried[0]}
    assert chosen(found, "val_unbiased") == {"lora": tried[5]}


def test_seeds_are_averaged_and_controls_follow() -> None:
    one, two = (
        table(dict.fromkeys(RULES, values), "dgs") for values in ([0.9, 0.5, 0, 0, 0, 0], [0.1, 0.7, 0, 0, 0, 0])
    )
    best = chosen(pd.concat([one, two.assign(seed=1)]), "val")
    assert best["dgs"] == candidates(METHODS["dgs"])[1]
    assert {name for name in best if name != "dgs"} == {
        name for name in METHODS if METHODS[name].settings_of == ("dgs",)
    }
    assert all(values == best["dgs"] for values in best.values())


def test_a_broken_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the table does not hold for these data is tried."""
    out = tmp_path / "tuning.csv"
    found = table({rule: [0.5] * 6 for rule in RULES})
    found.iloc[:4].to_csv(out, index=False)
    tried: list[tuple[str, str]] = []

    def score(images: str, name: str, candidate: str, *_: object) -> dict[str, float]:
        tried.append((name, candidate))
        return {"val": 0.7}

    params = validate({"compute": {"jobs": 1}})
    monkeypatch.setattr(tuning, "_score", score)
    monkeypatch.setattr(tuning, "load_training", lambda *_: SimpleNamespace(info={"training_hash": "d"}))
    rows = list(tuning.tune(["lora"], params, tmp_path, tmp_path, out, [0]))
    assert tried == list(zip(found["method"][4:], found["candidate"][4:], strict=True)) and len(rows) == 2
    assert len(pd.read_csv(out)) == 6
    assert not list(tuning.tune(["lora"], params, tmp_path, tmp_path, out, [0]))
    own = list(tuning.tune(["paper_order", "content_probe"], params, tmp_path, tmp_path, tmp_path / "own.csv", [0]))
    assert [row["method"] for row in own] == ["dgs"] * 6 + ["poe_probe"] * 6, "whose settings they take"


@pytest.mark.parametrize("name", ["probe", "lora", "dgs", "null_space"])
def test_a_trial_has_its_candidates_values_whatever_a_profile_says(name: str, tmp_path: Path) -> None:
    """And a profile that took them over trains with them."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "profiles").mkdir()
    own = {"train": {"stage1": {"epochs": 3, "lr": 1.0e-4}, "stage2": {"lr": 1.0e-4}, "surgery": {"lam": 0.2}}}
    for candidate in candidates(METHODS[name]):
        for settings in (own, {"tuned": {name: candidate}}):
            (tmp_path / "profiles" / "own.yaml").write_text(yaml.safe_dump(settings))
            params = load_params("own", tmp_path)
            tried = with_candidate(params, name, candidate) if settings is own else params.for_method(name)
            assert {key: dotted(tried.model_dump())[key] for key in candidate} == candidate


def test_a_rule_that_nothing_was_measured_by_chooses_nothing() -> None:
    """Folders of one's own have no validation images without the shortcut."""
    assert chosen(table({"val": [0.5] * 6}).iloc[:0], "val") == {}, "controls alone are not searched"
    with pytest.raises(UserError, match="Expected values by the rule val_unbiased, found none"):
        chosen(table({"val": [0.5] * 6, "val_unbiased": [float("nan")] * 6}), "val_unbiased")


def test_rates_alone_are_tried_with_all_else_in_force_and_chosen_among(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other data than the benchmark's: its strengths are carried over."""
    rates = [1e-4, 3e-4, 1e-3]
    assert candidates(METHODS["dgs"], rates) == [{"train.stage2.lr": rate} for rate in rates]
    assert candidates(METHODS["probe"], rates) == [{"train.stage1.lr": rate} for rate in rates]
    params = with_candidate(load_params("mini", ROOT), "dgs", {"train.stage2.lr": 1e-4})
    assert (params.train.stage2.lr, params.train.surgery.lam) == (1e-4, 1.0)
    monkeypatch.setattr(tuning, "load_training", lambda *_: SimpleNamespace(info={"training_hash": "d"}))
    monkeypatch.setattr(
        tuning, "_score", lambda _, name, text, *rest: {"val": float("3e-4" in text or "0.0003" in text)}
    )
    out = tmp_path / "tuning.csv"
    rows = list(tuning.tune(["dgs"], validate({"compute": {"jobs": 1}}), tmp_path, tmp_path, out, [0], rates))
    assert len(rows) == 3
    assert chosen(pd.read_csv(out), "val")["dgs"] == {"train.stage2.lr": 3e-4}
