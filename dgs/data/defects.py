"""What is amiss in a tree by its names and counts. The pipeline reads a tree without `refusals`; a check names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from dgs.data.layouts import FAKE, FEW, LABELS, REAL, folders, label_meant, laid_out, renames, split_or_suite
from dgs.data.suites import Suite, foreign, full_name, unseen_by_accident
from dgs.data.tree import Tree, no_layout, rows_of, with_counts
from dgs.errors import UserError, did_you_mean, printable
from dgs.workspace import escaped, names_no_utf8, no_utf8

COUNTS = {REAL: "real", FAKE: "fake"}


@dataclass(frozen=True)
class Finding:
    """One defect: a sentence, how many images or folders it concerns, and all of them or examples."""

    kind: Literal["missing", "corrupt", "duplicated", "suspicious"]
    where: str  # a group's or a place's name
    message: str  # names the first
    count: int
    examples: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "examples": list(self.examples)}

    def text(self) -> str:
        """The sentence, a few examples after the first, and how many more there are."""
        more, rest = [example.rstrip(".") for example in self.examples[1:FEW]], len(self.examples) - FEW
        more += [f"and {rest} more, which --json lists"] if rest > 0 else []
        also = f" Also {'; '.join(more)}." if more else ""
        return printable(f"{self.kind}: {self.message}{also}")


def read_rows(tree: Tree) -> pd.DataFrame:
    """The images of a "folders" root.

    Generators of a split are named as their folders, those of a suite "<suite>/<the paper's column>", and are test.

    Returns:
        columns split, generator, label (0 or 1), file (relative to the root), and words (for a caption).

    Raises:
        UserError: a folder that is no split, suite or label's, a generator or a suite without images, one generator
            twice, or no training or test images.
    """
    groups = tree.groups[tree.groups["is_read"]]
    files = tree.files[tree.files["is_image"] & tree.files["group"].isin(groups.index)]
    files = files[files["path"].map(Path.is_file).astype(bool)]
    read = with_counts(groups, files)
    for finding in refusals(tree, read):
        raise UserError(finding.message)
    for needed in ("train", "test"):
        if sentence := lacking(tree, needed):
            raise UserError(sentence)
    rows = files.join(groups[["split", "full_name"]], on="group")
    return pd.DataFrame(
        {
            "split": rows["split"],
            "generator": rows["full_name"],
            "label": rows["label"].map(LABELS),
            "file": [path.relative_to(tree.root).as_posix() for path in rows["path"]],
            "words": rows["words"],
        }
    ).reset_index(drop=True)


def lacking(tree: Tree, split: str) -> str:
    """What to do where a tree has no images of a split that a run needs; "" where it has."""
    if split in tree.splits_read():
        return ""
    beside = " Or put the paper's suites beside train/." if split == "test" else ""
    return f"Expected images under {tree.root / split}/<generator>/{{0_real,1_fake}}, found none.{beside}"


def find_missing(tree: Tree) -> Iterator[Finding]:
    """Whatever the pipeline refuses, what is missing in a tree, and what the names alone make suspicious."""
    if misnamed := names_no_utf8(tree.root):
        shown = tuple(escaped(path.relative_to(tree.root)) for path in misnamed)
        yield Finding("suspicious", "", no_utf8(tree.root, misnamed), len(misnamed), shown)
    yield from refusals(tree, tree.groups)
    yield from _missing_splits(tree)
    for group in rows_of(tree.groups):
        classes = sorted({top.parent for _, top, _ in tree.tops(group) if top.name in LABELS} - {group.folder})
        for label, wanted in ((REAL, group.real and not group.pool), (FAKE, group.fake and not group.is_pool)):
            without = [place for place in classes if not (place / label).is_dir()]
            if wanted and without:
                message = (
                    f"{len(without)} of {len(classes)} class folders of {group.folder} have no {label}, first "
                    f"{without[0].name}."
                )
                yield Finding("missing", group.name, message, len(without), tuple(str(p / label) for p in without))
    for suite, split, parent in tree.layout.parts:
        generators = suite.generators if split == "test" else ()  # training sets choose their own
        names = [path.name for path in folders(parent)]
        present = {known.folder for name in names if (known := suite.generator(name))}
        absent = [generator.folder for generator in generators if generator.folder not in present]
        if absent and (present or suite not in tree.layout.suites.values()):  # without any it is refused
            hint = _first_hint(absent, [name for name in names if not suite.generator(name)])
            message = (
                f"{len(absent)} of {len(generators)} generators of {suite.name} are missing in {parent}: "
                f"{', '.join(absent)}.{hint}"
            )
            yield Finding("missing", full_name(suite.name, split), message, len(absent), tuple(absent))
    if loose := tuple(map(str, tree.layout.loose)):
        yield Finding("suspicious", "", tree.loose_images(), len(loose), loose)
    tested = tree.generators_of("test")
    strange = [] if tree.layout.suites else foreign(tested)  # in a folder of a suite they are refused, not counted
    for sentence in [*strange, *unseen_by_accident(tree.generators_of("train"), tested)]:
        yield Finding("suspicious", "test", sentence, 1)


def _missing_splits(tree: Tree) -> Iterator[Finding]:
    """Training images without test images, or too few to cut validation images from."""
    if "train" not in tree.splits_read():
        return
    if sentence := lacking(tree, "test"):
        yield Finding("missing", "test", sentence, 1)
    most = tree.groups.loc[tree.groups["is_read"] & (tree.groups["split"] == "train"), [*COUNTS.values()]].max()
    few = [label for label, count in COUNTS.items() if most[count] < 2]
    if "val" not in tree.splits_read() and few:
        message = (
            f"Expected {tree.root / 'val'}, or two images of a generator in train/ to cut one from, found fewer of "
            f"{' and '.join(few)}. Add some."
        )
        yield Finding("missing", "train", message, 1)


def refusals(tree: Tree, groups: pd.DataFrame) -> Iterator[Finding]:
    """Why the pipeline cannot read a tree; `groups`: those that it would read, with the images of each."""
    if sentence := no_layout(tree):
        yield Finding("missing", "", sentence, 1)
    for folder in tree.layout.strangers if tree.is_run else ():
        yield Finding("suspicious", folder.name, _stranger(folder, tree), 1, (str(folder),))
    for sentence in tree.layout.refusals:
        yield Finding("suspicious", "", sentence, 1)
    for folder, suite in tree.layout.suites.items():
        yield from _suite_refusals(tree, folder, suite)
    yield from _defects(tree, groups)
    for split, own in groups.groupby("split"):
        if own["is_pool"].all():
            message = f"Expected real and fake images in {tree.root / str(split)}, found none of {FAKE}. Add some."
            yield Finding("missing", str(split), message, 1)


def _stranger(folder: Path, tree: Tree) -> str:
    return (
        f"Unknown split folder {folder}.{split_or_suite(folder.name)} Expected train, test and perhaps val in "
        f"data.root, each holding <generator>/0_real and <generator>/1_fake, or a suite's folder."
        f"{renames(tree.root, tree.layout.strangers)}"
    )


def _first_hint(names: Iterable[str], known: Iterable[str]) -> str:
    known = list(known)
    return next((hint for name in names if (hint := did_you_mean(name, known))), "")


def _strays(tree: Tree, group: Any) -> list[Path]:
    """Folders of a generator, or of its classes, that lie where only label folders should."""
    tops = tree.tops(group)
    if any(top.name not in LABELS or top.parent == group.parent for _, top, _ in tops):
        return []
    children = folders(group.folder)
    if group.folder == group.parent:  # of classes alone
        children = sorted({top.parent for _, top, _ in tops})
    strays: list[Path] = []
    for place in [group.folder] if any(path.name in LABELS for path in children) else children:
        inner = folders(place)
        others = [path for path in inner if path.name not in LABELS]
        strays += others if len(others) < len(inner) else [*others, place][:1]
    return strays


def _defects(tree: Tree, groups: pd.DataFrame) -> Iterator[Finding]:
    """What is amiss in groups by names and counts."""
    taken: dict[tuple[str, str], Path] = {}
    for group in rows_of(groups):
        folder, found, strays = group.folder, {REAL: group.real, FAKE: group.fake}, _strays(tree, group)
        misspelled = {path: hint for path in strays if (hint := did_you_mean(path.name, LABELS))}
        first_stray = next(iter(misspelled), strays[0] if strays else None)
        stray = f"{first_stray}.{misspelled.get(first_stray, '')}" if first_stray else "none."
        if (first := taken.setdefault((group.split, group.full_name), group.folder)) != group.folder:
            message = (
                f"Expected one folder of {group.full_name}, found {first} and {folder}: two spellings of one "
                f"generator, or a suite twice. Keep one of them."
            )
            yield Finding("suspicious", group.place, message, 1, (str(first), str(folder)))
        if not group.suite and (strays or not folders(folder)):
            what_to_do = "Rename or move it." if strays else "Add them, or remove it."
            if loose := sum(path.parent == folder for path in tree.layout.loose):
                label = label_meant(group.generator) or FAKE
                stray = f"{loose} images in none of them."
                what_to_do = f"If all are of {label}: {laid_out(folder, label, folder)}"
            message = f"Expected label folders {REAL} and {FAKE} alone in {folder}, found {stray} {what_to_do}"
            yield Finding("missing", group.name, message, 1, tuple(map(str, strays)))
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
                if any(top.name not in LABELS for _, top, _ in tree.tops(group)):
                    message = (
                        f"Expected {COUNTS[label]} images of {group.generator} in {folder}, found none "
                        f"({found[other]} {COUNTS[other]}). Add some, or remove those."
                    )
                yield Finding("missing", group.name, message, 1, (str(folder / label),))


def _suite_refusals(tree: Tree, folder: Path, suite: Suite) -> Iterator[Finding]:
    """A suite without generators, one that it has not, and training images that the pipeline would not read."""
    own = tree.groups[tree.groups["folder"].map(lambda group: group.is_relative_to(folder)).astype(bool)]
    if own[own["is_read"] & (own["column"] != "")].empty:
        found = ", ".join(path.name for path in folders(folder)[:FEW]) or "no folder"
        known = tuple(generator.folder for generator in suite.generators)
        message = (
            f"Expected generators of {suite.name} ({known[0]}, {known[1]} ...) in {folder}, found {found}. Mend their "
            f"names, or move the folder out of data.root."
        )
        yield Finding("missing", full_name(suite.name, "test"), message, len(known), known)
    for group in rows_of(own):
        expected = tree.root / group.split
        if not group.is_read and group.parent.resolve() != expected.resolve():
            message = (
                f"Expected training images in {expected}, found {group.folder} too: of a suite, test images alone are "
                f"read beside them. Move {group.parent} there, or out of data.root."
            )
            yield Finding("suspicious", group.name, message, 1, (str(group.folder),))
        if group.suite and group.split == "test" and not group.column and not group.is_pool:
            hint = did_you_mean(group.generator, [known.folder for known in suite.generators])
            message = (
                f"Expected generators of {suite.name} in {group.parent}, found {group.generator}.{hint} Mend its name, "
                f"or move it to {expected}."
            )
            yield Finding("suspicious", group.name, message, 1, (str(group.folder),))
