"""The identity of a tower: what changes features is recorded and compared, and what nothing says is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clips import CONFIG, reseal, write_checkpoint, write_random_clip
from safetensors.torch import load_file, save_file
from settings import ModelParams
from torch import Tensor, nn

from dgs.errors import UserError
from dgs.model.backbone import Backbone
from dgs.model.checkpoint import load_checkpoint, read_info
from dgs.model.checkpoint_files import WRAPPERS
from dgs.model.clip import Clip, load_clip, resize
from dgs.model.clip_source import find_clip, require_weights
from dgs.model.detector import Detector
from dgs.model.identity import differences, features_of, image_side

TAGS = [(name, tag) for name, tag in open_clip.list_pretrained() if name in open_clip.list_models()]


def features(clip: Clip) -> Tensor:
    views = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        return Backbone(clip)(views)


def load(folder: Path, image_size: int = 32) -> Clip:
    return load_clip(ModelParams(clip=str(folder)), Path(), image_size, text=False)


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a CLIP's folder with another config, and the same tensors."""
    shutil.copytree(folder, target)
    config = json.loads((target / "open_clip_config.json").read_text())
    edit(config)
    (target / "open_clip_config.json").write_text(json.dumps(config))
    return target


# Of open_clip's settings those that change features and leave every tensor, and its shape, as it is.
OTHER: dict[str, Callable[[dict[str, Any]], object]] = {
    "activation": lambda c: c["model_cfg"].update(quick_gelu=True),
    "a variant of it": lambda c: c["model_cfg"]["vision_cfg"].update(act_kwargs={"approximate": "tanh"}),
    "heads": lambda c: c["model_cfg"]["vision_cfg"].update(head_width=8),
    "pooling": lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg"),
    "order of pooling and norm": lambda c: c["model_cfg"]["vision_cfg"].update(
        pool_type="avg", final_ln_after_pool=True
    ),
    "epsilon": lambda c: c["model_cfg"]["vision_cfg"].update(norm_kwargs={"eps": 1e-2}),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A checkpoint on a copy of the random CLIP."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(clip_folder, folder / "clip")
    return write_checkpoint(folder / "seed-0", folder / "clip")


class TestWhatChangesFeaturesAndNoTensor:
    @pytest.mark.parametrize("what", OTHER)
    def test_is_refused_by_a_checkpoint_and_tells_prepared_data_apart(
        self, what: str, kept: Path, clip_folder: Path, tmp_path: Path
    ) -> None:
        right, wrong = load(clip_folder), load(edited(clip_folder, tmp_path / "clip", OTHER[what]))
        assert right.weights_hash == wrong.weights_hash and not torch.allclose(features(right), features(wrong))
        assert right.identity["clip_features"] != wrong.identity["clip_features"]
        with pytest.raises(UserError, match=r"other settings than .* has now.*: visual\..*, found .*or train again"):
            load_checkpoint(kept, wrong)

    def test_is_refused_where_positions_differ(self, kept: Path, clip_folder: Path, tmp_path: Path) -> None:
        """The hash of weights leaves them out, since they are interpolated to other image sizes."""
        other = shutil.copytree(clip_folder, tmp_path / "clip")
        state = load_file(other / "open_clip_model.safetensors")
        state["visual.positional_embedding"][3] += 1
        save_file(state, other / "open_clip_model.safetensors")
        with pytest.raises(UserError, match=r"visual\.positional_embedding"):
            load_checkpoint(kept, load(other))

    @pytest.mark.parametrize(
        "settings", [{"heads": 4}, {"no_causal_mask": True}, {"tokenizer_kwargs": {"clean": "canonicalize"}}], ids=str
    )
    def test_of_the_text_side_alone_is_no_concern_of_scores(
        self, settings: dict[str, Any], kept: Path, clip_folder: Path, tmp_path: Path
    ) -> None:
        other = load(edited(clip_folder, tmp_path / "c", lambda c: c["model_cfg"]["text_cfg"].update(settings)))
        assert other.identity != load(clip_folder).identity  # captions are embedded otherwise
        load_checkpoint(kept, other)

    def test_constants_are_compared_by_what_scores(self, clip_folder: Path, tmp_path: Path) -> None:
        """Where nothing else sees to it: evaluation compares them with what is prepared."""
        shutil.copytree(clip_folder, tmp_path / "clip")
        checkpoint = write_checkpoint(tmp_path / "seed-0", tmp_path / "clip")
        Detector.load(checkpoint)
        edited(clip_folder, tmp_path / "other", lambda c: c["preprocess_cfg"].update(mean=[0.1, 0.2, 0.3]))
        shutil.rmtree(tmp_path / "clip")
        (tmp_path / "other").rename(tmp_path / "clip")
        with pytest.raises(UserError, match=r"normalised by mean \[0\.5, 0\.4, 0\.3\].* has \[0\.1, 0\.2, 0\.3\] now"):
            Detector.load(checkpoint)


def test_a_checkpoint_of_an_earlier_version_loads_as_before(kept: Path, clip_folder: Path, tmp_path: Path) -> None:
    older = shutil.copytree(kept, tmp_path / "older")
    info = json.loads((older / "dgs.json").read_text())
    for name in ("features", "features_sha256"):
        del info["clip"][name]
    (older / "dgs.json").write_text(json.dumps(info))
    reseal(older)
    load_checkpoint(older, load(edited(clip_folder, tmp_path / "clip", OTHER["pooling"])))


def test_the_record_names_what_decides_and_nothing_of_the_image_size(kept: Path, clip_folder: Path) -> None:
    recorded = read_info(kept)["clip"]["features"]
    at = "visual.transformer.resblocks"
    assert (recorded[f"{at}.mlp.gelu"], recorded[f"{at}.attn.num_heads"], recorded[f"{at}.ln_1.eps"]) == (
        "GELU",
        2,
        1e-5,
    )
    assert recorded["visual.pool_type"] == "tok" and recorded["visual.patch_size"] == [8, 8]
    assert image_side(load(clip_folder, 40).features) == recorded


def test_blocks_that_differ_are_told_apart_by_their_order() -> None:
    def model(*probabilities: float) -> nn.Module:
        return nn.ModuleDict({"visual": nn.Sequential(*map(nn.Dropout, probabilities))})

    one, two = features_of(model(0.1, 0.2, 0.1)), features_of(model(0.1, 0.1, 0.2))
    assert differences(one, two) == ["visual.p [0.1, 0.2, 0.1], found [0.1, 0.1, 0.2]"]
    assert differences({**one, "visual.new": 1}, one) == []  # libraries add attributes


def test_resizing_is_what_open_clip_does_at_loading(clip_folder: Path) -> None:
    ours = open_clip.create_model(f"local-dir:{clip_folder}")
    resize(ours.visual, 48)
    theirs = open_clip.create_model(f"local-dir:{clip_folder}", force_image_size=48)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(ours.eval().visual(images), theirs.eval().visual(images))


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ({"clip": "ViT-B-16-SigLIP2-384", "pretrained": "webli"}, 384),
        ({"clip": "ViT-B-32", "pretrained": "random"}, 224),
        ({"clip": "timm/vit_small_patch14_reg4_dinov2.lvd142m", "pretrained": "hub"}, 518),
    ],
    ids=["a tag", "a name", "of timm's"],
)
def test_images_of_another_size_than_a_tower_is_for_are_told(model: dict[str, str], own: int) -> None:
    source = find_clip(ModelParams(**model), Path())
    assert source.notes_at(own) == source.notes == ()
    (note,) = source.notes_at(64)
    assert f"Images are 64 px, the tower is for {own} px (model.image_size)" in note


def test_a_folders_own_size_is_its_configs(clip_folder: Path, tmp_path: Path) -> None:
    assert load(clip_folder).notes == () and "the tower is for 32 px" in load(clip_folder, 40).notes[0]
    pair = edited(clip_folder, tmp_path / "pair", lambda c: c["model_cfg"]["vision_cfg"].update(image_size=[32, 32]))
    assert load(pair).notes == ()
    unsaid = edited(clip_folder, tmp_path / "unsaid", lambda c: c["model_cfg"]["vision_cfg"].pop("image_size"))
    assert find_clip(ModelParams(clip=str(unsaid)), Path()).side == 224, "as open_clip takes it"


class TestATag:
    @pytest.mark.parametrize(("name", "tag"), TAGS, ids=lambda value: value)
    def test_of_open_clip_means_its_own_activation_and_constants_or_is_refused(self, name: str, tag: str) -> None:
        config = open_clip.get_pretrained_cfg(name, tag)
        quick = bool(open_clip.get_model_config(name).get("quick_gelu", False))
        params = ModelParams(clip=name, pretrained=tag)
        if quick or not config.get("quick_gelu", False):
            source = find_clip(params, Path())
            assert (source.mean, source.std) == (tuple(config["mean"]), tuple(config["std"]))
            untold = quick and not config.get("quick_gelu", False)
            assert ["QuickGELU: it is assumed" in note for note in source.notes] == [True] * untold
            return
        with pytest.raises(UserError, match=rf"trained with QuickGELU; .*Set model\.clip: {name}-quickgelu\."):
            find_clip(params, Path())
        find_clip(ModelParams(clip=f"{name}-quickgelu", pretrained=tag), Path())

    def test_of_the_plain_name_is_refused_by_the_quickgelu_one(self) -> None:
        with pytest.raises(UserError, match=r"trained with GELU; .*Set model\.clip: ViT-B-32\."):
            find_clip(ModelParams(clip="ViT-B-32-quickgelu", pretrained="laion2b_s34b_b79k"), Path())


class TestAFile:
    """It says nothing of its training."""

    def note(self, tmp_path: Path, name: str) -> str:
        (tmp_path / "w.safetensors").write_bytes(b"")
        (note,) = find_clip(ModelParams(clip=name, pretrained="w.safetensors"), tmp_path).notes
        return note

    def test_is_assumed_to_go_with_the_name(self, tmp_path: Path) -> None:
        plain, quick = self.note(tmp_path, "ViT-B-32"), self.note(tmp_path, "ViT-B-32-quickgelu")
        assert ": GELU is assumed" in plain and "model.clip: ViT-B-32-quickgelu" in plain
        assert ": QuickGELU is assumed" in quick and "for GELU set model.clip: ViT-B-32)" in quick

    def test_gets_the_constants_that_all_weights_of_the_name_have(self, tmp_path: Path) -> None:
        assert "mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]" in self.note(tmp_path, "ViT-B-16-SigLIP2")
        assert "quickgelu" not in self.note(tmp_path, "ViT-B-16-SigLIP2")

    @pytest.mark.parametrize("tensors", [{}, {"x": torch.zeros(1)}], ids=["none", "others"])
    def test_that_does_not_fit_is_never_advised_to_be_a_file(self, tensors: dict[str, Tensor], tmp_path: Path) -> None:
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(UserError) as caught:
            load_clip(ModelParams(clip="ViT-S-32-alt", pretrained="w.safetensors"), tmp_path, 224)
        assert "Cannot load the weights 'w.safetensors'" in str(caught.value) and "give another file" in str(
            caught.value
        )

    @pytest.mark.parametrize("kind", ["script", "trace"])
    def test_with_code_in_it_is_named_before_it_is_opened(self, kind: str, tmp_path: Path) -> None:
        model = nn.Linear(2, 2)
        archive = torch.jit.script(model) if kind == "script" else torch.jit.trace(model, torch.rand(1, 2))
        archive.save(str(tmp_path / "ViT-B-32.pt"))
        with pytest.raises(UserError) as caught:
            find_clip(ModelParams(clip="ViT-B-32", pretrained="ViT-B-32.pt"), tmp_path)
        assert "TorchScript archive" in str(caught.value) and "model.clip: ViT-B-32-quickgelu" in str(caught.value)

    def test_with_code_in_it_is_named_for_a_tower_of_timms_too(self, tmp_path: Path) -> None:
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "vit.pt"))
        with pytest.raises(UserError, match=r"found a TorchScript archive, it holds code.* as safetensors"):
            find_clip(ModelParams(clip="timm/vit_tiny_patch16_224.augreg_in21k", pretrained="vit.pt"), tmp_path)

    def test_that_is_a_damaged_archive_is_left_to_what_loads_it(self, tmp_path: Path) -> None:
        torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
        content = (tmp_path / "w.pt").read_bytes()
        (tmp_path / "w.pt").write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))
        with pytest.raises(UserError, match=r"Cannot load the weights 'w\.pt'"):
            load_clip(ModelParams(clip="ViT-S-32-alt", pretrained="w.pt"), tmp_path, 224)

    def test_of_tensors_in_a_zip_is_no_such_archive(self, tmp_path: Path) -> None:
        torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
        assert find_clip(ModelParams(clip="ViT-B-32", pretrained="w.pt"), tmp_path).weights == str(tmp_path / "w.pt")


class TestTensorsInAFile:
    """Of open_clip's architecture `tiny-file`, as people save them."""

    @pytest.fixture(scope="class")
    def state(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
        config = tmp_path_factory.mktemp("config") / "tiny-file.json"
        config.write_text(json.dumps(CONFIG))
        open_clip.add_model_config(config)
        torch.manual_seed(3)
        return open_clip.CLIP(**CONFIG).state_dict()

    def loaded(self, folder: Path, name: str) -> Tensor:
        params = ModelParams(clip="tiny-file", pretrained=name)
        require_weights(find_clip(params, folder))
        return load_clip(params, folder, 32, text=False).model.visual.conv1.weight

    @pytest.mark.parametrize(
        "wrapped",
        [
            *({name: "state"} for name in WRAPPERS),
            {"epoch": 3, "model": {"state_dict": "state"}},
            *({"": prefix} for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.")),
            {"state_dict": "state", "model": "ViT-B-32"},
            {"sizes": torch.tensor(32)},
        ],
        ids=str,
    )
    def test_is_found_below_common_wrappings(
        self, wrapped: dict[str, Any], state: dict[str, Tensor], tmp_path: Path
    ) -> None:
        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: filled(each) for name, each in value.items()}
            return state if value == "state" else value

        content = filled(wrapped)
        if "" in wrapped:
            content = {wrapped[""] + name: value for name, value in state.items()}
        elif "sizes" in wrapped:  # as OpenAI's own have them
            content = {**state, "input_resolution": wrapped["sizes"], "context_length": torch.tensor(16)}
        torch.save(content, tmp_path / "w.pt")
        assert torch.equal(self.loaded(tmp_path, "w.pt"), state["visual.conv1.weight"])

    def test_is_read_by_its_content_whatever_its_name(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.pt")
        torch.save(state, tmp_path / "w.safetensors")
        torch.save(state, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
        for name in ("w.pt", "w.safetensors", "w.bin"):
            assert torch.equal(self.loaded(tmp_path, name), state["visual.conv1.weight"])

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda s: {**s, "visual.proj": s["visual.proj"] * torch.nan}, "Expected finite numbers in"),
            (lambda s: {name: value.int() for name, value in s.items()}, "Expected dense real tensors in"),
            (lambda s: {"model": s, "ema": s}, "Expected one state dict in .*, found model and ema"),
            (lambda s: [s], "Expected a state dict in .*, found list"),
            (lambda s: nn.Linear(2, 2), "Cannot read .* as tensors alone"),
        ],
    )
    def test_that_would_give_other_features_is_refused(
        self, change: Callable[[dict[str, Tensor]], object], sentence: str, state: dict[str, Tensor], tmp_path: Path
    ) -> None:
        torch.save(change(state), tmp_path / "w.pt")
        with pytest.raises(UserError, match=rf"Cannot load the weights 'w\.pt' of tiny-file \({sentence}"):
            self.loaded(tmp_path, "w.pt")

    @pytest.mark.parametrize(
        ("edit", "found"),
        [
            (lambda data: data[: len(data) // 2], "a ZIP archive that is cut short"),
            (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
            (lambda data: b"<!DOCTYPE html>", "another kind of file"),
            (lambda data: b"", "another kind of file"),
            (lambda data: data.replace(b"data.pkl", b"data.txt"), "a ZIP archive of other files"),
        ],
    )
    def test_that_is_none_is_named_by_the_check(
        self, edit: Callable[[bytes], bytes], found: str, state: dict[str, Tensor], clip_folder: Path, tmp_path: Path
    ) -> None:
        torch.save(state, tmp_path / "w.pt")
        data = edit((tmp_path / "w.pt").read_bytes())
        (tmp_path / "w.pt").write_bytes(data)
        folder = shutil.copytree(clip_folder, tmp_path / "clip")
        (folder / "open_clip_model.safetensors").write_bytes(data)
        for own in ({"clip": "tiny-file", "pretrained": "w.pt"}, {"clip": "clip"}):
            with pytest.raises(UserError, match=rf"Expected tensors .* found {found}"):
                require_weights(find_clip(ModelParams(**own), tmp_path))

    def test_that_is_cut_short_in_safetensors_too(self, clip_folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(clip_folder, tmp_path / "clip")
        file = folder / "open_clip_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match="found a damaged safetensors file"):
            require_weights(find_clip(ModelParams(clip="clip"), tmp_path))


class TestAFolder:
    @pytest.mark.parametrize(
        ("edit", "assumed"),
        [
            (lambda c: c.pop("preprocess_cfg"), 2),
            (lambda c: c.update(preprocess_cfg=None), 2),
            (lambda c: c.update(preprocess_cfg={}), 2),
            (lambda c: c["preprocess_cfg"].pop("std"), 1),
            (lambda c: c["preprocess_cfg"].update(mean=None), 1),
        ],
        ids=["no group", "null", "empty", "no std", "null mean"],
    )
    def test_without_constants_gets_open_clips_and_says_so(
        self, edit: Callable[[dict[str, Any]], object], assumed: int, clip_folder: Path, tmp_path: Path
    ) -> None:
        folder = edited(clip_folder, tmp_path / "clip", edit)
        theirs = open_clip.get_model_preprocess_cfg(open_clip.create_model(f"local-dir:{folder}"))
        clip = load(folder)
        assert (clip.mean, clip.std) == (tuple(theirs["mean"]), tuple(theirs["std"]))
        assert len(clip.notes) == assumed and all("open_clip's own is assumed" in note for note in clip.notes)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("{", "to be JSON with the groups"),
            ("[]", "to be JSON with the groups"),
            (json.dumps({"preprocess_cfg": {}}), "to be JSON with the groups"),
            (json.dumps({"model_cfg": {}}), "to be JSON with the groups"),
            (json.dumps({"model_cfg": {"vision_cfg": "ViT"}}), "to be JSON with the groups"),
            (json.dumps({"model_cfg": {"vision_cfg": {"image_size": [32, 16]}}}), "to be the side of a square in px"),
            (json.dumps({"model_cfg": {"vision_cfg": {"image_size": None}}}), "to be the side of a square in px"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": 0.5}}), "preprocess_cfg.mean"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"std": [1, 2, "3"]}}), "preprocess_cfg.std"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"std": [0.2, 0, 0.2]}}), "three numbers above 0"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"std": [0.2, -0.2, 0.2]}}), "from 0 to 1"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"std": [58.4, 57.1, 57.4]}}), "from 0 to 1, as pix"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, float("nan"), 0.5]}}), "from 0 to 1"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.5, True]}}), "from 0 to 1"),
            (json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5, 0.5]}}), "from 0 to 1"),
            (json.dumps({"model_cfg": {**CONFIG, "quickgelu": True}}), "Cannot load the CLIP in model.clip"),
            (json.dumps({"model_cfg": {**CONFIG, "embed_dim": 25}}), "Cannot load the CLIP in model.clip"),
        ],
    )
    def test_with_another_config_is_one_sentence(self, content: str, sentence: str, tmp_path: Path) -> None:
        folder = write_random_clip(tmp_path / "clip")
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError) as caught:
            load(folder)
        assert sentence in str(caught.value) and "\n" not in str(caught.value)

    def test_of_blocks_that_have_no_split_attention_is_refused(self, tmp_path: Path) -> None:
        vision = {**CONFIG["vision_cfg"], "qk_norm": True}
        torch.manual_seed(0)
        folder, config = write_random_clip(tmp_path / "clip"), {**CONFIG, "vision_cfg": vision}
        save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        with pytest.raises(UserError, match="found VisionTransformer of CustomResidualAttentionBlock"):
            load(folder)
