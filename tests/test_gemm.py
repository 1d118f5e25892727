"""compute.gemm: oneDNN in torch's place changes nothing but rounding, and only in towers with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clips import LORA, settings, write_checkpoint
from copies import ROOT
from settings import LoraParams
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.errors import UserError
from dgs.model import gemm
from dgs.model.backbone import Backbone
from dgs.model.checkpoint import load_checkpoint, read_info
from dgs.model.clip import Clip, load_clip
from dgs.model.clip_classifier import load_heads
from dgs.model.runs import train_seed
from dgs.params import Params

needs_onednn = pytest.mark.skipif(not gemm.has_onednn(), reason="this torch has no oneDNN")
MADE_ON_AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512bw\n"


def linear(kind: gemm.Gemm, rows: int, width: int, out: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows + width + out)
    layer = nn.Linear(width, out, bias)
    gemm.use(layer, kind)
    return layer


def gradients(layer: nn.Linear, x: Tensor) -> list[Tensor]:
    """Output, and gradients by input and parameters of a sum with random weights."""
    at = x.clone().requires_grad_()
    out = layer(at)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [at, *layer.parameters()])]


@needs_onednn
class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        ("shape", "out"), [((4, 50, 96), 384), ((4, 50, 384), 96), ((1, 7, 33), 5), ((300, 64), 3), ((2, 3, 4, 8), 16)]
    )
    def test_values_and_gradients_are_as_close_to_float64_as_torchs_own(
        self, shape: tuple[int, ...], out: int, bias: bool
    ) -> None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        ours, theirs = (linear(kind, len(x), shape[-1], out, bias) for kind in ("onednn", "torch"))
        exact = gradients(linear("torch", len(x), shape[-1], out, bias).double(), x.double())
        for mine, other, truth in zip(gradients(ours, x), gradients(theirs, x), exact, strict=True):
            error, usual = (float((found.double() - truth).abs().max()) for found in (mine, other))
            assert mine.shape == truth.shape
            assert error <= 2 * usual + 1e-6 * float(truth.abs().max())

    def test_a_transposed_input_is_taken_as_what_it_is(self) -> None:
        layer, x = linear("onednn", 6, 8, 4), torch.randn(8, 6).T
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-6)

    def test_other_numbers_than_float32_and_no_rows_are_torchs(self) -> None:
        layer, x = linear("onednn", 6, 8, 4).double(), torch.randn(6, 8, dtype=torch.float64)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert linear("onednn", 6, 8, 4)(torch.zeros(0, 8)).shape == (0, 4)

    def test_the_same_bits_from_call_to_call(self) -> None:
        layer, x = linear("onednn", 40, 96, 96), torch.randn(40, 96)
        first, again = gradients(layer, x), gradients(layer, x)
        assert all(map(torch.equal, first, again))


def kinds(module: nn.Module) -> set[type]:
    return {type(part) for part in module.modules() if isinstance(part, nn.Linear)}


@needs_onednn
class TestTower:
    @pytest.fixture
    def clip(self, clip_folder: Path) -> Clip:
        return load_clip(settings(clip_folder).model, Path(), 32, gemm="onednn")

    def test_features_and_adapters_gradients_agree_with_torchs(self, clip_folder: Path, clip: Clip) -> None:
        plain = load_clip(settings(clip_folder).model, Path(), 32)
        images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
        found = []
        for one in (clip, plain):
            backbone = Backbone(one, LORA).train()
            torch.manual_seed(7)
            for parameter in backbone.adapter_parameters():
                nn.init.normal_(parameter, std=0.3)
            features = backbone(images)
            features.square().sum().backward()
            found.append([features.detach(), *(p.grad for p in backbone.adapter_parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))

    def test_a_tower_without_adapters_is_torchs_before_and_after(self, clip: Clip) -> None:
        assert kinds(Backbone(clip)) == {nn.Linear}
        adapted = Backbone(clip, LORA)
        assert gemm.OneDnnLinear in kinds(adapted) and nn.Linear not in kinds(adapted.visual)
        clip.model.visual = adapted.without_adapters()
        assert gemm.OneDnnLinear not in kinds(clip.model.visual)

    def test_a_checkpoints_names_do_not_tell_what_multiplied(
        self, clip: Clip, clip_folder: Path, tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "made", clip_folder)
        classifier, _ = load_checkpoint(folder, clip)
        assert gemm.OneDnnLinear in kinds(classifier)

    def test_bfloat16_is_left_to_torch(self, clip_folder: Path) -> None:
        model = settings(clip_folder).model.model_copy(update={"precision": "bf16"})
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        lora = LoraParams(rank=2, dropout=0.0)
        ours, theirs = (Backbone(load_clip(model, Path(), 32, gemm=kind), lora)(images) for kind in ("onednn", "torch"))
        assert torch.equal(ours, theirs)


class TestChoice:
    @pytest.mark.parametrize(
        ("cpuinfo", "slow"),
        [
            (MADE_ON_AMD, True),
            (MADE_ON_AMD.replace(" avx512f", ""), False),
            (MADE_ON_AMD.replace("AuthenticAMD", "GenuineIntel"), False),
            ("Features\t: fp asimd\n", False),
        ],
    )
    def test_auto_goes_by_the_processor(
        self, cpuinfo: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text(cpuinfo)
        monkeypatch.setattr(gemm, "CPUINFO", file)
        assert gemm.resolve("auto") == ("onednn" if slow and gemm.has_onednn() else "torch")
        assert gemm.resolve("torch") == "torch"

    def test_without_onednn_auto_is_torch_and_onednn_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gemm, "has_onednn", lambda: False)
        assert gemm.resolve("auto") == "torch"
        with pytest.raises(UserError, match=r"Expected a torch with oneDNN .* found one without it\. Set"):
            gemm.resolve("onednn")


@needs_onednn
@pytest.mark.slow
def test_a_run_records_what_multiplied_and_a_probe_keeps_its_bits(
    tiny: Params, tiny_prepared: Path, tmp_path: Path
) -> None:
    heads = {}
    for kind in ("torch", "onednn"):
        params = tiny.replaced({"compute.gemm": kind})
        for method in ("probe", "dgs"):
            folder = tmp_path / kind / method
            train_seed(method, 0, params, ROOT, tiny_prepared, folder, tmp_path / "unfinished")
            made = folder / "seed-0"
            assert read_info(made)["params"]["compute"]["gemm"] == ("torch" if method == "probe" else kind)
            heads[method, kind] = load_heads(made)["image"].weight
    assert torch.equal(heads["probe", "torch"], heads["probe", "onednn"])
    assert torch.allclose(heads["dgs", "torch"], heads["dgs", "onednn"], rtol=0, atol=0.05)
    assert not torch.equal(heads["dgs", "torch"], heads["dgs", "onednn"])
