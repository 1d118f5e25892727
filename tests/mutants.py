"""Faults of one line that a test must catch: `tests/mutants.py [--only ID] [--clean]`; they stand in mutants.yaml.

Each is put into a copy of this repository, and the tests named beside it run on the copy. A fault that they let pass is
reported as NOT caught, and a fault whose line is no longer there as not applying. Exit 0 if all are caught.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import yaml
from copies import ROOT, copy_repository

SECONDS = 600  # for the tests of one fault


class Fault(NamedTuple):
    """One line put wrong.

    breaks: what is wrong then.
    old, new: the text in `file`, where it stands once, and what is put in its place.
    tests: the file that must catch it, and which of its tests if the whole file takes long (`-k`).
    """

    id: str
    breaks: str
    file: str
    old: str
    new: str
    tests: str


def run_tests(root: Path, tests: str, log: Path) -> int:
    """pytest's exit code for a file of tests of the copy in `root`, in a forked process."""

    def child() -> None:
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path[:0] = [str(root)]
        sys.dont_write_bytecode = True  # a file that changes within a second would be taken from the cache
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        import pytest

        file, *rest = tests.split(" ", 1)
        chosen = rest[0].split(" ", 1) if rest else ["-m", "not slow"]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{file}", *chosen]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode if process.exitcode is not None else -1


def verdict(fault: Fault, root: Path, log: Path) -> str:
    """ "caught", "NOT caught", or why that is not known."""
    path = root / fault.file
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before.count(fault.old) != 1:
        return f"does not apply: {before.count(fault.old)} times in {fault.file}"
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code = run_tests(root, fault.tests, log)
    finally:
        path.write_text(before, encoding="utf-8")
    return {0: "NOT caught", 1: "caught"}.get(code, f"tests did not run: pytest exit code {code}")


def verdicts(faults: list[Fault], clean: bool) -> Iterator[tuple[str, str, str]]:
    """(name, tests, verdict) one after the other; `clean`: the tests first run without a fault."""
    for library in ("open_clip", "pandas", "peft", "pytest", "sklearn.metrics", "torch"):
        import_module(library)  # once for all: the tests run in forks of this process

    with tempfile.TemporaryDirectory(prefix="dgs-mutants-") as folder:
        root, log = copy_repository(Path(folder) / "copy", tiny=False, git=False), Path(folder) / "log"
        for tests in dict.fromkeys(fault.tests for fault in faults) if clean else ():
            code = run_tests(root, tests, log)
            yield "no fault", tests, "passes" if code == 0 else f"FAILS by itself: {log.read_text()[-500:]}"
        for fault in faults:
            yield fault.id, fault.tests, verdict(fault, root, log)


def main() -> int:
    """0 if every fault is caught."""
    parser = argparse.ArgumentParser(description="Faults of one line that a test must catch.")
    parser.add_argument("--only", action="append", help="id of a fault; may be repeated; a prefix will do")
    parser.add_argument("--clean", action="store_true", help="first see that the tests pass without a fault")
    parser.add_argument("--list", action="store_true", help="print the faults as a Markdown table and run nothing")
    options = parser.parse_args()
    rows = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text(encoding="utf-8"))
    faults = [
        fault
        for row in rows
        if (fault := Fault(**row)) and (not options.only or fault.id.startswith(tuple(options.only)))
    ]
    if options.list:
        print("| fault | what it breaks | caught by |", "| --- | --- | --- |", sep="\n")
        for fault in faults:
            print(f"| {fault.id} | {fault.breaks} | {fault.tests.split()[0]} |")
        return 0
    good = True
    for name, tests, said in verdicts(faults, options.clean):
        print(f"{name:34} {tests:50} {said}", flush=True)
        good &= said in ("caught", "passes")
    return 0 if good and faults else 1


if __name__ == "__main__":
    sys.exit(main())
