"""What each stage runs, as files: its notebook without outputs, and the hashes of the modules that notebook imports.

DVC reruns a stage when its folder here changes: an edit to the command line rewrites the folders, finds them equal and
reruns nothing. The imports are read from the code, so nothing in `dgs/` may be imported by a computed name (a test).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbstripout import strip_output

from dgs.atomic import replacing
from dgs.errors import UserError
from dgs.pipeline import STAGES
from dgs.profiles import check_file
from dgs.workspace import find_root

SOURCES = "sources"  # the stage, and its folder
PACKAGES = ("dgs",)  # that a notebook may import from this repository
RUNNER = "import dgs.pipeline"  # runs every notebook
FIGURES = "dgs/analysis/figures/"
# A figure in train's notebook shows a run and changes none: an edit to it is no reason to train again.
LEFT_OUT = {"train": FIGURES}
_SAVED = ["metadata.language_info", "metadata.kernelspec", "cell.metadata.execution"]  # differ by who saved a notebook


def _with_packages(module: str) -> Iterator[str]:
    """The file of a module and the `__init__` of every package around it, as paths in the repository."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        path = "/".join(parts[:length])
        yield from (f"{path}.py", f"{path}/__init__.py")


def imported(source: str, folder: Path, root: Path) -> set[str]:
    """Files of the repository that `source` uses: modules it imports, in functions too, and files beside it that it
    names in full ("suites.yaml"; of a folder of templates, all). As POSIX paths relative to `root`.
    """
    used: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isprintable():
            used |= {path.relative_to(root).as_posix() for path in _beside(folder, node.value)}
        for module in modules:
            if module.partition(".")[0] in PACKAGES:
                used |= {path for path in _with_packages(module) if (root / path).is_file()}
    return used


def _beside(folder: Path, name: str) -> list[Path]:
    if not name or len(name) > 100 or "/" in name or name.startswith("."):
        return []
    path = folder / name
    inside = path.rglob("*") if path.is_dir() and not (path / "__init__.py").exists() else [path]
    return [file for file in inside if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts]


def closure(sources: Iterable[str], root: Path, left_out: str | None = None) -> list[str]:
    """Every file of the repository that running `sources` may load, sorted; those below `left_out` are passed over."""
    todo = {path for source in sources for path in imported(source, root / "notebooks", root)}
    done: set[str] = set()
    while todo:
        path = todo.pop()
        if left_out and path.startswith(left_out):
            continue
        done.add(path)
        if path.endswith(".py"):
            file = root / path
            todo |= imported(file.read_text(encoding="utf-8"), file.parent, root) - done
    return sorted(done)


def stage_files(stage: str, root: Path) -> list[str]:
    """Every file of the repository that a stage's notebook runs, as `closure` gives them.

    Raises:
        UserError: a cell of the notebook is not Python.
    """
    plain = TransformerManager().transform_cell  # IPython's own words (%time, !ls) as Python
    sources = [RUNNER]
    cells = nbformat.read(root / "notebooks" / f"{stage}.ipynb", as_version=4).cells
    for number, cell in enumerate(cells, start=1):
        if cell.cell_type == "code":
            sources.append(plain(cell.source))
            try:
                ast.parse(sources[-1])
            except SyntaxError as error:
                raise UserError(
                    f"Expected notebooks/{stage}.ipynb, cell {number}, to be Python; found {error.msg} in line "
                    f"{error.lineno}. Mend that line."
                ) from None
    return closure(sources, root, LEFT_OUT.get(stage))


def write_sources(params_file: Path | None, warn: Callable[[str], None]) -> Path:
    """Check the parameters as `check_file`, then write build/<profile>/sources/<stage>/{notebook.ipynb, code.txt}.

    Returns:
        the folder of sources, written whole or not at all.

    Raises:
        UserError: a parameter that is wrong or names what is not there, or a notebook that is not Python.
    """
    root, params = find_root(), check_file(params_file, warn)
    folder = root / "build" / params.profile / SOURCES
    with replacing(folder) as draft:
        for stage in STAGES:
            files = [*stage_files(stage, root), *(params.evaluate.detectors.values() if stage == "evaluate" else ())]
            (draft / stage).mkdir()
            hashes = {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in files}
            code = "".join(f"{digest} {path}\n" for path, digest in hashes.items())
            (draft / stage / "code.txt").write_text(code, encoding="utf-8")
            notebook = nbformat.read(root / "notebooks" / f"{stage}.ipynb", as_version=4)
            notebook = strip_output(notebook, keep_output=False, keep_count=False, keep_id=True, extra_keys=_SAVED)
            nbformat.write(notebook, draft / stage / "notebook.ipynb")
    return folder
