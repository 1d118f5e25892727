"""A "folders" root as the pipeline reads it: a row an image, or one sentence for the first thing that is amiss.

What lies where is the listing's to say, which `dgs manifest` prints; here are the rows, and what the pipeline refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgs.data.images import files_under, is_image_name
from dgs.data.layout import FAKE, LABELS, REAL
from dgs.data.listing import FEW, Group, list_root, root_parts, split_or_suite
from dgs.data.suites import Suite, is_pool
from dgs.errors import UserError, did_you_mean

OF_SUITES = "test"  # the one split that suites give


def ignored_files(root: Path) -> dict[str, int]:
    """How many files under the label folders of a "folders" root were passed over, by suffix: {".heic": 3}."""
    files = (path for path in files_under([root]) if not is_image_name(path) or not path.is_file())
    named = Counter(path.suffix.lower() or path.name for path in files if LABELS.keys() & set(path.parts))
    return dict(sorted(named.items()))


def folder_rows(root: Path) -> list[dict[str, Any]]:
    """One row an image: split, generator, label, file (relative to `root`), and words for a caption.

    Generators of a split are named as their folders, those of a suite "<suite>/<the paper's column>", and are test.

    Raises:
        UserError: a folder that is no split, suite or label's, a generator or a suite without images, one generator
            twice, or no training or test images.
    """
    parts = root_parts(root)
    if parts.strangers:
        stranger = parts.strangers[0]
        raise UserError(
            f"Unknown split folder {stranger}.{split_or_suite(stranger.name)} Expected train, test and perhaps val "
            f"in data.root, each holding <generator>/0_real and <generator>/1_fake, or a suite's folder."
        )
    listing = list_root(root)
    for group in listing.groups:
        if not group.suite:
            _require_label_folders(group.folder)
    for folder, suite in parts.suites.items():
        _check_suite(root, folder, suite, [group for group in listing.groups if group.folder.is_relative_to(folder)])
    read = [group for group in listing.groups if not group.suite or group.split == OF_SUITES]
    _require_one_folder_each(read)
    rows = [row for group in read for row in _rows(root, group)]
    for needed in ("train", "test"):
        if not any(row["split"] == needed for row in rows):
            beside = " Or put the paper's suites beside train/." if needed == OF_SUITES else ""
            raise UserError(f"Expected images under {root / needed}/<generator>/{{0_real,1_fake}}, found none.{beside}")
    return rows


def _rows(root: Path, group: Group) -> list[dict[str, Any]]:
    files = {name: [path for path in group.files[name] if path.is_file()] for name in LABELS}
    _check_counts(group, {name: len(paths) for name, paths in files.items()})
    return [
        {
            "split": group.split,
            "generator": group.full_name,
            "label": label,
            "file": path.relative_to(root).as_posix(),
            "words": _words(path, group.folder),
        }
        for name, label in LABELS.items()
        for path in files[name]
    ]


def _words(path: Path, generator: Path) -> str:
    """The folder that holds the image's label folder: its class, or the generator itself."""
    first = path.relative_to(generator).parts[0]
    return generator.name if first in LABELS else first


def _only_labels(folders: list[Path]) -> None:
    wrong = [p for p in folders if p.name not in LABELS]
    if wrong:
        raise UserError(
            f"Unknown label folder {wrong[0]}.{did_you_mean(wrong[0].name, LABELS)} Expected only 0_real and 1_fake."
        )


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def _require_label_folders(generator: Path) -> None:
    """Raise UserError unless a generator holds label folders alone, directly or a class level down."""
    children = _folders(generator)
    if any(p.name in LABELS for p in children):
        _only_labels(children)
        return
    for child in children:
        grandchildren = _folders(child)
        if not any(p.name in LABELS for p in grandchildren):
            name = grandchildren[0] if grandchildren else child
            hint = did_you_mean(name.name, LABELS)
            raise UserError(f"Expected label folders 0_real and 1_fake in {generator}, found {name}.{hint} Rename it.")
        _only_labels(grandchildren)
    if not children:
        raise UserError(f"Expected label folders 0_real and 1_fake in {generator}, found none.")


def _check_counts(group: Group, found: dict[str, int]) -> None:
    """Raise UserError where a generator lacks fakes, or reals of its own and of a pool, and where a pool has fakes."""
    if is_pool(group.full_name):
        if found[FAKE] or not found[REAL]:
            raise UserError(
                f"Expected only photographs, in 0_real, in {group.folder} (the name '{group.generator}' stands for "
                f"what all generators of a split are compared with), found {found[REAL]} in 0_real and {found[FAKE]} "
                f"in 1_fake. Rename the folder if it is a generator's."
            )
        return
    for name, count in found.items():
        if count == 0 and not (group.pool and name == REAL):
            other = FAKE if name == REAL else REAL
            raise UserError(
                f"Expected images in {group.folder / name}, found none ({found[other]} in {other}). "
                f"Add some, or remove {group.folder}."
            )


def _check_suite(root: Path, folder: Path, suite: Suite, own: list[Group]) -> None:
    """Raise UserError for a suite without generators, one that it has not, and training images that nobody reads."""
    if not any(group.split == OF_SUITES and group.column for group in own):
        found = ", ".join(path.name for path in _folders(folder)[:FEW]) or "no folder"
        raise UserError(
            f"Expected generators of {suite.name} ({suite.generators[0].folder}, {suite.generators[1].folder} ...) in "
            f"{folder}, found {found}. Mend their names, or move the folder out of data.root."
        )
    for group in own:
        if group.split != OF_SUITES and group.folder.parent.resolve() != (root / group.split).resolve():
            raise UserError(
                f"Expected training images in {root / group.split}, found {group.folder}: of a suite, test images "
                f"alone are read. Move {group.folder.parent} there, or out of data.root."
            )
        if group.split == OF_SUITES and not group.column and not is_pool(group.full_name):
            hint = did_you_mean(group.generator, [known.folder for known in suite.generators])
            raise UserError(
                f"Expected generators of {suite.name} in {group.folder.parent}, found {group.generator}.{hint} "
                f"Mend its name, or move it to {root / OF_SUITES}."
            )


def _require_one_folder_each(groups: Iterable[Group]) -> None:
    taken: dict[tuple[str, str], Path] = {}
    for group in groups:
        if (first := taken.setdefault((group.split, group.full_name), group.folder)) != group.folder:
            raise UserError(
                f"Expected one folder of {group.full_name}, found {first} and {group.folder}: two spellings of one "
                f"generator, or a suite twice. Keep one of them."
            )
