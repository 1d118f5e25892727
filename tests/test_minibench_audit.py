"""The audit of a benchmark folder: controls find what is planted, and nothing where nothing is."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dgs.data import manifest
from dgs.errors import UserError
from dgs.model.pixel_cnn import PixelCNN
from minibench import audit, build, camera, captions, clip, contact_sheets, near_duplicates, scenes, trivial_detectors
from minibench.audit_report import markdown
from minibench.degradations import decode, draw_quality, encode
from minibench.splits import REAL
from minibench.trivial_detectors import Samples

Bytes = NDArray[np.uint8]
Maker = Callable[[Bytes], Bytes]
Draw = Callable[[int, int], int]
Shot = dict[str, tuple[list[scenes.Scene], Bytes]]  # scenes and photographs by split

SEED = 41
COUNT = {"train": 120, "val": 24, "test": 100}
GENERATOR = "deconv_gan"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with clip.one_thread():
        yield


@pytest.fixture(scope="module")
def shot() -> Shot:
    step = {"test": scenes.FAMILY}  # one scene a family: attributes of their own
    wide = {
        split: camera.photographs(SEED, split, range(0, count * step.get(split, 1), step.get(split, 1)), camera.MARGIN)
        for split, count in COUNT.items()
    }
    return {split: (found, camera.crop(images)) for split, (found, images) in wide.items()}


@pytest.fixture(scope="module")
def photographs(shot: Shot) -> dict[str, Samples]:
    """The same photographs as "real" and "fake" by a coin: nothing to find."""
    return pair(shot)


def blurred(image: Bytes) -> Bytes:
    return np.rint(camera.blur(image.astype(np.float32), 1.5)).astype(np.uint8)


def darkened(image: Bytes) -> Bytes:
    return (image * 0.4).astype(np.uint8)


def flattened(image: Bytes) -> Bytes:
    grey = image.mean((0, 1))
    return np.rint(grey + 0.2 * (image - grey)).astype(np.uint8)


def framed(image: Bytes) -> Bytes:
    made = image.astype(np.int64)
    made[[0, -1]] -= 12
    made[:, [0, -1]] -= 12
    return np.clip(made, 0, 255).astype(np.uint8)


def table(
    split: str,
    shot: tuple[list[scenes.Scene], Bytes],
    fake: Maker | None = None,
    quality: Draw | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A pack with labels by a coin: fakes are `fake(photograph)`, saved at quality(label, index)."""
    rng = np.random.default_rng([seed, len(split)])
    rows: list[dict[str, Any]] = []
    for i, (scene, image) in enumerate(zip(*shot, strict=True)):
        label = int(rng.random() < 0.5)
        attributes = scene.attributes
        made = fake(image) if label and fake else image
        drawn = draw_quality(rng)
        rows.append(
            {
                "id": f"{split}-{i:06d}",
                "scene": scene.id,
                "split": split,
                "generator": GENERATOR if label else REAL,
                "label": label,
                "caption": captions.caption(attributes, rng),
                **attributes._asdict(),
                "image": encode(made, quality(label, drawn) if quality else drawn),
            }
        )
    return pd.DataFrame(rows)


def pair(shot: Shot, **kind: Any) -> dict[str, Samples]:
    return {split: trivial_detectors.samples(table(split, shot[split], **kind)) for split in ("train", "test")}


def accuracy(detector: str, packs: dict[str, Samples]) -> float:
    return judged(trivial_detectors.DETECTORS[detector], packs)


def judged(detector: trivial_detectors.Detector, packs: dict[str, Samples]) -> float:
    return float(trivial_detectors.judge(detector, packs["train"], {}, packs["test"])["test_mean"]["mean"])


def chance(packs: dict[str, Samples]) -> float:
    """How far from a half a detector that knows nothing comes once in 15,000 times."""
    labels = packs["test"].labels
    return 4 * 0.25 * math.sqrt(1 / (labels == 0).sum() + 1 / (labels == 1).sum())


@pytest.mark.parametrize(
    ("fake", "finder"),
    [(darkened, "mean_colour"), (flattened, "colour_spread"), (framed, "border"), (blurred, "high_frequency")],
)
def test_what_is_planted_in_the_pixels_is_found(fake: Maker, finder: str, shot: Shot) -> None:
    packs = pair(shot, fake=fake)
    assert accuracy(finder, packs) > 0.93
    assert abs(accuracy("caption_only", packs) - 0.5) < chance(packs)


def test_a_tiny_network_finds_a_blur_for_itself(shot: Shot) -> None:
    packs = pair(shot, fake=blurred)

    def longer(train: Samples, seed: int) -> trivial_detectors.Scorer:
        return trivial_detectors.tiny_cnn(
            train, seed, epochs=12, batch=16
        )  # the set is small: as many steps as one needs

    assert judged(longer, packs) > 0.93


def test_a_lower_quality_of_fakes_is_found_in_the_file_and_not_in_its_colour(shot: Shot) -> None:
    packs = pair(shot, quality=lambda label, drawn: drawn - 20 * label)
    assert accuracy("jpeg_quality", packs) == 1
    assert accuracy("file_size", packs) > 0.85
    assert abs(accuracy("mean_colour", packs) - 0.5) < chance(packs)


@pytest.mark.parametrize("detector", [name for name in trivial_detectors.DETECTORS if name != "probe"])
def test_nothing_is_found_where_labels_are_a_coin(detector: str, photographs: dict[str, Samples]) -> None:
    assert abs(accuracy(detector, photographs) - 0.5) < chance(photographs)


def test_captions_reach_rho_where_they_say_the_background(shot: Shot) -> None:
    rho = 0.9
    packs = {split: some.table.copy() for split, some in pair(shot).items()}
    for split, some in packs.items():
        rng = np.random.default_rng(len(split))
        group = some["background"].isin(["striped", "dotted", "cloudy"])
        some["label"] = (rng.random(len(some)) < np.where(group, rho, 1 - rho)).astype(int)
        some["generator"] = np.where(some["label"] == 1, GENERATOR, REAL)
    biased = {split: trivial_detectors.samples(some) for split, some in packs.items()}
    reached = accuracy("caption_only", biased)
    assert abs(reached - rho) < 4 * math.sqrt(rho * (1 - rho) / COUNT["test"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_one_class_judge_nothing(photographs: dict[str, Samples], split: str) -> None:
    some = photographs[split]
    packs = {**photographs, split: some.where(some.labels == 0)}
    with pytest.raises(
        UserError, match=rf"real and fake images in {split}, found one class\. Build a larger benchmark"
    ):
        accuracy("mean_colour", packs)


def test_the_probe_reads_features_alone(photographs: dict[str, Samples]) -> None:
    with pytest.raises(UserError, match="Expected frozen features"):
        accuracy("probe", photographs)
    told = {
        split: Samples(some.table, np.zeros_like(some.images), some.labels[:, None].astype(np.float32))
        for split, some in photographs.items()
    }
    assert accuracy("probe", told) == 1


def test_standardisation_and_words_are_those_of_the_training_set(photographs: dict[str, Samples]) -> None:
    train, test = photographs["train"].where(np.arange(COUNT["train"]) < 40), photographs["test"]
    brighter = Samples(test.table.assign(caption="unheard words"), test.images // 4, test.features)
    for detector in ("mean_colour", "caption_only", "tiny_cnn"):
        score = trivial_detectors.DETECTORS[detector](train, 0)
        alone = np.concatenate([score(brighter.where(np.arange(len(test)) == i)) for i in range(3)])
        assert np.allclose(alone, score(brighter)[:3], atol=1e-4), detector


def test_a_tiny_network_repeats_with_its_seed_and_leaves_the_global_generator_alone(
    photographs: dict[str, Samples],
) -> None:
    few = photographs["train"].where(np.arange(COUNT["train"]) < 40)
    state = torch.get_rng_state()
    first, again, other = (trivial_detectors.tiny_cnn(few, seed, epochs=1)(few) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 15_000 < sum(p.numel() for p in PixelCNN().parameters()) < 25_000


def test_the_quality_of_a_file_is_the_one_it_was_saved_at_and_only_jpeg_files_have_one(
    photographs: dict[str, Samples],
) -> None:
    some = photographs["test"].where(np.arange(COUNT["test"]) < 4)
    qualities = (40, 75, 90, 97)
    files = [encode(image, quality) for image, quality in zip(some.images, qualities, strict=True)]
    found = trivial_detectors.jpeg_quality(trivial_detectors.samples(some.table.assign(image=files)))
    assert found[:, 0].tolist() == list(qualities)
    buffer = io.BytesIO()
    Image.fromarray(some.images[0]).save(buffer, "PNG")
    with pytest.raises(UserError, match="found PNG"):
        trivial_detectors.jpeg_quality(trivial_detectors.samples(some.table.head(1).assign(image=[buffer.getvalue()])))


def test_bootstrap_intervals_have_the_width_of_their_images() -> None:
    count, share = 400, 0.7
    right = np.arange(count) < share * count
    rows = pd.DataFrame({"generator": np.repeat([REAL, "one", "two"], count), "label": np.repeat([0, 1, 1], count)})
    logits = np.concatenate([np.where(right, -1.0, 1.0), *[np.where(right, 1.0, -1.0)] * 2])
    generators, mean = trivial_detectors.by_generator(rows, logits)
    # the reals are shared: they do not average out
    for interval, images in ((generators["one"], 2), (generators["two"], 2), (mean, 1.5)):
        assert interval.mean == pytest.approx(share)
        width = 2 * 1.96 * math.sqrt(images * share * (1 - share) / count) / 2
        assert interval.high - interval.low == pytest.approx(width, rel=0.05)


def with_features(some: Samples) -> Samples:
    flat = some.images.reshape(len(some), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return Samples(some.table, some.images, flat / np.linalg.norm(flat, axis=1, keepdims=True))


@pytest.fixture
def twins(shot: Shot) -> Samples:
    """40 training scenes, each as a photograph and blurred."""
    some = (shot["train"][0][:40], shot["train"][1][:40])
    rows = table("train", some)
    real = rows.assign(label=0, generator=REAL)
    fake = rows.assign(
        id=rows["id"] + "-fake", label=1, generator=GENERATOR, image=[encode(blurred(image), 92) for image in some[1]]
    )
    return with_features(trivial_detectors.samples(pd.concat([real, fake], ignore_index=True)))


def test_twins_within_training_are_what_a_duplicate_looks_like_and_are_not_counted(
    twins: Samples, photographs: dict[str, Samples]
) -> None:
    found = near_duplicates.near_duplicates(twins, with_features(photographs["test"]))
    assert found["twins"]["pairs"] == 40
    assert found["pairs_above"] == {"psnr": 0, "cosine": 0, "both": 0}
    assert found["nearest"]["psnr"]["max"] < found["twins"]["psnr"]["min"]


def test_a_training_image_saved_anew_in_test_is_found(twins: Samples, photographs: dict[str, Samples]) -> None:
    test = photographs["test"].table.copy()
    test.at[7, "image"] = encode(twins.images[11], 95)
    found = near_duplicates.near_duplicates(twins, with_features(trivial_detectors.samples(test)))
    assert found["closest"]["query"] == test.at[7, "id"]
    assert found["closest"]["training"] == twins.table.at[11, "id"]
    assert found["nearest"]["psnr"]["max"] == found["closest"]["psnr"] > found["limits"]["psnr"]
    assert 1 <= found["pairs_above"]["both"] <= 2  # the image, and its twin if that is near enough


def test_the_nearest_image_is_that_of_plain_arithmetic_whatever_the_blocks(
    twins: Samples, photographs: dict[str, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = with_features(photographs["test"])
    apart = ((test.images[:, None].astype(np.float32) - twins.images[None]) ** 2).mean((2, 3, 4))
    nearest = 10 * np.log10(255**2 / apart.min(1))
    whole = near_duplicates.near_duplicates(twins, test)
    monkeypatch.setattr(near_duplicates, "BLOCK", 17)
    parts = near_duplicates.near_duplicates(twins, test)
    for found in (whole, parts):
        assert found["nearest"]["psnr"]["max"] == pytest.approx(nearest.max(), abs=1e-3)
        assert found["nearest"]["psnr"]["q50"] == pytest.approx(np.median(nearest), abs=1e-3)
    assert whole["closest"]["training"] == parts["closest"]["training"]


def test_without_twins_nothing_is_called_a_duplicate(photographs: dict[str, Samples]) -> None:
    train, test = (with_features(photographs[split]) for split in ("train", "test"))
    found = near_duplicates.near_duplicates(train, test)
    assert found["twins"] == {"pairs": 0, "psnr": None, "cosine": None}
    assert found["limits"] is None and found["pairs_above"] is None


def test_a_file_in_two_packs_is_told_from_a_file_twice_in_one() -> None:
    packs = {"train": pd.DataFrame({"image": [b"a", b"b", b"b"]}), "test": pd.DataFrame({"image": [b"a", b"c"]})}
    assert audit.identical_files(packs) == {"identical_files": {"all": 2, "across_packs": 1}}


def test_statistics_point_at_what_was_planted_and_say_how_many_tests_there_were(shot: Shot) -> None:
    packs = pair(shot, fake=darkened, quality=lambda label, drawn: drawn - 3 * label)
    packs["train"].table["rho_0.50"] = True
    found = audit.statistics(packs, "rho_0.50")
    assert found["tests"] == sum(len(rows) for rows in found["compared"].values())
    for rows in found["compared"].values():
        found_by = {name for name, row in rows.items() if row["p"] * found["tests"] < 0.05}
        assert {"mean_red", "mean_green", "mean_blue", "jpeg_quality"} <= found_by
        assert not found_by & set(scenes.VOCABULARY)
        assert rows["mean_red"]["difference"] < -1
        assert rows["jpeg_quality"]["fake"] == pytest.approx(rows["jpeg_quality"]["real"] - 3, abs=1)


def test_chi_square_by_hand() -> None:
    fake = np.repeat([False, True], 50)
    same = np.tile(np.repeat(["a", "b"], 25), 2)
    assert audit.chi_square(same, fake) == pytest.approx(1)
    assert audit.chi_square(np.where(fake, "a", "b"), fake) < 1e-20
    assert audit.chi_square(np.repeat("a", 100), fake) == 1


@pytest.fixture(scope="module")
def folder(shot: Shot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small benchmark of blurred fakes: two training sets, a pack with sets, a pack without, a test of two makers."""
    root = tmp_path_factory.mktemp("benchmark")
    shutil.copytree(build.SHIPPED / "clip", root / "clip")
    packs = {split: table(split, shot[split], blurred) for split in COUNT}
    packs["val_unbiased"] = packs["val"].assign(id="extra-" + packs["val"]["id"])
    for split in ("train", "val"):
        packs[split] = packs[split].assign(**{"rho_0.50": True, "object_rho_0.90": packs[split].index % 2 == 0})
    for split, some in packs.items():
        some.to_parquet(root / f"images-{split}.parquet")
    files = pd.concat(packs.values())
    files["sha256"] = [hashlib.sha256(file).hexdigest() for file in files["image"]]
    meta = {"seed": SEED, "content_hash": manifest.content_hash(files)}
    (root / manifest.MINIBENCH).write_text(json.dumps(meta), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return audit.audit(folder)


def test_an_audit_judges_every_set_and_every_pack_there_is(result: dict[str, Any]) -> None:
    assert list(result["detectors"]) == ["rho_0.50", "object_rho_0.90"]
    for found in result["detectors"].values():
        assert list(found) == list(trivial_detectors.DETECTORS)
        for verdict in found.values():
            assert list(verdict) == ["train", "val", "val_unbiased", "test", "test_mean"]
            assert list(verdict["test"]) == [GENERATOR]
        assert found["high_frequency"]["test_mean"]["low"] > 0.9
    assert result["near_duplicates"]["queries"] == 2 * COUNT["val"] + COUNT["test"]
    assert result["near_duplicates"]["identical_files"] == {"all": COUNT["val"], "across_packs": COUNT["val"]}
    assert sum(result["counts"]["train"]["sets"]["rho_0.50"].values()) == COUNT["train"]


def test_an_audit_is_json_and_its_markdown_tells_every_section(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    text = markdown(result)
    for head in ("## Counts", "## Content", "## Simple statistics", "trained on object_rho_0.90", "## Near duplicates"):
        assert head in text
    mean = result["detectors"]["rho_0.50"]["high_frequency"]["test_mean"]
    assert f"{100 * mean['mean']:.1f} [" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_content_says_which_generator_loses_most(result: dict[str, Any]) -> None:
    makers = result["content"]["makers"]
    assert list(makers) == [REAL, GENERATOR] or list(makers) == [GENERATOR, REAL]
    assert makers[REAL]["colour"]["mean"] > 0.9
    drop = result["content"]["largest_drop"]
    fall = makers[REAL][drop["measure"]]["mean"] - makers[GENERATOR][drop["measure"]]["mean"]
    assert drop["points"] == pytest.approx(100 * fall, abs=1e-3)


def test_a_folder_that_was_changed_or_lacks_something_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images-train\.parquet and images-test\.parquet"):
        audit.audit(tmp_path)
    with pytest.raises(UserError, match=r"Expected a training set rho_0\.75, found rho_0\.50, object_rho_0\.90"):
        audit.audit(folder, rhos=[0.75])
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    test = pd.read_parquet(changed / "images-test.parquet")
    test.at[0, "label"] = 1 - test.at[0, "label"]
    test.to_parquet(changed / "images-test.parquet")
    with pytest.raises(UserError, match="Expected the content hash"):
        audit.audit(changed)


def test_a_sheet_is_small_repeats_and_shows_the_difference(folder: Path, tmp_path: Path) -> None:
    first, again = (contact_sheets.write_sheets(folder, tmp_path / name) for name in "ab")
    assert [path.name for path in first] == [f"{GENERATOR}.png"]
    data = first[0].read_bytes()
    assert data == again[0].read_bytes() and len(data) < contact_sheets.LARGEST
    fig = contact_sheets.contact_sheet(folder, GENERATOR, count=2)
    assert len(fig.figimage(np.zeros((1, 1))).figure.images) == 2 * 3 + 1
    texts = " ".join(text.get_text() for text in fig.texts)
    assert GENERATOR in texts and "dB" in texts and f"× {contact_sheets.AMPLIFY}" in texts


def test_a_photograph_is_shot_anew_from_its_scene(folder: Path) -> None:
    """The pack's own reals prove it: what a sheet shows as their photograph is the file itself, decoded."""
    test = pd.read_parquet(folder / "images-test.parquet")
    reals = test[test["generator"] == REAL].head(4)
    again = contact_sheets.photographs(reals)
    assert np.array_equal(again, np.stack([decode(file) for file in reals["image"]]))
    assert contact_sheets.source("1-test-000123") == (1, "test", 123)
    assert contact_sheets.source("12-clip-val-000004") == (12, "clip-val", 4)


def test_a_generator_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'deconv_gan'"):
        contact_sheets.contact_sheet(folder, "deconvgan")
