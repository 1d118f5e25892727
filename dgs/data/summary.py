"""A listing or a report as rows for people, and the remarks that go with it."""

from __future__ import annotations

from collections import Counter

from dgs.data.checks import Judged, Report
from dgs.data.listing import Group, Listing

COUNTED = ("place", "generator", "column", "real", "fake")
CHECKED = ("corrupt", "copies", "by format", "by size", "by quality")


def heading(checked: bool) -> list[str]:
    """Names of the columns that `columns` gives; "by ..." is the balanced accuracy of the best trivial rule."""
    return [*COUNTED, *(CHECKED if checked else ())]


def columns(row: Group | Judged) -> list[str]:
    """One group as text; "-" where there is nothing to say."""
    group = row.group if isinstance(row, Judged) else row
    record = group.record()
    cells = [group.place, group.generator, group.column or "-", str(record["real"]), str(record["fake"])]
    if isinstance(row, Judged):
        cells += [str(row.corrupt), str(row.copies)]
        rules = (row.rules.get(name) for name in ("format", "size", "quality"))
        cells += [f"{rule.accuracy:.2f}" if rule else "-" for rule in rules]
    return cells


def remarks(listing: Listing, report: Report | None) -> list[str]:
    """What was not looked at, what is not amiss but worth knowing, and the result in one sentence."""
    said = list(listing.notes)
    if listing.passed_over:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(listing.passed_over.items()))
        said.append(f"Files passed over, not images that can be read here: {kinds}.")
    said += report.notes if report else []
    findings = report.findings if report else listing.findings
    by_kind = Counter(finding.kind for finding in findings)
    images = sum(len(files) for group in listing.groups for files in group.files.values())
    what = ", ".join(f"{count} {kind}" for kind, count in by_kind.items()) or "nothing amiss"
    unread = "" if report else " No image was opened; --check does that."
    groups = "1 group" if len(listing.groups) == 1 else f"{len(listing.groups)} groups"
    return [*said, f"{listing.root}: {images:,} images in {groups}, {what}.{unread}"]
