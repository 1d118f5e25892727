"""Photographs of many scenes, in parallel and the same whatever the number of workers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from minibench import camera, scenes

CHUNK = 250


def _chunk(seed: int, split: str, margin: int, indices: Sequence[int]) -> tuple[list[scenes.Scene], NDArray[np.uint8]]:
    return camera.shoot_many(seed, split, indices, margin)


def shoot(
    seed: int, split: str, indices: Sequence[int], workers: int = 1, progress: bool = False, margin: int = 0
) -> tuple[list[scenes.Scene], NDArray[np.uint8]]:
    """Scenes of a split by their indices, and their photographs, (N, S, S, 3) uint8, S = 64 + 2 margin pixels."""
    work = partial(_chunk, seed, split, margin)
    count = len(indices)
    chunks = [indices[start : start + CHUNK] for start in range(0, count, CHUNK)]
    found: list[scenes.Scene] = []
    side = scenes.SIZE + 2 * margin
    images = np.empty((count, side, side, 3), np.uint8)
    bar = tqdm(total=count, desc=f"photographs of {split} scenes", disable=not progress)
    # "spawn": a forked child would inherit torch's threads in whatever state they are in.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
    try:
        for some, part in pool.map(work, chunks) if pool else map(work, chunks):
            images[len(found) : len(found) + len(some)] = part
            found.extend(some)
            bar.update(len(some))
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    return found, images
