"""BLIP captions for a folder of images, in a file that grows batch by batch and survives a killed run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dgs.data.captions import BLIP, by_image, one_object, read_captions
from dgs.data.images import UnreadableImage, decode, is_image, read
from dgs.data.layouts import LABELS, files_in
from dgs.data.tree import scan_root
from dgs.device import choose_device
from dgs.errors import UserError, did_you_mean

MAX_TOKENS = 30  # of a caption; BLIP's are about ten
TOWERS = ("vision_model.encoder.", "text_decoder.bert.encoder.")  # weights that every captioning BLIP brings
LINE_START = b'{"sha256": "'  # of every line that is written here
SHOWN = 10  # captions without an image that are named one by one
Warn = Callable[[str], None]


class Blip:
    """A captioning model on its device, decoding greedily: the same batch gets the same captions."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, device

    def view(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """The model's input of an image: (H, W, 3) uint8 to (3, S, S) float32, on the CPU."""
        # From an array the processor would have to guess the channels, and guesses wrong where a side is 1 or 3 px.
        image = Image.fromarray(pixels)
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def captions(self, views: Sequence[torch.Tensor]) -> list[str]:
        """(3, S, S) float32 views to a caption each, white space normalized; "" where the model found no word.

        Raises:
            UserError: the batch does not fit the device's memory.
        """
        try:
            tokens = self.model.generate(
                pixel_values=torch.stack(list(views)).to(self.device),
                max_new_tokens=MAX_TOKENS,
                num_beams=1,
                do_sample=False,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"A batch of {len(views)} images does not fit the memory of {self.device}. Give a smaller "
                f"--batch-size; what was captioned so far is kept."
            ) from None
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _read(name: str, local: bool) -> tuple[Any, Any]:
    """(model, processor) from a folder or the cache (local), or by download."""
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    logging = transformers.utils.logging
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it announces every retry
    (logging.disable_progress_bar if local else logging.enable_progress_bar)()  # downloads are worth a bar
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
    if config.model_type != "blip":
        raise UserError(
            f"Expected a BLIP captioning model in '{name}', found a model of type {config.model_type}. Give another "
            f"--model, for example {BLIP}."
        )
    processor = transformers.BlipProcessor.from_pretrained(name, local_files_only=local)
    model, loading = transformers.BlipForConditionalGeneration.from_pretrained(
        name, local_files_only=local, output_loading_info=True
    )
    # transformers fills what is missing with random numbers, and a BLIP for retrieval has no decoder.
    if missing := sorted(key for key in loading["missing_keys"] if key.startswith(TOWERS)):
        raise UserError(
            f"Expected the weights of a BLIP captioning model in '{name}', found none for {missing[0]} and "
            f"{len(missing) - 1} others. Give another --model, for example {BLIP}."
        )
    return model, processor


def load_blip(name: str = BLIP, device: str = "auto", warn: Callable[[str], None] = lambda _: None) -> Blip:
    """A BLIP by its name on the Hugging Face Hub (from the cache, else downloaded), or from a local folder.

    Args:
        device: as `choose_device` takes it.
        warn: told before a download begins.

    Raises:
        UserError: transformers is not installed, the weights are not to be had or no captioning BLIP's, or there is
            no such device.
    """
    chosen = choose_device(device, "--device")
    try:
        import transformers  # noqa: F401
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError as error:
        raise UserError(
            f"Captioning needs transformers, which cannot be imported ({error}). Install it from the root of the "
            f"repository: pip install -e '.[captions]'. Or give your own caption file: --captions FILE."
        ) from None
    folder = Path(name).is_dir()
    try:
        try:
            model, processor = _read(name, local=True)
        except OSError:  # what transformers raises for "not in the cache"
            if folder or HF_HUB_OFFLINE:
                raise
            warn(f"{name} is not on this machine: downloading it.")
            model, processor = _read(name, local=False)
    except UserError:
        raise
    except Exception as error:  # damaged weights, configs and networks fail in many ways
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200].rstrip(".")
        if folder:
            raise UserError(
                f"Expected a BLIP captioning model in the folder {name}, found none that loads ({reason}). "
                f"Restore it, or give another --model."
            ) from None
        raise UserError(
            f"Cannot load '{name}': it is no folder, not in the cache and cannot be downloaded ({reason}). "
            f"With a network, run: hf download {name}. Without one, run hf download {name} --local-dir FOLDER "
            f"elsewhere, copy the folder here and give --model FOLDER; or give your own caption file: --captions FILE."
        ) from None
    return Blip(model, processor, chosen)


def is_torn(tail: bytes) -> bool:
    """True if bytes after a file's last newline are a line of ours that broke off.

    Whole JSON that only lacks its newline is not torn, and neither is what somebody else wrote.
    """
    written = tail.rstrip(b"\0")  # a crashed machine may leave a file longer than what reached the disk
    if not tail or not LINE_START.startswith(written[: len(LINE_START)]):
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


class CaptionLog:
    """An open caption file: what it holds, and a way to add to it."""

    def __init__(self, path: Path, file: BinaryIO, warn: Warn) -> None:
        self.path, self._file = path, file
        file.seek(0)
        content = file.read()
        if one_object(content.decode("utf-8-sig", "replace"), path.name):
            raise UserError(
                f"Expected JSON lines to add to in {path}, found one JSON object. Give another --out FILE, or give "
                f"it as --captions."
            )
        tail = content[content.rfind(b"\n") + 1 :]
        if is_torn(tail):
            os.ftruncate(file.fileno(), len(content) - len(tail))
            os.fsync(file.fileno())
            warn(f"{path}: cut off a torn last line of {len(tail)} bytes, which a killed run left.")
        elif tail.strip():
            self._write(b"\n")
        self.captions = read_captions(path)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # usually one write; a nearly full disk takes less than it is given
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def append(self, captions: Mapping[str, str]) -> None:
        """Add {sha256: caption}, a line each, in one write that is on the disk when this returns.

        Raises:
            UserError: the disk is full or the like; lines that were added before stay.
        """
        lines = [json.dumps({"sha256": sha, "caption": caption}) + "\n" for sha, caption in captions.items()]
        try:
            self._write("".join(lines).encode("ascii"))
        except OSError as error:
            raise UserError(
                f"Cannot write {self.path} ({error.strerror or error}). Mend that and run the same command again: it "
                f"goes on where it stopped."
            ) from None
        self.captions.update(captions)


@contextmanager
def open_log(path: Path, warn: Warn) -> Iterator[CaptionLog]:
    """A caption file to read and add to, made if there is none; only one process has it open at a time.

    `warn` is told of a torn last line, which is cut off. A file that is empty in the end is removed.

    Raises:
        UserError: no caption file that `read_captions` takes, not to be written, or open in another process.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"Expected to write captions to a file, found {path} to be none. Give another --out FILE.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(
            f"Expected to write captions to {path}, found that impossible ({error.strerror or error}). Give another "
            f"--out FILE."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Expected {path} for this run alone, found another one writing to it. Wait for it, or give another "
                f"--out FILE."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            yield CaptionLog(path, file, warn)
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                with suppress(OSError):
                    path.unlink()


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

    Where there are label folders, only the images in them count, as for the pipeline: it refuses captions of others.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"Expected a folder of images at {root}, found none. Mend the path.")
    files = [path for path in sorted(files_in(root)) if is_image(path)]
    labelled = [path for path in files if LABELS.keys() & set(path.relative_to(root).parts[:-1])]
    if not files:
        raise UserError(f"Expected image files in {root}, found none. Add some, or mend the path.")
    tree = scan_root(root)
    return sorted(tree.files.loc[tree.files["is_image"], "path"]) or labelled or files


@dataclass
class Survey:
    """What was found of each image file under `root`, by its path relative to it."""

    root: Path
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 of the bytes, where there were any to read
    errors: dict[str, str] = field(default_factory=dict)  # why not, for what cannot be decoded

    def decode(
        self, files: list[Path], wanted: Callable[[str, str], bool], warn: Warn
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """(sha256, (H, W, 3) uint8 pixels) of each wanted content, once; fills the survey on the way.

        Args:
            wanted: given (path, sha256); an unwanted file is hashed only.
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
        captions = by_image(captions, [*self.hashes, *self.errors])
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
        out: JSON lines, as `read_captions` takes them; an earlier run, killed or not, may have begun it.
        load: makes the model, called only where there is something to caption.
        warn: told of each image that cannot be read or gets no words, and of a torn line that was cut off.
        batch_size: images a batch; another size may round differently, and so may rarely choose another word.

    Raises:
        UserError: nothing to caption, or as `open_log` and `load`.
    """
    files, survey, model = image_files(root), Survey(root), cache(load)
    with open_log(out, warn) as log:
        log.captions = by_image(log.captions, [path.relative_to(root).as_posix() for path in files])

        def is_wanted(name: str, sha: str) -> bool:
            return name not in log.captions and sha not in log.captions

        views = ((sha, model().view(pixels)) for sha, pixels in survey.decode(files, is_wanted, warn))
        while batch := dict(islice(views, batch_size)):
            made = dict(zip(batch, model().captions(list(batch.values())), strict=True))
            log.append({sha: caption for sha, caption in made.items() if caption})
            for sha in (sha for sha, caption in made.items() if not caption):
                name = next(name for name, found in survey.hashes.items() if found == sha)
                warn(f"The model found no words for {name}. Give it a caption by hand, or leave it without one.")
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
    for _ in survey.decode(files, lambda name, sha: True, warn):
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
