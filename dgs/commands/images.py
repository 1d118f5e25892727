"""Commands of folders of images: caption, list, check and match."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dgs.commands import Json, app, say, show
from dgs.data.captions import BLIP
from dgs.errors import UserError, printable


@app.command()
def caption(
    root: Annotated[Path, typer.Argument(help="folder of images; where it has 0_real and 1_fake, those in them")],
    out: Annotated[Path | None, typer.Option(help="JSON-lines file to add to; default ROOT/captions.jsonl")] = None,
    model: Annotated[str, typer.Option(help="BLIP's name, or a local folder")] = BLIP,
    captions: Annotated[Path | None, typer.Option(help="your own file: only say how far it covers ROOT")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images a batch")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or another of torch's")] = "auto",
    as_json: Json = False,
) -> None:
    """Caption images by BLIP, going on where an earlier run stopped; exit 1 if images and captions do not match."""
    from tqdm import tqdm

    from dgs.data.captioning import caption_folder, check_own, complaints, load_blip

    say = partial(tqdm.write, file=sys.stderr)  # above the progress bar, not through it
    if captions is not None and out is not None:
        raise UserError("Expected --captions or --out, found both. --captions writes nothing; leave one of them out.")
    file = captions or out or root / "captions.jsonl"
    if captions is not None:
        coverage = check_own(root, captions, say)
    else:
        coverage = caption_folder(root, file, lambda: load_blip(model, device, say), say, batch_size)
    for line in complaints(coverage, root):
        say(line)
    text = (
        f"{file}: {coverage.images} images, {coverage.distinct} distinct; {coverage.captioned} captioned, "
        f"{coverage.unreadable} unreadable, {coverage.missing} missing"
    )
    show(as_json, {"file": str(file), **asdict(coverage)}, text)
    if not coverage.complete:
        raise typer.Exit(1)


@app.command()
def manifest(
    root: Annotated[Path, typer.Argument(help="folder of suites, one suite, or train, val and test folders")],
    check: Annotated[bool, typer.Option("--check", help="read every image and say what is wrong")] = False,
    as_json: Json = False,
) -> None:
    """List the images of a folder by generator, with the paper's column; exit 1 if something is amiss."""
    from dgs.data.checks import check as check_images
    from dgs.data.checks import columns, heading, listing
    from dgs.data.tree import scan_tree

    tree = scan_tree(root)
    report = check_images(tree, os.cpu_count() or 1) if check else listing(tree)
    if not as_json:
        print("\t".join(heading(check)))
    for row in report.rows:
        show(as_json, {"kind": "images", **row}, "\t".join(columns(row)))
    for finding in report.findings:
        show(as_json, finding.record(), finding.text())
    for note in report.notes:
        say(printable(note))
    if report.findings:
        raise typer.Exit(1)


@app.command("match")
def match_images(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder as for dgs manifest")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="new folder for the copy")],
    size: Annotated[int | None, typer.Option(min=8, help="px of a side; default: so that 95 % fit")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="of the JPEGs")] = 90,
    as_json: Json = False,
) -> None:
    """Copy images so that formats tell nothing: crops of one size, one encoding; exit 1 if some cannot be read."""
    from dgs.data.checks import PROPERTIES, accuracies
    from dgs.data.matching import match
    from dgs.data.suites import full_name
    from dgs.data.tree import scan_tree

    found = match(scan_tree(source), target, size, quality, os.cpu_count() or 1)
    if not as_json:
        print("\t".join(["place", "generator", "real", "fake", "left out", *(f"by {name}" for name in PROPERTIES)]))
    for row in found.rows:
        both = zip(accuracies(row["before"]), accuracies(row["after"]), strict=True)
        counts = [str(row[name]) for name in ("real", "fake", "left_out")]
        cells = [full_name(row["suite"], row["split"]), printable(row["generator"]), *counts, *map(" -> ".join, both)]
        show(as_json, {"kind": "images", **row}, "\t".join(cells))
    for each in found.left_out:
        show(as_json, {"kind": "left_out", **each}, f"left out: {printable(each['path'])}: {each['why']}")
    show(as_json, {"kind": "copy", **found.summary})
    for note in found.notes:
        say(printable(note))
    if found.unreadable:
        raise typer.Exit(1)
