"""Stage 2 of `dgs` against the release's step (tests/oracle.py): other code, the same weights after five steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from clips import precomputed
from settings import validate
from torch import Tensor

from dgs.model.backbone import Backbone
from dgs.model.clip import IMAGENET, load_clip
from dgs.model.gemm import Gemm, has_onednn
from dgs.model.methods.registry import get_method
from dgs.model.release import adapt, take_apart, write_clip
from dgs.model.step import stage2_step
from dgs.model.text import embed_tokens
from dgs.model.train import teacher_residuals
from dgs.params import Params

STEPS, LR, SURE = 5, 1e-4, 60.0
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


def settings(side: int, dropout: float, eps: float) -> Params:
    return validate(
        {
            "data": {"layout": "folders", "rho": None},
            "model": {
                "clip": "clip",
                "image_size": side,
                "normalize": "imagenet",
                "lora": {"rank": 6, "alpha": 6.0, "dropout": dropout},
            },
            "train": {"surgery": {"eps": eps}},
        }
    )


def data(geometry: oracle.Geometry, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, S, S) uint8, tokens (N, 77) padded with 0 after the end token, labels (N,)."""
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, geometry.image, geometry.image), dtype=np.uint8))
    tokens = torch.zeros(count, 77, dtype=torch.long)
    for row in tokens:
        length = int(rng.integers(4, 20))
        row[:length] = torch.from_numpy(rng.integers(1, 49_406, length))
        row[length] = 49_407
    return images, tokens, torch.from_numpy(rng.integers(0, 2, count)).float()


def require_parity(
    geometry: oracle.Geometry,
    batch: int,
    dropout: float,
    folder: Path,
    sure: float = 1.0,
    eps: float = 1e-6,
    gemm: Gemm = "torch",
) -> None:
    """`sure`: factor on the text head's weights at the start, which makes its residuals small."""
    torch.manual_seed(0)
    release = oracle.Release(geometry, dropout=dropout, lr=LR)
    release.text_fc.weight.data *= sure
    start = take_apart(release.state_dict(), Path("oracle"))
    before = {name: head.weight.clone() for name, head in start.heads.items()}
    params = settings(geometry.image, dropout, eps)
    write_clip(start, folder / "clip")
    clip = load_clip(params.model, folder, geometry.image, gemm=gemm)
    backbone: Backbone = adapt(clip, start, params).train()
    heads = {name: head.requires_grad_(name != "teacher") for name, head in start.heads.items()}
    images, tokens, labels = data(geometry, STEPS * batch)
    with backbone.frozen():
        frozen = backbone(images)
        residual = teacher_residuals(heads["teacher"], frozen, labels)
        known = precomputed(labels, embed_tokens(clip.model, tokens), residual, frozen)
        untrained = start.heads["image"](backbone(images)).squeeze(1)
    learned = [*backbone.adapter_parameters(), *heads["image"].parameters(), *heads["text"].parameters()]
    optimizer = torch.optim.Adam(learned, lr=LR, betas=(0.9, 0.999))

    torch.manual_seed(7)
    for part in torch.arange(len(labels)).split(batch):
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
        release.step((images[part] / 255 - mean) / std, tokens[part, :21], labels[part])
    torch.manual_seed(7)
    for part in torch.arange(len(labels)).split(batch):
        noise = torch.zeros(batch, geometry.embed)
        stage2_step(get_method("dgs"), backbone, heads, optimizer, images[part], known[part], noise, params)

    for name, theirs in (("image", release.img_fc), ("text", release.text_fc)):
        assert (heads[name].weight - before[name]).abs().max() > LR
        assert (heads[name].weight - theirs.weight).abs().max() <= 1e-6
        assert (heads[name].bias - theirs.bias).abs().max() <= 1e-6
    assert torch.equal(heads["teacher"].weight, before["teacher"])
    with torch.no_grad():
        mine = heads["image"](backbone.eval()(images)).squeeze(1)
        other = release.eval().logits((images / 255 - mean) / std)
    assert (mine - other).abs().max() <= 1e-5
    assert (mine - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("gemm", ["torch", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("dropout", [0.0, 0.8])
def test_five_steps_equal_the_releases(dropout: float, gemm: Gemm, tmp_path: Path) -> None:
    require_parity(oracle.REDUCED, 8, dropout, tmp_path, gemm=gemm)


def test_the_epsilon_is_the_releases(tmp_path: Path) -> None:
    """With a sure text head harmful directions are as short as the epsilon; without it the adapters go elsewhere."""
    require_parity(oracle.REDUCED, 8, 0.0, tmp_path / "same", sure=SURE)
    with pytest.raises(AssertionError):
        require_parity(oracle.REDUCED, 8, 0.0, tmp_path / "other", sure=SURE, eps=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.8])
def test_five_steps_equal_the_releases_at_vit_b_32(dropout: float, tmp_path: Path) -> None:
    require_parity(oracle.VIT_B_32, 8, dropout, tmp_path)
