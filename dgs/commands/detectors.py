"""Commands of trained detectors, and of the towers below them: score, export, import, tower."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dgs.commands import Json, app, say, show
from dgs.errors import UserError, printable

COLUMNS = ("path", "probability", "verdict", "error")  # of dgs score --csv


@app.command()
def score(
    paths: Annotated[list[Path], typer.Argument(help="image files, or folders: every file in them is tried")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="checkpoint folder, or hf://OWNER/NAME; default: the newest")
    ] = None,
    engine: Annotated[Literal["torch", "onnx"], typer.Option(help="onnx: of a file that dgs export made")] = "torch",
    explain: Annotated[Path | None, typer.Option(help="new folder for what the model saw of each image")] = None,
    processes: Annotated[int, typer.Option(min=1, help="that share the files, each on its own GPU or cores")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="data as CSV, with a line of names first")] = False,
    max_false_alarm: Annotated[
        float | None, typer.Option(help="promise: at most this share of real images called generated; default 0.05")
    ] = None,
    max_miss: Annotated[
        float | None, typer.Option(help="promise: at most this share of generated images called real; default 0.05")
    ] = None,
    two_way: Annotated[bool, typer.Option("--two-way", help="no verdict is 'unsure', and nothing is promised")] = False,
    stability: Annotated[
        bool, typer.Option("--stability", help="score changed copies too; a verdict that does not hold is 'unsure'")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score images: path, probability that it is generated, verdict. Exit 1 if some could not be read."""
    from dgs.model.judge import Promise
    from dgs.model.scoring import score_files

    if as_csv and as_json:
        raise UserError("Expected --csv or --json, found both. Leave one of them out.")
    names = [*COLUMNS, "stable"] if stability else [*COLUMNS]
    failed, table = 0, csv.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    rows = score_files(
        paths,
        checkpoint,
        say,
        explain=explain,
        processes=processes,
        engine=engine,
        promise=Promise(max_false_alarm, max_miss, two_way),
        stability=stability,
    )
    for number, row in enumerate(rows):
        failed += "error" in row
        if as_csv:
            if number == 0:
                table.writeheader()
            table.writerow(row)
            sys.stdout.flush()
            continue
        columns = ["-", row["error"]] if "error" in row else [f"{row['probability']:.4f}", row["verdict"]]
        columns += [row["stable"]] if "stable" in row else []
        show(as_json, row, "\t".join([printable(row["path"]), *columns]))
    if failed:
        raise typer.Exit(1)


@app.command()
def selfcheck(
    checkpoint: Annotated[
        Path | None, typer.Option(help="checkpoint folder, or hf://OWNER/NAME; default: the newest")
    ] = None,
    engine: Annotated[Literal["torch", "onnx"], typer.Option(help="onnx: of a file that dgs export made")] = "torch",
    as_json: Json = False,
) -> None:
    """Score ten stored pictures and compare with the logits that the checkpoint keeps. Exit 1: they differ."""
    from dgs.model.detector import Detector, newest_checkpoint
    from dgs.model.selfcheck import TOLERANCE, compare
    from dgs.workspace import find_root

    folder = checkpoint or newest_checkpoint(find_root())
    rows = compare(Detector.load(folder, engine=engine))
    for row in rows:
        numbers = f"{row['stored']:.4f}\t{row['here']:.4f}\t{row['difference']:+.4f}"
        show(as_json, row, f"{row['picture']}\t{numbers}\t{'same' if row['same'] else 'differs'}")
    same = sum(row["same"] for row in rows)
    say(f"{folder}: {same} of {len(rows)} logits are within {TOLERANCE} of those in training.")
    if same < len(rows):
        raise typer.Exit(1)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="where it is made: for its owner alone")] = False,
    as_json: Json = False,
) -> None:
    """Put a checkpoint on the Hugging Face hub; print its address, which --checkpoint takes."""
    from dgs.model import hub

    address = hub.push(checkpoint, name, private)
    show(as_json, {"address": address}, address)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    out: Annotated[Path, typer.Option(help="file *.onnx to make")],
    int8: Annotated[bool, typer.Option("--int8", help="multiply in 8 bits: faster, and some verdicts differ")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as one ONNX file for dgs score --engine onnx, and compare the two."""
    from dgs.model.onnx_export import export_checkpoint

    made, text = export_checkpoint(checkpoint, out, int8)
    show(as_json, made, text)


@app.command("import-release")
def import_release(
    step2: Annotated[Path, typer.Argument(help="stage-2 file of the authors' release (a stage-1 file: a probe)")],
    out: Annotated[Path, typer.Option(help="checkpoint folder to make")],
    step1: Annotated[Path | None, typer.Option(help="stage-1 file, to check that both belong together")] = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint of the authors' release into a checkpoint folder."""
    from dgs.model.checkpoint import import_release as convert

    made = convert(step2, step1, out=out)
    adapters = f", adapters of rank {made['rank']}, {'merged' if made['merged'] else 'not merged'}"
    text = f"{out}: stage {made['stage']}, {made['parameters']:,} numbers{adapters if made['rank'] else ''}"
    show(as_json, made, text)


@app.command()
def tower(
    name: Annotated[str | None, typer.Argument(help="of a tower, such as clip-vit-b16")] = None,
    out: Annotated[Path | None, typer.Option(help="new folder, for model.clip")] = None,
    wheel: Annotated[Path | None, typer.Option(help="the package's file, if it was downloaded before")] = None,
    archive: Annotated[Path | None, typer.Option(help="OpenAI's own file of a CLIP (*.pt), to convert")] = None,
    compare: Annotated[
        tuple[str, str, Path] | None,
        typer.Option(metavar="A B IMAGES", help="towers: folders, or NAME:TAG, its weights; a folder of images"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a tower from what the package index carries or from OpenAI's own file; or compare two towers."""
    from dgs.analysis.tower_distance import compare_towers, described
    from dgs.model.archive import convert_archive
    from dgs.model.tower import TOWERS, build_tower

    asked = [what is not None for what in (name, archive, compare)]
    if sum(asked) != 1 or (out is None) != (compare is not None) or (wheel is not None and name is None):
        raise UserError(
            f"Expected a tower and --out, as in dgs tower {next(iter(TOWERS))} --out DIR; --archive and --out; or "
            f"--compare alone; found another set of these. Give one of the three."
        )
    if compare is not None:
        found = compare_towers(*compare, say)
        show(as_json, found, described(found))
        return
    assert out is not None
    if archive is not None:
        whole = convert_archive(archive, out)
        show(as_json, whole, f"{out}: {whole['numbers']:,} numbers of {archive}, image and text side, for model.clip")
        return
    assert name is not None
    made = build_tower(name, out, wheel)
    again = made["rounding"]["as_much_again"]
    text = (
        f"{out}: {made['architecture']} of {made['package']}=={made['version']}, {made['numbers']:,} numbers, no text "
        f"side; as much rounding again leaves a cosine of {again['cosine_mean']:.4f} on average, "
        f"{again['cosine_min']:.4f} at least, on made-up images"
    )
    show(as_json, made, text)
