"""Several processes on one run: each takes its shard of every batch, and sums make the whole (torch.distributed).

The group is torch's own; without one every function here is that of a single process, so that one process runs the same
code. Differs from DistributedDataParallel, and from accelerate around it: they average gradients of a loss that is
backpropagated through the whole model, while the surgery hands the tower a gradient of its own, scaled by the whole
batch. That needs a sum, and only that.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dgs.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds that a process waits for the others


def _group() -> Any:
    """torch.distributed if this process is in a group, else None."""
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


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`: contiguous, and in the order of processes they are `items` again."""
    size = -(-len(items) // count())
    return items[rank() * size : (rank() + 1) * size]


def all_gather(value: T) -> list[T]:
    """The `value` of every process, in their order."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * count()
    group.all_gather_object(values, value)
    return values


def broadcast(value: bool) -> bool:
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
    import torch

    group = _group()
    if group is None:
        return rows
    lengths = all_gather(len(rows))
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    group.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def all_reduce(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum over processes of each tensor, the same bits on each; shapes must agree."""
    import torch

    group = _group()
    if group is None:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    group.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Every parameter's gradient becomes the sum over processes, the same bits on each; no gradient counts as zero."""
    import torch

    if _group() is None:
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


def _init_group(timeout: float, here_alone: bool, **where: Any) -> None:
    import torch
    import torch.distributed as dist

    if here_alone and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, which may have no network
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **where)


def join_torchrun() -> None:
    """Join the group of a `torchrun` that started this process; without one, nothing happens."""
    everywhere = int(os.environ.get("WORLD_SIZE", "1"))
    if everywhere > 1 and _group() is None:
        _init_group(TIMEOUT, int(os.environ.get("LOCAL_WORLD_SIZE", everywhere)) == everywhere)


def _member(
    number: int,
    processes: int,
    folder: Path,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """What each process of `run` does; results and errors are files in `folder`."""
    import torch.distributed as dist

    end_with_parent()
    code = 0
    try:
        store = dist.FileStore(str(folder / "rendezvous"), processes)
        _init_group(timeout, True, store=store, rank=number, world_size=processes)
        result = function(*arguments)
        if number == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
        store.set(f"done-{number}", "")
        store.wait([f"done-{other}" for other in range(processes)])  # to the others, leaving early looks like dying
    except BaseException as error:
        said = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
        (folder / f"error-{number}").write_bytes(pickle.dumps(said))
        if said is not error:
            time.sleep(1.0)  # if another process died, its end is noticed before the complaint about it
        code = 1
    sys.stderr.flush()
    os._exit(code)  # threads of the group may wait for others for ever


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
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # how it ends them is no user's concern
    with tempfile.TemporaryDirectory(prefix="dgs-") as folder:
        given = (processes, Path(folder), timeout, function, arguments)
        with _deaf_to_interrupts():
            group = start_processes(_member, given, processes, join=False)
        try:
            while not group.join(grace_period=2.0):
                pass
            return pickle.loads((Path(folder) / "result").read_bytes())
        except ProcessExitedException as first:
            raise _failure(Path(folder), processes, first.error_index, first.exit_code) from None
        finally:
            for process in group.processes:
                process.kill()
                process.join()


def _failure(folder: Path, processes: int, number: int, code: int) -> Exception:
    """The most telling of what went wrong, given the first process that ended badly."""
    errors = {file.name: pickle.loads(file.read_bytes()) for file in sorted(folder.glob("error-*"))}
    for error in errors.values():
        if isinstance(error, UserError):
            return error
    error = errors.get(f"error-{number}")
    if error is None:
        return UserError(
            f"Expected {processes} processes to train together, found that process {number} died "
            f"({exit_reason(code)}). Run the same command again: it goes on from the last snapshot. If memory was "
            f"short, lower train.processes, train.batch_size or compute.jobs."
        )
    if "imed out" in str(error) or "imeout" in str(error):
        return UserError(
            f"Expected {processes} processes to keep step, found that process {number} waited too long for another "
            f"({str(error).splitlines()[0]}). Run the same command again: it goes on from the last snapshot."
        )
    return RuntimeError(f"Process {number} of {processes} stopped. {error}")


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


def exit_reason(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


@dataclass(frozen=True)
class Member:
    """One of several processes as the one that started it sees it."""

    number: int
    process: BaseProcess
    line: Connection

    def recv(self) -> tuple[bool, Any]:
        """What it says next, which begins with whether that is good; once it has died, (False, its exit code)."""
        try:
            good, said = self.line.recv()
        except (EOFError, OSError):
            self.process.join()
            return False, self.process.exitcode
        return good, said


@contextmanager
def started(count: int, target: Callable[..., None], *arguments: Any) -> Iterator[list[Member]]:
    """So many processes of this machine, each with a line to this one; at the end of the block all end.

    Ctrl-C is for this process alone. They end with this one even if the block is never left, and may start none.

    Args:
        target: called in each as target(number, *arguments, line); importable, as are its arguments picklable.
    """
    context = get_context("spawn")
    members: list[Member] = []
    try:
        with _deaf_to_interrupts():
            for number in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=target, args=(number, *arguments, theirs), daemon=True)
                process.start()
                theirs.close()
                members.append(Member(number, process, mine))
        yield members
    finally:
        for member in members:
            member.process.kill()
        for member in members:
            member.process.join()
