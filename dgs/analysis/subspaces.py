"""Where LoRA updates go: principal angles between the update subspaces (B A) of two runs, read from checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

COLUMNS = ["rho", "method", "seed", "other_method", "other_seed", "layer", "side", "mean", "smallest", "random"]
Array = NDArray[np.float64]
Update = tuple[Array, Array]  # A (rank, in), B (out, rank)
_MATRIX = re.compile(r"resblocks\.(\d+)\.attn\.([qkv])_proj\.lora_([AB])")
_DRAWS = 200


def orthonormal(columns: Array) -> Array:
    """Orthonormal basis of the columns' span, (D, k) to (D, at most k); directions of no length are left out."""
    if not columns.any():
        return columns[:, :0]
    left, lengths, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, lengths > 1e-6 * lengths[0]]


def principal_angles(a: Array, b: Array) -> Array:
    """Principal angles between the spans of two sets of columns, in degrees, ascending (Bjorck & Golub 1973).

    Args:
        a, b: (D, k) and (D, l).

    Returns:
        (min of the two ranks,); empty where one is all zero. 0: a direction in both, 90: none shared.
    """
    first, second = orthonormal(a), orthonormal(b)
    if not first.size or not second.size:
        return np.zeros(0)
    if first.shape[1] > second.shape[1]:
        first, second = second, first
    cosines = np.linalg.svd(first.T @ second, compute_uv=False)
    # By the sine below 45 degrees: arccos loses half the digits near 1.
    sines = np.linalg.svd(first - second @ (second.T @ first), compute_uv=False)[::-1]
    small = cosines > np.sqrt(0.5)
    angles = np.where(small, np.arcsin(np.clip(sines, 0, 1)), np.arccos(np.clip(cosines, 0, 1)))
    return np.sort(np.degrees(angles))


def random_mean_angle(size: int, rank: int) -> float:
    """Mean principal angle in degrees between two random subspaces of `rank` in `size` dimensions, by simulation."""
    rng = np.random.default_rng([size, rank])
    draws = (principal_angles(*rng.normal(size=(2, size, rank))).mean() for _ in range(_DRAWS))
    return float(np.mean(list(draws)))


def read_updates(checkpoint: Path) -> dict[str, Update]:
    """LoRA matrices of a checkpoint folder by layer, "<block>.<q, k or v>"; empty for a method without adapters."""
    if not json.loads((checkpoint / "dgs.json").read_text())["adapter"]:
        return {}
    matrices: dict[str, dict[str, Array]] = {}
    for name, value in load_file(checkpoint / "adapter_model.safetensors").items():
        if found := _MATRIX.search(name):
            matrices.setdefault(f"{found[1]}.{found[2]}", {})[found[3]] = value.astype(np.float64)
    ordered = sorted(matrices, key=lambda layer: (int(layer.split(".")[0]), "qkv".index(layer[-1])))
    return {layer: (matrices[layer]["A"], matrices[layer]["B"]) for layer in ordered}


def compare(runs: Mapping[tuple[str, int], Mapping[str, Update]], rho: float | None) -> pd.DataFrame:
    """Principal angles between update subspaces of runs, layer by layer: columns `COLUMNS`.

    Of each seed, the first method with adapters against every other one; and as a yardstick the first method's first
    seed against its other seeds. Sides: "output", what an update writes (columns of B), and "input", what it reads
    (rows of A; runs of one seed start from the same A). mean, smallest: over the principal angles, in degrees; random:
    the mean for random subspaces of that size.

    Args:
        runs: {(method, seed): updates by layer}.
    """
    adapted = {run: layers for run, layers in runs.items() if layers}
    methods = list(dict.fromkeys(method for method, _ in adapted))
    seeds = list(dict.fromkeys(seed for _, seed in adapted))
    pairs = [((methods[0], seed), (other, seed)) for other in methods[1:] for seed in seeds]
    pairs += [((method, seeds[0]), (method, seed)) for method in methods[:1] for seed in seeds[1:]]
    expected: dict[tuple[int, int], float] = {}
    rows = []
    for first, second in pairs:
        if first not in adapted or second not in adapted:
            continue
        for layer, (a, b) in adapted[first].items():
            if layer not in adapted[second]:
                continue
            other_a, other_b = adapted[second][layer]
            for side, x, y in (("input", a.T, other_a.T), ("output", b, other_b)):
                angles = principal_angles(x, y)
                if not len(angles):
                    continue
                shape = (x.shape[0], len(angles))
                if shape not in expected:
                    expected[shape] = random_mean_angle(*shape)
                rows.append((*first, *second, layer, side, angles.mean(), angles[0], expected[shape]))
    table = pd.DataFrame(rows, columns=COLUMNS[1:])
    table.insert(0, "rho", np.nan if rho is None else rho)
    return table.round(6)
