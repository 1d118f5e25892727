"""One caption an image: from a user's file, else a template made of folder names."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgs.errors import UserError, did_you_mean, is_text, printable

if TYPE_CHECKING:  # the command line imports this module at its start
    import pandas as pd

BLIP = "Salesforce/blip-image-captioning-base"  # what captions images where nothing else is asked for


def read_captions(path: Path) -> dict[str, str]:
    """A caption file as {key: caption}; a key is an image's path relative to the data root, or its sha256.

    The file is JSON lines: {"path": "train/x/0_real/a.jpg", "caption": "a red car"} or {"sha256": ..., "caption": ...};
    or, as the authors' release writes it, one JSON object {path: caption}.

    Raises:
        UserError: no such file, a line that is not such an object, or a key given twice with different captions.
    """
    if not path.is_file():
        raise UserError(
            f"Expected a caption file at {path}, found none. Set data.captions to a JSON-lines file, or to null."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"Expected {path.name} in UTF-8, found another encoding ({error.reason}). Save it as UTF-8."
        ) from None
    if whole := one_object(text, path.name):
        return whole
    captions: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}:"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} not JSON ({getattr(error, 'msg', error)}). Expected one object a line.") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where} expected an object, found {type(entry).__name__}.")
        if unknown := sorted(set(entry) - {"path", "sha256", "caption"}):
            hint = did_you_mean(unknown[0], ["path", "sha256", "caption"])
            raise UserError(f"{where} unknown key '{unknown[0]}'.{hint} Expected caption and path or sha256.")
        key = entry.get("path") or entry.get("sha256")
        caption = entry.get("caption")
        if not is_text(key) or not is_text(caption) or not caption.strip():
            raise UserError(f"{where} expected a 'caption' and a 'path' or 'sha256', found {sorted(entry)}.")
        key = _as_posix(key)
        if captions.setdefault(key, caption.strip()) != caption.strip():
            raise UserError(f"{where} a second, different caption for '{key}'. Keep one of them.")
    return captions


def _as_posix(key: str) -> str:
    return key.replace("\\", "/").removeprefix("./")


def one_object(text: str, name: str) -> dict[str, str]:
    """The captions of a file that is one JSON object {path: caption}; {} for a file of lines."""
    try:
        pairs: Any = json.loads(text, object_pairs_hook=lambda pairs: pairs) if text.lstrip()[:1] == "{" else ()
    except (ValueError, RecursionError):
        return {}
    captions: dict[str, str] = {}
    for key, caption in pairs if not {"path", "sha256", "caption"} & {key for key, _ in pairs} else ():
        if not is_text(key) or not is_text(caption) or not caption.strip():
            raise UserError(
                f"{name}: expected an object {{path: caption}}, found no text for '{printable(key)}'. Mend that entry."
            )
        if captions.setdefault(_as_posix(key), caption.strip()) != caption.strip():
            raise UserError(f"{name}: a second, different caption for '{key}'. Keep one of them.")
    return captions


def by_image(captions: Mapping[str, str], files: Iterable[str]) -> dict[str, str]:
    """`captions` with the path of an image in place of a key that names it otherwise; other keys stay.

    Otherwise: in another Unicode form ("u" and two dots for "ü", as macOS writes it), or by an absolute path, of any
    machine, that ends in the image's.

    Raises:
        UserError: an image that two keys give different captions.
    """
    exact = set(files)
    plain = {unicodedata.normalize("NFC", file): file for file in exact}
    found = {key: caption for key, caption in captions.items() if key in exact}
    for key, caption in ((key, caption) for key, caption in captions.items() if key not in exact):
        parts = unicodedata.normalize("NFC", key).split("/")
        is_absolute = key.startswith("/") or key[1:2] == ":"
        tails = ("/".join(parts[start:]) for start in range(len(parts) if is_absolute else 1))
        image = next((plain[tail] for tail in tails if tail in plain), key)
        if found.setdefault(image, caption) != caption:
            raise UserError(f"Expected one caption of {image}, found another under '{key}'. Keep one of them.")
    return found


def template_caption(generator: str) -> str:
    """The fallback where an image has no caption: "a photo of <folder name>", label words left out.

    It must not say real or fake, or the text side would be told the answer.
    """
    words = re.sub(r"[^a-zA-Z ]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", generator)).split()
    words = [w.lower() for w in words if w.lower() not in {"real", "fake", "train", "val", "test", "gan", "generated"}]
    return f"a photo of {' '.join(words)}" if words else "a photo"


def assign_captions(images: pd.DataFrame, captions: Mapping[str, str]) -> pd.Series:
    """The caption that a file gives each image, by path before hash; missing (NaN) where it gives none.

    Args:
        images: columns file (a path relative to the root) and sha256.
        captions: {path or sha256: caption}, as `read_captions` gives it.

    Raises:
        UserError: a key of the caption file that names no image (most often another root or a renamed folder).
    """
    captions = by_image(captions, images["file"])
    names = {*images["file"], *images["sha256"]}
    if strangers := [key for key in captions if key not in names]:
        raise UserError(
            f"{len(strangers)} of {len(captions)} captions name no image, first '{strangers[0]}'."
            f"{did_you_mean(strangers[0], images['file'][:5000])} Expected paths relative to data.root, or sha256."
        )
    by_path = images["file"].map(captions)
    return by_path.where(by_path.notna(), images["sha256"].map(captions))
