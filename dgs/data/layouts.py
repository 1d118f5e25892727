"""How folders of images are laid out: splits and generators, the paper's suites, and other published forms.

`read_layout` alone decides what a folder is: `dgs manifest` lists and the pipeline reads the same.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dgs.data.images import is_image
from dgs.data.suites import (
    NO_SUITE,
    PROGAN,
    PROGAN_CLASSES,
    SHARED_REALS,
    SUITES,
    Suite,
    is_generator,
    spelled,
    suite_holding,
    suite_named,
)
from dgs.errors import UserError, did_you_mean, printable
from dgs.workspace import walk

SPLITS = ("train", "val", "test")
REAL, FAKE = "0_real", "1_fake"
LABELS = {REAL: 0, FAKE: 1}
FEW = 3  # examples that a sentence names
DEEP = 5  # folders above a label folder, at most
UNNAMED = "generated"  # the generator of fakes that lie in no folder of their own
# Folders that systems put beside images, with thumbnails and waste; hidden ones (".Trash-1000") are passed over too.
SYSTEMS = {
    "__macosx", "lost+found", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@__thumb", "$recycle.bin",
    "recycler", "recycled", "system volume information", "network trash folder", "temporary items", "__pycache__",
}  # fmt: skip
# What published folders are called, as `spelled` gives it.
SPLIT_WORDS = {
    "train": "train", "training": "train", "progantrain": "train", "trainset": "train",
    "val": "val", "valid": "val", "validation": "val", "proganval": "val",
    "test": "test", "testing": "test", "testset": "test", "cnnsynthtestset": "test",
}  # fmt: skip
LABEL_WORDS = {
    **dict.fromkeys(("real", "reals", "nature", "natural", "authentic", "human"), REAL),
    **dict.fromkeys(("fake", "fakes", "ai", "aigc", "generated", "synthetic"), FAKE),
    **dict.fromkeys(("image", "images", "art", "data", "face", "faces", "photo", "photos", *SPLIT_WORDS), ""),
}


class Part(NamedTuple):
    """The folder of one split, of a suite or of none."""

    suite: Suite
    split: str
    folder: Path


class Place(NamedTuple):
    """Where the images of one generator of a split lie."""

    part: Part
    generator: str
    folder: Path
    tops: tuple[tuple[str, Path, str], ...]  # label, folder of that label, words for a caption


@dataclass
class Layout:
    """What a folder was read as.

    suites, strangers: the root's folders that are suites, and those that are neither a suite nor a split.
    loose: images that lie beside the label folders. passed: how many folders of systems, by name.
    notes: how the names were read, a sentence each. refusals: why they cannot be, with what to do.
    """

    places: list[Place] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    suites: dict[Path, Suite] = field(default_factory=dict)
    strangers: list[Path] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def is_of_a_system(path: Path) -> bool:
    """True for a folder that is no part of a data set: hidden, or one of `SYSTEMS`."""
    return path.name.startswith(".") or path.name.casefold() in SYSTEMS


def files_in(top: Path, passed: Counter[str] | None = None) -> Iterator[Path]:
    """The files below a folder, without hidden ones and those in folders of systems, which are counted in `passed`."""
    passed = Counter() if passed is None else passed

    def is_entered(folder: Path) -> bool:
        passed[folder.name] += is_of_a_system(folder)
        return not is_of_a_system(folder)

    for _, files in walk(top, is_entered):
        yield from (file for file in files if not file.name.startswith("."))


def folders(parent: Path) -> list[Path]:
    """The folders in one, by name, without those of systems."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not is_of_a_system(path))
    except OSError as error:
        raise UserError(f"Cannot look into {parent}: {error.strerror or error}.") from None


def labels_in(folder: Path) -> list[str]:
    """Those of the two labels that have a folder here."""
    return [label for label in LABELS if (folder / label).is_dir()]


def holders(folder: Path) -> list[Path]:
    """The folders that hold label folders: a generator's own, and those of its classes."""
    return [place for place in (folder, *folders(folder)) if labels_in(place)]


def split_meant(name: str) -> str:
    """The split that a folder of this name is for: "validation" -> "val"; "" for other names."""
    return SPLIT_WORDS.get(spelled(name), "")


def split_or_suite(name: str) -> str:
    """A hint at the split or suite whose folder may be meant."""
    return did_you_mean(name, [*SPLITS, *(known.name for known in SUITES)])


def renames(root: Path, strangers: Iterable[Path]) -> str:
    """The command that gives folders the names of the splits they are for; "" where none is one."""
    meant = [(folder, root / split) for folder in strangers if (split := split_meant(folder.name))]
    moves = [f"mv {quoted(folder, split)}" for folder, split in meant if not split.exists()]
    return f" To rename: {' && '.join(moves)}" if moves else ""


def label_meant(name: str) -> str:
    """The label that a folder of this name is for: "ai" and "Fake_images" -> "1_fake"; "" for other names."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    found = {LABEL_WORDS.get(word, "?") for word in words} - {""}
    return found.pop() if len(found) == 1 and not found & {"?"} else ""


def _listed(names: Iterable[str]) -> str:
    few = list(names)
    return ", ".join(map(printable, few[:FEW])) + (" ..." if len(few) > FEW else "")


def quoted(*paths: Path | str) -> str:
    """Paths as a shell's command takes them."""
    return " ".join(shlex.quote(str(path)) for path in paths)


def read_layout(root: Path) -> Layout:
    """What a folder holds, by the names in it; no file is opened.

    A suite is recognised by its folder's name or by half of its generators. It may be divided into train, val and test;
    undivided it is all test. Below a generator come 0_real and 1_fake, directly or a class folder further down.
    Where no folder has these names, others that are common are taken: `LABEL_WORDS`, `SPLIT_WORDS`.
    """
    found = Layout()
    outside: dict[Path, list[Path]] = defaultdict(list)  # files that lie above label folders
    labelled: list[Path] = []

    def is_entered(folder: Path) -> bool:
        if is_of_a_system(folder):
            found.passed[folder.name] += 1
        elif folder.name in LABELS:
            labelled.append(folder)
        else:
            return len(folder.relative_to(root).parts) <= DEEP
        return False

    for folder, files in walk(root, is_entered):
        outside[folder] += files
    if not labelled and _read_other_names(root, outside, found):
        return found
    above = {root, *(parent for folder in labelled for parent in folder.parents)}
    found.loose = [file for folder in outside if folder in above for file in outside[folder] if is_image(file)]
    _read_suites(root, found)
    if not found.suites and (suite := _suite_of(root)):
        found.strangers = []
        found.parts = _suite_parts(root, suite)
    parts, found.parts = found.parts, []
    for part in parts:
        _read_part(part, root, found)
    return found


def _suite_by_content(folder: Path) -> Suite | None:
    test = folder / "test"
    return suite_holding(path.name for path in folders(test if test.is_dir() else folder))


def _suite_of(root: Path) -> Suite | None:
    """The suite that a root itself is."""
    path = root.resolve()
    return _suite_by_content(root) or suite_named(path.parent.name if path.name in SPLITS else path.name)


def _read_suites(root: Path, found: Layout) -> None:
    """The root's splits, and the suites beside them."""
    for child in folders(root):
        if child.name in SPLITS:
            found.parts.append(Part(NO_SUITE, child.name, child))
        elif suite := suite_named(child.name) or _suite_by_content(child):
            found.suites[child] = suite
        else:
            found.strangers.append(child)
    found.parts += [part for folder, suite in found.suites.items() for part in _suite_parts(folder, suite)]


def _suite_parts(folder: Path, suite: Suite) -> list[Part]:
    # An archive unpacked into a folder of its own name: AIGIBench/AIGIBench.
    folder = next((child for child in folders(folder) if suite_named(child.name) is suite), folder)
    splits = [Part(suite, child.name, child) for child in folders(folder) if child.name in SPLITS]
    return splits or [Part(suite, folder.name if folder.name in SPLITS else "test", folder)]


def _tops(place: Path, generator: str) -> list[tuple[str, Path, str]]:
    return [(label, place / label, generator) for label in labels_in(place)]


def _read_part(part: Part, root: Path, found: Layout) -> None:
    """Add the generators of a split to `found`, and what is to be said of them."""
    suite, split, parent = part
    found.parts.append(part)
    children, with_classes = folders(parent), []
    is_plain = not suite.name or split != "test"  # of its training images a suite settles no names
    if is_plain:
        children = _read_classes(part, root, children, found)
    for folder in children:
        inner, own = holders(folder), folder.name
        if not is_plain and not (suite.generator(own) or inner or own in suite.pools() | {SHARED_REALS}):
            found.notes.append(f"{folder} is no generator of {suite.name} and has no label folders: not looked at.")
            continue
        classes = [place for place in inner if place != folder]
        if is_plain and folder not in inner and _is_collection(folder, classes):
            known = suite_named(own) or suite_holding(path.name for path in folders(folder))
            if known and split == "test":
                found.notes.append(f"{folder} is read as {known.name}.")
                found.suites[folder] = known
                _read_part(Part(known, split, folder), root, found)
                continue
            found.refusals.append(
                f"Expected a generator of {split} in {folder}, found a collection of them "
                f"({_listed(path.name for path in folders(folder))}), which would count as its classes. Move them up: "
                f"mv {quoted(folder)}/* {quoted(parent)}/ && rmdir {quoted(folder)}"
            )
        if is_plain and {spelled(path.name) for path in classes} - PROGAN_CLASSES:
            with_classes.append(f"{own} ({_listed(path.name for path in classes)})")
        tops = [top for place in inner for top in _tops(place, own if place == folder else place.name)]
        found.places.append(Place(part, own, folder, tuple(tops)))
    if with_classes:
        found.notes.append(
            f"Folders of classes, read as parts of their generator in {parent}: {_listed(with_classes)}."
        )


def _is_collection(folder: Path, classes: list[Path]) -> bool:
    """True for a folder that holds generators, by their names or because each has classes of its own."""
    if suite_named(folder.name) or sum(is_generator(path.name) for path in classes) > 1:
        return True
    return not classes and any(holders(child) for child in folders(folder))


def _read_classes(part: Part, root: Path, children: list[Path], found: Layout) -> list[Path]:
    """ProGAN's training images are published as folders of classes, without one of ProGAN's: the other folders."""
    classes = [child for child in children if spelled(child.name) in PROGAN_CLASSES and labels_in(child)]
    names, place = [child.name for child in classes], part.folder
    tested = folders(root / "test") if (root / "test").is_dir() else []
    own = next((child.name for child in tested if spelled(child.name) == PROGAN), PROGAN)
    move = f"cd {quoted(place)} && mkdir NAME && mv {quoted(*names)} NAME/"
    if {"chair", "horse"} <= {spelled(name) for name in names}:
        found.notes.append(
            f"{', '.join(names)} in {place} are classes of ProGAN's training images, as published: read as the "
            f"generator {own}. If they are another generator's: {move}"
        )
        tops = [top for child in classes for top in _tops(child, child.name)]
        found.places.append(Place(part, own, place, tuple(tops)))
        return [child for child in children if child not in classes]
    if classes:
        found.refusals.append(
            f"Expected folders of generators in {place}, found {', '.join(names)}, named as classes are: a class that "
            f"is trained on would not make its generator a seen one. Put them into the generator's folder: {move}"
        )
    return children


def _read_other_names(root: Path, inside: Mapping[Path, list[Path]], found: Layout) -> bool:
    """Read folders whose labels have other names: <split>/{real,fake}, <generator>/<split>/{nature,ai} and the like.

    False where there are none, or not of both labels.
    """
    leaves: dict[Path, str] = {}
    for folder in sorted(inside):
        is_inside = folder == root or any(parent in leaves for parent in folder.parents)
        if not is_inside and (label := label_meant(folder.name)):
            leaves[folder] = label
    if set(leaves.values()) != set(LABELS):
        return False
    grouped: dict[tuple[str, str], list[tuple[str, Path, str]]] = defaultdict(list)
    for leaf, label in leaves.items():
        divided = [child for child in folders(leaf) if split_meant(child.name)]
        for top in divided or [leaf]:  # also {real,fake}/<split>
            parts = top.relative_to(root).parts
            words = [word for part in parts for word in map(split_meant, re.split("[_ ]", part)) if word]
            names = [part for part in parts if not split_meant(part) and part != leaf.name]
            generator = names[0] if names else UNNAMED
            grouped[words[0] if words else "", generator].append((label, top, generator))
    splits = {split for split, _ in grouped}
    as_test = "val" if splits == {"train", "val"} else ""
    for (named_split, generator), tops in sorted(grouped.items()):
        above = Path(os.path.commonpath([top for _, top, _ in tops]))
        split = "test" if named_split in ("", as_test) else named_split
        part = Part(NO_SUITE, split, above.parent)
        folder = above if len(tops) > 1 else above.parent
        found.places.append(Place(part, generator, folder, tuple(tops)))
    named = {label: sorted({leaf.name for leaf in leaves if leaves[leaf] == label}) for label in LABELS}
    generators = sorted({generator for _, generator in grouped})
    found.notes.append(
        f"Read by the names of its folders: {', '.join(named[REAL])} is real, {', '.join(named[FAKE])} is fake"
        f"{', val is test, since there is no other' if as_test else ''}; generators: {', '.join(generators)}."
    )
    if "" in splits:
        found.refusals.append(_undivided(root, leaves, generators[0]))
    read = {top for place in found.places for _, top, _ in place.tops}
    beside = (folder for folder in inside if not read & {folder, *folder.parents})
    found.loose = [file for folder in beside for file in inside[folder] if is_image(file)]
    return True


def _undivided(root: Path, leaves: dict[Path, str], generator: str) -> str:
    """The refusal of images that are not divided into splits."""
    first = {label: next(leaf for leaf in leaves if leaves[leaf] == label) for label in LABELS}
    into = {split: root / split / generator for split in ("train", "test")}
    moves = " && ".join(f"mv {quoted(first[label], into['train'] / label)}" for label in LABELS)
    return (
        f"Expected train and test folders in {root}, found {' and '.join(leaf.name for leaf in first.values())} "
        f"without a split. Divide them: mkdir -p {quoted(*into.values())} && {moves}, then move a part of each label's "
        f"images to {into['test']}."
    )
