"""Files with the same content: within a group, across generators, splits and suites, and under both labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

from dgs.data.layout import FAKE, LABELS, REAL
from dgs.data.listing import FEW, Finding, Group, Kind


@dataclass(frozen=True)
class File:
    """One image of a listing."""

    group: Group
    label: str
    path: Path


@dataclass
class _Tally:
    """How many contents two parties share, by pair of names, with the files of the first few."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, pairs: Iterable[tuple[tuple[str, Path], tuple[str, Path]]]) -> None:
        for (one, path), (other, copy) in pairs:
            self.counts[one, other] += 1
            if len(self.examples[one, other]) < FEW:
                self.examples[one, other].append(f"{path} and {copy}")

    def findings(self, kind: Kind, sentence: str) -> Iterator[Finding]:
        for (one, other), count in sorted(self.counts.items()):
            examples = tuple(self.examples[one, other])
            yield Finding(
                kind, one, f"{_images(count)} {sentence.format(one, other)}, first {examples[0]}.", count, examples
            )


def _images(count: int) -> str:
    return "1 image is" if count == 1 else f"{count} images are"


def _repeats(count: int) -> str:
    return "1 file repeats" if count == 1 else f"{count} files repeat"


def _firsts(files: Iterable[File], key: str) -> Mapping[str, Path]:
    """The first path at each place, or in each group, in the order of their names."""
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(getattr(file.group, key), file.path)
    return dict(sorted(found.items()))


def copy_findings(contents: Iterable[list[File]]) -> tuple[list[Finding], list[str], Counter[str]]:
    """What follows from contents that several files have.

    Args:
        contents: the files of one content, two or more, content by content.

    Returns:
        findings; notes, which are not amiss; and by group's name how many of its files repeat another of its label.
    """
    surplus: Counter[tuple[str, str]] = Counter()
    within: dict[tuple[str, str], list[str]] = defaultdict(list)
    places, generators, labels = _Tally(), _Tally(), _Tally()
    shared_reals = 0
    for files in contents:
        cells: dict[tuple[str, str], list[Path]] = defaultdict(list)
        by_place: dict[tuple[str, str], list[File]] = defaultdict(list)
        for file in files:
            cells[file.group.name, file.label].append(file.path)
            by_place[file.group.place, file.label].append(file)
        for cell, paths in cells.items():
            surplus[cell] += len(paths) - 1
            if len(paths) > 1 and len(within[cell]) < FEW:
                within[cell].append(f"{paths[0]} and {paths[1]}")
        places.add(combinations(_firsts(files, "place").items(), 2))
        groups = {label: _firsts((file for file in files if file.label == label), "name") for label in LABELS}
        labels.add(product(groups[REAL].items(), groups[FAKE].items()))
        for (_, label), here in by_place.items():
            if label == FAKE:
                generators.add(combinations(_firsts(here, "name").items(), 2))
            elif len(_firsts(here, "name")) > 1:
                shared_reals += 1
    findings = [
        Finding(
            "duplicated", name, f"{_repeats(count)} another in {label} of {name}, first {examples[0]}.", count, examples
        )
        for (name, label), count in sorted((+surplus).items())
        for examples in [tuple(within[name, label])]
    ]
    findings += generators.findings("duplicated", "fake in both {} and {}")
    findings += places.findings("duplicated", "in both {} and {}")
    findings += labels.findings("suspicious", "real in {} and fake in {}")
    notes = []
    if shared_reals:
        notes.append(
            f"{_images(shared_reals)} real in several generators of a split: as it should be where all are compared "
            f"with the same photographs, but each counts several times in a mean over generators."
        )
    a_group: Counter[str] = Counter()
    for (name, _), count in surplus.items():
        a_group[name] += count
    return findings, notes, a_group
