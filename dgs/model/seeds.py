"""All seeds of one method, side by side in processes of their own: small models leave no work for a second thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dgs.data.prepared import load_prepared
from dgs.model.journal import Journal
from dgs.model.methods import get_method, total_steps
from dgs.params import Params

if TYPE_CHECKING:
    from dgs.model.train import Trained

_steps: Any = None  # in a worker: the counter it shares with the parent


def _share(counter: Any) -> None:
    global _steps  # noqa: PLW0603  # a process pool hands shared memory over at start only
    _steps = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a killed notebook must not leave workers training for nobody


def _count() -> None:
    if _steps is not None:
        with _steps.get_lock():
            _steps.value += 1


@contextmanager
def _silent_workers() -> Iterator[None]:
    """Processes started in this block show no bars of their own: the parent shows one for all seeds."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, so the parent's bar is not affected
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def train_seed(method: str, seed: int, params: Params, root: Path, prepared_folder: Path, folder: Path) -> Journal:
    """Train one method with one seed and save its checkpoint as `folder`/seed-<seed>."""
    # Imported here: the parent starts workers and waits, and should not spend seconds on loading CLIP's libraries.
    from dgs.model.backbone import load_clip
    from dgs.model.checkpoint import save_checkpoint
    from dgs.model.device import choose_device
    from dgs.model.train import train

    clip = load_clip(params.model, root, params.image_size, text=False)
    prepared = load_prepared(prepared_folder, root)
    journals: list[Journal] = []

    def done(trained: Trained) -> None:
        target = folder / f"seed-{seed}"
        data_hash = prepared.info["data_hash"]
        own = get_method(method).of(params)
        save_checkpoint(target, trained.backbone, trained.heads, clip, own, method, seed, trained.thresholds, data_hash)
        journals.append(trained.journal)

    train(get_method(method), clip, prepared, params, seed, choose_device(params.compute.device), done, _count)
    return journals[0]


def train_seeds(method: str, params: Params, root: Path, prepared_folder: Path, folder: Path) -> list[Journal]:
    """Train one method with every seed of `params`, `compute.jobs` at a time; the results do not depend on how many.

    Args:
        root: repository, for a relative model.clip and data.root.
        prepared_folder: what the prepare stage made.
        folder: gets one checkpoint folder a seed.

    Returns:
        the journals, in the order of the seeds.
    """
    size = len(load_prepared(prepared_folder, root).split("train"))
    steps = len(params.seeds) * total_steps(get_method(method), size, params)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    rest = (params, root, prepared_folder, folder)
    jobs = min(params.compute.jobs, len(params.seeds))
    with (
        _silent_workers(),
        ProcessPoolExecutor(jobs, context, initializer=_share, initargs=(counter,)) as pool,
        tqdm(total=steps, desc=f"{method}, all seeds", unit="step") as progress,
    ):
        futures: list[Future[Journal]] = [pool.submit(train_seed, method, seed, *rest) for seed in params.seeds]
        try:
            while wait(futures, timeout=0.5).not_done:
                progress.update(counter.value - progress.n)
                for future in futures:
                    if future.done():
                        future.result()  # raises what stopped it, without waiting for the others
            progress.update(counter.value - progress.n)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
