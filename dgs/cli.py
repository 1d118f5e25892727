"""dgs on the command line: thin shells over the package."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dgs.data.captions import BLIP
from dgs.errors import UserError, printable

if TYPE_CHECKING:
    from dgs.params import Params
    from dgs.workspace import Workspace


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class _ForUsers(TyperGroup):
    """A user's mistake in any command becomes one sentence on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say(f"dgs: {error}")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_ForUsers,
    help="Distillation-guided gradient surgery for AI-generated image detection.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
minibench = typer.Typer(help="The embedded benchmark.", no_args_is_help=True)
app.add_typer(minibench, name="minibench")

Json = Annotated[bool, typer.Option("--json", help="data as JSON, one object a line")]
ParamsFile = Annotated[Path | None, typer.Option(help="a complete parameter file; default params.yaml")]
OwnSeeds = Annotated[
    list[int] | None, typer.Option(min=0, help="other than those of the results; may be repeated; default 100")
]
Source = Literal["shipped", "train"]  # of the benchmark's networks
COLUMNS = ("path", "probability", "verdict", "error")  # of dgs score --csv


def _print(as_json: bool, record: dict[str, Any], text: str | None = None) -> None:
    """A command's data on stdout, at once: one JSON object, in ASCII for any terminal; or the text for people."""
    line = json.dumps(record) if as_json else text
    if line is not None:
        print(line, flush=True)


def _prepared(profile: str | None = None) -> tuple[Params, Workspace, Path]:
    """A profile's parameters (default: DGS_PROFILE's, or mini's), its workspace, and what was prepared last there."""
    from dgs.params import load_params
    from dgs.workspace import Workspace

    params = load_params(profile)
    workspace = Workspace.of(params.profile)
    return params, workspace, workspace.find("prepare", made_by="prepare")


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
    label = write_sources(params, _say).name if name == SOURCES else run_stage(name, method, params)
    _print(as_json, {"stage": name, "label": label, "results": f"results/{load_params().profile}"})


@app.command()
def tune(
    methods: Annotated[list[str] | None, typer.Argument(help="default: every method of the registry")] = None,
    seed: OwnSeeds = None,
    rule: Annotated[str, typer.Option(help="val, val_balanced or val_unbiased")] = "val_balanced",
    as_json: Json = False,
) -> None:
    """Try six settings of each method on what was prepared last; print those that do best on validation images.

    A search that was broken off goes on. The table is results/<profile>/tuning.csv; the profile is DGS_PROFILE's.
    """
    from dgs.analysis.tuning import RULES, chosen, rows_of, tune
    from dgs.model.methods.registry import METHODS, get_method

    if rule not in RULES:
        raise UserError(f"Unknown rule '{rule}'. Known: {', '.join(RULES)}.")
    params, workspace, folder = _prepared()
    names = [get_method(name).name for name in methods or METHODS]
    out = workspace.root / "results" / params.profile / "tuning.csv"
    for row in tune(names, params, workspace.root, folder, out, seed or [100]):
        rates = ", ".join(f"{key} {row[key]:.3f}" for key in RULES if key in row)
        _say(f"{row['method']} {row['candidate']}: {rates}")
    found = chosen(rows_of(out, workspace.root, folder), rule)
    lines = [
        f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in own.items())}}}" for name, own in found.items()
    ]
    _print(as_json, found, "\n".join(lines) or None)


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

    params, workspace, folder = _prepared()
    names = [get_method(name).name for name in methods]
    out = workspace.root / "results" / params.profile / "left_out.csv"
    rates = COLUMNS[4:]
    for row in leave_one_generator_out(names, params, workspace.root, folder, out, seed or [100]):
        line = ", ".join(f"{rate} {row[rate]:.3f}" for rate in rates)
        _say(f"{row['method']} without {row['generator']}, seed {row['seed']}: {line}")
    table = rows_of(out, workspace.root, folder)
    for name in names:
        means = table.loc[table["method"] == name, rates].mean().round(6).to_dict()
        line = ", ".join(f"{rate} {value:.3f}" for rate, value in means.items())
        _print(as_json, {"method": name, **{str(rate): value for rate, value in means.items()}}, f"{name}: {line}")


@app.command()
def ceiling(as_json: Json = False) -> None:
    """Say what a linear head on the frozen tower reaches that is trained on images of every test generator.

    On what was prepared last; the table is results/<profile>/ceiling.csv, the profile is DGS_PROFILE's.
    """
    from studies.ceiling import write_ceiling

    params, workspace, folder = _prepared()
    out = workspace.root / "results" / params.profile / "ceiling.csv"
    means = write_ceiling(params, workspace.root, folder, out)
    table = out.relative_to(workspace.root).as_posix()
    text = ", ".join(f"{100 * mean:.1f} % on {head}" for head, mean in means.items())
    _print(as_json, {"table": table, "unseen": means}, f"unseen generators: {text} ({table})")


@app.command()
def study(
    profiles: Annotated[list[str] | None, typer.Argument(help="to compare; default: every study-* there is")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods over several profiles: REPORT.md, forest.png, table.csv and params.yaml in results/study/.

    What results/study-*/ hold goes into results/study/*.parquet first, and the tables of docs/findings.md are brought
    up to date. Of profiles that are named, in results/<the first of them>/study/, and no more than that.
    """
    from dgs.workspace import find_root
    from studies.findings import write_study_and_findings

    root = find_root()
    report = write_study_and_findings(root, profiles or []).relative_to(root).as_posix()
    _print(as_json, {"report": report}, report)


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
    params, workspace, prepared_folder = _prepared(profile)
    folder = out or workspace.build("train", method)
    with workspace.unfinished(f"train-{method}-{seed}") as unfinished:
        first = train_by_torchrun(method, seed, params, workspace.root, prepared_folder, folder.resolve(), unfinished)
    if first:
        made = str(folder / f"seed-{seed}")
        _print(as_json, {"checkpoint": made, "method": method, "seed": seed}, made)


@app.command()
def check(params: ParamsFile = None, as_json: Json = False) -> None:
    """Check a parameter file, and that the folders and files it names are there (the pipeline's first stage does)."""
    from dgs.profiles import check_file

    check_file(params, _say)
    _print(as_json, {"checked": str(params or "params.yaml")})


@app.command("params")
def show_params(
    method: Annotated[str | None, typer.Argument(help="as this method trains; default: as they are given")] = None,
    profile: Annotated[str | None, typer.Option(help="whose; default DGS_PROFILE's, or params.yaml's")] = None,
    as_json: Json = False,
) -> None:
    """Print the parameters in force and where each comes from: params.yaml, the profile, `tuned`, or the method."""
    from dgs.profiles import numbers_in_force

    for row in numbers_in_force(method, profile or os.environ.get("DGS_PROFILE") or None):
        _print(as_json, row, f"{row['name']}\t{json.dumps(row['value'])}\t{row['source']}")


@app.command()
def profile(
    name: Annotated[str, typer.Argument(help="mini, or a file profiles/NAME.yaml")], as_json: Json = False
) -> None:
    """Write a profile's own pipeline (profiles/NAME/dvc.yaml) and print its path."""
    from dgs.profiles import write_profile_pipeline
    from dgs.workspace import find_root

    pipeline = write_profile_pipeline(name).relative_to(find_root()).as_posix()
    _print(as_json, {"profile": name, "pipeline": pipeline}, pipeline)


@app.command()
def report(
    name: Annotated[str | None, typer.Argument(help="profile; default: that of params.yaml")] = None,
    as_json: Json = False,
) -> None:
    """Write a profile's executed notebooks and report as web pages that load nothing from outside; print the index."""
    from dgs.html_report import write_pages
    from dgs.params import load_params
    from dgs.workspace import find_root

    root = find_root()
    index = write_pages(root, load_params(name).profile).relative_to(root).as_posix()
    _print(as_json, {"index": index}, index)


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
        _say(f"note: {note}")
    moved = compare_results(committed, reproduced, tolerance, seed or None)
    for line in moved:
        _say(f"moved: {line}")
    _say(f"{reproduced}: {'differs from' if moved else 'reproduces'} {committed} (rates within {tolerance:.3f}).")
    _print(as_json, {"reproduces": not moved, "moved": moved})
    if moved:
        raise typer.Exit(1)


@app.command()
def score(
    paths: Annotated[list[Path], typer.Argument(help="image files, or folders: every file in them is tried")],
    checkpoint: Annotated[Path | None, typer.Option(help="checkpoint folder; default: the pipeline's newest")] = None,
    engine: Annotated[Literal["torch", "onnx"], typer.Option(help="onnx: of a file that dgs export made")] = "torch",
    explain: Annotated[Path | None, typer.Option(help="new folder for what the model saw of each image")] = None,
    processes: Annotated[int, typer.Option(min=1, help="that share the files, each on its own GPU or cores")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="data as CSV, with a line of names first")] = False,
    as_json: Json = False,
) -> None:
    """Score images: path, probability that it is generated, verdict. Exit 1 if some could not be read."""
    from dgs.model.scoring import score_files

    if as_csv and as_json:
        raise UserError("Expected --csv or --json, found both. Leave one of them out.")
    failed, table = 0, csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    rows = score_files(paths, checkpoint, _say, explain=explain, processes=processes, engine=engine)
    for number, row in enumerate(rows):
        failed += "error" in row
        if as_csv:
            if number == 0:
                table.writeheader()
            table.writerow(row)
            sys.stdout.flush()
            continue
        columns = ["-", row["error"]] if "error" in row else [f"{row['probability']:.4f}", row["verdict"]]
        _print(as_json, row, "\t".join([printable(row["path"]), *columns]))
    if failed:
        raise typer.Exit(1)


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
    _print(as_json, made, text)


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
        _say(line)
    text = (
        f"{file}: {coverage.images} images, {coverage.distinct} distinct; {coverage.captioned} captioned, "
        f"{coverage.unreadable} unreadable, {coverage.missing} missing"
    )
    _print(as_json, {"file": str(file), **asdict(coverage)}, text)
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
        _print(as_json, {"kind": "images", **row}, "\t".join(columns(row)))
    for finding in report.findings:
        _print(as_json, finding.record(), f"{finding.kind}: {finding.message}")
    for note in report.notes:
        _say(note)
    if report.findings:
        raise typer.Exit(1)


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
    _print(as_json, made, text)


@minibench.command()
def build(
    out: Annotated[Path, typer.Option(help="folder to make")],
    seed: Annotated[int, typer.Option(min=0, help="of the scenes; another seed is a disjoint benchmark")],
    rho: Annotated[float | None, typer.Option(help="keep only this training set; default all")] = None,
    training: Annotated[Literal["fresh", "shipped"], typer.Option(help="shipped: only the test set is new")] = "fresh",
    clip: Annotated[Source, typer.Option(help="train: pre-train it anew, resumable, an hour on one core")] = "shipped",
    generators: Annotated[Source, typer.Option(help="train: train them anew, 20 minutes on one core")] = "shipped",
    network_seed: Annotated[int, typer.Option(min=0, help="of the networks that are trained anew")] = 0,
    as_json: Json = False,
) -> None:
    """Make the embedded benchmark from seeds."""
    from minibench import pretrain, train_generators
    from minibench.build import build as build_minibench

    recipes = pretrain.Recipe(seed=network_seed), train_generators.Recipe(seed=network_seed)
    own: dict[str, Any] = {"weights": generators, "training": training, "workers": os.cpu_count() or 1}
    own |= dict(zip(("clip_recipe", "generator_recipe"), recipes, strict=True))
    made = build_minibench(out, seed, rho, clip, **own)
    _print(as_json, {"out": str(out), **{key: made[key] for key in ("seed", "rhos", "counts", "content_hash")}})


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
    _print(as_json, result, markdown(result))


def main() -> None:
    """Entry point of the console script; file names that stdout cannot encode are printed escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
