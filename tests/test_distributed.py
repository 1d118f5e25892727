"""Several processes on one run: together they make what one makes, and none is waited for in vain."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_images
from copies import ROOT, snapshot
from safetensors.torch import load_file
from torch import nn

from dgs.analysis.evaluate import evaluate_from_disk
from dgs.data.prepared import load_prepared
from dgs.errors import UserError
from dgs.model import distributed as processes
from dgs.model.checkpoint import read_info
from dgs.model.clip import load_clip
from dgs.model.methods.registry import get_method
from dgs.model.runs import train_seeds
from dgs.model.snapshot import Snapshot
from dgs.model.train import Trained, train
from dgs.model.training_log import TABLES, TrainingLog
from dgs.params import Params, dotted
from dgs.workspace import yaml_text


def square(number: int) -> tuple[int, int]:
    return number * number, processes.count()


def parts_of_seven() -> list[list[int]]:
    return processes.all_gather(list(processes.shard(range(7))))


def collected() -> dict[str, object]:
    """What the collectives make of what each process has."""
    me = processes.rank()
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    if me == 0:  # the other one saw no image: its gradients are None
        layer(torch.tensor([[2.0, 3.0]])).sum().backward()
    processes.sum_gradients(layer.parameters())
    return {
        "rows": processes.all_gather_rows(torch.full((3 * me, 2), float(me))),  # none of process 0
        "total": processes.all_reduce_sum({"a": 1.0} if me == 0 else {"a": 2.0, "b": 0.5}),
        "agreed": processes.broadcast(me == 0),
        "gradients": processes.all_gather(layer.weight.grad.tolist()),
    }


def refuse() -> None:
    if processes.rank() == 1:
        raise UserError("Expected a, found b. Do c.")
    processes.wait_for_all()


def die() -> None:
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.wait_for_all()


def fall_asleep() -> None:
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.wait_for_all()


def stumble() -> None:
    if processes.rank() == 0:
        raise ZeroDivisionError("a bug")
    processes.wait_for_all()


class TestRun:
    def test_one_process_is_this_one(self) -> None:
        assert processes.run(1, square, 3) == (9, 1)
        assert processes.run(1, os.getpid) == os.getpid()

    @pytest.mark.slow
    def test_the_first_ones_result_comes_back(self) -> None:
        assert processes.run(2, square, 3) == (9, 2)
        assert processes.run(3, parts_of_seven) == [[0, 1, 2], [3, 4, 5], [6]]

    @pytest.mark.slow
    def test_what_each_has_becomes_what_all_have(self) -> None:
        made = processes.run(2, collected)
        assert torch.equal(made["rows"], torch.ones(3, 2))
        assert made["total"] == {"a": 3.0, "b": 0.5}
        assert made["agreed"] is True
        assert made["gradients"] == [[[2.0, 3.0]], [[2.0, 3.0]]]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("function", "kind", "sentence"),
        [
            (refuse, UserError, r"^Expected a, found b\. Do c\.$"),
            (die, UserError, r"^Expected 2 processes .* process 1 died \(killed by signal 9\)\. Run the same command"),
            (stumble, RuntimeError, r"^Process 0 of 2 stopped\. ZeroDivisionError: a bug"),
        ],
    )
    def test_what_stops_one_is_one_message_and_ends_all_at_once(
        self, function: Callable[[], None], kind: type[Exception], sentence: str
    ) -> None:
        start = time.monotonic()
        with pytest.raises(kind, match=sentence):
            processes.run(2, function)
        assert time.monotonic() - start < processes.TIMEOUT / 6, "nobody waits for those who ended"

    @pytest.mark.slow
    def test_one_that_stands_still_is_not_waited_for_for_ever(self) -> None:
        with pytest.raises(UserError, match=r"^Expected 2 processes to keep step, found that process 0 waited"):
            processes.run(2, fall_asleep, timeout=10.0)


def changed(params: Params, **groups: dict[str, object]) -> Params:
    return params.replaced({**dotted(groups), "seeds": [0]})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in ("adapter_model.safetensors", "heads.safetensors"):
        if (folder / file).exists():
            found |= load_file(folder / file)
    return found


def assert_equal_within_rounding(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], lr: float) -> None:
    """By root mean square a thousandth of a step at most, and no weight by more than a tenth of one.

    Adam divides a gradient by its own size: where that is nearly zero, what the order of a sum rounds off is magnified
    up to the learning rate, and which weights these are depends on the machine's kernels. Of 14,115 one differed by
    2.5e-6 at a learning rate of 1e-4, on one machine of two; nine in ten differed by less than 2e-10.
    """
    assert a.keys() == b.keys()
    gaps = torch.cat([(a[name] - b[name]).flatten() for name in a]).double()
    size = gaps.square().mean().sqrt().item()
    print(f"difference: root mean square {size:.1e}, largest {gaps.abs().max().item():.1e}")
    assert size < lr / 1000
    assert gaps.abs().max().item() < lr / 10
    assert (gaps.abs() < 1e-6).double().mean().item() > 0.99


def train_in(count: int, method: str, params: Params, prepared: Path, folder: Path) -> tuple[Path, TrainingLog]:
    folder.mkdir()
    many = changed(params, train={"processes": count})
    (journal,) = train_seeds(method, many, ROOT, prepared, folder, folder / "unfinished")
    return folder / "seed-0", journal


def size_of(table: pd.DataFrame, column: str) -> float:
    """What a difference in a column is measured by: for an inner product a.b, the lengths |a| |b|."""
    a, dot, b = column.partition(".")
    size = np.sqrt(table[f"{a}.{a}"].max() * table[f"{b}.{b}"].max()) if dot else table[column].abs().max()
    return float(size) or 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "method"), [("release", "dgs"), ("per_sample", "random_direction")])
def test_two_processes_train_what_one_trains(
    scale: str, method: str, tiny: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    """48 training images in batches of 47: the last one leaves the second process without any; and parts in each."""
    stage2, surgery = {"epochs": 3, "lr": 1e-4}, {"scale": scale, "lam": 1.0}
    params = changed(tiny, train={"batch_size": 47, "accumulate": 2, "stage2": stage2, "surgery": surgery})
    one, noted = train_in(1, method, params, tiny_prepared, tmp_path / "one")
    two, noted_by_two = train_in(2, method, params, tiny_prepared, tmp_path / "two")
    a, b = tensors(one), tensors(two)
    assert_equal_within_rounding(a, b, lr=1e-4)
    assert max(value.abs().max() for name, value in a.items() if "lora_B" in name) > 1e-4, "they start at zero"
    for table in TABLES:
        first, second = (getattr(journal, table) for journal in (noted, noted_by_two))
        assert len(first) or table == "experts"
        numbers = first.select_dtypes("float").columns
        assert first.drop(columns=numbers).equals(second.drop(columns=numbers)), f"{table}: other rows"
        gaps = {name: (first[name] - second[name]).abs().max() / size_of(first, name) for name in numbers}
        assert not gaps or np.nanmax(list(gaps.values())) < 1e-4, f"{table}: {gaps}"
    thresholds = [read_info(folder)["thresholds"]["val"] for folder in (one, two)]
    assert abs(thresholds[0] - thresholds[1]) < 1e-5


def train_and_die(params: Params, prepared: Path, folder: Path, fatal: int | None) -> dict[str, torch.Tensor]:
    """Train in the group; the second process is killed in the step `fatal`."""
    steps = 0
    made: dict[str, torch.Tensor] = {}

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps == fatal and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def done(trained: Trained) -> None:
        made.update(
            {n: p.detach().clone() for n, p in trained.classifier.backbone.named_parameters() if p.requires_grad}
        )

    clip = load_clip(params.model, ROOT, params.image_size, text=False)
    cpu, kept = torch.device("cpu"), Snapshot(folder, 0.0)
    train(get_method("dgs"), clip, load_prepared(prepared, ROOT), params, 0, cpu, done, on_step, kept)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [None, [2, 3]], ids=["all blocks", "tokens kept"])
def test_when_one_of_two_is_killed_both_go_on_from_the_snapshot_to_the_bit(
    blocks: list[int] | None, tiny: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    """With dropout: each process's masks go on where they were."""
    model = {"lora": {"dropout": 0.5, "blocks": blocks}}
    params = changed(tiny, train={"batch_size": 12, "stage2": {"epochs": 2}, "processes": 2}, model=model)
    params = params.for_method("dgs")
    whole = processes.run(2, train_and_die, params, tiny_prepared, tmp_path / "whole", None)
    with pytest.raises(UserError, match=r"process 1 died .killed by signal 9.*goes on from the last snapshot"):
        processes.run(2, train_and_die, params, tiny_prepared, tmp_path / "killed", 6)
    assert torch.load(tmp_path / "killed" / "snapshot.pt", weights_only=True)["step"] == 5
    assert any((tmp_path / "killed").glob("tokens-*.f32")) == (blocks is not None)
    again = processes.run(2, train_and_die, params, tiny_prepared, tmp_path / "killed", None)
    assert whole and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_score_every_image_once_and_in_order(tiny: Params, tiny_prepared: Path, tmp_path: Path) -> None:
    folder, _ = train_in(1, "dgs", tiny, tiny_prepared, tmp_path / "one")
    tables = []
    for count in (1, 2):
        params = changed(tiny, train={"processes": count})
        tables.append(evaluate_from_disk({("dgs", 0): folder}, ROOT, tiny_prepared, params))
    (scores, forgetting, panels), (by_two, forgetting_by_two, panels_by_two) = tables
    assert scores["id"].is_unique and len(scores) > 100
    pd.testing.assert_frame_equal(by_two, scores, check_exact=False, rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(forgetting_by_two, forgetting, check_exact=False, rtol=0, atol=1e-5)
    for name, (features, rows) in panels.items():
        assert np.allclose(panels_by_two[name][0], features, rtol=0, atol=1e-5)
        assert list(panels_by_two[name][1]["id"]) == list(rows["id"])


def agents(words: list[str], env: dict[str, str]) -> list[subprocess.Popen[str]]:
    """Two machines' torchrun, both here, each in a session of its own and with one process of `dgs` with `words`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alike = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    commands = [[*alike, "--node-rank", str(number), "-m", "dgs.cli", *words] for number in range(2)]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": env}
    return [subprocess.Popen(command, start_new_session=True, **how) for command in commands]


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    said = [agent.communicate(timeout=300) for agent in started]
    return [(agent.returncode, *both) for agent, both in zip(started, said, strict=True)]


@pytest.mark.slow
class TestTwoMachines:
    """Under torchrun, as in docs/running.md; the machines are two agents on this one."""

    @pytest.fixture
    def env(self, tiny: Params, tiny_prepared: Path, tmp_path: Path) -> dict[str, str]:
        shutil.copytree(tiny_prepared, tmp_path / "build" / "tiny" / "prepare")
        params = changed(tiny, train={"batch_size": 12, "stage2": {"epochs": 20}}, compute={"snapshot_seconds": 0.0})
        (tmp_path / "params.yaml").write_text(yaml_text(params.model_dump()))
        own = {"DGS_OUT": str(tmp_path), "DGS_PARAMS": str(tmp_path / "params.yaml"), "PYTHONPATH": str(ROOT)}
        return {**os.environ, **own, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def test_train_what_one_process_trains(self, env: dict[str, str], tmp_path: Path) -> None:
        words = ["train", "dgs", "--profile", "tiny", "--out"]
        alone = [sys.executable, "-m", "dgs.cli", *words, str(tmp_path / "one")]
        done = subprocess.run(alone, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        (first, out, log), (second, nothing, _) = ended(agents([*words, str(tmp_path / "two")], env))
        assert (first, second) == (0, 0), log
        assert out.strip().endswith("seed-0") and not nothing
        one, two = (tensors(tmp_path / name / "seed-0") for name in ("one", "two"))
        assert_equal_within_rounding(one, two, lr=3e-3)
        assert read_info(tmp_path / "two" / "seed-0")["params"]["train"]["processes"] == 2
        assert not (tmp_path / "build" / "tiny" / "unfinished" / "train-dgs-0").exists()

    def test_when_one_is_killed_the_other_says_so_and_both_go_on_to_the_bit(
        self, env: dict[str, str], tmp_path: Path
    ) -> None:
        words, unfinished = ["train", "dgs", "--out"], tmp_path / "build" / "tiny" / "unfinished"
        started = agents([*words, str(tmp_path / "killed")], env)
        deadline = time.monotonic() + 120
        while not list(unfinished.rglob("snapshot.pt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        started[0].kill()  # the agent alone, at whose address the others meet: its process notices
        _, (code, _, log) = ended(started)
        sentence = [line for line in log.splitlines() if line.startswith("dgs: ")]
        assert code != 0 and len(sentence) == 1, log
        assert re.search(r"Expected 2 processes to train .*process 1 lost another .*snapshot\.", sentence[0])
        assert list(unfinished.rglob("snapshot.pt"))
        for name in ("killed", "whole"):
            results = ended(agents([*words, str(tmp_path / name)], env))
            assert [code for code, _, _ in results] == [0, 0], results[0][2]
        whole, again = (tensors(tmp_path / name / "seed-0") for name in ("whole", "killed"))
        assert whole and all(torch.equal(whole[name], again[name]) for name in whole)

    def test_score_what_one_process_scores_in_its_order(
        self, env: dict[str, str], checkpoint: Path, tmp_path: Path
    ) -> None:
        images = write_images(tmp_path / "images", {"test": ("a",)}, real=75, fake=75)
        words = ["score", str(images), "--checkpoint", str(checkpoint), "--explain"]
        alone = [sys.executable, "-m", "dgs.cli", *words, str(tmp_path / "one")]
        done = subprocess.run(alone, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=300)
        (_, rows, log), (_, nothing, silence) = ended(agents([*words, str(tmp_path / "two")], env))
        assert rows == done.stdout and rows.count("\n") == 150, log
        assert not nothing and "checkpoint " not in silence
        one, two = (snapshot(tmp_path / name) for name in ("one", "two"))
        assert one == two
