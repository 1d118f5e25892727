"""The benchmark runs, and what it says it measured is what its files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "benchmarks"
sys.path.insert(0, str(BENCH))

import bench  # noqa: E402
from timing import Timed, interleave  # noqa: E402


def test_tasks_take_turns_and_ratios_are_of_rounds() -> None:
    seen: list[str] = []
    timed = interleave({name: lambda name=name: seen.append(name) for name in "ab"}, 3)  # type: ignore[misc]
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"  # once each to warm up
    assert {name: len(values) for name, values in timed.seconds.items()} == {"a": 3, "b": 3}
    assert Timed({"slow": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 1.0]}).ratio("slow", "fast") == (3.0, 2.0, 4.0)


def test_the_committed_table_is_made_from_the_committed_results() -> None:
    content = json.loads((BENCH / "results.json").read_text())
    rows = [bench.Row(**row) for row in content["rows"]]
    assert (BENCH / "results.md").read_text() == bench.table(rows, content["machine"], content["gpu"])


@pytest.mark.slow
def test_every_part_runs_at_a_small_geometry() -> None:
    run = subprocess.run(
        [sys.executable, str(BENCH / "bench.py"), "--quick"], check=True, stdout=subprocess.PIPE, text=True
    )
    for part in ("stage-2 step", "overhead", "stage 1", "both stages", "peak memory", "parameters held"):
        assert part in run.stdout
