"""Work done ahead in threads: results in order, a bounded number of them and of their bytes at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Room:
    """So much of something may be in use at a time, in any unit; who wants more waits.

    What is larger than all of it is let in alone. Take a second room only while holding none that others want first.
    """

    def __init__(self, size: int) -> None:
        self.size, self._used, self._changed = size, 0, threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Within this block `amount` is in use."""
        amount = min(amount, self.size)
        with self._changed:
            self._changed.wait_for(lambda: self._used + amount <= self.size)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


def _one_thread_each() -> None:
    torch.set_num_threads(1)  # OpenMP's number is a thread's own: whoever consumes the results keeps all of theirs


def ahead(function: Callable[[T], R], items: Iterable[T], window: int, workers: int | None = None) -> Iterator[R]:
    """`map(function, items)`, in order, computed by threads while the consumer does something else.

    Args:
        function: pays in threads if it leaves Python's lock alone, as decoding does.
        items: taken one by one, never more than `window` ahead of the consumer.
        window: how many results may be waiting.
        workers: threads; None: one a core.

    Raises:
        whatever `function` raised, when its result's turn comes; what was not begun by then is not begun.
    """
    rest = iter(items)
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, "ahead", _one_thread_each)
    try:
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(rest, window))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
