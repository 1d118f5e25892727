"""All seeds of one method, side by side in processes of their own: small models leave no work for a second thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from dgs.data.prepared import TRAINING, load_training
from dgs.errors import UserError
from dgs.model import distributed
from dgs.model.methods.registry import get_method, require_text
from dgs.model.training_log import TrainingLog
from dgs.params import Params
from dgs.stats import Scored

if TYPE_CHECKING:
    from dgs.model.train import Trained

_steps: Any = None  # in a worker: the counter it shares with the parent


def _share(counter: Any) -> None:
    global _steps  # noqa: PLW0603  # a process pool hands shared memory over at start only
    _steps = counter
    distributed.end_with_parent()


def _count() -> None:
    if _steps is not None and distributed.rank() == 0:
        with _steps.get_lock():
            _steps.value += 1


@contextmanager
def _silent_workers() -> Iterator[None]:
    """Processes started in this block show no bars of their own: the parent shows one for all seeds."""
    before = os.environ.get("TQDM_DISABLE", "")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, so the parent's bar is not affected
    try:
        yield
    finally:
        os.environ["TQDM_DISABLE"] = before


def train_seed(
    method: str, seed: int, params: Params, root: Path, prepared_folder: Path, folder: Path, unfinished: Path
) -> TrainingLog | None:
    """Train one method with one seed and save its checkpoint as `folder`/seed-<seed>.

    Args:
        unfinished: folder of snapshots: a run resumes what an earlier one left there, and copies a seed that it
            finished.

    Returns:
        the log; None in all but the first of several processes.
    """
    # Imported here: the parent starts workers and waits, and should not spend seconds on loading CLIP's libraries.
    from dgs.device import choose_device
    from dgs.model.checkpoint import save_checkpoint
    from dgs.model.clip import load_clip
    from dgs.model.detector import Detector, TorchTower
    from dgs.model.gemm import resolve
    from dgs.model.selfcheck import logits_of_pictures
    from dgs.model.snapshot import Snapshot, run_key
    from dgs.model.train import train

    chosen, params = get_method(method), params.for_method(method)
    gemm = resolve(params.compute.gemm) if chosen.tunes_clip else "torch"
    params = params.replaced({"compute.gemm": gemm})  # recorded in the checkpoint, and part of the snapshot's key
    own = chosen.of(params)
    device = distributed.own_device(choose_device(params.compute.device))
    clip = load_clip(params.model, root, params.image_size, text=False, gemm=gemm) if chosen.needs_clip else None
    identity = {} if clip is None else clip.identity
    prepared = load_training(prepared_folder, root).with_training_images(params.train.images, seed)
    for name, found in identity.items():
        what, said = {"clip": "weights", "clip_features": "settings"}[name], prepared.info.get(name, found)
        if said != found:
            raise UserError(
                f"Expected the CLIP that captions were embedded by, with {what} {said[:12]}, found {params.model.clip} "
                f"with {found[:12]}. Run prepare again."
            )
    of_run = (params, prepared_folder / TRAINING, " ".join(identity.values()), device)
    own_folder, common = (unfinished / run_key(method, number, *of_run) for number in (seed, None))
    snapshot = Snapshot(own_folder, params.compute.snapshot_seconds, common)

    def done(trained: Trained) -> None:
        if distributed.rank() == 0:
            snapshot.save_log(trained.log)
            decisions = (trained.thresholds, prepared.info["training_hash"], trained.calibration)
            kept: dict[str, Any] = {
                "validation": Scored.of(trained.truth, trained.logits),
                "selfcheck": logits_of_pictures(Detector(TorchTower(trained.classifier), own, {})),
            }
            save_checkpoint(snapshot.checkpoint, trained.classifier, own, method, seed, *decisions, **kept)

    if not snapshot.is_done:
        train(chosen, clip, prepared, params, seed, device, done, _count, snapshot)
    return snapshot.publish(method, seed, folder / f"seed-{seed}") if distributed.rank() == 0 else None


def train_by_torchrun(
    method: str, seed: int, params: Params, root: Path, prepared_folder: Path, folder: Path, unfinished: Path
) -> bool:
    """`train_seed`, alone or in each of the processes that torchrun started.

    Returns:
        whether this is the first of them; all have finished.
    """
    with distributed.torchrun("train", ": it goes on from the last snapshot"):
        params = load_training(prepared_folder, root).with_prepared(params)
        params = params.replaced({"train.processes": distributed.count()})
        train_seed(method, seed, params, root, prepared_folder, folder, unfinished)
        return distributed.rank() == 0


def _train_counted(counter: Any, *arguments: Any) -> TrainingLog:
    _share(counter)
    return cast(TrainingLog, train_seed(*arguments))  # of the first process, whose log alone is looked at


def _train_together(processes: int, *arguments: Any) -> TrainingLog:
    """`train_seed` in so many processes that share every batch."""
    return distributed.run(processes, _train_counted, _steps, *arguments)


def train_seeds(
    method: str, params: Params, root: Path, prepared_folder: Path, folder: Path, unfinished: Path
) -> list[TrainingLog]:
    """Train one method with every seed of `params`, `compute.jobs` at a time; the results do not depend on how many.

    Args:
        prepared_folder: what the prepare stage made.
        folder: gets one checkpoint folder a seed.
        unfinished: as in `train_seed`; to be removed once the results are in place.

    Returns:
        the logs, in the order of the seeds.
    """
    chosen, params = get_method(method), params.for_method(method)
    chosen.of(params)  # its refusals come before any worker
    require_text([method], params.model.text)
    images = params.train.images or len(load_training(prepared_folder, root).split("train"))
    steps = len(params.seeds) * chosen.steps(images, params)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    rest = (params, root, prepared_folder, folder, unfinished)
    jobs = min(params.compute.jobs, len(params.seeds))
    with (
        _silent_workers(),
        ProcessPoolExecutor(jobs, context, initializer=_share, initargs=(counter,)) as pool,
        tqdm(total=steps, desc=f"{method}, all seeds", unit="step") as progress,
    ):
        futures = [pool.submit(_train_together, params.train.processes, method, seed, *rest) for seed in params.seeds]
        try:
            while (waiting := wait(futures, timeout=0.5)).not_done:
                progress.update(counter.value - progress.n)
                for future in waiting.done:
                    future.result()  # raises what stopped it, without waiting for the others
            progress.update(counter.value - progress.n)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
