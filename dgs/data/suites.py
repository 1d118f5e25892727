"""The three test suites of the paper: which generators each has, under which folder names, in which column."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

PROGAN = "progan"
# Of its training images, which are published as folders of classes, without a folder of the generator's.
PROGAN_CLASSES = {
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
}  # fmt: skip
# ForenSynths has these beside the generators that it shares with AIGCDetectBenchmark: a folder with them is not that.
FORENSYNTHS = {"crn", "imle", "san", "seeingdark"}
SHARED_REALS = "real"  # in place of a generator's name: photographs that all generators of the split are compared with


@dataclass(frozen=True)
class Generator:
    """One generator of a suite."""

    folder: str  # as published
    column: str  # of the paper's tables
    classes: bool = False  # published with class folders above the label folders; both forms are read
    also: Collection[str] = ()  # other spellings seen or likely; the column's is always accepted
    reals: str = ""  # the suite's folder of photographs that the generator is compared with

    def answers_to(self, name: str) -> bool:
        """True if a folder of this name is this generator's."""
        return spelled(name) in {spelled(accepted) for accepted in (self.folder, self.column, *self.also)}


@dataclass(frozen=True)
class Suite:
    """A test suite: its name in the paper, other names of its folder, and its generators in the paper's order."""

    name: str
    short: str  # its name in figures
    generators: tuple[Generator, ...]
    also: Collection[str] = ()

    def generator(self, folder: str) -> Generator | None:
        """The generator that a folder of this name holds, or None."""
        return next((generator for generator in self.generators if generator.answers_to(folder)), None)

    def pools(self) -> set[str]:
        """Names of the folders that hold photographs for several generators."""
        return {generator.reals for generator in self.generators if generator.reals}

    def share_of(self, folders: Iterable[str]) -> float:
        """The share of the generators that folders of these names hold."""
        found = {generator.folder for name in folders if (generator := self.generator(name))}
        return len(found) / len(self.generators)


@cache
def spelled(name: str) -> str:
    """A name as it is compared: lower case, letters and digits alone ("StyleGAN-XL" -> "styleganxl")."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name).casefold())


def _read_suites() -> tuple[Suite, ...]:
    table = yaml.safe_load(Path(__file__).with_name("suites.yaml").read_text(encoding="utf-8"))
    for values in table.values():
        values["generators"] = tuple(Generator(**entry) for entry in values["generators"])
    return tuple(Suite(name, **values) for name, values in table.items())


NO_SUITE = Suite("", "", ())  # of folders outside the suites
SUITES = UNIVERSAL_FAKE_DETECT, AIGC_DETECT_BENCHMARK, AIGI_BENCH = _read_suites()
FEW = 6  # tested generators that a caution names
RECOGNISED = 0.5  # a folder without a suite's name is that suite's where it holds this share of the generators


def suite_named(name: str) -> Suite | None:
    """The suite whose folder may have this name, or None."""
    return next((s for s in SUITES if spelled(name) in {spelled(known) for known in (s.name, *s.also)}), None)


def suite_holding(folders: Iterable[str]) -> Suite | None:
    """The suite that most of these generators' folder names belong to, if they are half of it or more, or None."""
    names = list(folders)
    if FORENSYNTHS & set(map(spelled, names)):
        return None
    best = max(SUITES, key=lambda suite: suite.share_of(names))
    return best if best.share_of(names) >= RECOGNISED else None


def full_name(suite: str, generator: str) -> str:
    """A test generator's name in manifests and tables: "AIGIBench/SDXL", or "SDXL" where `suite` is ""."""
    return f"{suite}/{generator}" if suite else generator


def parted(name: str) -> tuple[str, str]:
    """`full_name` undone: "AIGIBench/SDXL" -> ("AIGIBench", "SDXL"), "SDXL" -> ("", "SDXL")."""
    suite, _, own = name.partition("/")
    return (suite, own) if own and suite in {known.name for known in SUITES} else ("", name)


def abbreviated(name: str) -> str:
    """A name that begins with a suite's, as figures print it: "AIGIBench/SDXL" -> "AIGI/SDXL"."""
    suite = next((suite for suite in SUITES if name.startswith((f"{suite.name}/", f"{suite.name}, "))), None)
    return suite.short + name.removeprefix(suite.name) if suite else name


def pools_for(suite: Suite, generator: str) -> tuple[str, ...]:
    """Names of the folders whose photographs a generator may be compared with; the first that is there counts."""
    known = suite.generator(generator)
    own = (known.reals,) if known and known.reals else ()
    return tuple(name for name in (*own, SHARED_REALS) if name != generator)


def is_pool(name: str) -> bool:
    """True if a generator's `full_name` stands for photographs that several generators are compared with."""
    suite, own = parted(name)
    return own in (suite_named(suite) or NO_SUITE).pools() | {SHARED_REALS}


def pool_of(name: str, present: Collection[str]) -> str:
    """The pool that a generator's `full_name` is compared with, of the full names in `present`; "" if there is none."""
    suite, own = parted(name)
    pools = (full_name(suite, pool) for pool in pools_for(suite_named(suite) or NO_SUITE, own))
    return next((pool for pool in pools if pool in present), "")


def is_seen(name: str, trained: Iterable[str]) -> bool:
    """True if a generator's `full_name` is one of the folders trained on, in a suite under any spelling."""
    suite, own = parted(name)
    known = suite_named(suite)
    if known is None:
        return name in set(trained)
    generator = known.generator(own)
    return generator is not None and any(map(generator.answers_to, trained))


def is_generator(name: str) -> bool:
    """True if a folder of this name is a generator's of any suite."""
    return any(suite.generator(name) for suite in SUITES)


def is_same(one: str, other: str) -> bool:
    """True if two folders have a generator's name in two spellings."""
    known = (generator for suite in SUITES for generator in suite.generators)
    return spelled(one) == spelled(other) != "" or any(k.answers_to(one) and k.answers_to(other) for k in known)


def foreign(tested: Iterable[str]) -> list[str]:
    """A sentence for each suite with tested generators under its name that it does not have."""
    notes = []
    for suite in SUITES:
        own = [inner for known, inner in map(parted, sorted(tested)) if known == suite.name]
        if others := [name for name in own if not suite.generator(name) and not is_pool(full_name(suite.name, name))]:
            notes.append(
                f"{', '.join(others[:FEW])} count as generators of {suite.name} and enter its means, which has no such "
                f"generator: put the suite into a folder of its own name beside train/, and others into test/."
            )
    return notes


def _told_apart(name: str, other: str) -> str:
    """A name; with its signs as numbers where the other one looks the same."""
    look = [unicodedata.normalize("NFC", each) for each in (name, other)]
    return ascii(name) if name != other and look[0] == look[1] else name


def unseen_by_accident(trained: Collection[str], tested: Collection[str]) -> list[str]:
    """A sentence for each tested generator that counts as unseen though training has its name, and one if all do.

    trained, tested: names in manifests of generators with fakes there.
    """
    unseen = [name for name in sorted(tested) if not is_seen(name, trained)]
    notes = [
        f"{_told_apart(name, twin)} counts as unseen, though {_told_apart(twin, name)} in train is the same generator "
        f"by its name: call both folders alike, or its images enter the means over unseen generators."
        for name in unseen
        for twin in sorted(trained)
        if is_same(parted(name)[1], parted(twin)[1])
    ]
    if trained and tested and len(unseen) == len(tested):
        few, others = sorted(tested)[:FEW], len(tested) - FEW
        notes.append(
            f"No tested generator was trained on: training has {', '.join(sorted(trained))}, tested are "
            f"{', '.join(few)}{f' and {others} more' if others > 0 else ''}, and every mean is one over unseen "
            f"generators. If a folder of train/ is a class or another name of a tested one, give it that name."
        )
    return notes
