"""Commands of the studies and of the embedded benchmark; their tools are loaded when one is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dgs.commands import Json, app, minibench, prepared, say, show
from dgs.errors import UserError

OwnSeeds = Annotated[
    list[int] | None, typer.Option(min=0, help="other than those of the results; may be repeated; default 100")
]
Source = Literal["shipped", "train"]  # of the benchmark's networks


@app.command()
def tune(
    methods: Annotated[list[str] | None, typer.Argument(help="default: every method of the registry")] = None,
    seed: OwnSeeds = None,
    rule: Annotated[str, typer.Option(help="val, val_balanced or val_unbiased")] = "val_balanced",
    rate: Annotated[
        list[float] | None,
        typer.Option("--lr", help="try this learning rate, and no other setting than those given so; may be repeated"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try six settings of each method on what was prepared last; print those that do best on validation images.

    A search that was broken off goes on. The table is results/<profile>/tuning.csv; the profile is DGS_PROFILE's.
    """
    from dgs.analysis.tuning import RULES, chosen, rows_of, tune, weighed_note
    from dgs.data.prepared import load_training
    from dgs.model.methods.registry import METHODS, get_method

    if rule not in RULES:
        raise UserError(f"Unknown rule '{rule}'. Known: {', '.join(RULES)}.")
    params, workspace, folder = prepared()
    names = [get_method(name).name for name in methods or METHODS]
    if note := weighed_note(load_training(folder, workspace.root)):
        say(note)
    out = workspace.root / "results" / params.profile / "tuning.csv"
    for row in tune(names, params, workspace.root, folder, out, seed or [100], rate or []):
        rates = ", ".join(f"{key} {row[key]:.3f}" for key in RULES if key in row)
        say(f"{row['method']} {row['candidate']}: {rates}")
    found = chosen(rows_of(out, workspace.root, folder), rule)
    lines = [
        f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in own.items())}}}" for name, own in found.items()
    ]
    show(as_json, found, "\n".join(lines) or None)


@app.command()
def left_out(
    methods: Annotated[list[str], typer.Argument(help="of the registry")],
    seed: OwnSeeds = None,
    as_json: Json = False,
) -> None:
    """Train methods without one generator, each in turn, and test them on it: no test image is looked at.

    On what was prepared last, with the profile's settings. A run that was broken off goes on. The table is
    results/<profile>/left_out.csv; the profile is DGS_PROFILE's.
    """
    from dgs.analysis.tuning import rows_of
    from dgs.model.methods.registry import get_method
    from studies.leave_one_generator_out import COLUMNS, leave_one_generator_out

    params, workspace, folder = prepared()
    names = [get_method(name).name for name in methods]
    out = workspace.root / "results" / params.profile / "left_out.csv"
    rates = COLUMNS[4:]
    for row in leave_one_generator_out(names, params, workspace.root, folder, out, seed or [100]):
        line = ", ".join(f"{rate} {row[rate]:.3f}" for rate in rates)
        say(f"{row['method']} without {row['generator']}, seed {row['seed']}: {line}")
    table = rows_of(out, workspace.root, folder)
    for name in names:
        means = table.loc[table["method"] == name, rates].mean().round(6).to_dict()
        line = ", ".join(f"{rate} {value:.3f}" for rate, value in means.items())
        show(as_json, {"method": name, **{str(rate): value for rate, value in means.items()}}, f"{name}: {line}")


@app.command()
def ceiling(as_json: Json = False) -> None:
    """Say what a linear head on the frozen tower reaches that is trained on images of every test generator.

    On what was prepared last; the table is results/<profile>/ceiling.csv, the profile is DGS_PROFILE's.
    """
    from studies.ceiling import write_ceiling

    params, workspace, folder = prepared()
    out = workspace.root / "results" / params.profile / "ceiling.csv"
    means = write_ceiling(params, workspace.root, folder, out)
    table = out.relative_to(workspace.root).as_posix()
    text = ", ".join(f"{100 * mean:.1f} % on {head}" for head, mean in means.items())
    show(as_json, {"table": table, "unseen": means}, f"unseen generators: {text} ({table})")


@app.command()
def study(
    profiles: Annotated[list[str] | None, typer.Argument(help="to compare; default: every study-* there is")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods over several profiles: REPORT.md, table.csv, differences.csv and .png in results/study/.

    What results/study-*/ hold goes into results/study/*.parquet first, and the tables of docs/findings.md are brought
    up to date. Of profiles that are named, in results/<the first of them>/study/, and no more than that.
    """
    from dgs.workspace import find_root
    from studies.findings import write_study_and_findings

    root = find_root()
    report = write_study_and_findings(root, profiles or []).relative_to(root).as_posix()
    show(as_json, {"report": report}, report)


@minibench.command()
def build(
    out: Annotated[Path, typer.Option(help="folder to make")],
    seed: Annotated[int, typer.Option(min=0, help="of the scenes; another seed is a disjoint benchmark")],
    rho: Annotated[float | None, typer.Option(help="keep only this training set; default all")] = None,
    training: Annotated[Literal["fresh", "shipped"], typer.Option(help="shipped: only the test set is new")] = "fresh",
    clip: Annotated[Source, typer.Option(help="train: pre-train it anew, resumable, an hour on one core")] = "shipped",
    generators: Annotated[Source, typer.Option(help="train: train them anew, 20 minutes on one core")] = "shipped",
    network_seed: Annotated[int, typer.Option(min=0, help="of the networks that are trained anew")] = 0,
    seen: Annotated[list[str] | None, typer.Option(help="generator of training fakes; may be repeated")] = None,
    as_json: Json = False,
) -> None:
    """Make the embedded benchmark from seeds."""
    from minibench import pretrain, train_generators
    from minibench.build import build as build_minibench

    recipes = pretrain.Recipe(seed=network_seed), train_generators.Recipe(seed=network_seed)
    own: dict[str, Any] = {"weights": generators, "training": training, "workers": os.cpu_count() or 1}
    own |= dict(zip(("clip_recipe", "generator_recipe"), recipes, strict=True)) | ({"seen": seen} if seen else {})
    made = build_minibench(out, seed, rho, clip, **own)
    show(as_json, {"out": str(out), **{key: made[key] for key in ("seed", "rhos", "counts", "content_hash")}})


@minibench.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="a benchmark's folder")],
    out: Annotated[Path | None, typer.Option(help="folder for audit.md, audit.json and contact sheets")] = None,
    as_json: Json = False,
) -> None:
    """Ask what tells fake from real in a benchmark: trivial detectors, statistics, content, near duplicates."""
    from minibench.audit import audit as audit_folder
    from minibench.audit_report import markdown, write_report

    result = audit_folder(folder, progress=True)
    if out is not None:
        write_report(result, folder, out)
    show(as_json, result, markdown(result))


@app.command()
def real(
    out: Annotated[Path | None, typer.Option(help="folder to lay out; default build/real/pictures")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="folder that has the files, clones for example")] = None,
    clone: Annotated[bool, typer.Option("--clone", help="fetch the public repositories by git")] = False,
    manifest: Annotated[Path | None, typer.Option(help="of pictures (CSV); default real/manifest.csv")] = None,
    as_json: Json = False,
) -> None:
    """Lay out the study's real pictures and verify each by its hash; exit 1 if some are missing or different.

    With neither --from nor --clone: only verify.
    """
    from dgs.workspace import find_root
    from real.layout import lay_out
    from real.manifest import FILE, read_manifest

    if clone and source is not None:
        raise UserError("Expected --clone or --from, found both. Leave one of them out.")
    out = out or find_root() / "build/real/pictures"
    found = lay_out(read_manifest(manifest or FILE), out, source, clone)
    show(as_json, found.record(), "\n".join(found.lines()))
    if not found.is_whole:
        raise typer.Exit(1)
