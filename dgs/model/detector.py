"""Inference: a checkpoint folder and images in, probabilities out; images are decoded while the tower works."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit

from dgs.conditions import Condition
from dgs.data.images import MAX_BYTES, MAX_PIXELS, decode, read, size_of, to_rgb
from dgs.data.patches import patch_indices
from dgs.data.perturbations import perturb
from dgs.data.views import EVALUATION, make_view
from dgs.device import choose_device
from dgs.errors import UserError
from dgs.model import hub
from dgs.model.checkpoint import load_checkpoint, read_info, require_unchanged
from dgs.model.checkpoint_files import INFO, damaged
from dgs.model.classifier import Classifier
from dgs.model.clip import Clip, load_clip
from dgs.model.gemm import resolve
from dgs.model.onnx_engine import damaged_export, open_tower, read_export
from dgs.params import ImageParams, merged, validate_as
from dgs.workspace import find_root

USED = tuple(ImageParams.model_fields)  # parameters that a score depends on; others may change their names
# What checkpoints were made with before these had names.
OLDER = {
    "data": {"shortcut": "background", "captions": None, "caption_drop": 0.0, "val_fraction": 0.1,
             "limit": None, "fit": "crop", "show_images": True},
    "model": {"precision": "fp32", "text": "own", "levels": [0], "pretrained": None, "normalize": "clip",
              "lora": {"blocks": None}},
}  # fmt: skip
BATCH = 64
AHEAD = 2  # batches whose views may be waiting while the tower works on another

Engine = Literal["torch", "onnx"]
View = NDArray[np.uint8]  # (S, S, 3): what the model sees of an image
T = TypeVar("T")
R = TypeVar("R")
AnImage = TypeVar("AnImage")


def _image_params(info: dict[str, Any]) -> ImageParams:
    recorded = {name: info["params"][name] for name in USED if name in info["params"]}
    return validate_as(ImageParams, merged(OLDER, recorded), "params")


class MemoryBudget:
    """So much memory, in any unit, may be in use at a time; a request waits until there is enough.

    Oversized requests run alone. Take from a second budget only while holding none that others want first.
    """

    def __init__(self, size: int) -> None:
        self.size, self._used, self._changed = size, 0, threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Within this block `amount` is in use."""
        amount = min(amount, self.size)
        with self._changed:
            self._changed.wait_for(lambda: self._used + amount <= self.size)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


def prefetch(function: Callable[[T], R], items: Iterable[T], window: int, threads: int | None = None) -> Iterator[R]:
    """`map(function, items)`, in order, computed by threads while the consumer does something else.

    Unlike joblib's generator it waits for the consumer: at most `window` results are in memory.

    Args:
        function: pays in threads if it leaves Python's lock alone, as decoding does.
        items: taken one by one, never more than `window` ahead of the consumer.
        threads: None: one a core.

    Raises:
        whatever `function` raised, when its result's turn comes; what was not begun by then is not begun.
    """
    rest = iter(items)
    # OpenMP's number of threads is a thread's own: the consumer of the results keeps all of its own.
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, "prefetch", lambda: torch.set_num_threads(1))
    try:
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(rest, window))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def probability(logits: NDArray[Any]) -> NDArray[np.float64]:
    """P(generated) = 1 / (1 + exp(-logit)), any shape, float64 in 0..1; no logit overflows."""
    return expit(np.asarray(logits, dtype=np.float64))


class Tower(Protocol):
    """From views to logits, as `Detector.logits`: all that engines differ in."""

    def logits(self, views: View) -> NDArray[np.float32]: ...


class TorchTower:
    """What a checkpoint holds, by torch."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def logits(self, views: View) -> NDArray[np.float32]:
        """As `Detector.logits`."""
        images = torch.from_numpy(views).permute(0, 3, 1, 2).to(self.classifier.device)
        return self.classifier(images).cpu().numpy()


def read_about(path: Path, engine: Engine = "torch") -> dict[str, Any]:
    """What a checkpoint folder, with the engine "onnx" an exported file, says of itself; raises as `Detector.load`."""
    return read_info(path) if engine == "torch" else read_export(path)[0]


class Detector:
    """Scores images with a trained checkpoint; the same views as the evaluate stage, so the same numbers."""

    def __init__(self, tower: Tower, params: ImageParams, info: dict[str, Any], folder: Path | None = None) -> None:
        self.tower, self.params, self.info, self.folder = tower, params, info, folder
        self._bytes, self._pixels = MemoryBudget(MAX_BYTES), MemoryBudget(MAX_PIXELS)  # of all views being made

    @classmethod
    def load(
        cls, path: str | Path, root: Path | None = None, device: str = "auto", engine: Engine = "torch"
    ) -> Detector:
        """Open a checkpoint folder, or an exported file.

        Args:
            path: of it; or a folder on the Hugging Face hub, hf://OWNER/NAME (`dgs.model.hub`).
            root: where a relative CLIP folder is looked up (default: the repository).
            device: of torch; ONNX Runtime computes on the CPU alone.
            engine: "torch" for a folder, "onnx" for a file of `dgs export`.

        Raises:
            UserError: no checkpoint, a damaged one, or its CLIP is not to be had.
        """
        if engine == "onnx":
            return cls._load_export(Path(path), device)
        folder = hub.located(path)
        info = read_info(folder)
        try:
            params = _image_params(info)
        except UserError as error:
            raise damaged(folder / INFO, str(error).rstrip(".")) from None
        clip = cls._load_clip(folder, info, params, root)
        classifier, info = load_checkpoint(folder, clip)
        constants = {} if clip is None else {"mean": list(clip.mean), "std": list(clip.std)}
        for name, value in constants.items():
            if (said := info.get("preprocessing", {}).get(name, value)) != value:
                raise UserError(
                    f"The checkpoint {folder} was trained on images normalised by {name} {said}, "
                    f"{params.model.clip} has {value} now. Restore preprocess_cfg in its open_clip_config.json, or "
                    f"train again."
                )
        return cls(TorchTower(classifier.to(choose_device(device))), params, info, folder)

    def push(self, name: str, private: bool = False) -> str:
        """Put the checkpoint on the Hugging Face hub as the model OWNER/NAME; its address. Raises as `hub.push`."""
        if self.folder is None:
            raise UserError("Expected a detector of a checkpoint folder to push, found another. Load the folder.")
        return hub.push(self.folder, name, private)

    @staticmethod
    def _load_clip(folder: Path, info: dict[str, Any], params: ImageParams, root: Path | None) -> Clip | None:
        """The CLIP that a checkpoint belongs to, if it does to any."""
        if "clip" not in info:
            return None
        try:
            carried = info["clip"].get("carried")
            if carried and not (folder / "clip").is_dir():
                raise damaged(folder / "clip", "expected the CLIP that this checkpoint carries, found none")
            require_unchanged(folder, info, carried=True)
            home = folder if carried else root or find_root()
            return load_clip(params.model, home, params.image_size, text=False, gemm=resolve("auto"))
        except UserError:
            raise
        except Exception as error:  # damaged weights and configs fail in many ways
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"Cannot load {params.model.clip}, the CLIP of the checkpoint {folder} ({reason}). "
                "Restore it, or give another --checkpoint."
            ) from None

    @classmethod
    def _load_export(cls, file: Path, device: str) -> Detector:
        if device not in ("auto", "cpu"):
            raise UserError(f"Expected device auto or cpu with the engine onnx, found {device}. Use torch on a GPU.")
        info, model = read_export(file)
        try:
            params = _image_params(info)
        except UserError as error:
            raise damaged_export(file, str(error).rstrip(".")) from None
        return cls(open_tower(model, info, params.image_size, file), params, info)

    def view(self, image: str | Path | bytes | Image.Image, condition: Condition | None = None) -> View:
        """What the model sees of one image, or of a changed one (`dgs.data.perturbations`): (S, S, 3) uint8.

        A file, or its content, is identified by its bytes, a PIL image by its pixels; patch order follows from that.

        Raises:
            UnreadableImage: a file that cannot be decoded whole; the message names it.
            UserError: an image smaller than a patch.
        """
        with ExitStack() as held:
            if isinstance(image, Image.Image):
                pixels = to_rgb(image)
                sha = hashlib.sha256(pixels.tobytes()).hexdigest()
            elif isinstance(image, bytes):
                sha = hashlib.sha256(image).hexdigest()
                pixels = decode(image, "the picture", lambda n: held.enter_context(self._pixels.take(n)))
            else:
                with self._bytes.take(size_of(Path(image))):
                    content = [read(Path(image))]
                    sha = hashlib.sha256(content[0]).hexdigest()
                    # Handed over: its metadata, which may be most of it, is gone before memory for pixels is taken.
                    pixels = decode(content.pop(), str(image), lambda n: held.enter_context(self._pixels.take(n)))
            if condition is not None:
                pixels = perturb(pixels, condition, sha)
            patches = None
            if self.params.patches.enabled:
                patches = patch_indices(pixels, self.params.patches.size, self.params.patches.count)
            return make_view(pixels, sha, self.params, 0, EVALUATION, patches)

    def logits(self, views: View) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 views to (B,) logits; above 0 means generated."""
        return self.tower.logits(views)

    def batches(
        self,
        images: Iterable[AnImage],
        size: int,
        threads: int | None = None,
        view: Callable[[AnImage], View] | None = None,
    ) -> Iterator[tuple[list[tuple[AnImage, View | UserError]], NDArray[np.float32]]]:
        """Images in order, `size` at a time (the last batch may be shorter): their views and logits.

        Views are made in threads while the tower works on those before.

        Args:
            images: paths or PIL images, taken one by one, at most `AHEAD` batches and one image early.
            threads: that make views; None: one a core.
            view: makes one of an image; None: `Detector.view`, of paths and PIL images.

        Yields:
            (image, its view or why it has none) of each in the batch; (V,) float32 logits of those with a view.
        """

        make = view or cast(Callable[[AnImage], View], self.view)

        def try_view(image: AnImage) -> tuple[AnImage, View | UserError]:
            try:
                return image, make(image)
            except UserError as error:
                error.__traceback__ = error.__context__ = None  # which keep the image in memory
                return image, error

        views = prefetch(try_view, images, AHEAD * size, threads)
        while batch := list(islice(views, size)):
            seen = [view for _, view in batch if not isinstance(view, UserError)]
            yield batch, self.logits(np.stack(seen)) if seen else np.zeros(0, np.float32)

    def score(self, images: Iterable[str | Path | Image.Image], batch_size: int = BATCH) -> NDArray[np.float64]:
        """Probability that each image (a path or a PIL image) is generated: (N,) float64 in 0..1; raises as `view`."""
        parts = [np.zeros(0, np.float32)]
        for batch, logits in self.batches(images, batch_size):
            for _, view in batch:
                if isinstance(view, UserError):
                    raise view
            parts.append(logits)
        return probability(np.concatenate(parts))


def newest_checkpoint(*roots: Path) -> Path:
    """The checkpoint trained last under build/ of these folders.

    Raises:
        UserError: none was trained yet.
    """
    found = [path for root in roots for path in root.glob("build/*/train/*/seed-*/dgs.json")]
    if not found:
        raise UserError("Expected a checkpoint under build/, found none. Run make repro, or give --checkpoint DIR.")
    return max(sorted(found), key=lambda path: path.stat().st_mtime).parent
