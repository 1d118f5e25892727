"""What lies where in a tree of images: its suites or splits, generators, and files by label; nothing is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dgs.data.images import files_under, is_image_name
from dgs.data.layout import FAKE, LABELS, MINIBENCH, REAL, SHARED_REALS, SPLITS
from dgs.data.suites import SUITES, Suite, full_name, pools_for, suite_holding, suite_named
from dgs.errors import UserError, did_you_mean

FEW = 3  # examples that a finding names
Kind = Literal["missing", "corrupt", "duplicated", "suspicious"]


@dataclass(frozen=True)
class Finding:
    """One thing that is amiss: a sentence, how many images or folders it is about, and a few of them."""

    kind: Kind
    where: str  # a group's or a place's name
    message: str
    count: int
    examples: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**vars(self), "examples": list(self.examples)}


@dataclass(frozen=True)
class Group:
    """The images of one generator in one split, or photographs that several generators are compared with."""

    suite: str  # "" for folders that are no suite's
    split: str
    generator: str  # the folder's name
    column: str  # of the paper's tables; "" where it has none
    folder: Path
    files: dict[str, tuple[Path, ...]]  # by label folder
    pool: str = ""  # the generator's name of the group of the same place whose photographs it is compared with too

    @property
    def place(self) -> str:
        """Suite and split: "AIGIBench/test", or "train"."""
        return "/".join(filter(None, (self.suite, self.split)))

    @property
    def name(self) -> str:
        """Suite, split and generator: "AIGIBench/test/SDXL"."""
        return f"{self.place}/{self.generator}"

    @property
    def full_name(self) -> str:
        """The generator's name in manifests and tables: in a suite "AIGIBench/SDXL", else the folder's."""
        return full_name(self.suite, self.column or self.generator)

    def record(self) -> dict[str, Any]:
        """As plain JSON types, with counts in place of files."""
        described = {name: getattr(self, name) for name in ("suite", "split", "generator", "column", "pool")}
        return {**described, "real": len(self.files[REAL]), "fake": len(self.files[FAKE])}


@dataclass
class Listing:
    """A tree: its groups in the order of their names, what is missing, and what was not looked at (a sentence each)."""

    root: Path
    groups: list[Group] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # files that are no images, by suffix


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"Cannot look into {parent}: {error.strerror or error}.") from None


def _images(folders: Iterable[Path], passed_over: Counter[str]) -> tuple[Path, ...]:
    found = []
    for path in files_under(folders):
        if is_image_name(path):
            found.append(path)
        else:
            passed_over[path.suffix.lower() or path.name] += 1
    return tuple(sorted(found))


def _holders(folder: Path) -> list[Path]:
    """The folders that hold label folders: a generator's own, and those of its classes."""
    return [place for place in (folder, *_folders(folder)) if any((place / label).is_dir() for label in LABELS)]


def _group(listing: Listing, suite: Suite | None, split: str, folder: Path) -> Group:
    known = suite.generator(folder.name) if suite else None
    pool = next((name for name in pools_for(suite, folder.name) if (folder.parent / name).is_dir()), "")
    holders = _holders(folder)
    files = {
        label: _images([place / label for place in holders if (place / label).is_dir()], listing.passed_over)
        for label in LABELS
    }
    column = known.column if known else ""
    return Group(suite.name if suite else "", split, folder.name, column, folder, files, pool)


def _label_findings(group: Group, folder: Path, is_pool: bool) -> Iterator[Finding]:
    found = {label: len(files) for label, files in group.files.items()}
    if is_pool and found[FAKE]:
        yield Finding(
            "suspicious",
            group.name,
            f"Expected only photographs in {folder}, found {found[FAKE]} images in {FAKE}. Rename the folder if it is "
            f"a generator's.",
            found[FAKE],
        )
    needed = [REAL] if is_pool else [FAKE] if group.pool else [REAL, FAKE]
    for label in needed:
        if not found[label]:
            other = FAKE if label == REAL else REAL
            # A folder that should have been a label's: neither one, nor a class that holds one.
            others = [
                path.name for path in _folders(folder) if path not in _holders(folder) and path.name not in LABELS
            ]
            hint = next((said for name in others if (said := did_you_mean(name, LABELS))), "")
            strange = f" and the folder {others[0]}.{hint}" if others else "."
            yield Finding(
                "missing",
                group.name,
                f"Expected images in {folder}, in {label} (or <class>/{label}), found none, {found[other]} in {other}"
                f"{strange} Add them, or remove the generator.",
                1,
                (str(folder / label),),
            )
    classes = [place for place in _holders(folder) if place != folder]
    for label in needed:
        without = [place for place in classes if not (place / label).is_dir()]
        if without and found[label]:
            yield Finding(
                "missing",
                group.name,
                f"{len(without)} of {len(classes)} class folders of {folder} have no {label}, first {without[0].name}.",
                len(without),
                tuple(str(place / label) for place in without[:FEW]),
            )


def _missing_generators(suite: Suite, split: str, folder: Path, found: list[Path]) -> Iterator[Finding]:
    present = {known.folder for path in found if (known := suite.generator(path.name))}
    absent = [generator.folder for generator in suite.generators if generator.folder not in present]
    if absent:
        strangers = [path.name for path in found if not suite.generator(path.name)]
        hint = next((said for name in absent if (said := did_you_mean(name, strangers))), "")
        yield Finding(
            "missing",
            f"{suite.name}/{split}",
            f"{len(absent)} of {len(suite.generators)} generators of {suite.name} are missing in {folder}: "
            f"{', '.join(absent)}.{hint}",
            len(absent),
            tuple(absent),
        )


def _add_split(listing: Listing, suite: Suite | None, split: str, folder: Path) -> None:
    children = _folders(folder)
    pools = (suite.pools() if suite else set()) | {SHARED_REALS}
    taken: dict[str, Path] = {}
    for child in children:
        known = suite.generator(child.name) if suite else None
        first = taken.setdefault(known.folder if known else child.name, child)
        if first != child:
            listing.findings.append(
                Finding(
                    "suspicious",
                    f"{suite.name if suite else ''}/{split}",
                    f"{first.name} and {child.name} in {folder} are two spellings of one generator. Keep one of them.",
                    1,
                    (str(first), str(child)),
                )
            )
        if suite and not known and child.name not in pools and not _holders(child):
            listing.notes.append(f"{child} is no generator of {suite.name} and has no label folders: not looked at.")
            continue
        group = _group(listing, suite, split, child)
        listing.groups.append(group)
        listing.findings += _label_findings(group, child, child.name in pools)
    if suite and split == "test":  # training sets have generators of their own choosing
        listing.findings += _missing_generators(suite, split, folder, children)


def _splits(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if path.name in SPLITS]


def _suite_by_content(folder: Path) -> Suite | None:
    test = folder / "test"
    return suite_holding(path.name for path in _folders(test if test.is_dir() else folder))


def _add_suite(listing: Listing, suite: Suite, folder: Path) -> None:
    # An archive unpacked into a folder of its own name: AIGIBench/AIGIBench.
    folder = next((child for child in _folders(folder) if suite_named(child.name) is suite), folder)
    if not (splits := _splits(folder)):
        _add_split(listing, suite, folder.name if folder.name in SPLITS else "test", folder)
    for split in splits:
        _add_split(listing, suite, split.name, split)


@dataclass(frozen=True)
class Parts:
    """The folders in a root: its splits, its suites, and those that are neither."""

    splits: list[Path]
    suites: dict[Path, Suite]
    strangers: list[Path]


def root_parts(root: Path) -> Parts:
    """What the folders in `root` are, by their names, and suites by half of their generators too."""
    children = [child for child in _folders(root) if child.name not in SPLITS]
    suites = {child: suite for child in children if (suite := suite_named(child.name) or _suite_by_content(child))}
    return Parts(_splits(root), suites, [child for child in children if child not in suites])


def list_root(root: Path) -> Listing:
    """The groups of a "folders" root as the pipeline reads it: those of its splits, and of suites beside them."""
    listing, parts = Listing(root), root_parts(root)
    for split in parts.splits:
        _add_split(listing, None, split.name, split)
    for child, suite in parts.suites.items():
        _add_suite(listing, suite, child)
    for child in parts.strangers:
        listing.notes.append(f"{child} is neither a split nor a suite: not looked at.{split_or_suite(child.name)}")
    return listing


def split_or_suite(name: str) -> str:
    """Which split's or suite's name may have been meant: " Did you mean 'AIGIBench'?", or nothing."""
    return did_you_mean(name, [*SPLITS, *(known.name for known in SUITES)])


def list_tree(root: Path) -> Listing:
    """The groups of a folder that holds suites, or is one, or of a root as `list_root` reads it.

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
    path, parts = root.resolve(), root_parts(root)
    own_name = path.parent.name if path.name in SPLITS else path.name
    if not parts.suites and (suite := _suite_by_content(root) or suite_named(own_name)):
        listing = Listing(root)
        _add_suite(listing, suite, root)
        return listing
    listing = list_root(root)
    if not listing.groups and not listing.findings:
        suites = ", ".join(suite.name for suite in SUITES)
        found = ", ".join(child.name for child in parts.strangers[:FEW]) or "no folders with images"
        raise UserError(
            f"Expected {root} to hold {suites}, or to be one of them, or to hold train, val or test, each with "
            f"<generator>/{REAL} and <generator>/{FAKE}; found {found}. Mend the path or rename the folders."
        )
    return listing
