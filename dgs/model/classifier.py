"""What a checkpoint holds, of whatever kind: it turns views into logits, and knows the files that it is kept in."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dgs.data.views import Inputs, batch_order, batches
from dgs.errors import UserError
from dgs.model.checkpoint_files import damaged, read_tensors
from dgs.model.snapshot import Snapshot, State
from dgs.model.training_log import TrainingLog, diverged, recorded
from dgs.params import Params

if TYPE_CHECKING:
    import onnx

    from dgs.model.clip import Clip
    from dgs.model.onnx_graph import Linear

WEIGHTS = "model.safetensors"


class Classifier(nn.Module):
    """Views to logits: all that evaluation, scoring and export ask of a checkpoint.

    kind: how dgs.json names it. int8: an exported file has layers that 8 bits make faster.
    of_clip: whether this kind is a part of a CLIP. clip: the one that it is a part of; None: it needs none.
    shared: classifiers of one CLIP with an equal one have equal features; None: its features are its own.
    """

    kind: ClassVar[str]
    int8: ClassVar[bool] = False
    of_clip: ClassVar[bool] = False
    clip: Clip | None = None
    shared: Hashable | None = None

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 views to (B, `width`) float32."""
        raise NotImplementedError

    def decide(self, features: Tensor) -> Tensor:
        """(B, `width`) to (B,) logits; above 0 means generated."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 views to (B,) logits."""
        return self.decide(self.features(images))

    @property
    def width(self) -> int:
        """Columns of the features."""
        raise NotImplementedError

    @property
    def parts(self) -> Sequence[Classifier]:
        """What it is composed of, itself alone if nothing; their features stand side by side in its own."""
        return [self]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @classmethod
    def files(cls, info: Mapping[str, Any]) -> list[str]:
        """Names of the files that a checkpoint whose dgs.json is `info` must have."""
        return [WEIGHTS]

    def about(self) -> dict[str, Any]:
        """What dgs.json says of it, beside its kind and its CLIP."""
        return {}

    def save(self, folder: Path) -> None:
        """Write its files."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, info: Mapping[str, Any], clip: Clip | None) -> Self:
        """Read its files, in eval mode.

        Raises:
            UserError: a file is missing or damaged, or does not fit the others.
        """
        raise NotImplementedError

    def onnx(self, side: int, linear: Linear) -> onnx.ModelProto:
        """The model "views" (B, side, side, 3) uint8 -> "logits" (B,) float32; float32 whatever it computes in.

        `linear`: how layers of the blocks multiply, if it has any. Raises UserError where there is no such form of it.
        """
        raise UserError(f"Expected a detector with an ONNX form, found {self.kind}. Score with --engine torch.")

    def in_float32(self) -> Self:
        """It, computing in float32 from now on."""
        return self

    def close(self) -> None:
        """Leave the CLIP as it was."""


Validate = Callable[[Any, int, int], NDArray[np.float32]]  # (what classifies, epoch, step) to logged logits
Logits = NDArray[np.float32]
Fitted = Callable[[Any, Logits], None]  # takes what classifies, in eval mode, and its logits of the validation images


@dataclass(frozen=True)
class Fit:
    """What a model of a method's own is fitted with.

    views: of the N training images, those that epochs go through in turn; uint8, not normalised.
    labels: (N,) float, 0 real, 1 fake. names: of the images, for errors.
    expert: (N,) logits of the biased expert, that are added while it learns; zero where the method has none.
    params: of the run; a model of its own has one stage, train.stage1.
    validate: to be called at the end of an epoch.
    done: to be called with what was fitted.
    members: trains one of the method's members each, and calls what it is given as `done`; what a CLIP member gives is
        whole only until that returns.
    on_step: to be called after each step, also for those that a snapshot spares.
    """

    views: Sequence[Inputs]
    labels: Tensor
    expert: Tensor
    names: list[str]
    params: Params
    seed: int
    log: TrainingLog
    validate: Validate
    done: Fitted
    members: Sequence[Callable[[Fitted], None]] = ()
    on_step: Callable[[], None] = field(default=lambda: None)
    snapshot: Snapshot = field(default_factory=Snapshot)


class Learner:
    """Adam on a classifier's weights, with one cycle of the rate: up to `rate` and down over so many steps."""

    def __init__(self, classifier: Classifier, rate: float, steps: int) -> None:
        self.classifier = classifier
        self.optimizer = torch.optim.Adam(classifier.parameters(), lr=rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=steps)

    def step(self, images: Tensor, labels: Tensor, expert: Tensor | float = 0.0) -> float:
        """Learn from (B, 3, S, S) uint8 images and (B,) float labels by BCE; returns the loss before it.

        `expert`: (B,) logits of another that are added to the classifier's.
        """
        loss = F.binary_cross_entropy_with_logits(self.classifier(images) + expert, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


class OwnModel(Classifier):
    """A network that a method brings itself, in place of a CLIP: it reads pixels, and is kept in a file of its own.

    rates, epochs: of train.stage1, that `dgs tune` tries every pair of: six.
    """

    rates: ClassVar[Sequence[float]]
    epochs: ClassVar[Sequence[int]]

    @classmethod
    def new(cls, seed: int) -> Self:
        """One with weights from `seed` alone; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls()

    @classmethod
    def fit(cls, given: Fit) -> None:
        """Train one, on the device of the labels, and give it and its logits of the validation images to `given.done`.

        Here by a `Learner`, on whole batches, since BatchNorm looks at them: several processes train it alike, each on
        all images. The same bits from the same `given`, whatever a snapshot spared.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        train, device, count = given.params.train, given.labels.device, len(given.labels)
        an_epoch = -(-count // train.batch_size)
        steps, model = train.stage1.epochs * an_epoch, cls.new(given.seed).to(device)
        records = recorded(count, train.batch_size, steps, train.log_every)
        learner = Learner(model, train.stage1.lr, steps)
        state = State([*model.parameters(), *model.buffers()], learner.optimizer, torch.Generator(), given.log)
        given.snapshot.resume(state)
        learner.schedule.last_epoch = state.step  # all else that it goes by is the optimizer's
        for _ in range(state.step):
            given.on_step()
        logits = np.zeros(0, np.float32)
        with tqdm(total=steps, initial=state.step, desc=f"{cls.kind}, seed {given.seed}", unit="step") as progress:
            for epoch in range(state.step // an_epoch, train.stage1.epochs):
                order = batch_order(count, given.seed, epoch)[(state.step - epoch * an_epoch) * train.batch_size :]
                views = given.views[epoch % len(given.views)]
                for images, chosen in batches(views, train.batch_size, given.params.compute.workers, order):
                    rows = chosen.to(device)
                    loss = learner.step(images.to(device), given.labels[rows], given.expert[rows])
                    if not math.isfinite(loss):
                        batch = [given.names[i] for i in chosen.tolist()]
                        raise diverged(f"The loss became {loss}", state.step, batch, 1)
                    if state.step in records:
                        given.log.loss(epoch, state.step, loss=loss, loss_task=loss)
                    state.count()
                    progress.update()
                    given.on_step()
                    if state.step % an_epoch == 0:
                        logits = given.validate(model, epoch, state.step)
                    if state.step < steps and given.snapshot.is_due():
                        given.snapshot.save(state)
        given.done(model.eval(), logits)

    @classmethod
    def load(cls, folder: Path, info: Mapping[str, Any], clip: Clip | None) -> Self:
        """As `Classifier.load`: every tensor by name and shape."""
        model, found = cls(), read_tensors(folder / WEIGHTS)
        expected = model.state_dict()
        for name in sorted({*expected, *found}):
            sides = [tuple(side[name].shape) if name in side else "none" for side in (expected, found)]
            if sides[0] != sides[1]:
                raise damaged(folder / WEIGHTS, f"expected {name} of shape {sides[0]}, found {sides[1]}")
        model.load_state_dict(found)
        return model.eval()
