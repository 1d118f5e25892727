"""How folders of images are laid out: splits and generators, the paper's suites, and other published forms.

`read_layout` alone decides what a folder is: `dgs manifest` lists and the pipeline reads the same.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    is_same,
    spelled,
    suite_holding,
    suite_named,
)
from dgs.errors import UserError, did_you_mean, printable
from dgs.workspace import is_folder, walk

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
    "@recently-snapshot", "$extend", "found.000",
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
    loose: images that lie beside the label folders. passed: folders of systems.
    notes: how the names were read, a sentence each. refusals: why they cannot be, with what to do.
    inner: the folder that is meant where the root holds neither splits nor suites.
    """

    places: list[Place] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    suites: dict[Path, Suite] = field(default_factory=dict)
    strangers: list[Path] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)
    passed: set[Path] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    inner: Path | None = None


def is_of_a_system(path: Path) -> bool:
    """True for a folder that is no part of a data set: hidden, or one of `SYSTEMS`."""
    return path.name.startswith(".") or path.name.casefold() in SYSTEMS


def files_in(top: Path, passed: set[Path] | None = None) -> Iterator[Path]:
    """The files below a folder, without hidden ones and those in folders of systems, which are added to `passed`."""

    def is_entered(folder: Path) -> bool:
        if passed is not None and is_of_a_system(folder):
            passed.add(folder)
        return not is_of_a_system(folder)

    for _, files in walk(top, is_entered):
        yield from (file for file in files if not file.name.startswith("."))


def folders(parent: Path) -> list[Path]:
    """The folders in one, by name, without those of systems."""
    try:
        with os.scandir(parent) as found:
            inner = (parent / entry.name for entry in found if is_folder(entry))
            return sorted(path for path in inner if not is_of_a_system(path))
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


def listed(names: Iterable[str]) -> str:
    """The first few of some names."""
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
            found.passed.add(folder)
        elif folder.name in LABELS:
            labelled.append(folder)
        else:
            return len(folder.relative_to(root).parts) <= DEEP
        return False

    for folder, files in walk(root, is_entered, again=True):
        outside[folder] += files
    _read_suites(root, found)
    if not found.suites and (suite := _suite_of(root)):
        found.strangers = []
        found.parts = _suite_parts(root, suite)
    found.inner = _inner_root(root, [*outside, *labelled])
    is_divided = any(split_meant(part) for folder in labelled for part in folder.relative_to(root).parts)
    is_known = found.parts or found.inner or is_divided
    other = None if labelled and is_known else _read_other_names(root, outside, labelled)
    if other:
        found = replace(other, passed=found.passed)
    else:
        parts, found.parts = found.parts, []
        for part in parts:
            _read_part(part, root, found)
    above = {root, *(parent for folder in labelled for parent in folder.parents)}
    plain = {part.folder for part in found.parts if not part.suite.name}
    read = {top for place in found.places for _, top, _ in place.tops}
    for folder, files in outside.items():
        around = {folder, *folder.parents}
        if not around & read:
            found.refusals += [_no_target(file) for file in files if file.is_symlink() and not file.exists()]
            is_beside = other or folder in above or around & plain
            found.loose += filter(is_image, files) if is_beside else ()
    return found


def _no_target(link: Path) -> str:
    return f"Expected a file or folder at {link}, found a link to {link.readlink()}, which is not there. Mend the link."


def _inner_root(root: Path, inside: Iterable[Path]) -> Path | None:
    """The one folder below the root that holds train and test, or a suite, where the root itself does not."""
    named: dict[Path, set[str]] = defaultdict(set)
    for folder in inside:
        named[folder.parent] |= {"train", "test"} if suite_named(folder.name) else {split_meant(folder.name)}
    found = [parent for parent, splits in named.items() if splits >= {"train", "test"}]
    return found[0] if len(found) == 1 and found[0].is_relative_to(root) and found[0] != root else None


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
        children = _read_classes(part, root, _read_labels(part, children, found), found)
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
            found.refusals.append(_moved_up(folder, (path.name for path in folders(folder))))
        if is_plain and {spelled(path.name) for path in classes} - PROGAN_CLASSES:
            with_classes.append(f"{own} ({listed(path.name for path in classes)})")
        tops = [top for place in inner for top in _tops(place, own if place == folder else place.name)]
        found.places.append(Place(part, own, folder, tuple(tops)))
    if with_classes:
        found.notes.append(f"Folders of classes, read as parts of their generator in {parent}: {listed(with_classes)}.")


def _is_collection(folder: Path, classes: list[Path]) -> bool:
    """True for a folder that holds generators, by their names or because each has classes of its own."""
    if suite_named(folder.name) or _generators(folder.name, (path.name for path in classes)):
        return True
    return not classes and any(holders(child) for child in folders(folder))


def _generators(name: str, inside: Iterable[str]) -> list[str]:
    """Names of generators, other than its own, in a folder that would be read as one generator's."""
    return [inner for inner in inside if is_generator(inner) and not is_same(name, inner)]


def _moved_up(folder: Path, inside: Iterable[str]) -> str:
    into = quoted(folder.parent)
    move = f"mv {quoted(folder)}/* {into}/ && rmdir {quoted(folder)}"
    if folder.is_symlink():
        move = f"ln -s {quoted(folder.resolve())}/* {into}/ && rm {quoted(folder)}"
    return (
        f"Expected the images of one generator in {folder}, found a collection of generators ({listed(inside)}), which "
        f"would count as its classes. Move them up: {move}"
    )


def _read_labels(part: Part, children: list[Path], found: Layout) -> list[Path]:
    """Label folders directly in a split are of one generator without a name: the other folders."""
    own = {label: child for child in children if (label := label_meant(child.name)) and not holders(child)}
    if set(own) == set(LABELS):
        found.places.append(Place(part, UNNAMED, part.folder, tuple((label, own[label], UNNAMED) for label in LABELS)))
        found.notes.append(
            f"{own[REAL].name} in {part.folder} is real, {own[FAKE].name} is fake, of the generator {UNNAMED}."
        )
        return [child for child in children if child not in own.values()]
    stray = sorted(own.keys() & {child.name for child in children})
    for label in stray:
        into = part.folder / (SHARED_REALS if label == REAL else UNNAMED)
        found.refusals.append(
            f"Expected folders of generators in {part.folder}, found {label}. Photographs for all of them lie in "
            f"{SHARED_REALS}/{REAL}, images of one in its folder: mkdir -p {quoted(into)} && "
            f"mv {quoted(part.folder / label, into)}"
        )
    return [child for child in children if child.name not in stray]


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


def _read_other_names(root: Path, outside: Mapping[Path, list[Path]], labelled: Iterable[Path]) -> Layout | None:
    """Read folders whose labels have other names: <split>/{real,fake}, <generator>/<split>/{nature,ai} and the like.

    None where there are none, or not of both labels.
    """
    found, leaves = Layout(), dict[Path, str]()
    for folder in sorted({*outside, *labelled}):
        is_inside = folder == root or any(parent in leaves for parent in folder.parents)
        if not is_inside and (label := label_meant(folder.name)):
            leaves[folder] = label
    if set(leaves.values()) != set(LABELS):
        return None
    grouped: dict[tuple[str, str], list[tuple[str, Path, str]]] = defaultdict(list)
    inner: dict[str, dict[str, Path]] = defaultdict(dict)  # of a generator: folders below it, and where it lies
    for leaf, label in leaves.items():
        divided = [child for child in folders(leaf) if split_meant(child.name)]
        for top in divided or [leaf]:  # also {real,fake}/<split>
            parts = top.relative_to(root).parts
            words = [word for part in parts for word in map(split_meant, re.split("[_ ]", part)) if word]
            names = [part for part in parts if not split_meant(part) and part != leaf.name]
            generator = names[0] if names else UNNAMED
            grouped[words[0] if words else "", generator].append((label, top, generator))
            place = next((path for path in top.parents if path.name == generator), root)
            inner[generator] |= dict.fromkeys(names[1:2], place)
        if below := _generators("", (child.name for child in folders(leaf))):
            moves = " && ".join(laid_out(leaf / name, label, leaf.parent / name) for name in below)
            found.refusals.append(
                f"Expected {leaf} in the folder of a generator, found generators in it ({listed(below)}), which would "
                f"count as one. Move them: {moves}"
            )
    for generator, places in inner.items():
        if len(places) > 1 and len(inner) == 1 and (root / generator).is_dir():
            found.refusals.append(
                f"Expected folders of generators in {root}, found {generator} alone, and in it {listed(places)}. Give "
                f"{root / generator} as the folder; or, if those are classes, put it below train/ and test/."
            )
        elif _generators(generator, places):
            found.refusals += [_moved_up(place, places) for place in sorted(set(places.values()))]
    splits = {split for split, _ in grouped}
    as_test = "val" if splits == {"train", "val"} else ""
    for (named_split, generator), tops in sorted(grouped.items()):
        above = Path(os.path.commonpath([top for _, top, _ in tops]))
        split = "test" if named_split in ("", as_test) else named_split
        part = Part(NO_SUITE, split, above.parent)
        folder = above if len(tops) > 1 else above.parent
        found.places.append(Place(part, generator, folder, tuple(tops)))
    named = {label: sorted({leaf.name for leaf in leaves if leaves[leaf] == label}) for label in LABELS}
    found.notes.append(
        f"Read by the names of its folders: {', '.join(named[REAL])} is real, {', '.join(named[FAKE])} is fake"
        f"{', val is test, since there is no other' if as_test else ''}; generators: {', '.join(sorted(inner))}."
    )
    if classes := [f"{name} ({listed(places)})" for name, places in sorted(inner.items()) if len(places) > 1]:
        found.notes.append(f"Folders of classes, read as parts of their generator in {root}: {listed(classes)}.")
    if "" in splits:
        found.refusals.append(_undivided(root, leaves, [top for key in grouped if not key[0] for top in grouped[key]]))
    return found


def laid_out(source: Path, label: str, generator: Path) -> str:
    """The command that makes a folder of images a generator's label folder."""
    if source == generator:
        return f"mv {quoted(source, f'{source}-')} && {laid_out(Path(f'{source}-'), label, generator)}"
    return f"mkdir -p {quoted(generator)} && mv {quoted(source, generator / label)}"


def _undivided(root: Path, leaves: Mapping[Path, str], tops: Iterable[tuple[str, Path, str]]) -> str:
    """The refusal of images that are not divided into splits."""
    names = {label: next(leaf.name for leaf in leaves if leaves[leaf] == label) for label in LABELS}
    tops = sorted(tops, key=lambda top: (top[2], top[0]))
    moves = " && ".join(f"mv {quoted(top, root / 'train' / generator / label)}" for label, top, generator in tops)
    own = sorted({generator for *_, generator in tops})
    into = [root / split / generator for generator in own for split in ("train", "test")]
    return (
        f"Expected train and test folders in {root}, found {' and '.join(names.values())} without a split. Divide "
        f"them: mkdir -p {quoted(*into)} && {moves}, then move a part of each label's images to {root / 'test'}."
    )
