"""What embeds captions: CLIP's own text tower, one aligned to a locked image tower by contrast, or nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from clips import settings
from conftest import ImageTree
from copies import copy_repository, run
from settings import DataParams, validate
from torch import Tensor
from torch.nn import functional as F

from dgs.analysis.evaluate import final_validation
from dgs.analysis.figures.forgetting import forgetting_measures
from dgs.analysis.forgetting import Tower, measure_all
from dgs.analysis.metrics import has_aligned_text, label_of, measure_words, per_seed_values, summary
from dgs.data.manifest import ImageSource, build_manifest
from dgs.data.prepared import Prepared, load_prepared, save_prepared, text_sentence
from dgs.errors import UserError
from dgs.model import aligned
from dgs.model.aligned import AlignedText, Recipe, align, contrast, retrieval
from dgs.model.clip import Clip
from dgs.model.clip_classifier import ClipClassifier
from dgs.model.identity import tensors_hash
from dgs.model.methods.base import Batch, Method, suppression
from dgs.model.methods.registry import METHODS, get_method, require_text
from dgs.model.text import (
    ALIGNED,
    TextSide,
    encode_texts,
    no_text,
    open_text_side,
    reopen_text_side,
)
from dgs.model.train import Trained, train
from dgs.params import Params
from dgs.workspace import Workspace

QUICK = Recipe(width=32, heads=2, layers=1, steps=150, batch=64, lr=3e-3, warmup=10)
COLOURS, THINGS = ("red", "green", "blue", "black"), ("ring", "star", "cup", "shoe", "dog")
WORDS = (("tiny", "large"), COLOURS, THINGS, ("left", "right"))
TEMPLATES = ("a photo of a {} {} {} on the {}", "{} {} {}, {}", "this is a {} {} {} at the {} side")


def scenes(count: int, seed: int, width: int = 24) -> tuple[Tensor, list[str]]:
    """Features of images, a sum of what their attributes look like and noise; a caption each, in one of 3 wordings."""
    looks = [np.random.default_rng(i).normal(size=(len(words), width)) for i, words in enumerate(WORDS)]
    rng, features, captions = np.random.default_rng(seed), [], []
    combinations = list(itertools.product(*(range(len(words)) for words in WORDS)))
    for number in rng.integers(len(combinations), size=count):
        chosen = combinations[number]
        features.append(
            2.0 + sum(look[i] for look, i in zip(looks, chosen, strict=True)) + 0.2 * rng.normal(size=width)
        )
        words = [own[i] for own, i in zip(WORDS, chosen, strict=True)]
        captions.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(*words))
    return torch.tensor(np.stack(features), dtype=torch.float32), captions


@pytest.fixture(scope="module")
def text() -> AlignedText:
    """Trained on 200 scenes."""
    return align(*scenes(200, 0), QUICK)


class TestAligned:
    """`aligned`: a text transformer learns by contrast where the locked image features of its captions lie."""

    def test_it_finds_an_images_caption_among_captions_that_it_never_saw(self, text: AlignedText) -> None:
        seen = set(scenes(200, 0)[1])
        features, captions = scenes(400, 1)
        new = [i for i, caption in enumerate(captions) if caption not in seen]
        found = retrieval(features[new], [captions[i] for i in new], text)
        assert found["pool"] >= 40 and found["chance1"] == 1 / found["pool"]
        assert found["r1_low"] > 5 * found["chance1"] and found["r5"] >= found["r1"]
        assert found["r1_low"] < found["r1"] < found["r1_high"]

    def test_its_embeddings_are_as_wide_and_as_long_as_the_features(self, text: AlignedText) -> None:
        features, captions = scenes(200, 0)
        embedded = text.encode(captions)
        assert embedded.shape == features.shape and embedded.dtype == np.float32
        assert np.allclose(np.linalg.norm(embedded, axis=1), features.norm(dim=1).mean(), rtol=1e-5)

    def test_words_and_lengths_that_training_did_not_have_are_no_error(self, text: AlignedText) -> None:
        embedded = text.encode(["a violet unicorn", "", "red " * 200])
        assert np.isfinite(embedded).all()
        assert np.array_equal(*text.encode(["a photo of a unicorn", "a photo of a zeppelin"])), "one unknown token"

    def test_the_same_bits_each_time_and_torchs_own_generator_is_left_alone(self, text: AlignedText) -> None:
        before = torch.get_rng_state()
        again = align(*scenes(200, 0), QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(value, text.state_dict()[name]) for name, value in again.state_dict().items())

    def test_equal_captions_are_no_negatives_of_each_other(self) -> None:
        images, texts = F.normalize(torch.randn(2, 6, 4), dim=2)
        scale, different = torch.tensor(5.0), torch.arange(6)
        assert contrast(images, texts, torch.zeros(6), scale) == 0, "nothing is left to be told apart from"
        logits = 5.0 * images @ texts.T
        both = [F.cross_entropy(part, different) for part in (logits, logits.T)]
        assert contrast(images, texts, different, scale) == pytest.approx(float(sum(both)) / 2)
        twins = torch.tensor([0, 0, 1, 2, 3, 4])
        allowed = logits.clone()
        allowed[0, 1] = allowed[1, 0] = -torch.inf
        both = [F.cross_entropy(part, different) for part in (allowed, allowed.T)]
        assert contrast(images, texts, twins, scale) == pytest.approx(float(sum(both)) / 2)

    def test_retrieval_by_hand_counts_every_caption_once(
        self, monkeypatch: pytest.MonkeyPatch, text: AlignedText
    ) -> None:
        vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
        monkeypatch.setattr(text, "encode", lambda texts: np.float32([vectors[each] for each in texts]))
        images = torch.tensor([[2.0, 0.1], [1.0, 0.0], [0.1, 3.0], [5.0, 0.0]])
        found = retrieval(images, ["a", "a", "b", "b"], text)
        assert (found["r1"], found["r5"]) == (0.75, 1.0)
        assert (found["pool"], found["images"], found["chance1"], found["chance5"]) == (2, 4, 0.5, 1.0)

    def test_captions_that_it_cannot_tell_apart_are_found_as_often_as_by_chance(self, text: AlignedText) -> None:
        things = ("unicorn", "zeppelin", "walrus", "viola")
        assert len(np.unique(text.encode([f"a {thing}" for thing in things]), axis=0)) < len(things)
        features, captions = scenes(400, 1)[0], [f"a {thing}" for thing in things] * 100
        found = retrieval(features, captions, text)
        assert found["r1"] == pytest.approx(found["chance1"], abs=0.05) and found["r5"] == 1

    def test_one_caption_for_all_images_cannot_be_learned_from(self) -> None:
        with pytest.raises(UserError, match=r"training images with different captions .* found 1\. Give captions"):
            align(torch.randn(5, 4), ["a photo"] * 5, QUICK)

    def test_a_damaged_file_is_one_sentence(self, text: AlignedText, tmp_path: Path) -> None:
        text.save(tmp_path / "text", {"images": 200})
        assert AlignedText.load(tmp_path / "text")[1] == {"images": 200}
        (tmp_path / "text").write_bytes((tmp_path / "text").read_bytes()[:500])
        with pytest.raises(UserError, match=r"Cannot read the text side .*\. Remove it, and run prepare again\."):
            AlignedText.load(tmp_path / "text")


@pytest.fixture
def tree(image_tree: ImageTree) -> Path:
    return image_tree()


@pytest.fixture
def opened(tree: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TextSide]:
    """The text side of a small tree of images on a random tower; `test`: what captions of test images become."""
    monkeypatch.setattr(aligned, "RECIPE", dataclasses.replace(QUICK, steps=8))
    monkeypatch.setattr(aligned.align, "__defaults__", (dataclasses.replace(QUICK, steps=8),))
    manifest = build_manifest(tree, DataParams(layout="folders", root=str(tree), rho=None))
    manifest["caption"] = [f"a picture of number {index}" for index in range(len(manifest))]

    def open_it(side: str = "aligned", test: str | None = None, train: str = "", val: str = "") -> TextSide:
        params, workspace = own_params(clip_folder, side), Workspace(tmp_path, tmp_path, "mini")
        own = manifest.copy()
        if test is not None:
            own.loc[own["split"] == "test", "caption"] = test
        own.loc[own["split"] == "train", "caption"] += train
        if val:
            own.loc[(own["split"] == "val").idxmax(), "caption"] = own.loc[own["split"] == val, "caption"].iloc[0]
        return open_text_side(params, workspace, own, ImageSource(tree), None)

    return open_it


def kept(root: Path) -> Path:
    return root / "build" / "mini" / "text"


def own_params(clip_folder: Path, side: str) -> Params:
    params = settings(clip_folder)
    return params.model_copy(update={"model": params.model.model_copy(update={"text": side})})


class TestWhatItDependsOn:
    """An aligned text side is kept by what it depends on: the tower, training images, their captions, the recipe."""

    def test_it_is_trained_once(self, opened: Callable[..., TextSide], monkeypatch: pytest.MonkeyPatch) -> None:
        first = opened().encode(["a picture"])
        monkeypatch.setattr(aligned, "align", None)
        assert np.array_equal(opened().encode(["a picture"]), first)

    def test_test_captions_change_nothing_training_captions_do(
        self, opened: Callable[..., TextSide], tmp_path: Path
    ) -> None:
        bits = [opened(**changed).encode(["a picture"]) for changed in ({}, {"test": "a secret"}, {"train": "!"})]
        assert np.array_equal(bits[0], bits[1]) and not np.array_equal(bits[0], bits[2])
        assert len(list(kept(tmp_path).iterdir())) == 2

    def test_a_run_that_breaks_off_leaves_nothing(
        self, opened: Callable[..., TextSide], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(tensors: object, file: Path, metadata: object) -> None:
            file.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(aligned, "save_file", broken)
            opened()
        assert list(kept(tmp_path).iterdir()) == []
        assert opened().about["held_out"]["pool"] == 12, "and the next run trains it"

    def test_what_is_known_of_it_is_told(self, opened: Callable[..., TextSide], tmp_path: Path) -> None:
        side = opened()
        assert (side.about["side"], side.about["images"], side.about["captions"]) == ("aligned", 12, 12)
        assert "learned from 12 captions of 12 training images" in str(side) and "Of 12 captions held out" in str(side)
        assert "by chance 8.3 %" in str(side)
        assert side.about["weights"] == tensors_hash(side.aligned.state_dict())
        assert f"(weights {side.about['weights'][:12]})" in str(side)
        assert text_sentence({**side.about, "held_out": None}).endswith("no validation caption is new to it.")
        side.save(tmp_path)
        reopened = reopen_text_side(validate({"model": {"text": "aligned"}}), tmp_path, tmp_path)
        assert np.array_equal(reopened(["a picture"]), side.encode(["a picture"])) and (tmp_path / ALIGNED).is_file()

    def test_captions_that_training_has_are_not_held_out(self, opened: Callable[..., TextSide]) -> None:
        assert opened(val="train").about["held_out"]["pool"] == 11


class TestOwn:
    def test_it_is_clips_text_tower(self, opened: Callable[..., TextSide], clip: Clip, clip_folder: Path) -> None:
        side, texts = opened("own"), ["a cat", "two dogs in the rain"]
        assert np.array_equal(side.encode(texts), encode_texts(clip, texts))
        assert np.array_equal(
            reopen_text_side(own_params(clip_folder, "own"), Path(), Path())(texts), side.encode(texts)
        )
        assert side.about == {"side": "own"}


class TestNone:
    """`none`: captions have no embeddings, methods that read captions refuse, what needs text is absent."""

    def test_embeddings_have_no_columns_and_come_back_so(
        self, opened: Callable[..., TextSide], tree: Path, tmp_path: Path
    ) -> None:
        side = opened("none")
        manifest = build_manifest(tree, DataParams(layout="folders", root=str(tree), rho=None))
        captions, prompts = side.embed(manifest, {"shape": {"disc": ["a disc"], "box": ["a box", "a square"]}})
        params = validate({"data": {"layout": "folders", "root": ".", "rho": None}, "model": {"text": "none"}})
        save_prepared(tmp_path, manifest, {"rho": None, **side.facts}, captions, prompts, None, params)
        prepared = load_prepared(tmp_path, tree)
        assert prepared.caption_embeddings.shape == (len(manifest), 0) and not prepared.has_text
        values, vectors = prepared.prompts["shape"]
        assert values == ["disc", "box"] and vectors.shape == (2, 0)
        assert prepared.info["text"] == {"side": "none"} and prepared.with_prepared(validate({})).model.text == "none"
        assert (
            reopen_text_side(params, Path(), Path()) is no_text and prepared.text_note == "Captions are not embedded."
        )

    def test_a_method_reads_captions_if_what_it_is_made_of_does(self) -> None:
        without = {name for name, method in METHODS.items() if not method.needs_text}
        assert without >= {
            "probe", "lora", "alignment_only", "distillation", "levels_probe", "levels_distillation", "lp_ft",
            "wise_ft", "swad", "l2_sp", "pcgrad", "prograd", "effort", "content_probe",
            "content_poe_distillation", "content_pixel_cnn", "late_fusion",
        }  # fmt: skip
        reading = set(METHODS) - without
        assert reading >= {name for name, method in METHODS.items() if method.expert == "text" or method.shuffled}
        assert reading >= {"dgs", "suppression_only", "random_direction", "signed", "leace", "null_space", "dgs_plus"}

    def test_a_new_method_is_not_listed_anywhere(self) -> None:
        def beneficial(batch: Batch) -> Tensor:
            return batch.text_grad.clamp(max=0)

        assert Method("mine", "", gradient=suppression(beneficial)).needs_text
        assert not Method("mine", "", gradient=suppression(lambda batch: batch.teacher_grad)).needs_text

    def test_methods_that_read_captions_refuse_and_the_sentence_names_those_that_do_not(
        self, clip: Clip, prepared: Prepared
    ) -> None:
        with pytest.raises(UserError, match=r"found dgs, leace\. .* run without: probe, lora, alignment_only") as error:
            require_text(["lora", "dgs", "leace"], "none")
        assert "dgs_plus" not in str(error.value).partition("run without:")[2]
        require_text(METHODS, "own")
        require_text(METHODS, "aligned")
        with pytest.raises(
            UserError, match=r"Expected methods that read no captions with model\.text: none, found dgs"
        ):
            trained("dgs", "none", clip, prepared)

    def test_the_others_learn_what_they_learn_with_text_bit_for_bit_and_have_no_text_head(
        self, clip: Clip, prepared: Prepared
    ) -> None:
        bare = dataclasses.replace(prepared, caption_embeddings=np.zeros((len(prepared.manifest), 0), np.float32))
        for method in ("probe", "distillation"):
            heads, adapters, log = trained(method, "none", clip, bare)
            own_heads, own_adapters, own_log = trained(method, "own", clip, prepared)
            assert set(heads) == set(own_heads) - {"text"}
            assert all(torch.equal(heads[name], own_heads[name]) for name in heads)
            assert all(torch.equal(*pair) for pair in zip(adapters, own_adapters, strict=True))
        assert log.losses["loss_text"].isna().all() and own_log.losses["loss_text"].notna().any()
        assert np.array_equal(log.losses["loss_task"], own_log.losses["loss_task"], equal_nan=True)
        assert (log.samples["harmful.harmful"] == 0).all(), "no direction is harmful"


def trained(method: str, side: str, clip: Clip, prepared: Prepared) -> tuple[dict[str, Tensor], list[Tensor], Any]:
    """Weights of the heads by name, those of the adapters, and the log."""
    params = validate(
        {
            "data": {"layout": "folders", "rho": None},
            "model": {"image_size": 32, "text": side, "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.5}},
            "train": {"batch_size": 8, "stage2": {"lr": 0.01}, "stage1": {"lr": 0.01}, "log_every": 1},
        }
    )
    kept: list[tuple[dict[str, Tensor], list[Tensor], Any]] = []

    def keep(trained: Trained) -> None:
        network = trained.classifier
        assert isinstance(network, ClipClassifier)
        heads = {name: head.weight.clone() for name, head in network.heads.items()}
        kept.append((heads, [p.detach().clone() for p in network.backbone.adapter_parameters()], trained.log))

    train(get_method(method), clip, prepared, params, 0, torch.device("cpu"), keep)
    return kept[0]


class TestMeasures:
    """A measure that a text side takes part in says which, and is absent without one."""

    @pytest.fixture
    def tower(self) -> Tower:
        rng = np.random.default_rng(0)
        shapes = ["disc", "box"] * 20
        rows = pd.DataFrame({"label": 0, "caption": shapes, "caption_source": "file", "shape": shapes})
        rows.loc[36:, "label"] = 1
        features = rng.normal(size=(40, 6))
        prompts = {"shape": (["disc", "box"], features[:2])}
        frozen = Tower(rows, features, prompts, 4, features, [])
        return dataclasses.replace(frozen, features=features + rng.normal(size=(40, 6)), untuned=frozen)

    @pytest.mark.parametrize(
        ("side", "expected"),
        [
            ("own", {"zero_shot:shape", "retrieval_at_1"}),
            ("aligned", {"zero_shot_aligned:shape", "retrieval_at_1_aligned"}),
            ("none", set()),
        ],
    )
    def test_its_name_says_so(self, tower: Tower, side: str, expected: set[str]) -> None:
        found = measure_all(dataclasses.replace(tower, text=side))
        assert {name for name in found if name.startswith(("zero_shot", "retrieval"))} == expected
        assert "linear_probe:shape" in found and "cka_to_frozen" in found, "these need no text"

    def test_in_words_labels_and_metrics(self, tower: Tower) -> None:
        def table(side: str) -> pd.DataFrame:
            found = measure_all(dataclasses.replace(tower, text=side))
            rows = [("lora", 0, name, *values) for name, values in found.items()]
            return pd.DataFrame(rows, columns=["method", "seed", "measure", "before", "after"])

        assert measure_words("zero_shot_aligned:shape") == "zero-shot shape, aligned text"
        assert measure_words("retrieval_at_1_aligned") == "caption retrieval at 1, aligned text"
        own, other, none = map(table, ("own", "aligned", "none"))
        assert (has_aligned_text(own), has_aligned_text(other), has_aligned_text(none)) == (False, True, False)
        named = own.replace({"linear_probe:shape": "linear_probe:face_aligned"})
        assert not has_aligned_text(named) and measure_words("zero_shot:face_aligned") == "zero-shot face aligned"
        assert label_of("zero_shot_kept", other) == "zero-shot kept, aligned text"
        assert label_of("zero_shot_kept", own) == label_of("zero_shot_kept", None) == "zero-shot kept"
        assert label_of("linear_probe_kept", other) == "linear probe kept"
        titles = [forgetting_measures(rows.assign(rho=0.9)).get_suptitle() for rows in (own, other)]
        assert titles[0].startswith("Zero-shot kept: ") and titles[1].startswith("Zero-shot kept, aligned text: ")
        made = {name: summary(detection(), rows, "mini", "d")["methods"]["lora"] for name, rows in
                {"own": own, "aligned": other, "none": none}.items()}  # fmt: skip
        for key in ("zero_shot_kept", "retrieval_kept"):
            assert made["own"][key] == made["aligned"][key] and made["own"][key]["mean"] > 0
            assert made["none"][key] is None
            assert key not in set(per_seed_values(detection(), none)["metric"])
        assert made["none"]["linear_probe_kept"] == made["own"]["linear_probe_kept"]


@pytest.mark.parametrize(("side", "expected"), [("own", "reweighted"), ("aligned", "reweighted, aligned text")])
def test_validation_reweighted_by_captions_says_whose_embeddings_they_have(
    prepared: Prepared, side: str, expected: str
) -> None:
    rows = prepared.split("val")
    scores = rows.assign(logit=np.linspace(-1, 1, len(rows)), method="lora", seed=0)
    of_side = dataclasses.replace(prepared, info={**prepared.info, "text": {"side": side}})
    found = final_validation(scores, of_side)
    assert found["images"].tolist() == ["as in training", expected]
    plain, weighed = found["n_effective"]
    assert 2 <= weighed <= plain == len(rows)


def detection() -> pd.DataFrame:
    """One run's row of a detection table, as far as a summary looks at it."""
    rates = dict.fromkeys(("acc", "balanced_acc", "r_acc", "f_acc", "ap", "auroc"), 0.5)
    where = {"rho": 0.9, "method": "lora", "seed": 0, "generator": "a", "seen": False, "condition": "native"}
    return pd.DataFrame([{**where, "applied_to": "both", "threshold_rule": "0.5", **rates}])


@pytest.mark.slow
def test_a_pipeline_without_text_leaves_out_what_needs_text(tmp_path: Path) -> None:
    repo = copy_repository(tmp_path, git=False)
    params = yaml.safe_load((repo / "params.yaml").read_text())
    params["methods"], params["model"]["text"] = ["lora"], "none"
    (repo / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in (["sources"], ["prepare"], ["train", "--method", "lora"], ["evaluate"], ["gradient_angles"]):
        done = run(repo, "dgs", "stage", *stage)
        assert done.returncode == 0, done.stderr
    results = repo / "results" / "mini"
    metrics = json.loads((results / "metrics.json").read_text())["methods"]["lora"]
    assert metrics["zero_shot_kept"] is None and metrics["linear_probe_kept"]["mean"] > 0
    report = (results / "REPORT.md").read_text()
    headline = next(line for line in report.splitlines() if line.startswith("| method | "))
    assert "zero-shot" not in headline and "| text side | Captions are not embedded. |" in report
    measures = set(pd.read_csv(results / "forgetting.csv")["measure"])
    assert not [name for name in measures if name.startswith(("zero_shot", "retrieval"))]
    angles = pd.read_csv(results / "gradient_angles.csv")
    assert set(angles["pair"]) == {"task-beneficial", "task-applied", "applied-beneficial"}
    assert pd.read_csv(results / "head_ranks.csv").empty
    assert (
        pd.read_csv(results / "gradient_batches.csv")[["removed", "conflict_harmful", "effective_rank"]]
        .isna()
        .all(None)
    )
