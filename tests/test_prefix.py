"""Tokens below the first adapted block, kept on the disk: the same training at the cost of the upper blocks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from clips import settings
from copies import ROOT
from settings import LoraParams
from torch import nn

from dgs.data.prepared import load_training
from dgs.data.views import Views, batches
from dgs.model.backbone import Backbone
from dgs.model.clip import load_clip
from dgs.model.methods.registry import get_method
from dgs.model.prefix import Tokens, is_worth_keeping, keep_tokens, remove_tokens, token_bytes
from dgs.model.snapshot import Snapshot
from dgs.model.train import Trained, train
from dgs.params import Params


@pytest.mark.parametrize(("blocks", "depth"), [(None, 0), ([0, 1], 0), ([1], 1)])
def test_features_of_tokens_are_those_of_their_images(clip_folder: Path, blocks: list[int] | None, depth: int) -> None:
    lora = LoraParams(rank=2, dropout=0.0, blocks=blocks)  # of the random CLIP's two blocks
    backbone = Backbone(load_clip(settings(clip_folder).model, Path(), 32), lora, levels=(depth, 2)).eval()
    for parameter in backbone.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    given = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert backbone.depth == depth
    assert torch.equal(backbone(backbone.lower(given)), backbone(given))


@pytest.fixture
def views(tiny_prepared: Path, tiny: Params) -> Views:
    prepared = load_training(tiny_prepared, ROOT)
    return Views(prepared.split("val"), prepared.source, settings_of(tiny, 0))


def settings_of(tiny: Params, prefix_mb: int, **more: object) -> Params:
    return tiny.replaced({"compute.prefix_mb": prefix_mb, "model.lora.blocks": [2, 3], **more})


def tower(params: Params, levels: tuple[int, ...] = ()) -> Backbone:
    clip = load_clip(params.model, ROOT, params.image_size, text=False)
    return Backbone(clip, params.model.lora, levels=levels)


def test_tokens_take_the_place_of_views_item_by_item(tiny: Params, views: Views, tmp_path: Path) -> None:
    params = settings_of(tiny, 1000)
    backbone = tower(params)
    (kept,) = keep_tokens(backbone, [views], params, tmp_path)
    assert isinstance(kept, Tokens) and len(kept) == len(views)
    assert kept.file.stat().st_size == token_bytes(backbone, [views])
    with backbone.frozen():
        for (tokens, rows), (pixels, same) in zip(batches(kept, 7), batches(views, 7), strict=True):
            assert torch.equal(rows, same)
            assert torch.allclose(tokens, backbone.lower(pixels), rtol=0, atol=1e-5)
    before = kept.file.stat().st_mtime_ns
    keep_tokens(backbone, [views], params, tmp_path)
    assert kept.file.stat().st_mtime_ns == before  # an earlier run's are used
    remove_tokens([kept])
    assert not any(tmp_path.iterdir())


def test_views_stay_where_tokens_cannot_take_their_place(tiny: Params, views: Views, tmp_path: Path) -> None:
    allowed = settings_of(tiny, 1000)
    cases = {
        "no disk allowed": (settings_of(tiny, 0), ()),
        "every block adapted": (allowed.replaced({"model.lora.blocks": None}), ()),
        "bfloat16": (allowed.replaced({"model.precision": "bf16"}), ()),
        "a level below the adapters is read": (allowed, (1, 4)),
    }
    for why, (params, levels) in cases.items():
        backbone = tower(params, levels)
        assert not is_worth_keeping(backbone, [views], params), why
        assert keep_tokens(backbone, [views], params, tmp_path) == [views]
    assert is_worth_keeping(tower(allowed, (2, 4)), [views], allowed)
    assert keep_tokens(tower(allowed), [views], allowed, None) == [views]
    assert not any(tmp_path.iterdir())


def trained(params: Params, prepared: Path, folder: Path) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    made: list[Trained] = []
    clip = load_clip(params.model, ROOT, params.image_size, text=False)
    own, data = params.for_method("dgs"), load_training(prepared, ROOT)
    weights: dict[str, torch.Tensor] = {}

    def done(run: Trained) -> None:
        made.append(run)
        tower = run.classifier.backbone
        weights.update({n: p.detach().clone() for n, p in tower.named_parameters() if p.requires_grad})

    train(get_method("dgs"), clip, data, own, 0, torch.device("cpu"), done, snapshot=Snapshot(folder, 0.0))
    return weights, made[0].log.losses


def test_a_run_with_tokens_is_the_run_without(tiny: Params, tiny_prepared: Path, tmp_path: Path) -> None:
    """Six steps at a small rate: Adam makes more of rounding where a gradient is next to nothing."""
    more = {"train.stage2.lr": 1e-4, "train.views": 2, "train.stage2.epochs": 2}
    (plain, losses), (kept, same) = (
        trained(settings_of(tiny, mb, **more), tiny_prepared, tmp_path / str(mb)) for mb in (0, 1000)
    )
    moved = torch.cat([(plain[name] - kept[name]).abs().flatten() for name in plain])
    assert plain and moved.square().mean().sqrt() < 1e-6
    pd.testing.assert_frame_equal(losses, same, check_exact=False, rtol=1e-4, atol=1e-6)
    assert not list((tmp_path / "1000").glob("tokens-*"))
