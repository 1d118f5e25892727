"""The explorer computes what training does, says what it found, and answers at once."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import structured_image
from settings import validate
from test_figures import title
from torch import Tensor, nn

from dgs.analysis.angles import energies
from dgs.analysis.explore import (
    Sample,
    Subject,
    Workbench,
    confident_mistakes,
    measure,
    operate,
    remark,
    suppress_all,
    surgery_plane,
    sweeps,
)
from dgs.analysis.explore_widgets import LAMBDAS, WIDGET, SurgeryControls, bundle
from dgs.analysis.figures.images import mistakes_sheet
from dgs.analysis.figures.plane import sweep_figure
from dgs.analysis.figures.style import png
from dgs.errors import UserError
from dgs.model.methods.base import Precomputed
from dgs.model.methods.registry import get_method
from dgs.model.step import surgery_step
from dgs.model.surgery import head_gradients, suppress
from dgs.params import Params, load_params
from dgs.workspace import Workspace

LABELS = torch.tensor([0.0, 1.0])


def known_of(labels: Tensor, captions: Tensor, frozen: Tensor, teacher: nn.Module) -> Precomputed:
    residual = teacher(frozen).squeeze(1).sigmoid().detach() - labels
    zeros = torch.zeros_like(labels)
    return Precomputed(labels, captions, frozen, zeros + 1, residual, zeros, zeros + 1)


def some_sample(width: int = 96, directions: int = 4, params: Params | None = None) -> Sample:
    """A fake image's: random features, captions and heads; `directions` harmful ones in all."""
    torch.manual_seed(1)
    heads = {name: nn.Linear(width, 1) for name in ("image", "text", "teacher")}
    features, captions, frozen = torch.randn(3, 1, width)
    known = known_of(LABELS[1:], captions, frozen, heads["teacher"])
    params = params or load_params().for_method("default")
    return Sample(features, heads, known, torch.randn(directions - 1, width), params)


def some_subject(**more: Any) -> Subject:
    sample = some_sample(**more)
    pixels = np.asarray(structured_image(0, 64, 64))
    surgery = sample.params.train.surgery
    patches = np.arange(49, dtype=np.int32)
    return Subject("an image", 1, "a red boat", pixels, pixels, patches, 8, -2.0, 0.0, True, surgery, sample)


@pytest.mark.parametrize("order", ["release", "paper"])
@pytest.mark.parametrize("scale", ["release", "per_sample"])
def test_the_explorers_surgery_is_the_training_steps(
    order: Literal["release", "paper"], scale: Literal["release", "per_sample"]
) -> None:
    size, width = 8, 12
    surgery = {"lam": 0.7, "eps": 1e-3, "order": order, "scale": scale}
    content = load_params().for_method("default").model_dump()
    content["train"] |= {"surgery": content["train"]["surgery"] | surgery, "batch_size": size}
    params = validate(content)
    heads = {name: nn.Linear(width, 1) for name in ("image", "text", "teacher")}
    features, captions, frozen = torch.randn(3, size, width)
    known = known_of(torch.arange(size).remainder(2).float(), captions, frozen, heads["teacher"])
    _, _, wanted = surgery_step(get_method("dgs"), features, heads, known, torch.randn(size, width), params)
    for i in range(size):
        row = slice(i, i + 1)
        found, directions = operate(Sample(features[row], heads, known[row], torch.randn(3, width), params))
        assert torch.equal(directions, found["harmful"])
        for name, vector in found.items():
            assert torch.allclose(vector, wanted[name][row], rtol=1e-4, atol=1e-8), name


def test_rank_k_suppression_is_orthogonal_to_all_k_directions_and_rank_1_is_the_papers() -> None:
    grad, harmful = torch.randn(1, 10).double(), torch.rand(3, 10).double()
    assert torch.allclose(harmful @ suppress_all(grad, harmful, 0.0)[0], torch.zeros(3).double(), atol=1e-12)
    assert torch.equal(suppress_all(grad, harmful[:1], 0.1), suppress(grad, harmful[:1], 0.1))
    twice = torch.cat([harmful, 5 * harmful[:1] + harmful[1:2]])
    assert torch.allclose(suppress_all(grad, twice, 0.1), suppress_all(grad, harmful, 0.1), atol=1e-9)
    assert torch.equal(suppress_all(grad, torch.zeros(2, 10).double(), 0.1), grad)


def test_what_is_said_of_the_vectors() -> None:
    task, harm = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[-2.0, 0.0, 0.0]])
    vectors = {"task": task, "harmful": harm, "beneficial": harm, "applied": torch.tensor([[0.0, 1.0, 1.0]])}
    products, said = measure(vectors, harm)
    assert products["task.applied"] == 1.0
    assert said == pytest.approx({"harm": 135.0, "turned": 60.0, "conflict": 1.0, "removed": 0.5, "added": 0.5})


def test_what_more_directions_take_off_is_removed_not_added() -> None:
    """With nothing aligned and no epsilon: turned and removed are one fact, cos^2, at every rank and in both orders."""
    sample, shares = some_sample(), []
    for rank in (1, 2, 3, 4):
        for order in ("paper", "release"):
            vectors, directions = operate(sample, rank, lam=0.0, eps=0.0, order=order)
            assert len(directions) == rank
            products, said = measure(vectors, directions)
            assert said["added"] == pytest.approx(0.0, abs=1e-6)
            assert 1 - said["removed"] == pytest.approx(np.cos(np.radians(said["turned"])) ** 2, abs=1e-5)
        shares.append(said["removed"])
        if rank == 1:
            logged = energies(pd.DataFrame([products])).iloc[0]
            assert said["removed"] == pytest.approx(logged["removed"] / logged["task"]), "as the analysis counts"
    assert shares == sorted(shares) and shares[-1] > shares[0]


def test_alignment_comes_after_every_direction_in_the_papers_order_and_before_them_in_the_releases() -> None:
    sample = some_sample()
    for order, share in (("release", 0.0), ("paper", 1.0)):
        vectors, directions = operate(sample, 3, lam=5.0, eps=0.0, order=order)
        aligned = directions @ (5.0 * vectors["beneficial"][0] / sample.params.train.batch_size)
        assert torch.allclose(directions @ vectors["applied"][0], share * aligned, atol=1e-6)


def test_the_second_direction_is_the_other_classes_and_completes_a_linear_heads_batch() -> None:
    """The harmful directions of real and fake under one linear head are the halves of its weight, up to length."""
    sample = some_sample(width=6, directions=2)
    other = head_gradients(sample.heads["text"], sample.known.captions, LABELS[:1])
    applied = operate(replace(sample, further=other), 2, lam=0.0, eps=0.0)[0]["applied"]
    weight = sample.heads["text"].weight.detach()
    batch = torch.cat([weight.clamp(min=0), (-weight).clamp(min=0)])
    assert torch.allclose(applied @ batch.T, torch.zeros(1, 2), atol=1e-6)


def test_a_checkpoint_of_another_method_is_said_to_be_one() -> None:
    subject = some_subject()
    assert remark("dgs", subject) == ""
    assert "would make of its task gradient" in remark("lora", subject)
    assert "nothing to operate on" in remark("probe", replace(subject, sample=None))


def test_each_setting_is_swept_alone() -> None:
    subject = some_subject()
    assert subject.sample is not None
    table = sweeps(subject, {"lam": [0.0, 50.0], "rank": subject.ranks})
    assert table["value"].tolist() == [0.0, 50.0, 1, 2, 3, 4]
    assert table["turned"].diff()[1:2].item() > 1
    _, said = measure(*operate(subject.sample, 3))
    assert all(table.loc[4, name] == pytest.approx(said[name]) for name in ("turned", "removed", "added"))
    frozen = replace(subject, sample=None)
    assert frozen.ranks == [] and sweeps(frozen, {"lam": [0.0]}).empty


def test_mistakes_are_the_surest_ones_of_one_checkpoint_on_test_images() -> None:
    right = ("a", 1, 9.0)
    rows = [("a", 1, -3.0), ("a", 1, -5.0), ("a", 1, -4.0), right, ("shared", 0, 2.0), *4 * [("a", 1, -9.0)]]
    scores = pd.DataFrame(rows, columns=["generator", "label", "logit"])
    scores = scores.assign(id=[f"i{i}" for i in scores.index], split="test", method="dgs", seed=0, condition="native")
    for row, other in enumerate(({"split": "val"}, {"method": "lora"}, {"seed": 1}, {"condition": "jpeg"}), start=5):
        scores.loc[row, list(other)] = list(other.values())
    found = confident_mistakes(scores, "dgs", 0, most=2)
    assert found["id"].tolist() == ["i1", "i2", "i4"] and found["group"].tolist() == ["a", "a", "real"]
    fig = mistakes_sheet(True, found, [np.zeros((4, 4, 3), np.uint8)] * 3)
    assert [text.get_text() for text in fig.texts[1:]] == ["a", "1 %", "2 %", "real", "88 %"] and len(fig.images) == 3


def test_the_portrait_names_score_caption_and_patches() -> None:
    subject = some_subject()
    fig = subject.portrait
    assert title(fig) == "A fake image, called real, wrongly: probability of being generated 11.9 %"
    assert len(fig.axes[0].patches) == 49
    (legend,) = fig.legends
    assert legend.get_title().get_text() == "“a red boat”"
    assert len(replace(subject, patches=None).portrait.axes[0].patches) == 0


def test_a_move_of_a_slider_draws_one_picture_and_runs_no_tower() -> None:
    controls = SurgeryControls(some_subject())
    moved = controls.controls
    pictures, networks = [controls.picture.value], []
    controls.picture.observe(lambda change: pictures.append(change["new"]), names="value")
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, made: networks.append(module))
    try:
        for value in LAMBDAS[-5:]:
            moved["lam"].value = value
    finally:
        hook.remove()
    assert len(pictures) == len(set(pictures)) == 1 + 5, "every move draws another picture, once"
    sample = controls.subject.sample
    assert sample is not None
    assert set(networks) == {sample.heads["image"], sample.heads["text"]}, "the heads alone, of training's own step"
    assert moved["rank"].max == 4
    before = controls.picture.value
    moved["order"].value = "paper"
    assert controls.picture.value != before


@pytest.mark.slow
def test_a_move_of_a_slider_takes_less_than_200_ms() -> None:
    controls = SurgeryControls(some_subject())
    seconds = []
    for value in LAMBDAS:
        started = time.process_time()  # what it costs, whatever else this machine does
        controls.controls["lam"].value = value
        seconds.append(time.process_time() - started)
    print(f"a move takes {1000 * float(np.median(seconds)):.0f} ms")
    assert np.median(seconds) < 0.2


def test_where_widgets_cannot_run_the_picture_stands_in_their_place() -> None:
    controls = SurgeryControls(some_subject())
    shown = bundle(controls.box, surgery_plane(controls.subject))
    assert set(shown) == {WIDGET, "image/png", "text/plain"}
    controls.show(replace(controls.subject, sample=None))
    assert controls.picture.layout.display == "none"
    assert png(sweep_figure(sweeps(some_subject(), {"lam": LAMBDAS}))).startswith(b"\x89PNG")


def test_nothing_trained_yet_is_one_sentence(tmp_path: Path) -> None:
    how = r"nothing is trained yet\. Run dvc repro train@probe, or notebooks/train\.ipynb"
    with pytest.raises(UserError, match=how):
        Workbench(Workspace(tmp_path, tmp_path / "scratch", "mini"), load_params())


@pytest.mark.slow
class TestWorkbench:
    """On what `dvc repro` made."""

    @pytest.fixture(scope="class")
    def bench(self, finished: Path) -> Workbench:
        return Workbench(Workspace(finished, finished / "scratch", "mini"), load_params("mini", finished))

    def test_a_test_image_has_the_score_that_evaluation_gave_it(self, bench: Workbench, finished: Path) -> None:
        assert bench.runs == {"probe": [0], "lora": [0], "dgs": [0]}
        scores = pd.read_parquet(finished / "build" / "mini" / "evaluate" / "scores.parquet")
        method, seed, image = bench.choose(None, None, None)
        assert (method, seed) == ("dgs", 0)
        for name in bench.runs:
            found = bench.look(name, 0, image)
            wanted = scores.query("method == @name and id == @image")["logit"].item()
            assert found.logit == pytest.approx(wanted, abs=1e-4)
            assert (found.sample is None) == (name == "probe")

    def test_a_file_gives_what_the_same_image_of_the_benchmark_gives(self, bench: Workbench, tmp_path: Path) -> None:
        from PIL import Image

        _, _, image = bench.choose("dgs", 0, None)
        theirs = bench.look("dgs", 0, image)
        path = tmp_path / "mine.png"
        Image.fromarray(theirs.image).save(path)
        mine = bench.open("dgs", 0, str(path), label=theirs.label, caption=theirs.caption)
        assert mine.logit == pytest.approx(theirs.logit, abs=1e-5)
        assert mine.sample is not None and theirs.sample is not None
        assert torch.allclose(mine.sample.known.captions, theirs.sample.known.captions, rtol=1e-3, atol=1e-6)
        assert torch.allclose(mine.sample.further, theirs.sample.further, rtol=1e-3, atol=1e-6)

    def test_mistakes_of_a_user_are_named(self, bench: Workbench, tmp_path: Path) -> None:
        image, mine = bench.choose(None, None, None)[2], tmp_path / "a.png"
        structured_image(3).save(mine)
        for what, said in {
            ("dsg", 0, image): r"No checkpoint of 'dsg'\. Did you mean 'dgs'\?",
            ("dgs", 4, image): r"No checkpoint of dgs with seed 4\. There are seeds 0\.",
            ("dgs", 0, "nothing"): "No test image or file 'nothing'",
            ("dgs", 0, str(mine)): r"Expected label = 0 \(real\) or 1 \(fake\)",
        }.items():
            with pytest.raises(UserError, match=said):
                bench.open(*what)
