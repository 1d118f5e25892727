"""The embedded benchmark: what its folder promises, and what its recipe promises for any seed."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dgs.data.images import decode
from dgs.data.manifest import MINIBENCH_SPLITS, PROMPTS, content_hash, training_set
from dgs.data.tree import MINIBENCH
from dgs.errors import UserError
from dgs.model.clip import ConvStem, attach
from minibench import (
    build,
    camera,
    captions,
    clip,
    degradations,
    generators,
    pretrain,
    scenes,
    splits,
    train_generators,
)

SAMPLE = build.SHIPPED
SETS = sorted({training_set(rho, name) for rho in splits.RHOS for name in splits.SHORTCUTS})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with clip.one_thread():
        yield


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return dict(json.loads((SAMPLE / MINIBENCH).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {split: pd.read_parquet(SAMPLE / f"images-{split}.parquet") for split in MINIBENCH_SPLITS}


@pytest.fixture(scope="module")
def loaded() -> tuple[torch.nn.Module, dict[str, Any]]:
    return clip.load(SAMPLE / "clip")


def test_a_scene_is_a_pure_function_of_seed_split_and_index() -> None:
    first, second = camera.shoot(5, "train", 17), camera.shoot(5, "train", 17)
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])
    for other in ((6, "train", 17), (5, "val", 17), (5, "train", 18)):
        theirs = scenes.scene(*other)
        assert first[0].id != theirs.id
        assert (first[0].x, first[0].radius, first[0].texture_seed) != (theirs.x, theirs.radius, theirs.texture_seed)
    draws = {name: scenes.stream(5, "train", 17, name).random() for name in scenes.STREAMS}
    assert len(set(draws.values())) == len(scenes.STREAMS)  # the streams of a scene are independent


def test_attributes_are_uniform_and_every_value_occurs() -> None:
    found = pd.DataFrame([scenes.scene(1, "train", i).attributes._asdict() for i in range(2000)])
    for name, values in scenes.VOCABULARY.items():
        shares = found[name].value_counts(normalize=True)
        bound = 4.5 * math.sqrt((1 - 1 / len(values)) / len(values) / len(found))
        assert set(shares.index) == set(values) and (abs(shares - 1 / len(values)) < bound).all()


def test_photographs_do_not_depend_on_the_number_of_workers() -> None:
    alone = camera.photographs(2, "val", range(6))
    together = camera.photographs(2, "val", range(6), workers=2)
    assert alone[0] == together[0]
    assert np.array_equal(alone[1], together[1])


def test_demosaic_keeps_a_uniform_grey_and_interpolates_between_cells() -> None:
    assert np.allclose(camera.demosaic(np.full((8, 8), 0.3, np.float32)), 0.3)
    raw = np.zeros((8, 8), np.float32)
    raw[2, 2] = 1.0  # a red cell
    red = camera.demosaic(raw)[..., 0]
    assert red[2, 2] == 1 and red[2, 3] == 0.5 and red[3, 3] == 0.25 and red[2, 4] == 0


def test_camera_noise_is_that_of_its_electrons() -> None:
    flat = np.full((64, 64, 3), 0.25, np.float32)
    values = [camera.photograph(flat, np.random.default_rng(i)) for i in range(40)]
    linear = (np.stack(values)[:, 0::2, 0::2, 0] / 255.0) ** 2.2  # red cells: not interpolated
    worst = math.sqrt(0.25 * camera.EXPOSURE[1] / camera.ELECTRONS[0] + camera.READ_NOISE[1] ** 2)
    best = math.sqrt(0.25 * camera.EXPOSURE[0] / camera.ELECTRONS[1] + camera.READ_NOISE[0] ** 2)
    noise = linear.std((1, 2))
    assert best * 0.9 < noise.min() and noise.max() < worst * 1.1


def test_a_caption_names_what_it_is_told_and_nothing_else_and_fits_the_context() -> None:
    tokenize = open_clip.SimpleTokenizer(context_length=77)
    for i in range(300):
        known = scenes.scene(0, "train", i).attributes
        text = captions.caption(known, scenes.stream(0, "train", i, "caption"), medium=captions.MEDIA[i % 6])
        for value in (*known, captions.MEDIA[i % 6]):
            assert any(word in text for word in captions.words(value)), (value, text)
        assert int((tokenize([text]) != 0).sum()) <= clip.MODEL["text_cfg"]["context_length"]
    known = scenes.Attributes("heart", "cyan", "brick", "top", "large")
    text = captions.caption(known, np.random.default_rng(0), told=["colour"])
    assert "cyan" in text
    assert not any(word in text for value in ("heart", "brick", "top", "large") for word in captions.words(value))


def test_prompts_cover_the_vocabulary_without_overlap() -> None:
    for attribute in captions.ATTRIBUTES:
        prompts = captions.prompts(attribute)
        assert tuple(prompts) == (captions.MEDIA if attribute == "medium" else scenes.VOCABULARY[attribute])
        texts = [text for some in prompts.values() for text in some]
        assert len(set(texts)) == len(texts)
    with pytest.raises(ValueError, match="attribute should be one of"):
        captions.prompts("weight")


def planned(rows: list[splits.Row], seed: int = 3) -> pd.DataFrame:
    """The rows of a split with what their scenes show; label 1 is fake."""
    shown = [scenes.scene(seed, row.split, row.index).attributes._asdict() for row in rows]
    return pd.DataFrame(shown).assign(
        index=[row.index for row in rows], maker=[row.generator for row in rows], sets=[row.sets for row in rows],
        label=[int(row.generator != splits.REAL) for row in rows],
    )  # fmt: skip


@pytest.mark.parametrize("rho", [0.5, 0.75, 0.9])
def test_labels_follow_the_dial_of_each_shortcut(rho: float) -> None:
    everything = planned(splits.biased(3, "train", 3000, [rho]))
    for name, shortcut in splits.SHORTCUTS.items():
        rows = everything[[training_set(rho, name) in sets for sets in everything["sets"]]]
        assert sorted(rows["index"]) == list(range(3000))  # one image a scene
        assert len(shortcut.fake) == len(shortcut.real)
        assert {*shortcut.fake, *shortcut.real} == set(scenes.VOCABULARY[shortcut.attribute])
        for value, some in rows.groupby(shortcut.attribute):
            expected = rho if value in shortcut.fake else 1 - rho
            assert abs(some["label"].mean() - expected) < 4.5 * math.sqrt(expected * (1 - expected) / len(some))
        other = splits.SHORTCUTS["object" if name == "background" else "background"]
        assert abs(rows["label"].corr(rows[other.attribute].isin(other.fake))) < 4 / math.sqrt(3000)


def test_the_training_sets_share_scenes() -> None:
    rows = splits.biased(3, "train", 1000, splits.RHOS)
    assert abs(len(rows) / 1000 - 1.6) < 4 * math.sqrt(0.24 / 1000)
    for name in SETS:
        assert sorted(row.index for row in rows if name in row.sets) == list(range(1000))


def test_unbiased_validation_has_no_shortcut_and_scenes_of_its_own() -> None:
    rows = planned(splits.unbiased(3, "val_unbiased", 2000))
    for shortcut in splits.SHORTCUTS.values():
        assert abs(rows["label"].corr(rows[shortcut.attribute].isin(shortcut.fake))) < 4 / math.sqrt(2000)
    ids = [{scenes.scene(3, split, i).id for i in range(9)} for split in ("val_unbiased", "val")]
    assert not ids[0] & ids[1]


def test_every_maker_of_a_test_set_shows_the_same_things_in_scenes_of_its_own() -> None:
    rows = planned(splits.test(7))
    assert rows["index"].is_unique and len(rows) == 7 * (1 + len(generators.NAMES))
    shown = [some[list(scenes.VOCABULARY)].to_numpy().tolist() for _, some in rows.groupby("maker")]
    assert all(things == shown[0] for things in shown) and len({tuple(thing) for thing in shown[0]}) > 1
    mine, other = scenes.scene(3, "test", 0), scenes.scene(3, "test", 1)
    assert mine.attributes == other.attributes
    assert (mine.x, mine.radius, mine.texture_seed) != (other.x, other.radius, other.texture_seed)


def test_captions_of_a_shipped_test_set_tell_exactly_nothing(tables: dict[str, pd.DataFrame]) -> None:
    captions = tables["test"].groupby("generator")["caption"].apply(list)
    assert all(some == captions[splits.REAL] for some in captions)


def test_sample_matches_its_content_hash_and_counts(tables: dict[str, pd.DataFrame], meta: dict[str, Any]) -> None:
    images = pd.concat(tables.values())
    hashed = images.assign(sha256=images.image.map(lambda data: hashlib.sha256(data).hexdigest()))
    assert content_hash(hashed) == meta["content_hash"]
    for split, table in tables.items():
        assert table.generator.value_counts().to_dict() == meta["counts"][split]
    assert set(meta["counts"]["test"]) == {splits.REAL, *generators.NAMES}
    assert min(meta["counts"]["test"].values()) >= 400


def test_sample_splits_share_no_scene_and_no_image(tables: dict[str, pd.DataFrame]) -> None:
    everything = pd.concat(tables.values())
    assert everything.id.is_unique and everything.image.is_unique
    assert (everything.groupby("scene").split.nunique() == 1).all()
    for split in ("train", "val"):  # no scene is both real and fake within a set
        for name in SETS:
            some = tables[split][tables[split][name]]
            assert some.scene.is_unique
            assert set(some.scene) == set(tables[split].scene)
    assert tables["test"].scene.is_unique
    assert tables["val_unbiased"].scene.is_unique


def test_sample_labels_follow_the_dial(tables: dict[str, pd.DataFrame], meta: dict[str, Any]) -> None:
    def close(labels: pd.Series, expected: float) -> bool:
        return bool(abs(labels.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / len(labels)))

    test = tables["test"]
    neutral = [test[test.generator.isin([splits.REAL, name])] for name in generators.NAMES] + [tables["val_unbiased"]]
    for name, shortcut in meta["shortcuts"].items():
        for rho in meta["rhos"]:
            for split in ("train", "val"):
                some = tables[split][tables[split][training_set(rho, name)]]
                group = some[shortcut["attribute"]].isin(shortcut["fake_with_rho"])
                assert close(some.label[group], rho) and close(some.label[~group], 1 - rho)
        for some in neutral:
            group = some[shortcut["attribute"]].isin(shortcut["fake_with_rho"])
            assert close(some.label[group], 0.5) and close(some.label[~group], 0.5)


def test_training_fakes_are_shared_evenly_by_the_seen_generators(tables: dict[str, pd.DataFrame]) -> None:
    for split in ("train", "val", "val_unbiased"):
        fakes = tables[split][tables[split].label == 1]
        assert set(fakes.generator) == set(generators.SEEN)
        for group in (True, False):
            some = fakes[fakes.background.isin(splits.SHORTCUTS["background"].fake) == group]
            assert abs((some.generator == generators.SEEN[0]).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(some))


def _format(data: bytes) -> tuple[Any, ...]:
    image = Image.open(io.BytesIO(data))
    tables = tuple(tuple(table) for _, table in sorted(image.quantization.items()))  # type: ignore[attr-defined]
    return image.format, image.size, image.mode, tuple(sorted(image.info)), tables


def test_file_format_carries_no_label(tables: dict[str, pd.DataFrame]) -> None:
    train = tables["train"][tables["train"]["rho_0.50"]]
    for table in (train, tables["test"]):
        formats = table.image.map(_format)
        assert formats.map(lambda f: f[:4]).nunique() == 1
        quality = formats.map(lambda f: f[4])
        kinds = sorted(quality.unique())
        assert len(kinds) == degradations.QUALITY[1] - degradations.QUALITY[0] + 1
        share = [[(quality[table.label == label] == kind).sum() for kind in kinds] for label in (0, 1)]
        observed = np.array(share, float)
        expected = observed.sum(0) * observed.sum(1, keepdims=True) / observed.sum()
        chi2 = ((observed - expected) ** 2 / expected).sum()
        assert chi2 < 30  # 7 degrees of freedom: p < 1e-4


def test_both_versions_of_a_training_scene_have_one_caption_and_one_quality(tables: dict[str, pd.DataFrame]) -> None:
    pairs = tables["train"][tables["train"].scene.duplicated(keep=False)].groupby("scene")
    assert len(pairs) > 1000
    for _, pair in pairs:
        assert sorted(pair.label) == [0, 1]
        assert pair.caption.nunique() == 1
        assert pair.image.map(lambda data: _format(data)[4]).nunique() == 1


def test_sample_is_small() -> None:
    size = sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file())
    assert size <= 40 * 2**20
    assert sum(path.stat().st_size for path in (SAMPLE / "clip").iterdir()) <= 10 * 2**20


def test_a_folded_stem_equals_the_batch_norm_stem() -> None:
    torch.manual_seed(0)
    stem = ConvStem([8, 12, 16], norm=True)
    for _ in range(5):  # running statistics of its own
        stem(torch.randn(8, 3, 64, 64) * 2 + 1)
    for norm in stem.norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -1, 1)
    folded = stem.eval().fold()
    images = torch.randn(4, 3, 64, 64)
    assert torch.allclose(folded(images), stem(images), rtol=0, atol=1e-5)
    assert torch.equal(folded.train()(images), folded.eval()(images))  # nothing for train() to change
    assert not list(folded.buffers())


def test_attach_leaves_other_models_alone_and_refuses_unknown_stems() -> None:
    model = clip.create()
    before = model.visual.conv1
    attach(model, {"model_cfg": {}})
    assert model.visual.conv1 is before
    with pytest.raises(ValueError, match="conv3"):
        attach(model, {"dgs": {"stem": "conv5"}})


def test_shipped_clip_names_what_test_photographs_show(
    loaded: tuple[torch.nn.Module, dict[str, Any]], tables: dict[str, pd.DataFrame]
) -> None:
    model, preprocess = loaded
    reals = tables["test"][tables["test"].generator == splits.REAL]
    embedded = clip.embed_images(model, np.stack([degradations.decode(data) for data in reals.image]), preprocess)
    bars = {"colour": 0.98, "background": 0.98, "shape": 0.97, "position": 0.97, "size": 0.98}
    for attribute, bar in bars.items():
        assert clip.zero_shot(model, embedded, reals[attribute].tolist(), attribute) >= bar, attribute
    attributes = [scenes.Attributes(*row) for row in reals[list(scenes.VOCABULARY)].itertuples(index=False)]
    assert clip.recall(model, embedded, attributes, reals.caption.tolist()) >= 0.97


def test_shipped_clip_names_the_medium(loaded: tuple[torch.nn.Module, dict[str, Any]]) -> None:
    model, preprocess = loaded
    chosen = [captions.MEDIA[i % 6] for i in range(180)]
    images = [
        degradations.degrade(camera.shoot(9, "clip-val", i)[1], medium, np.random.default_rng(i))
        for i, medium in enumerate(chosen)
    ]
    assert clip.zero_shot(model, clip.embed_images(model, np.stack(images), preprocess), chosen, "medium") >= 0.92


def test_matches_are_the_captions_that_are_true() -> None:
    codes = np.array([[0, 1], [0, 2], [3, 1]])
    told = np.array([[True, True], [True, False], [False, True]])
    expected = [[True, True, True], [False, True, False], [False, False, True]]
    assert pretrain.matches(codes, told).tolist() == expected


def test_contrast_is_least_at_the_truth() -> None:
    positive = torch.tensor([[True, False, False], [False, True, True], [False, True, True]])
    right, wrong = 20.0 * positive.float(), 20.0 * (~positive).float()
    by_hand = 2 / 3 * math.log(2)  # two of three rows choose evenly between two
    assert abs(float(pretrain.contrast(right, positive)) - by_hand) < 1e-3
    assert float(pretrain.contrast(wrong, positive)) > 10


TINY_CLIP = pretrain.Recipe(scenes=16, held_out=12, samples=24, second_samples=16, batch=8, warmup=2, measure_every=2)


def test_sinusoids_leave_the_class_token_and_tell_every_place_apart() -> None:
    positions = torch.zeros(65, 96)
    pretrain.add_sinusoids(positions, 0.5, seed=0)
    assert not positions[0].any()
    assert abs(float(positions[1:].std()) - 0.5) < 0.1
    distance = torch.cdist(positions[1:], positions[1:]) + 1e3 * torch.eye(64)
    assert float(distance.min()) > 1


@pytest.fixture(scope="module")
def whole_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that was pre-trained without a break."""
    folder = tmp_path_factory.mktemp("clip")
    with clip.one_thread():
        pretrain.pretrain(folder / "out", TINY_CLIP, folder / "scratch", progress=False)
    return folder / "out"


def test_early_exports_are_what_training_passed_through_and_it_ends_at_the_last(
    whole_clip: Path, tmp_path: Path
) -> None:
    early = {n: tmp_path / str(n) for n in (0, 16, 40)}
    with clip.one_thread():
        pretrain.pretrain(None, TINY_CLIP, tmp_path / "scratch", progress=False, early={16: early[16]})
        steps = torch.load(tmp_path / "scratch/checkpoint.pt", weights_only=True)["step"]
        pretrain.pretrain(None, TINY_CLIP, tmp_path / "scratch", progress=False, early=early)
    assert steps == 2 and not (tmp_path / "out").exists()
    weights = {n: load_file(folder / clip.WEIGHTS)["visual.proj"] for n, folder in early.items()}
    whole = load_file(whole_clip / clip.WEIGHTS)["visual.proj"]
    assert torch.equal(weights[40], whole) and not torch.equal(weights[16], whole)
    torch.manual_seed(TINY_CLIP.seed)
    assert torch.equal(weights[0], clip.create(norm=True).visual.proj.half()), "untouched"
    with pytest.raises(ValueError, match=r"multiples of 16 samples, found \[17\]"):
        pretrain.pretrain(None, TINY_CLIP, tmp_path / "scratch", progress=False, early={24: tmp_path, 17: tmp_path})
    with pytest.raises(UserError, match=r"not yet past 32 samples, found one at 40\. Remove .*scratch to start anew"):
        pretrain.pretrain(None, TINY_CLIP, tmp_path / "scratch", progress=False, early={32: tmp_path / "32"})


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """break_at(n) interrupts pre-training when it draws its n-th batch, once; gives the list of steps drawn."""

    def arm(number: int) -> list[int]:
        plain, steps = pretrain.draw, []

        def broken(*args: Any) -> pretrain.Batch:
            steps.append(args[-1])
            if len(steps) == number:
                raise KeyboardInterrupt
            return plain(*args)

        monkeypatch.setattr(pretrain, "draw", broken)
        return steps

    return arm


@pytest.fixture(scope="module")
def resynthesised() -> dict[str, Any]:
    found, wide = camera.photographs(3, "val", range(12), camera.MARGIN)
    models = generators.load(SAMPLE / build.WEIGHTS)
    noise = {name: [scenes.stream(3, "val", i, "generator") for i in range(12)] for name in models}
    made = {name: generators.synthesise(model, wide, found, noise[name]) for name, model in models.items()}
    return {"images": camera.crop(wide), "wide": wide, "found": found, "made": made}


def test_a_generator_changes_pixels_and_keeps_content_and_differs_from_the_others(
    resynthesised: dict[str, Any],
) -> None:
    made = resynthesised["made"]
    assert tuple(made) == generators.NAMES
    for name, images in made.items():
        # From noise, even a perfect generator draws other grain, and an exposure of its own.
        least = 18 if name == "layout_diffusion" else 26
        assert least < train_generators.psnr(resynthesised["images"], images) < 45, name
    for first, second in combinations(made.values(), 2):
        assert train_generators.psnr(first, second) < 45


def test_a_splice_leaves_the_far_background_untouched(resynthesised: dict[str, Any]) -> None:
    for s, before, after in zip(
        resynthesised["found"], resynthesised["images"], resynthesised["made"]["splice"], strict=True
    ):
        far = scenes.mask(s, grow=0.3) == 0
        assert np.array_equal(before[far], after[far])
        assert not np.array_equal(before[~far], after[~far])


def test_noise_is_drawn_per_image_whatever_the_batch(resynthesised: dict[str, Any]) -> None:
    model = generators.load(SAMPLE / build.WEIGHTS)["diffusion"]
    noise = [scenes.stream(3, "val", i, "generator") for i in range(12)]
    args = (resynthesised["wide"], resynthesised["found"], noise)
    small = generators.synthesise(model, *args, batch=5)
    difference = np.abs(small.astype(int) - resynthesised["made"]["diffusion"])
    assert difference.max() <= 1  # sums are ordered differently: the last bit may round the other way


TINY = splits.Sizes(train=8, val=4, val_unbiased=4, test=2)


def built(out: Path, seed: int = 7, **options: Any) -> dict[str, Any]:
    return build.build(out, seed, sizes=TINY, progress=False, **options)


def _images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("images-*.parquet"))}


def test_a_build_is_a_function_of_its_seed(tmp_path: Path) -> None:
    first = built(tmp_path / "a", 7)
    again = built(tmp_path / "b", 7)
    other = built(tmp_path / "c", 8)
    assert first == again and _images(tmp_path / "a") == _images(tmp_path / "b")
    assert other["content_hash"] != first["content_hash"]
    tables = [pd.concat([pd.read_parquet(p) for p in (tmp_path / n).glob("images-*")]) for n in "ac"]
    assert not set(tables[0].scene) & set(tables[1].scene)
    assert not set(tables[0].image) & set(tables[1].image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no leftovers
    assert (tmp_path / "a" / PROMPTS).read_bytes() == (SAMPLE / PROMPTS).read_bytes()  # values in one order, too
    assert (tmp_path / "a" / "clip" / clip.WEIGHTS).read_bytes() == (SAMPLE / "clip" / clip.WEIGHTS).read_bytes()


def test_one_rho_makes_one_set_a_shortcut(tmp_path: Path) -> None:
    meta = built(tmp_path / "out", 7, rho=0.8)
    train = pd.read_parquet(tmp_path / "out" / "images-train.parquet")
    assert meta["rhos"] == [0.8]
    for name in splits.SHORTCUTS:
        assert train[training_set(0.8, name)].sum() == TINY.train


def test_a_fresh_test_set_for_the_shipped_training_sets(tmp_path: Path) -> None:
    whole = built(tmp_path / "whole", 7)
    fresh = built(tmp_path / "fresh", 9, training="shipped", shipped=tmp_path / "whole")
    assert fresh["content_hash"] != whole["content_hash"] and fresh["training_seed"] == 7
    before, after = _images(tmp_path / "whole"), _images(tmp_path / "fresh")
    assert [name for name in before if before[name] != after[name]] == ["images-test.parquet"]
    scenes_of = [set(pd.read_parquet(tmp_path / n / "images-test.parquet").scene) for n in ("whole", "fresh")]
    assert not scenes_of[0] & scenes_of[1]


@pytest.mark.parametrize(
    ("broken_at", "drawn"),  # steps are measured, and kept, in pairs and at the end of a cosine
    [(3, [0, 1, 2, 2, 3, 4]), (4, [0, 1, 2, 3, 3, 4])],  # within the first cosine, and at the start of the second
)
def test_a_broken_pretraining_goes_on_where_it_stopped_to_the_same_weights(
    tmp_path: Path, break_at: Callable[[int], list[int]], whole_clip: Path, broken_at: int, drawn: list[int]
) -> None:
    steps = break_at(broken_at)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "out", clip="train", clip_recipe=TINY_CLIP)
    assert [path.name for path in tmp_path.iterdir()] == [".out-pretraining"]
    built(tmp_path / "out", clip="train", clip_recipe=TINY_CLIP)
    assert steps == drawn
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = tmp_path / "out" / "clip"
    assert (made / clip.WEIGHTS).read_bytes() == (whole_clip / clip.WEIGHTS).read_bytes()
    assert pd.read_csv(made / "curve.csv").samples.tolist() == [16, 24, 32, 40]
    clip.load(made)


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(build, "write", full)
    with pytest.raises(OSError, match="No space"):
        built(tmp_path / "out", 7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "options", "sentence"),
    [
        (".", {}, "should not exist yet"),
        ("mine/out", {}, r"Cannot make .*mine/out \(.*\)\. Choose another --out"),
        ("out", {"rho": 1.5}, "probability"),
        ("out", {"shipped": Path("absent")}, "to reuse"),
        ("out", {"seed": 2, "training": "shipped"}, "would not be fresh"),
        ("out", {"rho": 0.8, "training": "shipped"}, "have their own rho"),
    ],
)
def test_build_refuses_to_overwrite_and_to_guess(
    out: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        built(tmp_path / out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_everything_can_be_trained_from_nothing(tmp_path: Path) -> None:
    steps = dict.fromkeys(generators.NAMES, 3)
    meta = build.build(
        tmp_path / "out",
        7,
        clip="train",
        weights="train",
        shipped=tmp_path / "absent",
        sizes=TINY,
        clip_recipe=TINY_CLIP,
        generator_recipe=train_generators.Recipe(scenes=16, held_out=4, steps=steps),
        progress=False,
    )
    assert meta["clip"]["samples"] == TINY_CLIP.samples
    assert set(meta["generators"]["psnr"]) == set(generators.NAMES)
    clip.load(tmp_path / "out" / "clip")


@pytest.mark.slow
def test_the_shipped_images_are_those_of_their_seed(tmp_path: Path, meta: dict[str, Any]) -> None:
    """Weights are shipped, so every photograph can be checked: on another processor a few differ in rounding."""
    tables = pd.read_parquet(SAMPLE / "images-val.parquet")
    total = others = 0
    for row in tables[tables.generator == splits.REAL].itertuples():
        index = int(row.scene.split("-")[-1])
        image = camera.crop(camera.shoot(meta["seed"], "val", index, camera.MARGIN)[1])
        quality = degradations.draw_quality(scenes.stream(meta["seed"], "val", index, "jpeg"))
        made = degradations.encode(image, quality)
        total += 1
        if made != row.image:
            others += 1
            apart = np.abs(decode(made).astype(int) - decode(row.image).astype(int))
            assert apart.max() <= 4 and (apart > 0).mean() < 0.02
    assert others <= 0.05 * total
