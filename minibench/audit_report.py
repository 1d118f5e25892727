"""An audit's result as Markdown: a table a check, its takeaway above it, per cent with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgs.analysis.report import markdown_table
from dgs.stats import percent_text, rounded_text
from minibench.audit import CONTENT, LEVEL
from minibench.contact_sheets import write_sheets
from minibench.near_duplicates import QUANTILES
from minibench.trivial_detectors import CUES, TRACES


def markdown(result: dict[str, Any]) -> str:
    """The report on what `audit.audit` found."""
    parts = [
        f"# Audit of the benchmark of seed {result['seed']}",
        f"Content hash `{result['content_hash']}`: the images, labels and captions are those that were made.",
        *_counts_text(result["counts"]),
        *_content_text(result["content"]),
        *_statistics_text(result["statistics"]),
    ]
    for name, rows in result["detectors"].items():
        parts += _detectors_text(name, rows)
    return "\n\n".join([*parts, *_duplicates_text(result["near_duplicates"])]) + "\n"


def write_report(result: dict[str, Any], folder: Path, out: Path) -> None:
    """audit.json, audit.md and contact sheets of the benchmark in `folder`, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "audit.md").write_text(markdown(result), encoding="utf-8")
    write_sheets(folder, out)


def _counts_text(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, pack in found.items():
        makers = ", ".join(f"{maker} {n}" for maker, n in pack["generators"].items())
        rows.append([name, str(pack["images"]), str(pack["scenes"]), makers])
    sets = [
        [pack, name, str(part["real"]), str(part["fake"])]
        for pack, some in found.items()
        for name, part in some["sets"].items()
    ]
    return [
        "## Counts",
        markdown_table(["pack", "images", "scenes", "by maker"], rows),
        *([markdown_table(["pack", "set", "real", "fake"], sets)] if sets else []),
    ]


def _content_text(found: dict[str, Any]) -> list[str]:
    drop = found["largest_drop"]
    named = {"retrieval": f"caption R@1 among {found['among']}"}
    measures = [*CONTENT, "retrieval"]
    rows = [[maker, *(_cell(values[name]) for name in measures)] for maker, values in found["makers"].items()]
    return [
        "## Content",
        "What a frozen CLIP names in real and re-synthesised test images (%). The largest loss to a generator is "
        f"{rounded_text(drop['points'])} points ({named.get(drop['measure'], drop['measure'])}, {drop['generator']}).",
        markdown_table(["maker", *(named.get(name, name) for name in measures)], rows),
    ]


def _statistics_text(found: dict[str, Any]) -> list[str]:
    compared = found["compared"]
    names = list(next(iter(compared.values())))
    rows = [[name, *(_difference(some[name]) for some in compared.values())] for name in names]
    return [
        "## Simple statistics",
        f"Standardised mean difference, fake minus real, and p. {found['tests']} tests: {found['below_0.05']} below "
        f"0.05 ({rounded_text(LEVEL * found['tests'])} expected by chance were they independent; those of one column "
        f"or of the shared reals are not), {found['after_bonferroni']} after Bonferroni's correction.",
        markdown_table(["", *compared], rows),
    ]


def _difference(row: dict[str, float]) -> str:
    p = f"p {row['p']:.2g}"
    return f"{rounded_text(row['difference'], 2, sign=True)}, {p}" if "difference" in row else p


def _detectors_text(name: str, found: dict[str, Any]) -> list[str]:
    columns = list(found)
    first = found[columns[0]]
    others = [key for key in first if key not in ("train", "test", "test_mean")]
    rows = [[key, *(percent_text(found[column][key]) for column in columns)] for key in ("train", *others)]
    rows += [[maker, *(_cell(found[column]["test"][maker]) for column in columns)] for maker in first["test"]]
    rows.append(["mean of test", *(_cell(found[column]["test_mean"]) for column in columns)])
    off = [c for c in columns if c in CUES and not _holds_chance(found[c]["test_mean"])]
    finds = [c for c in columns if c in TRACES]
    cues = (
        "Every control that should be at chance is: its mean over test generators is compatible with 50 %."
        if not off
        else f"Should be at chance over test generators and are not: {_listed(off, found)}."
    )
    return [
        f"## Trivial detectors trained on {name}",
        f"Balanced accuracy (%) at probability 0.5. {cues} What may see traces: {_listed(finds, found)}.",
        markdown_table(["judged on", *columns], rows),
    ]


def _listed(names: Sequence[str], found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(found[name]['test_mean'])}" for name in names)


def _holds_chance(ends: dict[str, float]) -> bool:
    return ends["low"] <= 0.5 <= ends["high"]


def _duplicates_text(found: dict[str, Any]) -> list[str]:
    above, same, closest = found["pairs_above"], found["identical_files"], found["closest"]
    if above is None:
        verdict = "Training holds no scene both real and fake, so there is nothing to say what a duplicate looks like."
    else:
        verdict = (
            f"{above['psnr']} pairs are beyond the twins' 1 % quantile in PSNR, {above['cosine']} in cosine "
            f"(scenes that share what captions name), {above['both']} in both."
        )
    rows = [
        [f"{label} ({unit})", *_quantile_cells(some[key], 2 if key == "psnr" else 4)]
        for label, some in (("twins", found["twins"]), ("nearest in training", found["nearest"]))
        for key, unit in (("psnr", "dB"), ("cosine", "cosine"))
    ]
    return [
        "## Near duplicates",
        f"{found['queries']} images of the other packs against {found['training_images']} of training; "
        f"{found['twins']['pairs']} twins. {verdict} The closest pair is at {rounded_text(closest['psnr'])} dB "
        f"(`{closest['query']}`, `{closest['training']}`). Files that occur twice: {same['all']}, "
        f"in two packs: {same['across_packs']}.",
        markdown_table(["", "min", *(f"{round(100 * q)} %" for q in QUANTILES), "max"], rows),
    ]


def _quantile_cells(values: dict[str, float] | None, digits: int) -> list[str]:
    return [rounded_text(v, digits) for v in values.values()] if values else ["–"] * (len(QUANTILES) + 2)


def _cell(ends: dict[str, float]) -> str:
    return f"{percent_text(ends['mean'])} [{percent_text(ends['low'])}, {percent_text(ends['high'])}]"
