"""The page that scores pictures: what a card says, what is refused; nothing is written, no place is shown."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from clips import settings
from copies import ROOT
from PIL import Image
from scipy.special import logit
from test_pixel_cnn import random_network

from dgs.analysis import score_page
from dgs.analysis.score_page import Card, ScorePage, Scorer, told, uploads_of
from dgs.errors import UserError
from dgs.model.checkpoint import save_checkpoint
from dgs.model.judge import Promise
from dgs.model.runs import train_seed
from dgs.model.scoring import Upload, score_files
from dgs.params import Params
from dgs.stats import Scored


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 40, 3)) // (1 + seed)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "seed-0"
    logits = np.append(np.random.default_rng(1).normal(-1, 1, 400), np.random.default_rng(2).normal(1, 1, 400))
    images = Scored.of(np.repeat([0, 1], 400), logits)
    params = settings(Path("no/clip/here"))
    save_checkpoint(folder, random_network(), params, "pixel_cnn", 0, {"val": 0.1}, "d", validation=images)
    return folder


@pytest.fixture
def page(checkpoint: Path) -> ScorePage:
    return ScorePage(Scorer(checkpoint, Promise()))


def test_a_card_says_what_dgs_score_says(page: ScorePage, checkpoint: Path, tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    page.show([Upload(f"{seed}.png", png(seed)) for seed in range(3)])
    expected = list(score_files([tmp_path], checkpoint, lambda _: None, stability=True))
    assert [{**row, "path": Path(row["path"]).name} for row in expected] == page.rows
    assert page.table["verdict"].tolist() == [row["verdict"] for row in expected]


def test_a_card_holds_verdict_interval_stability_and_what_was_read(page: ScorePage) -> None:
    text = page.show([Upload("a.png", png(0))])
    row = page.rows[0]
    assert f'class="dgs-verdict">{row["verdict"]}<' in text and f"Probability {row['probability']:.3f}" in text
    assert f"calibrated {row['calibrated']:.3f}" in text and f"{row['stable']} changed copies" in text
    assert re.search(r"Of the 50 validation images that score most like it, [\d.]+ % \[[\d.]+, [\d.]+\] were", text)
    assert text.count("data:image/png;base64,") == 1, "what the model saw"
    assert "http" not in text, "nothing is asked for outside"
    assert len(page.cards.children) == 1 and page.progress.layout.visibility == "hidden"


def test_validation_images_alike_are_those_with_the_nearest_logits(page: ScorePage) -> None:
    share, low, high, count = page.scorer.alike(6.0) or (0.0, 0.0, 0.0, 0)
    assert share == 1.0 and count == 50 and low < share and high == 1.0
    near = sorted(page.scorer.validation, key=lambda each: abs(each[0]))[:50]
    assert (page.scorer.alike(0.0) or [None])[0] == np.mean([label == "fake" for _, label in near])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"no image", "not an image in a format that is read"),
        (png(0)[:200], "Cannot decode the picture"),
        (b"\0" * (score_page.MOST_BYTES + 1), "It is larger than 20 MB. Make it smaller."),
    ],
)
def test_what_is_no_picture_is_one_sentence_and_the_page_goes_on(
    page: ScorePage, content: bytes, sentence: str
) -> None:
    text = page.show([Upload("<b>evil</b>.png", content), Upload("b.png", png(1))])
    assert sentence in text and "Traceback" not in text and "<b>evil" not in text and "&lt;b&gt;evil" in text
    assert "error" in page.rows[0] and page.rows[1]["verdict"] in ("real", "generated", "unsure")


def test_whatever_a_model_does_is_a_sentence_too(page: ScorePage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.scorer.detector.tower, "logits", lambda views: 1 / 0)
    assert "It could not be scored (ZeroDivisionError)" in page.show([Upload("a.png", png(0))])


def test_more_than_a_hundred_are_left_out_and_it_says_so(page: ScorePage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_page, "MOST_PICTURES", 3)
    text = page.show([Upload(f"{index}.png", png(index)) for index in range(5)])
    assert len(page.rows) == 3 and "Pictures after the first 3 were left out." in text


def test_a_folder_is_scored_without_its_place_being_told(page: ScorePage, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    text = page.show(uploads_of(tmp_path))
    assert sorted(row["path"] for row in page.rows) == ["b.png", "gone.png", "in/a.png"]
    assert str(tmp_path) not in text and sum("error" in row for row in page.rows) == 2


def test_paths_are_also_looked_for_in_the_repository(monkeypatch: pytest.MonkeyPatch, page: ScorePage) -> None:
    monkeypatch.chdir(ROOT / "notebooks")
    assert next(iter(uploads_of("dgs/data/selfcheck"))).name.endswith(".png")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="Expected a folder of pictures at no/such, found none"):
        list(uploads_of("no/such"))


def test_nothing_is_written(page: ScorePage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a file is written")

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr("tempfile.mkdtemp", refused)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    page.show([Upload("a.png", png(0))])
    assert "verdict" in page.rows[0]


def test_a_card_without_more_than_a_verdict(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", random_network(), settings(Path("none")), "pixel_cnn", 0, {"val": 0.1}, "d")
    page = ScorePage(Scorer(tmp_path / "c", Promise()))
    text = page.show([Upload("a.png", png(0))])
    assert set(page.rows[0]) == {"path", "probability", "verdict"} and "calibrated" not in text
    assert (page.rows[0]["verdict"] == "generated") == (logit(page.rows[0]["probability"]) > 0.1)
    assert "changed copies" not in told(Card(page.rows[0]))


class TestNearest:
    @pytest.fixture(scope="class")
    def trained(self, tiny: Params, tiny_prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A repository's build/ with what was prepared and a checkpoint of it."""
        out = tmp_path_factory.mktemp("trained")
        (out / "build/tiny").mkdir(parents=True)
        (out / "build/tiny/prepare").symlink_to(tiny_prepared)
        train_seed("lora", 0, tiny, ROOT, tiny_prepared, out / "build/tiny/train/lora", out / "unfinished")
        return out

    def test_a_training_image_is_nearest_to_itself(
        self, trained: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DGS_OUT", str(trained))
        scorer = Scorer(trained / "build/tiny/train/lora/seed-0", Promise())
        assert scorer.training is not None
        views, rows = scorer.training
        view = views[5][0].permute(1, 2, 0).numpy()
        (first, kind), *others = scorer.nearest(view)
        assert np.array_equal(first, view) and len(others) == score_page.NEAREST - 1
        assert kind == (f"generated, {rows['generator'].iloc[5]}" if rows["label"].iloc[5] else "real")

    def test_the_newest_checkpoint_is_taken_where_none_is_named(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DGS_OUT", str(trained))
        assert Scorer(None, Promise()).detector.info["method"] == "lora"

    def test_pictures_that_are_not_to_be_shown_are_not(self, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DGS_OUT", str(trained))
        scorer = Scorer(trained / "build/tiny/train/lora/seed-0", Promise())
        scorer.detector.info["params"]["data"]["show_images"] = False
        assert scorer._training_images() is None
