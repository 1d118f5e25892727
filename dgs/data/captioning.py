"""Captions for a folder: every distinct image gets one, and what has one and what has not is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dgs.data.blip import Blip
from dgs.data.caption_log import open_log
from dgs.data.captions import read_captions
from dgs.data.images import UnreadableImage, decode, files_under, is_image_name, read
from dgs.data.tree import LABELS
from dgs.errors import UserError, did_you_mean

SHOWN = 10  # captions without an image that are named one by one
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Coverage:
    """How far captions cover a folder: images = captioned + missing + unreadable, in files.

    `distinct` is the number of different contents among readable images, `strangers` are the caption file's keys that
    name no image here (the pipeline refuses them).
    """

    images: int
    distinct: int
    captioned: int
    unreadable: int
    missing: int
    strangers: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every image has a caption, and every caption an image."""
        return self.captioned == self.images and not self.strangers


def image_files(root: Path) -> list[Path]:
    """The image files of a folder, in the order of names.

    Where there are label folders (0_real, 1_fake), only the images in them count, as for the pipeline: it refuses
    captions of others.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"Expected a folder of images at {root}, found none. Mend the path.")
    files = [path for path in files_under([root]) if is_image_name(path)]
    labelled = [path for path in files if LABELS.keys() & set(path.relative_to(root).parts[:-1])]
    if not files:
        raise UserError(f"Expected image files in {root}, found none. Add some, or mend the path.")
    return labelled or files


@dataclass
class Survey:
    """What was found of each image file under `root`, by its path relative to it."""

    root: Path
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 of the bytes, where there were any to read
    errors: dict[str, str] = field(default_factory=dict)  # why not, for what cannot be decoded

    def decoded(
        self, files: list[Path], wanted: Callable[[str, str], bool], warn: Warn
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """(sha256, (H, W, 3) uint8 pixels) of each content that is wanted, once; fills the survey on the way.

        Args:
            files: what to look at.
            wanted: told (path, sha256); what is not wanted is hashed only.
            warn: told of each file that cannot be read.
        """
        outcomes: dict[str, str | None] = {}  # by content: why it cannot be decoded
        for path in tqdm(files, desc="captions", unit="image", delay=1):
            name = path.relative_to(self.root).as_posix()
            try:
                data = read(path)
                sha = self.hashes[name] = hashlib.sha256(data).hexdigest()
                if sha in outcomes:
                    if (known := outcomes[sha]) is not None:
                        raise UnreadableImage(f"Cannot decode {name}: the same bytes as {known}.")
                    continue
                if not wanted(name, sha):
                    continue
                outcomes[sha] = name
                pixels = decode(data, name)
                outcomes[sha] = None
            except UnreadableImage as error:
                self.errors[name] = str(error)
                warn(str(error))
                continue
            yield sha, pixels

    def coverage(self, captions: Mapping[str, str]) -> Coverage:
        """How far {path or sha256: caption} covers what was found."""
        readable = {name: sha for name, sha in self.hashes.items() if name not in self.errors}
        captioned = sum(name in captions or sha in captions for name, sha in readable.items())
        known = self.hashes.keys() | self.errors.keys() | set(self.hashes.values())
        return Coverage(
            images=len(readable) + len(self.errors),
            distinct=len(set(readable.values())),
            captioned=captioned,
            unreadable=len(self.errors),
            missing=len(readable) - captioned,
            strangers=tuple(key for key in captions if key not in known),
        )


def caption_folder(
    root: Path, out: Path, load: Callable[[], Blip], warn: Warn = lambda _: None, batch_size: int = 16
) -> Coverage:
    """Caption every distinct image under `root` that `out` does not caption yet; each batch is on the disk when made.

    Args:
        out: JSON lines, as `read_captions` takes them; may be there from an earlier run, killed or not.
        load: makes the model, called only where there is something to caption.
        warn: told of each image that cannot be read or gets no words, and of a torn line that was cut off.
        batch_size: images a batch; another size may round differently, and so may rarely choose another word.

    Raises:
        UserError: nothing to caption, or as `open_log` and `load`.
    """
    files = image_files(root)
    survey = Survey(root)
    blip: Blip | None = None
    views: dict[str, torch.Tensor] = {}

    with open_log(out, warn) as log:

        def flush() -> None:
            if blip is None or not views:
                return
            made = dict(zip(views, blip.captions(list(views.values())), strict=True))
            log.append({sha: caption for sha, caption in made.items() if caption})
            for sha in (sha for sha, caption in made.items() if not caption):
                name = next(name for name, found in survey.hashes.items() if found == sha)
                warn(f"The model found no words for {name}. Give it a caption by hand, or leave it without one.")
            views.clear()

        def wanted(name: str, sha: str) -> bool:
            return name not in log.captions and sha not in log.captions

        for sha, pixels in survey.decoded(files, wanted, warn):
            blip = blip or load()
            views[sha] = blip.view(pixels)
            if len(views) == batch_size:
                flush()
        flush()
        return survey.coverage(log.captions)


def check_own(root: Path, captions: Path, warn: Warn = lambda _: None) -> Coverage:
    """How far a user's own caption file covers the images under `root`; every image is decoded, nothing is written.

    Raises:
        UserError: no images, no such file, or one that `read_captions` refuses.
    """
    files = image_files(root)
    if not captions.is_file():
        raise UserError(f"Expected a caption file at {captions}, found none. Mend the path, or leave --captions out.")
    try:
        given = read_captions(captions)
    except OSError as error:
        raise UserError(
            f"Cannot read {captions} ({error.strerror or error}). Mend that, or give another file."
        ) from None
    survey = Survey(root)
    for _ in survey.decoded(files, lambda name, sha: True, warn):
        pass
    return survey.coverage(given)


def complaints(coverage: Coverage, root: Path) -> list[str]:
    """A line for each caption without an image under `root`, `SHOWN` at most, and one that says what to do."""
    if not coverage.strangers:
        return []
    names = [path.relative_to(root).as_posix() for path in image_files(root)[:5000]]
    lines = [f"No image for the caption of '{key}'.{did_you_mean(key, names)}" for key in coverage.strangers[:SHOWN]]
    if len(coverage.strangers) > SHOWN:
        lines.append(f"And none for {len(coverage.strangers) - SHOWN} more.")
    return [*lines, "The pipeline refuses captions without an image: remove those lines, or mend their keys."]
