"""Side by side: callables timed in turns in one process, and the peak memory of a task in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timed:
    """Seconds of every callable, round by round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Of one callable, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """How many times `fast` is as fast as `slow`: median, lowest and highest of the rounds' ratios."""
        ratios = [a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def interleave(tasks: Mapping[str, Callable[[], object]], rounds: int) -> Timed:
    """Run each task once to warm up, then all of them in turns; the order turns round, so that none is always first."""
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            _wait()
            began = time.perf_counter()
            tasks[name]()
            _wait()
            seconds[name].append(time.perf_counter() - began)
    return Timed(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_megabytes(task: Callable[[], object]) -> float:
    """Peak resident memory while `task` runs, less nothing: parameters count (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    task()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def resident_megabytes() -> float:
    """Resident memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def in_own_process(script: Path, *arguments: str) -> dict[str, float]:
    """What `script` prints as JSON, run with this Python."""
    run = subprocess.run([sys.executable, str(script), *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])
