"""Late fusion: detectors side by side, whose logits are brought to one scale and summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model.checkpoint_files import INFO, damaged, reading
from dgs.model.classifier import Classifier, Fit, Fitted, OwnModel
from dgs.model.pixel_cnn import PixelCNN

if TYPE_CHECKING:
    import onnx

    from dgs.model.clip import Clip
    from dgs.model.onnx_graph import Linear


class _Record(BaseModel):
    model_config = ConfigDict(strict=True)

    spreads: Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], Field(min_length=2, max_length=2)]


def spread(logits: NDArray[np.float32]) -> float:
    """The standard deviation of a detector's logits of validation images (N,), which its logits are divided by.

    Raises:
        UserError: it is 0, or there are no images.
    """
    found = float(np.std(logits.astype(np.float64))) if len(logits) else 0.0
    if not found > 0:
        raise UserError(
            f"Expected logits that differ between validation images, to bring detectors to one scale, found the same "
            f"for all {len(logits)}. Add validation images, or train longer."
        )
    return found


class LateFusion(OwnModel):
    """z = sum_m z_m / s_m of a CLIP's detector and a network on pixels; s_m: `spread` of member m.

    The files of both lie in one folder; dgs.json has the spreads. As of a `ClipClassifier`, only one at a time may be
    on a CLIP that is tuned.
    """

    kind = "late_fusion"
    int8 = of_clip = True

    def __init__(self, members: Sequence[Classifier], spreads: Sequence[float]) -> None:
        super().__init__()
        self.members, self.spreads = nn.ModuleList(members), tuple(spreads)
        self.clip = members[0].clip

    @property
    def parts(self) -> Sequence[Classifier]:
        """As `Classifier.parts`."""
        return list(self.members)  # type: ignore[arg-type]

    def features(self, images: Tensor) -> Tensor:
        """As `Classifier.features`."""
        return torch.cat([part.features(images) for part in self.parts], 1)

    def decide(self, features: Tensor) -> Tensor:
        """As `Classifier.decide`."""
        own = features.split([part.width for part in self.parts], 1)
        of = zip(self.parts, own, self.spreads, strict=True)
        return torch.stack([part.decide(some) / scale for part, some, scale in of]).sum(0)

    @property
    def width(self) -> int:
        """As `Classifier.width`."""
        return sum(part.width for part in self.parts)

    @classmethod
    def fit(cls, given: Fit) -> None:
        """Train the members and give their fusion to `given.done`, as `OwnModel.fit`."""

        def train(left: Sequence[Callable[[Fitted], None]], found: Sequence[tuple[Classifier, float]]) -> None:
            if left:  # the CLIP's detector, the first, is trained last: it is whole until its training returns
                left[-1](lambda one, logits: train(left[:-1], [(one, spread(logits)), *found]))
                return
            model, at = cls(*zip(*found, strict=True)).eval(), given.log.losses[["epoch", "step"]].max()
            given.done(model, given.validate(model, int(at["epoch"]), int(at["step"])))

        train(given.members, [])

    @classmethod
    def files(cls, info: Mapping[str, Any]) -> list[str]:
        """As `Classifier.files`."""
        return [name for kind in _kinds() for name in kind.files(info)]

    def about(self) -> dict[str, Any]:
        """As `Classifier.about`."""
        return {**self.parts[0].about(), "spreads": list(self.spreads)}

    def save(self, folder: Path) -> None:
        """As `Classifier.save`."""
        for part in self.parts:
            part.save(folder)

    @classmethod
    def load(cls, folder: Path, info: Mapping[str, Any], clip: Clip | None) -> Self:
        """As `Classifier.load`; `clip.model.visual` carries the adapters until `close`."""
        with reading(folder / INFO):
            spreads = _Record.model_validate(info).spreads
        if clip is None:
            raise damaged(folder / INFO, "expected the CLIP that it is a part of, found none")
        detector, network = _kinds()
        read = network.load(folder, info, None)  # first: if it is damaged, the CLIP is as it was
        return cls([detector.load(folder, info, clip), read], spreads).eval()

    def onnx(self, side: int, linear: Linear) -> onnx.ModelProto:
        """As `Classifier.onnx`."""
        from dgs.model.onnx_graph import summed

        return summed([part.onnx(side, linear) for part in self.parts], self.spreads, side)

    def in_float32(self) -> Self:
        """As `Classifier.in_float32`."""
        for part in self.parts:
            part.in_float32()
        return self

    def close(self) -> None:
        """As `Classifier.close`."""
        for part in self.parts:
            part.close()


def _kinds() -> tuple[type[Classifier], type[Classifier]]:
    """What the members of a saved fusion are, in order."""
    from dgs.model.clip_classifier import ClipClassifier  # loads peft, which takes seconds

    return ClipClassifier, PixelCNN
