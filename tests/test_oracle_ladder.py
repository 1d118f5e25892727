"""The oracle ladder: the shortcut's true plane, what is kept off it, and rungs that are run once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from copies import ROOT
from torch import nn

from dgs.data.prepared import load_prepared
from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.methods.registry import METHODS
from dgs.params import Params, load_params
from minibench.splits import SHORTCUTS
from studies.oracle_ladder import (
    RANKS,
    RUNGS,
    MLPHead,
    ShortcutPlane,
    Truth,
    arms,
    off,
    read,
    shortcut_plane,
)
from studies.sweep import MEASURES, sweep

GROUP, VALUE, LABEL = torch.eye(12, dtype=torch.float64)[:3]  # directions that features move along


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Images of every background and shape; nine of ten with a background of the shortcut are fake."""
    rng = np.random.default_rng(0)
    backgrounds = rng.choice(["plain", "striped", "checked", "dotted", "brick", "cloudy"], 3_000)
    group = np.isin(backgrounds, SHORTCUTS["background"].fake)
    labels = np.where(rng.random(3_000) < 0.9, group, ~group).astype(int)
    return pd.DataFrame({"background": backgrounds, "shape": rng.choice(["ring", "star"], 3_000), "label": labels})


@pytest.fixture(scope="module")
def truth(rows: pd.DataFrame) -> Truth:
    return Truth.of(rows, "background")


def features_of(rows: pd.DataFrame, truth: Truth) -> torch.Tensor:
    """A strong step along the groups, a weaker one along a single background, and the label's own."""
    noise = 0.1 * torch.randn(len(rows), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dotted = torch.tensor((rows["background"] == "dotted").to_numpy()).double()
    labels = torch.tensor(rows["label"].to_numpy()).double()
    return noise + 3 * truth.group.double()[:, None] * GROUP + dotted[:, None] * VALUE + 2 * labels[:, None] * LABEL


def test_the_plane_is_the_groups_direction_then_the_single_values_and_never_the_labels(
    rows: pd.DataFrame, truth: Truth
) -> None:
    """Though nine of ten labels are the group's: the covariance is of images of one label."""
    basis = shortcut_plane(features_of(rows, truth), truth, 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert (basis[:, 0] @ GROUP).abs() > 0.98
    assert ((basis.T @ VALUE).norm() > 0.98) and ((basis.T @ LABEL).norm() < 0.05)
    for rank in RANKS:
        assert shortcut_plane(features_of(rows, truth), truth, rank).shape == (12, min(rank, 12))


def test_off_the_plane_no_group_is_left_in_means(rows: pd.DataFrame, truth: Truth) -> None:
    features = features_of(rows, truth)
    left = off(features, shortcut_plane(features, truth, 1))
    same = truth.given == 0
    gap = left[same & truth.group].mean(0) - left[same & ~truth.group].mean(0)
    before = features[same & truth.group].mean(0) - features[same & ~truth.group].mean(0)
    assert gap.norm() < 0.2 * before.norm()


def test_every_rung_is_a_method_with_settings_and_they_are_those_asked_for() -> None:
    params = load_params("mini", ROOT)
    for rung in RUNGS.values():
        assert rung.method in METHODS and params.for_method(rung.method).train.stage2.lr > 0
    assert {rung.rank for rung in RUNGS.values()} == {0, *RANKS}
    assert {rung.method for name, rung in RUNGS.items() if name in ("weights", "expert")} == {
        "weighed_lora", "product_of_experts"
    }  # fmt: skip
    for name, rung in (("lora_at_rate_of_weights", "weights"), ("lora_at_rate_of_expert", "expert")):
        assert RUNGS[name] == RUNGS["lora"] and read(name).method == RUNGS[rung].method != "lora"


def test_every_rung_is_an_arm_and_both_heads_and_the_plane_train(tiny: Params, tmp_path: Path) -> None:
    chosen = [arm for arm in arms() if arm.method in ("fitted", "mlp_plane_2")]
    assert [arm.method for arm in arms()] == list(RUNGS) and len(chosen) == 2
    rows = list(sweep(chosen, [0], tiny, ROOT, tmp_path, tmp_path / "ladder.csv", read))
    assert sorted(row["method"] for row in rows) == ["fitted", "mlp_plane_2"]
    table = pd.DataFrame(rows)[MEASURES]
    assert table.notna().all().all() and table.drop(columns="angle_task_harmful").stack().between(0, 2).all()
    assert table["angle_task_harmful"].between(0, 180).all()


def test_the_plane_follows_the_tower_and_the_head_stays_off_it(
    tiny: Params, tiny_prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dgs.analysis.tuning import train_and_score

    planes: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []
    estimate = ShortcutPlane._estimate

    def watched(self: ShortcutPlane, *arguments: object) -> None:
        estimate(self, *arguments)  # type: ignore[arg-type]
        planes.append(self.basis)
        if hasattr(self, "head"):
            heads.append(self.head.weight.detach())  # type: ignore[arg-type]

    monkeypatch.setattr(ShortcutPlane, "_estimate", watched)
    params = tiny.replaced({"train.stage2.epochs": 3, "train.stage2.lr": 0.01})
    prepared = load_prepared(tiny_prepared, ROOT)
    reading = read("plane_2_head")
    assert reading.build is not None and reading.method == "lora"
    params = params.for_method(reading.method)
    method = reading.build(prepared, params, 0)
    train_and_score(method, prepared, params, 0, ROOT, [])
    assert len(planes) == 3, "before the first step, and after each epoch but the last"
    assert not torch.allclose(planes[0], planes[2], atol=1e-3)
    assert (heads[-1] @ planes[-1]).abs().max() < 1e-5 < heads[-1].norm()


def test_a_random_plane_is_another_for_each_seed_and_stays_over_epochs(tiny: Params, tiny_prepared: Path) -> None:
    prepared, params = load_prepared(tiny_prepared, ROOT), tiny.for_method("lora")
    backbone = Backbone(load_clip(tiny.model, ROOT, tiny.image_size, text=False))
    planes = [ShortcutPlane(prepared, params, seed, RUNGS["random_plane_2"]) for seed in (0, 1)]
    for plane in planes:
        plane.project(backbone)
    first, other = (plane.basis.clone() for plane in planes)
    planes[0]._estimate(backbone, 1)
    assert torch.equal(planes[0].basis, first) and not torch.allclose(first, other)
    assert torch.allclose(first.T @ first, torch.eye(2), atol=1e-5)


def test_an_mlp_head_gives_every_sample_a_direction_of_its_own() -> None:
    features = torch.randn(8, 12, requires_grad=True)
    head = MLPHead(12)
    head(features).sum().backward()
    assert features.grad is not None and torch.linalg.matrix_rank(features.grad) > 1
    assert isinstance(head, nn.Linear) and head.in_features != 12
