"""Scoring: every file is accounted for, in an order that can be relied on, whatever lies in a folder."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import settings, write_checkpoint, write_random_clip
from conftest import structured_image
from test_checkpoint import assert_helpful, edit_json

from dgs.conditions import parse_condition
from dgs.data.images import UnreadableImage
from dgs.errors import UserError
from dgs.model.detector import Detector, probability
from dgs.model.scoring import score_files

Rows = list[dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    return made


@pytest.fixture
def score(whole: Path) -> Callable[..., Rows]:
    return lambda *paths, batch_size=2: list(score_files(paths, whole, lambda _: None, batch_size))


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    structured_image(seed, 32, 32).save(path, format="PNG")
    return path


def names(rows: Rows, folder: Path) -> list[str]:
    return [Path(row["path"]).relative_to(folder).as_posix() for row in rows]


class TestProbability:
    def test_equals_the_formula_and_saturates_without_a_warning(self) -> None:
        logits = np.array([-1e4, -800, -2, 0, 2, 800, 1e4], np.float32)
        with np.errstate(all="raise"):
            p = probability(logits)
        assert p.dtype == np.float64
        assert p[[0, 1, 3, 5, 6]].tolist() == [0, 0, 0.5, 1, 1]
        assert p[[2, 4]] == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))], rel=1e-12)

    def test_a_head_of_huge_weights_is_scored_by_both_ways_alike(
        self, tmp_path: Path, clip_folder: Path, folder: Path
    ) -> None:
        steep = write_checkpoint(tmp_path / "steep", clip_folder, scale=1e5)
        files = [image(folder / f"{seed}.png", seed) for seed in range(12)]
        detector = Detector.load(steep)
        views = np.stack([detector.view(file) for file in files])
        assert detector.logits(views).min() < -750, "the case must be one where exp overflows"
        with np.errstate(all="raise"):
            scores = detector.score(files)
        rows = list(score_files(files, steep, lambda _: None))
        assert [row["probability"] for row in rows] == scores.tolist()
        assert [row["verdict"] for row in rows] == ["generated" if p > 0.5 else "real" for p in scores]


class TestEveryFileIsAccountedFor:
    def test_the_extension_does_not_matter_and_the_content_does(self, folder: Path, score: Callable[..., Rows]) -> None:
        for name in ("a.png", "b.PNG", "c", "d.txt", "e.heic.bak"):
            image(folder / name)
        (folder / "f.jpg").write_text("no image")
        (folder / "g.txt").write_text("notes")
        (folder / "h.heic").write_bytes(b"\0\0\0\x18ftypheic")
        (folder / "i").write_bytes(b"")
        rows = score(folder)
        assert names(rows, folder) == ["a.png", "b.PNG", "c", "d.txt", "e.heic.bak", "f.jpg", "g.txt", "h.heic", "i"]
        for row in rows[:5]:
            assert set(row) == {"path", "probability", "verdict"} and 0 <= row["probability"] <= 1
        for row in rows[5:]:
            assert set(row) == {"path", "error"} and row["path"] in row["error"] and "\n" not in row["error"]

    def test_only_names_with_a_dot_first_are_left_out(self, folder: Path, score: Callable[..., Rows]) -> None:
        image(folder / "a.png")
        image(folder / ".hidden.png")
        image(folder / ".cache" / "b.png")
        assert names(score(folder), folder) == ["a.png"]
        assert names(score(folder / ".hidden.png", folder / ".cache"), folder) == [".hidden.png", ".cache/b.png"]

    def test_order_is_that_of_names_whatever_the_batch(self, folder: Path, score: Callable[..., Rows]) -> None:
        for name in ("b/2", "z", "b/1/x", "a", "b/10", "c/deep/er/y"):
            image(folder / name)
        expected = ["a", "b/1/x", "b/10", "b/2", "c/deep/er/y", "z"]
        assert [names(score(folder, batch_size=n), folder) for n in (1, 4, 64)] == [expected] * 3

    def test_links_are_followed_and_loops_end(self, folder: Path, tmp_path: Path, score: Callable[..., Rows]) -> None:
        image(folder / "a" / "1.png")
        image(tmp_path / "elsewhere" / "2.png")
        image(tmp_path / "3.png")
        (folder / "a" / "up").symlink_to(folder)
        (folder / "b").symlink_to(folder / "a")
        (folder / "c").symlink_to(tmp_path / "elsewhere")
        (folder / "d.png").symlink_to(tmp_path / "3.png")
        (folder / "e.png").symlink_to(tmp_path / "gone.png")
        (folder / "f").symlink_to(folder / "f")
        rows = score(folder)
        assert names(rows, folder) == ["a/1.png", "c/2.png", "d.png", "e.png", "f"]
        assert ["error" in row for row in rows] == [False, False, False, True, True]
        assert "No such file" in rows[3]["error"] and "symbolic links" in rows[4]["error"]

    def test_what_is_no_file_is_refused_and_nothing_waits_for_it(
        self, folder: Path, score: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image(folder / "a.png")
        os.mkfifo(folder / "pipe.png")
        (folder / "zero.png").symlink_to("/dev/zero")
        monkeypatch.chdir(folder)  # a socket's address may not be long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket.png")
            rows = score(folder)
        assert names(rows, folder) == ["a.png", "pipe.png", "socket.png", "zero.png"]
        for row, kind in zip(rows[1:], ("named pipe", "socket", "device"), strict=True):
            assert f"expected a file, found a {kind}" in row["error"]
        named = score(folder / "pipe.png", Path("/dev/zero"), folder / "a.png")
        assert ["error" in row for row in named] == [True, True, False]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_what_may_not_be_read_is_an_error_row(self, folder: Path, score: Callable[..., Rows]) -> None:
        image(folder / "a" / "1.png")
        image(folder / "b.png").chmod(0)
        (folder / "a").chmod(0)
        try:
            rows = score(folder)
        finally:
            (folder / "a").chmod(0o755)
        assert names(rows, folder) == ["a", "b.png"]
        assert all("Permission denied" in row["error"] for row in rows)

    def test_folders_deeper_than_a_path_may_be_long_end_in_an_error_row(
        self, folder: Path, score: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image(folder / "z.png")
        monkeypatch.chdir(folder)
        for _ in range(20):
            Path("d" * 250).mkdir()
            os.chdir("d" * 250)
        os.chdir(folder)
        rows = score(folder)
        assert "File name too long" in rows[0]["error"]
        assert names(rows[1:], folder) == ["z.png"]

    def test_a_file_too_large_for_an_image_is_refused_unread(self, folder: Path, score: Callable[..., Rows]) -> None:
        with (folder / "film.mp4").open("wb") as file:
            file.truncate(50_000_000_000)  # sparse: takes no disk
        assert "50.0 GB, expected at most 0.2 GB" in score(folder)[0]["error"]

    def test_an_image_smaller_than_a_patch_is_an_error_row(
        self, folder: Path, tmp_path: Path, clip_folder: Path
    ) -> None:
        params = settings(clip_folder, patches={"enabled": True, "size": 8, "count": 16})
        patched = write_checkpoint(tmp_path / "patched", clip_folder, params)
        structured_image(0, 5, 40).save(folder / "a.png")
        image(folder / "b.png")
        rows = list(score_files([folder], patched, lambda _: None))
        assert "at least 8 x 8 px" in rows[0]["error"] and "probability" in rows[1]

    def test_a_huge_folder_is_read_as_it_is_scored(self, folder: Path, whole: Path) -> None:
        for index in range(40):
            image(folder / f"{index:02}" / "x.png")
        rows = score_files([folder], whole, lambda _: None, batch_size=3)
        first = [next(rows) for _ in range(3)]
        image(folder / "39" / "new.png")
        assert names([*first, *rows], folder)[-2:] == ["39/new.png", "39/x.png"]


class TestPaths:
    def test_a_missing_path_among_others_is_an_error_row(self, folder: Path, score: Callable[..., Rows]) -> None:
        image(folder / "a.png")
        rows = score(folder / "gone.png", folder)
        assert names(rows, folder) == ["gone.png", "a.png"]
        assert "No such file" in rows[0]["error"] and "probability" in rows[1]

    @pytest.mark.parametrize("paths", [["gone-0"], ["gone-0", "gone-1", "gone-2"], ["gone-0" + "x" * 5000]])
    def test_nothing_but_missing_paths_is_a_mistake(
        self, paths: list[str], folder: Path, score: Callable[..., Rows]
    ) -> None:
        with pytest.raises(UserError, match=r"Expected a file or folder at .*gone-0.*, found none\."):
            score(*map(folder.joinpath, paths))

    def test_a_name_that_no_file_can_have_is_a_missing_path(self, folder: Path, score: Callable[..., Rows]) -> None:
        assert "File name too long" in score(image(folder / "a.png"), folder / ("x" * 5000))[1]["error"]

    def test_folders_without_a_file_are_a_mistake(self, folder: Path, score: Callable[..., Rows]) -> None:
        (folder / "sub" / "sub").mkdir(parents=True)
        image(folder / ".hidden.png")
        with pytest.raises(UserError, match=r"Expected a file to score in .*images, found none\."):
            score(folder)

    @pytest.mark.parametrize("path", ["gone.png", "."])
    def test_paths_are_checked_before_a_checkpoint_is_opened(self, path: str, folder: Path) -> None:
        with pytest.raises(UserError, match="Expected a file"):
            list(score_files([folder / path], folder / "no checkpoint", lambda _: None))


class TestLoading:
    def test_a_training_parameter_of_another_version_does_not_matter(self, whole: Path, checkpoint: Path) -> None:
        def rename(info: dict) -> None:
            info["params"]["train"]["learning_rate"] = info["params"].pop("seeds")
            info["params"]["evaluate"] = {"confidence": 0.95}

        edit_json(checkpoint / "dgs.json", rename)
        picture = structured_image(0)
        assert Detector.load(checkpoint).score([picture]) == Detector.load(whole).score([picture])

    @pytest.mark.parametrize(
        "edit",
        [
            lambda info: info["thresholds"].clear(),
            lambda info: info["params"]["model"].update(image_size=0),
            lambda info: info["params"].update(patches=[]),
            lambda info: info["params"]["data"].update(colour="red"),
        ],
    )
    def test_what_a_score_depends_on_does(self, edit: Callable[[dict], object], checkpoint: Path) -> None:
        edit_json(checkpoint / "dgs.json", edit)
        with pytest.raises(UserError) as caught:
            list(score_files([checkpoint / "dgs.json"], checkpoint, lambda _: None))
        assert_helpful(str(caught.value), checkpoint / "dgs.json")

    def test_a_damaged_clip_is_one_sentence(self, tmp_path: Path) -> None:
        clip_folder = write_random_clip(tmp_path / "clip")
        folder = write_checkpoint(tmp_path / "seed-0", clip_folder)
        for name in ("open_clip_config.json", "open_clip_model.safetensors"):
            content = (clip_folder / name).read_bytes()
            for damage in (lambda file: os.truncate(file, file.stat().st_size // 2), Path.unlink):
                damage(clip_folder / name)
                with pytest.raises(UserError) as caught:
                    Detector.load(folder)
                assert str(clip_folder) in str(caught.value) and "\n" not in str(caught.value)
            (clip_folder / name).write_bytes(content)

    def test_the_embedded_benchmark_comes_with_a_warning(self, checkpoint: Path, folder: Path) -> None:
        edit_json(checkpoint / "dgs.json", lambda info: info["params"]["data"].update(layout="minibench"))
        warnings: list[str] = []
        rows = list(score_files([image(folder / "a.png")], checkpoint, warnings.append))
        assert len(rows) == 1
        threshold, embedded = warnings
        assert f"checkpoint {checkpoint}: 'generated' above a probability of" in threshold
        assert "embedded 64 px benchmark" in embedded


def test_scoring_an_unreadable_file_raises_and_names_it(whole: Path, folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"a\.png"):
        Detector.load(whole).score([folder / "a.png"])


def test_batches_give_the_scores_of_single_images(whole: Path) -> None:
    pictures = [structured_image(seed) for seed in range(5)]
    detector = Detector.load(whole)
    alone = list(itertools.chain.from_iterable(detector.score([picture]) for picture in pictures))
    assert detector.score(pictures, batch_size=2) == pytest.approx(alone, abs=1e-6)
    assert detector.score([]).shape == (0,)


def test_the_content_of_a_file_is_seen_as_the_file(whole: Path, folder: Path) -> None:
    detector, file = Detector.load(whole), image(folder / "a.png", 3)
    for change in (None, parse_condition("noise:8"), parse_condition("jpeg:75")):
        assert np.array_equal(detector.view(file, change), detector.view(file.read_bytes(), change))
    with pytest.raises(UnreadableImage, match="Cannot decode the picture: "):
        detector.view(b"no image")


def test_an_unreadable_file_takes_no_other_files_score(folder: Path, score: Callable[..., Rows]) -> None:
    (folder / "b.png").write_bytes(b"no image")
    files = [image(folder / "a.png", 0), folder / "b.png", image(folder / "c.png", 5), image(folder / "d.png", 9)]
    alone = {str(file): score(file)[0].get("probability") for file in files}
    together = {row["path"]: row.get("probability") for row in score(folder, batch_size=4)}
    assert together == pytest.approx(alone, abs=1e-6) and len(set(alone.values())) == 4
