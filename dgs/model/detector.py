"""Inference: a checkpoint folder and images in, probabilities out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from dgs.data.images import decode, is_image_name, read, to_rgb
from dgs.data.patches import patch_entropy, select_indices
from dgs.data.views import EVALUATION, make_view
from dgs.errors import UserError
from dgs.model.backbone import Backbone, load_clip
from dgs.model.checkpoint import load_checkpoint, read_info
from dgs.model.device import choose_device
from dgs.params import Params, validate
from dgs.workspace import find_root


class Detector:
    """Scores images with a trained checkpoint; the same views as the evaluate stage, so the same numbers."""

    def __init__(self, backbone: Backbone, head: nn.Linear, params: Params, info: dict[str, Any]) -> None:
        self.backbone, self.head, self.params, self.info = backbone, head, params, info

    @classmethod
    def load(cls, path: str | Path, root: Path | None = None, device: str = "auto") -> Detector:
        """Open a checkpoint folder.

        Args:
            path: the folder, with dgs.json.
            root: where a relative CLIP folder is looked up (default: the repository).

        Raises:
            UserError: no checkpoint, or its CLIP is not to be had.
        """
        info = read_info(Path(path))
        params = validate(info["params"], f"{path}/dgs.json")
        clip = load_clip(params.model, root or find_root(), params.image_size)
        backbone, heads, info = load_checkpoint(Path(path), clip)
        chosen = choose_device(device)
        return cls(backbone.to(chosen), heads["image"].to(chosen), params, info)

    def view(self, image: str | Path | Image.Image) -> NDArray[np.uint8]:
        """What the model sees of one image: (S, S, 3) uint8.

        A file is identified by its bytes, a PIL image by its pixels; patch order follows from that.
        """
        if isinstance(image, Image.Image):
            pixels = to_rgb(image)
            sha = hashlib.sha256(pixels.tobytes()).hexdigest()
        else:
            data = read(Path(image))
            pixels = decode(data, str(image))
            sha = hashlib.sha256(data).hexdigest()
        patches = None
        if self.params.patches.enabled:
            patches = select_indices(patch_entropy(pixels, self.params.patches.size), self.params.patches.count)
        return make_view(pixels, sha, self.params, 0, EVALUATION, patches)

    @torch.no_grad()
    def logits(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 views to (B,) logits; above 0 means generated."""
        images = torch.from_numpy(views).permute(0, 3, 1, 2).to(self.backbone.mean.device)
        return self.head(self.backbone(images).float()).squeeze(1).cpu().numpy()

    def score(self, images: Iterable[str | Path | Image.Image], batch_size: int = 64) -> NDArray[np.float64]:
        """Probability that each image is generated, (N,) float64 in 0..1.

        Args:
            images: paths or PIL images.

        Raises:
            UnreadableImage: a file that cannot be decoded whole; the message names it.
        """
        parts: list[NDArray[np.float32]] = []
        pending: list[NDArray[np.uint8]] = []
        for image in images:
            pending.append(self.view(image))
            if len(pending) == batch_size:
                parts.append(self.logits(np.stack(pending)))
                pending = []
        if pending:
            parts.append(self.logits(np.stack(pending)))
        logits = np.concatenate(parts) if parts else np.zeros(0)
        return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


def newest_checkpoint(root: Path) -> Path:
    """The checkpoint trained last under build/.

    Raises:
        UserError: none was trained yet.
    """
    found = sorted(root.glob("build/*/train/*/seed-*/dgs.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("Expected a checkpoint under build/, found none. Run make repro, or give --checkpoint DIR.")
    return found[-1].parent


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and is_image_name(p))
        else:
            yield path


def score_files(
    paths: Iterable[Path], checkpoint: Path | None, warn: Callable[[str], None], batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Every image file under `paths`, scored or refused.

    Args:
        paths: files, or folders (searched for image files).
        checkpoint: a checkpoint folder; None: the newest trained here.
        warn: told of what a verdict is worth.

    Yields:
        {"path", "probability", "verdict"} ("generated" or "real", at the threshold chosen on validation images), or
        {"path", "error"}.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"Expected a file or folder at {path}, found none.")
    folder = checkpoint or newest_checkpoint(find_root())
    detector = Detector.load(folder)
    if detector.params.data.layout == "minibench":
        warn(f"warning: {folder} was trained on the embedded 64 px benchmark; its verdicts on photographs mean little.")
    threshold = detector.info["thresholds"]["val"]
    pending: list[tuple[Path, NDArray[np.uint8] | None, str]] = []

    def flush() -> Iterator[dict[str, Any]]:
        views = [view for _, view, _ in pending if view is not None]
        logits: Iterator[np.float32] = iter(detector.logits(np.stack(views)) if views else np.zeros(0, np.float32))
        for path, view, error in pending:
            if view is None:
                yield {"path": str(path), "error": error}
            else:
                logit = float(next(logits))
                verdict = "generated" if logit > threshold else "real"
                yield {"path": str(path), "probability": 1 / (1 + math.exp(-logit)), "verdict": verdict}
        pending.clear()

    for path in tqdm(_files(paths), desc="scoring", unit="image"):
        try:
            pending.append((path, detector.view(path), ""))
        except UserError as error:
            pending.append((path, None, str(error)))
        if len(pending) == batch_size:
            yield from flush()
    yield from flush()
