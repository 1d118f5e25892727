"""Several processes on one run: each takes its share of every batch, and sums make the whole (torch.distributed).

The group is torch's own, one a process; without one every function here leaves things as they are, so that one process
runs the same code. Not DistributedDataParallel, and not accelerate around it: they average gradients of a loss that is
backpropagated through the whole model, while the surgery hands the tower a gradient of its own, scaled by the whole
batch. That needs a sum, and only that.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dgs.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
PATIENCE = 1800.0  # seconds that a process waits for the others


def _group() -> Any:
    """torch.distributed where this process is in a group, else None."""
    loaded = sys.modules.get("torch.distributed")
    return loaded if loaded is not None and loaded.is_available() and loaded.is_initialized() else None


def rank() -> int:
    """This process's number, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def count() -> int:
    """How many processes share the run."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`: contiguous, and in the order of processes they are `items` again."""
    size = -(-len(items) // count())
    return items[rank() * size : (rank() + 1) * size]


def gathered(value: T) -> list[T]:
    """The `value` of every process, in their order."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * count()
    group.all_gather_object(values, value)
    return values


def agreed(value: bool) -> bool:
    """The first process's `value`, for all."""
    return gathered(value)[0]


def wait_for_all() -> None:
    """Go on when every process is here."""
    gathered(None)


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over processes, by name; a process may lack names."""
    sums: dict[str, float] = {}
    for some in gathered(dict(values)):
        for name, value in some.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def whole(rows: Tensor) -> Tensor:
    """(n, ...) rows of each process to the (N, ...) rows of all, in their order, on every process."""
    import torch

    group = _group()
    if group is None:
        return rows
    lengths = gathered(len(rows))
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    group.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Every parameter's gradient becomes the sum over processes, the same bits on each; no gradient counts as zero."""
    import torch

    if _group() is None:
        return
    given = list(parameters)
    sums = summed([torch.zeros_like(p) if p.grad is None else p.grad for p in given])
    for parameter, gradient in zip(given, sums, strict=True):
        parameter.grad = gradient


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over processes of each tensor, the same bits on each; shapes must agree."""
    import torch

    group = _group()
    if group is None:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    group.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where `device` is a GPU without a number and there are several processes.

    Raises:
        UserError: fewer GPUs than processes on this machine.
    """
    import torch

    if device.type != "cuda" or device.index is not None or count() == 1:
        return device
    local = int(os.environ.get("LOCAL_RANK", rank()))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count()))
    if torch.cuda.device_count() < here:
        raise UserError(
            f"Expected a GPU for each of {here} processes, found {torch.cuda.device_count()}. Set train.processes to "
            f"that, or compute.device: cpu."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does: nobody waits for its work any more."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(patience: float, here_alone: bool, **where: Any) -> None:
    import torch
    import torch.distributed as dist

    if here_alone and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, which may have no network
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=patience), **where)


def _join(number: int, processes: int, meeting: str, patience: float) -> None:
    import torch.distributed as dist

    _begin(patience, True, store=dist.FileStore(meeting, processes), rank=number, world_size=processes)


def join_torchrun() -> None:
    """Join the group of a `torchrun` that started this process; without one, nothing happens."""
    everywhere = int(os.environ.get("WORLD_SIZE", "1"))
    if everywhere > 1 and _group() is None:
        _begin(PATIENCE, int(os.environ.get("LOCAL_WORLD_SIZE", everywhere)) == everywhere)


def _member(
    number: int,
    processes: int,
    meeting: str,
    patience: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    begin: Callable[..., None] | None,
    begin_with: tuple[Any, ...],
    answer: Any,
) -> None:
    end_with_parent()
    try:
        if begin is not None:
            begin(*begin_with)
        _join(number, processes, meeting, patience)
        result = function(*arguments)
        answer.send((True, result if number == 0 else None))
        answer.recv()  # leave together: whoever leaves early looks like one that died
    except BaseException as error:
        with suppress(Exception):
            answer.send((False, error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"))
    sys.stderr.flush()
    os._exit(0)  # threads of the group may wait for others for ever


def run(
    processes: int,
    function: Callable[..., T],
    *arguments: Any,
    begin: Callable[..., None] | None = None,
    begin_with: tuple[Any, ...] = (),
    patience: float = PATIENCE,
) -> T:
    """`function(*arguments)` in so many processes that form a group; the first one's result.

    One process needs no other: the function is called here. As soon as one fails or dies, all end.

    Args:
        function: importable, as are its arguments picklable.
        begin: called in each process before anything else.
        patience: seconds that a process waits for the others.

    Raises:
        UserError: what stopped one of them; that one died; that they waited too long for one.
    """
    if processes == 1:
        return function(*arguments)
    with tempfile.TemporaryDirectory(prefix="dgs-") as folder:
        settings = (processes, str(Path(folder) / "meeting"), patience, function, arguments, begin, begin_with)
        with started(processes, _member, *settings) as members:
            return _outcome(members)


@dataclass(frozen=True)
class Member:
    """One of several processes as the one that started it sees it."""

    number: int
    process: BaseProcess
    line: Connection

    def hear(self) -> tuple[bool, Any]:
        """What it says next, which begins with whether that is good; once it has died, (False, its exit code)."""
        try:
            good, said = self.line.recv()
        except (EOFError, OSError):
            self.process.join()
            return False, self.process.exitcode
        return good, said


@contextmanager
def started(count: int, target: Callable[..., None], *arguments: Any, daemon: bool = False) -> Iterator[list[Member]]:
    """So many processes of this machine, each with a line to this one; at the end of the block all end.

    Ctrl-C, which a terminal sends to all, is for this one alone.

    Args:
        target: called in each as target(number, *arguments, line); importable, as are its arguments picklable.
        daemon: they may start no processes of their own, and end with this one even where the block is never left.
    """
    context = get_context("spawn")
    members: list[Member] = []
    try:
        with _deaf_to_interrupts():
            for number in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=target, args=(number, *arguments, theirs), daemon=daemon)
                process.start()
                theirs.close()
                members.append(Member(number, process, mine))
        yield members
    finally:
        for member in members:
            member.process.kill()
        for member in members:
            member.process.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started in this block ignores Ctrl-C from its first moment, so that it writes no traceback on loading."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(members: list[Member]) -> Any:
    """The first process's result, when all are done; or the most telling of what went wrong."""
    results: dict[int, Any] = {}
    failures: dict[int, Any] = {}
    end = float("inf")
    while len(results) + len(failures) < len(members) and time.monotonic() < end:
        silent = [member for member in members if member.number not in results and member.number not in failures]
        by_line = {member.line: member for member in silent}
        for line in wait(list(by_line), timeout=0.2):
            member = by_line[cast(Connection, line)]
            good, said = member.hear()
            (results if good else failures)[member.number] = said
        if failures and end == float("inf"):
            end = time.monotonic() + 2.0  # the others' complaints may say more, or only that one has gone
    if not failures:
        for member in members:
            member.line.send(None)
        return results[0]
    for said in failures.values():
        if isinstance(said, UserError):
            raise said
    for number, said in failures.items():
        if isinstance(said, int):
            raise UserError(
                f"Expected {len(members)} processes to train together, found that process {number} died "
                f"({how(said)}). Run the same command again: it goes on from the last snapshot. If memory was short, "
                f"lower train.processes, train.batch_size or compute.jobs."
            )
    number, said = next(iter(failures.items()))
    if "imed out" in said or "imeout" in said:
        raise UserError(
            f"Expected {len(members)} processes to keep step, found that process {number} waited too long for another "
            f"({said.splitlines()[0]}). Run the same command again: it goes on from the last snapshot."
        )
    raise RuntimeError(f"Process {number} of {len(members)} stopped. {said}")


def how(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
