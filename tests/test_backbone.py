"""The image side: split attention, adapters, and a teacher that is the same tower."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clips import write_random_clip
from open_clip.transformer import QuickGELU
from settings import LoraParams, ModelParams
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.device import choose_device
from dgs.errors import UserError
from dgs.model.backbone import Backbone, pools_class_token
from dgs.model.clip import Clip, LeanQuickGELU, SplitAttention, load_clip
from dgs.model.text import embed_tokens, encode_prompts, encode_texts

LORA = LoraParams(rank=3, alpha=6.0, dropout=0.5)


@pytest.fixture
def params(clip_folder: Path) -> ModelParams:
    return ModelParams(clip=str(clip_folder), image_size=32)


@pytest.fixture
def clip(params: ModelParams) -> Clip:
    return load_clip(params, Path(), 32)


def images(count: int = 4, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def randomise_adapters(backbone: Backbone) -> None:
    torch.manual_seed(3)
    for parameter in backbone.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_split_attention_equals_multihead_attention_and_keeps_its_precision(seed: int) -> None:
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    split = SplitAttention(attention)
    for attn_mask in (None, mask):
        expected = attention(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
        assert torch.allclose(split(x, x, x, attn_mask=attn_mask)[0], expected, rtol=0, atol=1e-13)


def test_a_last_block_for_the_class_token_alone_is_the_whole_ones_within_rounding(clip: Clip) -> None:
    whole, alone = Backbone(clip, LORA, levels=(2,)), Backbone(clip, LORA)
    given, width = images(), whole.widths[0]
    block = clip.model.visual.transformer.resblocks[-1]
    mlp: list[tuple[int, ...]] = []
    hook = block.mlp.register_forward_hook(lambda module, given, out: mlp.append(tuple(out.shape)))
    features, found = whole.eval()(given)[:, :width], alone.eval()(given)
    hook.remove()
    assert mlp == [(4, 17, 32), (4, 1, 32)]  # where the last level is read, every token is computed
    assert torch.allclose(features, found, rtol=0, atol=1e-5)
    clip.model.visual.pool_type = "avg"
    assert not pools_class_token(clip.model.visual)


def test_features_equal_open_clips_own(clip: Clip, clip_folder: Path) -> None:
    plain = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    batch = images()
    normalised = (batch / 255 - torch.tensor(clip.mean).view(1, 3, 1, 1)) / torch.tensor(clip.std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = plain.visual(normalised)
        assert torch.allclose(Backbone(clip)(batch), expected, rtol=0, atol=2e-6)
    assert clip.mean == (0.5, 0.4, 0.3)


def test_new_adapters_change_nothing_and_trained_ones_do(clip: Clip) -> None:
    batch = images()
    with torch.no_grad():
        before = Backbone(clip)(batch)
        backbone = Backbone(clip, LORA).eval()
        assert torch.equal(backbone(batch), before)
        randomise_adapters(backbone)
        assert (backbone(batch) - before).abs().max() > 0.01


def test_only_q_k_v_of_every_block_are_adapted_with_the_rank_asked_for(clip: Clip) -> None:
    backbone = Backbone(clip, LORA)
    learned = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    blocks = {(name.split("resblocks.")[1].split(".")[0], name.split("attn.")[1].split(".")[0]) for name in learned}
    assert blocks == {(str(block), f"{part}_proj") for block in range(2) for part in "qkv"}
    assert sorted({tuple(p.shape) for p in learned.values()}) == [(3, 32), (32, 3)]
    assert len(learned) == 2 * 3 * 2


def test_blocks_that_are_not_named_get_no_adapters(clip: Clip) -> None:
    backbone = Backbone(clip, LORA.model_copy(update={"blocks": [1]}))
    names = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert len(names) == 6 and all("resblocks.1.attn." in name for name in names)
    clip.model.visual = backbone.without_adapters()
    with pytest.raises(UserError, match=r"model\.lora\.blocks to be among 0 to 1.*found 2"):
        Backbone(clip, LORA.model_copy(update={"blocks": [0, 2]}))


def test_attention_is_fused_and_bf16_is_used_where_asked(params: ModelParams, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.dtype] = []
    fused = F.scaled_dot_product_attention

    def watched(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        called.append(q.dtype)
        return fused(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    features = {}
    for precision in ("fp32", "bf16"):
        clip = load_clip(params.model_copy(update={"precision": precision}), Path(), 32)
        with torch.no_grad():
            features[precision] = Backbone(clip)(images())
    assert called == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert features["bf16"].dtype == torch.float32
    gap = (features["bf16"] - features["fp32"]).abs().max() / features["fp32"].abs().max()
    assert 0 < gap < 0.05


def test_the_image_side_alone_is_the_same_and_smaller(params: ModelParams, clip: Clip) -> None:
    whole, alone = clip, load_clip(params, Path(), 32, text=False)
    assert alone.weights_hash == whole.weights_hash
    assert [name for name, _ in alone.model.named_parameters() if not name.startswith("visual.")] == []
    with torch.no_grad():
        assert torch.equal(Backbone(alone)(images()), Backbone(whole)(images()))


def test_the_adapter_adds_alpha_over_root_rank_times_b_a(clip: Clip) -> None:
    backbone = Backbone(clip, LORA).eval()
    randomise_adapters(backbone)
    layer = backbone.visual.base_model.model.transformer.resblocks[0].attn.q_proj
    x = torch.randn(5, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + 6.0 / 3**0.5 * (x @ a.T @ b.T)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-5)


def test_the_teacher_is_the_student_with_adapters_off_exactly(clip: Clip) -> None:
    batch = images()
    with torch.no_grad():
        before = Backbone(clip)(batch)
    backbone = Backbone(clip, LORA).train()
    randomise_adapters(backbone)
    with backbone.frozen():
        assert torch.equal(backbone(batch), before)
    assert backbone.training
    assert not torch.equal(backbone(batch).detach(), before)


def test_adapters_come_off_without_a_trace(clip: Clip) -> None:
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    backbone = Backbone(clip, LORA)
    randomise_adapters(backbone)
    clip.model.visual = backbone.without_adapters()
    after = clip.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_equal_seeds_give_equal_adapters(params: ModelParams) -> None:
    def weights(seed: int) -> list[Tensor]:
        return [p.detach().clone() for p in Backbone(load_clip(params, Path(), 32), LORA, seed).adapter_parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_another_image_size_interpolates_positions_only(params: ModelParams, clip: Clip) -> None:
    small, large = clip, load_clip(params, Path(), 40)
    assert large.model.visual.positional_embedding.shape[0] == 26
    assert small.weights_hash == large.weights_hash
    assert Backbone(large)(images(size=40)).shape == (4, 24)


@pytest.mark.parametrize("name", [None, "ViT-B-32-quickgelu"])
def test_the_text_tower_cut_to_the_longest_text_is_open_clips(params: ModelParams, name: str | None) -> None:
    named = {"clip": name, "pretrained": "random"}
    clip = load_clip(params.model_copy(update=named) if name else params, Path(), 32)
    tokens = clip.tokenizer(["a", "a blurry photo of a small red ring", ""])
    called: list[int] = []
    clip.model.transformer.register_forward_hook(lambda *args: called.append(args[1][0].shape[1]))
    found = embed_tokens(clip.model, tokens)
    with torch.no_grad():
        expected = clip.model.encode_text(tokens)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert called == [int((tokens > 0).sum(1).max()), tokens.shape[1]] and called[0] < called[1]


def test_lean_quick_gelu_is_quick_gelu_and_keeps_less() -> None:
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64, requires_grad=True)
    kept: dict[str, int] = {}
    grads = {}
    for name, module in (("lean", LeanQuickGELU()), ("plain", QuickGELU())):
        kept[name] = 0

        def keep(tensor: Tensor, name: str = name) -> Tensor:
            kept[name] += tensor.numel() > 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x)
        grads[name] = (y.detach(), torch.autograd.grad(y.sum(), x)[0])
    for lean, plain in zip(grads["lean"], grads["plain"], strict=True):
        assert torch.allclose(lean, plain, rtol=0, atol=1e-14)
    assert (kept["lean"], kept["plain"]) == (1, 3)


def test_text_embeddings_do_not_depend_on_the_batch(clip: Clip) -> None:
    texts = ["a red circle", "a photo of a blue square on the left", "x"]
    together = encode_texts(clip, texts)
    assert together.shape == (3, 24) and together.dtype == np.float32
    alone = np.concatenate([encode_texts(clip, [text]) for text in texts])
    assert np.allclose(together, alone, rtol=0, atol=1e-5)


def test_prompt_vectors_are_unit_means(clip: Clip) -> None:
    prompts = {"red": ["a red thing", "something red"], "blue": ["a blue thing"]}
    values, vectors = encode_prompts(partial(encode_texts, clip), prompts)
    assert values == ["red", "blue"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    alone = encode_texts(clip, ["a blue thing"])[0]
    assert np.allclose(vectors[1], alone / np.linalg.norm(alone), rtol=0, atol=1e-5)


def test_the_weights_hash_tells_weights_apart(clip: Clip, tmp_path: Path) -> None:
    other = ModelParams(clip=str(write_random_clip(tmp_path / "other", seed=9)))
    assert clip.weights_hash != load_clip(other, Path(), 32).weights_hash


def test_imagenet_constants_on_request(clip_folder: Path) -> None:
    clip = load_clip(ModelParams(clip=str(clip_folder), normalize="imagenet"), Path(), 32)
    assert clip.mean == (0.485, 0.456, 0.406) and clip.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"clip": "ViT-L-14", "pretrained": "openai"}, "Set model.clip: ViT-L-14-quickgelu"),
        ({"clip": "ViT-L-41-quickgelu", "pretrained": "openai"}, "Did you mean 'ViT-L-14-quickgelu'?"),
        ({"clip": "ViT-B-32-quickgelu"}, "Expected model.pretrained for 'ViT-B-32-quickgelu'"),
        ({"clip": "RN50", "pretrained": "random"}, "found ModifiedResNet"),
        ({"clip": "ViT-B-32", "pretrained": "metaclip_400n"}, "Did you mean 'metaclip_400m'? Its tags: "),
    ],
)
def test_mistakes_name_what_to_do(model: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_clip(ModelParams(**model), Path(), 224)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected open_clip_config\.json in model\.clip"):
        load_clip(ModelParams(clip=str(tmp_path)), Path(), 32)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"Cannot use compute\.device = 'quantum'"):
        choose_device("quantum")
    assert not torch.backends.cudnn.allow_tf32, "a GPU's convolutions round as a CPU's do"
