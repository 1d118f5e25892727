"""Tables in the documents are those that the committed results make now."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dgs.stats import Interval
from studies.findings import DOCUMENTS, tables
from studies.tables import BLOCK, Table, current, told

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tables_are_current(document: str) -> None:
    """After results changed: dgs study."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert current(text, tables(ROOT)) == text


def test_every_table_stands_in_a_document_once() -> None:
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    assert sorted(found[1] for text in texts for found in BLOCK.finditer(text)) == sorted(tables(ROOT))


def test_a_table_is_made_anew_as_deep_as_its_mark() -> None:
    made_of: dict[str, Table] = {"one": ("a", {"2": ""}, {})}
    text = "- of one:\n\n  <!-- table: one -->\n  | a |\n  | 1 |\n\n  <!-- end -->\n\nEnd.\n"
    made = "- of one:\n\n  <!-- table: one -->\n\n  | a |\n  | --- |\n  | 2 |\n\n  <!-- end -->\n\nEnd.\n"
    assert current(text, made_of) == made == current(made, made_of)
    with pytest.raises(KeyError, match="two"):
        current(text.replace("one -->", "two -->"), made_of)


@pytest.mark.parametrize(
    ("interval", "digits", "text"),
    [
        (Interval(0.75, 0.3, 1.2), 1, "+0.8 [0.3, 1.2]"),
        (Interval(-1.16, -2.28, -0.03), 1, "-1.2 [-2.3, -0.03]"),
        (Interval(0.04, -0.7, 0.0004), 1, "0.0 [-0.7, +0.0004]"),
        (Interval(4.6, -0.049, 8.4), 0, "+5 [-0.05, +8]"),
        (Interval(4.6, math.nan, math.nan), 1, "+4.6"),
    ],
)
def test_an_end_next_to_zero_says_on_which_side_it_is(interval: Interval, digits: int, text: str) -> None:
    assert told(interval, digits) == text
