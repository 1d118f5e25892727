"""What each stage runs, read from the code: an edit reruns the stages that use it, and no others."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dgs.errors import UserError
from dgs.params import Params
from dgs.pipeline import STAGES
from dgs.sources import FIGURES, closure, stage_files, write_sources

ROOT = Path(__file__).parent.parent
RUNNER = {"dgs/pipeline.py", "dgs/errors.py", "dgs/params.py", "dgs/workspace.py"}  # of no stage alone


def stages() -> dict[str, dict[str, list[str]]]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


FILES = {
    "dgs/__init__.py": "",
    "dgs/leaf.py": "",
    "dgs/room/__init__.py": "from dgs.room.inner import X",
    "dgs/room/inner.py": "X = 1",
    "dgs/room/lazy.py": "def f() -> None:\n    from dgs import leaf",
    "dgs/room/named.py": "NAMES = ('table.yaml', 'pages', 'inner.py', '', '..', 'not there', 'a\\nb')",
    "dgs/room/table.yaml": "",
    "dgs/room/pages/one.j2": "",
    "dgs/analysis/figures/bars.py": "import dgs.leaf",
}


class TestClosure:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for name, text in FILES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    @pytest.mark.parametrize(
        ("source", "used"),
        [
            ("import numpy\nfrom pathlib import Path", ""),
            ("import dgs.leaf", "__init__.py leaf.py"),
            ("from dgs.room import X", "__init__.py room/__init__.py room/inner.py"),
            ("from dgs.room import inner as other", "__init__.py room/__init__.py room/inner.py"),
            ("def f():\n    import dgs.leaf", "__init__.py leaf.py"),
            ("import dgs.room.lazy", "__init__.py leaf.py room/__init__.py room/inner.py room/lazy.py"),
            (
                "from dgs.room import named",
                "__init__.py room/__init__.py room/inner.py room/named.py room/pages/one.j2 room/table.yaml",
            ),
            ("import dgs.analysis.figures.bars", "__init__.py analysis/figures/bars.py leaf.py"),
        ],
    )
    def test_every_file_that_is_loaded_or_named(self, tree: Path, source: str, used: str) -> None:
        assert closure([source], tree) == [f"dgs/{name}" for name in used.split()]

    def test_what_is_left_out_brings_nothing_with_it(self, tree: Path) -> None:
        assert closure(["import dgs.analysis.figures.bars"], tree, FIGURES) == ["dgs/__init__.py"]


class TestStages:
    @pytest.mark.parametrize("stage", ["train", "evaluate"])
    def test_no_module_is_loaded_that_is_not_listed(self, stage: str) -> None:
        """Python itself says what the notebook's imports load."""
        cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
        nodes = [node for c in cells if c["cell_type"] == "code" for node in ast.walk(ast.parse("".join(c["source"])))]
        imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        show = "import sys; print([m.__file__ for n, m in sys.modules.items() if n.startswith('dgs')])"
        script = "\n".join([*imports, "import dgs.pipeline", show])
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = {Path(path).relative_to(ROOT).as_posix() for path in ast.literal_eval(done.stdout)}
        listed = set(stage_files(stage, ROOT))
        drawn = [f"import {path.removesuffix('.py').replace('/', '.')}" for path in loaded if path.startswith(FIGURES)]
        assert loaded - listed <= (set(closure(drawn, ROOT)) if stage == "train" else set())
        assert listed >= {"dgs/model/methods/registry.py", "dgs/model/methods/__init__.py", *RUNNER}

    def test_figures_and_the_command_line_are_no_reason_to_train(self) -> None:
        files = {stage: stage_files(stage, ROOT) for stage in STAGES}
        assert not [
            path for path in files["train"] if path.startswith("dgs/analysis/") and path != "dgs/analysis/__init__.py"
        ]
        assert [path for path in files["evaluate"] if path.startswith(FIGURES)]
        for used in files.values():
            assert not {
                "dgs/cli.py",
                "dgs/commands/images.py",
                "dgs/profiles.py",
                "dgs/sources.py",
                "dgs/html_report.py",
            } & set(used)
            assert set(used) >= RUNNER
        assert "dgs/model/methods/registry.py" not in files["prepare"]

    def test_every_stage_waits_for_its_own_folder(self) -> None:
        for name, body in stages().items():
            sources = [dep for dep in body["deps"] if "/sources" in dep]
            assert sources == ([] if name == "sources" else [f"build/${{profile}}/sources/{name}"])
            assert name == "sources" or not [dep for dep in body["deps"] if dep.startswith(("dgs", "notebooks"))]
        assert set(stages()) == {"sources", *STAGES}

    def test_nothing_is_imported_by_a_computed_name(self) -> None:
        """Or the lists above would not be whole. One module, in a process of its own, runs files that users name."""
        for path in [*(ROOT / "dgs").rglob("*.py"), *(ROOT / "minibench").rglob("*.py")]:
            if path.name == "detector_process.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not {alias.name for alias in node.names} & {"importlib", "runpy", "pkgutil"}, path
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0 and node.module not in ("importlib", "runpy", "pkgutil"), path
                elif isinstance(node, ast.Name):
                    assert node.id not in ("__import__", "exec", "eval"), path


class TestWritten:
    def test_a_folder_for_each_stage_changes_with_the_code_it_runs_alone(self, repo: Path) -> None:
        def written() -> dict[str, str]:
            folder = write_sources(None, print)
            assert folder == repo / "build/mini/sources"
            return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}

        def changed(edited: str) -> set[str]:
            with (repo / edited).open("a") as file:
                file.write("\n# edited\n")
            now = written()
            names = {name for name in now if now[name] != before[name]}
            before.update(now)
            return names

        before = written()
        assert set(before) == {f"{stage}/{name}" for stage in STAGES for name in ("notebook.ipynb", "code.txt")}
        assert changed("dgs/cli.py") == set()
        assert changed("params.yaml") == set(), "or every number would rerun every stage"
        assert changed("dgs/analysis/figures/forgetting.py") == {"evaluate/code.txt"}
        assert changed("dgs/model/surgery.py") >= {"train/code.txt"}
        assert changed("dgs/errors.py") == {f"{stage}/code.txt" for stage in STAGES}

    def test_a_cell_that_is_not_python_is_named(self, repo: Path) -> None:
        path = repo / "notebooks" / "train.ipynb"
        content = json.loads(path.read_text())
        content["cells"][1]["source"] = ["%matplotlib inline\n", "!ls\n"]
        path.write_text(json.dumps(content))
        write_sources(None, print)
        content["cells"][1]["source"] = ["x = (\n"]
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"Expected notebooks/train\.ipynb, cell 2, to be Python; found"):
            write_sources(None, print)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_parameter_groups_it_reads(stage: str) -> None:
    notebook = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources += [(ROOT / file).read_text() for file in set(stage_files(stage, ROOT)) - RUNNER if file.endswith(".py")]
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
