"""dgs on the command line: thin shells over the package."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from dgs.data.captions import BLIP
from dgs.errors import UserError, printable

app = typer.Typer(
    help="Distillation-guided gradient surgery for AI-generated image detection.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
minibench = typer.Typer(help="The embedded benchmark.", no_args_is_help=True)
app.add_typer(minibench, name="minibench")


class Weights(StrEnum):
    """Where the benchmark's networks come from."""

    shipped = "shipped"
    train = "train"


class Training(StrEnum):
    """Where the benchmark's training and validation images come from."""

    fresh = "fresh"
    shipped = "shipped"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


Json = Annotated[bool, typer.Option("--json", help="data as JSON, one object a line")]


def _print(as_json: bool, record: dict[str, Any], text: str | None = None) -> None:
    """A command's data on stdout, at once: one JSON object, in ASCII for any terminal; or the text for people."""
    line = json.dumps(record) if as_json else text
    if line is not None:
        print(line, flush=True)


def _for_users(command: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake becomes one sentence on stderr and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            _say(f"dgs: {error}")
            raise typer.Exit(2) from None

    return wrapped


@app.command()
@_for_users
def stage(
    name: Annotated[str, typer.Argument(help="sources, prepare, train, evaluate or gradient_angles")],
    method: Annotated[str | None, typer.Option(help="for train: which method")] = None,
    params: Annotated[Path | None, typer.Option(help="a complete parameter file; default params.yaml")] = None,
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
    label = name if method is None else f"{name}-{method}"
    if name == SOURCES:
        write_sources(params, _say)
    else:
        run_stage(name, label, {"method": method} if method else {}, params)
    if as_json:
        _print(as_json, {"stage": name, "label": label, "results": f"results/{load_params().profile}"})


@app.command()
@_for_users
def tune(
    methods: Annotated[list[str] | None, typer.Argument(help="default: every method of the registry")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="of the search, other than those of the results")
    ] = None,
    rule: Annotated[str, typer.Option(help="val, val_balanced or val_unbiased")] = "val_balanced",
    as_json: Json = False,
) -> None:
    """Try six settings of each method on what was prepared last; print those that do best on validation images.

    A search that was broken off goes on. The table is results/<profile>/tuning.csv; the profile is DGS_PROFILE's.
    """
    import pandas as pd

    from dgs.analysis.tuning import RULES, chosen, tune
    from dgs.data.prepared import load_training
    from dgs.model.methods.registry import METHODS, get_method
    from dgs.params import load_params
    from dgs.workspace import Workspace

    if rule not in RULES:
        raise UserError(f"Unknown rule '{rule}'. Known: {', '.join(RULES)}.")
    params = load_params()
    workspace = Workspace.of(params.profile)
    folder = workspace.find("prepare", made_by="prepare")
    names = [get_method(name).name for name in methods or METHODS]
    out = workspace.root / "results" / params.profile / "tuning.csv"
    for row in tune(names, params, workspace.root, folder, out, seed or [100]):
        _say(
            f"{row['method']} {row['candidate']}: " + ", ".join(f"{key} {row[key]:.3f}" for key in RULES if key in row)
        )
    table = pd.read_csv(out)
    found = chosen(table[table["data_hash"] == load_training(folder, workspace.root).info["training_hash"]], rule)
    if as_json:
        _print(as_json, found)
    else:
        for name, values in found.items():
            print(f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in values.items())}}}")


@app.command()
@_for_users
def left_out(
    methods: Annotated[list[str], typer.Argument(help="of the registry")],
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="other than those of the results; may be repeated")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train methods without one generator, each in turn, and test them on it: no test image is looked at.

    On what was prepared last, with the profile's settings. A run that was broken off goes on. The table is
    results/<profile>/left_out.csv; the profile is DGS_PROFILE's.
    """
    import pandas as pd

    from dgs.data.prepared import load_training
    from dgs.model.methods.registry import get_method
    from dgs.params import load_params
    from dgs.workspace import Workspace
    from studies.leave_one_generator_out import COLUMNS, leave_one_generator_out

    params = load_params()
    workspace = Workspace.of(params.profile)
    folder = workspace.find("prepare", made_by="prepare")
    names = [get_method(name).name for name in methods]
    out = workspace.root / "results" / params.profile / "left_out.csv"
    rates = COLUMNS[4:]
    for row in leave_one_generator_out(names, params, workspace.root, folder, out, seed or [100]):
        line = ", ".join(f"{rate} {row[rate]:.3f}" for rate in rates)
        _say(f"{row['method']} without {row['generator']}, seed {row['seed']}: {line}")
    table = pd.read_csv(out)
    table = table[table["data_hash"] == load_training(folder, workspace.root).info["training_hash"]]
    for name in names:
        means = table.loc[table["method"] == name, rates].mean().round(6).to_dict()
        line = ", ".join(f"{rate} {value:.3f}" for rate, value in means.items())
        _print(as_json, {"method": name, **{str(rate): value for rate, value in means.items()}}, f"{name}: {line}")


@app.command()
@_for_users
def ceiling(as_json: Json = False) -> None:
    """Say what a linear head on the frozen tower reaches that is trained on images of every test generator.

    On what was prepared last; the table is results/<profile>/ceiling.csv, the profile is DGS_PROFILE's.
    """
    from dgs.atomic import replacing_file
    from dgs.params import load_params
    from dgs.workspace import Workspace
    from studies.ceiling import ceiling

    params = load_params()
    workspace = Workspace.of(params.profile)
    rows = ceiling(params, workspace.root, workspace.find("prepare", made_by="prepare"))
    out = workspace.root / "results" / params.profile / "ceiling.csv"
    with replacing_file(out) as draft:
        rows.round(6).to_csv(draft, index=False)
    means = rows[~rows["seen"]].groupby("head", sort=False)["balanced_acc"].mean().round(4).to_dict()
    table = out.relative_to(workspace.root).as_posix()
    text = ", ".join(f"{100 * mean:.1f} % on {head}" for head, mean in means.items())
    _print(as_json, {"table": table, "unseen": means}, f"unseen generators: {text} ({table})")


@app.command()
@_for_users
def study(
    profiles: Annotated[
        list[str] | None, typer.Argument(help="whose results to compare; default: every study-* there is")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods over several profiles: REPORT.md, forest.png, table.csv and params.yaml in results/study/.

    What results/study-*/ hold goes into results/study/*.parquet first, and the tables of docs/findings.md are brought
    up to date. Of profiles that are named, in results/<the first of them>/study/, and no more than that.
    """
    from dgs.analysis.study import finished_conditions, keep_runs, write_params, write_study
    from dgs.workspace import find_root
    from studies.findings import refresh

    root = find_root()
    folder = root / "results" / profiles[0] / "study" if profiles else root / "results" / "study"
    named = profiles or finished_conditions(root)
    report = write_study(root, named, folder).relative_to(root).as_posix()
    write_params(root, named, folder)
    if not profiles:
        keep_runs(root)
        refresh(root)
    _print(as_json, {"report": report}, report)


@app.command()
@_for_users
def train(
    method: Annotated[str, typer.Argument(help="which method")],
    seed: Annotated[int, typer.Option(min=0, help="which seed")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for the checkpoint; default below scratch/")] = None,
    profile: Annotated[str | None, typer.Option(help="whose parameters and prepared data; default mini")] = None,
    as_json: Json = False,
) -> None:
    """Train one seed without a notebook, alone or as one of the processes that torchrun starts."""
    from dgs.data.prepared import load_training
    from dgs.model import distributed as processes
    from dgs.model.methods.registry import get_method
    from dgs.model.runs import train_seed
    from dgs.params import load_params
    from dgs.workspace import Workspace

    get_method(method)
    params = load_params(profile)
    workspace = Workspace.of(params.profile)
    prepared_folder = workspace.find("prepare", made_by="prepare")
    folder = out or workspace.build("train", method)
    processes.join_torchrun()
    params = load_training(prepared_folder, workspace.root).with_prepared(params.for_method(method))
    params = params.model_copy(update={"train": params.train.model_copy(update={"processes": processes.count()})})
    with workspace.unfinished(f"train-{method}-{seed}") as unfinished:
        train_seed(method, seed, params, workspace.root, prepared_folder, folder.resolve(), unfinished)
        processes.wait_for_all()
    made = str(folder / f"seed-{seed}")
    if processes.rank() == 0:
        _print(as_json, {"checkpoint": made, "method": method, "seed": seed}, made)


@app.command()
@_for_users
def check(
    params: Annotated[Path | None, typer.Option(help="a complete parameter file; default params.yaml")] = None,
    as_json: Json = False,
) -> None:
    """Check a parameter file, and that the folders and files it names are there (the pipeline's first stage does)."""
    from dgs.profiles import check_file

    check_file(params, _say)
    _print(as_json, {"checked": str(params or "params.yaml")})


@app.command("params")
@_for_users
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
@_for_users
def profile(
    name: Annotated[str, typer.Argument(help="mini, or a file profiles/NAME.yaml")], as_json: Json = False
) -> None:
    """Write a profile's own pipeline (profiles/NAME/dvc.yaml) and print its path."""
    from dgs.profiles import write_profile_pipeline
    from dgs.workspace import find_root

    pipeline = write_profile_pipeline(name).relative_to(find_root()).as_posix()
    _print(as_json, {"profile": name, "pipeline": pipeline}, pipeline)


@app.command()
@_for_users
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
@_for_users
def verify(
    committed: Annotated[Path, typer.Argument(help="results folder to compare against")],
    reproduced: Annotated[Path, typer.Argument(help="results folder just made")],
    tolerance: Annotated[float, typer.Option(help="in rates, as a fraction")] = 0.01,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="compare what this one made alone; may be repeated")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two results folders: counts exactly, rates within the tolerance; exit 1 if something moved."""
    from dgs.analysis.verify import compare_results

    moved = compare_results(committed, reproduced, tolerance, seed or None)
    for line in moved:
        _say(f"moved: {line}")
    _say(f"{reproduced}: {'differs from' if moved else 'reproduces'} {committed} (rates within {tolerance:.3f}).")
    _print(as_json, {"reproduces": not moved, "moved": moved})
    if moved:
        raise typer.Exit(1)


COLUMNS = ("path", "probability", "verdict", "error")  # of dgs score --csv


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


@app.command()
@_for_users
def score(
    paths: Annotated[list[Path], typer.Argument(help="image files, or folders: every file in them is tried")],
    checkpoint: Annotated[Path | None, typer.Option(help="checkpoint folder; default: the pipeline's newest")] = None,
    explain: Annotated[Path | None, typer.Option(help="new folder for what the model saw of each image")] = None,
    processes: Annotated[int, typer.Option(min=1, help="that share the files, each on its own GPU or cores")] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="data as CSV, with a line of names first")] = False,
    as_json: Json = False,
) -> None:
    """Score images: path, probability that it is generated, verdict. Exit 1 if some could not be read."""
    from dgs.model.scoring import score_files

    if as_csv and as_json:
        raise UserError("Expected --csv or --json, found both. Leave one of them out.")
    failed = 0
    for number, row in enumerate(score_files(paths, checkpoint, _say, explain=explain, processes=processes)):
        failed += "error" in row
        if as_csv:
            if number == 0:
                print(_csv_line(COLUMNS))
            print(_csv_line(row.get(column, "") for column in COLUMNS), flush=True)
            continue
        columns = ["-", row["error"]] if "error" in row else [f"{row['probability']:.4f}", row["verdict"]]
        _print(as_json, row, "\t".join([printable(row["path"]), *columns]))
    if failed:
        raise typer.Exit(1)


@app.command()
@_for_users
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

    def say(message: str) -> None:
        tqdm.write(message, file=sys.stderr)  # above the progress bar, not through it

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
@_for_users
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
@_for_users
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
@_for_users
def build(
    out: Annotated[Path, typer.Option(help="folder to make")],
    seed: Annotated[int, typer.Option(min=0, help="of the scenes; another seed is a disjoint benchmark")],
    rho: Annotated[float | None, typer.Option(help="keep only this training set; default all")] = None,
    training: Annotated[Training, typer.Option(help="shipped: make only the test set anew")] = Training.fresh,
    clip: Annotated[Weights, typer.Option(help="train: pre-train it anew, resumable, an hour on one core")] = (
        Weights.shipped
    ),
    generators: Annotated[Weights, typer.Option(help="train: train them anew, 20 minutes on one core")] = (
        Weights.shipped
    ),
    network_seed: Annotated[int, typer.Option(min=0, help="of the networks that are trained anew")] = 0,
    as_json: Json = False,
) -> None:
    """Make the embedded benchmark from seeds."""
    from minibench import pretrain, train_generators
    from minibench.build import build as build_minibench

    made = build_minibench(
        out,
        seed,
        rho=rho,
        clip=clip.value,
        weights=generators.value,
        training=training.value,
        clip_recipe=pretrain.Recipe(seed=network_seed),
        generator_recipe=train_generators.Recipe(seed=network_seed),
        workers=os.cpu_count() or 1,
    )
    _print(as_json, {"out": str(out), **{key: made[key] for key in ("seed", "rhos", "counts", "content_hash")}})


@minibench.command()
@_for_users
def audit(
    folder: Annotated[Path, typer.Argument(help="a benchmark's folder")],
    out: Annotated[Path | None, typer.Option(help="folder for audit.md, audit.json and contact sheets")] = None,
    as_json: Json = False,
) -> None:
    """Ask what tells fake from real in a benchmark: trivial detectors, statistics, content, near duplicates."""
    from minibench.audit import audit as audit_folder
    from minibench.audit_report import markdown
    from minibench.contact_sheets import write_sheets

    result = audit_folder(folder, progress=True)
    text = markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "audit.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "audit.md").write_text(text, encoding="utf-8")
        write_sheets(folder, out)
    _print(as_json, result, text)


def main() -> None:
    """Entry point of the console script; file names that stdout cannot encode are printed escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
