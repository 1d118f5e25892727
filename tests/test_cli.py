"""The command line: data on stdout, one sentence on stderr, exit codes that scripts can rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_verify import edit, metrics, write
from typer.testing import CliRunner, Result

from dgs.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_sentence(result: Result) -> str:
    """The message of a user's mistake: exit code 2, nothing on stdout, one line on stderr."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dgs: "), lines
    assert "Traceback" not in result.output
    return lines[0]


class TestUsage:
    def test_help_lists_the_commands(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert all(name in result.stdout for name in ("score", "verify", "minibench", "stage", "profile"))

    @pytest.mark.parametrize(
        "arguments",
        [
            ["scoer"],
            ["score"],
            ["score", "x.jpg", "--chekpoint", "y"],
            ["verify", "one"],
            ["verify", "a", "b", "--tolerance", "tight"],
            ["minibench", "build", "--out", "x", "--seed", "one"],
            ["minibench", "build", "--out", "x", "--seed", "1", "--clip", "other"],
        ],
    )
    def test_wrong_usage_exits_with_2_and_no_traceback(self, arguments: list[str]) -> None:
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr and "Traceback" not in result.stderr

    def test_as_a_real_process(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "dgs.cli", "scoer"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stdout == ""
        assert "scoer" in result.stderr and "Traceback" not in result.stderr

    def test_a_misspelled_stage_is_one_sentence(self) -> None:
        assert "Unknown stage 'trian'. Did you mean 'train'?" in one_sentence(run("stage", "trian"))


class TestProfile:
    def test_an_unknown_one_is_one_sentence(self) -> None:
        assert "Did you mean 'paper'?" in one_sentence(run("profile", "papr"))

    def test_the_main_one_is_the_main_pipeline(self) -> None:
        result = run("profile", "mini")
        assert (result.exit_code, result.stdout.strip()) == (0, "dvc.yaml")


class TestVerify:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        return write(tmp_path / "committed"), write(tmp_path / "reproduced")

    def test_equal_folders_exit_with_0(self, pair: tuple[Path, Path]) -> None:
        result = run("verify", *pair)
        assert result.exit_code == 0
        assert "reproduces" in result.stderr and "moved" not in result.stderr

    def test_a_difference_exits_with_1_and_says_what_moved(self, pair: tuple[Path, Path]) -> None:
        content = metrics()
        content["methods"]["dgs"]["ap_unseen"]["mean"] += 0.02
        (pair[0] / "metrics.json").write_text(json.dumps(content))
        edit(pair[1], "detection.csv", 0, "n_fake", lambda value: value + 1)
        result = run("verify", *pair)
        assert result.exit_code == 1
        assert "methods.dgs.ap_unseen.mean" in result.stderr and "n_fake" in result.stderr
        assert result.stderr.count("moved: ") == 2 and "differs from" in result.stderr

    def test_the_tolerance_can_be_chosen(self, pair: tuple[Path, Path]) -> None:
        edit(pair[1], "detection.csv", 0, "acc", lambda value: value + 0.02)
        assert run("verify", *pair).exit_code == 1
        assert run("verify", *pair, "--tolerance", "0.03").exit_code == 0

    def test_a_missing_file_is_one_sentence(self, pair: tuple[Path, Path]) -> None:
        (pair[1] / "forgetting.csv").unlink()
        message = one_sentence(run("verify", *pair))
        assert "forgetting.csv" in message and str(pair[1]) in message


class TestScore:
    def test_a_missing_path_is_one_sentence(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone.jpg"
        for options in ([], ["--json"]):
            message = one_sentence(run("score", gone, *options))
            assert f"Expected a file or folder at {gone}, found none" in message

    def test_one_missing_path_among_others_stops_before_anything_is_scored(self, tmp_path: Path) -> None:
        (tmp_path / "there.jpg").write_bytes(b"")
        message = one_sentence(run("score", tmp_path / "there.jpg", tmp_path / "gone.jpg"))
        assert "gone.jpg" in message

    def test_a_missing_checkpoint_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "there.jpg").write_bytes(b"")
        checkpoint = tmp_path / "no checkpoint"
        message = one_sentence(run("score", tmp_path, "--checkpoint", checkpoint))
        assert str(checkpoint) in message
