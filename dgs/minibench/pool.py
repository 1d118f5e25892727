"""Photographs of many scenes, in parallel and the same whatever the number of workers."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dgs.minibench import camera, scenes

CHUNK = 250


def _chunk(seed: int, split: str, stop: int, margin: int, start: int) -> tuple[list[scenes.Scene], NDArray[np.uint8]]:
    return camera.shoot_many(seed, split, start, min(start + CHUNK, stop), margin)


def shoot(
    seed: int, split: str, count: int, workers: int = 1, progress: bool = False, margin: int = 0
) -> tuple[list[scenes.Scene], NDArray[np.uint8]]:
    """Scenes 0..count-1 of a split and their photographs, (count, S, S, 3) uint8, S = 64 + 2 margin pixels."""
    work = partial(_chunk, seed, split, count, margin)
    starts = range(0, count, CHUNK)
    found: list[scenes.Scene] = []
    side = scenes.SIZE + 2 * margin
    images = np.empty((count, side, side, 3), np.uint8)
    bar = tqdm(total=count, desc=f"photographs of {split} scenes", disable=not progress)
    # "spawn": a forked child would inherit torch's threads in whatever state they are in.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    try:
        for some, part in pool.map(work, starts) if pool else map(work, starts):
            images[len(found) : len(found) + len(some)] = part
            found.extend(some)
            bar.update(len(some))
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    return found, images
