"""What a seed's training leaves on the disk while it runs, so that a run that was killed goes on bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dgs
from dgs.atomic import replacing, replacing_file
from dgs.model import distributed as processes
from dgs.model.methods.averaging import Tail
from dgs.model.training_log import Journal
from dgs.params import Params

FREE = {"jobs", "workers", "keep_mb", "snapshot_seconds"}  # of `compute`: no result depends on them
VERSIONS = ("torch", "open_clip_torch", "peft", "numpy")


def run_key(
    method: str, seed: int, params: Params, prepared_folder: Path, weights_hash: str, device: torch.device
) -> str:
    """A hash of everything that a trained seed depends on: parameters, code, data, weights, libraries, kind of device.

    The whole package counts as code: what was left by other code is never gone on with.
    """
    digest = hashlib.sha256()
    settings = params.model_dump(exclude={"compute": FREE})
    versions = {name: version(name) for name in VERSIONS}
    digest.update(json.dumps([method, seed, settings, weights_hash, device.type, versions], sort_keys=True).encode())
    package = Path(dgs.__file__).parent
    for folder, pattern in ((package, "*.py"), (prepared_folder, "*")):
        for file in sorted(path for path in folder.rglob(pattern) if path.is_file()):
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"\n{file.relative_to(folder).as_posix()} {content}".encode())
    return digest.hexdigest()[:20]


@dataclass
class State:
    """All that stage 2 changes from step to step, but for torch's own random numbers.

    learned: the parameters, always in the same order.
    random: the generator of the controls' noise.
    step: steps that were made.
    tail: the means of weights, where the method takes them.
    """

    learned: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    random: torch.Generator
    journal: Journal
    step: int = 0
    tail: Tail | None = None

    def count(self) -> None:
        """One step more was made."""
        if self.tail is not None:
            self.tail.add(self.step)
        self.step += 1

    def content(self) -> dict[str, Any]:
        """As tensors, numbers, text, and lists and dicts of them."""
        return {
            "step": self.step,
            "learned": [parameter.detach() for parameter in self.learned],
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "journal": self.journal.rows(),
            "tail": None if self.tail is None else self.tail.content(),
        }

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Become what `content` was taken of."""
        self.step = content["step"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.random.set_state(content["random"])
        self.journal.restore(content["journal"])
        for parameter, value in zip(self.learned, content["learned"], strict=True):
            parameter.copy_(value)
        if self.tail is not None:
            self.tail.restore(content["tail"])


class Unfinished:
    """The folder of one seed's training: snapshots on the way, its checkpoint and journal when it is done.

    Every file in it takes its place whole. With several processes all read it and the first one writes.

    Args:
        folder: its own, named by `run_key`; None: nothing is kept.
        seconds: between two snapshots; None: none are made.
    """

    def __init__(self, folder: Path | None = None, seconds: float | None = None) -> None:
        self.folder, self.seconds = folder, seconds
        self._saved = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        """Where the finished checkpoint goes."""
        assert self.folder is not None
        return self.folder / "checkpoint"

    @property
    def is_done(self) -> bool:
        """Whether a run before finished this seed."""
        return self.folder is not None and self.checkpoint.is_dir()

    def keep_journal(self, journal: Journal) -> None:
        """Before the checkpoint, whose being there says that all is."""
        assert self.folder is not None
        with replacing_file(self.folder / "journal.json") as draft:
            draft.write_text(json.dumps(journal.rows()))

    def hand_over(self, method: str, seed: int, target: Path) -> Journal:
        """Copy the finished checkpoint to `target`; returns its journal."""
        assert self.folder is not None
        with replacing(target) as draft:
            shutil.copytree(self.checkpoint, draft, dirs_exist_ok=True)
        journal = Journal(method, seed)
        journal.restore(json.loads((self.folder / "journal.json").read_text()))
        return journal

    def is_due(self) -> bool:
        """Whether it is time for a snapshot; all processes get the answer of the first one's clock."""
        if self.folder is None or self.seconds is None:
            return False
        return processes.agreed(time.monotonic() - self._saved >= self.seconds)

    def save(self, state: State) -> None:
        """Keep the state of training between two steps, with each process's random numbers."""
        assert self.folder is not None
        masks = processes.gathered(_random_state())
        if processes.rank() == 0:
            content = io.BytesIO()  # to a file itself torch.save hides why it could not be written
            torch.save({**state.content(), "masks": masks}, content)
            with replacing_file(self.folder / "snapshot.pt") as draft:
                draft.write_bytes(content.getbuffer())
        self._saved = time.monotonic()

    def resume(self, state: State) -> None:
        """Put `state`, and torch's random numbers, where they were when it was kept last.

        Without a snapshot nothing happens; one that cannot be read is as good as none.
        """
        if self.folder is None or not (file := self.folder / "snapshot.pt").exists():
            return
        try:
            content: dict[str, Any] = torch.load(file, weights_only=True)
        except Exception:  # a damaged file fails in many ways
            return
        _set_random_state(content.pop("masks")[processes.rank()])
        state.restore(content)

    def features(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, kept from run to run where making it takes longer than what may be lost."""
        file = self.folder / "features.safetensors" if self.folder is not None and self.seconds is not None else None
        if file is not None and file.exists():
            return load_file(file)["features"]
        start = time.monotonic()
        made = make()
        if file is not None and processes.agreed(time.monotonic() - start >= (self.seconds or 0.0)):
            if processes.rank() == 0:
                with replacing_file(file) as draft:
                    save_file({"features": made.cpu().contiguous()}, draft)
            processes.wait_for_all()
        return made


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
