"""How well a trivial rule on a file's format, size or JPEG quality tells real from fake: its balanced accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

LIMIT = 0.6  # balanced accuracy above which a rule is worth a warning
# Kolmogorov and Smirnov: two samples of one distribution differ by CHANCE * sqrt(1/n + 1/m) once in a thousand.
# With fewer than 8 images of each label nothing is beyond chance.
CHANCE = 1.95


@dataclass(frozen=True)
class Rule:
    """A rule in words, its balanced accuracy (0.5 to 1), and whether that is above LIMIT and beyond chance."""

    words: str
    accuracy: float
    suspicious: bool


def _share(counts: Counter[Any], chosen: Callable[[Any], bool]) -> float:
    return sum(count for value, count in counts.items() if chosen(value)) / counts.total()


def _rule(real: Counter[Any], fake: Counter[Any], words: str, chosen: Callable[[Any], bool]) -> Rule:
    """The rule that calls the `chosen` values fake, or its opposite if that is better."""
    apart = _share(fake, chosen) - _share(real, chosen)
    accuracy = (1 + abs(apart)) / 2
    chance = CHANCE * math.sqrt(1 / real.total() + 1 / fake.total())
    return Rule(f"{'fake' if apart > 0 else 'real'} if {words}", accuracy, accuracy > LIMIT and abs(apart) > chance)


def by_kind(real: Counter[str], fake: Counter[str]) -> Rule:
    """Each value is called what it is more often, by shares: for a few values, as formats are. Both not empty."""
    more = {value for value in fake if fake[value] / fake.total() > real[value] / real.total()}
    return _rule(real, fake, " or ".join(sorted(more)) or "nothing", more.__contains__)


def by_value(real: Counter[Any], fake: Counter[Any], words: Callable[[Any], str]) -> Rule:
    """The best rule of the form "is this one value". Both not empty."""
    apart = {v: fake[v] / fake.total() - real[v] / real.total() for v in sorted(real.keys() | fake.keys())}
    best = max(apart, key=lambda value: (abs(apart[value]), apart[value]))  # of equals, one that says "fake if"
    return _rule(real, fake, words(best), lambda value: value == best)


def by_threshold(real: Counter[int], fake: Counter[int], words: Callable[[int], str]) -> Rule:
    """The best rule of the form "at least so much". Both not empty."""
    best, most, above = min(real.keys() | fake.keys()), 0.0, 0.0
    for value in sorted(real.keys() | fake.keys(), reverse=True):
        above += fake[value] / fake.total() - real[value] / real.total()
        if abs(above) > most:
            best, most = value, abs(above)
    return _rule(real, fake, words(best), lambda value: value >= best)


def best_of(*rules: Rule) -> Rule:
    """The most accurate rule, the first of equals."""
    return max(rules, key=lambda rule: rule.accuracy)


def counted_by(counts: Counter[Any], key: Callable[[Any], Hashable]) -> Counter[Any]:
    """The counts of what values become: sizes counted by their pixels."""
    summed: Counter[Any] = Counter()
    for value, count in counts.items():
        summed[key(value)] += count
    return summed
