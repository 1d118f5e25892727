"""Several processes on one run: each takes its shard of every batch, and sums make the whole (torch.distributed).

The group is torch's own; without one every function here is that of a single process, so that one process runs the same
code. Differs from DistributedDataParallel, and from accelerate around it: they average gradients of a loss that is
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
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dgs.errors import UserError

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds that a process waits for the others
POLL = 0.5  # seconds between two looks at whether torchrun is still there
AGAIN = "Run the same command again: it goes on from the last snapshot."
AFTER_DEATH = f"{AGAIN} If memory was short, lower train.processes, train.batch_size or compute.jobs."


def in_group() -> bool:
    """True if several processes share the run."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if in_group() else 0


def count() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if in_group() else 1


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`: contiguous, and in the order of processes they are `items` again."""
    size = -(-len(items) // count())
    return items[rank() * size : (rank() + 1) * size]


def all_gather(value: T) -> list[T]:
    """The `value` of every process, in their order."""
    if not in_group():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The first process's `value`, for all."""
    return all_gather(value)[0]


def wait_for_all() -> None:
    """Go on when every process is here."""
    all_gather(None)


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over processes, by name; a process may lack names."""
    sums: dict[str, float] = {}
    for some in all_gather(dict(values)):
        for name, value in some.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def all_gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) rows of each process to the (N, ...) rows of all, in their order, on every process."""
    if not in_group():
        return rows
    lengths = all_gather(len(rows))
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def all_reduce(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over processes of each tensor, the same bits on each; shapes must agree."""
    if not in_group():
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Every parameter's gradient becomes the sum over processes, the same bits on each; no gradient counts as zero."""
    if not in_group():
        return
    given = list(parameters)
    sums = all_reduce([torch.zeros_like(p) if p.grad is None else p.grad for p in given])
    for parameter, gradient in zip(given, sums, strict=True):
        parameter.grad = gradient


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where `device` is a GPU without a number and there are several processes.

    Raises:
        UserError: fewer GPUs than processes on this machine.
    """
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
    parent, number = parent_process(), os.getppid()

    def watch() -> None:
        if parent is not None:
            parent.join()
        while parent is None and os.getppid() == number:  # started by torchrun, say: nothing to wait on
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _init_group(timeout: float, here_alone: bool, **where: Any) -> None:
    if here_alone and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, which may have no network
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **where)


@contextmanager
def torchrun(task: str, after: str = "") -> Iterator[None]:
    """In this block the processes that a `torchrun` started, here and elsewhere, are a group; without one, nothing is.

    Args:
        task: what they do together, for the error: "train".
        after: how the error ends: what running the command again does.

    Raises:
        UserError: another process ended or did not answer.
    """
    everywhere = int(os.environ.get("WORLD_SIZE", "1"))
    if everywhere == 1:
        yield
        return
    end_with_parent()  # torchrun's agent, killed, leaves its processes behind
    try:
        _init_group(TIMEOUT, int(os.environ.get("LOCAL_WORLD_SIZE", everywhere)) == everywhere)
        yield
        wait_for_all()  # to the others, leaving early looks like dying
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if not (isinstance(error, dist.DistError) or "gloo" in reason.lower()):
            raise
        raise UserError(
            f"Expected {everywhere} processes to {task} together, found that process {os.environ['RANK']} lost another "
            f"({reason.rpartition('] ')[2].partition('. ')[0]}). Run the same command on every machine again"
            f"{after}."
        ) from None
    finally:
        if in_group():
            dist.destroy_process_group()


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


@dataclass(frozen=True)
class Member:
    """One of `count` processes as the one that started them sees it: each answer is (good, what it says)."""

    number: int
    count: int
    process: BaseProcess
    line: Connection

    def recv(self, task: str, after_death: str) -> Any:
        """What it says next.

        Args:
            task: what the processes do together, for the error: "train".
            after_death: sentences on what to do if it died.

        Raises:
            UserError: what stopped it, or that it died.
            RuntimeError: a bug that stopped it.
        """
        try:
            good, said = self.line.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise UserError(
                f"Expected {self.count} processes to {task} together, found that process {self.number} died ({how}). "
                f"{after_death}"
            ) from None
        if not good and not isinstance(said, UserError):
            raise RuntimeError(f"Process {self.number} of {self.count} stopped. {said}")
        if not good:
            raise said
        return said


def _work(target: Callable[..., None], number: int, arguments: tuple[Any, ...], line: Connection) -> None:
    """What each process does: `target`, whose error goes along the line."""
    end_with_parent()
    try:
        target(number, *arguments, line)
    except BaseException as error:
        with suppress(Exception):
            line.send((False, error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"))
    sys.stderr.flush()
    os._exit(0)  # its threads may wait for ever, and nobody waits for them


@contextmanager
def started(count: int, target: Callable[..., None], *arguments: Any, daemon: bool = True) -> Iterator[list[Member]]:
    """So many processes of this machine, each with a line to this one; at the end of the block all end.

    Ctrl-C is for this process alone. They end with this one even if the block is never left.

    Args:
        target: called in each as target(number, *arguments, line), where its error goes too; importable, as are its
            arguments picklable.
        daemon: they may start no processes themselves.
    """
    context = get_context("spawn")
    members: list[Member] = []
    try:
        with _deaf_to_interrupts():
            for number in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=_work, args=(target, number, arguments, theirs), daemon=daemon)
                process.start()
                theirs.close()
                members.append(Member(number, count, process, mine))
        yield members
    finally:
        for member in members:
            member.process.kill()
        for member in members:
            member.process.join()


def _member(
    number: int,
    processes: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    line: Connection,
) -> None:
    """What each process of `run` does; `folder` is for meeting the others."""
    try:
        store = dist.FileStore(f"{folder}/rendezvous", processes)
        _init_group(timeout, True, store=store, rank=number, world_size=processes)
        result = function(*arguments)
        store.set(f"done-{number}", "")
        store.wait([f"done-{other}" for other in range(processes)])  # to the others, leaving early looks like dying
    except UserError:
        raise
    except Exception as error:
        if "imed out" in str(error) or "imeout" in str(error):
            raise UserError(
                f"Expected {processes} processes to keep step, found that process {number} waited too long for another "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). {AGAIN}"
            ) from None
        time.sleep(1.0)  # if another process died, its end is noticed before the complaint about it
        raise
    line.send((True, result if number == 0 else None))
    line.poll(None)  # tensors in it are handed over as shared memory of this process: it is ended when they are there


def run(processes: int, function: Callable[..., T], *arguments: Any, timeout: float = TIMEOUT) -> T:
    """`function(*arguments)` in so many processes that form a group; the first one's result.

    One process needs no other: the function is called here. As soon as one fails or dies, all end. Ctrl-C, which a
    terminal sends to all, is for this process alone.

    Args:
        function: importable, as are its arguments picklable; they may hold shared memory of `multiprocessing`.
        timeout: seconds that a process waits for the others.

    Raises:
        UserError: what stopped one of them; that one died; that they waited too long for one.
    """
    if processes == 1:
        return function(*arguments)
    results: dict[int, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="dgs-") as folder,
        started(processes, _member, processes, folder, timeout, function, arguments, daemon=False) as members,
    ):
        waiting: dict[Any, Member] = {member.line: member for member in members}
        while waiting:
            for line in wait(list(waiting)):
                member = waiting.pop(line)
                results[member.number] = member.recv("train", AFTER_DEATH)
    return cast(T, results[0])
