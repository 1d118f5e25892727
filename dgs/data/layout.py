"""The fixed names of a tree of images: its splits, its label folders, and the folder of photographs for all."""

from __future__ import annotations

SPLITS = ("train", "val", "test")
MINIBENCH = "minibench.json"  # the packed benchmark's description
REAL, FAKE = "0_real", "1_fake"
LABELS = {REAL: 0, FAKE: 1}
SHARED_REALS = "real"  # in place of a generator's name: photographs that all generators of the split are compared with
