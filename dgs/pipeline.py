"""Stages: a notebook run by papermill with reproducible outputs and readable errors."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from dgs.atomic import alone, explained
from dgs.errors import UserError, did_you_mean
from dgs.params import only_params
from dgs.workspace import find_root

STAGES = ("prepare", "train", "evaluate", "gradient_angles")
KERNEL = "python3"


def normalise(notebook: Any) -> Any:
    """An executed notebook without what differs from run to run, so that equal results give equal bytes.

    Timestamps, papermill's and widgets' records, cell ids and progress bars (stderr) go; results stay. Links lead to
    where they led from notebooks/.
    """
    kept = {"kernelspec": {"name": KERNEL, "display_name": "Python 3", "language": "python"}}
    notebook.metadata = nbformat.from_dict({**kept, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in ("parameters", "injected-parameters")]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!https?:|#)([^)]+)\)", _link, cell.source)
        if cell.cell_type == "code":
            widget = "application/vnd.jupyter.widget-view+json"
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and widget not in output.get("data", {})
            ]
            for output in cell.outputs:
                output.get("metadata", {}).clear()
            cell.outputs = _joined(cell.outputs)
    return notebook


def _link(found: re.Match[str]) -> str:
    target = posixpath.normpath(posixpath.join("notebooks", found[1]))
    return f"]({posixpath.relpath(target, 'results/profile/notebooks')})"


def _joined(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of printed text as one: where it is cut depends on timing."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.get("name") == joined[-1].get("name") == "stdout":
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def _failure(error: PapermillExecutionError, stage: str, executed: Path) -> str:
    sentence = str(error.evalue).strip()
    # papermill counts the cell of parameters that it put in, and has meanwhile added cells that tell of the error
    tags = [cell.metadata.get("tags", []) for cell in nbformat.read(executed, as_version=4).cells]
    ran = [given for given in tags if "papermill-error-cell-tag" not in given]
    injected = sum("injected-parameters" in given for given in ran[: error.cell_index])
    where = f"notebooks/{stage}.ipynb, cell {error.cell_index + 1 - injected}"
    if error.ename in ("UserError", "UnreadableImage"):
        return f"{where}: {sentence}"
    return "\n".join([*error.traceback, f"{where}: {error.ename}: {sentence}"])


def _move_into(draft: Path, root: Path) -> None:
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            target = root / path.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def run_stage(stage: str, label: str, parameters: dict[str, Any], params_file: Path | None = None) -> None:
    """Execute a notebook as a pipeline stage; its outputs appear in build/ and results/ only if all ended well.

    Args:
        stage: "prepare", "train", "evaluate" or "gradient_angles"; its stripped notebook must have been made.
        label: name of the executed notebook in results/<profile>/notebooks/.
        parameters: identity values only (the method); numbers come from the parameter file.
        params_file: a complete parameter file; None: params.yaml.

    Raises:
        UserError: the run stopped; names the cell, and says in one sentence why if the mistake is the user's. Or
            another run of the same stage is going on.
    """
    check_stage(stage)
    root = find_root()
    # The kernel's progress bars reach this terminal through papermill, but it cannot see how wide it is, nor whether
    # it is one: a log gets a line now and then.
    os.environ.setdefault("TQDM_NCOLS", "90")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "20")
    profile = only_params(params_file).profile
    build = root / "build" / profile
    with alone(build / "locks" / label, f"stage {label}"), explained(build):
        _run_alone(stage, label, parameters, root, profile)


def _run_alone(stage: str, label: str, parameters: dict[str, Any], root: Path, profile: str) -> None:
    build = root / "build" / profile
    for leftover in build.glob(f".{label}-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    notebook = build / "sources" / stage / "notebook.ipynb"
    if not notebook.exists():
        raise UserError(f"Expected the stripped notebook {notebook}, found none. Run the stage by dvc repro {stage}.")
    with tempfile.TemporaryDirectory(prefix=f".{label}-", dir=build) as folder:
        draft = Path(folder)
        os.environ["DGS_OUT"] = folder
        executed = draft / "results" / profile / "notebooks" / f"{label}.ipynb"
        executed.parent.mkdir(parents=True)
        try:
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                parameters=parameters,
                kernel_name=KERNEL,
                language="python",
                cwd=str(root),
                progress_bar=False,
                extra_arguments=["--IPKernelApp.log_level=40"],  # or each kernel warns that it talks over TCP
                stdout_file=sys.stderr,
                stderr_file=sys.stderr,
            )
        except PapermillExecutionError as error:
            raise UserError(f"Stage {label} stopped. {_failure(error, stage, executed)}") from None
        nbformat.write(normalise(nbformat.read(executed, as_version=4)), executed)
        _move_into(draft, root)
    shutil.rmtree(build / "unfinished" / label, ignore_errors=True)


def check_stage(stage: str) -> str:
    """The stage's name, if there is one so called."""
    if stage not in STAGES:
        raise UserError(f"Unknown stage '{stage}'.{did_you_mean(stage, STAGES)} Stages: {', '.join(STAGES)}.")
    return stage
