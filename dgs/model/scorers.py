"""Scorers: one process or several of this machine, each with a detector of its own, that give the rows of one.

Batches of files go to the processes in turn and come back in the same turn, so that order needs no sorting and a batch
holds the files that it would hold in one process. A process has a few batches at a time: memory does not grow with the
number of files. Unlike training's processes they are no group: none waits for another.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from dgs.errors import UserError
from dgs.model import distributed as processes
from dgs.model.detector import AHEAD, Detector
from dgs.model.distributed import Member
from dgs.model.verdicts import Judged, threshold_of, verdicts
from dgs.params import Params

# Batches that a process has at a time: those it decodes ahead, the one its tower works on, and one on the way.
AT_A_TIME = AHEAD + 2


class Scorers(NamedTuple):
    """Ready to score: with which checkpoint, and the function from files to batches of rows (to be called once)."""

    info: dict[str, Any]
    params: Params
    verdicts: Callable[[Iterable[Path]], Iterator[list[Judged]]]


@contextmanager
def scorers(folder: Path, count: int, size: int, with_views: bool = False) -> Iterator[Scorers]:
    """So many processes that score with the checkpoint in `folder`; at the end of the block they end too.

    One process is this one. Of several, each takes a GPU of its own while there are enough, and its share of the cores.

    Args:
        size: files a batch.
        with_views: several processes: rows come with their views. One always gives them, since it has them.

    Raises:
        UserError: no checkpoint or a damaged one; in the block, that a process died.
    """
    if count == 1:
        detector = Detector.load(folder)
        _, threshold = threshold_of(detector.info, folder)
        yield Scorers(detector.info, detector.params, lambda files: verdicts(detector, threshold, files, size))
        return
    with processes.started(count, _score, count, folder, size, with_views) as members:
        (info, params), *_ = [_heard(member, count) for member in members]
        yield Scorers(info, params, lambda files: _shared(members, files, size))


def _shared(members: Sequence[Member], files: Iterable[Path], size: int) -> Iterator[list[Judged]]:
    rest, waiting = iter(files), deque[Member]()
    for member in cycle(members):
        batch = list(islice(rest, size))
        if not batch:
            break
        if len(waiting) == AT_A_TIME * len(members):
            yield _heard(waiting.popleft(), len(members))
        _tell(member, batch)
        waiting.append(member)
    for member in members:
        _tell(member, None)
    while waiting:
        yield _heard(waiting.popleft(), len(members))


def _tell(member: Member, batch: list[Path] | None) -> None:
    with suppress(OSError):  # that it has died is noticed when its answer's turn comes
        member.line.send(batch)


def _heard(member: Member, count: int) -> Any:
    good, said = member.recv()
    if good:
        return said
    if isinstance(said, UserError):
        raise said
    if isinstance(said, int):
        raise UserError(
            f"Expected {count} processes to score together, found that process {member.number} died "
            f"({processes.exit_reason(said)}). What was printed until then is right. Run the same command again; if "
            f"memory was short, with fewer --processes."
        )
    raise RuntimeError(f"Process {member.number} of {count} stopped. {said}")


def _score(number: int, count: int, folder: Path, size: int, with_views: bool, line: Connection) -> None:
    """What each process does: open the checkpoint, say so, then answer batches of files with batches of rows."""
    processes.end_with_parent()
    try:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
        detector = Detector.load(folder, device=own_device(number))
        _, threshold = threshold_of(detector.info, folder)
        line.send((True, (detector.info, detector.params)))
        threads = max(1, (os.cpu_count() or 1) // count)
        for batch in verdicts(detector, threshold, _received(line), size, threads):
            line.send((True, batch if with_views else [(row, None) for row, _ in batch]))
    except BaseException as error:
        with suppress(Exception):
            line.send((False, error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"))
    sys.stderr.flush()
    os._exit(0)  # threads may still be decoding, and whoever waited for it has gone


def own_device(number: int) -> str:
    """Where a process scores: on its own GPU, or on one that it shares where there are fewer; without any, the CPU."""
    cards = torch.cuda.device_count()
    return f"cuda:{number % cards}" if cards else "cpu"


def _received(line: Connection) -> Iterator[Path]:
    """Files of the batches that come along `line`.

    A thread takes them off the line: were nobody to, while this process sends a large answer, both ends might wait for
    the other to read. What it holds is bounded by what the sender sends ahead.
    """
    batches: SimpleQueue[list[Path] | None] = SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (batch := line.recv()) is not None:
                batches.put(batch)
        batches.put(None)

    threading.Thread(target=listen, daemon=True).start()
    return chain.from_iterable(iter(batches.get, None))
