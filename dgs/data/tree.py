"""A tree of images, scanned once into a table of files: its suites, splits, generators and labels.

`dgs manifest` prints the table by generator, and what is missing; the pipeline reads the same table, or refuses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from dgs.data.images import files_under, is_image
from dgs.data.suites import (
    NO_SUITE,
    SHARED_REALS,
    SUITES,
    Suite,
    full_name,
    is_pool,
    pools_for,
    suite_holding,
    suite_named,
)
from dgs.errors import UserError, did_you_mean

SPLITS = ("train", "val", "test")
MINIBENCH = "minibench.json"  # the packed benchmark's description
REAL, FAKE = "0_real", "1_fake"
LABELS = {REAL: 0, FAKE: 1}
FEW = 3  # examples that a finding names


@dataclass(frozen=True)
class Finding:
    """One defect: a sentence, how many images or folders it concerns, and a few of them."""

    kind: Literal["missing", "corrupt", "duplicated", "suspicious"]
    where: str  # a group's or a place's name
    message: str
    count: int
    examples: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "examples": list(self.examples)}


class Part(NamedTuple):
    """The folder of one split, of a suite or of none."""

    suite: Suite
    split: str
    folder: Path


class Group(NamedTuple):
    """One generator in one split, or photographs that several generators are compared with: a row of `Tree.groups`."""

    suite: str  # its name, or ""
    split: str
    generator: str  # the folder's name
    column: str  # of the paper's tables, or ""
    pool: str  # the folder beside it whose photographs it is compared with too, or ""
    place: str  # "AIGIBench/test", or "train"
    name: str  # "AIGIBench/test/SDXL"
    full_name: str  # in manifests and tables: "AIGIBench/SDXL"
    folder: Path
    is_pool: bool  # photographs for several generators
    is_read: bool  # by the pipeline: of a suite, test images alone


@dataclass
class Tree:
    """The files in the label folders of a tree.

    groups: the fields of `Group`, real and fake (images, by their names).
    files: one row a file, by group, label and path; columns group (an index into `groups`), label ("0_real" or
        "1_fake"), path and is_image (as `images.is_image`: without an image's suffix, the first bytes are read).
    suites, strangers: the root's folders that are suites, and those that are neither a suite nor a split.
    notes: a sentence for each folder that was not looked at.
    """

    root: Path
    parts: list[Part]
    groups: pd.DataFrame
    files: pd.DataFrame
    suites: dict[Path, Suite]
    strangers: list[Path]
    notes: list[str]


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table, with its columns as attributes and its index as Index."""
    return table.itertuples()


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot look into {parent}: {error.strerror or error}.") from None


def _holders(folder: Path) -> list[Path]:
    """The folders that hold label folders: a generator's own, and those of its classes."""
    return [place for place in (folder, *_folders(folder)) if any((place / label).is_dir() for label in LABELS)]


def _with_counts(groups: pd.DataFrame, files: pd.DataFrame) -> pd.DataFrame:
    counts = pd.crosstab(files["group"], files["label"]).reindex(index=groups.index, columns=[*LABELS], fill_value=0)
    return groups.assign(real=counts[REAL], fake=counts[FAKE])


def _scan(root: Path, parts: list[Part], suites: dict[Path, Suite], strangers: list[Path]) -> Tree:
    groups: list[Group] = []
    files: list[tuple[int, str, Path, bool]] = []
    notes: list[str] = []
    for suite, split, parent in parts:
        place, is_read = full_name(suite.name, split), not suite.name or split == "test"
        for folder in _folders(parent):
            known, holders, own = suite.generator(folder.name), _holders(folder), folder.name
            if suite.name and not (known or holders or own in suite.pools() | {SHARED_REALS}):
                notes.append(f"{folder} is no generator of {suite.name} and has no label folders: not looked at.")
                continue
            for label in LABELS:
                tops = [holder / label for holder in holders if (holder / label).is_dir()]
                files += [(len(groups), label, path, is_image(path)) for path in sorted(files_under(tops))]
            column = known.column if known else ""
            pool = next((pool for pool in pools_for(suite, own) if (parent / pool).is_dir()), "")
            name, full = f"{place}/{own}", full_name(suite.name, column or own)
            groups.append(
                Group(suite.name, split, own, column, pool, place, name, full, folder, is_pool(full), is_read)
            )
    for folder in strangers:
        notes.append(f"{folder} is neither a split nor a suite: not looked at.{_split_or_suite(folder.name)}")
    table = pd.DataFrame(files, columns=["group", "label", "path", "is_image"]).astype({"is_image": bool})
    found = pd.DataFrame(groups, columns=list(Group._fields)).astype({"is_read": bool})
    return Tree(root, parts, _with_counts(found, table[table["is_image"]]), table, suites, strangers, notes)


def _suite_by_content(folder: Path) -> Suite | None:
    test = folder / "test"
    return suite_holding(path.name for path in _folders(test if test.is_dir() else folder))


def _suites(root: Path) -> dict[Path, Suite]:
    """The folders in `root` that have a suite's name, or half of its generators."""
    children = [child for child in _folders(root) if child.name not in SPLITS]
    return {child: suite for child in children if (suite := suite_named(child.name) or _suite_by_content(child))}


def _split_parts(folder: Path, suite: Suite = NO_SUITE) -> list[Part]:
    return [Part(suite, child.name, child) for child in _folders(folder) if child.name in SPLITS]


def _suite_parts(folder: Path, suite: Suite) -> list[Part]:
    # An archive unpacked into a folder of its own name: AIGIBench/AIGIBench.
    folder = next((child for child in _folders(folder) if suite_named(child.name) is suite), folder)
    undivided = Part(suite, folder.name if folder.name in SPLITS else "test", folder)
    return _split_parts(folder, suite) or [undivided]


def scan_root(root: Path) -> Tree:
    """A "folders" root as the pipeline reads it: its splits, and the suites beside them."""
    suites = _suites(root)
    strangers = [child for child in _folders(root) if child.name not in SPLITS and child not in suites]
    of_suites = [part for folder, suite in suites.items() for part in _suite_parts(folder, suite)]
    return _scan(root, _split_parts(root) + of_suites, suites, strangers)


def scan_tree(root: Path) -> Tree:
    """A folder that holds suites, or is one, or a root as `scan_root` reads it.

    A suite is recognised by its folder's name or by half of its generators. It may be divided into train, val and test;
    undivided it is all test. Below a generator come 0_real and 1_fake, directly or a class folder further down.

    Raises:
        UserError: no such folder, or none of the layouts.
    """
    if not root.is_dir():
        raise UserError(f"Expected a folder of images at {root}, found none. Mend the path.")
    if (root / MINIBENCH).exists():
        raise UserError(
            f"Expected folders of images in {root}, found a packed benchmark. Run dgs minibench audit on it."
        )
    path = root.resolve()
    own_name = path.parent.name if path.name in SPLITS else path.name
    if not _suites(root) and (suite := _suite_by_content(root) or suite_named(own_name)):
        return _scan(root, _suite_parts(root, suite), {}, [])
    tree = scan_root(root)
    if tree.groups.empty and not any(find_missing(tree)):
        suites = ", ".join(suite.name for suite in SUITES)
        found = ", ".join(child.name for child in tree.strangers[:FEW]) or "no folders with images"
        raise UserError(
            f"Expected {root} to hold {suites}, or to be one of them, or to hold train, val or test, each with "
            f"<generator>/{REAL} and <generator>/{FAKE}; found {found}. Mend the path or rename the folders."
        )
    return tree


def count_suffixes(files: Iterable[Path]) -> dict[str, int]:
    """Files by suffix, or by name where there is none, in the order of names: {".heic": 3}."""
    return dict(sorted(Counter(path.suffix.lower() or path.name for path in files).items()))


def passed_over(files: Mapping[str, int]) -> list[str]:
    """A sentence on files that are no images here, counted by suffix; none where there are none."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in files.items())
    return [f"Files passed over, not images that can be read here: {kinds}."] if files else []


def _split_or_suite(name: str) -> str:
    return did_you_mean(name, [*SPLITS, *(known.name for known in SUITES)])


def _first_hint(names: Iterable[str], known: Iterable[str]) -> str:
    known = list(known)
    return next((hint for name in names if (hint := did_you_mean(name, known))), "")


def find_missing(tree: Tree) -> Iterator[Finding]:
    """What is missing in a tree, and what the names alone make suspicious."""
    yield from _defects(tree.groups)
    for group in rows_of(tree.groups):
        classes = [place for place in _holders(group.folder) if place != group.folder]
        for label, wanted in ((REAL, group.real and not group.pool), (FAKE, group.fake and not group.is_pool)):
            without = [place for place in classes if not (place / label).is_dir()]
            if wanted and without:
                message = (
                    f"{len(without)} of {len(classes)} class folders of {group.folder} have no {label}, first "
                    f"{without[0].name}."
                )
                examples = tuple(str(place / label) for place in without[:FEW])
                yield Finding("missing", group.name, message, len(without), examples)
    for suite, split, parent in tree.parts:
        generators = suite.generators if split == "test" else ()  # training sets choose their own
        names = [path.name for path in _folders(parent)]
        present = {known.folder for name in names if (known := suite.generator(name))}
        if absent := [generator.folder for generator in generators if generator.folder not in present]:
            hint = _first_hint(absent, [name for name in names if not suite.generator(name)])
            message = (
                f"{len(absent)} of {len(generators)} generators of {suite.name} are missing in {parent}: "
                f"{', '.join(absent)}.{hint}"
            )
            yield Finding("missing", full_name(suite.name, split), message, len(absent), tuple(absent))


def _strays(generator: Path) -> list[Path]:
    """Folders of a generator, or of its classes, that lie where only label folders should."""
    children = _folders(generator)
    strays = []
    for place in [generator] if any(path.name in LABELS for path in children) else children:
        inner = _folders(place)
        others = [path for path in inner if path.name not in LABELS]
        strays += others if len(others) < len(inner) else [*others, place][:1]
    return strays


def _defects(groups: pd.DataFrame) -> Iterator[Finding]:
    """What a check finds amiss in groups by names and counts, and the pipeline refuses to read."""
    taken: dict[tuple[str, str], Path] = {}
    for group in rows_of(groups):
        folder, found, strays = group.folder, {REAL: group.real, FAKE: group.fake}, _strays(group.folder)
        stray = f"{strays[0]}.{_first_hint((path.name for path in strays), LABELS)}" if strays else "none."
        if (first := taken.setdefault((group.split, group.full_name), group.folder)) != group.folder:
            message = (
                f"Expected one folder of {group.full_name}, found {first} and {folder}: two spellings of one "
                f"generator, or a suite twice. Keep one of them."
            )
            yield Finding("suspicious", group.place, message, 1, (str(first), str(folder)))
        if not group.suite and (strays or not _folders(folder)):
            what_to_do = "Rename or move it." if strays else "Add them, or remove it."
            message = f"Expected label folders {REAL} and {FAKE} alone in {folder}, found {stray} {what_to_do}"
            yield Finding("missing", group.name, message, 1, tuple(map(str, strays[:FEW])))
            continue
        if group.is_pool and (group.fake or not group.real):
            what_to_do = "Rename the folder if it is a generator's." if group.fake else f"Add some, or remove {folder}."
            message = (
                f"Expected only photographs, in {REAL}, in {folder} (the name '{group.generator}' stands for what all "
                f"generators of a split are compared with), found {group.real} in {REAL} and {group.fake} in {FAKE}. "
                f"{what_to_do}"
            )
            yield Finding("suspicious" if group.fake else "missing", group.name, message, group.fake or 1)
        for label, other in ((REAL, FAKE), (FAKE, REAL)):
            if not (found[label] or group.is_pool or (group.pool and label == REAL)):
                message = (
                    f"Expected images in {folder / label}, found none ({found[other]} in {other}), nor in "
                    f"<class>/{label}{f', but found {stray}' if strays else '.'} Add some, or remove {folder}."
                )
                yield Finding("missing", group.name, message, 1, (str(folder / label),))


def ignored_files(root: Path) -> dict[str, int]:
    """How many files in the label folders of a "folders" root the pipeline passes over, by suffix: {".heic": 3}."""
    files = scan_root(root).files
    return count_suffixes(path for path in files["path"] if not (is_image(path) and path.is_file()))


def read_rows(root: Path) -> pd.DataFrame:
    """The images of a "folders" root.

    Generators of a split are named as their folders, those of a suite "<suite>/<the paper's column>", and are test.

    Returns:
        columns split, generator, label (0 or 1), file (relative to `root`), and words (for a caption: the name of the
        class's folder, or of the generator's).

    Raises:
        UserError: a folder that is no split, suite or label's, a generator or a suite without images, one generator
            twice, or no training or test images.
    """
    tree = scan_root(root)
    groups = tree.groups[tree.groups["is_read"]]
    files = tree.files[tree.files["is_image"] & tree.files["group"].isin(groups.index)]
    files = files[files["path"].map(Path.is_file).astype(bool)]
    for sentence in _refusals(tree, _with_counts(groups, files)):
        raise UserError(sentence)
    rows = files.join(groups.drop(columns=["name"]), on="group")
    return pd.DataFrame(
        {
            "split": rows["split"],
            "generator": rows["full_name"],
            "label": rows["label"].map(LABELS),
            "file": [path.relative_to(root).as_posix() for path in rows["path"]],
            "words": [_words(path, folder) for path, folder in zip(rows["path"], rows["folder"], strict=True)],
        }
    ).reset_index(drop=True)


def _words(path: Path, generator: Path) -> str:
    first = path.relative_to(generator).parts[0]
    return generator.name if first in LABELS else first


def _refusals(tree: Tree, read: pd.DataFrame) -> Iterator[str]:
    """Why the pipeline cannot read a tree, a sentence each; `read` are the groups of which it reads images."""
    for folder in tree.strangers:
        yield (
            f"Unknown split folder {folder}.{_split_or_suite(folder.name)} Expected train, test and perhaps val "
            f"in data.root, each holding <generator>/0_real and <generator>/1_fake, or a suite's folder."
        )
    for folder, suite in tree.suites.items():
        yield from _suite_refusals(tree, folder, suite)
    yield from (finding.message for finding in _defects(read))
    for needed in ("train", "test"):
        if needed not in set(read["split"]):
            beside = " Or put the paper's suites beside train/." if needed == "test" else ""
            yield f"Expected images under {tree.root / needed}/<generator>/{{0_real,1_fake}}, found none.{beside}"


def _suite_refusals(tree: Tree, folder: Path, suite: Suite) -> Iterator[str]:
    """A suite without generators, one that it has not, and training images that the pipeline would not read."""
    own = tree.groups[tree.groups["folder"].map(lambda group: group.is_relative_to(folder)).astype(bool)]
    if own[own["is_read"] & (own["column"] != "")].empty:
        found = ", ".join(path.name for path in _folders(folder)[:FEW]) or "no folder"
        yield (
            f"Expected generators of {suite.name} ({suite.generators[0].folder}, {suite.generators[1].folder} ...) in "
            f"{folder}, found {found}. Mend their names, or move the folder out of data.root."
        )
    for group in rows_of(own):
        place, expected = group.folder.parent, tree.root / group.split
        if not group.is_read and place.resolve() != expected.resolve():
            yield (
                f"Expected training images in {expected}, found {group.folder}: of a suite, test images "
                f"alone are read. Move {place} there, or out of data.root."
            )
        if group.is_read and not group.column and not group.is_pool:
            hint = did_you_mean(group.generator, [known.folder for known in suite.generators])
            yield (
                f"Expected generators of {suite.name} in {place}, found {group.generator}.{hint} "
                f"Mend its name, or move it to {expected}."
            )
