"""Tables of documents that are drawn from results: between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from dgs.analysis.report import markdown_table
from dgs.stats import Interval, rounded_text

BLOCK = re.compile(r"(?<=<!-- table: )([\w-]+) -->\n.*?(?=\n *<!-- end -->)", re.DOTALL)
Cell = Callable[[Any], str]  # of what a row is about
Table = tuple[str, Mapping[str, Any], Mapping[str, Cell]]  # the first column's head, rows, columns


def number(amount: float, digits: int = 1, sign: bool = False) -> str:
    """As `rounded_text` rounds, with a plain minus; what prints as zero has no sign."""
    shown = rounded_text(amount, digits, sign).replace("−", "-")
    return shown.lstrip("+-") if float(shown) == 0 else shown


def told(interval: Interval, digits: int = 1, sign: bool = True) -> str:
    """ "+0.8 [0.3, 1.2]"; an end has as many digits as tell it from zero, and so has a mean between two that are.

    The mean alone where no interval is known, as of one seed.
    """
    if not interval.known:
        return number(interval.mean, digits, sign)

    def shown(value: float, sign: bool) -> str:
        needed = digits
        while value and float(number(value, needed)) == 0 and needed < 4:
            needed += 1
        return number(value, needed, sign)

    ends = [shown(end, interval.spans_zero) for end in interval[1:]]
    mean = number(interval.mean, digits, sign) if interval.spans_zero else shown(interval.mean, sign)
    return f"{mean} [{', '.join(ends)}]"


def drawn(first: str, rows: Mapping[str, Any], columns: Mapping[str, Cell]) -> str:
    """A table: `rows` are label -> what each column's function is given."""
    lines = [[label, *(cell(row) for cell in columns.values())] for label, row in rows.items()]
    return markdown_table([first, *columns], lines)


def current(text: str, tables: Mapping[str, Table]) -> str:
    """A document's text with its tables made anew; they stand as deep as the line of their mark.

    Raises:
        KeyError: a mark names no table.
    """

    def made(found: re.Match[str]) -> str:
        indent = text[text.rfind("\n", 0, found.start()) + 1 : found.start()].partition("<")[0]
        lines = ["", *drawn(*tables[found[1]]).splitlines(), ""]
        return f"{found[1]} -->" + "".join(f"\n{indent}{line}".rstrip(" ") for line in lines)

    return BLOCK.sub(made, text)
