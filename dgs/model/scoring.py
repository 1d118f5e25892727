"""Scoring of files: every file under some paths becomes one row, a probability with a verdict or the reason why not.

Several processes give the rows of one: batches of files go to them in turn and come back in the same turn, so that
order needs no sorting and a batch holds the files that it would hold in one process. A process has a few batches at a
time: memory does not grow with the number of files. Unlike training's processes they are no group: none waits for
another.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from dgs.conditions import Condition, parse_condition
from dgs.data.images import files_under
from dgs.device import choose_device
from dgs.errors import UserError
from dgs.model import distributed
from dgs.model.detector import AHEAD, BATCH, Detector, Engine, View, newest_checkpoint, read_about
from dgs.model.distributed import Member
from dgs.model.hub import located
from dgs.model.judge import Judge, Promise, judge
from dgs.model.onnx_engine import caution
from dgs.workspace import find_root

INDEX = "views.jsonl"
PROMISE = Promise()
# Changes that a picture meets on its way through the web: under each of them a stable verdict stays what it is.
CHANGES = tuple(map(parse_condition, ("jpeg:90", "jpeg:75", "resize:0.5", "crop:0.9")))
# Batches that a process has at a time: those it decodes ahead, the one its tower works on, and one on the way.
AT_A_TIME = AHEAD + 2
# What workers do, and what to do if one dies.
TOGETHER = (
    "score",
    "What was printed until then is right. Run the same command again; if memory was short, with fewer --processes.",
)

Row = dict[str, Any]


class Upload(NamedTuple):
    """A file that is in memory alone."""

    name: str
    content: bytes


class ScoredFile(NamedTuple):
    """{"path", "probability", "verdict"} and what the model saw; or {"path", "error"} and None."""

    row: Row
    view: View | None


def score_files(
    paths: Iterable[Path],
    checkpoint: Path | None,
    warn: Callable[[str], None],
    batch_size: int = BATCH,
    explain: Path | None = None,
    processes: int = 1,
    engine: Engine = "torch",
    promise: Promise = PROMISE,
    stability: bool = False,
) -> Iterator[Row]:
    """Every file under `paths`, scored or refused; a few batches of views are in memory at a time.

    Args:
        paths: files, or folders: every file in them is tried, whatever its name (but for a dot at its beginning).
        checkpoint: a checkpoint folder, or an exported file (engine "onnx"); None: the newest of the pipelines here.
        warn: told of what a verdict is worth.
        explain: a new folder for what the model saw of each image, the selected patches or else the whole view.
        processes: that share the files on this machine; the rows and their order are the same. One is this one. Of
            several, each takes a GPU of its own while there are enough, and its share of the cores. Where torchrun
            started this process, its processes share the files instead, on all machines; the first one yields.

        promise: what is asked of verdicts.
        stability: every file is scored under `CHANGES` too; a row has "stable", such as "3/4", the number of these
            under which its verdict is the same, and its verdict is "unsure" unless all are.

    Yields:
        {"path", "probability", "verdict"} and what else the checkpoint tells (`Judge.told`), or {"path", "error"}.

    Raises:
        UserError: none of the paths exists, nothing to score in them, no checkpoint or a damaged one, `explain` in
            one of the paths or not to be written to; a promise that cannot be kept; one of several processes died.
    """
    if stability and promise.two_way:
        raise UserError("Expected --stability or --two-way, found both: what is not stable is unsure. Leave one out.")
    files = _files(list(paths), explain)
    folder = newest_checkpoint(find_root()) if checkpoint is None else located(checkpoint)
    info = read_about(folder, engine)
    reader = judge(info, folder, promise)
    with ExitStack() as stack:
        stack.enter_context(distributed.torchrun("score"))
        if distributed.in_group():
            device = str(distributed.own_device(choose_device("auto"))) if engine == "torch" else "cpu"
            batches = _in_group(
                Detector.load(folder, device=device, engine=engine), reader, files, batch_size, stability
            )
            warn, explain = (warn, explain) if distributed.rank() == 0 else (lambda _: None, None)
        elif processes == 1:
            batches = score_batches(Detector.load(folder, engine=engine), reader, files, batch_size, None, stability)
        else:
            settings = (processes, folder, engine, reader, batch_size, explain is not None, stability)
            workers = stack.enter_context(distributed.started(processes, _work, *settings))
            for worker in workers:
                worker.recv(*TOGETHER)  # that it is ready
            batches = _shared(workers, files, batch_size)
        if explain is not None:
            _make_empty(explain)
        warn(f"checkpoint {folder}: {reader.note}.")
        if remark := caution(info):
            warn(f"warning: {remark}.")
        if info["params"].get("data", {}).get("layout") == "minibench":
            warn(
                f"warning: {folder} was trained on the embedded 64 px benchmark; its verdicts on photographs mean "
                f"little."
            )
        explained = 0
        for row, view in tqdm(chain.from_iterable(batches), desc="scoring", unit="image"):
            if explain is not None and view is not None:
                explained += 1
                _explain(explain, f"{explained:06d}.png", row, view)
            yield row


def score_batches(
    detector: Detector,
    reader: Judge,
    files: Iterable[Path | Upload],
    size: int,
    threads: int | None = None,
    stability: bool = False,
) -> Iterator[list[ScoredFile]]:
    """Every file, scored or refused, as `Detector.batches`."""
    changes = (None, *CHANGES) if stability else (None,)
    items = ((file, change) for file in files for change in changes)

    def view_of(item: tuple[Path | Upload, Condition | None]) -> View:
        file, change = item
        return detector.view(file.content if isinstance(file, Upload) else file, change)

    for batch, logits in detector.batches(items, size * len(changes), threads, view_of):
        exact = iter(logits.astype(np.float64).tolist())
        scored = []
        for start in range(0, len(batch), len(changes)):
            (file, _), view = batch[start]
            path = file.name if isinstance(file, Upload) else file
            views = [view for _, view in batch[start : start + len(changes)]]
            own = [next(exact) for each in views if not isinstance(each, UserError)]
            if refused := [each for each in views if isinstance(each, UserError)]:
                scored.append(ScoredFile({"path": str(path), "error": str(refused[0])}, None))
                continue
            assert not isinstance(view, UserError)
            row = {"path": str(path), **reader.told(own[0])}
            scored.append(ScoredFile({**row, **_stable(reader, row["verdict"], own[1:])} if stability else row, view))
        yield scored


def _stable(reader: Judge, verdict: str, changed: Sequence[float]) -> Row:
    """What the logits of changed images say of a verdict."""
    same = sum(reader.verdict(logit) == verdict for logit in changed)
    return {"verdict": verdict if same == len(changed) else "unsure", "stable": f"{same}/{len(changed)}"}


def _files(paths: list[Path], explain: Path | None) -> Iterator[Path]:
    named = (
        str(paths[0]) if len(paths) == 1 else f"{paths[0]} or the {len(paths) - 1} other paths" if paths else "no path"
    )
    there = [path for path in paths if _is_there(path)]
    if paths and not there:
        raise UserError(f"Expected a file or folder at {named}, found none.")
    if explain is not None and (inside := [path for path in there if explain.resolve().is_relative_to(path.resolve())]):
        # A view saved in a folder that is being scored would be scored in its turn.
        raise UserError(
            f"Expected --explain to lie outside of what is scored, found {explain} in {inside[0]}. Move it."
        )
    files = files_under(paths)
    first = next(files, None)
    if first is None:
        raise UserError(f"Expected a file to score in {named}, found none.")
    return chain([first], files)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be looked into
        return False


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror or error}). Choose another folder.") from None


def _make_empty(folder: Path) -> None:
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    if not empty:
        raise UserError(f"Expected --explain to name a new or an empty folder, found {folder}. Choose another.")


def _explain(folder: Path, name: str, row: Row, view: View) -> None:
    """Save a view as the PNG `name`, and its row with that name in the index."""
    with _writing_to(folder):
        Image.fromarray(view).save(folder / name)
        with (folder / INDEX).open("a", encoding="ascii") as index:
            index.write(json.dumps({"view": name, **row}) + "\n")


def _in_group(
    detector: Detector, reader: Judge, files: Iterator[Path], size: int, stability: bool
) -> Iterator[list[ScoredFile]]:
    """The batches of `score_batches`, each by the next of torchrun's processes; the first process gets all of them."""
    batches = enumerate(iter(lambda: list(islice(files, size)), []))
    own = (batch for number, batch in batches if number % distributed.count() == distributed.rank())
    scored = score_batches(detector, reader, chain.from_iterable(own), size, None, stability)
    while any(done := distributed.all_gather(next(scored, None))):
        if distributed.rank() == 0:
            yield from filter(None, done)


def _shared(workers: Sequence[Member], files: Iterator[Path], size: int) -> Iterator[list[ScoredFile]]:
    """The batches of `score_batches`, each by the next of the workers."""
    waiting = deque[Member]()
    for worker in cycle(workers):
        batch = list(islice(files, size))
        if not batch:
            break
        if len(waiting) == AT_A_TIME * len(workers):
            yield waiting.popleft().recv(*TOGETHER)
        _tell(worker, batch)
        waiting.append(worker)
    for worker in workers:
        _tell(worker, None)
    while waiting:
        yield waiting.popleft().recv(*TOGETHER)


def _tell(worker: Member, batch: list[Path] | None) -> None:
    with suppress(OSError):  # that it has died is noticed when its answer's turn comes
        worker.line.send(batch)


def _work(
    number: int,
    count: int,
    folder: Path,
    engine: Engine,
    reader: Judge,
    size: int,
    with_views: bool,
    stability: bool,
    line: Connection,
) -> None:
    """What each worker does: open the checkpoint, say so, then answer batches of files with batches of rows."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    detector = Detector.load(folder, device=own_device(number) if engine == "torch" else "cpu", engine=engine)
    line.send((True, None))
    threads = max(1, (os.cpu_count() or 1) // count)
    for batch in score_batches(detector, reader, _received(line), size, threads, stability):
        line.send((True, batch if with_views else [ScoredFile(row, None) for row, _ in batch]))


def own_device(number: int) -> str:
    """The device of worker `number`: a GPU of its own, or a shared one if there are fewer; the CPU if there is none."""
    cards = torch.cuda.device_count()
    return f"cuda:{number % cards}" if cards else "cpu"


def _received(line: Connection) -> Iterator[Path]:
    """Files of the batches that come along `line`.

    A thread takes them off the line: without it, while this process sends a large answer, both ends might wait for the
    other to read. What it holds is bounded by what the sender sends ahead.
    """
    batches: SimpleQueue[list[Path] | None] = SimpleQueue()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (batch := line.recv()) is not None:
                batches.put(batch)
        batches.put(None)

    threading.Thread(target=listen, daemon=True).start()
    return chain.from_iterable(iter(batches.get, None))
