"""The environment a stranger installs: the lock, pyproject, environment.yml, the Makefile and .ci/run agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = [*PYPROJECT["dependencies"], *[line for extra in PYPROJECT["optional-dependencies"].values() for line in extra]]
LINES = [
    line.partition(" #")[0].strip()
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]
LOCK = [Requirement(line) for line in LINES]
PYTHON_311 = {**default_environment(), "python_version": "3.11", "python_full_version": "3.11.9"}


def pinned(name: str) -> Version:
    """The one version of a package that the lock gives to this platform with Python 3.11."""
    found = [
        next(iter(line.specifier)).version
        for line in LOCK
        if canonicalize_name(line.name) == canonicalize_name(name)
        and (line.marker is None or line.marker.evaluate(PYTHON_311))
    ]
    assert len(found) == 1, f"{name}: {found}"
    return Version(found[0])


class TestLock:
    @pytest.mark.parametrize("line", LOCK, ids=str)
    def test_every_line_is_one_exact_version(self, line: Requirement) -> None:
        (specifier,) = line.specifier
        assert specifier.operator == "=="
        assert "*" not in specifier.version
        assert line.url is None

    @pytest.mark.parametrize("asked", ASKED)
    def test_what_pyproject_asks_for_is_pinned_within_its_range(self, asked: str) -> None:
        requirement = Requirement(asked)
        assert requirement.specifier.contains(pinned(requirement.name))

    def test_torch_and_its_torchvision_in_both(self) -> None:
        for name, version in (("torch", "2.14.1"), ("torchvision", "0.29.1")):
            assert pinned(name) == Version(version)
            (asked,) = [line for line in map(Requirement, PYPROJECT["dependencies"]) if line.name == name]
            assert str(asked.specifier) == f"=={version}"

    def test_no_build_of_torch_has_its_cuda_libraries_forced_on_it(self) -> None:
        names = {canonicalize_name(line.name) for line in LOCK}
        assert not [name for name in names if re.match(r"nvidia-|cuda-|triton|pytorch-triton", name)]
        assert not [line for line in LOCK if "+cu" in str(line.specifier)]

    def test_no_line_is_for_another_python_only(self) -> None:
        for line in LOCK:
            markers = [{**PYTHON_311, "sys_platform": platform} for platform in ("linux", "darwin", "win32")]
            markers += [{**marker, "os_name": "nt"} for marker in markers]
            markers += [{**marker, "python_full_version": "3.11.0"} for marker in markers]
            assert line.marker is None or any(line.marker.evaluate(marker) for marker in markers), str(line)


class TestProject:
    def test_the_package_its_console_script_and_its_python(self) -> None:
        assert PYPROJECT["name"] == "dgs" and PYPROJECT["scripts"]["dgs"] == "dgs.cli:main"
        allowed = Requirement(f"python{PYPROJECT['requires-python']}").specifier
        found = {version: allowed.contains(version) for version in ("3.10.9", "3.11.0", "3.11.99", "3.12.0")}
        assert found == {"3.10.9": False, "3.11.0": True, "3.11.99": True, "3.12.0": False}

    @pytest.mark.parametrize("name", ["pytest", "hypothesis", "ruff", "mypy"])
    def test_what_the_tests_need_is_in_the_dev_extra(self, name: str) -> None:
        assert name in {Requirement(line).name for line in PYPROJECT["optional-dependencies"]["dev"]}


def test_the_conda_environment_is_named_dgs_with_python_3_11_and_the_locks_packages() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "dgs"
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    assert "python=3.11" in conda and {"make", "git", "pip"} <= set(conda)
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    assert pip == ["-r requirements.lock", "-e ."]


def dry_run(target: str, *variables: str, folder: Path = ROOT, **environment: str) -> str:
    """What make would run, outside conda unless `environment` says otherwise."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "CONDA", "PROFILE"))}
    command = ["make", "--no-print-directory", "-n", target, *variables]
    done = subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestMake:
    @pytest.mark.parametrize(
        ("target", "command"),
        [
            ("repro", r"^dvc repro\s*$"),
            ("test", r"pytest .*--nbval.*notebooks/prepare\.ipynb.* tests$"),
            ("test-slow", r"^pytest .*-m slow"),
            ("verify", r"verify"),
            ("lab", r"^jupyter lab"),
        ],
    )
    def test_a_target_runs_what_its_name_says(self, target: str, command: str) -> None:
        printed = dry_run(target)
        assert re.search(command, printed, re.MULTILINE), printed

    def test_every_target_ensures_the_environment(self, tmp_path: Path) -> None:
        (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
        for name in ("requirements.lock", "pyproject.toml"):
            (tmp_path / name).write_text("")
        for target in ("repro", "test", "test-slow", "verify", "lab"):
            printed = dry_run(target, folder=tmp_path)
            assert "-m venv .venv" in printed and "-r requirements.lock" in printed, target
            conda = dry_run(target, folder=tmp_path, CONDA_DEFAULT_ENV="dgs", CONDA_PREFIX="/opt/dgs")
            assert "venv" not in conda and "install" not in conda, target

    def test_a_copy_without_git_gets_a_repository_before_anything_is_installed(self, tmp_path: Path) -> None:
        """As a ZIP is: DVC refuses one, when gigabytes are installed."""
        (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
        for name in ("requirements.lock", "pyproject.toml"):
            (tmp_path / name).write_text("")
        for own in ({}, {"CONDA_DEFAULT_ENV": "dgs", "CONDA_PREFIX": "/opt/dgs"}):
            printed = dry_run("repro", folder=tmp_path, **own)
            assert printed.index("git init") < printed.index("dvc repro")
            assert own or printed.index("git init") < printed.index("-m venv")
        make = ["make", "--no-print-directory", "history"]
        said = [subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True).stdout for _ in "ab"]
        assert said == ["dgs: DVC needs a git repository, found none: git init makes an empty one here.\n", ""]
        assert (tmp_path / ".git").is_dir()

    def test_a_repository_that_git_cannot_make_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
        (tmp_path / ".git").write_text("gitdir: /nowhere\n")  # as a worktree that was copied alone
        done = subprocess.run(["make", "history"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "dgs: expected git to make it, found that it did not." in done.stdout

    def test_a_profile_has_its_own_pipeline(self) -> None:
        own, main = (dry_run("repro", *profile) for profile in (["PROFILE=paper"], []))
        assert "pipeline=$(dgs profile paper) && dvc repro $pipeline" in own and "results/paper/REPORT.md" in own
        assert "dgs profile" not in main and "dvc repro" in main and "results/mini/REPORT.md" in main

    def test_the_notebooks_that_are_tested_are_those_there_are(self) -> None:
        tested = set(re.findall(r"notebooks/\w+\.ipynb", dry_run("test")))
        assert tested == {path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb")}


class TestSubmission:
    SCRIPT = ROOT / ".ci" / "run"

    def test_it_runs_the_three_checks_in_order_and_nothing_else_of_make(self) -> None:
        calls = [line.split("#")[0].strip() for line in self.SCRIPT.read_text(encoding="utf-8").splitlines()]
        made = [call for call in calls if call.startswith("make")]
        assert made == ["make test", "make test-slow", "make verify SEEDS=0"]

    @pytest.mark.parametrize("failing", ["test", "test-slow", "verify"])
    def test_it_stops_at_the_first_failure(self, tmp_path: Path, failing: str) -> None:
        fake = tmp_path / "make"
        fake.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/calls"\n[ "$1" != "{failing}" ]\n')
        fake.chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        result = subprocess.run([str(self.SCRIPT)], cwd=tmp_path, env=env, capture_output=True, check=False)
        assert result.returncode != 0
        order = ["test", "test-slow", "verify"]
        assert (tmp_path / "calls").read_text().split() == order[: order.index(failing) + 1]


class TestTorch:
    def test_a_cpu_build_that_is_already_there_is_kept(self, tmp_path: Path) -> None:
        """The Makefile's own command, in an environment where a CPU build stands, with no index to fetch from."""
        subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
        python = tmp_path / ".venv/bin/python"
        (site,) = (tmp_path / ".venv/lib").glob("python3*/site-packages")
        for name in ("torch", "torchvision"):
            info = site / f"{name}-{pinned(name)}+cpu.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {pinned(name)}+cpu\n")
            (info / "RECORD").write_text("")
        line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "grep -oE '^torch" in line)
        command = line.strip().replace("$$", "$").replace(".venv/bin/python", str(python)) + " --no-index"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kept = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
        assert f"{pinned('torch')}+cpu" in kept and f"{pinned('torchvision')}+cpu" in kept
