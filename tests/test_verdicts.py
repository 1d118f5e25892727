"""Verdicts with a promise: the bound, the band, and how dgs score tells them."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from clips import settings
from PIL import Image
from scipy.special import expit, logit
from scipy.stats import binomtest
from typer.testing import CliRunner

from dgs.calibration import CalibrationMap
from dgs.cli import app
from dgs.data.perturbations import perturb
from dgs.data.views import EVALUATION, make_view
from dgs.errors import UserError
from dgs.model.checkpoint import read_info, save_checkpoint
from dgs.model.detector import Detector
from dgs.model.judge import Promise, judge
from dgs.model.pixel_cnn import PixelCNN
from dgs.model.scoring import CHANGES
from dgs.stats import Scored
from dgs.verdicts import CONFIDENCE, Band, band, smallest_promise, threshold_for, wrong_allowed

RNG = np.random.default_rng(0)


class TestBound:
    def test_one_per_cent_wants_299_images_without_an_error(self) -> None:
        assert wrong_allowed(298, 0.01) == -1 and wrong_allowed(299, 0.01) == 0
        assert smallest_promise(299) == 0.01 and smallest_promise(298) == 0.011

    @pytest.mark.parametrize("count", [1, 20, 250, 3000])
    @pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
    def test_it_is_clopper_pearsons(self, count: int, share: float) -> None:
        def vouched(wrong: int) -> bool:
            bound = binomtest(wrong, count, alternative="less").proportion_ci(CONFIDENCE, method="exact").high
            return bool(bound <= share)

        allowed = wrong_allowed(count, share)
        assert allowed == -1 or vouched(allowed)
        assert allowed + 1 == count or not vouched(allowed + 1)

    def test_what_it_vouches_for_can_always_be_kept(self) -> None:
        assert all(wrong_allowed(count, smallest_promise(count)) >= 0 for count in range(1, 500))

    def test_the_promise_holds_in_19_of_20_sets_of_validation_images(self) -> None:
        """The real share beyond the threshold is known: logits are uniform."""
        kept = [1 - found <= 0.05 for found in (threshold_for(RNG.random(200), 0.05) for _ in range(4000)) if found]
        assert len(kept) == 4000 and 0.95 <= np.mean(kept) < 0.99

    def test_of_equal_logits_no_more_are_wrong_than_allowed(self) -> None:
        logits = np.round(RNG.normal(size=400), 1)
        found = threshold_for(logits, 0.05)
        assert found is not None and (logits > found).sum() <= wrong_allowed(400, 0.05)


class TestBand:
    real, fake = RNG.normal(-1, 1, 400), RNG.normal(1, 1, 400)

    def test_both_promises_hold_on_the_validation_images(self) -> None:
        found = band(self.real, self.fake, 0.05, 0.1, 0.0)
        assert found.low < found.high
        verdicts = [[found.verdict(one) for one in of] for of in (self.real, self.fake)]
        assert verdicts[0].count("generated") == wrong_allowed(400, 0.05)
        assert verdicts[1].count("real") == wrong_allowed(400, 0.1)
        assert 0 < verdicts[0].count("unsure") < 400

    def test_the_more_errors_are_allowed_the_fewer_are_unsure(self) -> None:
        widths = [
            (found.high - found.low) for found in (band(self.real, self.fake, s, s, 0.0) for s in (0.02, 0.05, 0.1))
        ]
        assert widths == sorted(widths, reverse=True)

    @pytest.mark.parametrize("threshold", [-5.0, 0.3, 5.0])
    def test_where_both_hold_at_one_threshold_nothing_is_unsure(self, threshold: float) -> None:
        found = band(self.real - 9, self.fake + 9, 0.02, 0.02, threshold)
        assert found.low == found.high and (found.low == threshold) == (threshold == 0.3 or abs(threshold) == 5.0)
        near = band(self.real, self.fake, 0.4, 0.4, 99.0)
        assert near.low == near.high
        assert sum(near.verdict(one) == "real" for one in self.fake) <= wrong_allowed(400, 0.4)

    def test_too_few_images_name_the_smallest_promise_that_can_be_kept(self) -> None:
        with pytest.raises(UserError, match=r"promise 1\.0 %, found 20 real ones, .*--max-false-alarm 0\.14 or"):
            band(self.real[:20], self.fake, 0.01, 0.05, 0.0)
        with pytest.raises(UserError, match=r"found 40 generated ones, .*--max-miss 0\.073 or more, or --two-way"):
            band(self.real, self.fake[:40], 0.05, 0.05, 0.0)
        assert band(self.real[:20], self.fake, 0.14, 0.05, 0.0)

    def test_a_logit_at_an_edge_is_unsure(self) -> None:
        assert [Band(-1, 1).verdict(x) for x in (-1.1, -1, 0, 1, 1.1)] == ["real", *["unsure"] * 3, "generated"]


def checkpoint(folder: Path, images: Scored | None) -> Path:
    params = settings(Path("none"))
    save_checkpoint(folder, PixelCNN.new(0), params, "pixel_cnn", 0, {"val": 0.1}, "d", validation=images)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    real, fake = np.random.default_rng(1).normal(-1, 1, 400), np.random.default_rng(2).normal(1, 1, 300)
    images = Scored.of(np.array([0] * 400 + [1] * 300), np.append(real, fake))
    return checkpoint(tmp_path_factory.mktemp("whole") / "seed-0", images)


class TestJudge:
    def test_it_tells_probability_calibrated_band_and_verdict(self, whole: Path) -> None:
        info = read_info(whole)
        found = judge(info, whole, Promise())
        assert found.band is not None
        said = found.told(found.band.high + 0.01)
        assert said["verdict"] == "generated" and said["probability"] == pytest.approx(expit(found.band.high + 0.01))
        assert said["band"] == pytest.approx([expit(found.band.low), expit(found.band.high)])
        by_map = CalibrationMap.model_validate(info["calibration_map"])
        assert said["calibrated"] == by_map(np.array([found.band.high + 0.01]))[0]
        assert "at most 5.0 % of real images like its 400" in found.note and "'unsure' between" in found.note

    def test_two_way_is_the_threshold_alone(self, whole: Path) -> None:
        found = judge(read_info(whole), whole, Promise(two_way=True))
        assert [found.verdict(x) for x in (0.09, 0.1, 0.11)] == ["real", "real", "generated"]
        assert "band" not in found.told(0.0) and found.note.startswith("'generated' above a probability of 0.525")

    def test_without_validation_logits_verdicts_are_two_way_and_a_promise_is_refused(self, tmp_path: Path) -> None:
        older = checkpoint(tmp_path / "seed-0", None)
        assert set(judge(read_info(older), older, Promise()).told(0.2)) == {"probability", "verdict"}
        with pytest.raises(UserError, match="keep logits of validation images"):
            judge(read_info(older), older, Promise(false_alarm=0.1))

    def test_few_validation_images_get_the_smallest_promise_unless_one_is_asked_for(self, tmp_path: Path) -> None:
        few = checkpoint(tmp_path / "seed-0", Scored.of(np.array([0, 1] * 10), np.linspace(-2, 2, 20)))
        note = judge(read_info(few), few, Promise()).note
        assert "at most 25.9 % of real images like its 10" in note and "which vouch for 25.9 % at best" in note
        with pytest.raises(UserError, match=r"--max-false-alarm 0\.259 or more"):
            judge(read_info(few), few, Promise(false_alarm=0.05))

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"false_alarm": 1.5}, "--max-false-alarm between 0 and 1, such as 0.05 for 5 %, found 1.5"),
            ({"miss": 0.0}, "--max-miss between 0 and 1"),
            ({"miss": 0.1, "two_way": True}, "found both"),
        ],
    )
    def test_what_is_no_promise_is_refused(self, asked: dict[str, float], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Promise(**asked)  # type: ignore[arg-type]


class TestCommand:
    def run(self, folder: Path, whole: Path, *more: str) -> list[str]:
        result = CliRunner().invoke(app, ["score", str(folder), "--checkpoint", str(whole), *more])
        assert result.exit_code == 0, result.output
        return list(result.stdout.splitlines())

    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3))
            Image.fromarray((pixels // (1 + index)).astype(np.uint8)).save(folder / f"{index:02}.png")
        return folder

    def test_json_has_the_band_and_the_verdict_follows_from_it(self, pictures: Path, whole: Path) -> None:
        for more in ((), ("--max-false-alarm", "0.02", "--max-miss", "0.2")):
            rows = [json.loads(line) for line in self.run(pictures, whole, "--json", *more)]
            assert len(rows) == 12 and all(
                set(row) == {"path", "probability", "calibrated", "verdict", "band"} for row in rows
            )
            for row in rows:
                low, high = row["band"]
                expected = (
                    "generated" if row["probability"] > high else "real" if row["probability"] < low else "unsure"
                )
                assert row["verdict"] == expected

    def test_csv_and_text_keep_their_columns(self, pictures: Path, whole: Path) -> None:
        rows = list(csv.DictReader(self.run(pictures, whole, "--csv")))
        assert list(rows[0]) == ["path", "probability", "verdict", "error"] and len(rows) == 12
        assert all(len(line.split("\t")) == 3 for line in self.run(pictures, whole))

    def test_two_way_gives_the_verdicts_of_the_threshold(self, pictures: Path, whole: Path) -> None:
        rows = [json.loads(line) for line in self.run(pictures, whole, "--json", "--two-way")]
        assert all((row["verdict"] == "generated") == (logit(row["probability"]) > 0.1) for row in rows)
        assert all("band" not in row for row in rows)

    def test_a_verdict_that_a_change_turns_is_unsure(self, pictures: Path, whole: Path, tmp_path: Path) -> None:
        logits = logit(Detector.load(whole).score(sorted(pictures.iterdir())))
        around = np.median(logits) + logits.std() / 100 * np.array([[-3, -2, -1]] * 200 + [[1, 2, 3]] * 200).ravel()
        narrow = checkpoint(tmp_path / "narrow", Scored.of(np.repeat([0, 1], 600), around))
        plain, stable = (
            [json.loads(line) for line in self.run(pictures, narrow, "--json", *more)]
            for more in ((), ("--stability",))
        )
        assert [row["probability"] for row in plain] == [row["probability"] for row in stable]
        detector = Detector.load(narrow)
        reader = judge(detector.info, narrow, Promise())
        held = []
        for before, row in zip(plain, stable, strict=True):
            with Image.open(row["path"]) as opened:
                pixels = np.array(opened.convert("RGB"))
            sha = hashlib.sha256(Path(row["path"]).read_bytes()).hexdigest()
            views = [make_view(perturb(pixels, change, sha), sha, detector.params, 0, EVALUATION) for change in CHANGES]
            same = sum(
                reader.verdict(logit) == before["verdict"] for logit in detector.logits(np.stack(views)).tolist()
            )
            assert row["stable"] == f"{same}/4"
            assert row["verdict"] == (before["verdict"] if same == 4 else "unsure")
            held.append(same)
        assert 0 < held.count(4) < len(held), "some hold and some do not"

    def test_stability_is_a_column_and_what_cannot_be_read_is_still_said(self, pictures: Path, whole: Path) -> None:
        (pictures / "05.png").write_bytes(b"no picture")
        result = CliRunner().invoke(app, ["score", str(pictures), "--checkpoint", str(whole), "--csv", "--stability"])
        rows = list(csv.DictReader(result.stdout.splitlines()))
        assert result.exit_code == 1 and list(rows[0]) == ["path", "probability", "verdict", "error", "stable"]
        assert [bool(row["error"]) for row in rows] == [index == 5 for index in range(12)]
        assert all(row["stable"].endswith("/4") for row in rows if not row["error"])

    def test_processes_share_changed_copies_too(self, pictures: Path, whole: Path) -> None:
        one, two = (self.run(pictures, whole, "--json", "--stability", "--processes", count) for count in ("1", "2"))
        assert one == two

    def test_two_way_and_stability_contradict_each_other(self, pictures: Path, whole: Path) -> None:
        call = ["score", str(pictures), "--checkpoint", str(whole), "--two-way", "--stability"]
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 2 and "--stability or --two-way, found both" in result.output

    def test_a_promise_that_cannot_be_kept_is_one_sentence(self, pictures: Path, whole: Path) -> None:
        call = ["score", str(pictures), "--checkpoint", str(whole), "--max-miss", "0.001"]
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 2 and "--max-miss 0.01 or more" in result.output and not result.stdout
