"""What is wrong with a tree of images: files that cannot be read, copies, formats and sizes that give fakes away."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from tqdm import tqdm

from dgs.data.containers import without_metadata
from dgs.data.defects import Finding, find_missing, lacking
from dgs.data.images import FORMATS, UnreadableImage, decode, format_of, read
from dgs.data.layouts import FAKE, LABELS, REAL
from dgs.data.suites import full_name
from dgs.data.tree import Tree, rows_of
from dgs.errors import printable

WORTH_A_POOL = 500  # with fewer images, starting other processes takes longer than reading
LIMIT = 0.6  # balanced accuracy above which a rule is worth a warning
# Kolmogorov and Smirnov: two samples of one distribution differ by CHANCE * sqrt(1/n + 1/m) once in a thousand.
# With fewer than 8 images of each label nothing is beyond chance.
CHANCE = 1.95
SAME = {"MPO": "JPEG", "DIB": "BMP"}  # what a decoder calls variants of a format
# What is beside the pixels, by the decoder's names; any other text of a PNG is "text".
METADATA = {
    "exif": "EXIF", "icc_profile": "ICC profile", "xmp": "XMP", "XML:com.adobe.xmp": "XMP", "photoshop": "Photoshop",
    "comment": "comment", "dpi": "resolution",
}  # fmt: skip
UNREADABLE = "unreadable metadata"  # a decoder refuses it, or it is above LARGE, which may take a decoder minutes
LARGE = 1 << 24  # bytes
CHROMA = ("4:4:4", "4:2:2", "4:2:0")  # subsampling, by the decoder's numbers
PROPERTIES = ("format", "size", "quality", "metadata")  # that trivial rules are about


class FileProperties(NamedTuple):
    """One image file, read whole."""

    sha256: str = ""  # of the file's bytes; "" if they could not be read
    format: str = ""  # by the first bytes, not by the name: "JPEG"
    width: int = 0  # in the file, before any rotation
    height: int = 0
    quality: int = 0  # of a JPEG, 1 to 100; 0 for others
    wrong_suffix: bool = False  # the suffix is another format's
    coding: str = ""  # of a JPEG: "4:2:0", "4:4:4 progressive"
    metadata: tuple[str, ...] = ()  # kinds of it, such as "EXIF"
    error: str = ""  # why it cannot be decoded; then the rest but sha256 is empty


@cache
def _quality_tables() -> NDArray[np.int64]:
    """Luminance tables of the common encoder at quality 1 to 100, (100, 64)."""
    tables = []
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as image:
            tables.append(image.quantization[0])  # type: ignore[attr-defined]
    return np.array(tables, dtype=np.int64)


def jpeg_quality(table: list[int]) -> int:
    """The quality, 1 to 100, at which the common encoder's luminance table is nearest to this one of 64 numbers.

    Encoders with tables of their own get the quality that compresses about as much.
    """
    return int(np.abs(_quality_tables() - np.array(table)).sum(axis=1).argmin()) + 1


def _coding(image: Any) -> str:
    """Chroma subsampling of an opened JPEG, and whether it is progressive."""
    number = get_sampling(image) if image.layers in (1, 3) else -1
    chroma = "grey" if image.layers == 1 else CHROMA[number] if 0 <= number < len(CHROMA) else "other chroma"
    return f"{chroma} progressive" if "progressive" in image.info else chroma


def _metadata(image: Image.Image) -> tuple[str, ...]:
    found = {METADATA[name] for name in image.info if name in METADATA}
    text = {name for name, value in image.info.items() if isinstance(value, str) and name not in METADATA}
    return tuple(sorted(found | ({"text"} if image.format == "PNG" and text else set())))


def _opened(data: bytes) -> tuple[Any, tuple[str, ...]]:
    """An image that can be decoded, with its header read, and the kinds of its metadata."""
    pixels, _ = without_metadata(data, format_of(data))
    if len(data) - len(pixels) <= LARGE:
        with suppress(Exception):  # decoders raise anything at all on metadata
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            return image, _metadata(image)
    return Image.open(io.BytesIO(pixels), formats=FORMATS), (UNREADABLE,)


def file_properties(path: Path) -> FileProperties:
    """Read and decode one file; an unreadable one is no exception here, its `error` says why."""
    sha256 = ""
    try:
        data = read(path)
        sha256 = hashlib.sha256(data).hexdigest()
        decode(data, str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image, metadata = _opened(data)
            with image:
                found = SAME.get(image.format, image.format)
                tables = getattr(image, "quantization", None)
                quality = jpeg_quality(tables[0]) if found == "JPEG" and tables and 0 in tables else 0
                coding = _coding(image) if found == "JPEG" else ""
                named = Image.registered_extensions().get(path.suffix.lower(), found)
                wrong_suffix = SAME.get(named, named) != found
                width, height = image.size
                return FileProperties(sha256, found, width, height, quality, wrong_suffix, coding, metadata)
    except UnreadableImage as error:
        return FileProperties(sha256, error=str(error))


@dataclass(frozen=True)
class Rule:
    """A trivial rule in words, its balanced accuracy (0.5 to 1), and whether that is above LIMIT and beyond chance."""

    words: str
    accuracy: float
    suspicious: bool


def stump(
    real: Iterable[Any],
    fake: Iterable[Any],
    kind: Literal["kinds", "value", "threshold"],
    words: Callable[[Any], str] = str,
) -> Rule:
    """The best rule on one property by balanced accuracy, or its opposite if that is better.

    Args:
        real, fake: a value of each image; neither is empty.
        kind: "value" (is it this one value), "threshold" (is it at least so much), or "kinds" (each value is called
            what it is more often, by shares: for a few values, as formats are).
        words: how the rule names a value.
    """
    seen = {REAL: Counter(real), FAKE: Counter(fake)}
    n, m = seen[REAL].total(), seen[FAKE].total()
    values = sorted(seen[REAL].keys() | seen[FAKE].keys(), reverse=kind == "threshold")
    counts = np.array([[seen[label][value] for value in values] for label in LABELS])
    if kind == "kinds":
        more = counts[1] / m > counts[0] / n
        values = [" or ".join(value for value, one in zip(values, more, strict=True) if one) or "nothing"]
        counts = counts[:, more].sum(axis=1, keepdims=True)
    elif kind == "threshold":
        counts = counts.cumsum(axis=1)
    apart = dict(zip(values, (counts[1] / m - counts[0] / n).tolist(), strict=True))
    # Of equals the highest threshold; the lowest value, but first one that says "fake if". All alike: the lowest.
    best = max(apart, key=lambda value: (abs(apart[value]), kind == "value" and apart[value]))
    best = best if apart[best] else min(apart)
    accuracy, chance = (1 + abs(apart[best])) / 2, CHANCE * math.sqrt(1 / n + 1 / m)
    suspicious = accuracy > LIMIT and abs(apart[best]) > chance
    return Rule(f"{'fake' if apart[best] > 0 else 'real'} if {words(best)}", accuracy, suspicious)


def _rules(real: pd.DataFrame, fake: pd.DataFrame) -> dict[str, Rule]:
    """The best trivial rules where both labels have readable images; that on quality where both have JPEGs."""

    def best(*tried: tuple[Any, ...]) -> Rule:
        rules = [stump(of(real), of(fake), kind, words) for of, kind, words in tried]
        return max(rules, key=lambda rule: rule.accuracy)

    if real.empty or fake.empty:
        return {}
    kinds = sorted({kind for files in (real, fake) for each in files["metadata"] for kind in each})
    rules = {
        "format": best((lambda of: of["format"], "kinds", str)),
        "size": best(
            (lambda of: of["width"] == of["height"], "value", lambda square: "square" if square else "not square"),
            (lambda of: of["width"] * of["height"], "threshold", lambda count: f"at least {count:,} pixels"),
            (lambda of: zip(of["width"], of["height"], strict=True), "value", lambda size: f"{size[0]} x {size[1]} px"),
        ),
    }
    if real["quality"].any() and fake["quality"].any():
        rules["quality"] = best(
            (lambda of: of["quality"][of["quality"] > 0], "threshold", lambda quality: f"quality {quality} or more"),
            (lambda of: of["quality"][of["quality"] > 0], "value", lambda quality: f"quality {quality}"),
            (lambda of: of["coding"][of["quality"] > 0], "value", lambda coding: f"coded {coding}"),
        )
    return rules | {"metadata": best(*map(_has, ["metadata", *kinds]))}


def _has(kind: str) -> tuple[Any, ...]:
    """The rule on one kind of metadata, or on "metadata" of any kind, for `stump`."""
    return (
        lambda of: [kind in (*each, *(["metadata"] if each else [])) for each in of["metadata"]],
        "value",
        lambda there: f"{'with' if there else 'without'} {kind}",
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _median(values: pd.Series) -> int:
    return int(values.quantile(0.5, interpolation="lower"))


def _describe(name: str, files: pd.DataFrame) -> str:
    """What a finding says of the formats, sizes or JPEG qualities of some files."""
    if name == "format":
        return ", ".join(f"{kind} {_percent(n, len(files))}" for kind, n in Counter(files["format"]).most_common())
    if name == "size":
        sizes = Counter(zip(files["width"], files["height"], strict=True))
        (width, height), most = min(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
        return (
            f"median {_median(files['width'])} x {_median(files['height'])} px, "
            f"{_percent((files['width'] == files['height']).sum(), len(files))} square, "
            f"most often {width} x {height} ({_percent(most, len(files))})"
        )
    if name == "metadata":
        kinds = Counter(kind for each in files["metadata"] for kind in each)
        return ", ".join(f"{kind} {_percent(n, len(files))}" for kind, n in kinds.most_common()) or "none"
    qualities = files["quality"][files["quality"] > 0]
    return f"median {_median(qualities)}, {qualities.min()} to {qualities.max()}"


def _bias_findings(where: str, real: pd.DataFrame, fake: pd.DataFrame, rules: dict[str, Rule]) -> Iterator[Finding]:
    subject = dict(zip(PROPERTIES, ("Formats", "Sizes", "JPEG qualities", "Kinds of metadata"), strict=True))
    for name, rule in rules.items():
        if rule.suspicious:
            among = " among the JPEGs" if name == "quality" else ""
            yield Finding(
                "suspicious",
                where,
                f"{subject[name]} tell real from fake in {where}: real {_describe(name, real)}; fake "
                f"{_describe(name, fake)}. The rule '{rule.words}' alone has a balanced accuracy of "
                f"{rule.accuracy:.2f}{among}.",
                len(real) + len(fake),
            )


def _file_findings(where: str, label: str, files: pd.DataFrame) -> Iterator[Finding]:
    if errors := [error for error in files["error"] if error]:
        yield Finding(
            "corrupt",
            where,
            f"{len(errors)} of {len(files)} files in {label} of {where} cannot be read, first: {errors[0]}",
            len(errors),
            tuple(errors),
        )
    if wrong := [str(path) for path in files.loc[files["wrong_suffix"], "path"]]:
        yield Finding(
            "suspicious",
            where,
            f"{len(wrong)} of {len(files)} files in {label} of {where} have another format than their name says, "
            f"first {wrong[0]}.",
            len(wrong),
            tuple(wrong),
        )


def _images(count: int) -> str:
    return "1 image is" if count == 1 else f"{count} images are"


def _shared_findings(
    one: pd.DataFrame, other: pd.DataFrame, by: str, on: list[str], kind: Literal["duplicated", "suspicious"], what: str
) -> Iterator[Finding]:
    """Contents in files of both tables, counted by pairs of values of the column `by`; of one table with itself once.

    on: the columns that must be equal. what: a sentence about the two values.
    """
    left, right = (files.drop_duplicates([*on, by]) for files in (one, other))
    pairs = left.merge(right, on=on, suffixes=("", "_other")).sort_values("content", kind="stable")
    if one is other:
        pairs = pairs[pairs[by] < pairs[f"{by}_other"]]
    parties: Any = pairs.groupby([by, f"{by}_other"])
    for (first, second), shared in parties:
        examples = tuple(f"{path} and {copy}" for path, copy in zip(shared["path"], shared["path_other"], strict=True))
        message = f"{_images(len(shared))} {what.format(first, second)}, first {examples[0]}."
        yield Finding(kind, first, message, len(shared), examples)


def _duplicate_findings(files: pd.DataFrame) -> Iterator[Finding]:
    """Copies within a group, fakes of several generators, images in several places, and images under both labels."""
    contents = files.groupby(["name", "label", "content"])["path"].agg(list)
    cells: Any = contents[contents.map(len) > 1].groupby(level=["name", "label"])
    for (name, label), copies in cells:
        examples = tuple(f"{first} and {copy}" for first, *others in copies for copy in others)
        repeat = "1 file repeats" if len(examples) == 1 else f"{len(examples)} files repeat"
        message = f"{repeat} another in {label} of {name}, first {examples[0]}."
        yield Finding("duplicated", name, message, len(examples), examples)
    real, fake = (files[files["label"] == label] for label in (REAL, FAKE))
    yield from _shared_findings(fake, fake, "name", ["content", "place"], "duplicated", "fake in both {} and {}")
    yield from _shared_findings(files, files, "place", ["content"], "duplicated", "in both {} and {}")
    yield from _shared_findings(real, fake, "name", ["content"], "suspicious", "real in {} and fake in {}")


@dataclass(frozen=True)
class Report:
    """A tree, listed or checked.

    rows: a group each, as plain JSON types: suite, split, generator, column, pool, real, fake; of a checked tree also
        corrupt, copies (files that repeat another of their group and label) and rules (the best trivial rule by
        property; {} for photographs alone).
    findings: what is amiss, a checked tree's in the order missing, corrupt, duplicated, suspicious.
    notes: what is not amiss but worth knowing, a sentence each; the last one is the result.
    """

    rows: list[dict[str, Any]]
    findings: list[Finding]
    notes: list[str]


def heading(checked: bool) -> list[str]:
    """Names of the columns that `columns` gives; "by ..." is the balanced accuracy of the best trivial rule."""
    added = ["corrupt", "copies", *(f"by {name}" for name in PROPERTIES)] if checked else []
    return ["place", "generator", "column", "real", "fake", *added]


def columns(row: dict[str, Any]) -> list[str]:
    """A row of a report as text; "-" where there is nothing to say."""
    counts = [str(row[name]) for name in ("real", "fake", "corrupt", "copies") if name in row]
    shown = accuracies(row["rules"]) if "rules" in row else []
    return [full_name(row["suite"], row["split"]), printable(row["generator"]), row["column"] or "-", *counts, *shown]


def accuracies(rules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The balanced accuracy of the best rule on each of `PROPERTIES`, as text; "-" where there is none."""
    return [f"{rules[name]['accuracy']:.2f}" if name in rules else "-" for name in PROPERTIES]


def _report(tree: Tree, added: Iterable[dict[str, Any]], findings: list[Finding], notes: list[str], end: str) -> Report:
    names = ["suite", "split", "generator", "column", "pool", "real", "fake"]
    records: list[Any] = tree.groups[names].to_dict("records")
    rows = [record | more for record, more in zip(records, added, strict=True)]
    needed = lacking(tree, "train")
    unfit = [f"Enough for a list; to train on it: {needed[0].lower()}{needed[1:]}"] if needed else []
    by_kind = Counter(finding.kind for finding in findings)
    what = ", ".join(f"{count} {kind}" for kind, count in by_kind.items()) or "nothing amiss"
    groups = "1 group" if len(rows) == 1 else f"{len(rows)} groups"
    result = f"{tree.root}: {tree.files['is_image'].sum():,} images in {groups}, {what}.{end}"
    return Report(rows, findings, [*tree.notes, *unfit, *notes, result])


def listing(tree: Tree) -> Report:
    """What lies where and what is missing; no image is opened."""
    unread = " No image was decoded; --check does that."
    return _report(tree, [{}] * len(tree.groups), list(find_missing(tree)), [], unread)


def with_properties(
    files: pd.DataFrame, work: Callable[..., FileProperties], calls: Sequence[tuple[Any, ...]], jobs: int, title: str
) -> pd.DataFrame:
    """`files` with the properties that `work` finds, called once a file, one at a time in each of `jobs` processes."""
    read = Parallel(n_jobs=jobs if len(calls) >= WORTH_A_POOL else 1, return_as="generator")
    found = read(delayed(work)(*call) for call in calls)
    properties = list(tqdm(found, title, len(calls), unit="image"))
    return files.join(pd.DataFrame(properties, files.index, FileProperties._fields))


def read_properties(tree: Tree, jobs: int = 1) -> pd.DataFrame:
    """The images of a tree with name and place of their group, and `FileProperties` of each."""
    files = tree.files[tree.files["is_image"]].join(tree.groups[["name", "place"]], on="group")
    return with_properties(files, file_properties, [(path,) for path in files["path"]], jobs, "checking")


def compared(groups: pd.DataFrame, readable: pd.DataFrame) -> Iterator[tuple[Any, pd.DataFrame, pd.DataFrame]]:
    """Each group with its real files, those of its pool among them, and its fake ones."""
    parts: dict[Any, pd.DataFrame] = dict(iter(readable.groupby(["group", "label"])))
    for group in rows_of(groups):
        pool = groups.index[(groups["folder"] == group.parent / group.pool) & (group.pool != "")]
        real, *shared = (parts.get((number, REAL), readable[:0]) for number in (group.Index, *pool))
        yield group, pd.concat([real, *shared]), parts.get((group.Index, FAKE), readable[:0])


def trivial_rules(groups: pd.DataFrame, readable: pd.DataFrame) -> list[dict[str, Any]]:
    """What formats, sizes, qualities and metadata alone tell, {property: best rule} a group, as plain JSON types."""
    found = (_rules(real, fake) for _, real, fake in compared(groups, readable))
    return [{name: asdict(rule) for name, rule in rules.items()} for rules in found]


def check(tree: Tree, jobs: int = 1) -> Report:
    """Read every image of a tree, one at a time in each of `jobs` processes, and judge what was seen.

    Kept in memory: paths, hashes and a few numbers of each image.
    """
    files = read_properties(tree, jobs)
    readable = files[files["error"] == ""].copy()
    readable["content"] = readable["sha256"].factorize()[0]
    findings = list(find_missing(tree))
    findings += _duplicate_findings(readable[readable.duplicated("content", keep=False)])
    repeats = readable[readable.duplicated(["group", "label", "content"])].groupby("group").size()
    added = []
    for group, real, fake in compared(tree.groups, readable):
        rules = _rules(real, fake)
        findings += _bias_findings(group.name, real, fake, rules)
        own = files[files["group"] == group.Index]
        for label in LABELS:
            findings += _file_findings(group.name, label, own[own["label"] == label])
        corrupt, copies = int((own["error"] != "").sum()), int(repeats.get(group.Index, 0))
        added.append({"corrupt": corrupt, "copies": copies, "rules": {name: asdict(rules[name]) for name in rules}})
    order = ("missing", "corrupt", "duplicated", "suspicious")
    findings.sort(key=lambda finding: order.index(finding.kind))
    photographs = readable[readable["label"] == REAL]
    several = int((photographs.groupby(["content", "place"])["name"].nunique() > 1).sum())
    note = (
        f"{_images(several)} real in several generators of a split: as it should be where all are compared "
        f"with the same photographs, but each counts several times in a mean over generators."
    )
    return _report(tree, added, findings, [note] if several else [], "")
