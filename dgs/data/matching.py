"""A copy of a tree of images in which format, size and metadata tell nothing: crops of original pixels, one encoding.

Data sets of photographs and generated images differ in how their files were made (Grommelt et al. 2024, "Fake or
JPEG?"), and a detector learns that first. No pixel is resampled: that would leave traces of its own, by size.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dgs.atomic import alone, explained, replacing
from dgs.data.captions import by_image, read_captions
from dgs.data.checks import FileProperties, file_properties, read_properties, trivial_rules, with_properties
from dgs.data.images import UnreadableImage, decode, is_image_name, read
from dgs.data.layouts import FAKE, REAL
from dgs.data.suites import full_name
from dgs.data.tree import Tree, rows_of
from dgs.errors import UserError
from dgs.stats import percent_text

QUALITY = 90
# Halved colour, as cameras and most of the web write it: full colour would leave which images had it before.
ENCODER: Mapping[str, Any] = {"format": "JPEG", "subsampling": "4:2:0", "optimize": False, "progressive": False}
SHARE = 0.95  # of each label of each group that the size chosen here keeps
CAPTIONS = "captions.jsonl"


def crop(pixels: NDArray[np.uint8], sha256: str, size: int) -> NDArray[np.uint8]:
    """A (size, size, 3) piece of an image, at a place that depends on the file's hash alone.

    All places are as likely: a centred piece would show the same seam of every grid of tiles, and the blocks of an
    earlier JPEG at the same offset wherever sizes are the same.

    Args:
        pixels: (H, W, 3) uint8, both sides at least `size`.
    """
    digest = hashlib.sha256(f"crop {sha256}".encode()).digest()
    places = (int.from_bytes(digest[:8]), int.from_bytes(digest[8:16]))
    top, left = (place % (side - size + 1) for place, side in zip(places, pixels.shape[:2], strict=True))
    return pixels[top : top + size, left : left + size]


def encode(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as JPEG by `ENCODER`, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, quality=quality, **ENCODER)
    return buffer.getvalue()


def copy_image(source: Path, target: Path, sha256: str, size: int, quality: int) -> FileProperties:
    """Write the matched copy of one image, and read it back; an error is no exception, `error` says it."""
    try:
        data = read(source)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UnreadableImage(f"Expected {source} as it was when it was checked, found other bytes.")
        piece = crop(decode(data, str(source)), sha256, size)
    except UnreadableImage as error:
        return FileProperties(error=str(error))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(encode(piece, quality))
    return file_properties(target)


def common_size(readable: pd.DataFrame) -> int:
    """The largest size at which each label of each group keeps `SHARE` of its images; all of up to 20.

    Args:
        readable: columns group, label, width and height.
    """
    shorter = readable[["width", "height"]].min(axis=1)
    by_label = shorter.groupby([readable["group"], readable["label"]])
    return int(by_label.quantile(1 - SHARE, interpolation="lower").min())


def new_names(files: pd.DataFrame, root: Path) -> list[Path]:
    """Paths of the copies relative to their root: all .jpg, and none says what its image was before.

    Of names that differ in suffix or capitals alone, a number tells all but one apart, in the order of the hashes.

    Args:
        files: columns path and sha256.
    """
    stems = [_without_suffix(path.relative_to(root)) for path in files["path"]]
    taken = {str(stem).casefold() for stem in stems}
    names: dict[int, Path] = {}
    seen: set[str] = set()
    for place in sorted(range(len(stems)), key=lambda place: (files["sha256"].iloc[place], stems[place])):
        stem, number = stems[place], 1
        if (name := str(stem).casefold()) in seen:
            while name in taken:
                number += 1
                name = f"{stem}-{number}".casefold()
        seen.add(name)
        taken.add(name)
        names[place] = stem.with_name(f"{stem.name}{'' if number == 1 else f'-{number}'}.jpg")
    return [names[place] for place in range(len(stems))]


def _without_suffix(path: Path) -> Path:
    while is_image_name(path):
        path = path.with_suffix("")
    return path


def matched_captions(captions: Mapping[str, str], copied: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Rows of the copy's caption file, in the order of the old one; those of images that were not copied go.

    Args:
        captions: {path or sha256: caption}, as `read_captions` gives it.
        copied: columns old and new (paths relative to their roots, as text), sha256 (before) and sha256_new.
    """
    paths = dict(zip(copied["old"], copied["new"], strict=True))
    hashes = dict(zip(copied["sha256"], copied["sha256_new"], strict=True))
    said: dict[str, set[str]] = {}  # of the new hashes: pieces may be equal where files were not
    for key, caption in captions.items():
        said.setdefault(hashes.get(key, ""), set()).add(caption)
    for key, caption in captions.items():
        if key in paths:
            yield {"path": paths[key], "caption": caption}
        elif key in hashes and len(said[hashes[key]]) == 1:
            yield {"sha256": hashes[key], "caption": caption}
        elif key in hashes:
            own = copied.loc[(copied["sha256"] == key) & ~copied["old"].isin(captions.keys()), "new"]
            yield from ({"path": path, "caption": caption} for path in own)


@dataclass(frozen=True)
class Matched:
    """What became of a tree, as plain JSON types.

    rows: a group each: suite, split, generator, real and fake (copied), left_out, before and after ({property: the best
        trivial rule}).
    left_out: {"path", "why"} of each image that has no copy, in the order of the tree.
    unreadable: how many of those cannot be read; the others are too small.
    summary: source, target, size, quality, images, captions.
    notes: a sentence each, the last one is the result.
    """

    rows: list[dict[str, Any]]
    left_out: list[dict[str, str]]
    unreadable: int
    summary: dict[str, Any]
    notes: list[str]


def match(tree: Tree, target: Path, size: int | None = None, quality: int = QUALITY, jobs: int = 1) -> Matched:
    """Write a matched copy of a tree's images to `target`, whole or not at all; equal bytes whatever `jobs` is.

    Pixels are those that a detector reads (`images.decode`): turned as EXIF says, 16 bits scaled to 8, transparency
    over white, the first frame. What lies in no label folder is not copied; captions.jsonl at the root follows.

    Args:
        size: side of the crops in px; None: `common_size`. Smaller images are left out.
        quality: of the JPEGs, 1 to 100.

    Raises:
        UserError: `target` is no new or empty folder, lies in the tree or around it; no image is large enough; a
            caption file that cannot be read; the disk refuses.
    """
    target = _require_new(tree.root, target)
    captions = read_captions(tree.root / CAPTIONS) if (tree.root / CAPTIONS).exists() else {}
    with alone(target.parent / f".{target.name}.lock", f"dgs match to {target}"):
        files = read_properties(tree, jobs)
        readable = files[files["error"] == ""]
        side = size or (common_size(readable) if len(readable) else 1)
        is_large = readable[["width", "height"]].min(axis=1) >= side
        if not is_large.any():
            raise UserError(
                f"Expected images of at least {side} x {side} px in {tree.root}, found none in {len(files)} files. "
                f"Give a smaller --size, or mend the folder."
            )
        fits, small = readable[is_large].reset_index(drop=True), readable[~is_large]
        with replacing(target) as draft:
            made, said = _write(draft, tree.root, fits, captions, side, quality, jobs)
    copied, failed = made[made["error"] == ""], pd.concat([files[files["error"] != ""], made[made["error"] != ""]])
    sizes = zip(small["path"], small["width"], small["height"], strict=True)
    why = {path: f"{width} x {height} px, smaller than {side}" for path, width, height in sizes}
    why |= dict(zip(failed["path"], failed["error"], strict=True))
    before, after = (trivial_rules(tree.groups, table) for table in (readable, copied))
    rows = list(_rows(tree.groups, files, copied, before, after))
    named = "as asked for" if size else f"the largest that keeps {100 * SHARE:.0f} % of each label of each generator"
    said_of = f", {said} of {len(captions)} captions" if captions else ""
    notes = [
        *tree.notes,
        f"Crops of {side} x {side} px ({named}), JPEG of quality {quality}, chroma {ENCODER['subsampling']}.",
        *_emptied(rows),
        _remains(fits.loc[copied.index]),
        f"{target}: {len(copied):,} images{said_of}; {len(why):,} left out.",
    ]
    left_out = [{"path": str(path), "why": why[path]} for path in files["path"] if path in why]
    summary = {"source": str(tree.root), "target": str(target), "size": side, "quality": quality}
    return Matched(rows, left_out, len(failed), {**summary, "images": len(copied), "captions": said}, notes)


def _write(
    draft: Path, root: Path, fits: pd.DataFrame, captions: Mapping[str, str], size: int, quality: int, jobs: int
) -> tuple[pd.DataFrame, int]:
    """The copies of images that are large enough, as they were read back, and how many captions went with them."""
    names = new_names(fits, root)
    of_each = zip(fits["path"], names, fits["sha256"], strict=True)
    calls = [(path, draft / name, sha256, size, quality) for path, name, sha256 in of_each]
    made = with_properties(fits[["group", "label", "path"]], copy_image, calls, jobs, "matching")
    captions = by_image(captions, [path.relative_to(root).as_posix() for path in fits["path"]])
    links = pd.DataFrame(
        {
            "old": [path.relative_to(root).as_posix() for path in fits["path"]],
            "new": [name.as_posix() for name in names],
            "sha256": fits["sha256"],
            "sha256_new": made["sha256"],
        }
    )
    rows = list(matched_captions(captions, links[made["error"] == ""]))
    if rows:
        (draft / CAPTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made, len(rows)


def _require_new(root: Path, target: Path) -> Path:
    """`target` with links resolved, if a tree's copy may be put there."""
    found, source = target.resolve(), root.resolve()
    if found.is_relative_to(source) or source.is_relative_to(found):
        raise UserError(
            f"Expected {target} to lie outside of {root}, and not around it, or a copy would be among the images. "
            f"Give another folder."
        )
    with explained(found):
        there = next(path for path in (found, *found.parents) if path.exists())
        is_new = there.is_dir() and (there != found or not any(found.iterdir()))
    if not is_new:
        what = "other files in it" if there.is_dir() else f"{there} to be a file"
        raise UserError(f"Expected {target} to be a new or an empty folder, found {what}. Remove it or give another.")
    return found


def _rows(
    groups: pd.DataFrame, files: pd.DataFrame, copied: pd.DataFrame, before: list[Any], after: list[Any]
) -> Iterator[dict[str, Any]]:
    for group, old, new in zip(rows_of(groups), before, after, strict=True):
        labels = copied.loc[copied["group"] == group.Index, "label"]
        real, fake = (int((labels == label).sum()) for label in (REAL, FAKE))
        left_out = int((files["group"] == group.Index).sum()) - real - fake
        where = {"suite": group.suite, "split": group.split, "generator": group.generator}
        yield {**where, "real": real, "fake": fake, "left_out": left_out, "before": old, "after": new}


def _emptied(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["before"] and not row["after"]:
            where = f"{full_name(row['suite'], row['split'])}/{row['generator']}"
            yield f"CAUTION: no real or no fake images are left of {where}: a smaller --size keeps them."


def _remains(before: pd.DataFrame) -> str:
    """What matching cannot take away; `before`: the properties of the images that were copied."""
    shares = []
    for word, label in (("real", REAL), ("fake", FAKE)):
        jpegs = before.loc[before["label"] == label, "format"] == "JPEG"
        shares += [f"{percent_text(float(jpegs.mean()))} % of the {word} ones"] if len(jpegs) else []
    return (
        f"What matching cannot remove: images that were JPEG before ({', '.join(shares)}) are compressed twice now, "
        f"scaling and sharpening in the sources stay, and real and fake images may show different things."
    )
