"""The tables of docs/real.md are those that the committed results on real pictures make now."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from real import tables as of_real
from real.tables import DOCUMENTS, kept, rate, tables
from studies.tables import BLOCK, current

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tables_are_current(document: str) -> None:
    """After results changed: python -m real.tables."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert current(text, tables()) == text


def test_every_table_stands_in_a_page_once() -> None:
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    assert sorted(found[1] for page in pages for found in BLOCK.finditer(page)) == sorted(tables())


def test_a_cell_is_its_row_and_a_dash_where_nothing_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"profile": "real", "method": "lora minus probe", "pictures": "unseen", "rate": "auroc", "over": "seeds"}
    study = pd.DataFrame([row | {"n": 3, "mean": 0.0123, "low": -0.01, "high": 0.0346}])
    measures = pd.DataFrame({"method": ["lora"] * 2, "measure": ["cka"] * 2, "after": [0.75, 0.77]})
    monkeypatch.setattr(of_real, "table", lambda name, profile="real": study if name == "study" else measures)
    assert rate("lora minus probe", name="auroc") == "+1.2 [-1.0, +3.5]"
    assert rate("lora minus probe") == rate("pixel_cnn") == kept("pixel_cnn", "cka") == "–"
    assert kept("lora", "cka") == "76.0 [63.3, 88.7]"
