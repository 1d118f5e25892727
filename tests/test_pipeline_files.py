"""dvc.yaml against the code: a stage depends on the modules its notebook uses, and on no others."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml

from dgs.params import Params
from dgs.pipeline import STAGES

ROOT = Path(__file__).parent.parent
# How a stage's notebook is run belongs to every stage; the command line does not.
RUNNER = {"dgs/pipeline.py", "dgs/errors.py", "dgs/params.py", "dgs/workspace.py"}


def imported(source: str) -> set[str]:
    """Files of the package that `source` imports directly."""
    files = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            path = Path(*name.split("."))
            if name.startswith("dgs") and (ROOT / path).with_suffix(".py").exists():
                files.add(path.with_suffix(".py").as_posix())
    return files


def closure(stage: str) -> set[str]:
    """Every module that a stage's notebook runs."""
    notebook = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())
    todo = set(RUNNER)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            todo |= imported("".join(cell["source"]))
    done: set[str] = set()
    while todo:
        file = todo.pop()
        done.add(file)
        todo |= imported((ROOT / file).read_text()) - done
    return done


def stages() -> dict[str, dict[str, list[str]]]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_modules_it_runs(stage: str) -> None:
    declared = {dep for dep in stages()[stage]["deps"] if dep.startswith("dgs/")}
    needed = closure(stage)
    assert needed - declared == set(), "used but not declared: an edit would not rerun the stage"
    assert declared - needed == set(), "declared but not used: an edit would rerun the stage for nothing"
    assert "dgs/cli.py" not in declared


def test_the_check_depends_on_what_it_runs_and_every_stage_waits_for_it() -> None:
    declared = set(stages()["check"]["deps"])
    todo, needed = {"dgs/profiles.py"}, set()
    while todo:
        needed.add(file := todo.pop())
        todo |= imported((ROOT / file).read_text()) - needed
    assert declared == needed | {"params.yaml"}
    assert set(stages()["check"]["outs"]) <= set(stages()["prepare"]["deps"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_parameter_groups_it_reads(stage: str) -> None:
    notebook = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources += [(ROOT / file).read_text() for file in closure(stage) - RUNNER]
    read = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                base = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if base == "params" and node.attr in Params.model_fields:
                    read.add(node.attr)
    declared = {name.partition(".")[0] for name in stages()[stage]["params"]}
    assert read - declared - {"gradient_angles"} == set()
    assert declared <= set(Params.model_fields)


def test_every_parameter_group_belongs_to_a_stage() -> None:
    """A group no stage depends on could be changed, rightly or wrongly, without anything happening."""
    named = {name for body in stages().values() for name in body.get("params", [])}
    used = {name.partition(".")[0] for name in named} | {"methods"}
    assert used == set(Params.model_fields)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_it_needs_makes_and_takes_and_ends_with_where_to_go(path: Path) -> None:
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    assert cells[0].startswith("# ")
    assert all(f"\n**{word}** " in cells[0] for word in ("Needs", "Makes", "Takes"))
    assert cells[-1].startswith("**Next:**")


def test_source_notebooks_carry_no_outputs() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), f"{path.name} is committed with outputs"
            assert cell.get("execution_count") is None
