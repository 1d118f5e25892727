"""The diffs of docs/contributing.md apply to this tree, are as small as it says, and their tests pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from copies import ROOT, copy_repository, run

SECTIONS = re.findall(r"^### (.*?)\n+```diff\n(.*?)^```$", (ROOT / "docs/contributing.md").read_text(), re.M | re.S)
KINDS = [
    "method", "method with a model of its own", "metric", "forgetting measure", "perturbation", "figure",
    "generator of the benchmark", "profile",
]  # fmt: skip


def test_there_is_one_of_each_kind_of_at_most_two_files_and_a_test() -> None:
    assert [title.removeprefix("A ") for title, _ in SECTIONS] == KINDS
    for title, diff in SECTIONS:
        changed = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
        tests = [name for name in changed if name.startswith("tests/")]
        assert len(tests) == (title != "A profile") and len(changed) - len(tests) <= 2, title


@pytest.mark.slow
def test_applied_together_they_pass_their_tests_and_those_of_the_house(tmp_path: Path) -> None:
    copy = copy_repository(tmp_path, tiny=False)
    applied = subprocess.run(
        ["git", "apply", "-C1", "-"], cwd=copy, input="".join(diff for _, diff in SECTIONS), text=True, check=False
    )
    assert applied.returncode == 0
    added = re.findall(r"^\+def (test_\w+)", "".join(diff for _, diff in SECTIONS), re.M)
    assert len(added) == len(KINDS) - 1
    house = ["tests/test_architecture.py", "tests/test_notebooks.py", "tests/test_perturbations.py"]
    files = sorted({*house, *re.findall(r"^\+\+\+ b/(tests/.*)$", "".join(diff for _, diff in SECTIONS), re.M)})
    chosen = " or ".join([*added, "architecture", "notebooks", "perturbations", "look_alike"])
    tested = run(copy, sys.executable, "-m", "pytest", "-v", "-k", chosen, *files)
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert all(f"::{name} PASSED" in tested.stdout for name in added)
    checked = run(copy, sys.executable, "-m", "dgs.cli", "profile", "half-rank")
    assert checked.returncode == 0, checked.stderr
