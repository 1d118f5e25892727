"""A tree of images, scanned once into a table of files: its suites, splits, generators and labels.

`dgs manifest` prints the table by generator, and what is missing; the pipeline reads the same table, or refuses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dgs.data.images import is_image
from dgs.data.layouts import (
    FAKE,
    LABELS,
    REAL,
    Layout,
    Place,
    files_in,
    folders,
    laid_out,
    listed,
    read_layout,
    renames,
    split_or_suite,
)
from dgs.data.suites import SUITES, full_name, is_pool, pools_for
from dgs.errors import UserError, printable

MINIBENCH = "minibench.json"  # the packed benchmark's description
TABLES = {"imagefolder": ("metadata.jsonl", "metadata.csv"), "parquet": (".parquet",)}  # of other layouts, by file


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
    parent: Path  # of the split
    is_pool: bool  # photographs for several generators
    is_read: bool  # by the pipeline: of a suite test images, and training images where the root has none of its own


@dataclass
class Tree:
    """The files in the label folders of a tree.

    groups: the fields of `Group`, real and fake (images).
    files: one row a file, by group, label and path; columns group (an index into `groups`), label ("0_real" or
        "1_fake"), path, is_image (as `images.is_image`) and words (for a caption: the name of the class's folder, or
        of the generator's).
    layout: what the folders were read as.
    """

    root: Path
    layout: Layout
    groups: pd.DataFrame
    files: pd.DataFrame

    @property
    def notes(self) -> list[str]:
        """As `reading`, and the files that are no images, a sentence each."""
        return [*self.reading(), *passed_over(count_suffixes(self.files.loc[~self.files["is_image"], "path"]))]

    def reading(self) -> list[str]:
        """How the tree was read, and what in it was not looked at, a sentence each."""
        tops = sorted({top for place in self.layout.places for _, top, _ in place.tops})
        inner = {top: [path.name for path in folders(top)] for top in tops}
        below = listed(f"{top} ({listed(names)})" for top, names in inner.items() if names)
        merged = [f"Folders below label folders, read as part of them: {below}."] if below else []
        count_by_name = Counter(path.name for path in self.layout.passed)
        passed = ", ".join(f"{count} {printable(name)}" for name, count in sorted(count_by_name.items()))
        systems = [f"Folders of systems, and hidden ones, passed over: {passed}."] if passed else []
        strangers = [
            f"{folder} is neither a split nor a suite: not looked at.{split_or_suite(folder.name)}"
            for folder in self.layout.strangers
            if not self.is_run
        ]
        return [*self.layout.notes, *merged, *strangers, *systems]

    def loose_images(self) -> str:
        """A sentence on the images beside the label folders; "" where there are none."""
        loose = self.layout.loose
        if not loose:
            return ""
        return (
            f"{'1 image lies' if len(loose) == 1 else f'{len(loose)} images lie'} beside the label folders, not read, "
            f"first {loose[0]}. Move them into one, "
            f"or out of {self.root}."
        )

    @property
    def is_run(self) -> bool:
        """True if it has splits of its own, as a run needs them; False where suites alone are listed."""
        return any(not part.suite.name for part in self.layout.parts)

    def tops(self, group: Any) -> tuple[tuple[str, Path, str], ...]:
        """The label folders of a row of `groups`."""
        return self.layout.places[group.Index].tops

    def generators_of(self, split: str) -> set[str]:
        """The generators with fakes in a split, as a manifest names them."""
        own = self.groups[self.groups["is_read"] & (self.groups["split"] == split) & (self.groups["fake"] > 0)]
        return set(own["full_name"])

    def splits_read(self) -> set[str]:
        """The splits of which the pipeline reads images."""
        return set(self.groups.loc[self.groups["is_read"], "split"])


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table, with its columns as attributes and its index as Index."""
    return table.itertuples()


def with_counts(groups: pd.DataFrame, files: pd.DataFrame) -> pd.DataFrame:
    """`groups` with the number of their real and fake ones among `files`."""
    counts = pd.crosstab(files["group"], files["label"]).reindex(index=groups.index, columns=[*LABELS], fill_value=0)
    return groups.assign(real=counts[REAL], fake=counts[FAKE])


def _group(place: Place, root: Path) -> Group:
    suite, split, parent = place.part
    own, known = place.generator, suite.generator(place.generator)
    column = known.column if known and split == "test" else ""
    pools = pools_for(suite, own) if all(top.name in LABELS for _, top, _ in place.tops) else ()
    pool = next((pool for pool in pools if (parent / pool).is_dir()), "")
    of_split = full_name(suite.name, split)
    full = full_name(suite.name, column or own) if split == "test" else own
    is_read = not suite.name or split == "test" or parent == root / split or not (root / split).is_dir()
    name = f"{of_split}/{own}"
    return Group(
        suite.name, split, own, column, pool, of_split, name, full, place.folder, parent, is_pool(full), is_read
    )


def scan_root(root: Path) -> Tree:
    """Any folder, as the pipeline reads it: its splits, and the suites beside them."""
    layout = read_layout(root)
    files = [
        (number, label, path, is_image(path), words)
        for number, place in enumerate(layout.places)
        for label in LABELS
        for path, words in sorted(
            (path, words) for own, top, words in place.tops if own == label for path in files_in(top, layout.passed)
        )
    ]
    table = pd.DataFrame(files, columns=["group", "label", "path", "is_image", "words"]).astype({"is_image": bool})
    groups = pd.DataFrame([_group(place, root) for place in layout.places], columns=list(Group._fields))
    groups = with_counts(groups.astype({"is_read": bool}), table[table["is_image"]])
    return Tree(root, layout, groups, table)


def scan_tree(root: Path) -> Tree:
    """A folder that holds suites, or is one, or a root as `scan_root` reads it.

    Raises:
        UserError: no such folder, or none of the layouts.
    """
    if not root.is_dir():
        raise UserError(f"Expected a folder of images at {root}, found none. Mend the path.")
    if (root / MINIBENCH).exists():
        raise UserError(
            f"Expected folders of images in {root}, found a packed benchmark. Run dgs minibench audit on it."
        )
    tree = scan_root(root)
    if sentence := no_layout(tree):
        raise UserError(sentence)
    return tree


def no_layout(tree: Tree) -> str:
    """Why a tree is of no layout at all, with what would make it one; "" where it is of one."""
    root, layout = tree.root, tree.layout
    if not tree.groups.empty or layout.suites or layout.refusals or any(part.suite.name for part in layout.parts):
        return ""
    suites = ", ".join(suite.name for suite in SUITES)
    found = listed(child.name for child in layout.strangers) or "no folders with images"
    found += f", {len(layout.loose)} images in none of these" if layout.loose else ""
    own = [name for name, endings in TABLES.items() if any(path.name.endswith(endings) for path in files_in(root))]
    hint = f" With data.layout: {own[0]} the pipeline reads it." if own else renames(root, layout.strangers)
    if layout.inner:
        hint = f" These lie in {layout.inner}: give that folder."
    elif not hint:
        images = (file for path in layout.strangers for file in files_in(path) if is_image(file))
        for first in (image.parent for image in islice(images, 1)):
            move = laid_out(first, FAKE, root / "test" / first.name)
            hint = f" For example, if {first} is a generator's ({REAL} for photographs): {move}"
    return (
        f"Expected {root} to hold {suites}, or to be one of them, or to hold train, val or test, each with "
        f"<generator>/{REAL} and <generator>/{FAKE}; found {found}. Mend the path or rename the folders.{hint}"
    )


def count_suffixes(files: Iterable[Path]) -> dict[str, int]:
    """Files by suffix, or by name where there is none, in the order of names: {".heic": 3}."""
    return dict(sorted(Counter(path.suffix.lower() or path.name for path in files).items()))


def passed_over(files: Mapping[str, int]) -> list[str]:
    """A sentence on files that are no images here, counted by suffix; none where there are none."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in files.items())
    return [f"Files passed over, not images that can be read here: {kinds}."] if files else []


def ignored_files(tree: Tree) -> dict[str, int]:
    """How many files in the label folders of a tree the pipeline passes over, by suffix: {".heic": 3}."""
    paths = tree.files["path"]
    return count_suffixes(paths[~(tree.files["is_image"] & paths.map(Path.is_file).astype(bool))])
