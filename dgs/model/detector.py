"""Inference: a checkpoint folder and images in, probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit
from torch import nn
from tqdm.auto import tqdm

from dgs.data.images import UnreadableImage, decode, files_under, read, to_rgb
from dgs.data.patches import patch_entropy, select_indices
from dgs.data.views import EVALUATION, make_view
from dgs.errors import UserError
from dgs.model.backbone import Backbone, load_clip
from dgs.model.checkpoint import damaged, load_checkpoint, read_info
from dgs.model.device import choose_device
from dgs.params import Params, validate
from dgs.workspace import find_root

USED = ("profile", "data", "patches", "model")  # parameters that a score depends on; others may change their names
MAX_BYTES = 1_000_000_000  # of a file: images.MAX_PIXELS uncompressed, four channels of 16 bits, fit


def probability(logits: NDArray[Any]) -> NDArray[np.float64]:
    """P(generated) = 1 / (1 + exp(-logit)), any shape, float64 in 0..1; no logit overflows."""
    return expit(np.asarray(logits, dtype=np.float64))


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
            UserError: no checkpoint, a damaged one, or its CLIP is not to be had.
        """
        folder = Path(path)
        info = read_info(folder)
        try:
            params = validate({name: info["params"][name] for name in USED if name in info["params"]}, "params")
        except UserError as error:
            raise damaged(folder / "dgs.json", str(error).rstrip(".")) from None
        try:
            carried = info["clip"].get("carried")
            if carried and not (folder / "clip").is_dir():
                raise damaged(folder / "clip", "expected the CLIP that this checkpoint carries, found none")
            home = folder if carried else root or find_root()
            clip = load_clip(params.model, home, params.image_size, text=False)
        except UserError:
            raise
        except Exception as error:  # damaged weights and configs fail in many ways
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"Cannot load {params.model.clip}, the CLIP of the checkpoint {folder} ({reason}). "
                "Restore it, or give another --checkpoint."
            ) from None
        backbone, heads, info = load_checkpoint(folder, clip)
        chosen = choose_device(device)
        return cls(backbone.to(chosen), heads["image"].to(chosen), params, info)

    def view(self, image: str | Path | Image.Image) -> NDArray[np.uint8]:
        """What the model sees of one image: (S, S, 3) uint8.

        A file is identified by its bytes, a PIL image by its pixels; patch order follows from that.

        Raises:
            UnreadableImage: a file that cannot be decoded whole; the message names it.
            UserError: an image smaller than a patch.
        """
        if isinstance(image, Image.Image):
            pixels = to_rgb(image)
            sha = hashlib.sha256(pixels.tobytes()).hexdigest()
        else:
            data = _read(Path(image))
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
            UserError: as `view`.
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
        return probability(np.concatenate(parts) if parts else np.zeros(0))


def newest_checkpoint(root: Path) -> Path:
    """The checkpoint trained last under build/.

    Raises:
        UserError: none was trained yet.
    """
    found = sorted(root.glob("build/*/train/*/seed-*/dgs.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("Expected a checkpoint under build/, found none. Run make repro, or give --checkpoint DIR.")
    return found[-1].parent


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # reading says why
    if size > MAX_BYTES:
        raise UnreadableImage(f"Refused {path}: {size / 1e9:.1f} GB, expected at most {MAX_BYTES / 1e9:.0f} GB.")
    return read(path)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False


def _named(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} or the {len(paths) - 1} other paths"


def score_files(
    paths: Iterable[Path], checkpoint: Path | None, warn: Callable[[str], None], batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Every file under `paths`, scored or refused; one batch of images is in memory at a time.

    Args:
        paths: files, or folders: every file in them is tried, whatever its name (but for a dot at its beginning).
        checkpoint: a checkpoint folder; None: the newest trained here.
        warn: told of what a verdict is worth.

    Yields:
        {"path", "probability", "verdict"} ("generated" or "real", at the threshold chosen on validation images), or
        {"path", "error"}.

    Raises:
        UserError: none of the paths exists, nothing to score in them, no checkpoint or a damaged one.
    """
    paths = list(paths)
    if paths and not any(map(_is_there, paths)):
        raise UserError(f"Expected a file or folder at {_named(paths)}, found none.")
    files = files_under(paths)
    first = next(files, None)
    if first is None:
        raise UserError(f"Expected a file to score in {_named(paths) if paths else 'no path'}, found none.")
    folder = checkpoint or newest_checkpoint(find_root())
    detector = Detector.load(folder)
    thresholds = detector.info["thresholds"]
    if not thresholds:
        raise damaged(folder / "dgs.json", "expected a threshold, found none")
    rule = "val" if "val" in thresholds else min(thresholds)
    why = "the best threshold on its validation images" if rule == "val" else "not calibrated on any images"
    threshold = thresholds[rule]
    warn(
        f"checkpoint {folder}: 'generated' above a probability of {float(probability(np.array(threshold))):.3f}, {why}."
    )
    if detector.params.data.layout == "minibench":
        warn(f"warning: {folder} was trained on the embedded 64 px benchmark; its verdicts on photographs mean little.")
    pending: list[tuple[Path, NDArray[np.uint8] | None, str]] = []

    def flush() -> Iterator[dict[str, Any]]:
        views = [view for _, view, _ in pending if view is not None]
        logits = detector.logits(np.stack(views)).astype(np.float64) if views else np.zeros(0)
        scored = iter(zip(logits > threshold, probability(logits), strict=True))
        for path, view, error in pending:
            if view is None:
                yield {"path": str(path), "error": error}
            else:
                generated, p = next(scored)
                yield {"path": str(path), "probability": float(p), "verdict": "generated" if generated else "real"}
        pending.clear()

    for path in tqdm(chain([first], files), desc="scoring", unit="image"):
        try:
            pending.append((path, detector.view(path), ""))
        except UserError as error:
            pending.append((path, None, str(error)))
        if len(pending) == batch_size:
            yield from flush()
    yield from flush()
