"""Commands of the pipeline: its stages, parameters, profiles, reports and their comparison."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dgs.commands import Json, ParamsFile, app, prepared, say, show
from dgs.errors import UserError


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="sources, prepare, train, evaluate or gradient_angles")],
    method: Annotated[str | None, typer.Option(help="for train: which method")] = None,
    params: ParamsFile = None,
    as_json: Json = False,
) -> None:
    """Run one pipeline stage: its notebook through papermill; sources: check, and write what stages run."""
    from dgs.params import load_params
    from dgs.pipeline import check_stage, run_stage
    from dgs.sources import SOURCES, write_sources

    if name != SOURCES:
        check_stage(name)
    if (name == "train") != (method is not None):
        raise UserError(
            "Expected --method for the stage train and for no other. Give it there, leave it out elsewhere."
        )
    label = write_sources(params, say).name if name == SOURCES else run_stage(name, method, params)
    show(as_json, {"stage": name, "label": label, "results": f"results/{load_params().profile}"})


@app.command()
def train(
    method: Annotated[str, typer.Argument(help="which method")],
    seed: Annotated[int, typer.Option(min=0, help="which seed")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for the checkpoint; default below scratch/")] = None,
    profile: Annotated[str | None, typer.Option(help="whose parameters and prepared data; default mini")] = None,
    as_json: Json = False,
) -> None:
    """Train one seed without a notebook, alone or as one of the processes that torchrun starts."""
    from dgs.model.methods.registry import get_method
    from dgs.model.runs import train_by_torchrun

    get_method(method)
    params, workspace, prepared_folder = prepared(profile)
    folder = out or workspace.build("train", method)
    with workspace.unfinished(f"train-{method}-{seed}") as unfinished:
        first = train_by_torchrun(method, seed, params, workspace.root, prepared_folder, folder.resolve(), unfinished)
    if first:
        made = str(folder / f"seed-{seed}")
        show(as_json, {"checkpoint": made, "method": method, "seed": seed}, made)


@app.command()
def check(params: ParamsFile = None, as_json: Json = False) -> None:
    """Check a parameter file, and that the folders and files it names are there (the pipeline's first stage does)."""
    from dgs.profiles import check_file

    check_file(params, say)
    show(as_json, {"checked": str(params or "params.yaml")})


@app.command("params")
def show_params(
    method: Annotated[str | None, typer.Argument(help="as this method trains; default: as they are given")] = None,
    profile: Annotated[str | None, typer.Option(help="whose; default DGS_PROFILE's, or params.yaml's")] = None,
    as_json: Json = False,
) -> None:
    """Print the parameters in force and where each comes from: params.yaml, the profile, `tuned`, or the method."""
    from dgs.profiles import numbers_in_force

    for row in numbers_in_force(method, profile or os.environ.get("DGS_PROFILE") or None):
        show(as_json, row, f"{row['name']}\t{json.dumps(row['value'])}\t{row['source']}")


@app.command()
def profile(
    name: Annotated[str, typer.Argument(help="mini, or a file profiles/NAME.yaml")], as_json: Json = False
) -> None:
    """Write a profile's own pipeline (profiles/NAME/dvc.yaml) and print its path."""
    from dgs.profiles import write_profile_pipeline
    from dgs.workspace import find_root

    pipeline = write_profile_pipeline(name).relative_to(find_root()).as_posix()
    show(as_json, {"profile": name, "pipeline": pipeline}, pipeline)


@app.command()
def report(
    name: Annotated[str | None, typer.Argument(help="profile; default: that of params.yaml")] = None,
    from_scores: Annotated[
        bool, typer.Option("--from-scores", help="instead: make tables and REPORT.md anew from scores.parquet")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a profile's executed notebooks and report as web pages that load nothing from outside; print the index.

    With --from-scores nothing is trained or evaluated: detection.csv, differences.csv, verdicts.csv, metrics.json and
    REPORT.md in results/<profile>/ are made anew from its scores.parquet, and their paths printed.
    """
    from dgs.params import load_params
    from dgs.workspace import find_root

    root = find_root()
    if from_scores:
        from dgs.analysis.from_scores import renew

        for path in renew(root, load_params(name).profile):
            written = path.relative_to(root).as_posix()
            show(as_json, {"written": written}, written)
        return
    from dgs.html_report import write_pages

    index = write_pages(root, load_params(name).profile).relative_to(root).as_posix()
    show(as_json, {"index": index}, index)


@app.command()
def verify(
    committed: Annotated[Path, typer.Argument(help="results folder to compare against")],
    reproduced: Annotated[Path, typer.Argument(help="results folder just made")],
    tolerance: Annotated[float, typer.Option(help="in rates, as a fraction")] = 0.01,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="compare its results alone; may be repeated")] = None,
    as_json: Json = False,
) -> None:
    """Compare two results folders: counts exactly, rates within the tolerance; exit 1 if something moved."""
    from dgs.analysis.verify import compare_results, rounding_notes

    for note in rounding_notes(committed, reproduced):
        say(f"note: {note}")
    moved = compare_results(committed, reproduced, tolerance, seed or None)
    for line in moved:
        say(f"moved: {line}")
    say(f"{reproduced}: {'differs from' if moved else 'reproduces'} {committed} (rates within {tolerance:.3f}).")
    show(as_json, {"reproduces": not moved, "moved": moved})
    if moved:
        raise typer.Exit(1)
