"""The command line: data on stdout, one sentence on stderr, exit codes that scripts can rely on."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import structured_image
from PIL import Image
from test_checkpoint import DAMAGES, assert_helpful, edit_json
from test_verify import edit, metrics, write
from typer.main import get_command
from typer.testing import CliRunner, Result

from dgs.cli import app, main
from dgs.model.detector import Detector
from minibench import splits as plan


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
        assert all(name in result.stdout for name in ("score", "verify", "minibench", "stage", "profile", "manifest"))

    def test_every_command_has_json(self) -> None:
        def leaves(command: object) -> list:
            inner = getattr(command, "commands", {})
            return [leaf for child in inner.values() for leaf in leaves(child)] if inner else [command]

        commands = leaves(get_command(app))
        assert len(commands) >= 5
        for command in commands:
            assert any("--json" in option.opts for option in command.params), command.name

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
            ["minibench", "build", "--out", "x", "--seed", "-1"],
            ["train", "lora", "--seed", "-1"],
            ["tune", "lora", "--seed", "-1"],
            ["left-out", "lora", "--seed", "-1"],
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

    @pytest.mark.parametrize("arguments", [["train"], ["prepare", "--method", "lora"]])
    def test_the_stage_train_alone_is_of_a_method(self, arguments: list[str]) -> None:
        assert "Expected --method for the stage train and for no other" in one_sentence(run("stage", *arguments))


class TestProfile:
    def test_an_unknown_one_is_one_sentence(self) -> None:
        assert "Did you mean 'paper'?" in one_sentence(run("profile", "papr"))

    def test_the_main_one_is_the_main_pipeline(self) -> None:
        assert json.loads(run("profile", "mini", "--json").stdout) == {"profile": "mini", "pipeline": "dvc.yaml"}
        assert run("profile", "mini").stdout == "dvc.yaml\n"


class TestParams:
    @pytest.mark.parametrize(
        ("arguments", "name", "value", "source"),
        [
            ([], "train.stage2.lr", None, "params.yaml"),
            (["lora"], "train.stage2.lr", 0.002, "params.yaml: tuned.lora"),
            (["lora"], "train.surgery.lam", 0.2, "params.yaml: tuned.default"),
            (["lora"], "train.batch_size", 32, "params.yaml"),
            (["paper_order"], "train.surgery.order", "paper", "the method paper_order"),
            (["lora", "--profile", "paper"], "train.stage2.lr", 1e-4, "profiles/paper.yaml"),
            (["lora", "--profile", "study-90-val"], "train.stage2.lr", 0.002, "profiles/study-90-val.yaml: tuned.lora"),
        ],
    )
    def test_every_number_with_where_it_comes_from(
        self, arguments: list[str], name: str, value: object, source: str
    ) -> None:
        rows = [json.loads(line) for line in run("params", *arguments, "--json").stdout.splitlines()]
        assert {"name": name, "value": value, "source": source} in rows
        assert f"{name}\t{json.dumps(value)}\t{source}\n" in run("params", *arguments).stdout

    def test_an_unknown_method_is_one_sentence(self) -> None:
        assert "Did you mean 'lora'?" in one_sentence(run("params", "loar"))


class TestVerify:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        return write(tmp_path / "committed"), write(tmp_path / "reproduced")

    def test_equal_folders_exit_with_0(self, pair: tuple[Path, Path]) -> None:
        result = run("verify", *pair)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "reproduces" in result.stderr and "moved" not in result.stderr
        assert json.loads(run("verify", *pair, "--json").stdout) == {"reproduces": True, "moved": []}

    def test_a_difference_exits_with_1_and_says_what_moved(self, pair: tuple[Path, Path]) -> None:
        content = metrics()
        content["methods"]["dgs"]["ap_unseen"]["mean"] += 0.02
        (pair[0] / "metrics.json").write_text(json.dumps(content))
        edit(pair[1], "detection.csv", 0, "n_fake", 1)
        people, programs = run("verify", *pair), run("verify", *pair, "--json")
        assert people.exit_code == programs.exit_code == 1
        assert people.stderr.count("moved: ") == 2 and "differs from" in people.stderr
        said = json.loads(programs.stdout)
        assert said["reproduces"] is False and all(line in people.stderr for line in said["moved"])
        assert ["methods.dgs.ap_unseen.mean" in line or "n_fake" in line for line in said["moved"]] == [True, True]

    def test_the_tolerance_can_be_chosen(self, pair: tuple[Path, Path]) -> None:
        edit(pair[1], "detection.csv", 0, "acc", 0.02)
        assert run("verify", *pair).exit_code == 1
        assert run("verify", *pair, "--tolerance", "0.03").exit_code == 0

    def test_a_folder_without_results_is_one_sentence(self, pair: tuple[Path, Path]) -> None:
        (pair[1] / "metrics.json").unlink()
        for options in ([], ["--json"]):
            message = one_sentence(run("verify", *pair, *options))
            assert "metrics.json" in message and str(pair[1]) in message


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images and a text file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        structured_image(index, 32, 32).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


class TestScore:
    def test_rows_for_people_and_rows_for_programs_say_the_same(self, images: Path, whole: Path) -> None:
        (images / 'a, "b".png').write_bytes((images / "0.png").read_bytes())
        results = [run("score", images, "--checkpoint", whole, *option) for option in ([], ["--json"], ["--csv"])]
        people, programs, table = (result.stdout.splitlines() for result in results)
        assert [result.exit_code for result in results] == [1, 1, 1], "one of the files is no image"
        rows = [json.loads(line) for line in programs]
        assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.png", 'a, "b".png', "notes.txt"]
        for row, line, cells in zip(rows, people, csv.DictReader(table), strict=True):
            path, *rest = line.split("\t")
            assert path == row["path"]
            if "error" in row:
                assert set(row) == {"path", "error"} and rest == ["-", row["error"]]
            else:
                assert set(row) == {"path", "probability", "verdict"}
                assert rest == [f"{row['probability']:.4f}", row["verdict"]]
                assert row["verdict"] == ("generated" if row["probability"] > 0.5 else "real")
            assert list(cells) == ["path", "probability", "verdict", "error"]
            assert {name: value for name, value in cells.items() if value} == {k: str(v) for k, v in row.items()}

    def test_csv_and_json_at_once_are_a_mistake(self, images: Path) -> None:
        assert "Expected --csv or --json, found both" in one_sentence(run("score", images, "--csv", "--json"))

    def test_explain_saves_what_the_model_saw_of_each(self, images: Path, whole: Path, tmp_path: Path) -> None:
        seen = tmp_path / "seen"
        result = run("score", images, "--checkpoint", whole, "--json", "--explain", seen)
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        index = [json.loads(line) for line in (seen / "views.jsonl").read_text().splitlines()]
        scored = [row for row in rows if "error" not in row]
        assert index == [{"view": f"{number:06d}.png", **row} for number, row in enumerate(scored, start=1)]
        detector = Detector.load(whole)
        for entry in index:
            with Image.open(seen / entry["view"]) as saved:
                assert np.array_equal(np.array(saved), detector.view(entry["path"]))

    def test_explain_wants_an_empty_folder_apart_from_the_images(self, images: Path, whole: Path) -> None:
        for folder, message in ((images.parent / "0", "found"), (images / "seen", "outside of what is scored")):
            folder.mkdir(exist_ok=True)
            (folder / "a").touch()
            result = run("score", images, "--checkpoint", whole, "--explain", folder)
            assert message in one_sentence(result) and "--explain" in result.stderr

    def test_all_scored_exits_with_0_and_people_are_told_how_often_a_verdict_is_a_false_alarm(
        self, images: Path, whole: Path
    ) -> None:
        result = run("score", images / "0.png", images / "1.png", "--checkpoint", whole)
        assert (result.exit_code, len(result.stdout.splitlines())) == (0, 2)
        said = "raised a false alarm on 8.4 % [5.6, 12.5] of 250 real images and caught 80.0 %"
        assert said in result.stderr and "the best threshold on its validation images" in result.stderr

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_what_is_not_there_is_one_sentence(self, options: list[str], images: Path, tmp_path: Path) -> None:
        gone, empty = tmp_path / "gone", tmp_path / "empty"
        empty.mkdir()
        for arguments, sentence in (
            ([gone], f"Expected a file or folder at {gone}, found none"),
            ([empty], f"Expected a file to score in {empty}, found none"),
            ([images, "--checkpoint", gone], f"Expected a checkpoint folder (with dgs.json) at {gone}, found none"),
        ):
            assert sentence in one_sentence(run("score", *arguments, *options))

    @pytest.mark.parametrize("damage", ["no heads.safetensors", "an adapter without one matrix", "dgs.json is a list"])
    def test_a_damaged_checkpoint_is_one_sentence(self, damage: str, images: Path, checkpoint: Path) -> None:
        name, break_it = DAMAGES[damage]
        break_it(checkpoint / name)
        assert_helpful(one_sentence(run("score", images, "--checkpoint", checkpoint)), checkpoint / name)

    def test_a_threshold_that_was_never_calibrated_is_said_to_be_so(self, images: Path, checkpoint: Path) -> None:
        edit_json(checkpoint / "dgs.json", lambda info: info["thresholds"].pop("val"))
        result = run("score", images, "--checkpoint", checkpoint)
        assert "above a probability of 0.500, not calibrated on any images" in result.stderr
        assert "best threshold" not in result.stderr

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_a_name_that_stdout_cannot_encode_is_printed_escaped(
        self, options: list[str], encoding: str, images: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ["ascii.png", os.fsdecode(b"caf\xe9.png"), "caf\u00e9.png", "\U0001f600.txt"]
        for name in names:
            shutil.copy(images / "0.png", images / name)
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors="strict", newline="\n"))
        paths = [str(images / name) for name in names]
        monkeypatch.setattr(sys, "argv", ["dgs", "score", *paths, "--checkpoint", str(whole), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        lines = raw.getvalue().decode(encoding).splitlines()
        assert len(lines) == len(names)
        if options:
            assert [json.loads(line)["path"] for line in lines] == paths
        else:
            assert lines[0].startswith(paths[0]) and "caf\\udce9.png" in lines[1]

    def test_a_closed_pipe_ends_quietly(self, tmp_path: Path, whole: Path) -> None:
        for index in range(150):
            (tmp_path / f"{index:03}.txt").write_text("no image")
        command = [sys.executable, "-m", "dgs.cli", "score", str(tmp_path), "--checkpoint", str(whole)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            assert "000.txt" in process.stdout.readline()
            process.stdout.close()
            stderr = process.stderr.read()
        said = [line for line in stderr.splitlines() if line.strip()]
        assert all(line.startswith(("checkpoint ", "scoring: ")) for line in said), stderr
        assert process.returncode == 1


class TestMinibench:
    def test_as_json_it_says_what_was_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "Sizes", partial(plan.Sizes, train=8, val=4, test=2))
        out = tmp_path / "made"
        result = run("minibench", "build", "--out", out, "--seed", "7", "--rho", "0.75", "--json")
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert set(said) == {"out", "seed", "rhos", "counts", "content_hash"}
        assert (said["out"], said["seed"], said["rhos"]) == (str(out), 7, [0.75])
        for split, counts in said["counts"].items():
            assert pq.read_metadata(out / f"images-{split}.parquet").num_rows == sum(counts.values())
