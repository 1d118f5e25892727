"""The house: imports go down from room to room and never round, and no file grows past two screens of an editor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (  # from the ground up; a room stands for all modules in it
    ("dgs.errors",),
    (
        "dgs.workspace",
        "dgs.stats",
        "dgs.calibration",
        "dgs.verdicts",
        "dgs.crossed",
        "dgs.atomic",
        "dgs.device",
        "dgs.conditions",
        "dgs.tables",
    ),
    ("dgs.params",),
    ("dgs.data",),
    ("dgs.model",),
    ("dgs.analysis",),
    ("dgs.pipeline", "dgs.profiles", "dgs.sources", "dgs.html_report"),
    ("dgs.cli", "dgs.commands"),
    ("minibench", "studies", "real"),
)
TOOLS = LAYERS[-1]  # use the package; commands alone call them, where one needs them
CALLER = "dgs.commands.research"
LINES = 450  # of a file, at most
FILES = 115  # of dgs/, at most: an issue that adds one says so


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    """ "dgs.model.step" of dgs/model/step.py; a package by its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in files("dgs", "minibench", "studies", "real")}


def imported(source: str) -> Iterator[str]:
    """Modules that `source` imports, in functions and for types too: this project's in full, others as written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in MODULES else module


IMPORTS = {name: set(imported(path.read_text(encoding="utf-8"))) & set(MODULES) for name, path in MODULES.items()}


def floor(module: str) -> int:
    """Of the room that a module is in, counted from the ground; the root of the package is below all."""
    found = [i for i, rooms in enumerate(LAYERS) if any(f"{module}.".startswith(f"{room}.") for room in rooms)]
    return found[0] if found else -1


def test_every_module_is_in_one_room() -> None:
    assert {name for name in MODULES if floor(name) < 0} == {"dgs"}, "add it to LAYERS"
    assert all(any(f"{name}.".startswith(f"{room}.") for name in MODULES) for rooms in LAYERS for room in rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    upwards = {name for name in IMPORTS[module] if floor(name) > floor(module)}
    if module == CALLER:
        upwards = {name for name in upwards if name.partition(".")[0] not in TOOLS}
    assert upwards == set(), "move the function down to where both can use it"


def test_commands_load_the_tools_where_they_are_called_alone() -> None:
    top = ast.Module(ast.parse(MODULES[CALLER].read_text(encoding="utf-8")).body, [])
    functions = [node for node in top.body if isinstance(node, ast.FunctionDef)]
    lazy = {name for node in functions for name in imported(ast.unparse(node)) if name.partition(".")[0] in TOOLS}
    assert lazy == {name for name in IMPORTS[CALLER] if name.partition(".")[0] in TOOLS}


def test_imports_never_go_round() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the modules


def test_the_surgery_needs_torch_alone() -> None:
    source = MODULES["dgs.model.surgery"].read_text(encoding="utf-8")
    assert {name.partition(".")[0] for name in imported(source)} - {"__future__"} == {"torch"}


@pytest.mark.parametrize(
    "path", files("dgs", "minibench", "studies", "real"), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_file_is_not_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, "two concepts: make two files of it"


def test_the_package_is_not_many_files() -> None:
    assert len(files("dgs")) <= FILES
