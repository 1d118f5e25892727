"""Features of views in batches, and what of a batch goes through the tower at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from copies import ROOT
from torch import Tensor

from dgs.data.prepared import load_training
from dgs.data.views import Views
from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.features import ON_CPU, extract_features, in_parts
from dgs.params import Params


@pytest.mark.parametrize("count", [0, 1, ON_CPU, ON_CPU + 1, 3 * ON_CPU])
def test_on_the_cpu_parts_are_small_and_rows_stay_in_order(count: int) -> None:
    sizes: list[int] = []

    def function(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return 2 * part

    images = torch.arange(count * 3.0).reshape(count, 3)
    assert torch.equal(in_parts(function, images), 2 * images)
    assert sum(sizes) == count and max(sizes) <= ON_CPU


def test_on_a_device_a_batch_stays_whole() -> None:
    sizes: list[int] = []

    def function(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part

    in_parts(function, torch.zeros(5 * ON_CPU, 3, device="meta"))
    assert sizes == [5 * ON_CPU]


def test_features_do_not_depend_on_the_size_of_batches(tiny: Params, tiny_prepared: Path) -> None:
    prepared = load_training(tiny_prepared, ROOT)
    backbone = Backbone(load_clip(tiny.model, ROOT, tiny.image_size, text=False)).eval()

    def features(batch_size: int) -> Tensor:
        own = tiny.replaced({"compute.batch_size": batch_size})
        with torch.no_grad():
            return extract_features(backbone, Views(prepared.split("train"), prepared.source, own), own, "features")

    whole = features(256)
    assert len(whole) > 5
    torch.testing.assert_close(features(5), whole, rtol=1e-5, atol=1e-6)
