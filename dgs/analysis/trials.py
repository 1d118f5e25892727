"""Trainings tried side by side, each a row of a table; what the table holds already is not tried again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd


def trials(
    run: Callable[..., dict[str, Any]],
    todo: Sequence[dict[str, Any]],
    rest: tuple[Any, ...],
    jobs: int,
    out: Path,
    columns: list[str],
) -> Iterator[dict[str, Any]]:
    """Call `run` for each of `todo` in `jobs` processes; rows are written to `out` as they are found.

    Args:
        run: (**one of todo, then `rest` in order) to what was found; the row is both together.
        todo: what identifies a row, each with the same keys, which are columns of `out`.
        out: a table (CSV) with `columns`; made where it is not there.

    Yields:
        the new rows.
    """
    done: list[list[str]] = []
    if out.exists() and todo:
        done = pd.read_csv(out, dtype=str)[list(todo[0])].to_numpy().tolist()
    left = [what for what in todo if [str(value) for value in what.values()] not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run, *what.values(), *rest): what for what in left}
        for future in as_completed(waiting):
            row = {**waiting[future], **future.result()}
            pd.DataFrame([row]).reindex(columns=columns).to_csv(out, mode="a", header=not out.exists(), index=False)
            yield row
