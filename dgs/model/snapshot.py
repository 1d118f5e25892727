"""Snapshots of a seed's training on the disk, so that a run that was killed resumes bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dgs
from dgs.atomic import replacing, replacing_file
from dgs.model import distributed
from dgs.model.training_log import TrainingLog
from dgs.params import Params

if TYPE_CHECKING:
    from dgs.model.methods.averaging import Averaging

FREE = {"jobs", "workers", "keep_mb", "snapshot_seconds"}  # of `compute`: no result depends on them
VERSIONS = ("torch", "open_clip_torch", "timm", "peft", "numpy")


def run_key(
    method: str, seed: int | None, params: Params, prepared_folder: Path, clip: str, device: torch.device
) -> str:
    """A hash of everything that a trained seed depends on: parameters, code, data, weights, libraries, kind of device.

    Without a seed: of what all seeds share.
    The whole package counts as code: a snapshot of other code is never resumed.
    """
    digest = hashlib.sha256()
    settings = params.model_dump(exclude={"compute": FREE, "data": {"show_images"}})
    versions = {name: version(name) for name in VERSIONS}
    digest.update(json.dumps([method, seed, settings, clip, device.type, versions], sort_keys=True).encode())
    for folder, pattern in ((Path(dgs.__file__).parent, "*.py"), (prepared_folder, "*")):
        for file in sorted(path for path in folder.rglob(pattern) if path.is_file()):
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"\n{file.relative_to(folder).as_posix()} {content}".encode())
    return digest.hexdigest()[:20]


@dataclass
class State:
    """All that training changes from step to step, but for torch's own random numbers.

    learned: the parameters, and buffers where there are any, always in the same order.
    random: the generator of the controls' noise.
    averaging: the means of weights, where the method takes them.
    step: steps that were made.
    """

    learned: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    random: torch.Generator
    log: TrainingLog
    averaging: Averaging | None = None
    step: int = 0

    def count(self) -> None:
        """Count one more step."""
        if self.averaging is not None:
            self.averaging.add(self.step)
        self.step += 1

    def content(self) -> dict[str, Any]:
        """As tensors, numbers, text, and lists and dicts of them."""
        return {
            "step": self.step,
            "learned": [parameter.detach() for parameter in self.learned],
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "log": self.log.rows(),
            "averaging": None if self.averaging is None else self.averaging.state(),
        }

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Become what `content` was taken of."""
        self.step = content["step"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.random.set_state(content["random"])
        self.log.restore(content["log"])
        for parameter, value in zip(self.learned, content["learned"], strict=True):
            parameter.copy_(value)
        if self.averaging is not None:
            self.averaging.restore(content["averaging"])


class Snapshot:
    """The folder of one seed's training: a snapshot on the way, its checkpoint and log when it is done.

    Every file in it takes its place whole. With several processes all read it and the first one writes.

    Args:
        folder: its own, named by `run_key`; None: nothing is kept.
        seconds: between two snapshots; None: none are made.
        common: a folder of all seeds, for features that none of them changes; None: each makes those itself.
    """

    def __init__(self, folder: Path | None = None, seconds: float | None = None, common: Path | None = None) -> None:
        self._folder, self.seconds, self._common = folder, seconds, common
        self._saved = time.monotonic()

    @property
    def folder(self) -> Path:
        """Where files go."""
        assert self._folder is not None
        return self._folder

    @property
    def is_kept(self) -> bool:
        """True if there is a folder."""
        return self._folder is not None

    def of(self, member: str) -> Snapshot:
        """That of a part of this training, in a folder below."""
        return Snapshot(None if self._folder is None else self._folder / member, self.seconds, self._common)

    @property
    def checkpoint(self) -> Path:
        """Where the finished checkpoint goes."""
        return self.folder / "checkpoint"

    @property
    def is_done(self) -> bool:
        """True if an earlier run finished this seed."""
        return self._folder is not None and self.checkpoint.is_dir()

    def save_log(self, log: TrainingLog) -> None:
        """To be called before the checkpoint is saved, whose presence says that all is there."""
        with replacing_file(self.folder / "log.json") as draft:
            draft.write_text(json.dumps(log.rows()))

    def publish(self, method: str, seed: int, target: Path) -> TrainingLog:
        """Copy the finished checkpoint to `target`; returns the log."""
        with replacing(target) as draft:
            shutil.copytree(self.checkpoint, draft, dirs_exist_ok=True)
        log = TrainingLog(method, seed)
        log.restore(json.loads((self.folder / "log.json").read_text()))
        return log

    def is_due(self) -> bool:
        """True if it is time for a snapshot, by the first process's clock."""
        if self._folder is None or self.seconds is None:
            return False
        return distributed.broadcast(time.monotonic() - self._saved >= self.seconds)

    def save(self, state: State) -> None:
        """Save the state of training between two steps, with each process's random numbers."""
        random = [torch.get_rng_state()]
        if torch.cuda.is_available():
            random.append(torch.cuda.get_rng_state())
        masks = distributed.all_gather(random)
        if distributed.rank() == 0:
            content = io.BytesIO()  # to a file itself torch.save hides why it could not be written
            torch.save({**state.content(), "masks": masks}, content)
            with replacing_file(self.folder / "snapshot.pt") as draft:
                draft.write_bytes(content.getbuffer())
        self._saved = time.monotonic()

    def resume(self, state: State) -> None:
        """Restore `state` and torch's random numbers from the last snapshot.

        A missing or unreadable snapshot is ignored.
        """
        if self._folder is None or not (file := self.folder / "snapshot.pt").exists():
            return
        try:
            content: dict[str, Any] = torch.load(file, weights_only=True)
        except Exception:  # a damaged file fails in many ways
            return
        cpu, *cuda = content.pop("masks")[distributed.rank()]
        torch.set_rng_state(cpu)
        for mask in cuda:
            torch.cuda.set_rng_state(mask)
        state.restore(content)

    def features(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, kept from run to run if making it takes longer than a snapshot's interval.

        Without an own folder: `common`.
        """
        if self._folder is None:
            return self.common(name, make)
        if self.seconds is None:
            return make()
        return _kept(self.folder / "features.safetensors", make, self.seconds)

    def common(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, kept for other seeds under a name that tells what it is of."""
        return make() if self._common is None else _kept(self._common / f"{name}.safetensors", make)


def _kept(file: Path, make: Callable[[], Tensor], seconds: float = 0.0) -> Tensor:
    """The features in `file`; where it is missing those that `make` gives, which are saved if that takes `seconds`."""
    if distributed.broadcast(file.exists()):
        return load_file(file)["features"]
    start = time.monotonic()
    made = make()
    if distributed.broadcast(time.monotonic() - start >= seconds):
        if distributed.rank() == 0:
            with replacing_file(file) as draft:
                save_file({"features": made.cpu().contiguous()}, draft)
        distributed.wait_for_all()
    return made
