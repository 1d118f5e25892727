"""Captions of real pictures: one rule, blind to the label, and how well they alone tell it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import structured_image
from copies import ROOT
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights

from dgs.data.captions import read_captions
from dgs.data.images import decode
from dgs.data.matching import match
from dgs.data.tree import scan_tree
from dgs.errors import UserError
from dgs.stats import Scored, area_under_roc, balanced_accuracy
from real import captions
from real.manifest import read_manifest
from real.text_alone import SEED, parts, rates, text_alone

CAPTIONS = ROOT / "real/captions.jsonl"
CLASSES = ResNet50_Weights.DEFAULT.meta["categories"]


class Reds(nn.Module):
    """A classifier by the mean of red alone: its first classes are red's level and the two above."""

    pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012  # as timm's

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red = (images[:, 0].mean((1, 2)) + 1) * 499
        return -(torch.arange(1000) - red[:, None]).abs()


def test_a_sentence_differs_by_classes_alone() -> None:
    assert captions.sentence(["teapot", "vase", "ant"]) == "a picture of a teapot, a vase and an ant"
    assert captions.sentence(["ant"]) == "a picture of an ant"


def test_neither_label_nor_name_nor_place_changes_a_caption(tmp_path: Path) -> None:
    """The same bytes under both labels."""
    image = structured_image(1, 300, 260)
    paths = ["test/b/1_fake/y.png", "train/a/0_real/x.png"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True)
        image.save(tmp_path / path)
    image.save(tmp_path / "stray.png")  # in no label folder: a caption of it would be refused
    found = list(captions.caption(tmp_path, Reds()))
    assert [row["path"] for row in found] == paths and found[0]["caption"] == found[1]["caption"]


def test_the_classifier_sees_what_match_copies(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, label in enumerate(("0_real", "1_fake")):
            folder = tmp_path / "pictures" / split / "g" / label
            folder.mkdir(parents=True)
            structured_image(number, 300, 260).save(folder / f"{number}.png")
    match(scan_tree(tmp_path / "pictures"), tmp_path / "matched", captions.SIDE)
    for file in sorted((tmp_path / "pictures").rglob("*.png")):
        copy = (tmp_path / "matched" / file.relative_to(tmp_path / "pictures")).with_suffix(".jpg")
        seen = captions.as_matched(file)
        assert np.array_equal(seen, decode(copy.read_bytes(), "copy")) and seen.shape == (240, 240, 3)


def test_a_picture_gets_the_caption_of_its_piece_and_not_of_the_whole(tmp_path: Path) -> None:
    pixels = np.zeros((240, 960, 3), np.uint8)
    pixels[..., 0] = np.arange(960) // 4  # red rises from side to side
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = Reds()
    piece = captions.preprocess(captions.as_matched(tmp_path / "a.png"), model)
    best = model(piece[None]).topk(3).indices[0].tolist()
    (found,) = captions.caption(tmp_path, model)
    assert found["caption"] == captions.sentence([CLASSES[number] for number in best])


def test_weights_of_other_layers_are_refused_in_a_sentence() -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer)
    with pytest.raises(UserError, match=r"Expected the weights of tf_efficientnet_lite2 .* layers of other shapes"):
        captions.load_classifier(buffer.getvalue())


def test_weights_are_read_in_the_order_of_layers_and_no_code_of_theirs_is_run() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(captions.ARCHITECTURE, pretrained=False).eval()
    renamed = {f"_other.{number}": value for number, value in enumerate(model.state_dict().values())}
    buffer = io.BytesIO()
    torch.save(renamed, buffer)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(captions.load_classifier(buffer.getvalue())(image), model(image))


def test_committed_captions_are_of_every_picture_and_of_imagenets_classes_alone() -> None:
    """So no third party's words are among them."""
    given = read_captions(CAPTIONS)
    assert list(given) == read_manifest()["path"].tolist()
    words = {word for name in CLASSES for word in f"a an picture of and {name}".replace(",", " ").split()}
    for text in given.values():
        assert text.startswith("a picture of a") and set(text.replace(",", " ").split()) <= words
    for line in CAPTIONS.read_text().splitlines():
        assert set(json.loads(line)) == {"path", "caption"}


@pytest.mark.parametrize("module", ["captions", "text_alone"])
def test_a_users_mistake_is_one_sentence(module: str) -> None:
    arguments = {"captions": ["no/folder", "--wheel", "no.whl"], "text_alone": ["--profile", "nome"]}[module]
    done = subprocess.run(
        [sys.executable, "-m", f"real.{module}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dgs: Expected") and done.stderr.count("\n") == 1


def table(tells: bool, seed: int = 0) -> pd.DataFrame:
    """Pictures in groups of three whose captions tell the label, or not."""
    rng = np.random.default_rng(seed)
    rows = []
    for split, generator, label in [
        *(("train", "a", 1), ("train", "real", 0), ("val", "a", 1), ("val", "real", 0)),
        *(("test", "b", 1), ("test", "real", 0)),
    ]:
        for number in range(30):
            word = ("dog", "cat")[label] if tells else rng.choice(["dog", "cat"])
            embedding = rng.normal(size=4) + (3 * label if tells else 0)
            rows.append(
                (split, generator, label, f"{split}{generator}{number // 3}", f"a picture of a {word}", embedding)
            )
    return pd.DataFrame(rows, columns=["split", "generator", "label", "group", "caption", "embedding"])


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("real.text_alone.DRAWS", 200)


@pytest.mark.parametrize("tells", [True, False])
def test_text_alone_finds_what_captions_tell_and_nothing_else(tells: bool) -> None:
    found = text_alone(table(tells))
    assert set(found["reader"]) == {"words", "embedding"} and set(found["generator"]) == {"all", "a", "b"}
    for row in found.itertuples():
        assert row.auroc_low <= row.auroc <= row.auroc_high
        assert row.auroc > 0.95 if tells else row.auroc_low < 0.6


def test_without_a_text_side_words_alone_are_read() -> None:
    assert set(text_alone(table(True).assign(embedding=[np.zeros(0)] * 180))["reader"]) == {"words"}


def test_rates_are_the_packages_and_their_ends_those_of_pictures_drawn_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"label": [0, 1] * 30, "logit": rng.normal(size=60).round(1), "group": rng.integers(0, 25, 60)})
    labels, logits, found = rows["label"].to_numpy(), rows["logit"].to_numpy(), rates(rows)
    members, draws = list(rows.groupby("group").indices.values()), np.random.default_rng(SEED)
    for name, rate in (("balanced_acc", balanced_accuracy), ("auroc", area_under_roc)):
        assert found[name] == pytest.approx(rate(Scored.of(labels, logits)))
    drawn = []
    for _ in range(200):  # as `few_draws` asks
        at = np.concatenate([members[i] for i in draws.integers(len(members), size=len(members))])
        drawn.append(area_under_roc(Scored.of(labels[at], logits[at])))
    assert (found["auroc_low"], found["auroc_high"]) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))


def test_pictures_of_one_group_count_as_one_fact() -> None:
    """Ten pictures for each that the same group has widen no interval and narrow none."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"label": [0, 1] * 20, "logit": rng.normal(size=40), "group": range(40)})
    once, often = rates(rows), rates(pd.concat([rows] * 10))
    assert once == pytest.approx(often, abs=0.02)
    alone = rates(pd.concat([rows] * 10).assign(group=range(400)))
    assert alone["auroc_high"] - alone["auroc_low"] < 0.6 * (once["auroc_high"] - once["auroc_low"])


def test_a_generator_is_compared_with_its_own_photographs_or_the_shared_ones() -> None:
    names = ["a", "a", "b", "real", "AIGIBench/SDXL", "AIGIBench/real"]
    rows = pd.DataFrame({"generator": names, "label": [0, 1, 1, 0, 1, 0], "place": range(6)})
    assert {name: sorted(part["place"]) for name, part in parts(rows)} == {
        "all": list(range(6)),
        "a": [0, 1],
        "b": [2, 3],
        "AIGIBench/SDXL": [4, 5],
    }
