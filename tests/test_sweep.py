"""Trainings beside the pipeline: what each study varies, and that a row is what the pipeline itself would say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from copies import ROOT

from dgs.analysis.angles import angle_table, summary
from dgs.analysis.evaluate import evaluate
from dgs.analysis.metrics import detection_table, per_seed_values
from dgs.analysis.scores import read_scores, write_scores
from dgs.analysis.tuning import candidates
from dgs.data.prepared import load_prepared
from dgs.device import choose_device
from dgs.errors import UserError
from dgs.model.checkpoint import save_checkpoint
from dgs.model.clip import load_clip
from dgs.model.methods.registry import get_method
from dgs.model.snapshot import Snapshot, State
from dgs.model.train import Trained, train
from dgs.model.training_log import TrainingLog
from dgs.params import Params, load_params
from dgs.tables import read_table
from minibench import generators
from studies import dose_response, fitted_settings, priors, regimes, seen_pairs, text_heads
from studies.figures import regime_map
from studies.going_on import BEFORE_THE_END, GoingOn
from studies.regimes import RHO
from studies.sweep import (
    EPOCHS,
    FAILED,
    FRESH,
    KEY,
    MEASURES,
    SURGERY,
    TO_MAKE_FRESH,
    Arm,
    measured,
    prepare,
    surgery_facts,
    sweep,
)


def test_a_row_is_what_the_pipeline_says_of_the_same_run(tiny: Params, tmp_path: Path) -> None:
    params = tiny.for_method("lora")
    prepared = load_prepared(prepare(tiny, ROOT, tmp_path), ROOT)
    row, logits = measured(get_method("lora"), prepared, params, 0, ROOT, Snapshot(common=tmp_path))
    clip, device = load_clip(tiny.model, ROOT, tiny.image_size), choose_device("cpu")
    where = tmp_path / "seed-0"

    def save(run: Trained) -> None:
        save_checkpoint(where, run.classifier, params, "lora", 0, run.thresholds, prepared.info["training_hash"])

    train(get_method("lora"), clip, prepared, params, 0, device, save)
    scores, forgetting, _ = evaluate({("lora", 0): where}, clip, prepared, params, device)
    said = per_seed_values(detection_table(scores, prepared.info["seen"]), forgetting).set_index("metric")["value"]
    scored = [name for name in MEASURES if name not in SURGERY]
    assert {name: row[name] for name in scored} == pytest.approx(said[scored].to_dict(), abs=1e-6)
    both = scores.query("split == 'test'").merge(logits, on="id")
    assert len(both) == len(logits) and np.allclose(both["logit_x"], both["logit_y"], atol=1e-5)


@pytest.mark.parametrize("head", text_heads.HEADS)
def test_what_the_text_side_gave_is_what_the_angles_stage_says(head: str, tiny: Params, tmp_path: Path) -> None:
    params = tiny.replaced({"train.surgery.text_head": head}).for_method("dgs")
    prepared = load_prepared(prepare(params, ROOT, tmp_path), ROOT)
    logs: list[TrainingLog] = []
    clip = load_clip(tiny.model, ROOT, tiny.image_size)
    train(get_method("dgs"), clip, prepared, params, 0, choose_device("cpu"), lambda run: logs.append(run.log))
    found = surgery_facts(logs[0])
    table = angle_table(logs[0].samples, logs[0].layers, ["task-harmful"], None)
    assert found["angle_task_harmful"] == pytest.approx(summary(table)["degrees"].item(), abs=1e-3)
    assert 0 < found["along_harm"] < 1 and found["loss_text"] > 0 and 0 < found["text_acc"] <= 1
    row, _ = measured(get_method("dgs"), prepared, params, 0, ROOT, Snapshot(common=tmp_path))
    assert {name: row[name] for name in SURGERY} == found
    assert surgery_facts(TrainingLog("probe", 0)) == {}


def test_what_the_frozen_tower_makes_of_images_is_kept_and_changes_nothing(tiny: Params, tmp_path: Path) -> None:
    prepared, rows = load_prepared(prepare(tiny, ROOT, tmp_path), ROOT), []
    runs = [("probe", 0, "a"), ("levels_probe", 0, "a"), ("probe", 1, "a"), ("content_probe", 0, "a")]
    for name, seed, folder in [*runs, *((name, seed, f"b{index}") for index, (name, seed, _) in enumerate(runs))]:
        method = get_method(name)
        kept = Snapshot(common=tmp_path / folder)
        row, scores = measured(method, prepared, tiny.for_method(name), seed, ROOT, kept)
        rows.append((row, scores["logit"].tolist()))
    assert rows[:4] == rows[4:], "as if each had made them itself"
    shared, own = (sum(1 for _ in tmp_path.glob(f"{pattern}/*")) for pattern in ("a", "b*"))
    assert shared < own


def test_a_training_of_more_epochs_goes_on_from_the_same_one_of_fewer_to_the_bit(
    tiny: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    resume = GoingOn.resume

    def noted(snapshot: GoingOn, state: State) -> None:
        resume(snapshot, state)
        begun.append((state.step, snapshot.steps))

    monkeypatch.setattr(GoingOn, "resume", noted)
    params = tiny.replaced({"compute.jobs": 1, "train.batch_size": 5, "train.log_every": 3, "model.lora.dropout": 0.5})
    an_epoch = -(-len(load_prepared(prepare(params, ROOT, tmp_path), ROOT).split("train")) // 5)
    left = an_epoch - BEFORE_THE_END
    assert left > 0 and left % 3, "a shorter run records its last whole batch, which a longer one does not"
    swad = [Arm("swad", {EPOCHS: epochs}) for epochs in (1, 2)]
    list(sweep(swad, [0], params, ROOT, tmp_path / "kept", tmp_path / "swad.csv"))
    assert not begun, "what is averaged over the last steps begins elsewhere in a longer training"
    arms = [Arm("dgs", {EPOCHS: epochs}) for epochs in (1, 3, 2)]
    list(sweep(arms, [0], params, ROOT, tmp_path / "kept", tmp_path / "out.csv"))
    for arm in arms[1:]:
        list(sweep([arm], [0], params, ROOT, tmp_path / "alone" / arm.text, tmp_path / "alone.csv"))
    assert begun == [(0, an_epoch), (left, 3 * an_epoch), (left, 2 * an_epoch), (0, 3 * an_epoch), (0, 2 * an_epoch)]

    rows, alone = (read_table(tmp_path / name).set_index(KEY) for name in ("out.csv", "alone.csv"))
    assert len(alone) == 2 and alone[SURGERY].notna().to_numpy().all()
    pd.testing.assert_frame_equal(rows.loc[alone.index], alone)
    logits, single = (
        read_scores(tmp_path / name).set_index(["profile", "id"])["logit"] for name in ("out.parquet", "alone.parquet")
    )
    assert (logits[single.index] == single).all()


def test_arms_are_run_once_each_and_other_data_are_prepared_once(tiny: Params, tmp_path: Path) -> None:
    arms = [Arm("probe"), Arm("pixel_cnn", {"data.rho": 0.5, "train.stage1.epochs": 1})]
    where = (tiny, ROOT, tmp_path / "kept", tmp_path / "out.csv")
    rows = list(sweep(arms, [0, 1], *where))
    assert sorted((row["method"], row["seed"]) for row in rows) == [
        ("pixel_cnn", 0), ("pixel_cnn", 1), ("probe", 0), ("probe", 1)
    ]  # fmt: skip
    assert list(sweep(arms, [0, 1], *where)) == [], "finished rows are not run again"
    table = pd.read_csv(where[-1])
    assert list(table.columns) == [*KEY, *MEASURES, FAILED] and table[FAILED].isna().all()
    assert table.groupby(["method", "settings"])["recipe"].nunique().eq(1).all() and table["recipe"].nunique() == 2
    assert len(list((tmp_path / "kept").glob("*/training"))) == 2
    kept = table.set_index("method")["zero_shot_kept"]
    scores = read_scores(where[-1].with_suffix(".parquet"))
    runs = scores.groupby(["profile", "method", "seed"])["id"].nunique()
    assert len(runs) == 4 and set(scores["profile"]) == {arm.text for arm in arms} and runs.nunique() == 1
    assert (kept["probe"] == 1).all(), "a frozen tower keeps everything"
    assert kept["pixel_cnn"].isna().all(), "a network without CLIP has nothing to keep"


def test_images_that_are_not_there_are_named_with_what_makes_them(tiny: Params, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Expected images at build/fresh, found none. Make them first: dgs minibench b"
    ):
        prepare(tiny.replaced(FRESH), tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"Expected images at build/nowhere, found none.$"):
        prepare(tiny.replaced({"data.root": "build/nowhere"}), ROOT, tmp_path)


class TestResumption:
    @pytest.fixture
    def where(self, tiny: Params, tmp_path: Path) -> tuple[Params, Path, Path, Path]:
        """A table with two finished arms."""
        found = (tiny, ROOT, tmp_path / "kept", tmp_path / "out.csv")
        list(sweep([Arm("probe"), Arm("probe", {"train.stage1.epochs": 1})], [0], *found))
        return found

    def test_scores_that_are_run_again_replace_the_old_ones_and_others_stay(
        self, where: tuple[Params, Path, Path, Path]
    ) -> None:
        out = where[-1]
        before = read_scores(out.with_suffix(".parquet"))
        spoiled = before.assign(logit=before["logit"] + 1)
        write_scores(spoiled, out.with_suffix(".parquet"))
        table = pd.read_csv(out)
        table[table["settings"] == "{}"].to_csv(out, index=False)
        shutil.rmtree(out.parent / "kept/out")
        again = list(sweep([Arm("probe"), Arm("probe", {"train.stage1.epochs": 1})], [0], *where))
        assert [row["settings"] for row in again] == ['{"train.stage1.epochs": 1}']
        after = read_scores(out.with_suffix(".parquet")).set_index(["profile", "id"])["logit"]
        same = before.set_index(["profile", "id"])["logit"].reindex(after.index)
        ran = after.index.get_level_values("profile") != "{}"
        assert np.allclose(after[ran], same[ran]) and np.allclose(after[~ran], same[~ran] + 1)

    def test_other_parameters_run_again_in_place_of_the_old_row(self, where: tuple[Params, Path, Path, Path]) -> None:
        params, *rest = where
        (row,) = sweep([Arm("probe")], [0], params.replaced({"train.stage1.lr": 0.1}), *rest)
        table = pd.read_csv(where[-1])
        assert len(table) == 2 and row["recipe"] in set(table["recipe"])
        assert list(sweep([Arm("probe")], [0], params.replaced({"train.stage1.lr": 0.1}), *rest)) == []

    def test_a_row_whose_scores_are_gone_is_run_again(self, where: tuple[Params, Path, Path, Path]) -> None:
        shutil.rmtree(where[2] / "out")
        where[-1].with_suffix(".parquet").unlink()
        assert len(list(sweep([Arm("probe")], [0], *where))) == 1

    def test_what_cannot_be_trained_is_a_row_that_says_why_and_the_others_go_on(
        self, where: tuple[Params, Path, Path, Path]
    ) -> None:
        arms = [Arm("pixel_cnn", {"train.stage1.lr": 1e30}), Arm("probe", {"train.stage1.epochs": 3})]
        rows = {row["method"]: row for row in sweep(arms, [0], *where)}
        assert "The loss became" in rows["pixel_cnn"][FAILED] and rows["probe"]["ap_unseen"] > 0
        assert list(sweep(arms, [0], *where)) == []

    def test_other_images_at_the_same_place_are_prepared_anew(self, tiny: Params, tmp_path: Path) -> None:
        root = tmp_path / "root"
        shutil.copytree(ROOT / "sample", root / "sample")
        first = prepare(tiny, root, tmp_path / "kept")
        assert prepare(tiny, root, tmp_path / "kept") == first
        meta = root / "sample/minibench.json"
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "seed": 12345}))
        assert prepare(tiny, root, tmp_path / "kept") != first


def test_arms_are_chosen_by_name_and_a_misspelled_one_is_named() -> None:
    call = [sys.executable, "-m", "studies.oracle_ladder", "--only", "plane_3"]
    run = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and not run.stdout
    assert re.match(r"dgs: Unknown arm 'plane_3'\. Did you mean 'plane_\d", run.stderr)


class TestTextHeads:
    def test_what_reads_the_head_is_trained_with_both_and_the_rest_once(self) -> None:
        counts = pd.Series([arm.method for arm in text_heads.arms()]).value_counts() // len(text_heads.RHOS)
        assert counts["lora"] == counts["alignment_only"] == 1
        assert {"dgs", "suppression_only", "signed", "shuffled_captions"} <= set(counts.index[counts == 2])

    def test_a_fitted_head_has_settings_that_were_searched_with_it(self) -> None:
        found = read_table(ROOT / fitted_settings.OUT)
        assert set(found["method"]) == set(fitted_settings.METHODS) and set(found["seed"]) == {fitted_settings.SEED}
        for name in fitted_settings.METHODS:
            best = found[found["method"] == name].set_index("candidate")[fitted_settings.RULE].idxmax()
            assert len(found[found["method"] == name]) == len(candidates(get_method(name)))
            for arm in text_heads.arms():
                if arm.settings[fitted_settings.HEAD] == "fitted" and arm.method == name:
                    assert json.loads(best).items() <= arm.settings.items()
                if arm.settings[fitted_settings.HEAD] == "release":
                    assert len(arm.settings) == 2, "those in params.yaml"
        signed = next(arm for arm in text_heads.arms() if arm.method == "signed" and len(arm.settings) > 2)
        assert fitted_settings.settings(ROOT)["dgs"].items() <= signed.settings.items(), "a control has what dgs has"

    def test_without_a_search_one_is_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"python -m studies\.fitted_settings"):
            fitted_settings.settings(tmp_path)


class TestRegimes:
    def test_both_methods_are_in_every_cell_and_the_cells_beside_the_map_differ_in_one_thing(self) -> None:
        arms = regimes.arms()
        assert len(arms) == 2 * (3 * 3 * 3 * 2 + 6) and len({(arm.method, arm.text) for arm in arms}) == len(arms)
        assert set(regimes.CENTRE.items()) <= set(json.loads(arms[-1].text).items())
        for arm in arms:
            params = load_params("mini", ROOT).replaced(dict(arm.settings)).for_method(arm.method)
            assert params.train.stage2.lr == arm.settings[regimes.LR], "the map's rate, not the method's own"

    def test_the_centre_is_in_the_map(self) -> None:
        assert regimes.CENTRE in list(regimes.cells())

    def test_the_figure_has_each_cells_difference_and_says_where_seeds_agree(self) -> None:
        rows = [
            {
                "settings": arm.text, "method": arm.method, "seed": seed,
                "balanced_acc_unseen": 0.7 + 0.02 * (arm.method == "dgs") * (-1) ** (seed * (arm.settings[RHO] == 0.5)),
                "zero_shot_kept": 0.6 - 0.3 * (arm.method == "dgs"),
            }
            for arm in regimes.arms() for seed in (0, 1)
        ]  # fmt: skip
        table = pd.DataFrame(rows)
        figure = regime_map(table)
        assert len(figure.axes) == 3 * 2 * 2, "what lies beside the map is no part of it"
        notes = [[text.get_text() for text in ax.texts] for ax in figure.axes]
        assert notes[0] == ["(+0.0)"] * 9 and notes[1] == ["+2.0"] * 9 and notes[-1] == ["−30"] * 9
        assert "all seeds above in 36 of 54 regimes, all below in 0" in figure.get_suptitle().replace("\n", " ")
        with pytest.raises(ValueError, match="expected cells of dgs and lora"):
            regime_map(table[table["method"] == "dgs"].assign(method="dgs"))


class TestDoseResponse:
    def test_what_reads_captions_is_trained_at_every_share_and_the_rest_at_the_first(self) -> None:
        counts = pd.Series([arm.method for arm in dose_response.arms()]).value_counts()
        assert counts.to_dict() == {"poe_distillation": 5, "dgs": 5, "content_poe_distillation": 1, "lora": 1}


class TestSeenPairs:
    def test_six_different_pairs_none_of_them_the_benchmarks_and_no_generator_thrice(self) -> None:
        assert len(set(seen_pairs.PAIRS)) == 6 and generators.SEEN not in seen_pairs.PAIRS
        counts = pd.Series([name for pair in seen_pairs.PAIRS for name in pair]).value_counts()
        assert set(counts.index) <= set(generators.NAMES) and counts.max() <= 2

    def test_only_the_images_of_chosen_arms_are_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[tuple[Any, ...]] = []
        monkeypatch.setattr(seen_pairs, "find_root", lambda: tmp_path)
        monkeypatch.setattr(seen_pairs, "build", lambda *to, seen, **_: made.append((to[0].name, *seen, to[1])))
        chosen = [arm for arm in seen_pairs.arms() if arm.method == "lora"]
        seen_pairs.make_images(chosen[:2])
        assert [own[:3] for own in made] == [("-".join(pair), *pair) for pair in seen_pairs.PAIRS[:2]]
        seen_pairs.make_images(chosen[2:])
        seeds = {seed for *_, seed in made}
        assert len(seeds) == 6 and not any(str(seed) in TO_MAKE_FRESH for seed in seeds)


class TestPriors:
    def test_every_method_is_on_every_tower_and_the_network_without_one_is_trained_once(self) -> None:
        counts = pd.Series([arm.method for arm in priors.arms()]).value_counts()
        assert counts.to_dict() == {**dict.fromkeys(priors.METHODS, len(priors.EARLY) + 1), priors.WITHOUT: 1}
        assert not any(get_method(name).needs_text for name in counts.index)

    def test_only_the_towers_of_chosen_arms_are_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[dict[int, Path]] = []
        monkeypatch.setattr(priors, "find_root", lambda: tmp_path)
        monkeypatch.setattr(priors, "pretrain", lambda *_, early: made.append(early))
        chosen = [arm for arm in priors.arms() if arm.settings.get(priors.CLIP) in {priors.folder(0), "data/clip"}]
        priors.make_towers(chosen)
        priors.make_towers([Arm(priors.WITHOUT)])
        assert made == [{0: tmp_path / priors.folder(0)}]
