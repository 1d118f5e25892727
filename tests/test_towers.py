"""timm's towers: features are the model's own, adapters on q, k and v three separate ones, the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from clips import CONFIG, LORA
from safetensors.torch import save_file
from settings import ModelParams, validate
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from dgs.analysis.angles import read_updates
from dgs.errors import UserError
from dgs.model import gemm
from dgs.model.backbone import Backbone, token_statistics
from dgs.model.checkpoint import save_checkpoint
from dgs.model.clip import Clip, load_clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.clip_source import find_clip
from dgs.model.detector import Detector
from dgs.model.tower_timm import SplitQkv, TimmTower, require_tower, split_qkv, why_not
from dgs.model.training_log import layer_of
from dgs.params import Params

ROOT = Path(__file__).parent.parent
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 4}
# What each brings: image size, prefix tokens, and the part that a plain ViT does not have.
TOWERS: dict[str, tuple[int, int, str]] = {
    "vit_base_patch16_224.augreg_in21k": (64, 1, "a plain ViT"),
    "vit_small_patch14_reg4_dinov2.lvd142m": (56, 5, "DINOv2: registers, layer scale, patches of 14"),
    "vit_base_patch16_dinov3.lvd1689m": (64, 5, "DINOv3: rotary positions, no others"),
    "vit_base_patch16_dinov3_qkvb.lvd1689m": (64, 5, "DINOv3 with biases beside q, k and v"),
    "vit_pe_core_base_patch16_224.fb": (64, 1, "PE: rotary and other positions, attention pooling"),
    "vit_base_patch16_siglip_224.v2_webli": (64, 0, "SigLIP 2: no class token, attention pooling"),
    "eva02_base_patch14_224.mim_in22k": (56, 1, "EVA02: q, k and v apart, gated MLP"),
    "vit_base_patch16_clip_quickgelu_224.metaclip_400m": (64, 1, "MetaCLIP: QuickGELU, norm before"),
    "vit_small_patch16_rope_mixed_224.naver_in1k": (64, 1, "rotary positions of each block's own"),
}


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm then makes its models with two narrow blocks: the same parts, in milliseconds."""
    real = timm.create_model

    def create(name: str, **settings: Any) -> Any:
        narrow = {**SMALL, "attn_pool_num_heads": 4} if "vit_pe_" in name else SMALL
        model = real(name, **{**narrow, **settings})
        for parameter in model.parameters():  # zeros would hide a lost bias, and layer scale of 1e-5 a lost block
            nn.init.normal_(parameter, std=0.2)
        return model

    monkeypatch.setattr(timm, "create_model", create)


@pytest.fixture(params=TOWERS, ids=lambda name: TOWERS[name][2].partition(":")[0])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    small(monkeypatch)
    return str(request.param)


def settings(name: str, **model: object) -> Params:
    side = TOWERS[name][0] if name in TOWERS else 64
    own = {"clip": f"timm/{name}", "pretrained": "random", "image_size": side, "lora": LORA.model_dump(), **model}
    return validate({"data": {"layout": "folders", "rho": None}, "model": own})


def load(name: str, **model: object) -> Clip:
    params = settings(name, **model)
    return load_clip(params.model, Path(), params.image_size, text=False)


def views(side: int, count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def plain(name: str, side: int) -> Any:
    """The model that timm makes of the same seed, for images of that size."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0)
    model.set_input_size(img_size=(side, side))
    return model.eval()


def normalised(name: str, images: Tensor) -> Tensor:
    config = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (config.mean, config.std))
    return (images / 255 - mean) / std


def randomise(backbone: Backbone) -> None:
    for parameter in backbone.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)


def folded(attention: Any, adapted: Any, scale: float) -> None:
    """Add s B A of three adapters to the rows of q, k and v in a plain attention's matrices."""
    for number, part in enumerate("qkv"):
        layer = getattr(adapted if attention.qkv is None else adapted.qkv, f"{part}_proj")
        delta = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = getattr(attention, f"{part}_proj").weight if attention.qkv is None else attention.qkv.weight
        rows = weight if attention.qkv is None else weight.chunk(3)[number]
        rows.data += delta.detach()


class TestATower:
    @pytest.fixture(autouse=True)
    def without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_gives_the_models_own_features_of_images_as_its_config_wants_them(self, name: str) -> None:
        side, prefix, _ = TOWERS[name]
        clip, images = load(name), views(side)
        backbone = Backbone(clip)
        expected = plain(name, side)(normalised(name, images))
        assert torch.allclose(backbone(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert backbone.widths == (expected.shape[1], expected.shape[1])
        assert clip.model.visual.prefix_tokens == prefix

    def test_has_adapters_that_are_three_separate_ones(self, name: str) -> None:
        """On q, k and v of one matrix too: as if B A of each were added to its rows."""
        side = TOWERS[name][0]
        images, model = views(side), plain(name, side)
        backbone = Backbone(load(name), LORA).eval()
        randomise(backbone)
        shapes = sorted({tuple(p.shape) for p in backbone.adapter_parameters()})
        assert shapes == [(LORA.rank, 48), (48, LORA.rank)] and len(backbone.adapter_parameters()) == 2 * 3 * 2
        tower = backbone.visual.base_model.model
        for theirs, ours in zip(model.blocks, tower.blocks, strict=True):
            folded(theirs.attn, ours.attn, LORA.alpha / LORA.rank**0.5)
        expected = model(normalised(name, images))
        assert torch.allclose(backbone(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    def test_is_its_frozen_self_with_adapters_off_and_in_training(self, name: str) -> None:
        clip, images = load(name), views(TOWERS[name][0])
        before = Backbone(clip)(images)
        backbone = Backbone(clip, LORA).train()
        randomise(backbone)
        with backbone.frozen():
            assert torch.equal(backbone(images), before)
        moved = backbone(images)
        assert not torch.allclose(moved, before) and torch.equal(backbone(images), moved)
        clip.model.visual = backbone.without_adapters()
        assert torch.equal(Backbone(clip)(images), before)

    def test_goes_on_from_tokens_below_the_adapters(self, name: str) -> None:
        backbone = Backbone(load(name), LORA.model_copy(update={"blocks": [1]})).eval()
        names = [n for n, p in backbone.named_parameters() if p.requires_grad]
        assert len(names) == 6 and all("blocks.1.attn." in n for n in names)
        randomise(backbone)
        images = views(TOWERS[name][0])
        tokens = backbone.lower(images)
        assert tokens.shape[1:] == backbone.visual.token_shape
        assert torch.equal(backbone(tokens), backbone(images))

    def test_leaves_registers_and_class_out_of_the_statistics_of_patches(self, name: str) -> None:
        side, prefix, _ = TOWERS[name]
        backbone, images = Backbone(load(name), levels=(0, 2)), views(side)
        found, own = backbone(images), backbone.widths[0]
        patch = int(backbone.visual.trunk.patch_embed.patch_size[0])
        tokens = backbone.lower(images)
        patches = tokens[:, prefix:]
        assert patches.shape[1] == (side // patch) ** 2
        assert torch.equal(found[:, own : own + 96], token_statistics(patches, 0))
        assert found.shape[1] == own + 2 * 96 == backbone.widths[1]

    def test_is_kept_in_a_checkpoint_that_loads_and_scores(self, name: str, tmp_path: Path) -> None:
        params = settings(name)
        clip = load(name)
        backbone = Backbone(clip, LORA).eval()
        randomise(backbone)
        heads = {"image": nn.Linear(backbone.widths[1], 1)}
        images = views(params.image_size)
        expected = heads["image"](backbone(images)).squeeze(1)
        save_checkpoint(tmp_path / "c", ClipClassifier(clip, backbone, heads), params, "lora", 0, {"0.5": 0.0}, "d")
        found = Detector.load(tmp_path / "c").logits(images.permute(0, 2, 3, 1).numpy())
        assert torch.allclose(torch.from_numpy(found), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_bf16_is_the_same_within_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    name, images = "vit_base_patch16_dinov3.lvd1689m", views(64)
    exact, rounded = (Backbone(load(name, precision=precision))(images) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_layers_are_named_as_those_of_every_tower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The analysis of gradients reads them out of parameters' names, that of updates out of files."""
    small(monkeypatch)
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    clip = load(name)
    backbone = Backbone(clip, LORA)
    names = [n for n, p in backbone.named_parameters() if p.requires_grad]
    layers = {f"{block}.{part}" for block in range(2) for part in "qkv"}
    assert set(map(layer_of, names)) == layers
    heads = {"image": nn.Linear(backbone.widths[1], 1)}
    save_checkpoint(tmp_path / "c", ClipClassifier(clip, backbone, heads), settings(name), "lora", 0, {"0.5": 0.0}, "d")
    assert set(read_updates(tmp_path / "c")) == layers
    card = (tmp_path / "c/README.md").read_text()
    assert f"tower timm/{name} with LoRA" in card and "import open_clip" not in card


def test_export_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("dgs.model.onnx_graph")
    small(monkeypatch)
    backbone = Backbone(load("vit_base_patch16_siglip_224.v2_webli"), LORA)
    with pytest.raises(
        UserError, match=r"found one with other parts \(TimmTower of Block\)\. Score with --engine torch"
    ):
        build.build(backbone, nn.Linear(48, 1), build.float_linear)


def test_onednn_multiplies_for_split_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    images, features = views(64), {}
    for kind in ("torch", "onednn") if gemm.has_onednn() else ("torch",):
        clip = load("vit_base_patch16_dinov3_qkvb.lvd1689m")
        clip.gemm = kind  # type: ignore[assignment]
        backbone = Backbone(clip, LORA).eval()
        randomise(backbone)
        for parameter in backbone.adapter_parameters():
            nn.init.constant_(parameter, 0.02)
        features[kind] = backbone(images).detach()
    first, *rest = features.values()
    assert all(torch.allclose(first, other, rtol=0, atol=1e-4 * float(first.abs().max())) for other in rest)


@pytest.mark.parametrize("separate", [False, True], ids=["in the product", "added after it"])
def test_evas_biases_stay_where_qkv_is_split(separate: bool) -> None:
    torch.manual_seed(0)
    attention = EvaAttention(12, 3, qkv_bias=True, qkv_bias_separate=separate, scale_norm=False).double()
    for parameter in (attention.q_bias, attention.v_bias):
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = attention(x)
    split_qkv(attention)
    assert isinstance(attention.qkv, SplitQkv) and torch.allclose(attention(x), expected, rtol=0, atol=1e-13)


def test_fewer_keys_than_queries_are_adapted_as_they_are() -> None:
    attention = AttentionRope(12, 4, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=1)
    x = torch.randn(2, 5, 12)
    expected = attention(x)
    split_qkv(attention)
    assert torch.equal(attention(x), expected) and attention.k_proj.out_features == 6


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_atto.d2_in1k", "found timm/convnext_atto.d2_in1k: ConvNeXt is no plain transformer"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "SwinTransformer is no plain transformer"),
        ("resnet10t.c3_in1k", "ResNet is no plain transformer"),
        ("vit_tiny_r_s16_p8_224.augreg_in21k", "its patches come from a network of their own (HybridEmbed)"),
        ("deit_tiny_distilled_patch16_224.fb_in1k", "VisionTransformerDistilled is no plain transformer"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load(name, image_size=224)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


class TestAName:
    @pytest.mark.parametrize("name", timm.list_pretrained("*_clip_*"))
    def test_of_weights_trained_with_quickgelu_is_refused_unless_it_means_that(self, name: str) -> None:
        params = ModelParams(clip=f"timm/{name}", pretrained="hub")
        config = timm.get_pretrained_cfg(name)
        if "quickgelu" in name or (not config.notes and name != "vit_base_patch16_clip_224.dfn2b"):
            assert find_clip(params, Path()).mean == tuple(config.mean)
            return
        with pytest.raises(UserError, match="trained with QuickGELU") as caught:
            find_clip(params, Path())
        right = str(caught.value).partition("model.clip: ")[2].rstrip(".").split(", model.pretrained: ")
        find_clip(ModelParams(clip=right[0], pretrained=right[-1] if len(right) > 1 else "hub"), Path())

    @pytest.mark.parametrize(
        ("model", "sentence"),
        [
            ({"clip": "timm/vit_base_patch16_dinov4"}, "Expected model.clip to be a model of timm's that has weights"),
            ({"clip": "timm/vit_base_patch16_dinov3.lvd142m"}, "Did you mean 'timm/vit_base_patch16_dinov3.lvd1689m'?"),
            ({"clip": "timm/vit_base_patch16_224"}, "Expected model.pretrained for 'timm/vit_base_patch16_224': hub"),
            (
                {"clip": "timm/vit_base_patch16_clip_224.openai", "pretrained": "hub"},
                "Set model.clip: timm/vit_base_patch16_clip_quickgelu_224.openai.",
            ),
            ({"clip": "timm/vit_base_patch16_224", "pretrained": "lvd142m"}, "to be hub or a file, found 'lvd142m'"),
        ],
    )
    def test_that_is_wrong_is_one_sentence(self, model: dict[str, str], sentence: str) -> None:
        with pytest.raises(UserError) as caught:
            find_clip(ModelParams(**model), Path())
        assert sentence in str(caught.value) and "\n" not in str(caught.value)

    def test_of_weights_that_cannot_be_had_says_what_would_fetch_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*_: object, **__: object) -> None:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.")

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(UserError) as caught:
            load("vit_base_patch16_dinov3.lvd1689m", pretrained="hub")
        command = "python -c \"import timm; timm.create_model('vit_base_patch16_dinov3.lvd1689m', pretrained=True)\""
        assert f"With network: {command}; without: set model.pretrained to a safetensors file" in str(caught.value)

    def test_has_no_text_side(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small(monkeypatch)
        with pytest.raises(UserError, match="to have a text side, found an image tower alone"):
            load_clip(settings("vit_base_patch16_224.augreg_in21k").model, Path(), 64)

    def test_that_the_documents_give_has_weights(self) -> None:
        table = (ROOT / "docs/own-data.md").read_text().partition("### Another tower")[2].partition("Features are")[0]
        rows = [
            line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ") and "`hub" in line
        ]
        rows += [["MetaCLIP", "`ViT-B-16-quickgelu`", "`metaclip_400m`"]]
        pairs = [pair for _, names, weights in rows for pair in zip(*(map(quoted, (names, weights))), strict=True)]
        assert len(pairs) == 10
        for name, weights in pairs:
            find_clip(ModelParams(clip=name, pretrained=weights), Path())


def quoted(cell: str) -> list[str]:
    return [part.strip("` |") for part in cell.split(", or ")]


class TestAFileOfWeights:
    name = "vit_small_patch14_reg4_dinov2.lvd142m"

    def test_is_loaded_whole_without_its_classifier(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        small(monkeypatch)
        model = timm.create_model(self.name, pretrained=False, num_classes=3)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        params = ModelParams(clip=f"timm/{self.name}", pretrained="w.safetensors")
        clip = load_clip(params, tmp_path, 56, text=False)
        model.set_input_size(img_size=(56, 56))
        with torch.no_grad():
            expected = model.eval().forward_head(model.forward_features(normalised(self.name, views(56))), True)
            assert torch.allclose(Backbone(clip)(views(56)), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert "own activation and constants are assumed" in clip.notes[0]

    def test_that_lacks_one_tensor_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """timm itself would leave it as it was drawn, and say nothing."""
        small(monkeypatch)
        state = timm.create_model(self.name, pretrained=False, num_classes=3).state_dict()
        del state["blocks.1.attn.qkv.weight"]
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=r"Cannot load the weights of timm/.*under timm's names: give another file"):
            load_clip(ModelParams(clip=f"timm/{self.name}", pretrained="w.safetensors"), tmp_path, 56, text=False)


def test_patches_that_do_not_divide_the_image_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    with pytest.raises(UserError, match=r"model\.image_size to be a multiple of 14 px, the patch of timm/.*, found 64"):
        load("vit_small_patch14_reg4_dinov2.lvd142m", image_size=64)


def test_a_tower_that_computes_otherwise_than_it_seems_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    model = timm.create_model("vit_base_patch16_224", num_classes=0)
    model.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(UserError, match="found that it computes otherwise"):
        TimmTower(model, nn.Identity(), "one of a later timm", 64)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2", "PE-Core-T-16-384", "EVA02-B-16"])
def test_open_clips_models_with_towers_of_timms_have_their_own_features(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MetaCLIP's there are open_clip's own vision transformers, as every other CLIP's."""
    small(monkeypatch)
    config = {**open_clip.get_model_config(name), "text_cfg": {**CONFIG["text_cfg"], "width": 16}, "custom_text": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    clip = load_clip(ModelParams(clip=str(tmp_path), normalize="imagenet"), Path(), 64, text=False)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (clip.mean, clip.std))
    model.visual.set_input_size(64)
    with torch.no_grad():
        expected = model.visual((views(64) / 255 - mean) / std)
        found = Backbone(clip, LORA).eval()(views(64))
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["convnext_base", "MobileCLIP-B", "ViTamin-S", "swin_base_patch4_window7_224"])
def test_open_clips_models_with_other_towers_are_refused(name: str) -> None:
    trunk = timm.create_model(open_clip.get_model_config(name)["vision_cfg"]["timm_model_name"], num_classes=0)
    assert why_not(trunk)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"clip": "timm/swin_tiny_patch4_window7_224.ms_in1k", "pretrained": "hub"}, "SwinTransformer is no plain"),
        ({"clip": "timm/vit_tiny_r_s16_p8_224.augreg_in21k", "pretrained": "hub"}, "network of their own .HybridEmbed"),
        (
            {"clip": "timm/vit_tiny_patch16_224.augreg_in21k", "pretrained": "hub", "image_size": 100},
            "multiple of 16 px",
        ),
        ({"clip": "convnext_base", "pretrained": "laion400m_s13b_b51k"}, "ConvNeXt is no plain transformer"),
        ({"clip": "RN50-quickgelu", "pretrained": "yfcc15m"}, "found ModifiedResNet"),
        ({"clip": "ViT-B-16-SigLIP2", "pretrained": "webli", "image_size": 100}, "multiple of 16 px"),
        ({"clip": "ViT-B-16-SigLIP2", "pretrained": "webli", "image_size": 224}, None),
        ({"clip": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "image_size": 224}, None),
    ],
    ids=lambda value: value["clip"] if isinstance(value, dict) else None,
)
def test_what_no_adapter_can_sit_on_is_refused_before_any_weight_is_there(
    model: dict[str, Any], sentence: str | None
) -> None:
    params = ModelParams(**model)
    source = find_clip(params, Path())
    if sentence is None:
        require_tower(source, params.clip, params.image_size)
        return
    with pytest.raises(UserError, match=sentence):
        require_tower(source, params.clip, params.image_size)
