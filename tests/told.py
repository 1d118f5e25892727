"""Numbers as the documents print them, from the committed results."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from dgs.analysis.study import Condition, read_condition
from dgs.stats import Interval, paired_difference, rounded_text, seed_interval

ROOT = Path(__file__).parent.parent
ACCURACY, PRECISION, WORST = "balanced_acc_unseen", "ap_unseen", "worst_generator_balanced_acc"
SEEN, ZERO_SHOT = "balanced_acc_seen", "zero_shot_kept"


@cache
def condition(name: str) -> Condition:
    """A folder of results/ with its further parts."""
    return read_condition(ROOT, name)


def value(name: str, method: str, metric: str = ACCURACY) -> Interval:
    """Per cent, over seeds."""
    return seed_interval(100 * condition(name).of(method, metric).to_numpy())


def gap(name: str, method: str, other: str, metric: str = ACCURACY) -> Interval:
    """`method` minus `other` in points, paired by seed."""
    return condition(name).gap(method, other, metric)


def change(name: str, other: str, method: str, minus: str | None = None, metric: str = ACCURACY) -> Interval:
    """`method` (or the difference of two) under one condition minus the same under another, paired by seed."""
    both = []
    for each in (name, other):
        run = condition(each).of(method, metric)
        both.append(run if minus is None else run - condition(each).of(minus, metric))
    paired = pd.concat(both, axis=1, join="inner").to_numpy(dtype=float)
    return paired_difference(*(100 * paired.T))


def number(amount: float, digits: int = 1, sign: bool = False) -> str:
    """As `rounded_text` rounds, with a plain minus; what prints as zero has no sign."""
    shown = rounded_text(amount, digits, sign).replace("−", "-")
    return shown.lstrip("+-") if float(shown) == 0 else shown


def ends(interval: Interval, digits: int = 1) -> str:
    """ "[0.3, 1.2]", with signs where zero lies between; an end has as many digits as tell it from zero."""
    shown = []
    for end in interval[1:]:
        needed = digits
        while end and float(number(end, needed)) == 0 and needed < 4:
            needed += 1
        shown.append(number(end, needed, sign=interval.spans_zero))
    return f"[{shown[0]}, {shown[1]}]"


def told(interval: Interval, digits: int = 1, sign: bool = True) -> str:
    """ "+0.8 [0.3, 1.2]"."""
    return f"{number(interval.mean, digits, sign)} {ends(interval, digits)}"


def section(document: str, heading: str) -> list[str]:
    """The lines below a heading, up to the next."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    start = lines.index(heading) + 1
    length = next((n for n, line in enumerate(lines[start:]) if line.startswith("## ")), len(lines) - start)
    return lines[start : start + length]


def tables(document: str, heading: str) -> list[list[list[str]]]:
    """The tables below a heading, each its rows of cells; the header first, the line below it left out."""
    found: list[list[list[str]]] = []
    before = ""
    for line in map(str.strip, section(document, heading)):
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not before.startswith("|"):
                found.append([])
            if set(line) - set("|-: "):
                found[-1].append(cells)
        before = line
    return found


def text(document: str) -> str:
    """A document on one line, so that a sentence is found across line breaks."""
    return " ".join((ROOT / document).read_text(encoding="utf-8").split())
