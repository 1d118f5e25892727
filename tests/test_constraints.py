"""Penalties, confinement and shrinking of adapters, against the update B A formed in full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from settings import LoraParams, ModelParams
from torch import Tensor

from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.methods.constraints import adapters, effort_projection, scale_update, squared_update

ROOT = Path(__file__).parents[1]
IMAGES = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone() -> Backbone:
    """The embedded CLIP with adapters that do something."""
    clip = load_clip(ModelParams(clip="sample/clip"), ROOT, 64, text=False)
    tuned = Backbone(clip, LoraParams(rank=3, dropout=0.0), 0).eval()
    torch.manual_seed(1)
    for adapter in adapters(tuned):
        adapter.b.data.normal_(std=0.05)
    return tuned


def updates(backbone: Backbone) -> list[Tensor]:
    return [adapter.scale * adapter.b.detach() @ adapter.a.detach() for adapter in adapters(backbone)]


def test_every_q_k_and_v_has_an_adapter(backbone: Backbone) -> None:
    found = list(adapters(backbone))
    assert len(found) == 3 * len(backbone.visual.transformer.resblocks)
    assert {id(adapter.a) for adapter in found} < {id(part) for part in backbone.adapter_parameters()}
    assert not any(adapter.weight.requires_grad for adapter in found)


def test_the_penalty_is_the_squared_update_and_has_its_gradient(backbone: Backbone) -> None:
    penalty = squared_update(backbone)
    assert penalty.item() == pytest.approx(sum(update.square().sum().item() for update in updates(backbone)), rel=1e-4)
    penalty.backward()
    first = next(adapters(backbone))
    expected = 2 * first.scale * updates(backbone)[0] @ first.a.detach().T
    assert first.b.grad is not None and torch.allclose(first.b.grad, expected, rtol=1e-3, atol=1e-6)


def test_confined_updates_leave_the_large_singular_directions_alone(backbone: Backbone) -> None:
    confine = effort_projection(backbone)
    confine()
    once = updates(backbone)
    for adapter, update in zip(adapters(backbone), once, strict=True):
        left, _, right = torch.linalg.svd(adapter.weight)
        assert update.norm() > 1e-4
        assert (left[:, :-3].T @ update).abs().max() < 1e-5
        assert (update @ right[:-3].T).abs().max() < 1e-5
    confine()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(updates(backbone), once, strict=True))


def test_shrinking_goes_from_the_tuned_tower_to_the_frozen_one(backbone: Backbone) -> None:
    with torch.no_grad():
        tuned = updates(backbone)
        with backbone.frozen():
            frozen = backbone(IMAGES)
        assert (backbone(IMAGES) - frozen).abs().max() > 1e-3
        scale_update(backbone, 0.5)
        assert all(torch.allclose(a, b / 2) for a, b in zip(updates(backbone), tuned, strict=True))
        scale_update(backbone, 0.0)
        assert torch.equal(backbone(IMAGES), frozen)
