"""An audit's result as Markdown: a table a check, its takeaway above it, per cent with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dgs.stats import percent_text, rounded_text
from minibench.audit import CONTENT, LEVEL
from minibench.contact_sheets import write_sheets
from minibench.near_duplicates import QUANTILES
from minibench.trivial_detectors import CUES, TRACES


def markdown(result: dict[str, Any]) -> str:
    """The report (audit.md.j2) on what `audit.audit` found."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {
        "cell": _cell, "difference": _difference, "listed": _listed, "percent": percent_text, "rounded": _rounded,
    }  # fmt: skip
    templates.globals |= {"above_chance": _above_chance, "aligned": lambda columns: "| --- |" + " ---: |" * columns}
    return templates.get_template("audit.md.j2").render(
        **result, attributes=CONTENT, level=LEVEL, quantiles=QUANTILES, traces=TRACES
    )


def write_report(result: dict[str, Any], folder: Path, out: Path) -> None:
    """audit.json, audit.md and contact sheets of the benchmark in `folder`, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "audit.md").write_text(markdown(result), encoding="utf-8")
    write_sheets(folder, out)


def _rounded(value: float | str, digits: int = 1) -> str:
    return value if isinstance(value, str) else rounded_text(value, digits)


def _cell(ends: dict[str, float]) -> str:
    return f"{percent_text(ends['mean'])} [{percent_text(ends['low'])}, {percent_text(ends['high'])}]"


def _difference(row: dict[str, float]) -> str:
    p = f"p {row['p']:.2g}"
    return f"{rounded_text(row['difference'], 2, sign=True)}, {p}" if "difference" in row else p


def _listed(names: Iterable[str], found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(found[name]['test_mean'])}" for name in names)


def _above_chance(found: dict[str, Any]) -> list[str]:
    """Controls that should be at chance, and of which the mean over test generators is not."""
    return [name for name in CUES if not found[name]["test_mean"]["low"] <= 0.5 <= found[name]["test_mean"]["high"]]
