"""Training that goes on where it was broken off, to the bit, and what is never gone on with."""

# ruff: noqa: F811  # fixtures of test_train

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from copies import ROOT
from test_disk import full_disk  # noqa: F401
from test_train import settings, weights_of
from torch import Tensor

from dgs.data.prepared import TRAINING, Prepared
from dgs.errors import UserError
from dgs.model.clip import Clip, load_clip
from dgs.model.clip_source import CONFIG
from dgs.model.methods.registry import get_method
from dgs.model.runs import train_seed
from dgs.model.snapshot import Snapshot, run_key
from dgs.model.train import Trained, train
from dgs.model.training_log import AT_FEATURES, AT_LAYERS, TABLES, TrainingLog
from dgs.params import Params

STEPS = 6  # two epochs of three


@pytest.fixture
def params() -> Params:
    """Dropout and an odd last batch: whatever draws random numbers must go on with the next one."""
    both = {"epochs": 2, "lr": 0.01}
    return settings(stage1=both, stage2=both).replaced({"model.lora.dropout": 0.5})


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def train_until(
    stop: int | None, method: str, clip: Clip, prepared: Prepared, params: Params, kept: Snapshot
) -> tuple[dict[str, Tensor], dict[str, object], int]:
    """Train, killed in the given step (from 1) before its snapshot: (weights, journal, steps that were made)."""
    found: list[tuple[dict[str, Tensor], dict[str, object]]] = []
    made = 0

    def on_step() -> None:
        nonlocal made
        made += 1
        if made == stop:
            raise Killed

    def done(trained: Trained) -> None:
        found.append((weights_of(trained), {**trained.log.rows(), "thresholds": trained.thresholds}))

    try:
        train(get_method(method), clip, prepared, params, 0, torch.device("cpu"), done, on_step, kept)
    except Killed:
        return {}, {}, made
    return *found[0], made


def assert_same(clip: Clip, prepared: Prepared, params: Params, kept: Snapshot, method: str = "dgs") -> int:
    """A run that goes on in `kept` ends as an undisturbed one does, to the bit; returns the steps that it made."""
    whole, notes, _ = train_until(None, method, clip, prepared, params, Snapshot())
    again, noted, made = train_until(None, method, clip, prepared, params, kept)
    assert whole and [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert json.dumps(noted) == json.dumps(notes), "the journal has every record once"
    return made


def kept_step(folder: Path) -> int:
    """How far the snapshot in `folder` is."""
    return torch.load(folder / "snapshot.pt", weights_only=True)["step"]


@pytest.mark.parametrize("method", ["dgs", "dgs_plus", "random_direction", "pixel_cnn"])
def test_broken_off_after_any_step_it_ends_with_the_same_bits(
    method: str, clip: Clip, prepared: Prepared, params: Params, tmp_path: Path
) -> None:
    for step in range(2, STEPS + 1):
        folder = tmp_path / str(step)
        train_until(step, method, clip, prepared, params, Snapshot(folder, 0.0))
        assert kept_step(folder) == step - 1
        torch.rand(step)  # another process's random numbers stand elsewhere
        assert_same(clip, prepared, params, Snapshot(folder, 0.0), method)


def test_killed_again_and_again_it_still_arrives(
    clip: Clip, prepared: Prepared, params: Params, tmp_path: Path
) -> None:
    for step in range(2, STEPS + 1):  # each run makes one step more
        assert train_until(step, "dgs", clip, prepared, params, Snapshot(tmp_path, 0.0))[2] == step
    assert_same(clip, prepared, params, Snapshot(tmp_path, 0.0))


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"no archive"])
def test_a_damaged_snapshot_is_as_good_as_none(
    clip: Clip, prepared: Prepared, params: Params, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    train_until(4, "dgs", clip, prepared, params, Snapshot(tmp_path, 0.0))
    file = tmp_path / "snapshot.pt"
    file.write_bytes(damage(file.read_bytes()))
    assert assert_same(clip, prepared, params, Snapshot(tmp_path, 0.0)) == STEPS


def test_a_snapshot_that_does_not_fit_on_the_disk_stops_with_a_sentence_and_the_one_before_stays(
    clip: Clip, prepared: Prepared, params: Params, full_disk: Path
) -> None:
    if not full_disk.is_mount():
        pytest.skip("needs a disk that can be filled")
    kept = Snapshot(full_disk / "seed", 0.0)
    train_until(3, "dgs", clip, prepared, params, kept)
    (full_disk / "other").write_bytes(b"0" * (shutil.disk_usage(full_disk).free - 8192))
    with pytest.raises(UserError, match="no space is left"):
        train_until(None, "dgs", clip, prepared, params, kept)
    assert kept_step(full_disk / "seed") == 2
    (full_disk / "other").unlink()
    assert_same(clip, prepared, params, kept)


def test_without_a_time_to_wait_no_snapshot_is_made(
    clip: Clip, prepared: Prepared, params: Params, tmp_path: Path
) -> None:
    for seconds in (None, 3600.0):
        train_until(4, "dgs", clip, prepared, params, Snapshot(tmp_path, seconds))
        assert list(tmp_path.iterdir()) == []


def test_a_journal_on_the_disk_is_the_same_journal(tmp_path: Path) -> None:
    journal = TrainingLog("dgs", 0)
    journal.loss(0, 3, loss=1 / 3, loss_task=float("nan"))
    vectors = {name: torch.randn(7, 4, dtype=torch.float64) for name in AT_FEATURES}
    journal.gradients(3, list(range(7)), torch.arange(7).remainder(2), vectors)
    journal.layer(3, "0.q", {name: torch.randn(1, 9) for name in AT_LAYERS})
    journal.expert("content", "train", np.array([True, True, False]))
    kept = Snapshot(tmp_path / "seed")
    kept.save_log(journal)
    assert not kept.is_done, "the checkpoint comes last, and says that all is there"
    kept.checkpoint.mkdir()
    assert kept.is_done
    read = kept.publish("dgs", 0, tmp_path / "out")
    for name in TABLES:
        assert len(getattr(journal, name)) and getattr(read, name).equals(getattr(journal, name))


def test_whatever_a_result_depends_on_changes_the_key_and_nothing_else_does(params: Params, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "data.json").write_text("{}")
    cpu = torch.device("cpu")

    def key(changed: Params = params, method: str = "dgs", seed: int = 0, weights: str = "w") -> str:
        return run_key(method, seed, changed, folder, weights, cpu)

    def with_(name: str, value: object) -> Params:
        return params.replaced({name: value})

    first = key()
    for name, free in (("jobs", 7), ("workers", 3), ("keep_mb", 1), ("snapshot_seconds", None)):
        assert key(with_(f"compute.{name}", free)) == first
    others = {
        key(method="lora"),
        key(seed=1),
        key(weights="v"),
        key(with_("compute.threads", 2)),
        key(with_("train.processes", 2)),
        key(with_("train.batch_size", 5)),
        key(with_("data.limit", 3)),
        run_key("dgs", 0, params, folder, "w", torch.device("cuda")),
    }
    (folder / "data.json").write_text("{ }")
    assert len(others | {first, key()}) == 10
    shutil.rmtree(folder)


def test_a_clip_with_other_constants_is_not_the_one_that_was_prepared_with(
    tiny: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    prepared, clip = (
        shutil.copytree(source, tmp_path / name)
        for source, name in ((tiny_prepared, "prepared"), (ROOT / "sample/clip", "clip"))
    )
    noted = prepared / TRAINING / "data.json"
    own = load_clip(tiny.model, ROOT, tiny.image_size, text=False).identity
    noted.write_text(json.dumps({**json.loads(noted.read_text()), **own}))
    config = json.loads((clip / CONFIG).read_text())
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.6]
    (clip / CONFIG).write_text(json.dumps(config))
    params = tiny.replaced({"model.clip": str(clip)})
    with pytest.raises(UserError, match=r"with settings .* Run prepare again"):
        train_seed("probe", 0, params, ROOT, prepared, tmp_path / "out", tmp_path / "unfinished")
