"""What is wrong with a tree of images: files that cannot be read, copies, formats and sizes that give fakes away."""

from __future__ import annotations

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dgs.data.copies import File, copy_findings
from dgs.data.layout import FAKE, LABELS, REAL
from dgs.data.listing import FEW, Finding, Group, Listing
from dgs.data.rules import Rule, best_of, by_kind, by_threshold, by_value, counted_by
from dgs.data.traits import Traits, traits

WORTH_A_POOL = 500  # with fewer images, starting other processes takes longer than reading
Size = tuple[int, int]


@dataclass
class Seen:
    """What the readable images of a group and label have in common."""

    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[Size] = field(default_factory=Counter)
    qualities: Counter[int] = field(default_factory=Counter)  # of the JPEGs
    corrupt: list[str] = field(default_factory=list)  # a sentence each
    lying: list[Path] = field(default_factory=list)

    def add(self, path: Path, found: Traits) -> None:
        """Count one more file."""
        if found.error:
            self.corrupt.append(found.error)
            return
        self.formats[found.format] += 1
        self.sizes[found.size] += 1
        if found.quality is not None:
            self.qualities[found.quality] += 1
        if found.lies:
            self.lying.append(path)

    def __add__(self, other: Seen) -> Seen:
        """The traits of both; what was corrupt or lying stays with its own group."""
        counts = (self.formats + other.formats, self.sizes + other.sizes, self.qualities + other.qualities)
        return Seen(*counts)


@dataclass(frozen=True)
class Judged:
    """A group with what the best trivial rules reach on it, by "format", "size" and "quality"; {} for a pool."""

    group: Group
    corrupt: int
    copies: int  # files that repeat the content of another of the same group and label
    rules: dict[str, Rule]

    def record(self) -> dict[str, Any]:
        """As plain JSON types."""
        rules = {name: vars(rule) for name, rule in self.rules.items()}
        return {**self.group.record(), "corrupt": self.corrupt, "copies": self.copies, "rules": rules}


@dataclass(frozen=True)
class Report:
    """A checked tree: every group, everything that is amiss, and remarks that are not amiss."""

    judged: list[Judged]
    findings: list[Finding]
    notes: list[str]


def _read_all(paths: list[Path], jobs: int) -> Iterator[Traits]:
    if jobs == 1 or len(paths) < WORTH_A_POOL:
        yield from map(traits, paths)
        return
    # "spawn": a forked child would inherit whatever threads the caller has, in whatever state they are in.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(traits, paths, chunksize=32)
        finally:
            pool.shutdown(cancel_futures=True)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _median(counts: Counter[int]) -> int:
    middle, passed = (counts.total() + 1) // 2, 0
    for value in sorted(counts):
        passed += counts[value]
        if passed >= middle:
            return value
    raise ValueError("no median of nothing")


def _formats(seen: Seen) -> str:
    total = seen.formats.total()
    return ", ".join(f"{name} {_percent(count, total)}" for name, count in seen.formats.most_common())


def _sizes(seen: Seen) -> str:
    total = seen.sizes.total()
    width = _median(counted_by(seen.sizes, lambda size: size[0]))
    height = _median(counted_by(seen.sizes, lambda size: size[1]))
    square = sum(count for (w, h), count in seen.sizes.items() if w == h)
    (w, h), most = min(seen.sizes.items(), key=lambda entry: (-entry[1], entry[0]))
    return (
        f"median {width} x {height} px, {_percent(square, total)} square, "
        f"most often {w} x {h} ({_percent(most, total)})"
    )


def _qualities(seen: Seen) -> str:
    return f"median {_median(seen.qualities)}, {min(seen.qualities)} to {max(seen.qualities)}"


def _rules(real: Seen, fake: Seen) -> dict[str, Rule]:
    """The best trivial rules where both labels have readable images; that on quality where both have JPEGs."""
    rules = {}
    if real.formats and fake.formats:
        rules["format"] = by_kind(real.formats, fake.formats)
        square = [counted_by(seen.sizes, lambda size: size[0] == size[1]) for seen in (real, fake)]
        pixels = [counted_by(seen.sizes, lambda size: size[0] * size[1]) for seen in (real, fake)]
        rules["size"] = best_of(
            by_value(square[0], square[1], lambda is_square: "square" if is_square else "not square"),
            by_threshold(pixels[0], pixels[1], lambda count: f"at least {count:,} pixels"),
            by_value(real.sizes, fake.sizes, lambda size: f"{size[0]} x {size[1]} px"),
        )
    if real.qualities and fake.qualities:
        rules["quality"] = best_of(
            by_threshold(real.qualities, fake.qualities, lambda quality: f"quality {quality} or more"),
            by_value(real.qualities, fake.qualities, lambda quality: f"quality {quality}"),
        )
    return rules


def _bias_findings(group: Group, real: Seen, fake: Seen, rules: dict[str, Rule]) -> Iterator[Finding]:
    describe = {"format": _formats, "size": _sizes, "quality": _qualities}
    subject = {"format": "Formats", "size": "Sizes", "quality": "JPEG qualities"}
    for name, rule in rules.items():
        if rule.suspicious:
            among = " among the JPEGs" if name == "quality" else ""
            yield Finding(
                "suspicious",
                group.name,
                f"{subject[name]} tell real from fake in {group.name}: real {describe[name](real)}; fake "
                f"{describe[name](fake)}. The rule '{rule.words}' alone has a balanced accuracy of "
                f"{rule.accuracy:.2f}{among}.",
                real.formats.total() + fake.formats.total(),
            )


def _file_findings(group: Group, label: str, seen: Seen) -> Iterator[Finding]:
    total = len(group.files[label])
    if seen.corrupt:
        yield Finding(
            "corrupt",
            group.name,
            f"{len(seen.corrupt)} of {total} files in {label} of {group.name} cannot be read, first: {seen.corrupt[0]}",
            len(seen.corrupt),
            tuple(seen.corrupt[:FEW]),
        )
    if seen.lying:
        yield Finding(
            "suspicious",
            group.name,
            f"{len(seen.lying)} of {total} files in {label} of {group.name} have another format than their name says, "
            f"first {seen.lying[0]}.",
            len(seen.lying),
            tuple(map(str, seen.lying[:FEW])),
        )


def check(listing: Listing, jobs: int = 1) -> Report:
    """Read every image of a listing, one at a time in each of `jobs` processes, and judge what was seen.

    Findings come in the order missing, corrupt, duplicated, suspicious. Kept in memory: paths and hashes.
    """
    files = [File(g, label, path) for g in listing.groups for label in LABELS for path in g.files[label]]
    seen = {(group.name, label): Seen() for group in listing.groups for label in LABELS}
    contents: dict[bytes, list[File]] = defaultdict(list)
    read = _read_all([file.path for file in files], jobs)
    for file, found in tqdm(zip(files, read, strict=True), "checking", len(files), unit="image"):
        seen[file.group.name, file.label].add(file.path, found)
        if not found.error:
            contents[bytes.fromhex(found.sha256)].append(file)
    findings, notes, surplus = copy_findings(copies for copies in contents.values() if len(copies) > 1)
    judged = []
    for group in listing.groups:
        own = {label: seen[group.name, label] for label in LABELS}
        real = own[REAL] + seen.get((f"{group.place}/{group.pool}", REAL), Seen())
        rules = _rules(real, own[FAKE])
        findings += _bias_findings(group, real, own[FAKE], rules)
        for label in LABELS:
            findings += _file_findings(group, label, own[label])
        corrupt = sum(len(own[label].corrupt) for label in LABELS)
        judged.append(Judged(group, corrupt, surplus[group.name], rules))
    order = ("missing", "corrupt", "duplicated", "suspicious")
    ordered = sorted([*listing.findings, *findings], key=lambda finding: order.index(finding.kind))
    return Report(judged, ordered, notes)
