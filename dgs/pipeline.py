"""A notebook as a stage: what it opens with, and its run by papermill with reproducible outputs and readable errors.

Both sides load what the other needs only when they are called: papermill here, images and figures in the kernel.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from dgs.atomic import alone, explained
from dgs.errors import UserError, did_you_mean
from dgs.params import Params, only_params
from dgs.workspace import Workspace, find_root

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from papermill.exceptions import PapermillExecutionError

    from dgs.data.prepared import Prepared

STAGES = ("prepare", "train", "evaluate", "gradient_angles")
KERNEL = "python3"
# The flat names a notebook's `parameters` cell may set, and what they stand for in params.yaml.
NOTEBOOK_PARAMETERS: dict[str, dict[str, str]] = {
    "prepare": {
        "root": "data.root",
        "layout": "data.layout",
        "rho": "data.rho",
        "shortcut": "data.shortcut",
        "captions": "data.captions",
        "val_fraction": "data.val_fraction",
        "limit": "data.limit",
        "clip": "model.clip",
        "pretrained": "model.pretrained",
        "patches": "patches.enabled",
        "patch_size": "patches.size",
    },
    "train": {
        "method": "",
        "seeds": "seeds",
        "epochs": "train.stage2.epochs",
        "lr": "train.stage2.lr",
        "stage1_epochs": "train.stage1.epochs",
        "stage1_lr": "train.stage1.lr",
        "batch_size": "train.batch_size",
        "processes": "train.processes",
        "rank": "model.lora.rank",
        "alpha": "model.lora.alpha",
        "dropout": "model.lora.dropout",
        "lam": "train.surgery.lam",
        "eps": "train.surgery.eps",
        "order": "train.surgery.order",
        "scale": "train.surgery.scale",
        "text_head": "train.surgery.text_head",
        "device": "compute.device",
        "log_every": "train.log_every",
    },
    "evaluate": {
        "methods": "methods",
        "seeds": "seeds",
        "batch_size": "compute.batch_size",
        "retrieval_pool": "evaluate.retrieval_pool",
        "tsne_images": "evaluate.tsne_images",
        "processes": "train.processes",
        "conditions": "evaluate.robustness.conditions",
        "device": "compute.device",
    },
    "gradient_angles": {"methods": "methods", "seeds": "seeds", "pairs": "gradient_angles.pairs"},
    "explore": {"method": "", "seed": "", "image": "", "label": "", "caption": ""},
    "score": {"folder": "", "checkpoint": "", "max_false_alarm": "", "max_miss": ""},
}


@dataclass(frozen=True)
class Stage:
    """What a notebook works with.

    params: with the notebook's overrides; data, patches and CLIP as prepared.
    prepared_folder, prepared: what the prepare stage made; None in the notebooks that do not read it.
    """

    name: str
    params: Params
    workspace: Workspace
    prepared_folder: Path | None = None
    prepared: Prepared | None = None

    @property
    def figures(self) -> Path:
        """The folder of the stage's pictures."""
        return self.workspace.results / "figures" / self.name

    def show(self, figure: Figure, name: str | None = None) -> None:
        """Show a figure in the notebook; with a name, write it to `figures`/<name>.png as well."""
        from dgs.analysis.figures.style import show

        show(figure, None if name is None else self.figures / f"{name}.png")

    def show_all(self, figures: Mapping[str, Figure]) -> None:
        """`show` each under its name."""
        for name, figure in figures.items():
            self.show(figure, name)


def open_stage(name: str, namespace: Mapping[str, Any]) -> Stage:
    """Parameters, folders and what was prepared; pictures of an earlier run are removed.

    Where a notebook's parameters and what was prepared differ, a line says that what was prepared holds.

    Args:
        name: the notebook's, one of `NOTEBOOK_PARAMETERS`.
        namespace: its `globals()`, with `params` as its first cell loads them.

    Raises:
        UserError: a wrong parameter (`with_overrides`), or nothing is prepared.
    """
    from dgs.data.prepared import load_prepared, load_training
    from dgs.device import set_determinism

    params = with_overrides(name, namespace["params"], namespace)
    workspace = Workspace.of(params.profile)
    # What is prepared is trained on: compute.jobs must not change its rounding.
    set_determinism(params.compute.threads * (1 if name == "prepare" else params.compute.jobs))
    stage = Stage(name, params, workspace)
    if name in ("train", "evaluate", "gradient_angles"):
        folder = workspace.find("prepare", made_by="prepare")
        load = load_training if name == "train" else load_prepared  # training must not depend on test images
        prepared = load(folder, workspace.root)
        for note in prepared.overridden(params):
            print("NOTE:", note)
        for caution in prepared.cautions if name == "evaluate" else ():
            print("CAUTION:", caution)
        stage = Stage(name, prepared.with_prepared(params), workspace, folder, prepared)
    for old in stage.figures.glob("*.png"):
        old.unlink()
    return stage


def _assigned_names(cells: list[str]) -> list[str]:
    """Names set by the parameters cell as it was last run, and by the one that papermill injects after it."""
    marked = [source for source in cells if source.lstrip().lower().startswith("# parameters")]
    own = [index for index, source in enumerate(marked) if source.lstrip().lower().startswith("# parameters:")]
    names: list[str] = []
    for source in marked[own[-1] if own else 0 :]:
        for node in ast.parse(source).body:
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            flat = [part for target in targets for part in getattr(target, "elts", [target])]
            names += [target.id for target in flat if isinstance(target, ast.Name)]
    return names


def with_overrides(notebook: str, params: Params, namespace: Mapping[str, Any]) -> Params:
    """`params` with a notebook's flat names (as edited or injected by papermill) put in their place.

    Where the notebook has a method, what is still null becomes the method's own.

    Raises:
        UserError: a name that the notebook does not have, or a value that is not of its type.
    """
    flat = NOTEBOOK_PARAMETERS[notebook]
    for name in _assigned_names(list(namespace.get("In", []))):
        if name not in flat:
            raise UserError(
                f"Unknown parameter '{name}' for notebooks/{notebook}.ipynb.{did_you_mean(name, flat)} "
                f"Known here: {', '.join(flat)}."
            )
    given = {full: namespace[name] for name, full in flat.items() if full and name in namespace}
    changed = params.replaced(given, f"notebooks/{notebook}.ipynb")
    method = namespace.get("method")
    return changed.for_method(method) if isinstance(method, str) and "method" in flat else changed


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


def run_stage(stage: str, method: str | None = None, params_file: Path | None = None) -> str:
    """Execute a notebook as a pipeline stage; its outputs appear in build/ and results/ only if all ended well.

    Args:
        stage: one of `STAGES`; its stripped notebook must have been made.
        method: of the stage train; numbers come from the parameter file.
        params_file: a complete parameter file; None: params.yaml.

    Returns:
        the name of the executed notebook in results/<profile>/notebooks/: "evaluate", "train-dgs".

    Raises:
        UserError: the run stopped; names the cell, and says in one sentence why if the mistake is the user's. Or
            another run of the same stage is going on.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    check_stage(stage)
    root, label = find_root(), stage if method is None else f"{stage}-{method}"
    # The kernel's progress bars reach this terminal through papermill, but it cannot see how wide it is, nor whether
    # it is one: a log gets a line now and then.
    os.environ.setdefault("TQDM_NCOLS", "90")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "20")
    profile = only_params(params_file).profile
    build = root / "build" / profile
    with alone(build / "locks" / label, f"stage {label}"), explained(build):
        for leftover in build.glob(f".{label}-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        notebook = build / "sources" / stage / "notebook.ipynb"
        if not notebook.exists():
            raise UserError(
                f"Expected the stripped notebook {notebook}, found none. Run the stage by dvc repro {stage}."
            )
        with tempfile.TemporaryDirectory(prefix=f".{label}-", dir=build) as folder:
            draft = Path(folder)
            os.environ["DGS_OUT"] = folder
            executed = draft / "results" / profile / "notebooks" / f"{label}.ipynb"
            executed.parent.mkdir(parents=True)
            try:
                papermill.execute_notebook(
                    str(notebook),
                    str(executed),
                    parameters={} if method is None else {"method": method},
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
            for path in [path for path in sorted(draft.rglob("*")) if path.is_file()]:
                target = root / path.relative_to(draft)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        shutil.rmtree(build / "unfinished" / label, ignore_errors=True)
    return label


def check_stage(stage: str) -> str:
    """The stage's name, if there is one so called."""
    if stage not in STAGES:
        raise UserError(f"Unknown stage '{stage}'.{did_you_mean(stage, STAGES)} Stages: {', '.join(STAGES)}.")
    return stage
